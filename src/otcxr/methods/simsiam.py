"""SimSiam: predict the embedding of the other view, with a stop of the gradient instead of a momentum copy.

    z = projector(mean of the last map),   p = predictor(z)
    L = -[cos(p_1, sg z_2) + cos(p_2, sg z_1)] / 2

in [-1, 1], about 0 where predictions and targets have nothing to do with each other; -1 within a few epochs is as
likely a collapse as a success, so look at the health panel. The predictor's learning rate stays at its peak.

Source: Chen and He, CVPR 2021, arXiv:2011.10566, equations 1 to 4. What differs: radiograph views; AdamW unless set;
narrower heads. The published numbers: ``configs/published/simsiam.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from otcxr.data.geometry import ViewBatch
from otcxr.losses import negative_cosine
from otcxr.methods.base import Observed, SSLMethod, StepOutput, check_at_least, encode_views, tokens_of
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead

__all__ = ["SimSiam", "SimSiamSettings"]


@dataclass(frozen=True)
class SimSiamSettings:
    """Settings of SimSiam.

    Attributes:
        hidden: Width of the projector's two hidden layers.
        outputs: Dimensions of the embedding.
        bottleneck: Width of the predictor's hidden layer; a quarter of ``outputs`` in the source.
    """

    hidden: int = 512
    outputs: int = 512
    bottleneck: int = 128

    def __post_init__(self) -> None:
        check_at_least(1, hidden=self.hidden, outputs=self.outputs, bottleneck=self.bottleneck)


class SimSiam(SSLMethod):
    """See the module's text."""

    def __init__(self, encoder: Encoder, settings: SimSiamSettings) -> None:
        super().__init__(encoder, settings)
        self.projector = ProjectionHead(
            encoder.channels[-1], settings.hidden, settings.outputs, final_norm="fixed", depth=3
        )
        self.predictor = ProjectionHead(settings.outputs, settings.bottleneck, settings.outputs, final_norm=False)

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        maps = encode_views(self.encoder, batch.views[:2])
        pooled = torch.cat([pool(m) for m in maps])
        embedded = self.projector(pooled)
        first, second = self.predictor(embedded).chunk(2)
        target_first, target_second = embedded.chunk(2)
        loss = (negative_cosine(first, target_second) + negative_cosine(second, target_first)) / 2
        terms = {"prediction": loss.detach().clone(), "prediction_chance": loss.new_tensor(0.0)}
        observed = Observed(pooled.detach(), tokens_of(maps[0][-1]).detach(), None) if observe else None
        return StepOutput(loss, terms, observed)

    def constant_rate(self) -> Sequence[nn.Parameter]:
        return tuple(self.predictor.parameters())
