"""The solver for the CPU: compiled kernels (``kernels``), and threads that take problems from a common queue.

Problems share nothing, so the threads take them in small lots and wait for nobody: no barriers, so a busy neighbour on
a core costs its share and no more, and no threading layer of numba that a fork could break.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otcxr.ot import kernels
from otcxr.ot.problem import Solution

__all__ = ["implicit", "solve", "solve_sharp"]

logger = logging.getLogger(__name__)
_solve_lots: Callable[..., None] = kernels.solve_lots
_implicit_lots: Callable[..., None] = kernels.implicit_lots
_LOT_BYTES = 256 * 1024  # of cost that a thread takes from the queue at a time


@cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of this process: after a fork there are none, and a new pool is made."""
    return ThreadPoolExecutor(workers, thread_name_prefix="otcxr-ot")


def _share(count: int, size: int, work: Callable[[Any, int], None]) -> None:
    """Call ``work(counter, step)`` for ``count`` problems of ``size`` bytes on as many threads as torch uses."""
    step = max(1, _LOT_BYTES // max(1, size))
    counter = np.zeros(1, dtype=np.int64)
    others = min(torch.get_num_threads(), -(-count // step)) - 1
    waiting = [_pool(os.getpid(), others).submit(work, counter, step) for _ in range(others)]
    work(counter, step)
    for other in waiting:
        other.result()


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _solve(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, reach: float | None, max_iterations: int, tolerance: float,
    sharp: bool,
) -> tuple[Solution, Tensor, Tensor, Tensor]:  # fmt: skip
    out = Solution(
        cost.new_empty(cost.shape), a.new_empty(a.shape), b.new_empty(b.shape),
        cost.new_empty(len(cost)), torch.zeros(len(cost), dtype=torch.int64, device=cost.device),
    )  # fmt: skip
    extra = (
        (cost.new_empty(cost.shape), a.new_empty(a.shape), b.new_empty(b.shape))
        if sharp
        else (cost.new_empty(1, 1, 1), cost.new_empty(1, 1), cost.new_empty(1, 1))
    )
    given = [_array(x) for x in (cost, a, b)]
    results, gradients = [x.numpy() for x in out], [x.numpy() for x in extra]

    if not kernels.solve_lots.signatures:
        logger.info(
            "loading the native transport; the first time on a machine it is compiled, which takes some seconds"
        )

    def work(counter: Any, step: int) -> None:
        _solve_lots(
            counter, step, *given, epsilon, reach or 0.0, max_iterations, tolerance, *results, sharp, *gradients
        )

    _share(len(cost), cost.shape[1] * cost.shape[2] * cost.element_size(), work)
    return out, *extra


def solve(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, reach: float | None, max_iterations: int, tolerance: float
) -> Solution:
    """Solve (B, n, m) problems on the CPU. See ``otcxr.ot.sinkhorn`` for the meaning of the arguments."""
    return _solve(cost, a, b, epsilon, reach, max_iterations, tolerance, False)[0]


def solve_sharp(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, reach: float | None, max_iterations: int, tolerance: float
) -> tuple[Solution, Tensor, Tensor, Tensor]:
    """Solve, and with each plan still in the cache the implicit system for G = C - f - g.

    Returns: the solution, P (1 + (x + y - G) / epsilon) (B, n, m), x (B, n), y (B, m).
    """
    return _solve(cost, a, b, epsilon, reach, max_iterations, tolerance, True)


def implicit(plan: Tensor, gradient: Tensor, epsilon: float, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative through the plan: P (x + y - G) / epsilon, x, y for the gradient G in the plan.

    [(1 + kappa) diag(r), P; P^T, (1 + kappa) diag(c)] (x, y) = (W 1, W^T 1),   W = G * P,  r = P 1,  c = P^T 1
    """
    batch, n, m = plan.shape
    out = plan.new_empty(plan.shape), plan.new_empty(batch, n), plan.new_empty(batch, m)
    given, results = [_array(plan), _array(gradient)], [x.numpy() for x in out]
    _share(
        batch,
        n * m * plan.element_size(),
        lambda counter, step: _implicit_lots(counter, step, *given, epsilon, kappa, *results),
    )
    return out
