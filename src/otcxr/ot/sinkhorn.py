"""Entropic optimal transport for batches of small dense problems: the front door.

Notation: a (n) and b (m) masses, C cost, f and g dual potentials *relative to the product* ``a b^T``:

    P = a b^T * exp((f + g - C) / epsilon)          (elementwise)

What is checked, what is differentiated and how stands here; the iterations stand in the back ends ``portable``
(PyTorch, any device), ``native`` (numba, CPU) and ``gpu`` (Triton, CUDA), which all have ``solve`` and ``implicit``.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from otcxr.ot.costs import at_least_float32
from otcxr.ot.problem import Solution
from otcxr.ot.transport import Transport

__all__ = ["backends", "sinkhorn"]

_MASS_TOLERANCE = 1e-3  # how far a sum of masses may be from 1; one rounding of a coarser type is allowed, too
_OBJECTIVES = ("value", "sharp")
_MODULES = {"portable": ("", "portable"), "native": ("numba", "native"), "triton": ("triton", "gpu")}  # package, module

logger = logging.getLogger(__name__)


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
    backend: str | None = None,
) -> Transport:
    """Solve entropic optimal transport for every problem of a batch.

        minimise over plans P >= 0    sum(P * cost) + epsilon * KL(P | a b^T)
        subject to                    P 1 = a,   P^T 1 = b                                         (balanced)

    and with ``reach``, where the marginals are only asked for, at a price,

        minimise over plans P >= 0    sum(P * cost) + epsilon * KL(P | a b^T)
                                      + reach * KL(P 1 | a) + reach * KL(P^T 1 | b)                (unbalanced)

    with KL(x | y) = sum x ln(x / y) - x + y.

    Differentiable (once) in ``cost``, ``a`` and ``b``:

        value, objective "value"    the minimum. Envelope theorem: the gradient is the plan and the potentials
                                    (balanced), exact at convergence; costs nothing.
        value, objective "sharp"    the minimum without its entropic term, <P, C> (and the price of the marginals).
        plan                        any function of it, e.g. a barycentric map.

    The last two go through the implicit function theorem with the marginals that the plan has; with "sharp" the linear
    system is solved in the forward pass, if a gradient is needed. Memory does not grow with the iterations. Where a
    mass is zero its gradients are zero: there is no such position. Balanced gradients in the masses are defined up to
    a constant, fixed by <a, da> = <b, db>: only moving mass has a meaning there, not adding it.

    Args:
        cost: Cost of moving mass from i to j, shape (..., n, m), any unit; half precision is raised to float32.
        a: Source masses, shape (..., n), summing to 1; zeros allowed (no such position). None: uniform. With ``reach``
            the sum may be any positive number.
        b: Target masses, shape (..., m), likewise.
        epsilon: Blur, in the unit of ``cost``. Cosine cost spans [0, 2]; 0.05 gives nearly one-to-one plans, 0.5
            diffuse ones.
        reach: Softness of the marginals in the unit of ``cost``: mass for which every way costs more than about
            2 * reach stays unmatched. None: exact marginals. The cost must not be below -reach then.
        max_iterations: Passes over a problem's kernel after which it is given back as it stands. (With ``reach``, three
            exact sweeps at each level of epsilon come before and do not count.)
        tolerance: L1 error of the worse marginal at which a problem is done. Against a exp(-f / reach) with ``reach``.
        objective: "value" or "sharp", see above.
        backend: "portable", "native" or "triton"; None takes the fastest that is installed and fits the device.
    Returns: The plan, its value, potentials, residual and iterations. Not converging is not an error: read
        ``residual`` and ``converged``. A tolerance below what the dtype can hold is given up when nothing improves.
    Raises: ValueError: shapes disagree, epsilon, reach or tolerance <= 0, a cost that is not finite, masses that are
        negative or do not sum to 1, a device that the back end does not serve. ImportError: its package is missing.
    Source: Cuturi, NeurIPS 2013, arXiv:1306.0895; unbalanced: Chizat et al., Math. Comp. 2018, arXiv:1607.05816;
        implicit gradient: Luise et al., NeurIPS 2018, arXiv:1805.11897; ours: the shift and the elimination that keep
        it exact for nearly one-to-one plans (docs/ot.md).
    """
    if objective not in _OBJECTIVES:
        raise ValueError(f"objective must be 'value' or 'sharp', received {objective!r}")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be finite and > 0, received {epsilon}")
    if reach is not None and not reach > 0:
        raise ValueError(f"reach must be > 0, or None for exact marginals; received {reach}")
    if not tolerance > 0 or max_iterations < 1:
        raise ValueError(f"tolerance must be > 0 and max_iterations >= 1, received {tolerance} and {max_iterations}")
    if cost.dim() < 2 or cost.shape[-1] == 0 or cost.shape[-2] == 0:
        raise ValueError(f"cost has shape {tuple(cost.shape)}; expected (..., n, m) with n, m >= 1")
    reach = None if reach == math.inf else reach
    with torch.autocast(cost.device.type, enabled=False):
        cost = at_least_float32(cost)
        a = _masses(a, "a", cost, cost.shape[:-1], balanced=reach is None)
        b = _masses(b, "b", cost, (*cost.shape[:-2], cost.shape[-1]), balanced=reach is None)
        solver = _solver(backend, cost)
        _check_cost(cost, a.detach(), b.detach(), reach)
        out: tuple[Tensor, ...] = _Solve.apply(  # type: ignore[no-untyped-call]
            cost, a, b, solver, epsilon, reach, max_iterations, tolerance, objective, torch.is_grad_enabled()
        )
    return Transport(*out)


def backends(device: str = "cpu") -> tuple[str, ...]:
    """Names of the back ends that are installed for a kind of device, fastest first."""
    names = ("native", "portable") if device == "cpu" else ("triton", "portable") if device == "cuda" else ("portable",)
    return tuple(name for name in names if _module(name) is not None)


@cache
def _module(name: str) -> ModuleType | None:
    """A back end's module; None if its package is not there or, with a warning, broken."""
    package, module = _MODULES[name]
    if package and find_spec(package) is None:
        return None
    try:
        return import_module(f"otcxr.ot.{module}")
    except ImportError as error:
        logger.warning("%s is installed but cannot be imported, so transport runs without it: %s", package, error)
        return None


