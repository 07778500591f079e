"""Problems of different sizes in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from otcxr.ot.costs import at_least_float32

__all__ = ["pad_problems"]


def pad_problems(
    costs: Sequence[Tensor], a: Sequence[Tensor] | None = None, b: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad problems of different sizes to one batch: absent positions have cost 0 and mass 0.

    A problem in the batch has the solution, value and gradients that it has alone (to rounding).

    Args:
        costs: Costs, each (n_i, m_i), n_i, m_i >= 1, all of one dtype and device.
        a: Source masses, each (n_i,); None: uniform on the positions of each problem.
        b: Target masses, each (m_i,); None: uniform.
    Returns: cost (B, n, m), a (B, n) and b (B, m) with n and m the largest of each; differentiable.
    Raises: ValueError: no problem at all, or shapes that disagree, with the number of the problem.
    """
    if len(costs) == 0:
        raise ValueError("costs is empty; pad_problems needs at least one problem to know dtype and device")
    for i, cost in enumerate(costs):
        if cost.dim() != 2 or 0 in cost.shape:
            raise ValueError(f"cost {i} has shape {tuple(cost.shape)}; expected (n, m) with n, m >= 1")
    masses = []
    for name, given, side in (("a", a, 0), ("b", b, 1)):
        if given is not None and len(given) != len(costs):
            raise ValueError(f"{name} has {len(given)} entries but there are {len(costs)} costs")
        column = []
        for i, cost in enumerate(costs):
            size = cost.shape[side]
            mass = at_least_float32(cost).new_full((size,), 1.0 / size) if given is None else given[i]
            if tuple(mass.shape) != (size,):
                raise ValueError(
                    f"{name} {i} has shape {tuple(mass.shape)} but cost {i} {tuple(cost.shape)} needs ({size},)"
                )
            column.append(mass)
        masses.append(torch.nn.utils.rnn.pad_sequence(column, batch_first=True))
    n, m = masses[0].shape[1], masses[1].shape[1]
    padded = [torch.nn.functional.pad(cost, (0, m - cost.shape[1], 0, n - cost.shape[0])) for cost in costs]
    return torch.stack(padded), masses[0], masses[1]
