"""Decoders: from the maps of an encoder back to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from otcxr.errors import ConfigError

__all__ = ["Decoder", "UNet", "UpBlock"]


class UpBlock(nn.Module):
    """Enlarge a map by the nearest position, then twice 3x3 convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, factor: int) -> None:
        super().__init__()
        self.enlarge = nn.Upsample(scale_factor=factor, mode="nearest") if factor > 1 else nn.Identity()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(self.enlarge(x))
        return out


class UNet(nn.Module):
    """A decoder with skips: all maps of an encoder to one map of the resolution of the image.

    From the coarsest map on: enlarge by the nearest position to the size of the next finer map, join it, twice 3x3
    convolution, BatchNorm, ReLU; at last to the size of the image without a skip.

    Args:
        channels: Of the encoder's maps, fine to coarse.
        outputs: Channels of the result.
        width: Channels of the last block; each coarser one has twice as many.
    Source: Ronneberger et al., MICCAI 2015, arXiv:1505.04597 (there with an encoder of its own and no padding).
    """

    def __init__(self, channels: Sequence[int], outputs: int, width: int) -> None:
        super().__init__()
        finer = [*reversed(channels[:-1]), 0]
        wide = [width * 2**k for k in reversed(range(len(finer)))]
        self.blocks = nn.ModuleList(
            UpBlock(before + skip, after, 1)
            for before, skip, after in zip((channels[-1], *wide), finer, wide, strict=False)
        )
        self.last = nn.Conv2d(width, outputs, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Decode maps (B, channels[i], h_i, w_i), fine to coarse, to (B, outputs, *size)."""
        x = maps[-1]
        for skip, block in zip((*reversed(maps[:-1]), None), self.blocks, strict=True):
            x = nn.functional.interpolate(x, size if skip is None else skip.shape[-2:], mode="nearest")
            x = block(x if skip is None else torch.cat((x, skip), 1))
        out: Tensor = self.last(x)
        return out


class Decoder(nn.Module):
    """Five blocks from a last map (B, C, h, w) to the resolution of the image, without skips.

    Block s gives (B, channels[s], ...), channels (16, 8, 4, 2, 1) times ``width``. Each block doubles the resolution;
    where the encoder's stride is below 32 the first ones do not.

    Args:
        inputs: C.
        stride: Pixels per position of the last map: 2, 4, 8, 16 or 32.
        width: Channels of the last block.
    Raises: ConfigError: another stride.
    """

    def __init__(self, inputs: int, stride: int, width: int) -> None:
        super().__init__()
        doublings = stride.bit_length() - 1
        if stride != 2**doublings or not 1 <= doublings <= 5:
            raise ConfigError(f"the decoder needs an encoder of stride 2, 4, 8, 16 or 32, received {stride}")
        self.channels = tuple(width * 2 ** (4 - s) for s in range(5))
        self.blocks = nn.ModuleList(
            UpBlock(before, after, 2 if s >= 5 - doublings else 1)
            for s, (before, after) in enumerate(zip((inputs, *self.channels), self.channels, strict=False))
        )

    def forward(self, last: Sequence[Tensor], depth: Sequence[int]) -> list[list[Tensor]]:
        """Decode the last maps of several views, each as deep as it is needed.

        Args:
            last: (B, C, h_v, w_v) of each view; those of one size go through a block together.
            depth: The last block of each view, 0 to 4.
        Returns: For each view its maps after the blocks 0 to ``depth``, coarse to fine.
        """
        out: list[list[Tensor]] = [[] for _ in last]
        for s, block in enumerate(self.blocks):
            before = {v: out[v][-1] if s else last[v] for v, deepest in enumerate(depth) if s <= deepest}
            for size in dict.fromkeys(x.shape[-2:] for x in before.values()):
                members = [v for v, x in before.items() if x.shape[-2:] == size]
                parts = block(torch.cat([before[v] for v in members])).chunk(len(members))
                for v, part in zip(members, parts, strict=True):
                    out[v].append(part)
        return out
