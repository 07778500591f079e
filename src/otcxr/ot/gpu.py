# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton compiles the kernels; their arguments are pointers, blocks and numbers of its own.)
"""The solver for a GPU, in Triton: one problem per program, from the first sweep to the last in one launch.

    K = exp((f + g - C) / epsilon)
    s = 1 / (K v),   u = a s                    rows     (s = (K v)^-lambda exp(-(1 - lambda) f / epsilon) with reach)
    w = 1 / (K^T u), v = b w                    columns  (the same with g)
    P = u K v,   f <- f + epsilon ln s,   g <- g + epsilon ln w

A *resident* problem keeps K in registers and moves s and w into f and g now and then; a larger, *tiled* one reads its
cost again in every iteration, some rows at a time, forms K from it and moves s and w at once. Neither needs memory
beside its results, and neither waits for the host, so both can be captured in a CUDA graph.

**Blocks.** Column j of a block is element (j // 8, j % 8) of its outer and last dimension: shape (columns / 8, rows, 8).
Triton hands the last dimension to 8 lanes of a warp, rows to the other 4 and to the warps, and leaves the outer one to
each thread. Sums over rows and over columns then take 3 times fewer shuffles than with plain (rows, columns), where 32
lanes share one row; with K in registers shuffles are what an iteration waits for.

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

_LIMIT = 1024  # rows or columns of the largest problem
_RESIDENT = 128 * 128  # elements of the largest block in registers
_TILE = 8192  # elements of a block of the larger problems

_LANES = tl.constexpr(8)
_WIDTH = tl.constexpr(40.0)  # range of cost / epsilon that a kernel in single precision holds
_RATIO = tl.constexpr(0.5108256)  # -ln 0.6: annealing goes from epsilon / 0.6 to epsilon
_LAST_SWEEPS = tl.constexpr(8)  # sweeps at the target epsilon after annealing
_BLOCK = tl.constexpr(64)  # iterations after which a resident kernel is formed anew
_SPAN = tl.constexpr(20.0)  # log-scalings beyond it may miss elements that were too small for the kernel
_HUGE = tl.constexpr(1e30)  # keeps far-off intermediate states finite
_MAX_CONJUGATE = tl.constexpr(100)  # iterations of the conjugate gradients


class _Layout(NamedTuple):
    """How a problem is cut into blocks of (columns / 8, rows, 8)."""

    resident: bool
    rows: int
    columns: int
    warps: int


def supports(cost: Tensor) -> bool:
    """Say whether ``solve`` and ``implicit`` can work on (B, n, m) costs like this one."""
    return cost.is_cuda and cost.dtype == torch.float32 and max(cost.shape[1:]) <= _LIMIT


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
                cost, a, b, *out, n, m, epsilon, 0.0 if reach is None else reach, max_iterations, tolerance,
                BALANCED=reach is None, ROWS=layout.rows, COLUMNS=layout.columns, num_warps=layout.warps,
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
                plan, gradient, d_cost, x, y, n, m, epsilon, kappa,
                RESIDENT=layout.resident, ROWS=layout.rows, COLUMNS=layout.columns, num_warps=layout.warps,
            )  # fmt: skip
    return d_cost, x, y


def _layout(cost: Tensor) -> _Layout:
    """Choose blocks for (B, n, m) problems: padded to powers of two, 16 at least."""
    _, n, m = cost.shape
    if cost.dtype != torch.float32:
        raise NotImplementedError(f"the GPU kernels work in float32, received {cost.dtype}")
    if max(n, m) > _LIMIT:
        raise NotImplementedError(f"the GPU kernels hold up to {_LIMIT} rows and columns, received {n} x {m}")
    rows, columns = (max(16, 1 << (size - 1).bit_length()) for size in (n, m))
    if rows * columns <= _RESIDENT:
        return _Layout(True, rows, columns, warps=min(max(rows * columns // 1024, 1), 8))
    return _Layout(False, _TILE // columns, columns, warps=16)


# --- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _columns(COLUMNS: tl.constexpr):
    """The numbers of the columns, (columns / 8, 8)."""
    return tl.arange(0, COLUMNS // _LANES)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]


@triton.jit
def _along_rows(x):
    """Sum of every row of a block."""
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def _total(x):
    """Sum of one number per column."""
    return tl.sum(tl.sum(x, 0), 0)


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
def _on_rows(x):
    """Spread one number per row over a block."""
    return x[:, None][None, :, :]


@triton.jit
def _on_columns(x):
    """Spread one number per column over a block."""
    return x[:, None, :]


@triton.jit
def _kernel(excess, f, g, here, epsilon):
    """K; the largest exponent only acts between two masses below 1e-30."""
    exponent = (f[None, :, None] + g[:, None, :] - excess) / epsilon
    return tl.where(here, tl.exp(tl.minimum(exponent, 80.0)), 0.0)


@triton.jit
def _scaling(marginal, potential, present, epsilon, reach, BALANCED: tl.constexpr):
    """s from K v, or w from K^T u; 1 where there is no mass."""
    marginal = tl.minimum(tl.maximum(marginal, 1.0 / _HUGE), _HUGE)
    if BALANCED:
        scaling = 1.0 / marginal
    else:
        logarithm = -(reach * tl.log(marginal) + potential) / (reach + epsilon)
        scaling = tl.exp(tl.minimum(tl.maximum(logarithm, -69.0), 69.0))
    return tl.where(present, scaling, 1.0)


@triton.jit
def _target(mass, potential, reach, BALANCED: tl.constexpr):
    """What the marginal should be: the mass itself, or what the potential leaves of it."""
    if BALANCED:
        target = mass
    else:
        target = mass * tl.exp(tl.minimum(-potential / reach, 40.0))
    return target


@triton.jit
def _offset(low, epsilon, reach, BALANCED: tl.constexpr):
    """What taking ``low`` from the cost took from either potential, and the factor by which it raised the plan."""
    if BALANCED:
        offset, factor = 0.5 * low, 1.0
    else:
        offset, factor = low * reach / (2 * reach + epsilon), tl.exp(tl.minimum(-low / (2 * reach + epsilon), 40.0))
    return offset, factor


@triton.jit
def _sweeps(width, epsilon, max_iterations):
    """Number of sweeps in the log domain: none for a moderate range of the cost."""
    levels = (tl.log(tl.maximum(width / epsilon, 1.0)) / _RATIO).to(tl.int32)
    return tl.where(width > _WIDTH * epsilon, tl.minimum(levels + _LAST_SWEEPS, max_iterations), 0)


@triton.jit
def _level(left, epsilon):
    """Epsilon of a sweep when so many are left, this one included."""
    return epsilon * tl.exp(_RATIO * tl.maximum(left - _LAST_SWEEPS, 0).to(tl.float32))


@triton.jit
def _exponent(potential_and_mass, excess, present, level):
    """Exponents of a soft minimum; far below all others where there is no mass."""
    return tl.where(present, potential_and_mass - excess / level, -_HUGE)


@triton.jit
def _soft_rows(exponent, level, reach, BALANCED: tl.constexpr):
    """-lambda level ln sum_j exp(exponent_ij)."""
    peak = tl.max(tl.max(exponent, 0), 1)
    return _damped(peak + tl.log(_along_rows(tl.exp(exponent - peak[None, :, None]))), level, reach, BALANCED)


@triton.jit
def _damped(logarithm, level, reach, BALANCED: tl.constexpr):
    """-lambda level times the logarithm of a sum."""
    if BALANCED:
        potential = -level * logarithm
    else:
        potential = -level * logarithm * (reach / (reach + level))
    return potential


@triton.jit
def _accumulate(peak, total, exponent):
    """Add rows to a running sum of exponentials per column, ``total`` exp(``peak``)."""
    higher = tl.maximum(peak, tl.max(exponent, 1))
    return higher, total * tl.exp(peak - higher) + tl.sum(tl.exp(exponent - higher[:, None, :]), 1)


@triton.jit
def _logarithm(mass):
    return tl.log(tl.where(mass > 0, mass, 1.0))


# --- solve -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["max_iterations"])
def _solve_resident(
    cost, a, b, plan, f_out, g_out, residual_out, iterations_out,
    n, m, epsilon, reach, max_iterations, tolerance,
    BALANCED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Solve one problem whose kernel fits the registers."""
    problem = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, ROWS), _columns(COLUMNS)
    mass_a = tl.load(a + problem * n + rows, mask=rows < n, other=0.0)
    mass_b = tl.load(b + problem * m + columns, mask=columns < m, other=0.0)
    here = (mass_a > 0)[None, :, None] & (mass_b > 0)[:, None, :]
    at = problem * n * m + rows[None, :, None] * m + columns[:, None, :]

    excess = tl.load(cost + at, mask=here, other=0.0)
    low = tl.min(tl.min(tl.min(tl.where(here, excess, float("inf")), 0), 0), 0)
    high = tl.max(tl.max(tl.max(tl.where(here, excess, -float("inf")), 0), 0), 0)
    low = tl.where(high >= low, low, 0.0)
    offset, factor = _offset(low, epsilon, reach, BALANCED)

    f, g = tl.zeros([ROWS], tl.float32), tl.zeros([COLUMNS // _LANES, _LANES], tl.float32)
    iteration = _sweeps(high - low, epsilon, max_iterations)
    left = iteration
    excess = _excess(cost, at, here, low)
    while left > 0:
        level = _level(left, epsilon)
        to_columns = (g / level + _logarithm(mass_b))[:, None, :]
        f = _soft_rows(_exponent(to_columns, excess, (mass_b > 0)[:, None, :], level), level, reach, BALANCED)
        to_rows = (f / level + _logarithm(mass_a))[None, :, None]
        exponent = _exponent(to_rows, excess, (mass_a > 0)[None, :, None], level)
        peak, total = _accumulate(tl.full(g.shape, -_HUGE, tl.float32), tl.zeros(g.shape, tl.float32), exponent)
        g = _damped(peak + tl.log(total), level, reach, BALANCED)
        left -= 1

    s, w, next_w = tl.full(f.shape, 1.0, tl.float32), tl.full(g.shape, 1.0, tl.float32), tl.full(g.shape, 1.0, tl.float32)
    residual = float("inf")
    unfinished = True
    while unfinished:
        f, g = f + epsilon * tl.log(s), g + epsilon * tl.log(next_w)
        kernel = _kernel(_excess(cost, at, here, low), f, g, here, epsilon)
        s, w, next_w = tl.full(f.shape, 1.0, tl.float32), tl.full(g.shape, 1.0, tl.float32), tl.full(g.shape, 1.0, tl.float32)
        error, step = float("inf"), 0
        while (error > tolerance) & (iteration < max_iterations) & (step < _BLOCK):
            w = next_w
            v = mass_b * w
            s = _scaling(_along_rows(kernel * v[:, None, :]), f, mass_a > 0, epsilon, reach, BALANCED)
            marginal = tl.sum(kernel * (mass_a * s)[None, :, None], 1)
            next_w = _scaling(marginal, g, mass_b > 0, epsilon, reach, BALANCED)
            target = _target(mass_b, g + epsilon * tl.log(w), reach, BALANCED)
            error = factor * _total(tl.abs(v * marginal - target))
            iteration += 1
            step += 1

        moved = tl.minimum(kernel * (mass_a * s)[None, :, None], _HUGE) * (mass_b * w)[:, None, :]
        moved = tl.minimum(moved, _HUGE) * factor
        target_a = factor * _target(mass_a, f + epsilon * tl.log(s), reach, BALANCED)
        target_b = factor * _target(mass_b, g + epsilon * tl.log(w), reach, BALANCED)
        residual = tl.maximum(
            tl.sum(tl.abs(_along_rows(moved) - target_a), 0), _total(tl.abs(tl.sum(moved, 1) - target_b))
        )
        span = tl.maximum(tl.max(tl.abs(tl.log(s)), 0), tl.max(tl.max(tl.abs(tl.log(w)), 0), 0))
        unfinished = (span > _SPAN) | ((residual > tolerance) & (iteration < max_iterations))
        inside = (rows < n)[None, :, None] & (columns < m)[:, None, :]
        tl.store(plan + at, moved, mask=inside & (not unfinished))

    tl.store(f_out + problem * n + rows, f + epsilon * tl.log(s) + offset, mask=rows < n)
    tl.store(g_out + problem * m + columns, g + epsilon * tl.log(w) + offset, mask=columns < m)
    tl.store(residual_out + problem, residual)
    tl.store(iterations_out + problem, iteration)


@triton.jit(do_not_specialize=["max_iterations"])
def _solve_tiled(
    cost, a, b, plan, f_out, g_out, residual_out, iterations_out,
    n, m, epsilon, reach, max_iterations, tolerance,
    BALANCED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Solve one problem some rows at a time; f lives in its result, everything else about rows is formed again."""
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * n * m
    plan += problem * n * m
    a += problem * n
    f_out += problem * n
    columns = _columns(COLUMNS)
    mass_b = tl.load(b + problem * m + columns, mask=columns < m, other=0.0)
    present_b = (mass_b > 0)[:, None, :]

    low, high = float("inf"), -float("inf")
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        mass_a = tl.load(a + rows, mask=rows < n, other=0.0)
        here = (mass_a > 0)[None, :, None] & present_b
        tile = tl.load(cost + rows[None, :, None] * m + columns[:, None, :], mask=here, other=0.0)
        low = tl.minimum(low, tl.min(tl.min(tl.min(tl.where(here, tile, float("inf")), 0), 0), 0))
        high = tl.maximum(high, tl.max(tl.max(tl.max(tl.where(here, tile, -float("inf")), 0), 0), 0))
        tl.store(f_out + rows, tl.zeros([ROWS], tl.float32), mask=rows < n)
    tl.debug_barrier()
    low = tl.where(high >= low, low, 0.0)
    offset, factor = _offset(low, epsilon, reach, BALANCED)

    g = tl.zeros(mass_b.shape, tl.float32)
    iteration = _sweeps(high - low, epsilon, max_iterations)
    left = iteration
    while left > 0:
        level = _level(left, epsilon)
        to_columns = (g / level + _logarithm(mass_b))[:, None, :]
        peak, total = tl.full(g.shape, -_HUGE, tl.float32), tl.zeros(g.shape, tl.float32)
        for start in range(0, n, ROWS):
            rows = start + tl.arange(0, ROWS)
            mass_a = tl.load(a + rows, mask=rows < n, other=0.0)
            present_a = (mass_a > 0)[None, :, None]
            excess = _excess(cost, rows[None, :, None] * m + columns[:, None, :], present_a & present_b, low)
            f = _soft_rows(_exponent(to_columns, excess, present_b, level), level, reach, BALANCED)
            to_rows = (f / level + _logarithm(mass_a))[None, :, None]
            peak, total = _accumulate(peak, total, _exponent(to_rows, excess, present_a, level))
            tl.store(f_out + rows, f, mask=rows < n)
        g = _damped(peak + tl.log(total), level, reach, BALANCED)
        left -= 1
        tl.debug_barrier()

    next_g = g
    residual = float("inf")
    unfinished = True
    while unfinished:
        error = float("inf")
        while (error > tolerance) & (iteration < max_iterations):
            g = next_g
            products = tl.zeros([COLUMNS // _LANES, ROWS, _LANES], tl.float32)
            for start in range(0, n, ROWS):
                rows = start + tl.arange(0, ROWS)
                mass_a = tl.load(a + rows, mask=rows < n, other=0.0)
                f = tl.load(f_out + rows, mask=rows < n, other=0.0)
                here = (mass_a > 0)[None, :, None] & present_b
                excess = _excess(cost, rows[None, :, None] * m + columns[:, None, :], here, low)
                kernel = _kernel(excess, f, g, here, epsilon)
                marginal_a = _along_rows(kernel * mass_b[:, None, :])
                s = _scaling(marginal_a, f, mass_a > 0, epsilon, reach, BALANCED)
                products += kernel * (mass_a * s)[None, :, None]
                tl.store(f_out + rows, f + epsilon * tl.log(s), mask=rows < n)
            tl.debug_barrier()
            marginal = tl.sum(products, 1)
            next_g = g + epsilon * tl.log(_scaling(marginal, g, mass_b > 0, epsilon, reach, BALANCED))
            error = factor * _total(tl.abs(mass_b * marginal - _target(mass_b, g, reach, BALANCED)))
            iteration += 1

        residual = 0.0
        received = tl.zeros(g.shape, tl.float32)
        for start in range(0, n, ROWS):
            rows = start + tl.arange(0, ROWS)
            mass_a = tl.load(a + rows, mask=rows < n, other=0.0)
            f = tl.load(f_out + rows, mask=rows < n, other=0.0)
            at = rows[None, :, None] * m + columns[:, None, :]
            here = (mass_a > 0)[None, :, None] & present_b
            kernel = _kernel(_excess(cost, at, here, low), f, g, here, epsilon)
            moved = tl.minimum(kernel * mass_a[None, :, None], _HUGE) * mass_b[:, None, :]
            moved = tl.minimum(moved, _HUGE) * factor
            tl.store(plan + at, moved, mask=(rows < n)[None, :, None] & (columns < m)[:, None, :])
            target = factor * _target(mass_a, f, reach, BALANCED)
            residual += tl.sum(tl.abs(_along_rows(moved) - target), 0)
            received += tl.sum(moved, 1)
        residual = tl.maximum(residual, _total(tl.abs(received - factor * _target(mass_b, g, reach, BALANCED))))
        unfinished = (residual > tolerance) & (iteration < max_iterations)

    tl.debug_barrier()
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        f = tl.load(f_out + rows, mask=rows < n, other=0.0)
        tl.store(f_out + rows, f + offset, mask=rows < n)
    tl.store(g_out + problem * m + columns, g + offset, mask=columns < m)
    tl.store(residual_out + problem, residual)
    tl.store(iterations_out + problem, iteration)


# --- implicit --------------------------------------------------------------------------------------------------------


@triton.jit
def _mean(tile, weights):
    """Mean of numbers per element or per column under every row of the plan; 0 where it moves nothing."""
    mass = _along_rows(tile)
    return tl.where(mass > 0, _along_rows(tile * weights) / tl.where(mass > 0, mass, 1.0), 0.0)


@triton.jit
def _schur(tile, y, share):
    """Rows' part of ((1 + kappa) diag(c) - P^T diag(1 / ((1 + kappa) r)) P) y, as differences: little cancels."""
    return tile * (y[:, None, :] / share - share * _mean(tile, y[:, None, :])[None, :, None])


@triton.jit
def _implicit(
    plan, gradient, d_cost, x_out, y_out,
    n, m, epsilon, kappa,
    RESIDENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pull one gradient back; a resident plan is read once, a tiled one in every iteration."""
    problem = tl.program_id(0).to(tl.int64)
    plan += problem * n * m
    gradient += problem * n * m
    d_cost += problem * n * m
    columns = _columns(COLUMNS)
    share = 1 / (1 + kappa)
    tile = tl.zeros([COLUMNS // _LANES, ROWS, _LANES], tl.float32)

    # Right-hand side W^T 1 - P^T x where y = 0.
    mass, rest = tl.zeros(columns.shape, tl.float32), tl.zeros(columns.shape, tl.float32)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows[None, :, None] * m + columns[:, None, :]
        inside = (rows < n)[None, :, None] & (columns < m)[:, None, :]
        tile = tl.load(plan + at, mask=inside, other=0.0)
        wanted = tl.load(gradient + at, mask=inside, other=0.0)
        mass += tl.sum(tile, 1)
        rest += tl.sum(tile * (wanted - share * _mean(tile, wanted)[None, :, None]), 1)

    present = mass > 0
    inverse = tl.where(present, share / tl.where(present, mass, 1.0), 0.0)
    size = tl.max(tl.max(tl.abs(rest * inverse), 0), 0)  # squares of a small gradient would vanish
    rest = tl.where(present, rest / tl.where(size > 0, size, 1.0), 0.0)
    y, direction = tl.zeros(columns.shape, tl.float32), rest * inverse
    power = _total(rest * direction)
    enough, count = 1e-12 * power, 0
    while (power > enough) & (count < _MAX_CONJUGATE):
        if RESIDENT:
            image = tl.sum(_schur(tile, direction, share), 1)
        else:
            products = tl.zeros([COLUMNS // _LANES, ROWS, _LANES], tl.float32)
            for start in range(0, n, ROWS):
                rows = start + tl.arange(0, ROWS)
                inside = (rows < n)[None, :, None] & (columns < m)[:, None, :]
                part = tl.load(plan + rows[None, :, None] * m + columns[:, None, :], mask=inside, other=0.0)
                products += _schur(part, direction, share)
            image = tl.sum(products, 1)
        curvature = _total(direction * image)
        # A direction in which rounding hides the curvature (the constant; a plan in nearly separate parts) is left alone.
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
        at = rows[None, :, None] * m + columns[:, None, :]
        inside = (rows < n)[None, :, None] & (columns < m)[:, None, :]
        part = tl.load(plan + at, mask=inside, other=0.0)
        missing = tl.load(gradient + at, mask=inside, other=0.0) - y[:, None, :]
        x = share * _mean(part, missing)
        tl.store(x_out + problem * n + rows, x, mask=rows < n)
        tl.store(d_cost + at, part * (x[None, :, None] - missing) / epsilon, mask=inside)
