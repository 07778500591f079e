"""Barlow Twins: the same dimensions of two views correlate, different ones do not.

    z = projector(mean of the last map)
    C = correlation of z_1 with z_2 over the images of all processes      (losses.cross_correlation), (d, d)
    L = sum_i (1 - C_ii)^2 + w sum_{i != j} C_ij^2

Where the views have nothing to do with each other C_ij has mean 0 and variance 1 / N, so L is about
d + d / N + w d (d - 1) / N, which is logged as its chance level.

Source: Zbontar et al., ICML 2021, arXiv:2103.03230, equations 1 and 2. What differs: both views come from one
distribution, radiograph views; one learning rate for weights, biases and norms; AdamW unless set; a projector of 512
instead of 8192 dimensions, which suits small encoders. The published numbers: ``configs/published/barlow.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from otcxr.data.geometry import ViewBatch
from otcxr.distributed import processes
from otcxr.losses import cross_correlation
from otcxr.methods.base import Observed, SSLMethod, StepOutput, check_at_least, encode_views, tokens_of
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead

__all__ = ["Barlow", "BarlowSettings"]


@dataclass(frozen=True)
class BarlowSettings:
    """Settings of Barlow Twins.

    Attributes:
        hidden: Width of the projector's two hidden layers.
        outputs: d, dimensions of the embedding; wide.
        redundancy: w, weight of the correlations between different dimensions.
    """

    hidden: int = 512
    outputs: int = 512
    redundancy: float = 0.005

    def __post_init__(self) -> None:
        check_at_least(1, hidden=self.hidden, outputs=self.outputs)
        check_at_least(0, redundancy=self.redundancy)


class Barlow(SSLMethod):
    """See the module's text."""

    def __init__(self, encoder: Encoder, settings: BarlowSettings) -> None:
        super().__init__(encoder, settings)
        self.projector = ProjectionHead(
            encoder.channels[-1], settings.hidden, settings.outputs, final_norm=False, bias=False, depth=3
        )

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        maps = encode_views(self.encoder, batch.views[:2])
        pooled = torch.cat([pool(m) for m in maps])
        first, second = self.projector(pooled).chunk(2)
        with torch.autocast(pooled.device.type, enabled=False):
            correlation = cross_correlation(first, second)
            own = correlation.diagonal()
            invariance = (1 - own).square().sum()
            redundancy = correlation.square().sum() - own.square().sum()
            loss = invariance + self.settings.redundancy * redundancy
        d, images = len(own), len(first) * processes()
        chance = d + d / images + self.settings.redundancy * d * (d - 1) / images
        terms = {
            "invariance": invariance.detach(), "redundancy": redundancy.detach(),
            "loss_chance": loss.new_tensor(chance),
        }  # fmt: skip
        observed = Observed(pooled.detach(), tokens_of(maps[0][-1]).detach(), None) if observe else None
        return StepOutput(loss, terms, observed)
