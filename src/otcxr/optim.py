"""Optimizer, its parameter groups and the schedule of the learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["adamw", "cosine_schedule"]


def adamw(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; biases and norms (one dimension or none) are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


def cosine_schedule(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate: linear from 1/warmup to 1, then half a cosine to 0 at ``total``.

    Args:
        step: Steps already taken, from 0.
        warmup: Steps of the linear part; may be 0.
        total: Steps of the whole training.
    """
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
