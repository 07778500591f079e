# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (What kernels are given are pointers, blocks and numbers of Triton's own; it has no types for them.)
"""The solver for a GPU, in Triton: one problem per program, from the first sweep to the last in one launch.

    K = exp((f + g - C) / epsilon)
    s = 1 / (K v),   u = a s                    rows     (s = (K v)^-lambda exp(-(1 - lambda) f / epsilon) with reach)
    w = 1 / (K^T u), v = b w                    columns  (the same with g)
    P = u K v,   f <- f + epsilon ln s,   g <- g + epsilon ln w

A *resident* problem keeps K in registers and moves s and w into f and g now and then; a larger, *tiled* one reads its
cost again in every iteration, some rows at a time, forms K from it and moves s and w at once. Neither needs memory
beside its results, and neither waits for the host, so both can be captured in a CUDA graph.

**Blocks.** A block has shape (columns / 8, rows, 8): column j is element (j // 8, j % 8) of the first and last
dimension. Triton hands the last one to 8 lanes of a warp, rows to the other 4 and to the warps, and leaves the first to
each thread, so that sums over rows and over columns take 3 times fewer shuffles than with plain (rows, columns), where
32 lanes share a row; with K in registers an iteration waits for little else. Loading a block as (columns / 8 * rows, 8)
and reshaping it fixes this layout for every version of Triton; of three dimensions it may spread another.

**Constant.** With ``reach`` the best constant that can be moved from g to f is known in closed form. It is kept apart:
it would take f and g digits, and K depends on their sum alone.

**Shift.** Work is done on the cost less its minimum. With a constant k taken from the cost, both potentials are smaller
by k lambda / (1 + lambda) and the plan is larger by exp(k / (2 reach + epsilon)) (by nothing when balanced).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from otcxr.ot.problem import Solution

__all__ = ["implicit", "solve", "supports"]

_LIMIT = tl.constexpr(1024)  # rows or columns of the largest problem
_RESIDENT = 128  # rows or columns of the largest block in registers
_TILE = 4096  # elements of a block of the larger problems

_LANES = tl.constexpr(8)
_WIDTH = tl.constexpr(40.0)  # range of cost / epsilon that a kernel in single precision holds
_RATIO = tl.constexpr(0.5108256)  # -ln 0.6: annealing goes from epsilon / 0.6 to epsilon
_LAST_SWEEPS = tl.constexpr(8)  # sweeps at the target epsilon after annealing
_BLOCK = tl.constexpr(64)  # iterations after which a resident kernel is formed anew
_SOFT_BLOCK = tl.constexpr(16)  # the same with ``reach``, where it is also the time to move the constant
_SPAN = tl.constexpr(20.0)  # log-scalings beyond it may miss elements that were too small for the kernel
_HUGE = tl.constexpr(1e30)  # keeps far-off intermediate states finite
_MAX_CONJUGATE = tl.constexpr(100)  # iterations of the conjugate gradients


class _Layout(NamedTuple):
    """How a problem is cut into blocks of (columns / 8, rows, 8)."""

    resident: bool
    rows: int
    columns: int
    warps: int
    registers: int = 255  # per thread at most


def supports(cost: Tensor) -> bool:
    """Say whether ``solve`` and ``implicit`` can work on costs (..., n, m) like this one."""
    return cost.is_cuda and cost.dtype == torch.float32 and max(cost.shape[-2:]) <= _LIMIT.value


def solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    reach: float | None,
    max_iterations: int,
    tolerance: float,
    *,
    layout: _Layout | None = None,
) -> Solution:
    """Solve (B, n, m) problems. See ``otcxr.ot.sinkhorn`` for the meaning of the arguments; ``layout`` is for tests.

    Raises: NotImplementedError: not float32, or more than 1024 rows or columns.
    """
    layout = layout or _layout(cost)
    batch, n, m = cost.shape
    cost, a, b = cost.contiguous(), a.contiguous(), b.contiguous()
    out = Solution(
        torch.empty_like(cost), torch.empty_like(a), torch.empty_like(b),
        cost.new_empty(batch), torch.empty(batch, dtype=torch.int64, device=cost.device),
    )  # fmt: skip
    if batch:
        kernel = _solve_resident if layout.resident else _solve_tiled
        with torch.cuda.device_of(cost):
            kernel[(batch,)](
                cost, a, b, *out, n, m, float(epsilon), float(reach or 0), max_iterations, float(tolerance),
                BALANCED=reach is None, ROWS=layout.rows, COLUMNS=layout.columns,
                num_warps=layout.warps, maxnreg=layout.registers, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def implicit(
    plan: Tensor, gradient: Tensor, epsilon: float, kappa: float, *, layout: _Layout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull a gradient G in the plan back to the cost and the masses.

        W = G * P, r = P 1, c = P^T 1, the marginals that the plan has (not those it should have)
        [(1 + kappa) diag(r)  P; P^T  (1 + kappa) diag(c)] (x, y) = (W 1, W^T 1)
        d_cost = P * (x + y - G) / epsilon

    x is eliminated; y comes from preconditioned conjugate gradients. Balanced (kappa = 0), x + t, y - t solve as well.

    Args:
        plan: (B, n, m) from ``solve``.
        gradient: (B, n, m) of the loss in the plan.
        epsilon: Blur.
        kappa: epsilon / reach, 0 when balanced.
    Returns: d_cost (B, n, m), x (B, n), y (B, m); x and y are 0 where the plan moves nothing.
    Raises: NotImplementedError: not float32, or more than 1024 rows or columns.
    """
    layout = layout or _layout(plan)
    batch, n, m = plan.shape
    plan, gradient = plan.contiguous(), gradient.contiguous()
    d_cost, x, y = torch.empty_like(plan), plan.new_empty(batch, n), plan.new_empty(batch, m)
    if batch:
        with torch.cuda.device_of(plan):
            _implicit[(batch,)](
                plan, gradient, d_cost, x, y, n, m, float(epsilon), float(kappa),
                RESIDENT=layout.resident, ROWS=layout.rows, COLUMNS=layout.columns,
                num_warps=layout.warps, maxnreg=layout.registers, enable_fp_fusion=True,
            )  # fmt: skip
    return d_cost, x, y


