"""VICReg: equal embeddings of two views, kept from collapse by variance and covariance instead of negatives.

    h = mean of the last map,   z = expander(h)                                          (B, d) for each view
    L = invariance |z - z'|^2 / d + variance [v(z) + v(z')] / 2 + covariance [c(z) + c(z')]

v is the hinge on the standard deviation of every dimension, c the penalty on correlated dimensions (`otcxr.losses`),
both over the images of all processes; z is not normalised.

Source: Bardes, Ponce and LeCun, ICLR 2022, arXiv:2105.04906, equations 1 to 6; the halving of v is that of the authors'
code. What differs: radiograph views instead of colour distortions; the training's optimizer (AdamW unless set) instead
of LARS; an expander of 1024 instead of 8192 dimensions, which suits small encoders and batches. The published numbers:
``configs/published/vicreg.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from otcxr.data.geometry import ViewBatch
from otcxr.losses import covariance, squared_difference, variance
from otcxr.methods.base import Observed, SSLMethod, StepOutput, check_at_least, encode_views, tokens_of
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead

__all__ = ["VICReg", "VICRegSettings"]


@dataclass(frozen=True)
class VICRegSettings:
    """Settings of VICReg.

    Attributes:
        hidden: Width of the expander's two hidden layers.
        outputs: Dimensions of the embedding; wide.
        invariance: Weight of the mean squared difference.
        variance: Weight of the hinge on the standard deviation.
        covariance: Weight of the penalty on correlated dimensions.
    """

    hidden: int = 1024
    outputs: int = 1024
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(1, hidden=self.hidden, outputs=self.outputs)
        check_at_least(0, invariance=self.invariance, variance=self.variance, covariance=self.covariance)


class VICReg(SSLMethod):
    """See the module's text."""

    def __init__(self, encoder: Encoder, settings: VICRegSettings) -> None:
        super().__init__(encoder, settings)
        self.expander = ProjectionHead(
            encoder.channels[-1], settings.hidden, settings.outputs, final_norm=False, bias=False, depth=3
        )

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        s = self.settings
        maps = encode_views(self.encoder, batch.views[:2])
        pooled = torch.cat([pool(m) for m in maps])
        first, second = self.expander(pooled).chunk(2)
        terms = {
            "invariance": squared_difference(first, second),
            "variance": (variance(first) + variance(second)) / 2,
            "covariance": covariance(first) + covariance(second),
        }
        loss = s.invariance * terms["invariance"] + s.variance * terms["variance"] + s.covariance * terms["covariance"]
        observed = Observed(pooled.detach(), tokens_of(maps[0][-1]).detach(), None) if observe else None
        return StepOutput(loss, {name: term.detach() for name, term in terms.items()}, observed)
