"""What every method of self-supervised learning is here: an encoder, some heads and a loss as ``forward``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from otcxr.data.geometry import ViewBatch
from otcxr.nn.encoder import Encoder

__all__ = ["Match", "Method", "Observed", "SSLMethod", "StepOutput", "encode_views", "tokens_of"]


class Match(NamedTuple):
    """What a method pairs in two views; detached.

    Attributes:
        cost: (B, n, m) cost of pairing position i of the first view with j of the second.
        a: (B, n) masses of the first view, 0 where a token is not valid.
        b: (B, m) masses of the second view.
        plan: (B, n, m) mass moved from i to j.
        attention: (B, heads, n, m) cross-view attention of the first view's tokens on the second's, or None.
    """

    cost: Tensor
    a: Tensor
    b: Tensor
    plan: Tensor
    attention: Tensor | None


class Observed(NamedTuple):
    """What the health panel looks at; detached; filled on health steps only.

    Attributes:
        pooled: (2B, C) pooled features of both views.
        tokens: (B, n, C) tokens of the first view's last map.
        match: The pairing of the first two views, or None for a method that has none.
    """

    pooled: Tensor
    tokens: Tensor
    match: Match | None


class StepOutput(NamedTuple):
    """Result of one step: the loss to minimise, its detached terms (scalars), and what the health panel asked for."""

    loss: Tensor
    terms: dict[str, Tensor]
    observed: Observed | None


class SSLMethod(nn.Module, ABC):
    """A method: ``forward`` is its loss, so DDP, compile and autocast see an ordinary module.

    What a method owes the training, held by the contract tests: every step gives every trainable parameter a gradient
    (DDP waits for all of them); everything that decides the next step is a parameter or a persistent buffer (momentum
    copies, queues, centres), so it is in the checkpoint; random numbers come from torch's default generator, which the
    training seeds for every step; what couples the images of a batch goes through ``otcxr.distributed``.

    Args:
        encoder: The network that is kept after pre-training.
        settings: An instance of the method's settings dataclass.
    """

    encoder: Encoder

    def __init__(self, encoder: Encoder, settings: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.settings = settings

    @abstractmethod
    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        """Return the loss of a batch of views; with ``observe`` also what the health panel looks at."""

    def match(self, batch: ViewBatch) -> Match | None:
        """Return what the method itself pairs in the first two views; None if it pairs no positions."""
        return None

    def constant_rate(self) -> Sequence[nn.Parameter]:
        """Return the parameters whose learning rate stays at its peak (SimSiam's predictor)."""
        return ()

    def after_step(self, progress: float) -> None:
        """Do what follows an optimizer step (momentum copies, queues). ``progress`` of the training is in [0, 1]."""
        return


class Method(NamedTuple):
    """A row of the table of methods. A control is the same class with other settings."""

    build: type[SSLMethod]
    settings: Any


def encode_views(encoder: Encoder, views: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Encode views; those of one size go through together, so they share one BatchNorm statistic.

    Returns: For each view its maps, as ``Encoder.forward`` gives them.
    """
    out: list[tuple[Tensor, ...]] = [()] * len(views)
    sizes = [tuple(view.shape[-2:]) for view in views]
    for size in dict.fromkeys(sizes):
        members = [v for v, s in enumerate(sizes) if s == size]
        maps = encoder(torch.cat([views[v] for v in members]))
        parts = [m.chunk(len(members)) for m in maps]
        for place, v in enumerate(members):
            out[v] = tuple(part[place] for part in parts)
    return out


def tokens_of(feature_map: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C), row by row."""
    return feature_map.flatten(2).transpose(1, 2)
