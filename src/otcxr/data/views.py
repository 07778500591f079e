"""Random views of a radiograph with exact geometry.

A view is a crop with a small rotation, resampled with antialiasing, then changed in intensity the way exposure,
windowing and detectors differ. No hue (there is none), no vertical flip, no large rotation; the horizontal flip is off
because it turns the heart to the other side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcxr.data.geometry import ViewBatch
from otcxr.data.records import Radiograph, full_valid
from otcxr.errors import ConfigError

__all__ = ["MIN_VALID", "ViewBatch", "ViewsConfig", "collate_views", "make_views", "view_generator"]

MIN_VALID = 0.25  # share of a view that must be valid; else the crop is drawn again
_TRIES = 10


@dataclass(frozen=True)
class ViewsConfig:
    """How views are drawn. Ranges are (low, high), drawn uniformly unless stated.

    Attributes:
        size: Side of a view in pixels.
        scale: Area of the crop as a share of the image.
        aspect: Width over height of the crop in image pixels; log-uniform. A side that would be longer than the image's
            is cut to it, so a large crop of an elongated image has a smaller area and an aspect nearer to the image's.
        rotation: Largest rotation in degrees, either way.
        flip: Probability of a horizontal flip. 0: laterality is information in a chest radiograph.
        gamma: Exponent of the intensity; log-uniform. 1 changes nothing.
        contrast: Factor on the distance from the mean of the view.
        brightness: Largest shift of the intensity, either way.
        blur: Probability of a Gaussian blur.
        blur_sigma: Its standard deviation in pixels of the view.
        noise: Largest standard deviation of Gaussian noise; drawn from 0 to this.
        clean: Also return the views before intensity changes.
    """

    size: int = 224
    scale: tuple[float, float] = (0.3, 1.0)
    aspect: tuple[float, float] = (0.8, 1.25)
    rotation: float = 10.0
    flip: float = 0.0
    gamma: tuple[float, float] = (0.7, 1.4)
    contrast: tuple[float, float] = (0.7, 1.3)
    brightness: float = 0.1
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 1.0)
    noise: float = 0.03
    clean: bool = False

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ConfigError(f"views.size must be at least 16 pixels, received {self.size}")
        ranges = {"scale": (0.0, 1.0), "aspect": (0.0, math.inf), "gamma": (0.0, math.inf), "contrast": (0.0, math.inf),
                  "blur_sigma": (0.0, math.inf)}  # fmt: skip
        for name, (least, most) in ranges.items():
            low, high = getattr(self, name)
            if not least < low <= high <= most:
                raise ConfigError(f"views.{name} must be (low, high) with {least} < low <= high <= {most}, "
                                  f"received ({low}, {high})")  # fmt: skip
        for name in ("flip", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"views.{name} is a probability, received {getattr(self, name)}")
        if not 0 <= self.rotation <= 45 or self.noise < 0 or self.brightness < 0:
            raise ConfigError("views.rotation must be in [0, 45] degrees; views.noise and views.brightness >= 0; "
                              f"received {self.rotation}, {self.noise}, {self.brightness}")  # fmt: skip


def view_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random stream of one image in one epoch: a function of (seed, epoch, index) and of nothing else."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, index)))


def make_views(
    radiograph: Radiograph | Tensor, config: ViewsConfig, generator: np.random.Generator, count: int = 2
) -> ViewBatch:
    """Draw views of one radiograph.

    Args:
        radiograph: Pixels and validity, or an image (1, H, W) as ``load_image`` gives it, valid everywhere.
        config: The distribution of views.
        generator: Source of all randomness.
        count: How many views.
    Returns: A ViewBatch with B = 1. ``geometry`` maps view to image exactly; a pixel is valid when its centre lies
        inside the image and everything it averages over is valid. Invalid pixels are 0.
    """
    if isinstance(radiograph, Tensor):
        radiograph = Radiograph(radiograph, full_valid(radiograph), None)
    image = radiograph.image[0].numpy()
    valid = None if bool(radiograph.valid.all()) else radiograph.valid[0].numpy()
    views, cleans, valids, maps = [], [], [], []
    for _ in range(count):
        clean, inside, affine = _draw(image, valid, config, generator)
        view = np.where(inside, _change_intensity(clean, inside, config, generator), np.float32(0))
        views.append(torch.from_numpy(view)[None, None])
        valids.append(torch.from_numpy(inside)[None, None])
        maps.append(torch.from_numpy(affine.astype(np.float32))[None])
        if config.clean:
            cleans.append(torch.from_numpy(clean)[None, None])
    return ViewBatch(tuple(views), torch.stack(maps), tuple(valids), tuple(cleans) if config.clean else None)


def collate_views(samples: Sequence[ViewBatch]) -> ViewBatch:
    """Join samples along the batch dimension."""
    count = len(samples[0].views)
    clean = None
    if samples[0].clean is not None:
        clean = tuple(torch.cat([s.clean[v] for s in samples if s.clean is not None]) for v in range(count))
    return ViewBatch(
        tuple(torch.cat([s.views[v] for s in samples]) for v in range(count)),
        torch.cat([s.geometry for s in samples], dim=1),
        tuple(torch.cat([s.valid[v] for s in samples]) for v in range(count)),
        clean,
    )


def _draw(
    image: NDArray[np.float32], valid: NDArray[np.bool_] | None, config: ViewsConfig, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float64]]:
    """Draw crops until enough of one is valid; a radiograph with a tiny valid region is shown whole at last."""
    for _ in range(_TRIES):
        affine = _draw_affine(image.shape, config, generator)
        clean, inside = resample(image, valid, affine, config.size)
        if inside.mean() >= MIN_VALID:
            return clean, inside, affine
    affine = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    return *resample(image, valid, affine, config.size), affine


def _draw_affine(shape: tuple[int, ...], config: ViewsConfig, generator: np.random.Generator) -> NDArray[np.float64]:
    """Affine map from view to image: crop of random area, aspect and place, rotated about its centre, maybe flipped."""
    height, width = shape
    area = generator.uniform(*config.scale) * height * width
    aspect = math.exp(generator.uniform(math.log(config.aspect[0]), math.log(config.aspect[1])))
    crop_w, crop_h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    centre_x = generator.uniform(crop_w / 2, width - crop_w / 2) if crop_w < width else width / 2
    centre_y = generator.uniform(crop_h / 2, height - crop_h / 2) if crop_h < height else height / 2
    angle = math.radians(generator.uniform(-config.rotation, config.rotation))
    if generator.random() < config.flip:
        crop_w = -crop_w
    cos, sin = math.cos(angle), math.sin(angle)
    linear = np.array([[cos * crop_w, -sin * crop_h], [sin * crop_w, cos * crop_h]])
    shift = np.array([centre_x, centre_y]) - linear @ np.array([0.5, 0.5])
    affine: NDArray[np.float64] = np.column_stack((linear, shift)) / np.array([[width], [height]])
    return affine


def resample(
    image: NDArray[np.float32], valid: NDArray[np.bool_] | None, affine: NDArray[np.float64], size: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Sample an image (H, W) on a view (size, size) through ``affine`` (2, 3), with antialiasing.

    A reduction by s is sampled ceil(s) times finer in both directions and averaged, so no structure between the
    pixels of the view is lost or folded.
    """
    height, width = image.shape
    columns = np.hypot(affine[0, :2] * width, affine[1, :2] * height) / size  # image pixels per pixel of the view
    factor = max(1, math.ceil(float(columns.max()) - 1e-6))
    fine = factor * size
    # pixel i has its centre at i + 0.5: fine pixel -> [0, 1] of the view -> [0, 1] of the image -> image pixel
    to_view = np.array([[1 / fine, 0, 0.5 / fine], [0, 1 / fine, 0.5 / fine], [0, 0, 1]])
    matrix = np.array([[width], [height]]) * (affine @ to_view)
    matrix[:, 2] -= 0.5
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    sampled = cv2.warpAffine(image, matrix, (fine, fine), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    if factor > 1:
        sampled = cv2.resize(sampled, (size, size), interpolation=cv2.INTER_AREA)
    centres = (np.arange(size) + 0.5) / size
    position_x = affine[0, 0] * centres[None, :] + affine[0, 1] * centres[:, None] + affine[0, 2]
    position_y = affine[1, 0] * centres[None, :] + affine[1, 1] * centres[:, None] + affine[1, 2]
    inside = (position_x >= 0) & (position_x <= 1) & (position_y >= 0) & (position_y <= 1)
    if valid is not None:
        share = cv2.warpAffine(
            valid.astype(np.float32), matrix, (fine, fine), flags=flags, borderMode=cv2.BORDER_REPLICATE
        )
        if factor > 1:
            share = cv2.resize(share, (size, size), interpolation=cv2.INTER_AREA)
        inside &= share > 0.999
    return np.where(inside, sampled, np.float32(0)), inside


def _change_intensity(
    view: NDArray[np.float32], inside: NDArray[np.bool_], config: ViewsConfig, generator: np.random.Generator
) -> NDArray[np.float32]:
    gamma = math.exp(generator.uniform(math.log(config.gamma[0]), math.log(config.gamma[1])))
    contrast = generator.uniform(*config.contrast)
    shift = generator.uniform(-config.brightness, config.brightness)
    blurred, sigma = generator.random() < config.blur, generator.uniform(*config.blur_sigma)
    noise = generator.uniform(0, config.noise) if config.noise > 0 else 0.0
    out = np.power(view, np.float32(gamma))
    mean = np.float32(out[inside].mean() if inside.any() else 0.5)
    out = (out - mean) * np.float32(contrast) + mean + np.float32(shift)
    out = np.where(inside, out, mean + np.float32(shift))  # so that a blur draws no dark edge along invalid pixels
    if blurred:
        out = cv2.GaussianBlur(out, (0, 0), sigma)
    if noise > 0:
        out = out + np.float32(noise) * generator.standard_normal(out.shape, dtype=np.float32)
    return np.clip(out, 0.0, 1.0)
