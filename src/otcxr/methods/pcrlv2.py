"""PCRLv2: restore what was changed in a radiograph, and agree with its other views, at a random scale of a decoder.

    x_s, s = 0 .. 4                  maps of a decoder without skips on the encoder's last map   (nn.unet.Decoder)
    z_s = BN(mean of x_s),           p_s = predictor_s(z_s)
    D_s(a, b) = -[cos(p_s(a), sg z_s(b)) + cos(p_s(b), sg z_s(a))] / 2      in [-1, 1], about 0 by chance

    L = |R(v_1) - clean_1|^2 + b |R_s(v_1) - clean_1|^2 + D_s(v_1, v_2)
        + mean over g in {1, 2} and local views l of D_{s(g, l)}(v_g, l)

R restores the first view from the last map, R_s from the map at scale s (enlarged to the view); squares are means over
pixels, and the clean view is standardised as the encoder's input is. s is drawn anew in every step, one for both
restoration and global pair, and s(g, l) independently for every global view g and local view l. b falls from 1 to 0
along half a cosine while the training goes on. All pixels count: what was cut out is to be restored too.

Scales come from (a number drawn with the initial weights, the number of the step): all processes and accumulated parts
of a step share them, and a resume goes on with them.

Source: Zhou et al., IEEE TPAMI 2023, arXiv:2301.00772, its path for two-dimensional images. What differs: a random
start for every method instead of ImageNet's weights; one channel; one rectangle cut out instead of three squares, and
in local views too; a decoder as narrow as the encoder (the published one where the encoder has the published width);
radiograph views; AdamW unless set. The published numbers: ``configs/published/pcrlv2.yaml``. The comparison of
sub-crops exists in the source's three-dimensional path only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from otcxr.data.geometry import ViewBatch
from otcxr.errors import DataError
from otcxr.losses import negative_cosine, squared_difference
from otcxr.methods.base import Observed, SSLMethod, StepOutput, check_at_least, encode_views, tokens_of
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead
from otcxr.nn.unet import Decoder

__all__ = ["PCRLv2", "PCRLv2Settings", "Scales"]

_SCALES = 5


@dataclass(frozen=True)
class PCRLv2Settings:
    """Settings of PCRLv2.

    Attributes:
        decoder_width: Channels of the decoder's last map, 16 times as many at its first; 0 takes a quarter of the
            encoder's first map, which is the published 16 for an encoder of the published width.
    """

    decoder_width: int = 0

    def __post_init__(self) -> None:
        check_at_least(0, decoder_width=self.decoder_width)


class Scales(NamedTuple):
    """The scales of one step: of the restoration and the global pair, and of every (global, local) pair [g][l]."""

    whole: int
    local: tuple[tuple[int, ...], tuple[int, ...]]


class _Scale(nn.Module):
    """What belongs to one scale of the decoder: norm, predictor, restoration."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.predictor = ProjectionHead(channels, 2 * channels, channels, final_norm=False)
        self.restore = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, 1, 1),
        )  # fmt: skip


