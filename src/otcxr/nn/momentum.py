"""Momentum copies: a second network that follows the trained one slowly and gives it its targets."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn

__all__ = ["follow", "momentum_copy", "rising_momentum"]

M = TypeVar("M", bound=nn.Module)


def momentum_copy(module: M) -> M:
    """Copy a module, parameters and buffers, as one that no gradient reaches."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Move a momentum copy towards its original.

        p_slow <- momentum p_slow + (1 - momentum) p_fast

    Parameters only: the statistics of BatchNorm in the copy come from what passes through the copy itself. Call it
    after the optimizer's step.
    Source: He et al., CVPR 2020 (MoCo), arXiv:1911.05722, equation 2.
    """
    for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
        p.mul_(momentum).add_(q.to(p.dtype), alpha=1 - momentum)


def rising_momentum(first: float, progress: float) -> float:
    """Momentum that rises from ``first`` to 1 along half a cosine while ``progress`` goes from 0 to 1.

        m = 1 - (1 - first) (cos(pi progress) + 1) / 2

    Source: Grill et al., NeurIPS 2020 (BYOL), arXiv:2006.07733, section 3.3.
    """
    return 1 - (1 - first) * (math.cos(math.pi * progress) + 1) / 2
