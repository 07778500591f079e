"""Sinkhorn's algorithm for batches of small dense problems, in plain PyTorch.

Notation: a (n) and b (m) masses, C cost, f and g dual potentials *relative to the product* ``a b^T``:

    P = a b^T * exp((f + g - C) / epsilon)          (elementwise)

Work is done on the scaled kernel ``P`` itself: every block of iterations multiplies rows by u and columns by v with
two matrix-vector products, then u and v are absorbed into f and g and P is formed anew with exact exponentials. So
the reported residual is that of the plan that is returned, and nothing overflows. Small epsilon (range of the cost
above 40 epsilon) is reached by annealed sweeps in the log domain first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otcxr.ot.costs import at_least_float32

__all__ = ["Transport", "entropy", "sinkhorn"]

_BLOCK = 10  # iterations between two exact evaluations of plan and residual
_MASS_TOLERANCE = 1e-3  # how far a sum of masses may be from 1; one rounding of a coarser type is allowed, too
_VANISHING = 1e-25  # smaller masses move nothing; their potentials are computed at the end from the others'


class Transport(NamedTuple):
    """Solution of entropic optimal transport. ``plan``, ``f`` and ``g`` carry no gradient; ``value`` does.

    Attributes:
        plan: (..., n, m) mass moved from i to j; P = a b exp((f + g - C) / epsilon).
        value: (...,) <P, C> + epsilon KL(P | a b^T); its gradient is ``plan`` in the cost, ``f`` in a, ``g`` in b.
        f: (..., n) dual potential in units of the cost, relative to a b^T; 0 where a is 0; <a, f> = <b, g>.
        g: (..., m) the same for b.
        residual: (...,) the larger of the two L1 marginal errors, in mass.
        iterations: (...,) int, iterations spent on this problem.
        converged: (...,) bool, residual <= tolerance.
    """

    plan: Tensor
    value: Tensor
    f: Tensor
    g: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor


def entropy(mass: Tensor, dims: int = 1) -> Tensor:
    """Shannon entropy in nats, H = -sum p ln p with 0 ln 0 = 0, over the last ``dims`` dimensions (2 for a plan).

    The gradient is finite everywhere: at p = 0, where the slope is infinite, it is that at the smallest normal number.
    """
    mass = at_least_float32(mass)
    logarithm = mass.clamp_min(torch.finfo(mass.dtype).tiny).log()
    return -(mass * logarithm).flatten(-dims).sum(-1)


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    reach: float | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
    objective: str = "value",
) -> Transport:
    """Solve entropic optimal transport for every problem of a batch.

        minimise over plans P >= 0    sum(P * cost) + epsilon * KL(P | a b^T)
        subject to                    P 1 = a,   P^T 1 = b

    Differentiable (once) in ``cost``, ``a`` and ``b`` through ``value`` by the envelope theorem: the gradient is the
    plan and the potentials, exact at convergence; memory does not grow with the iterations. Where a mass is zero its
    gradient is zero: there is no such position.

    Args:
        cost: Cost of moving mass from i to j, shape (..., n, m), any unit; half precision is raised to float32.
        a: Source masses, shape (..., n), summing to 1; zeros allowed (no such position). None: uniform.
        b: Target masses, shape (..., m), likewise.
        epsilon: Blur, in the unit of ``cost``. Cosine cost spans [0, 2]; 0.05 gives nearly one-to-one plans, 0.5
            diffuse ones.
        reach: Softness of the marginals (unbalanced transport). Only None (exact marginals) is available yet.
        max_iterations: Iterations after which a problem is given back as it stands.
        tolerance: L1 error of the worse marginal at which a problem is done.
        objective: "value", the entropic value. "sharp" (<P, C>) is not available yet.
    Returns: The plan, its value, potentials, residual and iterations. Not converging is not an error: read
        ``residual`` and ``converged``.
    Raises: ValueError: shapes disagree, epsilon or tolerance <= 0, a cost that is not finite, masses that are
        negative or do not sum to 1, or ``reach`` / ``objective`` that is not available.
    Source: Cuturi, NeurIPS 2013, arXiv:1306.0895; absorption of the scalings: Schmitzer, SIAM J. Sci. Comput. 2019,
        arXiv:1610.06519.
    """
    if objective != "value":
        raise ValueError(
            f"objective={objective!r} is not available: expected 'value', the entropic value with envelope gradient"
        )
    if reach is not None:
        raise ValueError(f"reach={reach!r} is not available: only None (exact marginals) is solved; leave reach out")
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be finite and > 0, received {epsilon}")
    if not tolerance > 0 or max_iterations < 1:
        raise ValueError(f"tolerance must be > 0 and max_iterations >= 1, received {tolerance} and {max_iterations}")
    if cost.dim() < 2 or cost.shape[-1] == 0 or cost.shape[-2] == 0:
        raise ValueError(f"cost has shape {tuple(cost.shape)}; expected (..., n, m) with n, m >= 1")
    with torch.autocast(cost.device.type, enabled=False):
        cost = at_least_float32(cost)
        a = _masses(a, "a", cost, cost.shape[:-1])
        b = _masses(b, "b", cost, (*cost.shape[:-2], cost.shape[-1]))
        _check_finite(cost)
        out: tuple[Tensor, ...] = _Solve.apply(  # type: ignore[no-untyped-call]
            cost, a, b, epsilon, max_iterations, tolerance
        )
    return Transport(*out)


def _masses(mass: Tensor | None, name: str, cost: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Check masses against the cost; None becomes uniform."""
    if mass is None:
        return cost.new_full(shape, 1.0 / shape[-1])
    if tuple(mass.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mass.shape)} but cost {tuple(cost.shape)} needs {tuple(shape)}")
    allowed = max(_MASS_TOLERANCE, torch.finfo(mass.dtype).eps) if mass.is_floating_point() else _MASS_TOLERANCE
    mass = mass.to(cost.dtype)
    flat = mass.detach().reshape(-1, shape[-1])
    total = flat.sum(-1)
    bad = ~(flat >= 0).all(-1) | ~((total - 1).abs() <= allowed)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{name} must be non-negative and sum to 1 in every sample; sample {first} has minimum "
            f"{float(flat[first].min()):.3g} and sum {float(total[first]):.6g}: divide by the sum, and use 0 for a "
            "position that does not exist"
        )
    # Rounding of a half-precision softmax is removed as a constant factor, so the gradient stays the potential.
    return mass / total.reshape(*shape[:-1], 1)


