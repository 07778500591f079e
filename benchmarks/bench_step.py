"""What transport takes of a training step: writes docs/results/transport-step.json and prints the table of it.

    python benchmarks/bench_step.py --label after
    git worktree add ../before a8b68c6 && PYTHONPATH=../before/src python benchmarks/bench_step.py --label before

Trains OTCXR with its defaults on phantoms (96 px, ResNet-18 of width 16, batches of 64), notes the transport problems
it really meets, and then solves those alone, forward and backward. A step is the median time from one transport call to
the next. The label names the entry, so that two versions of the package can be measured on one machine in one sitting.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from pages import embed

import otcxr
from otcxr.methods import METHODS
from otcxr.methods import otcxr as method_module
from otcxr.runs import write_atomic
from otcxr.train import config_from_plain, pretrain

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "transport-step.json"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="name of the entry, such as before or after")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--objective", default="value", choices=["value", "sharp"])
    arguments = parser.parse_args()
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
        "machine": next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                         if line.startswith("model name")), "unknown"),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
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
