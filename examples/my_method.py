"""A method from outside otcxr, complete: views of one radiograph say the same, different radiographs do not.

    g = head(mean of the encoder's last map)                                        both views
    L = |g_s - g_t|^2 / d + w [v(g_s) + v(g_t)] / 2
    v(g) = mean over dimensions of max(0, 1 - standard deviation over the batch)

It is VICReg without its covariance term: no dimension can become constant, but all of them may come to say the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from otcxr.data.geometry import ViewBatch
from otcxr.errors import ConfigError
from otcxr.losses import squared_difference, variance
from otcxr.methods.base import Method, Observed, SSLMethod, StepOutput, encode_views, tokens_of
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead


@dataclass(frozen=True)
class SpreadSettings:
    """Settings of Spread.

    Attributes:
        outputs: d, dimensions of the embedding.
        weight: w, of the hinge on the standard deviation.
    """

    outputs: int = 256
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.outputs < 1 or self.weight < 0:
            raise ConfigError(f"method.outputs must be >= 1, weight >= 0, received {self.outputs} and {self.weight}")


class Spread(SSLMethod):
    """See the module's text."""

    def __init__(self, encoder: Encoder, settings: SpreadSettings) -> None:
        super().__init__(encoder, settings)
        self.head = ProjectionHead(encoder.channels[-1], 512, settings.outputs, final_norm=False)

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        maps = encode_views(self.encoder, batch.views[:2])
        pooled = torch.cat([pool(m) for m in maps])
        first, second = self.head(pooled).chunk(2)
        terms = {"apart": squared_difference(first, second), "narrow": (variance(first) + variance(second)) / 2}
        loss = terms["apart"] + self.settings.weight * terms["narrow"]
        seen = Observed(pooled.detach(), tokens_of(maps[0][-1]).detach(), None) if observe else None
        return StepOutput(loss, {name: term.detach() for name, term in terms.items()}, seen)


GENTLE = Method(Spread, SpreadSettings(weight=0.1), {"rotation": 5.0})  # the same with other defaults
