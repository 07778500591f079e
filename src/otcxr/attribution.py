"""Heat maps of a plain network: where the evidence for a finding lies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from otcxr.errors import ConfigError, did_you_mean
from otcxr.nn.encoder import Encoder

__all__ = ["HEAT_MAPS", "ProbedEncoder", "heat_map", "to_pixels"]


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


def heat_map(model: ProbedEncoder, images: Tensor, finding: int, kind: str = "grad-cam") -> Tensor:
    """What speaks *for* a finding, and where.

        grad-cam              max(0, sum_c w_c A_c),   w_c = mean over positions of d logit / d A_c
        layer-cam             max(0, sum_c max(0, d logit / d A_c) A_c)
        integrated-gradients  max(0, x - x') times the mean gradient on the way from x' to x, blurred; x' is black
        occlusion             how much the logit falls when a square is painted with the image's mean, averaged

    A is the last map; the first two are interpolated bilinearly from where each of its cells looks. For a linear probe
    on pooled features Grad-CAM is the class activation map exactly (w_c is the probe's weight).

    Args:
        model: Encoder with probe.
        images: (B, 1, H, W) in [0, 1].
        finding: Index of the probe's finding.
        kind: One of ``HEAT_MAPS``.
    Returns: (B, H, W) >= 0, not normalised. All zero where nothing speaks for it.
    Raises: ConfigError: there is no such kind.
    Source: Selvaraju et al., ICCV 2017, arXiv:1610.02391 (Zhou et al., CVPR 2016, for the linear case); Jiang et al.,
        IEEE TIP 30, 2021 (Layer-CAM); Sundararajan et al., ICML 2017, arXiv:1703.01365; Zeiler and Fergus, ECCV 2014.
    """
    if kind not in HEAT_MAPS:
        raise ConfigError(f"unknown heat map '{kind}'{did_you_mean(kind, HEAT_MAPS)}")
    return HEAT_MAPS[kind](model, images, finding)


def _grad_cam(model: ProbedEncoder, images: Tensor, finding: int) -> Tensor:
    from captum.attr import LayerGradCam

    coarse = LayerGradCam(model, model.last_map).attribute(images, target=finding, relu_attributions=True).detach()
    return to_pixels(coarse, images.shape[-2], images.shape[-1], model.encoder.first_centre)[:, 0]


def _layer_cam(model: ProbedEncoder, images: Tensor, finding: int) -> Tensor:
    from captum.attr import LayerActivation

    values = LayerActivation(model, model.last_map).attribute(images).detach().requires_grad_()
    logit = model.probe(values.mean((-2, -1)))[:, finding].sum()
    (slope,) = torch.autograd.grad(logit, values)
    coarse = (slope.clamp_min(0) * values.detach()).sum(1, keepdim=True).clamp_min(0)
    return to_pixels(coarse, images.shape[-2], images.shape[-1], model.encoder.first_centre)[:, 0]


def _integrated_gradients(model: ProbedEncoder, images: Tensor, finding: int) -> Tensor:
    from captum.attr import IntegratedGradients

    steps, batch = 24, max(len(images), 64)
    found = IntegratedGradients(model).attribute(images, target=finding, n_steps=steps, internal_batch_size=batch)
    # single pixels are noise to the eye and to the pointing game: a Gaussian of 1/32 of the side
    sigma = images.shape[-1] / 32
    reach = max(1, round(3 * sigma))
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / sigma) ** 2)
    line = (line / line.sum()).to(found.dtype)
    smooth = nn.functional.conv2d(found.detach().clamp_min(0).to(line.dtype), line[None, None, :, None], padding="same")
    out: Tensor = nn.functional.conv2d(smooth, line[None, None, None, :], padding="same")[:, 0]
    return out.to(images.dtype)


def _occlusion(model: ProbedEncoder, images: Tensor, finding: int) -> Tensor:
    from captum.attr import Occlusion

    side = max(2, images.shape[-1] // 8)
    with torch.no_grad():
        found = Occlusion(model).attribute(
            images, target=finding, sliding_window_shapes=(images.shape[1], side, side),
            strides=(images.shape[1], max(1, side // 2), max(1, side // 2)),
            baselines=images.mean((1, 2, 3), keepdim=True).expand_as(images),
        )  # fmt: skip
    out: Tensor = found.detach().clamp_min(0)[:, 0]
    return out.to(images.dtype)


HEAT_MAPS: dict[str, Callable[[ProbedEncoder, Tensor, int], Tensor]] = {
    "grad-cam": _grad_cam,
    "layer-cam": _layer_cam,
    "integrated-gradients": _integrated_gradients,
    "occlusion": _occlusion,
}


def to_pixels(coarse: Tensor, height: int, width: int, first: float) -> Tensor:
    """Interpolate a map (B, 1, h, w) bilinearly at every pixel: cell i lies at (i + first) / h of the image."""

    def places(pixels: int, cells: int) -> Tensor:
        cell = (torch.arange(pixels, device=coarse.device) + 0.5) / pixels * cells - first
        # in the units of grid_sample -1 and 1 are the outer edges of the first and the last cell
        return (2 * cell + 1) / cells - 1

    y, x = torch.meshgrid(places(height, coarse.shape[-2]), places(width, coarse.shape[-1]), indexing="ij")
    grid = torch.stack((x, y), dim=-1).to(coarse.dtype).expand(len(coarse), -1, -1, -1)
    return nn.functional.grid_sample(coarse, grid, mode="bilinear", padding_mode="border", align_corners=False)
