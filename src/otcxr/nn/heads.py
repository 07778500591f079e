"""Small networks on top of an encoder; they are thrown away after pre-training."""

from __future__ import annotations

import itertools
from typing import Literal

from torch import Tensor, nn

__all__ = ["ProjectionHead", "TokenProjector"]


class ProjectionHead(nn.Sequential):
    """Project features (B, C), or tokens one by one (B, n, C) without ``norm``, to (..., outputs).

        depth = 2, norm:  Linear-BN-ReLU-Linear[-BN];   every further step of depth adds Linear-BN-ReLU in front

    Args:
        inputs, hidden, outputs: Widths.
        final_norm: End with BatchNorm: True as SimCLR's reference code does, "fixed" without scale and shift, as
            SimSiam's. VICReg must not have one, its variance is its loss.
        norm: BatchNorm after the inner linear maps; MoCo and DenseCL have none.
        bias: Give the last linear map a bias; by default it has one unless a BatchNorm follows.
        depth: Number of linear maps, at least 2.
    Source: Chen et al., ICML 2020 (SimCLR), arXiv:2002.05709; Bardes et al., ICLR 2022 (VICReg), arXiv:2105.04906;
        Chen et al., 2020 (MoCo v2), arXiv:2003.04297; Chen and He, CVPR 2021 (SimSiam), arXiv:2011.10566.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        final_norm: bool | Literal["fixed"],
        norm: bool = True,
        bias: bool | None = None,
        depth: int = 2,
    ) -> None:
        widths = [inputs, *[hidden] * (depth - 1)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers.append(nn.Linear(before, after, bias=not norm))
            layers += [nn.BatchNorm1d(after), nn.ReLU()] if norm else [nn.ReLU()]
        layers.append(nn.Linear(widths[-1], outputs, bias=not final_norm if bias is None else bias))
        if final_norm:
            layers.append(nn.BatchNorm1d(outputs, affine=final_norm != "fixed"))
        super().__init__(*layers)


class TokenProjector(nn.Module):
    """Project every token on its own: (B, n, C) -> (B, n, outputs), Linear-LN-ReLU-Linear.

    LayerNorm instead of BatchNorm: a token's projection then depends on no other token, so padding in one image
    changes nothing elsewhere, and a batch gives what its images give one by one.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.layers(tokens)
        return out
