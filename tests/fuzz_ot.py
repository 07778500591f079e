"""Random small transport problems, many at once, and what must hold of every single one.

    python tests/fuzz_ot.py --problems 1000000 --seed 0            # some minutes
    python tests/fuzz_ot.py --seconds 60 --backend portable        # as many as go into a minute

Every batch is drawn from (seed, number of the batch, --count) alone, so the command that is printed with a failure
draws the same batch again. Exit code 0: all hold; 1: something does not. A batch that takes longer than --limit seconds
is named by a second process, as a hanging kernel may not let this one speak, and this one is killed (137).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from otcxr.ot import backends, sinkhorn

COSTS = ["random", "sparse", "equal", "repeated", "matched", "whole", "tiny"]
MASSES = ["uniform", "softmax", "sharp", "zeros", "one", "tiny", "sharp and zeros"]
SHIFTS = [0.0, 0.0, 0.0, 1.0, -1.0, 10.0, -10.0, 100.0, -100.0]


class Batch(NamedTuple):
    """Problems of one shape and their common options; ``made`` names how each one was made."""

    cost: Tensor
    a: Tensor
    b: Tensor
    options: dict
    slope: Tensor | None  # of the loss in the plan; None: the loss is the sum of the values alone
    made: list[str]


def draw_masses(rng, kind, count, size, soft):
    out = np.ones((count, size))
    scores = rng.standard_normal((count, size))
    if kind == "softmax":
        out = np.exp(scores)
    elif kind.startswith("sharp"):
        out = np.exp(np.minimum(12 * scores - (12 * scores).max(-1, keepdims=True), 0))
    elif kind == "zeros":
        out = rng.random((count, size)) + 0.05
    elif kind == "one":
        out = np.eye(size)[rng.integers(size, size=count)]
    elif kind == "tiny":
        out = np.where(rng.random((count, size)) < 0.5, 1e-30, rng.random((count, size)) + 0.05)
    if "zeros" in kind:
        out = out * (rng.random((count, size)) > 0.4)
    empty = out.sum(-1) < 1e-3
    out[empty, rng.integers(size, size=count)[empty]] = 1.0
    out = out / out.sum(-1, keepdims=True)
    return out * np.exp(rng.uniform(-2, 2, (count, 1))) if soft else out


def draw_costs(rng, kind, count, n, m):
    cost = 2 * rng.random((count, n, m))
    if kind == "sparse":
        return cost * (rng.random(cost.shape) < 0.3)
    if kind == "equal":
        return np.broadcast_to(2 * rng.random((count, 1, 1)), cost.shape)
    if kind == "repeated":
        return cost[:, rng.integers(n, size=n)]
    if kind == "matched":
        return 1 - np.eye(n, m)[rng.permutation(n)] + 0.2 * cost
    if kind == "whole":
        return cost.round()
    return cost * (1e-6 if kind == "tiny" else 1.0)


def draw_batch(seed: int, index: int, count: int) -> Batch:
    """The batch with this number: one shape, epsilon and reach; costs and masses of several kinds."""
    rng = np.random.default_rng([seed, index])
    n, m = rng.integers(1, 17, size=2)
    epsilon = float(np.exp(rng.uniform(np.log(0.005), np.log(10.0))))
    reach = None if rng.random() < 0.5 else float(np.exp(rng.uniform(np.log(0.05), np.log(10.0))))
    dtype = torch.float32 if rng.random() < 0.9 else torch.float64
    options = {
        "epsilon": epsilon, "reach": reach, "objective": str(rng.choice(["value", "sharp"])),
        "tolerance": float(rng.choice([1e-2, 1e-3, 1e-4, 1e-4, 1e-5])),
        "max_iterations": int(rng.choice([1, 7, 100, 500, 1000, 1000, 1000])),
    }  # fmt: skip
    parts, made = [], []
    share = -(-count // 5)
    for start in range(0, count, share):
        size = min(share, count - start)
        kinds = [str(rng.choice(x)) for x in (COSTS, MASSES, MASSES)]
        shift = float(rng.choice(SHIFTS))
        shift = shift if reach is None else max(shift, -reach)
        cost = draw_costs(rng, kinds[0], size, n, m) + shift
        a, b = (draw_masses(rng, k, size, width, reach is not None) for k, width in ((kinds[1], n), (kinds[2], m)))
        parts.append((cost, a, b))
        made += [f"cost {kinds[0]} {shift:+g}, a {kinds[1]}, b {kinds[2]}"] * size
    inputs = [torch.tensor(np.concatenate(x), dtype=torch.float64).to(dtype) for x in zip(*parts, strict=True)]
    slope = torch.tensor(rng.standard_normal((count, n, m))).to(dtype) if rng.random() < 0.5 else None
    return Batch(*inputs, options, slope, made)


def spread(x: Tensor, absent: Tensor) -> Tensor:
    """Largest minus smallest entry of every problem, where there is mass."""
    most, least = x.masked_fill(absent, -torch.inf).flatten(1), x.masked_fill(absent, torch.inf).flatten(1)
    return (most.amax(-1) - least.amin(-1)).double()


def bad_samples(batch: Batch, backend: str | None) -> dict[str, Tensor]:
    """For everything that must hold, a bool for every problem: does it not."""
    leaves = [x.clone().requires_grad_() for x in (batch.cost, batch.a, batch.b)]
    out = sinkhorn(*leaves, **batch.options, backend=backend)
    loss = out.value.sum() if batch.slope is None else out.value.sum() + (out.plan * batch.slope).sum()
    slopes = torch.autograd.grad(loss, leaves)
    reach, tolerance = batch.options["reach"], batch.options["tolerance"]

    def anywhere(x):
        return x.flatten(1).any(-1)

    plan, f, g = (x.detach().double() for x in (out.plan, out.f, out.g))
    a, b = batch.a.double(), batch.b.double()
    if reach is None:
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    else:
        a, b = a * (-f / reach).exp(), b * (-g / reach).exp()
    residual = torch.maximum((plan.sum(-1) - a).abs().sum(-1), (plan.sum(-2) - b).abs().sum(-1))
    rounding = 100 * torch.finfo(out.plan.dtype).eps * torch.maximum(a.sum(-1), b.sum(-1)).clamp_min(1)
    # what rounding of cost and potentials leaves of the plan, at best
    width = torch.stack([batch.cost.abs().amax((-1, -2)), out.f.abs().amax(-1), out.g.abs().amax(-1)]).amax(0).double()
    within_reach = tolerance > 10 * rounding * (1 + width / batch.options["epsilon"])
    given_up = ~out.converged & within_reach & (out.iterations < batch.options["max_iterations"])
    stuck = ~out.converged & within_reach & (batch.options["max_iterations"] >= 1000) & (batch.options["epsilon"] > 0.1)
    no_a, no_b = batch.a == 0, batch.b == 0
    nowhere = no_a.unsqueeze(-1) | no_b.unsqueeze(-2)
    # more mass here and less there moves along a path, each of whose steps costs no more than the range of the costs
    longest = sum(plan.shape[1:]) * (10 * spread(batch.cost, nowhere) + 100 * rounding * width)
    alone = batch.slope is None  # else the loss is not the value alone
    explodes = (spread(slopes[1], no_a) > longest) | (spread(slopes[2], no_b) > longest)
    explodes &= alone and reach is None
    not_plan = anywhere(slopes[0] != out.plan) & (alone and batch.options["objective"] == "value")
    found = {f"{name} is not finite": anywhere(~getattr(out, name).isfinite()[..., None])
             for name in ("plan", "value", "f", "g", "residual")}  # fmt: skip
    names = ("cost", "a", "b")
    found |= {f"gradient in {k} is not finite": anywhere(~x.isfinite()) for k, x in zip(names, slopes, strict=True)}
    return found | {
        "plan is negative": anywhere(out.plan < 0),
        "mass where there is none": anywhere((out.plan != 0) & nowhere),
        "gradient in cost where there is no mass": anywhere((slopes[0] != 0) & nowhere),
        "gradient in a where there is no mass": anywhere((slopes[1] != 0) & no_a),
        "gradient in b where there is no mass": anywhere((slopes[2] != 0) & no_b),
        "potential where there is no mass": anywhere((out.f != 0) & no_a) | anywhere((out.g != 0) & no_b),
        "residual is not that of the plan": ~((out.residual - residual).abs() <= rounding + 1e-3 * residual),
        "converged, but the plan's residual is above tolerance": out.converged & ~(residual <= tolerance + rounding),
        "converged disagrees with residual": out.converged != (out.residual <= tolerance),
        "gradient in cost is not the plan": not_plan,
        "gradient in the masses explodes": explodes,
        "gives up before the limit": given_up,
        "does not converge in 1000 iterations": stuck,
        "too many iterations": (out.iterations > batch.options["max_iterations"]) | (out.iterations < 0),
    }


WATCH = """
import os, select, signal, sys
parent, limit, message, rest = int(sys.argv[1]), float(sys.argv[2]), None, ""
while True:
    if not select.select([0], [], [], None if message is None else limit)[0]:
        print(f"\\nHANG: no answer for {limit:g} s; the batch again:  {message}", flush=True)
        os.kill(parent, signal.SIGKILL)
        sys.exit(1)
    read = os.read(0, 65536).decode()
    if not read:
        sys.exit(0)
    *lines, rest = (rest + read).split("\\n")
    message = lines[-1] if lines else message