class PCRLv2(SSLMethod):
    """See the module's text."""

    needs_clean = True
    progress: Tensor
    step: Tensor
    key: Tensor

    def __init__(self, encoder: Encoder, settings: PCRLv2Settings) -> None:
        super().__init__(encoder, settings)
        width = settings.decoder_width or max(1, encoder.channels[0] // 4)
        self.decoder = Decoder(encoder.channels[-1], encoder.strides[-1], width)
        self.scales = nn.ModuleList(_Scale(channels) for channels in self.decoder.channels)
        self.restore = nn.Conv2d(self.decoder.channels[-1], 1, 3, padding=1)
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("key", torch.randint(2**31, ()))

    def draw_scales(self, local_views: int) -> Scales:
        """The scales of the coming step."""
        # not torch's generator: it reads 32 bits of a seed, too few for both numbers
        generator = np.random.default_rng((int(self.key), int(self.step)))
        whole, *local = generator.integers(_SCALES, size=1 + 2 * local_views).tolist()
        return Scales(whole, (tuple(local[:local_views]), tuple(local[local_views:])))

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        if batch.clean is None:
            raise DataError("pcrlv2 restores the views as they were before they were changed, and the batch has no "
                            "such views; set views.clean true")  # fmt: skip
        maps = encode_views(self.encoder, batch.views)
        local = range(2, len(maps))
        drawn = self.draw_scales(len(local))
        pairs = [(0, 1, drawn.whole)]
        pairs += [(g, v, drawn.local[g][v - 2]) for g in (0, 1) for v in local]
        depth = [max(s for a, b, s in pairs if v in (a, b)) for v in range(len(maps))]
        depth[0] = _SCALES - 1  # it is restored
        decoded = self.decoder([m[-1] for m in maps], depth)
        first = decoded[0]
        target = (batch.clean[0] - self.encoder.mean) / self.encoder.std
        whole = first[-1].shape[-2:]
        full = squared_difference(_enlarged(self.restore(first[-1]), whole, target), target)
        scale = self._scale(drawn.whole)
        coarse = squared_difference(_enlarged(scale.restore(first[drawn.whole]), whole, target), target)
        agreement = self._agreement(decoded, pairs)
        share = 0.5 * (1 + math.cos(math.pi * float(self.progress)))
        loss = full + share * coarse + agreement[0]
        terms = {"restoration": full, "restoration_scale": coarse, "agreement": agreement[0]}
        if len(local):
            terms["agreement_local"] = torch.stack(agreement[1:]).mean()
            loss = loss + terms["agreement_local"]
        # scales that were not drawn owe a gradient too: zeros
        loss = loss + 0 * torch.stack([parameter.sum() for parameter in self.scales.parameters()]).sum()
        terms |= {"agreement_chance": loss.new_tensor(0.0), "scale": loss.new_tensor(float(drawn.whole))}
        observed = None
        if observe:
            pooled = torch.cat((pool(maps[0]), pool(maps[1]))).detach()
            observed = Observed(pooled, tokens_of(maps[0][-1]).detach(), None)
        return StepOutput(loss, {name: term.detach().clone() for name, term in terms.items()}, observed)

    def _scale(self, s: int) -> _Scale:
        scale = self.scales[s]
        assert isinstance(scale, _Scale)
        return scale

    def _agreement(self, decoded: list[list[Tensor]], pairs: list[tuple[int, int, int]]) -> list[Tensor]:
        """D_s of each (view, view, s); all views that meet at one scale share its BatchNorm statistic."""
        said: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for s in sorted({s for _, _, s in pairs}):
            members = sorted({v for a, b, t in pairs if t == s for v in (a, b)})
            scale = self._scale(s)
            z = scale.norm(torch.cat([decoded[v][s].mean((-2, -1)) for v in members]))
            p = scale.predictor(z)
            for v, z_v, p_v in zip(members, z.chunk(len(members)), p.chunk(len(members)), strict=True):
                said[v, s] = z_v, p_v
        out = []
        for a, b, s in pairs:
            (z_a, p_a), (z_b, p_b) = said[a, s], said[b, s]
            out.append((negative_cosine(p_a, z_b) + negative_cosine(p_b, z_a)) / 2)
        return out

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.step.add_(1)
        self.progress.fill_(progress)


def _enlarged(restored: Tensor, whole: tuple[int, ...], target: Tensor) -> Tensor:
    """A restoration (B, 1, h, w) at the size ``whole`` of the decoder's last map, bilinear, cut to its target.

    Where the view is no multiple of the encoder's stride the last map is larger: it goes on beyond the view's right and
    lower border.
    """
    if restored.shape[-2:] != whole:
        restored = nn.functional.interpolate(restored, whole, mode="bilinear", align_corners=False)
    return restored[..., : target.shape[-2], : target.shape[-1]]
