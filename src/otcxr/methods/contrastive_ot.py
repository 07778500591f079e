"""Contrastive learning with a transport term beside it: the naive integration that OTCXR is compared with.

    h = mean of the last map,   z = head(h)    the logits, (B, d) for each view
    p = softmax(z)                             the probits
    C_ij = 1 - cos(p_i, p'_j)                  (N, N) over the images of all processes
    L = NT-Xent(z, z') + w OT(C),   OT with masses 1 / N, entropic value

w makes both terms equal in the first step of the training and stays: w = NT-Xent_0 / OT_0. There is no CV-SIM, no
variance and no covariance: transport pairs whole images, not positions, so it knows nothing of where things are.

Source: the comparison "naive integration" of Gorade, Singh, Mishra, WACV 2025, arXiv:2404.11868, which states the two
losses and what they are taken of. Ours: the cosine cost, the entropic value, the fixed weight, all numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otcxr.data.geometry import ViewBatch
from otcxr.distributed import all_sum, gather_rows, processes
from otcxr.errors import ConfigError
from otcxr.losses import nt_xent, nt_xent_chance
from otcxr.methods.base import Observed, SSLMethod, StepOutput, check_at_least, check_positive, encode_views, tokens_of
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead
from otcxr.ot import at_least_float32, cosine_cost, sinkhorn

__all__ = ["ContrastiveOT", "ContrastiveOTSettings"]


@dataclass(frozen=True)
class ContrastiveOTSettings:
    """Settings of the naive integration.

    Attributes:
        hidden: Width of the head's hidden layer.
        outputs: Dimensions of the logits.
        temperature: t of the contrastive loss.
        epsilon: Blur of the transport, in units of the cost.
        tolerance: L1 error of the marginals at which the transport is done.
        max_iterations: Limit of Sinkhorn's iterations.
    """

    hidden: int = 512
    outputs: int = 128
    temperature: float = 0.2
    epsilon: float = 0.05
    tolerance: float = 1e-3
    max_iterations: int = 200

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.outputs < 2:
            raise ConfigError(
                "method.hidden must be at least 1 and method.outputs at least 2 (the probits of one logit are all 1), "
                f"received {self.hidden}, {self.outputs}"
            )
        check_positive(temperature=self.temperature, epsilon=self.epsilon, tolerance=self.tolerance)
        check_at_least(1, max_iterations=self.max_iterations)


class ContrastiveOT(SSLMethod):
    """See the module's text. ``weight`` is 0 until the first step of the training has fixed it."""

    weight: Tensor

    def __init__(self, encoder: Encoder, settings: ContrastiveOTSettings) -> None:
        super().__init__(encoder, settings)
        self.head = ProjectionHead(encoder.channels[-1], settings.hidden, settings.outputs, final_norm=True)
        self.register_buffer("weight", torch.zeros(()))  # in the checkpoint: a resume goes on with it

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        s = self.settings
        maps = encode_views(self.encoder, batch.views[:2])
        pooled = torch.cat([pool(m) for m in maps])
        first, second = self.head(pooled).chunk(2)
        contrastive = nt_xent(first, second, s.temperature)
        transport, unmatched = self._transport(first, second)
        fixed = self._fixed_weight(contrastive, transport)
        loss = contrastive + fixed * transport
        chance = loss.new_tensor(nt_xent_chance(len(first) * processes()))
        terms = {
            "contrastive": contrastive, "contrastive_chance": chance, "transport": transport,
            "transport_chance": unmatched, "weight": fixed,
        }  # fmt: skip
        observed = Observed(pooled.detach(), tokens_of(maps[0][-1]).detach(), None) if observe else None
        return StepOutput(loss, {name: term.detach().clone() for name, term in terms.items()}, observed)

    def _transport(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Entropic value of the transport between the probits of all images, and what it costs to match nothing."""
        with torch.autocast(first.device.type, enabled=False):
            rows = [gather_rows(at_least_float32(z).softmax(-1)) for z in (first, second)]
            # a common offset of all probits (they are positive) would make every cosine nearly 1: it is not taken out,
            # as this is the naive form
            cost = cosine_cost(*(row.unsqueeze(0) for row in rows))
            mass = cost.new_full((1, cost.shape[-1]), 1 / cost.shape[-1])
            value: Tensor = sinkhorn(
                cost, mass, mass, epsilon=self.settings.epsilon, tolerance=self.settings.tolerance,
                max_iterations=self.settings.max_iterations,
            ).value  # fmt: skip
            return value.squeeze(0), cost.mean()

    @torch.no_grad()
    def _fixed_weight(self, contrastive: Tensor, transport: Tensor) -> Tensor:
        if self.training and self.weight == 0:
            mean = all_sum(contrastive.detach()) / processes()  # every process sees the rows of its own images
            self.weight.copy_(mean / transport.detach().clamp_min(1e-6))
        return self.weight.to(transport.dtype)
