"""What every method of self-supervised learning is here: an encoder, some heads and a loss as ``forward``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from otcxr.data.geometry import ViewBatch, token_valid
from otcxr.errors import ConfigError, DataError
from otcxr.nn.encoder import Encoder

__all__ = [
    "Match",
    "Method",
    "Observed",
    "SSLMethod",
    "StepOutput",
    "check_at_least",
    "check_momentum",
    "check_positive",
    "check_share",
    "encode_views",
    "one_way_plan",
    "refuse_empty",
    "tokens_of",
    "valid_tokens",
]


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
        pooled: (2B, C) pooled features of both views; of the second by the momentum copy where only that one sees it.
        tokens: (B, n, C) tokens of the first view's last map.
        match: The pairing of the first two views, or None for a method that has none, or whose pairs do not depend on
            what the encoder says.
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

    needs_clean: ClassVar[bool] = False  # whether it reads ``ViewBatch.clean``

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

    def kept(self) -> Encoder:
        """Return the encoder that is handed out; the trained one unless a method's teacher is its result (DINO)."""
        return self.encoder

    def constant_rate(self) -> Sequence[nn.Parameter]:
        """Return the parameters whose learning rate stays at its peak (SimSiam's predictor)."""
        return ()

    def after_step(self, progress: float) -> None:
        """Do what follows an optimizer step (momentum copies, queues). ``progress`` of the training is in [0, 1]."""
        return


class Method(NamedTuple):
    """A row of the table of methods. A control is the same class with other settings.

    Attributes:
        build: The class.
        settings: Its settings, with the defaults of this row. They may have a method ``for_images(count)`` that returns
            them fitted to so many training images (the length of a queue).
        views: Defaults of ``views`` that differ for this method, such as the number of local views.
    """

    build: type[SSLMethod]
    settings: Any
    views: Mapping[str, Any] = MappingProxyType({})


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


def valid_tokens(batch: ViewBatch, view: int, last: Tensor) -> Tensor:
    """Valid tokens (B, n) of a global view, of whose last map ``last`` is.

    Raises: DataError: an image has none, so nothing of it can be matched.
    """
    valid = token_valid(batch.valid[view], last.shape[-2], last.shape[-1])
    refuse_empty(valid, ("first", "second")[view])
    return valid


def refuse_empty(valid: Tensor, name: str) -> None:
    """Raise DataError where an image of the view ``name`` has no valid token (B, n)."""
    if not valid.any(1).all():
        sample = int((~valid.any(1)).nonzero()[0])
        raise DataError(f"the {name} view of sample {sample} of the batch has no valid token: nothing to match")


def one_way_plan(partner: Tensor, mass: Tensor, m: int) -> Tensor:
    """The plan (B, n, m) in which position i sends all of its mass to position ``partner[i]``.

    Args:
        partner: (B, n) positions in the other view.
        mass: (B, n).
        m: Number of positions of the other view.
    """
    plan = mass.new_zeros((*mass.shape, m))
    return plan.scatter(-1, partner.unsqueeze(-1), mass.unsqueeze(-1))


def check_at_least(least: float, **values: float) -> None:
    """Raise ConfigError for the first setting that is below ``least``."""
    for name, value in values.items():
        if not value >= least:  # what is no number neither
            raise ConfigError(f"method.{name} must be at least {least}, received {value}")


def check_positive(**values: float) -> None:
    """Raise ConfigError for the first setting that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"method.{name} must be > 0, received {value}")


def check_share(**values: float) -> None:
    """Raise ConfigError for the first setting that is not in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"method.{name} must be in [0, 1], received {value}")


def check_momentum(momentum: float, name: str = "momentum") -> None:
    """Raise ConfigError where the momentum of a copy is not in [0, 1]."""
    if not 0 <= momentum <= 1:
        raise ConfigError(f"method.{name} must be in [0, 1] (0 copies, 1 never moves), received {momentum}")
