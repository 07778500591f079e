"""Heat maps of a plain network: where the evidence for a finding lies."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from otcxr.nn.encoder import Encoder

__all__ = ["ProbedEncoder", "heat_map"]


class ProbedEncoder(nn.Module):
    """An encoder with a linear probe on its pooled last map: images (B, C, H, W) -> logits (B, F).

    Args:
        encoder: The encoder.
        weights: (F, C) of the probe.
        bias: (F,) of the probe.
    """

    def __init__(self, encoder: Encoder, weights: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
        super().__init__()
        self.encoder = encoder
        self.last_map = nn.Identity()  # a place for attribution methods to hook
        self.probe = nn.Linear(weights.shape[1], weights.shape[0])
        with torch.no_grad():
            self.probe.weight.copy_(torch.from_numpy(weights))
            self.probe.bias.copy_(torch.from_numpy(bias))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.probe(self.last_map(self.encoder(images)[-1]).mean((-2, -1)))
        return out


def heat_map(model: ProbedEncoder, images: Tensor, finding: int) -> Tensor:
    """Grad-CAM on the last map: what speaks *for* a finding, and where.

        H = max(0, sum_c w_c A_c),   w_c = mean over positions of d logit / d A_c

    For a linear probe on pooled features this is the class activation map exactly (w_c is the probe's weight).

    Args:
        model: Encoder with probe.
        images: (B, 1, H, W) in [0, 1].
        finding: Index of the probe's finding.
    Returns: (B, H, W) >= 0, interpolated bilinearly from where each cell of the map looks, not normalised. All zero
        where nothing speaks for it.
    Source: Selvaraju et al., ICCV 2017, arXiv:1610.02391; Zhou et al., CVPR 2016 for the linear case.
    """
    from captum.attr import LayerGradCam

    coarse = LayerGradCam(model, model.last_map).attribute(images, target=finding, relu_attributions=True).detach()
    return _to_pixels(coarse, images.shape[-2], images.shape[-1], model.encoder.first_centre)[:, 0]


def _to_pixels(coarse: Tensor, height: int, width: int, first: float) -> Tensor:
    """Interpolate a map (B, 1, h, w) bilinearly at every pixel: cell i lies at (i + first) / h of the image."""

    def places(pixels: int, cells: int) -> Tensor:
        cell = (torch.arange(pixels, device=coarse.device) + 0.5) / pixels * cells - first
        # in the units of grid_sample -1 and 1 are the outer edges of the first and the last cell
        return (2 * cell + 1) / cells - 1

    y, x = torch.meshgrid(places(height, coarse.shape[-2]), places(width, coarse.shape[-1]), indexing="ij")
    grid = torch.stack((x, y), dim=-1).to(coarse.dtype).expand(len(coarse), -1, -1, -1)
    return nn.functional.grid_sample(coarse, grid, mode="bilinear", padding_mode="border", align_corners=False)
