"""What the health panel costs: writes docs/results/health-cost.json and prints the table of it.

    python benchmarks/bench_health.py                            both sizes on the CPU
    python benchmarks/bench_health.py --device cuda              the same on a GPU, the large one with batches of 256
    python benchmarks/bench_health.py --methods otcxr simclr --sizes narrow --repeats 3 --out /tmp/health-cost.json

For every method of the table: median time of a training step (forward, backward, clipping, AdamW) on one fixed batch of
synthetic views, and of a step with a look (``observe=True``, then ``observe`` and ``verdict``), in turn so that both
meet the same machine. ``extra_ms`` is the median of the differences of neighbours, ``look_ms`` that of ``observe`` and
``verdict`` alone: no difference of large numbers, but without what the method does for a look. The share is the larger
of the two by the time of the steps of one look, ``train.health_every`` = 50. Entries of other devices, sizes and
methods are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pages import embed, machine
from torch import Tensor

import otcxr
from otcxr.data.geometry import ViewBatch
from otcxr.files import write_atomic
from otcxr.health import observe, verdict
from otcxr.methods import METHODS, SSLMethod
from otcxr.nn.encoder import build_encoder
from otcxr.runs import describe_environment

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "health-cost.json"
EVERY = 50  # steps between two looks: the default of train.health_every
GOAL = 0.02


class Size(NamedTuple):
    encoder: str
    width: int
    pixels: int
    batch: dict[str, int]  # by device
    repeats: float  # as a share of --repeats


SIZES = {
    "narrow": Size("resnet18", 16, 96, {"cpu": 64, "cuda": 64}, 1.0),
    "large": Size("resnet50", 64, 224, {"cpu": 16, "cuda": 256}, 0.2),
}


def synthetic(images: int, pixels: int, device: torch.device) -> ViewBatch:
    """Two smooth random views of each image, the second shifted by a quarter; the corner of the first is not valid."""
    generator = torch.Generator().manual_seed(0)

    def view() -> Tensor:
        coarse = torch.rand(images, 1, 12, 12, generator=generator)
        return torch.nn.functional.interpolate(coarse, pixels, mode="bilinear").to(device)

    views = (view(), view())
    geometry = torch.eye(3)[:2].expand(2, images, 2, 3).clone()
    geometry[1, :, 0, 2] = 0.25
    valid = [torch.ones(images, 1, pixels, pixels, dtype=torch.bool, device=device) for _ in views]
    valid[0][..., : pixels // 6, : pixels // 6] = False
    return ViewBatch(views, geometry.to(device), tuple(valid), views)


def build(name: str, size: Size, device: torch.device) -> SSLMethod:
    torch.manual_seed(0)
    stride = 16 if size.pixels <= 128 else 32
    encoder = build_encoder(size.encoder, width=size.width, stride=stride, padding="replicate", seed=0)
    method = METHODS[name].build(encoder, METHODS[name].settings).to(device).train()
    return method.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def measure(name: str, size: Size, batch_size: int, repeats: int, device: torch.device, half: bool) -> dict[str, Any]:
    batch, method = synthetic(batch_size, size.pixels, device), build(name, size, device)
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    looks: list[float] = []
    seen: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(look: bool) -> float:
        start = now()
        precision: AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
        with precision:
            output = method(batch, observe=look)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        method.after_step(0.5)
        if look:
            before = now()
            seen.update(observe(output.observed, batch, method.encoder.first_centre))
            verdict(seen)
            looks.append(now() - before)
        return now() - start

    for look in (False, True):  # compilation and caches
        step(look)
    looks.clear()
    pairs = [(step(False), step(True)) for _ in range(repeats)]
    plain = statistics.median(p for p, _ in pairs)
    extra, alone = statistics.median(q - p for p, q in pairs), statistics.median(looks)
    return {
        "encoder": size.encoder, "width": size.width, "pixels": size.pixels, "batch": batch_size,
        "tokens_limit": seen["effective_rank_tokens_limit"], "repeats": repeats,
        "precision": "bf16-mixed" if half else "32-true",
        "step_ms": 1e3 * plain, "extra_ms": 1e3 * extra, "look_ms": 1e3 * alone,
        "share": max(extra, alone) / (EVERY * plain),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batch", type=int, help="images a step, instead of each size's own")
    parser.add_argument("--repeats", type=int, default=20, help="of the narrow size; the large one takes a fifth")
    parser.add_argument("--bf16", action="store_true", help="mixed precision: faster steps, the same look")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    command = f"python benchmarks/bench_health.py --device {device} --repeats {arguments.repeats}"
    command += (f" --batch {arguments.batch}" if arguments.batch else "") + (" --bf16" if arguments.bf16 else "")
    about = {
        **describe_environment(), "machine": machine(), "device": str(device), "command": command,
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(otcxr.__file__).parent,
                                 capture_output=True, text=True, check=False).stdout.strip(),
    }  # fmt: skip
    entries = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for size_name in arguments.sizes:
        size = SIZES[size_name]
        batch = arguments.batch or size.batch[device.type]
        group = f"{device.type}, {size_name}, batch {batch}" + (", bf16" if arguments.bf16 else "")
        for name in arguments.methods:
            found = measure(name, size, batch, max(2, round(arguments.repeats * size.repeats)), device, arguments.bf16)
            print(f"{group}, {name}: step {found['step_ms']:.1f} ms, extra {found['extra_ms']:.1f} ms, "
                  f"look {found['look_ms']:.1f} ms, share {found['share']:.2%}", flush=True)  # fmt: skip
            old = entries.get(group, {}).get("methods", {})
            found |= {"date": about["date"], "commit": about["commit"]}
            entries[group] = {**about, "every": EVERY, "methods": {**old, name: found}}
            write_atomic(arguments.out, json.dumps(entries, indent=1, allow_nan=False) + "\n")
    table = ["| size | method | step, ms | extra of a look, ms | share, one look in 50 steps | goal |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for group, entry in entries.items():
        for name, e in entry["methods"].items():
            met = "met" if e["share"] < GOAL else "missed"
            extra = max(e["extra_ms"], e["look_ms"])
            table.append(
                f"| {group} | {name} | {e['step_ms']:.1f} | {extra:.1f} | {e['share']:.2%} | {GOAL:.0%}: {met} |"
            )
    print("\n" + "\n".join(table))
    if arguments.out == OUT:
        embed(ROOT / "docs" / "training.md", "health", table)


if __name__ == "__main__":
    main()
