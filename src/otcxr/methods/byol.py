"""BYOL: predict the embedding that a slower copy of the network gives the other view; no negatives.

    z = projector(mean of the last map),   p = predictor(z)                     trained network
    z' = the same projector and encoder as momentum copies, no gradient, no predictor
    L = [2 - 2 cos(p_1, z'_2)] + [2 - 2 cos(p_2, z'_1)]

in [0, 8], 4 where predictions and targets have nothing to do with each other. After the step the copies follow,
p <- m p + (1 - m) p_trained, with m rising from its setting to 1 along half a cosine (nn.momentum).

Source: Grill et al., NeurIPS 2020, arXiv:2006.07733, equations 1 to 3. What differs: both views come from one
distribution, radiograph views, instead of two of colour distortions; m starts at 0.99 instead of 0.996, as short
trainings need; narrower heads; AdamW unless set. The published numbers: ``configs/published/byol.yaml``. BatchNorm in
the heads is part of the method: without it nothing keeps the embeddings apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from otcxr.data.geometry import ViewBatch
from otcxr.losses import negative_cosine
from otcxr.methods.base import (
    Observed,
    SSLMethod,
    StepOutput,
    check_at_least,
    check_momentum,
    encode_views,
    tokens_of,
)
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead
from otcxr.nn.momentum import follow, momentum_copy, rising_momentum

__all__ = ["BYOL", "BYOLSettings"]


@dataclass(frozen=True)
class BYOLSettings:
    """Settings of BYOL.

    Attributes:
        hidden: Width of the hidden layers of projector and predictor.
        outputs: Dimensions of the embedding.
        momentum: m at the start; it rises to 1 (published: 0.996 for 1,000 epochs, 0.99 for 100).
    """

    hidden: int = 512
    outputs: int = 128
    momentum: float = 0.99

    def __post_init__(self) -> None:
        check_at_least(1, hidden=self.hidden, outputs=self.outputs)
        check_momentum(self.momentum)


class BYOL(SSLMethod):
    """See the module's text."""

    def __init__(self, encoder: Encoder, settings: BYOLSettings) -> None:
        super().__init__(encoder, settings)
        hidden, outputs = settings.hidden, settings.outputs
        self.projector = ProjectionHead(encoder.channels[-1], hidden, outputs, final_norm=False)
        self.predictor = ProjectionHead(outputs, hidden, outputs, final_norm=False)
        self.target_encoder, self.target_projector = momentum_copy(encoder), momentum_copy(self.projector)

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        maps = encode_views(self.encoder, batch.views[:2])
        pooled = torch.cat([pool(m) for m in maps])
        first, second = self.predictor(self.projector(pooled)).chunk(2)
        with torch.no_grad():
            slow = torch.cat([pool(m) for m in encode_views(self.target_encoder, batch.views[:2])])
            target_first, target_second = self.target_projector(slow).chunk(2)
        loss = 4 + 2 * negative_cosine(first, target_second) + 2 * negative_cosine(second, target_first)
        terms = {"prediction": loss.detach().clone(), "prediction_chance": loss.new_tensor(4.0)}
        observed = Observed(pooled.detach(), tokens_of(maps[0][-1]).detach(), None) if observe else None
        return StepOutput(loss, terms, observed)

    def after_step(self, progress: float) -> None:
        momentum = rising_momentum(self.settings.momentum, progress)
        pairs: tuple[tuple[nn.Module, nn.Module], ...] = (
            (self.target_encoder, self.encoder),
            (self.target_projector, self.projector),
        )
        for slow, fast in pairs:
            follow(slow, fast, momentum)
