"""Costs between two sets of feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_float32", "cosine_cost"]

_ZERO = 1e-12  # norms up to this count as zero


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precision and whole numbers to float32; leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """Cosine cost between every feature of ``x`` and every feature of ``y``.

        C[i, j] = 1 - <x_i, y_j> / (|x_i| |y_j|)

    The *similarity* would pair the least similar positions when it is minimised, hence the sign.

    Args:
        x: Features, shape (..., n, d), any real dtype; half precision is raised to float32.
        y: Features, shape (..., m, d), same leading dimensions.
    Returns: Costs in [0, 2], shape (..., n, m). A zero vector has cost 1 to everything and no
        gradient. Differentiable in both.
    Raises: ValueError: the shapes do not fit together.
    Source: METHOD step 6; the cosine is that of OTCXR (WACV 2025), the sign is ours.
    """
    if x.dim() < 2 or y.dim() < 2 or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; cosine_cost needs (..., n, d) and (..., m, d) "
            "with equal leading dimensions and equal d"
        )
    with torch.autocast(x.device.type, enabled=False):
        x, y = at_least_float32(x), at_least_float32(y)
        x, y = _unit(x), _unit(y)
        # Rounding may leave the range by one unit in the last place; clamping there would cut the gradient, so the
        # value is pulled into [0, 2] without touching the gradient.
        cost = 1.0 - x @ y.transpose(-1, -2)
        return cost + (cost.detach().clamp(0.0, 2.0) - cost.detach())


def _unit(x: Tensor) -> Tensor:
    """x / |x|; zero, with zero gradient, for a zero vector (a floor under |x| would give it a gradient of 1e12)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    present = norm > _ZERO
    return torch.where(present, x / torch.where(present, norm, 1.0), 0.0)