def _layout(cost: Tensor) -> _Layout:
    """Choose blocks for (B, n, m) problems: padded to powers of two, 16 at least."""
    _, n, m = cost.shape
    if cost.dtype != torch.float32:
        raise NotImplementedError(f"the GPU kernels work in float32, received {cost.dtype}")
    if max(n, m) > _LIMIT.value:
        raise NotImplementedError(f"the GPU kernels hold up to {_LIMIT.value} rows and columns, received {n} x {m}")
    rows, columns = (max(16, 1 << (size - 1).bit_length()) for size in (n, m))
    if max(rows, columns) <= _RESIDENT:
        warps = max(rows * columns // 1024, 1)  # 32 elements to a thread
        return _Layout(True, rows, columns, warps, registers=128 if warps >= 4 else 255)  # 4 programs to a processor
    return _Layout(False, _TILE // columns, columns, warps=16, registers=128)


# --- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _columns(COLUMNS: tl.constexpr):
    """The numbers of the columns, (columns / 8, 8)."""
    return tl.arange(0, COLUMNS // _LANES)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]


@triton.jit
def _place(start, n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the elements of a block are in a matrix, and which of them are inside it, (columns / 8 * rows, 8)."""
    line = tl.arange(0, COLUMNS // _LANES * ROWS)[:, None]
    row, column = start + line % ROWS, line // ROWS * _LANES + tl.arange(0, _LANES)[None, :]
    return row * m + column, (row < n) & (column < m)


@triton.jit
def _load(matrix, start, n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load the rows from ``start`` as a block; 0 outside the matrix."""
    at, inside = _place(start, n, m, ROWS, COLUMNS)
    return tl.reshape(tl.load(matrix + at, mask=inside, other=0.0), [COLUMNS // _LANES, ROWS, _LANES])


@triton.jit
def _store(matrix, block, start, n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a block as the rows from ``start``."""
    at, inside = _place(start, n, m, ROWS, COLUMNS)
    tl.store(matrix + at, tl.reshape(block, [COLUMNS // _LANES * ROWS, _LANES]), mask=inside)


@triton.jit
def _whole(vector, n):
    """Load one number per row, for all rows at once."""
    rows = tl.arange(0, _LIMIT)
    return tl.load(vector + rows, mask=rows < n, other=0.0)


@triton.jit
def _on_rows(x):
    """Spread one number per row over a block."""
    return x[:, None][None, :, :]


@triton.jit
def _on_columns(x):
    """Spread one number per column over a block."""
    return x[:, None, :]


@triton.jit
def _row_sums(x):
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def _column_sums(x):
    return tl.sum(x, 1)


@triton.jit
def _total(x):
    """Sum of one number per column."""
    return tl.sum(tl.sum(x, 0), 0)


@triton.jit
def _range(block, present_a, present_b):
    """Smallest and largest cost between masses; infinity and -infinity if there are none."""
    here = _on_rows(present_a) & _on_columns(present_b)
    low, high = tl.where(here, block, float("inf")), tl.where(here, block, -float("inf"))
    return tl.min(tl.min(tl.min(low, 0), 0), 0), tl.max(tl.max(tl.max(high, 0), 0), 0)


@triton.jit
def _excess(block, low, present_a, present_b):
    """The cost above its minimum; 0 where there is no mass, as anything may stand there."""
    return tl.where(_on_rows(present_a) & _on_columns(present_b), block - low, 0.0)


@triton.jit
def _kernel(excess, f, g, epsilon):
    """K, kept finite: at a solution it is at most 1 over the larger mass."""
    return tl.exp(tl.minimum((_on_rows(f) + _on_columns(g) - excess) * (1.0 / epsilon), 87.0))


@triton.jit
def _scaling(marginal, potential, epsilon, reach, BALANCED: tl.constexpr):
    """s from K v, or w from K^T u."""
    marginal = tl.maximum(marginal, 1.0 / _HUGE)
    if BALANCED:
        root = tl.rsqrt(marginal)
        scaling = root * root  # two instructions; a division takes eight
    else:
        logarithm = -(reach * tl.log(marginal) + potential) / (reach + epsilon)
        # Of a position that is given up, K holds nothing: the true logarithm is larger. It keeps what the sweeps found.
        logarithm = tl.where(marginal > 1.0 / _HUGE, logarithm, tl.maximum(logarithm, 0.0))
        scaling = tl.exp(tl.minimum(tl.maximum(logarithm, -69.0), 69.0))
    return scaling


@triton.jit
def _log(scaling):
    return tl.log(tl.maximum(scaling, 1.0 / _HUGE))


@triton.jit
def _target(mass, potential, reach, BALANCED: tl.constexpr):
    """What the marginal should be: the mass itself, or what the potential leaves of it."""
    return mass if BALANCED else mass * tl.exp(tl.minimum(-potential / reach, 40.0))


@triton.jit
def _translation(f, g, mass_a, mass_b, reach):
    """The best constant to add to f and take from g, reach / 2 ln(<a, exp(-f / reach)> / <b, exp(-g / reach)>).

    Iterations alone would take very many to find it where the masses differ and reach is large against epsilon.
    """
    low, up = tl.min(tl.where(mass_a > 0, f, _HUGE), 0), tl.min(tl.min(tl.where(mass_b > 0, g, _HUGE), 0), 0)
    left = tl.sum(mass_a * tl.exp(tl.minimum((low - f) / reach, 0.0)), 0)
    right = _total(mass_b * tl.exp(tl.minimum((up - g) / reach, 0.0)))
    some = (left > 0) & (right > 0)
    ratio = tl.where(some, left, 1.0) / tl.where(some, right, 1.0)
    return tl.where(some, 0.5 * (reach * tl.log(ratio) + up - low), 0.0)


@triton.jit
def _move(kernel, u, v, factor):
    """The plan; the bounds keep states far from the solution finite."""
    return tl.minimum(tl.minimum(kernel * _on_rows(u), _HUGE) * _on_columns(v), _HUGE) * factor


@triton.jit
def _shift(low, epsilon, reach, BALANCED: tl.constexpr):
    """What taking ``low`` from the cost took from either potential, and the factor that gives the plan back."""
    if BALANCED:
        offset, factor = 0.5 * low, 1.0
    else:
        offset, factor = low * reach / (2 * reach + epsilon), tl.exp(tl.minimum(-low / (2 * reach + epsilon), 40.0))
    return offset, factor


# Sweeps in the log domain: potentials in units of the sweep's epsilon ("level") plus ln mass, minus cost / level.


@triton.jit
def _sweeps(width, epsilon, max_iterations):
    """Number of sweeps: none for a moderate range of the cost."""
    levels = (tl.log(tl.maximum(width / epsilon, 1.0)) / _RATIO).to(tl.int32)
    return tl.where(width > epsilon * _WIDTH, tl.minimum(levels + _LAST_SWEEPS, max_iterations), 0)


@triton.jit
def _level(left, epsilon):
    """Epsilon of a sweep when so many are left, this one included."""
    return epsilon * tl.exp(tl.maximum(left - _LAST_SWEEPS, 0).to(tl.float32) * _RATIO)


@triton.jit
def _weight(potential, mass, level):
    """ln(mass) + potential / level; far below all others where there is no mass."""
    return tl.where(mass > 0, potential / level + tl.log(tl.where(mass > 0, mass, 1.0)), -_HUGE)


@triton.jit
def _damped(logarithm, level, reach, BALANCED: tl.constexpr):
    """-lambda level times the logarithm of a sum."""
    return -level * logarithm if BALANCED else -level * logarithm * (reach / (reach + level))


@triton.jit
def _row_log_sums(exponent):
    """ln sum_j exp(exponent_ij)."""
    peak = tl.max(tl.max(exponent, 0), 1)
    return peak + tl.log(_row_sums(tl.exp(exponent - _on_rows(peak))))


@triton.jit
def _accumulate(peak, total, exponent):
    """Add rows to a running sum of exponentials per column, ``total`` exp(``peak``)."""
    higher = tl.maximum(peak, tl.max(exponent, 1))
    return higher, total * tl.exp(peak - higher) + _column_sums(tl.exp(exponent - _on_columns(higher)))


# --- solve -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "m", "max_iterations"])
def _solve_resident(
    cost, a, b, plan, f_out, g_out, residual_out, iterations_out,
    n, m, epsilon, reach, max_iterations, tolerance,
    BALANCED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Solve one problem whose kernel fits the registers."""
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * n * m
    plan += problem * n * m
    rows, columns = tl.arange(0, ROWS), _columns(COLUMNS)
    mass_a = tl.load(a + problem * n + rows, mask=rows < n, other=0.0)
    mass_b = tl.load(b + problem * m + columns, mask=columns < m, other=0.0)
    present_a, present_b = mass_a > 0, mass_b > 0

    whole = _load(cost, 0, n, m, ROWS, COLUMNS)
    low, high = _range(whole, present_a, present_b)
    low = tl.where(high >= low, low, 0.0)
    offset, factor = _shift(low, epsilon, reach, BALANCED)

    f, g = tl.zeros([ROWS], tl.float32), tl.zeros([COLUMNS // _LANES, _LANES], tl.float32)
    iteration = _sweeps(high - low, epsilon, max_iterations)
    left = iteration
    while left > 0:
        level = _level(left, epsilon)
        excess = _excess(whole, low, present_a, present_b) * (1.0 / level)
        f = _damped(_row_log_sums(_on_columns(_weight(g, mass_b, level)) - excess), level, reach, BALANCED)
        peak, total = _accumulate(g * 0 - _HUGE, g * 0, _on_rows(_weight(f, mass_a, level)) - excess)
        g = _damped(peak + tl.log(total), level, reach, BALANCED)
        left -= 1

    s, w, next_w = f * 0 + 1, g * 0 + 1, g * 0 + 1
    block = _BLOCK if BALANCED else _SOFT_BLOCK
    constant, residual = 0.0, float("inf")
    unfinished = True
    while unfinished:
        f, g = f + epsilon * _log(s), g + epsilon * _log(next_w)
        if not BALANCED:
            constant = _translation(f, g, mass_a, mass_b, reach)
        first = tl.minimum(iteration, 0)  # 0, unknown to the compiler: else addresses fill registers in all iterations
        kernel = _kernel(_excess(_load(cost, first, n, m, ROWS, COLUMNS), low, present_a, present_b), f, g, epsilon)
        s, w, next_w = f * 0 + 1, g * 0 + 1, g * 0 + 1
        error, step = float("inf"), 0
        while (error > tolerance) & (iteration < max_iterations) & (step < block):
            w = next_w
            v = mass_b * w
            s = _scaling(_row_sums(kernel * _on_columns(v)), f + constant, epsilon, reach, BALANCED)
            marginal = _column_sums(kernel * _on_rows(mass_a * s))
            next_w = _scaling(marginal, g - constant, epsilon, reach, BALANCED)
            error = factor * _total(
                tl.abs(v * marginal - _target(mass_b, g - constant + epsilon * _log(w), reach, BALANCED))
            )
            iteration += 1
            step += 1

        moved = _move(kernel, mass_a * s, mass_b * w, factor)
        target_a = factor * _target(mass_a, f + constant + epsilon * _log(s), reach, BALANCED)
        target_b = factor * _target(mass_b, g - constant + epsilon * _log(w), reach, BALANCED)
        residual = tl.maximum(
            tl.sum(tl.abs(_row_sums(moved) - target_a), 0), _total(tl.abs(_column_sums(moved) - target_b))
        )
        span = tl.maximum(tl.max(tl.abs(_log(s)), 0), tl.max(tl.max(tl.abs(_log(w)), 0), 0))
        unfinished = (span > _SPAN) | ((residual > tolerance) & (iteration < max_iterations))
        if not unfinished:
            _store(plan, moved, tl.minimum(iteration, 0), n, m, ROWS, COLUMNS)

    tl.store(f_out + problem * n + rows, f + epsilon * _log(s) + (offset + constant), mask=rows < n)
    tl.store(g_out + problem * m + columns, g + epsilon * _log(w) + (offset - constant), mask=columns < m)
    tl.store(residual_out + problem, residual)
    tl.store(iterations_out + problem, iteration)


@triton.jit(do_not_specialize=["n", "m", "max_iterations"])
def _solve_tiled(
    cost, a, b, plan, f_out, g_out, residual_out, iterations_out,
    n, m, epsilon, reach, max_iterations, tolerance,
    BALANCED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Solve one problem some rows at a time; f is kept in its result, K is formed again in every iteration.

    Barriers stand between passes because another thread may read what one has written to f.
    """
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * n * m
    plan += problem * n * m
    a += problem * n
    f_out += problem * n
    columns = _columns(COLUMNS)
    mass_b = tl.load(b + problem * m + columns, mask=columns < m, other=0.0)
    present_b = mass_b > 0

    low, high = float("inf"), -float("inf")
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        mass_a = tl.load(a + rows, mask=rows < n, other=0.0)
        lowest, highest = _range(_load(cost, start, n, m, ROWS, COLUMNS), mass_a > 0, present_b)
        low, high = tl.minimum(low, lowest), tl.maximum(high, highest)
        tl.store(f_out + rows, tl.zeros([ROWS], tl.float32), mask=rows < n)
    tl.debug_barrier()
    low = tl.where(high >= low, low, 0.0)
    offset, factor = _shift(low, epsilon, reach, BALANCED)

    g = tl.zeros([COLUMNS // _LANES, _LANES], tl.float32)
    iteration = _sweeps(high - low, epsilon, max_iterations)
    left = iteration
    while left > 0:
        level = _level(left, epsilon)
        weight_b = _on_columns(_weight(g, mass_b, level))
        peak, total = g * 0 - _HUGE, g * 0
        for start in range(0, n, ROWS):
            rows = start + tl.arange(0, ROWS)
            mass_a = tl.load(a + rows, mask=rows < n, other=0.0)
            excess = _excess(_load(cost, start, n, m, ROWS, COLUMNS), low, mass_a > 0, present_b) * (1.0 / level)
            f = _damped(_row_log_sums(weight_b - excess), level, reach, BALANCED)
            peak, total = _accumulate(peak, total, _on_rows(_weight(f, mass_a, level)) - excess)
            tl.store(f_out + rows, f, mask=rows < n)
        g = _damped(peak + tl.log(total), level, reach, BALANCED)
        left -= 1
    tl.debug_barrier()

    next_g = g
    constant, residual = 0.0, float("inf")
    unfinished = True
    while unfinished:
        error = float("inf")
        while (error > tolerance) & (iteration < max_iterations):
            g = next_g
            if not BALANCED:
                all_f, all_a = _whole(f_out, n), _whole(a, n)
                tl.debug_barrier()
                constant = _translation(all_f, g, all_a, mass_b, reach)
            products = tl.zeros([COLUMNS // _LANES, ROWS, _LANES], tl.float32)
            for start in range(0, n, ROWS):
                rows = start + tl.arange(0, ROWS)
                mass_a = tl.load(a + rows, mask=rows < n, other=0.0)
                f = tl.load(f_out + rows, mask=rows < n, other=0.0)
                excess = _excess(_load(cost, start, n, m, ROWS, COLUMNS), low, mass_a > 0, present_b)
                kernel = _kernel(excess, f, g, epsilon)
                s = _scaling(_row_sums(kernel * _on_columns(mass_b)), f + constant, epsilon, reach, BALANCED)
                products += kernel * _on_rows(mass_a * s)
                tl.store(f_out + rows, f + epsilon * _log(s), mask=rows < n)
            tl.debug_barrier()
            marginal = _column_sums(products)
            next_g = g + epsilon * _log(_scaling(marginal, g - constant, epsilon, reach, BALANCED))
            error = factor * _total(tl.abs(mass_b * marginal - _target(mass_b, g - constant, reach, BALANCED)))
            iteration += 1

        residual = 0.0
        products = tl.zeros([COLUMNS // _LANES, ROWS, _LANES], tl.float32)
        for start in range(0, n, ROWS):
            rows = start + tl.arange(0, ROWS)
            mass_a = tl.load(a + rows, mask=rows < n, other=0.0)
            f = tl.load(f_out + rows, mask=rows < n, other=0.0)
            excess = _excess(_load(cost, start, n, m, ROWS, COLUMNS), low, mass_a > 0, present_b)
            moved = _move(_kernel(excess, f, g, epsilon), mass_a, mass_b, factor)
            _store(plan, moved, start, n, m, ROWS, COLUMNS)
            residual += tl.sum(tl.abs(_row_sums(moved) - factor * _target(mass_a, f + constant, reach, BALANCED)), 0)
            products += moved
        target = factor * _target(mass_b, g - constant, reach, BALANCED)
        residual = tl.maximum(residual, _total(tl.abs(_column_sums(products) - target)))
        unfinished = (residual > tolerance) & (iteration < max_iterations)

    tl.debug_barrier()
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        tl.store(f_out + rows, tl.load(f_out + rows, mask=rows < n) + (offset + constant), mask=rows < n)
    tl.store(g_out + problem * m + columns, g + (offset - constant), mask=columns < m)
    tl.store(residual_out + problem, residual)
    tl.store(iterations_out + problem, iteration)


# --- implicit --------------------------------------------------------------------------------------------------------


@triton.jit
def _mean(part, block):
    """Mean of a block under every row of the plan; 0 where it moves nothing."""
    mass = _row_sums(part)
    return tl.where(mass > 0, _row_sums(part * block) / tl.where(mass > 0, mass, 1.0), 0.0)


@triton.jit
def _schur(part, y, share):
    """Rows' part of ((1 + kappa) diag(c) - P^T diag(1 / ((1 + kappa) r)) P) y, as differences: little cancels."""
    spread = _on_columns(y)
    return part * (spread * (1.0 / share) - _on_rows(share * _mean(part, spread)))


@triton.jit(do_not_specialize=["n", "m"])
def _implicit(
    plan, gradient, d_cost, x_out, y_out,
    n, m, epsilon, kappa,
    RESIDENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pull one gradient back; a resident plan stays in registers, a tiled one is read in every iteration."""
    problem = tl.program_id(0).to(tl.int64)
    plan += problem * n * m
    gradient += problem * n * m
    d_cost += problem * n * m
    columns = _columns(COLUMNS)
    share = 1 / (1 + kappa)

    # Right-hand side W^T 1 - P^T x at y = 0.
    part = tl.zeros([COLUMNS // _LANES, ROWS, _LANES], tl.float32)
    mass, rest = tl.zeros([COLUMNS // _LANES, _LANES], tl.float32), tl.zeros([COLUMNS // _LANES, _LANES], tl.float32)
    for start in range(0, n, ROWS):
        part = _load(plan, start, n, m, ROWS, COLUMNS)
        wanted = _load(gradient, start, n, m, ROWS, COLUMNS)
        mass += _column_sums(part)
        rest += _column_sums(part * (wanted - _on_rows(share * _mean(part, wanted))))

    present = mass > 0
    inverse = tl.where(present, share / tl.where(present, mass, 1.0), 0.0)
    size = tl.max(tl.max(tl.abs(rest * inverse), 0), 0)  # taken out: squares of a small gradient would vanish
    rest = tl.where(present, rest / tl.where(size > 0, size, 1.0), 0.0)
    y, direction = tl.zeros(rest.shape, tl.float32), rest * inverse
    power = _total(rest * direction)
    enough, count = 1e-12 * power, 0
    while (power > enough) & (count < _MAX_CONJUGATE):
        if RESIDENT:
            image = _column_sums(_schur(part, direction, share))
        else:
            products = tl.zeros([COLUMNS // _LANES, ROWS, _LANES], tl.float32)
            for start in range(0, n, ROWS):
                products += _schur(_load(plan, start, n, m, ROWS, COLUMNS), direction, share)
            image = _column_sums(products)
        curvature = _total(direction * image)
        # Directions whose curvature is rounding (the constant; nearly separate parts of the plan) are left alone.
        seen = curvature > 2e-7 * _total(mass * direction * direction)
        step = tl.where(seen, power / tl.where(seen, curvature, 1.0), 0.0)
        y += step * direction
        rest -= step * image
        before = power
        power = tl.where(seen, _total(rest * rest * inverse), 0.0)
        direction = rest * inverse + (power / before) * direction
        count += 1
    y *= size
    tl.store(y_out + problem * m + columns, y, mask=columns < m)

    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        part = _load(plan, start, n, m, ROWS, COLUMNS)
        missing = _load(gradient, start, n, m, ROWS, COLUMNS) - _on_columns(y)
        x = share * _mean(part, missing)
        tl.store(x_out + problem * n + rows, x, mask=rows < n)
        _store(d_cost, part * (_on_rows(x) - missing) * (1.0 / epsilon), start, n, m, ROWS, COLUMNS)