def _solver(name: str | None, cost: Tensor) -> ModuleType:
    """The back end that was asked for, or the fastest one that takes this cost."""
    if name is None:
        for candidate in backends(cost.device.type):
            module = _module(candidate)
            if module is not None and (candidate != "triton" or module.supports(cost)):
                return module
    if name not in _MODULES:
        raise ValueError(f"backend must be one of {', '.join(_MODULES)} or None, received {name!r}")
    if name == "native" and cost.device.type != "cpu":
        raise ValueError(f"backend 'native' solves on the CPU; cost is on {cost.device}: leave backend out")
    module = _module(name)
    if module is None:
        package = _MODULES[name][0]
        fix = 'pip install "otcxr[fast]"' if name == "native" else "it comes with the CUDA build of PyTorch"
        raise ImportError(f"backend {name!r} needs {package}: {fix}")
    if name == "triton" and not module.supports(cost):
        raise ValueError(
            f"backend 'triton' does not take a cost of shape {tuple(cost.shape)} and {cost.dtype} on {cost.device}: "
            "leave backend out"
        )
    return module


def _capturing(x: Tensor) -> bool:
    """Inside the capture of a CUDA graph nothing can be read back, so nothing can be checked."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _masses(mass: Tensor | None, name: str, cost: Tensor, shape: tuple[int, ...], *, balanced: bool) -> Tensor:
    """Check masses against the cost; None becomes uniform."""
    if mass is None:
        return cost.new_full(shape, 1.0 / shape[-1])
    if tuple(mass.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mass.shape)} but cost {tuple(cost.shape)} needs {tuple(shape)}")
    allowed = max(_MASS_TOLERANCE, torch.finfo(mass.dtype).eps) if mass.is_floating_point() else _MASS_TOLERANCE
    mass = mass.to(cost)
    flat = mass.detach().reshape(-1, shape[-1])
    total = flat.sum(-1)
    if not _capturing(cost):
        wrong = ~((total - 1).abs() <= allowed) if balanced else ~((total > 0) & (total < math.inf))
        wrong |= ~(flat >= 0).all(-1)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            wanted = "sum to 1" if balanced else "have a positive, finite sum"
            raise ValueError(
                f"{name} must be non-negative and {wanted} in every sample; sample {first} has minimum "
                f"{float(flat[first].min()):.3g} and sum {float(total[first]):.6g}: divide by the sum, and use 0 for a "
                "position that does not exist"
            )
    # Rounding of a half-precision softmax is removed as a constant factor, so the gradient stays the potential.
    return mass / total.reshape(*shape[:-1], 1) if balanced else mass


def _check_cost(cost: Tensor, a: Tensor, b: Tensor, reach: float | None) -> None:
    if cost.numel() == 0 or _capturing(cost):
        return
    flat = cost.detach().reshape(-1, *cost.shape[-2:])
    # one pass when all is well: a sum is finite unless something in it is not (or it overflows, which is told apart)
    if not flat.sum().isfinite() and not flat.isfinite().all():
        first = int((~flat.flatten(1).isfinite().all(-1)).nonzero()[0])
        raise ValueError(
            f"cost must be finite; sample {first} holds NaN or infinity: give absent positions mass 0 and a finite cost"
        )
    if reach is None:
        return
    # what stands where there is no mass does not matter
    flat = flat.where((a.reshape(-1, a.shape[-1], 1) > 0) & (b.reshape(-1, 1, b.shape[-1]) > 0), 0.0)
    if flat.min() < -reach:
        first = int((flat.amin((-1, -2)) < -reach).nonzero()[0])
        raise ValueError(
            f"cost must be at least -reach = {-reach} with soft marginals, or moving mass would be rewarded and create "
            f"it; sample {first} holds {float(flat[first].min()):.6g}: add a constant to the cost, or leave reach out"
        )


class _Solve(torch.autograd.Function):
    """Forward solves without a tape and prepares the gradient of ``value``; backward adds that of the plan."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        cost: Tensor,
        a: Tensor,
        b: Tensor,
        solver: ModuleType,
        epsilon: float,
        reach: float | None,
        max_iterations: int,
        tolerance: float,
        objective: str,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        batch, (n, m) = cost.shape[:-2], cost.shape[-2:]
        needed = with_gradient and any(ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        flat = cost.reshape(-1, n, m), a.reshape(-1, n), b.reshape(-1, m)
        numbers = epsilon, reach, max_iterations, tolerance
        sharp: tuple[Tensor, ...] = ()
        if objective == "sharp" and needed and hasattr(solver, "solve_sharp"):
            solution, *sharp_parts = solver.solve_sharp(*flat, *numbers)
            sharp = tuple(sharp_parts)
        else:
            solution = solver.solve(*flat, *numbers)
        potentials = _centre(solution.f, solution.g, *flat[1:], balanced=reach is None)
        gradients: tuple[Tensor, ...] = ()
        if objective == "value":
            value, gradients = _value(solution, potentials, *flat[1:], epsilon, reach)
        else:
            value = _sharp_value(solution.plan, *flat, reach)
            if needed:
                gradients = _sharp_gradients(solution, potentials, flat, solver, sharp, epsilon, reach)
        plan = solution.plan.reshape(cost.shape)
        f, g = potentials[0].reshape(a.shape), potentials[1].reshape(b.shape)
        value, residual, iterations = (x.reshape(batch) for x in (value, solution.residual, solution.iterations))
        converged = residual <= tolerance
        ctx.save_for_backward(plan, a, b, *gradients)
        ctx.solver, ctx.epsilon, ctx.reach = solver, epsilon, reach  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(f, g, residual, iterations, converged)
        ctx.set_materialize_grads(False)
        return plan, value, f, g, residual, iterations, converged

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, a, b, *prepared = ctx.saved_tensors  # type: ignore[attr-defined]
        needed = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        out: list[Tensor | None] = [None, None, None]
        with torch.no_grad(), torch.autocast(plan.device.type, enabled=False):
            if grads[1] is not None:
                weight = grads[1].detach()
                parts = prepared if len(prepared) == 3 else (plan, *prepared)
                scales = weight[..., None, None], weight[..., None], weight[..., None]
                shapes = plan.shape, a.shape, b.shape
                for i, (scale, part, shape) in enumerate(zip(scales, parts, shapes, strict=True)):
                    if needed[i]:
                        out[i] = scale * part.reshape(shape)
            if grads[0] is not None:
                through = _through_plan(plan, a, b, grads[0].detach(), ctx)
                for i, part in enumerate(through):
                    if needed[i]:
                        known = out[i]
                        out[i] = part if known is None else known.add_(part)
        if torch.is_grad_enabled():  # create_graph: the second derivative must not be taken for zero
            at = [i for i, part in enumerate(out) if part is not None]
            refused = _Refuse.apply(*(out[i].detach().requires_grad_() for i in at))  # type: ignore[no-untyped-call, union-attr]
            for i, part in zip(at, refused, strict=True):
                out[i] = part
        return *out, None, None, None, None, None, None, None


class _Refuse(torch.autograd.Function):
    """Hand gradients on; differentiating them is an error. (``once_differentiable`` lets a constant factor through.)"""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("sinkhorn can be differentiated once only: its gradients carry no graph")


def _centre(f: Tensor, g: Tensor, a: Tensor, b: Tensor, *, balanced: bool) -> tuple[Tensor, Tensor]:
    """Fix the free constant of balanced potentials by <a, f> = <b, g>, and put 0 where there is no mass."""
    if balanced:
        shift = 0.5 * ((a * f).sum(-1) - (b * g).sum(-1)).unsqueeze(-1)
        f, g = f - shift, g + shift
    return torch.where(a > 0, f, 0.0), torch.where(b > 0, g, 0.0)


def _value(
    solution: Solution, potentials: tuple[Tensor, Tensor], a: Tensor, b: Tensor, epsilon: float, reach: float | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Dual objective (second order in the residual) and its gradients in a and b; that in the cost is the plan.

    balanced      <a, f> + <b, g> + epsilon (1 - sum P)
    unbalanced    reach <a, 1 - exp(-f / reach)> + reach <b, 1 - exp(-g / reach)> + epsilon (sum a sum b - sum P)
    """
    f, g = potentials
    mass = solution.plan.sum((-1, -2))
    if reach is None:
        return (a * f).sum(-1) + (b * g).sum(-1) + epsilon * (a.sum(-1) - mass), (f, g)
    gain_a, gain_b = -reach * (-f / reach).expm1(), -reach * (-g / reach).expm1()
    sum_a, sum_b = a.sum(-1), b.sum(-1)
    value = (a * gain_a).sum(-1) + (b * gain_b).sum(-1) + epsilon * (sum_a * sum_b - mass)
    # P 1 = a exp(-f / reach), so the plan's share of the last term is known without dividing by small masses
    d_a = gain_a + epsilon * (sum_b.unsqueeze(-1) - (-f / reach).exp())
    d_b = gain_b + epsilon * (sum_a.unsqueeze(-1) - (-g / reach).exp())
    return value, (torch.where(a > 0, d_a, 0.0), torch.where(b > 0, d_b, 0.0))


def _sharp_value(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor, reach: float | None) -> Tensor:
    """<P, C>, and with soft marginals what they cost."""
    value = (plan * cost).sum((-1, -2))
    if reach is not None:
        for marginal, mass in ((plan.sum(-1), a), (plan.sum(-2), b)):
            # two logarithms, as the ratio itself may be too small to be a number
            ratio = torch.where(marginal > 0, marginal, 1.0).log() - torch.where(marginal > 0, mass, 1.0).log()
            value = value + reach * (marginal * ratio - marginal + mass).sum(-1)
    return value


def _sharp_gradients(
    solution: Solution, potentials: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor, Tensor], solver: ModuleType,
    done: tuple[Tensor, ...], epsilon: float, reach: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the sharp objective in cost, a and b.

    The slope in the plan is C (and reach ln of the marginals' ratios); f and g are taken off it before the system is
    solved, as they solve it for themselves: what is left is -epsilon ln(P / (a b^T)).
    """
    cost, a, b = given
    plan = solution.plan
    f, g = potentials
    kappa = 0.0 if reach is None else epsilon / reach
    if done:
        d_cost, x, y = done
    else:
        slope = cost - f.unsqueeze(-1) - g.unsqueeze(-2)
        d_cost, x, y = solver.implicit(plan, slope, epsilon, kappa)
        d_cost = d_cost.add_(plan)
    x, y = _centre(x, y, a, b, balanced=reach is None)
    if reach is None:
        return d_cost, f + x, g + y
    # 1 - P 1 / a, once more without dividing by small masses
    d_a = -reach * (-f / reach).expm1() + (1 + kappa) * (-f / reach).exp() * x
    d_b = -reach * (-g / reach).expm1() + (1 + kappa) * (-g / reach).exp() * y
    return d_cost, torch.where(a > 0, d_a, 0.0), torch.where(b > 0, d_b, 0.0)


def _through_plan(
    plan: Tensor, a: Tensor, b: Tensor, gradient: Tensor, ctx: torch.autograd.function.FunctionCtx
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in cost, a and b of a function of the plan, given its gradient in the plan."""
    solver, epsilon, reach = ctx.solver, ctx.epsilon, ctx.reach  # type: ignore[attr-defined]
    n, m = plan.shape[-2:]
    flat, flat_a, flat_b = plan.reshape(-1, n, m), a.reshape(-1, n), b.reshape(-1, m)
    kappa = 0.0 if reach is None else epsilon / reach
    d_cost, x, y = solver.implicit(flat, gradient.to(plan.dtype).reshape(-1, n, m), epsilon, kappa)
    x, y = _centre(x, y, flat_a, flat_b, balanced=reach is None)
    if reach is not None:
        x = (1 + kappa) * x * torch.where(flat_a > 0, flat.sum(-1) / flat_a.where(flat_a > 0, 1.0), 0.0)
        y = (1 + kappa) * y * torch.where(flat_b > 0, flat.sum(-2) / flat_b.where(flat_b > 0, 1.0), 0.0)
    return d_cost.reshape(plan.shape), x.reshape(a.shape), y.reshape(b.shape)