def _check_finite(cost: Tensor) -> None:
    finite = cost.detach().flatten(-2).isfinite().all(-1).reshape(-1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(f"cost must be finite; sample {first} holds NaN or infinity (mark absent positions by mass 0)")


class _Solve(torch.autograd.Function):
    """Forward solves without a tape; backward is the envelope theorem."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        cost: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: float,
        max_iterations: int,
        tolerance: float,
    ) -> tuple[Tensor, ...]:
        batch, (n, m) = cost.shape[:-2], cost.shape[-2:]
        flat_a, flat_b = a.reshape(-1, n), b.reshape(-1, m)
        plan, f, g, residual, iterations = _solve(
            cost.reshape(-1, n, m), flat_a, flat_b, epsilon, max_iterations, tolerance
        )
        f, g = _centre(f, g, flat_a, flat_b)
        # The dual objective: second-order accurate in the residual, and its gradient in the cost is the plan exactly.
        value = (flat_a * f).sum(-1) + (flat_b * g).sum(-1) - epsilon * (plan.sum((-1, -2)) - flat_a.sum(-1))
        plan, f, g = plan.reshape(cost.shape), f.reshape(a.shape), g.reshape(b.shape)
        value, residual, iterations = (x.reshape(batch) for x in (value, residual, iterations))
        converged = residual <= tolerance
        ctx.save_for_backward(plan, f, g)
        ctx.mark_non_differentiable(plan, f, g, residual, iterations, converged)
        return plan, value, f, g, residual, iterations, converged

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, f, g = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[1].detach().unsqueeze(-1)
        out = (grad.unsqueeze(-1) * plan, grad * f, grad * g)
        if torch.is_grad_enabled():  # create_graph: the second derivative must not be taken for zero
            out = _Refuse.apply(*(x.detach().requires_grad_() for x in out))  # type: ignore[no-untyped-call]
        return *out, None, None, None


class _Refuse(torch.autograd.Function):
    """Hand gradients on; differentiating them is an error. (``once_differentiable`` lets a constant factor through.)"""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("sinkhorn can be differentiated once only: its gradient is the plan and the potentials")


def _solve(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve (B, n, m) problems; each leaves the batch when it is done. Returns plan, f, g, residual, iterations."""
    plan, f, g = torch.empty_like(cost), torch.empty_like(a), torch.empty_like(b)
    residual = cost.new_empty(cost.shape[0])
    iterations = torch.zeros(cost.shape[0], dtype=torch.int64, device=cost.device)
    if cost.shape[0] == 0:
        return plan, f, g, residual, iterations

    log_a, log_b = a.log(), b.log()
    whole = cost, a, b, log_a, log_b
    f_now, g_now, spent = _warm_start(cost, log_a, log_b, epsilon, max_iterations)
    active = torch.arange(cost.shape[0], device=cost.device)
    while True:
        kernel = _plan(cost, f_now, g_now, log_a, log_b, epsilon)
        now = torch.maximum((kernel.sum(-1) - a).abs().sum(-1), (kernel.sum(-2) - b).abs().sum(-1))
        done = now <= tolerance if spent < max_iterations else torch.ones_like(now, dtype=torch.bool)
        if done.any():
            at = active[done]
            plan[at], f[at], g[at], residual[at] = kernel[done], f_now[done], g_now[done], now[done]
            iterations[at] = spent
            if done.all():
                break
            keep = ~done
            active, cost, kernel = active[keep], cost[keep], kernel[keep]
            a, b, log_a, log_b = a[keep], b[keep], log_a[keep], log_b[keep]
            f_now, g_now = f_now[keep], g_now[keep]
        u, v = torch.ones_like(a), torch.ones_like(b)
        block = min(_BLOCK, max_iterations - spent)
        transposed = kernel.transpose(-1, -2).contiguous()
        for _ in range(block):
            u = _scaling(a, torch.bmm(v.unsqueeze(1), transposed).squeeze(1))
            v = _scaling(b, torch.bmm(u.unsqueeze(1), kernel).squeeze(1))
        spent += block
        f_now, g_now = f_now + epsilon * u.log(), g_now + epsilon * v.log()

    cost, a, b, log_a, log_b = whole
    vanishing_a, vanishing_b = (a > 0) & (a < _VANISHING), (b > 0) & (b < _VANISHING)
    if vanishing_a.any() or vanishing_b.any():
        f = torch.where(vanishing_a, _soft_minimum(cost, g, log_b, epsilon), f)
        g = torch.where(vanishing_b, _soft_minimum(cost.transpose(-1, -2), f, log_a, epsilon), g)
        plan = _plan(cost, f, g, log_a, log_b, epsilon)
    return plan, f, g, residual, iterations


def _warm_start(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: float, max_iterations: int
) -> tuple[Tensor, Tensor, int]:
    """Return potentials from which the scaled iterations neither under- nor overflow, and the sweeps they took.

    One sweep is enough for a moderate range of the cost; a large one is annealed: each sweep at 0.6 times the last
    epsilon, then some at the target.
    """
    width = float(cost.max() - cost.min())
    schedule = [epsilon]
    if width > 40 * epsilon:
        current = 0.6 * width
        schedule = []
        while current > epsilon:
            schedule.append(current)
            current *= 0.6
        schedule += [epsilon] * 8
    schedule = schedule[-max_iterations:]
    transposed = cost.transpose(-1, -2)
    f = torch.zeros_like(log_a)
    g = _soft_minimum(transposed, f, log_a, schedule[0])
    for current in schedule:
        f = _soft_minimum(cost, g, log_b, current)
        g = _soft_minimum(transposed, f, log_a, current)
    return f, g, len(schedule)


def _soft_minimum(cost: Tensor, potential: Tensor, log_mass: Tensor, epsilon: float) -> Tensor:
    """-epsilon ln sum_j mass_j exp((potential_j - cost_ij) / epsilon), the update of one potential given the other."""
    return -epsilon * torch.logsumexp((potential.unsqueeze(-2) - cost) / epsilon + log_mass.unsqueeze(-2), dim=-1)


def _plan(cost: Tensor, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, epsilon: float) -> Tensor:
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon
    return (exponent + log_a.unsqueeze(-1) + log_b.unsqueeze(-2)).exp()


def _scaling(mass: Tensor, marginal: Tensor) -> Tensor:
    """mass / marginal; 1 where there is no mass. The clamps only keep far-off intermediate states finite."""
    return torch.where(mass >= _VANISHING, mass / marginal.clamp_min(1e-30), 1.0).clamp(1e-15, 1e15)


def _centre(f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Fix the free constant of the potentials by <a, f> = <b, g>, and put 0 where there is no mass."""
    f, g = torch.where(a > 0, f, 0.0), torch.where(b > 0, g, 0.0)
    shift = 0.5 * ((a * f).sum(-1) - (b * g).sum(-1)).unsqueeze(-1)
    return torch.where(a > 0, f - shift, 0.0), torch.where(b > 0, g + shift, 0.0)
