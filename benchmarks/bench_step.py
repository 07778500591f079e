"""What a training step costs: every method beside SimCLR, and what OTCXR spends on transport.

    python benchmarks/bench_step.py                          docs/results/step.json, table in docs/methods/README.md
    python benchmarks/bench_step.py --width 16 --device cuda
    python benchmarks/bench_step.py --label after            docs/results/transport-step.json, table in docs/ot.md

Without a label: steps (forward, backward, AdamW, what follows the step) of every method on the same phantoms, 96 px,
with its default views. Methods take turns, so that what else the machine does falls on all; the ratio is the median
over the turns of the method's time over SimCLR's in the same turn. Memory is what a process of its own needs at most
above what it held before the first step. OTCXR's parts are measured within whole steps, forward and, where a gradient
passes through them, backward.

With a label: trains OTCXR with its defaults, notes the transport problems it really meets, and then solves those alone,
forward and backward. A step is the median time from one transport call to the next. The label names the entry, so that
two versions of the package can be measured on one machine in one sitting:

    git worktree add ../before a8b68c6 && PYTHONPATH=../before/src python benchmarks/bench_step.py --label before
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from pages import embed, machine
from torch import Tensor

import otcxr
from otcxr.data.dataset import read_pixels
from otcxr.data.geometry import ViewBatch
from otcxr.data.sources import open_collection
from otcxr.data.view_spec import ViewsConfig, draw_views, grey_image, view_generator
from otcxr.data.views import carry_out, collate_views
from otcxr.files import write_atomic
from otcxr.methods import METHODS
from otcxr.methods import otcxr as method_module
from otcxr.nn.encoder import build_encoder
from otcxr.ot import backends
from otcxr.train import config_from_plain, pretrain

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "transport-step.json"
STEP = ROOT / "docs" / "results" / "step.json"
IMAGES = 2000  # to which queues are fitted


def train(epochs: int, objective: str) -> tuple[list[float], list[tuple[Any, ...]], dict[str, Any]]:
    """Times between transport calls, the problems of the last steps, and the options they were solved with."""
    from otcxr.config import to_plain

    plain = yaml.safe_load((ROOT / "configs" / "nih-mini.yaml").read_text())
    plain["method"] = {"name": "otcxr", **to_plain(METHODS["otcxr"].settings), "objective": objective}
    plain["data"]["source"] = "phantom:512,size=96"
    plain["train"]["epochs"] = epochs
    calls: list[float] = []
    problems: list[tuple[Any, ...]] = []
    options: dict[str, Any] = {}
    solve = method_module.sinkhorn

    def noted(cost: Any, a: Any, b: Any, **given: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append(time.perf_counter())
            problems.append(tuple(x.detach().clone() for x in (cost, a, b)))
            options.update(given)
        return solve(cost, a, b, **given)

    method_module.sinkhorn = noted  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        plain["out"] = f"{folder}/run"
        pretrain(config_from_plain(plain))
    method_module.sinkhorn = solve  # type: ignore[assignment]
    return [y - x for x, y in itertools.pairwise(calls)], problems, options


def alone(problems: list[tuple[Any, ...]], options: dict[str, Any]) -> dict[str, Any]:
    """Time of forward and backward on the noted problems, and what they ended with."""
    forward, both, residuals, iterations = [], [], [], []
    for cost, a, b in problems:
        cost = cost.requires_grad_()
        start = time.perf_counter()
        out = method_module.sinkhorn(cost, a, b, **options)
        middle = time.perf_counter()
        out.value.mean().backward()
        both.append(time.perf_counter() - start)
        forward.append(middle - start)
        residuals.append(float(out.residual.max()))
        iterations.append(float(out.iterations.double().mean()))
    return {
        "forward_ms": 1e3 * statistics.median(forward), "forward_backward_ms": 1e3 * statistics.median(both),
        "worst_residual": max(residuals), "mean_iterations": statistics.mean(iterations),
    }  # fmt: skip


def make_batch(name: str, images: int, device: str) -> ViewBatch:
    """Views of phantoms as the method wants them."""
    row = METHODS[name]
    views = ViewsConfig(size=96, **{"clean": row.build.needs_clean, **row.views})
    records = open_collection(f"phantom:{images},seed=1,size=96").records
    made = []
    for index, record in enumerate(records):
        image = grey_image(read_pixels(record.image))
        drawn = draw_views(image.pixels.shape[:2], image.valid, views, view_generator(0, 0, index))
        made.append(carry_out(image, drawn, clean=views.clean))
    batch = collate_views(made)

    def moved(parts: tuple[Any, ...] | None) -> Any:
        return None if parts is None else tuple(part.to(device) for part in parts)

    return ViewBatch(moved(batch.views), batch.geometry.to(device), moved(batch.valid), moved(batch.clean))


class Stepper:
    """One method with its optimizer and its views."""

    def __init__(self, name: str, words: argparse.Namespace) -> None:
        settings = METHODS[name].settings
        if hasattr(settings, "for_images"):
            settings = settings.for_images(IMAGES)
        encoder = build_encoder("resnet18", width=words.width, stride=16, padding="replicate", seed=0)
        self.method = METHODS[name].build(encoder, settings).to(words.device).train()
        self.batch = make_batch(name, words.batch, words.device)
        trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-3)

    def step(self) -> float:
        """Seconds of one step."""
        wait(self.batch.geometry.device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.method(self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.method.after_step(0.1)
        float(loss.detach())
        wait(self.batch.geometry.device)
        return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_of(name: str, words: argparse.Namespace) -> float:
    """Largest memory of two steps in MB, above what was held before; alone in this process."""
    stepper = Stepper(name, words)
    if words.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    stepper.step()
    stepper.step()
    if words.device == "cuda":
        return float(torch.cuda.max_memory_allocated() - before) / 1e6
    return (1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) - before) / 1e6


class _Mark(torch.autograd.Function):
    """The identity; calls ``note`` when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.note = note
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.note()
        return (None, *gradients)


