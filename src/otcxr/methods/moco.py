"""MoCo v2: recognise a radiograph's other view among earlier radiographs, kept in a queue.

    q = head(mean of the encoder's last map of view 1),   k = the same of view 2 by the momentum copies, no gradient
    L = InfoNCE(q, k, queue)      (losses.info_nce),      queue <- k after the step

Momentum copies of encoder and head follow after every step: p <- m p + (1 - m) p_trained, parameters only.

Source: He et al., CVPR 2020, arXiv:1911.05722; Chen et al., 2020 (v2: head of two layers, temperature 0.2),
arXiv:2003.04297. What differs: BatchNorm over all processes instead of shuffling images between them, which serves the
same end; a queue that is no longer than a quarter of the images; m = 0.99 instead of 0.999, as short trainings need;
radiograph views; AdamW unless set. The published numbers: ``configs/published/moco.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otcxr.data.geometry import ViewBatch
from otcxr.distributed import gather_rows
from otcxr.losses import info_nce
from otcxr.methods.base import (
    Observed,
    SSLMethod,
    StepOutput,
    check_at_least,
    check_momentum,
    check_positive,
    tokens_of,
)
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead
from otcxr.nn.momentum import follow, momentum_copy
from otcxr.nn.queue import KeyQueue, queue_length

__all__ = ["MoCo", "MoCoSettings"]


@dataclass(frozen=True)
class MoCoSettings:
    """Settings of MoCo v2.

    Attributes:
        hidden: Width of the head's hidden layer.
        outputs: Dimensions of the embedding.
        temperature: t of the loss.
        queue: Negatives that are kept, at most; shortened to a power of two of at most a quarter of the images.
        momentum: m of the copies; nearer to 1 for longer trainings (published: 0.999).
    """

    hidden: int = 512
    outputs: int = 128
    temperature: float = 0.2
    queue: int = 4096
    momentum: float = 0.99

    def __post_init__(self) -> None:
        check_at_least(1, hidden=self.hidden, outputs=self.outputs, queue=self.queue)
        check_momentum(self.momentum)
        check_positive(temperature=self.temperature)

    def for_images(self, count: int) -> MoCoSettings:
        """The same with a queue that suits so many images."""
        return replace(self, queue=queue_length(self.queue, count))


class MoCo(SSLMethod):
    """See the module's text."""

    def __init__(self, encoder: Encoder, settings: MoCoSettings) -> None:
        super().__init__(encoder, settings)
        self.head = ProjectionHead(
            encoder.channels[-1], settings.hidden, settings.outputs, final_norm=False, norm=False
        )
        self.key_encoder, self.key_head = momentum_copy(encoder), momentum_copy(self.head)
        self.queue = KeyQueue(settings.queue, settings.outputs)

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        maps = self.encoder(batch.views[0])
        query = self.head(pool(maps))
        with torch.no_grad():
            pooled_key = pool(self.key_encoder(batch.views[1]))
            key = self.key_head(pooled_key)
        loss = info_nce(query, key, self.queue.vectors, self.settings.temperature).mean()
        self.queue.hold(gather_rows(key))
        chance = loss.new_tensor(len(self.queue.vectors) + 1).log()
        terms: dict[str, Tensor] = {"contrastive": loss.detach(), "contrastive_chance": chance}
        observed = None
        if observe:
            observed = Observed(torch.cat((pool(maps), pooled_key)).detach(), tokens_of(maps[-1]).detach(), None)
        return StepOutput(loss, terms, observed)

    def after_step(self, progress: float) -> None:
        follow(self.key_encoder, self.encoder, self.settings.momentum)
        follow(self.key_head, self.head, self.settings.momentum)
        self.queue.advance()
