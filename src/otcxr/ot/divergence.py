"""The Sinkhorn divergence: entropic transport without its bias."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otcxr.ot.sinkhorn import sinkhorn
from otcxr.ot.transport import Transport

__all__ = ["Divergence", "sinkhorn_divergence"]


class Divergence(NamedTuple):
    """A debiased value and the three transports it is made of.

    Attributes:
        value: (...,) OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2; differentiable.
        cross: Transport from a to b.
        source: Transport from a to itself.
        target: Transport from b to itself.
    """

    value: Tensor
    cross: Transport
    source: Transport
    target: Transport

    @property
    def converged(self) -> Tensor:
        """(...,) bool: all three converged."""
        return self.cross.converged & self.source.converged & self.target.converged


def sinkhorn_divergence(
    cost_xy: Tensor,
    cost_xx: Tensor,
    cost_yy: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    reach: float | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
    backend: str | None = None,
) -> Divergence:
    """Debiased entropic transport between two sets of weighted points.

        S(a, b) = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2  (+ epsilon (sum a - sum b)^2 / 2 with ``reach``)

    OT is the entropic value of ``sinkhorn``, which is not 0 between equal sets; S is, and for costs whose kernel
    exp(-C / epsilon) is positive definite (squared Euclidean distance; 1 - cosine on unit vectors) S >= 0 with equality
    only for equal measures.

    Args:
        cost_xy: Cost from source to target points, (..., n, m).
        cost_xx: Cost among source points, (..., n, n), symmetric; cost_yy: among target points, (..., m, m).
        a, b, epsilon, reach, max_iterations, tolerance, backend: As in ``sinkhorn``.
    Returns: The divergence, differentiable in all three costs and both masses, and the three transports: read their
        ``residual`` and ``converged``.
    Raises: ValueError: as ``sinkhorn``, or a cost within one set is not square or not of the other's size.
    Source: Feydy et al., AISTATS 2019, arXiv:1810.08278; unbalanced: Sejourne et al., 2019, arXiv:1910.12958.
    """
    batch, (n, m) = cost_xy.shape[:-2], cost_xy.shape[-2:]
    for name, cost, size in (("cost_xx", cost_xx, n), ("cost_yy", cost_yy, m)):
        if tuple(cost.shape) != (*batch, size, size):
            raise ValueError(
                f"{name} has shape {tuple(cost.shape)} but cost_xy {tuple(cost_xy.shape)} needs {(*batch, size, size)}"
            )

    def solve(cost: Tensor, left: Tensor | None, right: Tensor | None) -> Transport:
        return sinkhorn(
            cost, left, right, epsilon=epsilon, reach=reach, max_iterations=max_iterations, tolerance=tolerance,
            backend=backend,
        )  # fmt: skip

    cross, source, target = solve(cost_xy, a, b), solve(cost_xx, a, a), solve(cost_yy, b, b)
    value = cross.value - 0.5 * (source.value + target.value)
    if reach is not None:
        sum_a, sum_b = (1.0 if mass is None else mass.sum(-1) for mass in (a, b))
        value = value + 0.5 * epsilon * torch.as_tensor(sum_a - sum_b).to(value).square()
    return Divergence(value, cross, source, target)