class Clock:
    """Seconds that a function takes within a step, forward and, where a gradient passes through it, backward."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.device, self.seconds = function, device, 0.0
        self._begun = 0.0

    def _begin(self) -> None:
        wait(self.device)
        self._begun = time.perf_counter()

    def _end(self) -> None:
        wait(self.device)
        self.seconds += time.perf_counter() - self._begun

    def _marked(self, parts: Any, note: Callable[[], None]) -> list[Any]:
        """The same values; a gradient that passes any of them is noticed, once for all."""
        parts = list(parts)
        at = [i for i, x in enumerate(parts) if isinstance(x, Tensor) and x.requires_grad]
        if at:
            for i, x in zip(at, _Mark.apply(note, *(parts[i] for i in at)), strict=True):
                parts[i] = x
        return parts

    def __call__(self, *given: Any, **named: Any) -> Any:
        given = tuple(self._marked(given, self._end))
        self._begin()
        out = self.function(*given, **named)
        self._end()
        if isinstance(out, Tensor):
            return self._marked([out], self._begin)[0]
        marked = self._marked(out, self._begin)
        return type(out)(*marked) if hasattr(out, "_fields") else tuple(marked)


def shares(words: argparse.Namespace) -> dict[str, Any]:
    """What of a step of OTCXR goes into CV-SIM and its masses, cost, Sinkhorn, and what the geometry tells (prior of
    place, overlap): measured within whole steps."""
    stepper = Stepper("otcxr", words)
    method: Any = stepper.method
    device = stepper.batch.geometry.device
    for _ in range(3):
        stepper.step()
    places = {
        "cv_sim": ((method.cross_view, "forward"), (method, "_mass")),
        "cost": ((method_module, "cosine_cost"), (method_module, "mean_of_rows")),
        "sinkhorn": ((method_module, "sinkhorn"),),
        "geometry": ((method, "_elsewhere"), (method, "_overlap")),
    }
    clocks = {part: [Clock(getattr(*place), device) for place in there] for part, there in places.items()}
    for part, there in places.items():
        for (owner, name), clock in zip(there, clocks[part], strict=True):
            setattr(owner, name, clock)
    found: dict[str, list[float]] = {part: [] for part in places}
    steps = []
    for _ in range(words.turns):
        for clock in (c for there in clocks.values() for c in there):
            clock.seconds = 0.0
        steps.append(stepper.step())
        for part, there in clocks.items():
            found[part].append(sum(clock.seconds for clock in there))
    for part, there in places.items():
        for (owner, name), clock in zip(there, clocks[part], strict=True):
            setattr(owner, name, clock.function)
    whole = [sum(found[part][turn] for part in places) / step for turn, step in enumerate(steps)]
    return {
        "step_ms": 1e3 * statistics.median(steps),
        "parts_ms": {part: 1e3 * statistics.median(times) for part, times in found.items()},
        "shares": {part: statistics.median(t / s for t, s in zip(times, steps, strict=True))
                   for part, times in found.items()},
        "share": statistics.median(whole), "share_range": [min(whole), max(whole)],
    }  # fmt: skip


def methods_entry(words: argparse.Namespace) -> dict[str, Any]:
    """Times by turns, memory by processes, and OTCXR's shares."""
    steppers = {name: Stepper(name, words) for name in METHODS}
    turns: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(words.turns + 1):
        for name, stepper in steppers.items():
            seconds = stepper.step()
            if turn:  # the first one is for warming up
                turns[name].append(seconds)
    del steppers
    memory = {}
    for name in METHODS:
        command = [sys.executable, __file__, "--memory-of", name, "--width", str(words.width), "--batch",
                   str(words.batch), "--device", words.device]  # fmt: skip
        memory[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    base = turns["simclr"]
    rows = {
        name: {
            "step_ms": 1e3 * statistics.median(own),
            "time_ratio": statistics.median(a / b for a, b in zip(own, base, strict=True)),
            "time_ratio_range": [min(a / b for a, b in zip(own, base, strict=True)),
                                 max(a / b for a, b in zip(own, base, strict=True))],
            "memory_mb": memory[name], "memory_ratio": memory[name] / memory["simclr"],
        }
        for name, own in turns.items()
    }  # fmt: skip
    device = torch.cuda.get_device_name() if words.device == "cuda" else machine()
    return {
        "command": f"python benchmarks/bench_step.py --width {words.width} --batch {words.batch} --turns {words.turns} "
        f"--device {words.device}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": device,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transport": backends(words.device)[0],
        "width": words.width, "batch": words.batch, "turns": words.turns, "methods": rows, "otcxr": shares(words),
    }  # fmt: skip


def compare(words: argparse.Namespace) -> None:
    """Measure, keep, print and embed the table of methods."""
    entries = json.loads(STEP.read_text()) if STEP.is_file() else {}
    key = f"{words.device}, width {words.width}"
    entries[key] = methods_entry(words)
    write_atomic(STEP, json.dumps(entries, indent=1) + "\n")
    table = []
    for name, e in entries.items():
        table += [f"ResNet-18, 96 px, batches of {e['batch']}, {name}:", "",
                  "| method | step, ms | time / SimCLR's | memory, MB | memory / SimCLR's |",
                  "|---|---|---|---|---|"]  # fmt: skip
        for method, row in e["methods"].items():
            low, high = row["time_ratio_range"]
            table.append(
                f"| `{method}` | {row['step_ms']:.0f} | {row['time_ratio']:.2f} ({low:.2f} to {high:.2f}) | "
                f"{row['memory_mb']:.0f} | {row['memory_ratio']:.2f} |"
            )
        share, (low, high) = e["otcxr"]["shares"], e["otcxr"]["share_range"]
        spent = f"{e['otcxr']['share']:.1%} ({low:.1%} to {high:.1%})"
        table += ["", f"OTCXR spends {spent} of its step on CV-SIM with the masses ({share['cv_sim']:.1%}), cost "
                  f"({share['cost']:.1%}), Sinkhorn ({share['sinkhorn']:.1%}; back end: "
                  f"{e['transport']}), place and overlap ({share['geometry']:.1%}), forward and backward, measured "
                  "within whole steps. "
                  f"{e['machine']}, {e['threads']} thread(s), torch {e['torch']}, {e['date'][:10]}; median of "
                  f"{e['turns']} turns, in brackets the least and the largest.", ""]  # fmt: skip
    embed(ROOT / "docs" / "methods" / "README.md", "step", table)
    print("\n".join(table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="", help="measure transport alone; name of the entry, before or after")
    parser.add_argument("--epochs", type=int, default=8, help="with a label")
    parser.add_argument("--objective", default="value", choices=["value", "sharp"], help="with a label")
    parser.add_argument("--width", type=int, default=64, help="of the encoder, without a label")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_of(arguments.memory_of, arguments))
        return
    if not arguments.label:
        compare(arguments)
        return
    steps, problems, options = train(arguments.epochs, arguments.objective)
    last = problems[len(problems) // 2 :]
    alone(last[:3], options)
    found = alone(last, options)
    step_ms = 1e3 * statistics.median(steps[len(steps) // 2 :])
    where = Path(otcxr.__file__).parent
    entry = {
        "command": f"python benchmarks/bench_step.py --label {arguments.label} --objective {arguments.objective}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True,
                                 check=False).stdout.strip(),
        "machine": machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "problems": list(problems[0][0].shape), "options": {k: v for k, v in options.items() if v is not None},
        "steps": len(problems), "step_ms": step_ms, **found, "share_of_step": found["forward_backward_ms"] / step_ms,
    }  # fmt: skip
    entries = json.loads(OUT.read_text()) if OUT.is_file() else {}
    entries[arguments.label] = entry
    write_atomic(OUT, json.dumps(entries, indent=1) + "\n")
    table = ["| version | step, ms | transport in it, ms | share | mean iterations | worst residual |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for label, e in entries.items():
        table.append(
            f"| {label} ({e['commit']}) | {e['step_ms']:.0f} | {e['forward_backward_ms']:.1f} | "
            f"{e['share_of_step']:.1%} | {e['mean_iterations']:.0f} | {e['worst_residual']:.1e} |"
        )
    last = entries[arguments.label]
    where = f"Batches of {'x'.join(map(str, last['problems']))}; {last['machine']}, {last['threads']} threads, "
    table += ["", where + f"torch {last['torch']}, {last['date'][:10]}."]
    embed(ROOT / "docs" / "ot.md", "step", table)
    print("\n".join(table))


if __name__ == "__main__":
    main()
