"""What every back end of the solver takes and gives back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Solution"]


class Solution(NamedTuple):
    """A solved batch, before the front door fixes the constant of the potentials.

    Attributes:
        plan: (B, n, m) P = a b exp((f + g - C) / epsilon), exactly 0 where a mass is 0.
        f: (B, n) dual potential; any finite number where a is 0.
        g: (B, m) the same for b.
        residual: (B,) L1 error of the worse marginal of this very plan.
        iterations: (B,) int64.
    """

    plan: Tensor
    f: Tensor
    g: Tensor
    residual: Tensor
    iterations: Tensor
