"""What remains of the method after pre-training: time and memory of its encoder beside one that was never trained.

    python benchmarks/bench_after.py          docs/results/after.json

OTCXR and SimCLR are trained for an epoch; their encoders are loaded as any user loads them, beside random weights of
the same architecture. The three take turns at inference and at fine-tuning steps (forward, backward, AdamW) on equal
images; the ratio is the median over the turns of a time over that of the random weights in the same turn. Memory is
what a process of its own needs at most for a fine-tuning step beyond what it held before. Files are compared in bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import machine
from torch import nn

from otcxr.attribution import ProbedEncoder
from otcxr.files import write_atomic
from otcxr.nn.encoder import build_encoder, load_encoder
from otcxr.runs import describe_environment
from otcxr.settings import config_from_plain
from otcxr.train import pretrain

OUT = Path(__file__).parent.parent / "docs" / "results" / "after.json"
SIZE, BATCH = 96, 32


def train(method: str, out: Path) -> Path:
    pretrain(config_from_plain({
        "data": {"source": "phantom:192,size=96"}, "method": {"name": method}, "views": {"size": SIZE},
        "encoder": {"name": "resnet18", "width": 16, "stride": 16}, "out": str(out),
        "train": {"epochs": 1, "batch_size": BATCH, "accelerator": "cpu", "probes": 0, "online_images": 0},
    }))  # fmt: skip
    return out


def calls(encoder: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Inference and a fine-tuning step of an encoder with the model that fine-tuning trains."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 1, SIZE, SIZE, generator=generator)
    labels = torch.rand(BATCH, 7, generator=generator).round()
    model = ProbedEncoder(encoder, np.zeros((7, encoder.channels[-1])), np.zeros(7))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)

    def infer() -> None:
        model.eval()
        with torch.inference_mode():
            model(images)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return infer, step


_MEMORY = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from bench_after import calls, load_encoder, build_encoder
which = sys.argv[2]
encoder = load_encoder(which) if which != "random" else build_encoder(
    "resnet18", width=16, stride=16, padding="replicate", seed=0)
infer, step = calls(encoder)
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is counted from here
before = status("VmRSS")
for _ in range(5):
    step()
print((status("VmHWM") - before) / 1024)
"""


def memory(which: str) -> float:
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(Path(__file__).parent), which], check=True,
                          capture_output=True, text=True)  # fmt: skip
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=41)
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        runs = {name: train(name, Path(temporary) / name) for name in ("otcxr", "simclr")}
        encoders = {"random": build_encoder("resnet18", width=16, stride=16, padding="replicate", seed=0),
                    **{name: load_encoder(run) for name, run in runs.items()}}  # fmt: skip
        size = {name: (run / "encoder.safetensors").stat().st_size for name, run in runs.items()}
        asked = {name: calls(encoder) for name, encoder in encoders.items()}
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in asked}
        for turn in range(words.turns + 2):
            order = list(asked) if turn % 2 else list(asked)[::-1]
            for kind in (0, 1):
                for name in order:
                    begun = time.perf_counter()
                    asked[name][kind]()
                    if turn > 1:  # the first ones warm up
                        times[name][kind].append(time.perf_counter() - begun)
        peaks = {name: [memory(str(runs[name]) if name in runs else name) for _ in range(3)] for name in encoders}
    rows: dict[str, Any] = {}
    for name, both in times.items():
        rows[name] = {
            "parameters": sum(p.numel() for p in encoders[name].parameters()),
            "memory_mb": statistics.median(peaks[name]),
            "memory_ratio": statistics.median(peaks[name]) / statistics.median(peaks["random"]),
        }
        for kind, taken, base in zip(("inference", "finetune_step"), both, times["random"], strict=True):
            ratios = sorted(ours / theirs for ours, theirs in zip(taken, base, strict=True))
            quarter = len(ratios) // 4
            rows[name] |= {
                f"{kind}_ms": 1e3 * statistics.median(taken), f"{kind}_ratio": statistics.median(ratios),
                f"{kind}_ratio_middle": [ratios[quarter], ratios[-1 - quarter]],
            }  # fmt: skip
    result = {
        "command": "python benchmarks/bench_after.py", "rows": rows, "file_bytes": size, "turns": words.turns,
        "architecture": "resnet18, width 16, stride 16, replicate padding", "size": SIZE, "batch": BATCH, "threads": 1,
        "machine": machine(), "environment": describe_environment(),
    }  # fmt: skip
    write_atomic(OUT, json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
