"""DINO: a student agrees, over all views, with what a slow teacher says of the global views.

    s = W n(mlp(mean of the last map)) / t_student,   n(x) = x / |x|,  rows of W of length 1: scores of K prototypes
    p = softmax((W' n(mlp'(.)) - c) / t_teacher)      by the teacher, on the two global views, no gradient
    L = mean over pairs (global view u, any view v != u) of -sum_k p_uk ln softmax(s_v)_k

ln K where the student says nothing. After the step the teacher (a momentum copy of encoder and head) follows, with m
rising from its setting to 1 along half a cosine, and the centre c <- 0.9 c + 0.1 (mean of the teacher's scores over the
images of all processes): the centre forbids that one prototype wins, the low temperature that all are equal.

The *teacher's* encoder is handed out and judged, as in the source. During the first share ``frozen`` of the training
the prototypes stay as they are. Their length is fixed at 1, so W is weight-normed without its factors.

Source: Caron et al., ICCV 2021, arXiv:2104.14294, algorithm 1 and section 3.1. What differs: m starts at 0.99 instead
of 0.996 and K = 1024 instead of 65536, as short trainings and small data need; the teacher's temperature is constant,
as for the source's ResNet-50, and 0.02 instead of 0.04, with which small batches end in equal scores for all; the
prototypes rest for a share of the training instead of one epoch; the gradient is clipped as a whole, not for each
tensor; all views come from one distribution, radiograph views, local ones of 5 to 30 % of the image (source: 5 to
14 %); AdamW unless set. The published numbers: ``configs/published/dino.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from otcxr.data.geometry import ViewBatch
from otcxr.distributed import all_sum, processes
from otcxr.losses import distillation
from otcxr.methods.base import (
    Observed,
    SSLMethod,
    StepOutput,
    check_at_least,
    check_momentum,
    check_positive,
    check_share,
    encode_views,
    tokens_of,
)
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.momentum import follow, momentum_copy, rising_momentum

__all__ = ["DINO", "DINOSettings"]


@dataclass(frozen=True)
class DINOSettings:
    """Settings of DINO.

    Attributes:
        hidden: Width of the head's two hidden layers.
        bottleneck: Dimensions that are compared with the prototypes.
        prototypes: K.
        student_temperature: Of the student's scores.
        teacher_temperature: Of the teacher's; lower is sharper. Lower it where all features become alike.
        momentum: m of the teacher at the start; it rises to 1.
        centre_momentum: Share of the centre that stays at every step.
        frozen: Share of the training in which the prototypes do not move.
    """

    hidden: int = 512
    bottleneck: int = 128
    prototypes: int = 1024
    student_temperature: float = 0.1
    teacher_temperature: float = 0.02
    momentum: float = 0.99
    centre_momentum: float = 0.9
    frozen: float = 0.05

    def __post_init__(self) -> None:
        check_at_least(1, hidden=self.hidden, bottleneck=self.bottleneck)
        check_at_least(2, prototypes=self.prototypes)
        check_momentum(self.momentum)
        check_positive(student_temperature=self.student_temperature, teacher_temperature=self.teacher_temperature)
        check_share(centre_momentum=self.centre_momentum, frozen=self.frozen)


class PrototypeHead(nn.Module):
    """Scores of features (B, C) against K prototypes, cosines in [-1, 1]: (B, K)."""

    def __init__(self, inputs: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, features: Tensor, frozen: bool = False) -> Tensor:
        x = self.layers(features)
        with torch.autocast(x.device.type, enabled=False):
            x, w = (y.to(torch.promote_types(y.dtype, torch.float32)) for y in (x, self.prototypes))
            if frozen:  # a gradient of zeros, since every parameter owes one
                w = w.detach() + 0 * w
            return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(w, dim=-1).T


class DINO(SSLMethod):
    """See the module's text."""

    centre: Tensor
    progress: Tensor

    def __init__(self, encoder: Encoder, settings: DINOSettings) -> None:
        super().__init__(encoder, settings)
        self.head = PrototypeHead(encoder.channels[-1], settings.hidden, settings.bottleneck, settings.prototypes)
        self.teacher, self.teacher_head = momentum_copy(encoder), momentum_copy(self.head)
        self.register_buffer("centre", torch.zeros(settings.prototypes))
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        self._said: list[Tensor] = []  # mean scores of the teacher in this step, for each accumulated part

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        s = self.settings
        maps = encode_views(self.encoder, batch.views)
        pooled = [pool(m) for m in maps]
        frozen = float(self.progress) < s.frozen
        students = (self.head(torch.cat(pooled), frozen) / s.student_temperature).chunk(len(pooled))
        with torch.no_grad():
            slow = torch.cat([pool(m) for m in encode_views(self.teacher, batch.views[:2])])
            scores = self.teacher_head(slow)
            if self.training:
                self._said.append(all_sum(scores.mean(0)) / processes())
            teachers = ((scores - self.centre) / s.teacher_temperature).softmax(-1).chunk(2)
        pairs = [(u, v) for u in range(2) for v in range(len(students)) if v != u]
        loss = torch.stack([distillation(students[v], teachers[u]) for u, v in pairs]).mean()
        uncertain = torch.stack([distillation(p.log(), p) for p in (p.clamp_min(1e-30) for p in teachers)]).mean()
        terms = {
            "distillation": loss.detach().clone(), "distillation_chance": loss.new_tensor(s.prototypes).log(),
            "teacher_entropy": uncertain,
        }  # fmt: skip
        observed = None
        if observe:
            observed = Observed(torch.cat(pooled[:2]).detach(), tokens_of(maps[0][-1]).detach(), None)
        return StepOutput(loss, terms, observed)

    def kept(self) -> Encoder:
        """Return the teacher's encoder."""
        return self.teacher

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = rising_momentum(self.settings.momentum, progress)
        follow(self.teacher, self.encoder, momentum)
        follow(self.teacher_head, self.head, momentum)
        if self._said:
            mean = torch.stack(self._said).mean(0).to(self.centre.dtype)
            self._said.clear()
            self.centre.lerp_(mean, 1 - self.settings.centre_momentum)
        self.progress.fill_(progress)
