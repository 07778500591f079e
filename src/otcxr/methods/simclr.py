"""SimCLR: two views of one image attract each other, all other images of the batch repel.

    h = mean of the last map,   z = head(h),   L = NT-Xent(z_1, z_2)      (losses.nt_xent)

Source: Chen et al., ICML 2020, arXiv:2002.05709. What differs: radiograph views instead of colour distortions, AdamW
instead of LARS (a setting of the training, the same for all methods), a head width that suits small encoders. The
published numbers: ``configs/published/simclr.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from otcxr.data.geometry import ViewBatch
from otcxr.distributed import processes
from otcxr.losses import nt_xent, nt_xent_chance
from otcxr.methods.base import Observed, SSLMethod, StepOutput, check_at_least, check_positive, encode_views, tokens_of
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead

__all__ = ["SimCLR", "SimCLRSettings"]


@dataclass(frozen=True)
class SimCLRSettings:
    """Settings of SimCLR.

    Attributes:
        hidden: Width of the head's hidden layer.
        outputs: Dimensions of the embedding.
        temperature: t of the loss; 0.1 to 0.5 in published recipes.
    """

    hidden: int = 512
    outputs: int = 128
    temperature: float = 0.2

    def __post_init__(self) -> None:
        check_at_least(1, hidden=self.hidden, outputs=self.outputs)
        check_positive(temperature=self.temperature)


class SimCLR(SSLMethod):
    """See the module's text."""

    def __init__(self, encoder: Encoder, settings: SimCLRSettings) -> None:
        super().__init__(encoder, settings)
        self.head = ProjectionHead(encoder.channels[-1], settings.hidden, settings.outputs, final_norm=True)

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        maps = encode_views(self.encoder, batch.views[:2])
        pooled = torch.cat([pool(m) for m in maps])
        first, second = self.head(pooled).chunk(2)
        loss = nt_xent(first, second, self.settings.temperature)
        chance = loss.new_tensor(nt_xent_chance(len(first) * processes()))
        terms = {"contrastive": loss.detach(), "contrastive_chance": chance}
        observed = Observed(pooled.detach(), tokens_of(maps[0][-1]).detach(), None) if observe else None
        return StepOutput(loss, terms, observed)
