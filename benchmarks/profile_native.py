"""Where the time of a native transport call goes: docs/results/transport-profile.json and its table in docs/ot.md.

    python benchmarks/profile_native.py

Parts are differences of calls: one iteration only (reading the cost, exponentials, writing the plan), all iterations,
with the adjoint of the sharp objective, and through the front door with backward. One thread, medians, error 1e-3.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pages import embed
from sinkhorn_peers import workload

from otcxr.files import write_atomic
from otcxr.ot import native, sinkhorn
from otcxr.runs import describe_environment

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(128, 49), (512, 49), (32, 196), (2, 784)]


def median_ms(call: Callable[[], Any], repeats: int = 15) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    cells = []
    for batch, n in SIZES:
        cost, a, b = workload(batch, n, n, 9000)
        given = (cost, a, b, 0.05, None)
        leaves = [x.clone().requires_grad_() for x in (cost, a, b)]

        def whole(leaves: list[torch.Tensor] = leaves) -> Any:
            out = sinkhorn(
                *leaves, epsilon=0.05, tolerance=1e-3, max_iterations=5000, objective="sharp", backend="native"
            )
            return torch.autograd.grad(out.value.sum(), leaves)

        fixed = median_ms(lambda given=given: native.solve(*given, 1, 1e-3))
        solved = median_ms(lambda given=given: native.solve(*given, 5000, 1e-3))
        adjoint = median_ms(lambda given=given: native.solve_sharp(*given, 5000, 1e-3))
        total = median_ms(whole)
        cells.append({"batch": batch, "n": n, "fixed_ms": fixed, "iterations_ms": solved - fixed,
                      "adjoint_ms": adjoint - solved, "front_and_backward_ms": total - adjoint,
                      "total_ms": total})  # fmt: skip
    result = {
        "command": "python benchmarks/profile_native.py",
        "environment": describe_environment(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
        "cells": cells,
    }
    write_atomic(ROOT / "docs" / "results" / "transport-profile.json", json.dumps(result, indent=1) + "\n")
    names = {"fixed_ms": "read, exponentials, write", "iterations_ms": "iterations", "adjoint_ms": "adjoint (S)",
             "front_and_backward_ms": "checks, value, backward"}  # fmt: skip
    table = ["| batch | total S, ms | " + " | ".join(names.values()) + " |", "|---|---|" + "---|" * len(names)]
    for cell in cells:
        shares = " | ".join(f"{cell[key] / cell['total_ms']:.0%}" for key in names)
        table.append(f"| {cell['batch']}x{cell['n']} | {cell['total_ms']:.2f} | {shares} |")
    embed(ROOT / "docs" / "ot.md", "profile", table)
    print("\n".join(table))


if __name__ == "__main__":
    # as in bench_sinkhorn.py: memory that is given back to the system after every call would be paid for at random
    keep = {"MALLOC_TRIM_THRESHOLD_": str(10**11), "MALLOC_MMAP_THRESHOLD_": str(2 * 10**9)}
    if not keep.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | keep)
    main()
