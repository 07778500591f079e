"""DenseCL: contrast of whole radiographs and, position by position, of what the encoder itself finds alike.

    F, F' = last maps of view 1 (encoder) and view 2 (momentum copy); tokens z_i, z'_j at valid positions
    q = head(mean of F),      k = the same of F' by the copies               whole images
    q_i = dense_head(z_i),    k_j = the same of z'_j by the copies           positions
    c(i) = argmax_j cos(z_i, z'_j)                                           matched by *backbone* features
    L = (1 - w) InfoNCE(q, k, queue) + w mean_i InfoNCE(q_i, k_c(i), dense queue)

After the step k goes to the queue and the mean of k_j, one for each image, to the dense queue: dense negatives stand
for images. The mean over positions is taken in each image first.

Source: Wang et al., CVPR 2021, arXiv:2011.09157. What differs: positions that are not valid (padding, rotation
corners) are neither queries nor keys of the dense loss (means of whole maps cover them, as for every method);
BatchNorm over all processes instead of shuffled images; a queue that is no longer than a quarter of the images; m =
0.99 instead of 0.999 for short trainings; narrower heads; radiograph views; AdamW unless set. The published numbers:
``configs/published/densecl.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from otcxr.data.geometry import ViewBatch
from otcxr.distributed import gather_rows
from otcxr.losses import info_nce, masked_mean
from otcxr.methods.base import (
    Match,
    Observed,
    SSLMethod,
    StepOutput,
    check_at_least,
    check_momentum,
    check_positive,
    check_share,
    one_way_plan,
    tokens_of,
    valid_tokens,
)
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead
from otcxr.nn.momentum import follow, momentum_copy
from otcxr.nn.queue import KeyQueue, queue_length
from otcxr.ot import cosine_cost

__all__ = ["DenseCL", "DenseCLSettings"]


@dataclass(frozen=True)
class DenseCLSettings:
    """Settings of DenseCL.

    Attributes:
        hidden: Width of the hidden layers of both heads.
        outputs: Dimensions of both embeddings.
        temperature: t of both losses.
        queue: Negatives that are kept, in each queue, at most; shortened to a power of two of at most a quarter of the
            images.
        momentum: m of the copies; nearer to 1 for longer trainings (published: 0.999).
        dense_weight: w, share of the dense loss, in [0, 1].
    """

    hidden: int = 512
    outputs: int = 128
    temperature: float = 0.2
    queue: int = 4096
    momentum: float = 0.99
    dense_weight: float = 0.5

    def __post_init__(self) -> None:
        check_at_least(1, hidden=self.hidden, outputs=self.outputs, queue=self.queue)
        check_momentum(self.momentum)
        check_positive(temperature=self.temperature)
        check_share(dense_weight=self.dense_weight)

    def for_images(self, count: int) -> DenseCLSettings:
        """The same with queues that suit so many images."""
        return replace(self, queue=queue_length(self.queue, count))


class _Pair(NamedTuple):
    """Maps of view 1, the pooled map of view 2, tokens of both, where they are valid, and how unlike they are."""

    maps: tuple[Tensor, ...]
    pooled_key: Tensor
    tokens: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    cost: Tensor
    partner: Tensor


class DenseCL(SSLMethod):
    """See the module's text."""

    def __init__(self, encoder: Encoder, settings: DenseCLSettings) -> None:
        super().__init__(encoder, settings)
        width = encoder.channels[-1]
        self.head, self.dense_head = (
            ProjectionHead(width, settings.hidden, settings.outputs, final_norm=False, norm=False) for _ in range(2)
        )
        self.key_encoder = momentum_copy(encoder)
        self.key_head, self.key_dense_head = momentum_copy(self.head), momentum_copy(self.dense_head)
        self.queue = KeyQueue(settings.queue, settings.outputs)
        self.dense_queue = KeyQueue(settings.queue, settings.outputs)

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        s = self.settings
        pair = self._pair(batch)
        query, dense_query = self.head(pool(pair.maps)), self.dense_head(pair.tokens[0])
        with torch.no_grad():
            key, dense_key = self.key_head(pair.pooled_key), self.key_dense_head(pair.tokens[1])
            matched = dense_key.gather(1, pair.partner.unsqueeze(-1).expand(-1, -1, s.outputs))
        whole = info_nce(query, key, self.queue.vectors, s.temperature).mean()
        rows = info_nce(dense_query, matched, self.dense_queue.vectors, s.temperature)
        dense = masked_mean(rows.unsqueeze(-1), pair.valid[0]).mean()
        loss = (1 - s.dense_weight) * whole + s.dense_weight * dense
        self.queue.hold(gather_rows(key))
        self.dense_queue.hold(gather_rows(masked_mean(dense_key, pair.valid[1])))
        chance = loss.new_tensor(s.queue + 1).log()
        terms = {
            "contrastive": whole.detach(), "contrastive_chance": chance,
            "dense": dense.detach(), "dense_chance": chance,
        }  # fmt: skip
        observed = None
        if observe:
            pooled = torch.cat((pool(pair.maps), pair.pooled_key)).detach()
            observed = Observed(pooled, pair.tokens[0].detach(), _match(pair))
        return StepOutput(loss, terms, observed)

    @torch.no_grad()
    def match(self, batch: ViewBatch) -> Match:
        """Return what the backbones' features pair in the first two views: every position with its most similar one."""
        return _match(self._pair(batch))

    def _pair(self, batch: ViewBatch) -> _Pair:
        maps = self.encoder(batch.views[0])
        tokens = tokens_of(maps[-1])
        with torch.no_grad():
            key_maps = self.key_encoder(batch.views[1])
            valid = valid_tokens(batch, 0, maps[-1]), valid_tokens(batch, 1, key_maps[-1])
            key_tokens = tokens_of(key_maps[-1])
            cost = cosine_cost(tokens.detach(), key_tokens)
            partner = cost.masked_fill(~valid[1].unsqueeze(1), float("inf")).argmin(-1)
        return _Pair(maps, pool(key_maps), (tokens, key_tokens), valid, cost, partner)

    def after_step(self, progress: float) -> None:
        for slow, fast in (
            (self.key_encoder, self.encoder), (self.key_head, self.head), (self.key_dense_head, self.dense_head),
        ):  # fmt: skip
            follow(slow, fast, self.settings.momentum)
        self.queue.advance()
        self.dense_queue.advance()


def _match(pair: _Pair) -> Match:
    masses = [valid.to(pair.cost.dtype) / valid.sum(-1, keepdim=True) for valid in pair.valid]
    return Match(pair.cost, masses[0], masses[1], one_way_plan(pair.partner, masses[0], pair.cost.shape[-1]), None)