"""


class Watch:
    """A second process that names the batch and ends this one when a batch takes too long; 0: never."""

    def __init__(self, limit: float):
        command = [sys.executable, "-c", WATCH, str(os.getpid()), str(limit)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True) if limit > 0 else None

    def begin(self, message: str) -> None:
        if self.process is not None:
            self.process.stdin.write(message + "\n")
            self.process.stdin.flush()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def fuzz(problems, seconds=0.0, seed=0, backend=None, first=0, count=500, limit=0.0, progress=False) -> list[str]:
    """Check so many problems (and stop after so many seconds, unless 0); return a description of every failed batch."""
    names = [backend] if backend else list(backends())
    failures, done, begun, shown = [], 0, time.monotonic(), 0.0
    with Watch(limit) as watch:
        for index in range(first, first + -(-problems // count)):
            for name in names:
                again = (f"python tests/fuzz_ot.py --seed {seed} --first {index} --count {count} --problems 1 "
                         f"--backend {name}")  # fmt: skip
                watch.begin(again)
                batch = draw_batch(seed, index, count)
                try:
                    found = bad_samples(batch, name)
                except Exception as error:  # whatever it is, the batch that did it must be told
                    failures.append(f"{again}\n    {type(error).__name__}: {error}\n    {describe(batch)}")
                    continue
                for reason, bad in found.items():
                    if bad.any():
                        i = int(bad.nonzero()[0])
                        failures.append(f"{again}\n    {reason}: {int(bad.sum())} of {count}, first sample {i} "
                                        f"({batch.made[i]})\n    {describe(batch)}")  # fmt: skip
            done += count
            elapsed = time.monotonic() - begun
            if progress and elapsed - shown > 2:
                shown = elapsed
                line = f"{done:,} problems, {elapsed:.0f} s, {len(failures)} failures"
                print(f"\r{line}", end="", file=sys.stderr, flush=True)
            if (seconds and elapsed > seconds) or len(failures) >= 50:
                break
    if progress:
        print(f"\r{done:,} problems with {', '.join(names)} in {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return failures


def describe(batch: Batch) -> str:
    loss = "value" if batch.slope is None else "value and plan"
    return f"shape {tuple(batch.cost.shape)}, {batch.cost.dtype}, loss of {loss}, {batch.options}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so long; 0: when all are done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default=None, help="default: all that are here, each on every batch")
    parser.add_argument("--first", type=int, default=0, help="number of the first batch")
    parser.add_argument("--count", type=int, default=500, help="problems in a batch")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a batch may take; 0: any")
    given = parser.parse_args()
    failures = fuzz(
        given.problems, given.seconds, given.seed, given.backend, given.first, given.count, given.limit, True
    )
    for failure in failures:
        print(failure)
    print(f"{len(failures)} failures" if failures else "all hold")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
