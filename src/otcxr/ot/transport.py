"""What a solved transport problem is, and what can be asked of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otcxr.ot.costs import at_least_float32

__all__ = ["Transport", "entropy"]


class Transport(NamedTuple):
    """Solution of entropic optimal transport. ``plan`` and ``value`` carry gradients in cost and masses; the rest none.

    Attributes:
        plan: (..., n, m) mass moved from i to j; P = a b exp((f + g - C) / epsilon), 0 where a mass is 0. Its gradient
            is that of the implicit function, with one linear system per problem in the backward pass.
        value: (...,) the objective, see ``sinkhorn``.
        f: (..., n) dual potential in units of the cost, relative to a b^T; 0 where a is 0; <a, f> = <b, g> unless the
            marginals are soft.
        g: (..., m) the same for b.
        residual: (...,) the larger of the two L1 marginal errors, in mass.
        iterations: (...,) int, passes over the kernel spent on this problem.
        converged: (...,) bool, residual <= tolerance.
    """

    plan: Tensor
    value: Tensor
    f: Tensor
    g: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor

    def map(self, y: Tensor) -> Tensor:
        """Barycentric projection: where the mass of every source position goes on average.

            T_i = sum_j P_ij y_j / sum_j P_ij

        Args:
            y: Values at the target positions, (..., m, d), same leading dimensions as the plan.
        Returns: (..., n, d), 0 where a position has no mass. Differentiable in ``y`` and through the plan.
        Raises: ValueError: ``y`` does not fit the plan.
        """
        if y.shape[:-1] != (*self.plan.shape[:-2], self.plan.shape[-1]):
            raise ValueError(
                f"y has shape {tuple(y.shape)} but plan {tuple(self.plan.shape)} needs "
                f"{(*self.plan.shape[:-2], self.plan.shape[-1])} and one more dimension"
            )
        with torch.autocast(self.plan.device.type, enabled=False):
            mass = self.plan.sum(-1, keepdim=True)
            present = mass > 1e7 * torch.finfo(mass.dtype).tiny  # below, 1 / mass would overflow in the gradient
            return torch.where(present, self.plan @ y.to(self.plan.dtype) / torch.where(present, mass, 1.0), 0.0)

    def entropy(self) -> Tensor:
        """Shannon entropy of the plan in nats, (...,): ln n for a one-to-one plan of n equal masses, H(a) + H(b) for
        the independent coupling."""
        return entropy(self.plan, dims=2)

    def hard(self) -> Tensor:
        """For every source position the target that gets most of its mass, (..., n) int64; -1 where it has none.

        Ties go to the first. No gradient; several sources may share a target.
        """
        most, at = self.plan.max(-1)
        return at.where(most > 0, -1)


def entropy(mass: Tensor, dims: int = 1) -> Tensor:
    """Shannon entropy in nats, H = -sum p ln p with 0 ln 0 = 0, over the last ``dims`` dimensions (2 for a plan).

    The gradient is finite everywhere: at p = 0, where the slope is infinite, it is that at the smallest normal number.
    """
    mass = at_least_float32(mass)
    logarithm = mass.clamp_min(torch.finfo(mass.dtype).tiny).log()
    return -(mass * logarithm).flatten(-dims).sum(-1)
