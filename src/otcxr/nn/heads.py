"""Small networks on top of an encoder; they are thrown away after pre-training."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ProjectionHead", "TokenProjector"]


class ProjectionHead(nn.Sequential):
    """Project pooled features (B, C) to an embedding (B, outputs): Linear-BN-ReLU-Linear[-BN].

    Args:
        inputs, hidden, outputs: Widths.
        final_norm: End with BatchNorm, as SimCLR's reference code does; VICReg must not, its variance is its loss.
    Source: Chen et al., ICML 2020 (SimCLR), arXiv:2002.05709; Bardes et al., ICLR 2022 (VICReg), arXiv:2105.04906.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, final_norm: bool) -> None:
        layers = [
            nn.Linear(inputs, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs, bias=not final_norm),
        ]
        super().__init__(*layers, *([nn.BatchNorm1d(outputs)] if final_norm else []))


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
