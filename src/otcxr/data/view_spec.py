"""What a view is: its settings with their guard rails, the numbers that are drawn for it, and the rules of resampling.

Two executors carry out the same numbers: ``views_host`` (one image, OpenCV) and ``views_device`` (a batch, torch).

**Geometry.** A view of S x S pixels and an affine map A (view -> image, both in [0, 1], x right, y down): the centre
of pixel (i, j) is p = ((i + 1/2) / S, (j + 1/2) / S) and shows A p. Along each axis of the image, neighbours in
the view lie s image pixels apart (s: the length of that row of A, in pixels). Before it is looked at, the image is

    1. halved floor(log2 s) times by means of 2 pixels, on a grid that starts at the image's first pixel
    2. filtered with (w, 1 - 2 w, w), w = 0.35 (1 - 1 / r), for the rest r = s / 2^halvings in [1, 2); below 0.02 w is 0
    3. interpolated bilinearly between the centres of its pixels; beyond its border it goes on as its border pixels

along each axis, so nothing finer than the view's pixels is folded into it. A pixel is *valid* when A p lies in
[0, 1] x [0, 1] and at least 99.9 % of the weights of step 3 fall on valid pixels, where a halving or a filter that
touches a pixel that is not valid gives one that is not.

**Intensity**, with x in [0, 1] and m the mean over the valid pixels of what stands before the contrast:

    window      x <- clip((x - low) / (high - low), 0, 1)
    gamma       x <- x ^ gamma
    contrast    x <- m + contrast (x - m)
    brightness  x <- x + brightness, then toe and shoulder (below)
    blur        Gaussian of standard deviation sigma, cut at ceil(3 sigma); pixels that are not valid count as
                m + brightness
    noise       x <- clip(x + sigma n, 0, 1), n a standard normal field (``noise_field``)
    cut-out     a rectangle becomes m + brightness; its pixels are not valid

Toe and shoulder: where black (or white) has left [0, 1], the part of the scale beyond a knee is pressed together, as
film does, instead of being cut off: with l the value of black, x <- k (x - l) / (k - l) for x < k if l < 0, and the
mirror image at the white end, k = 0.25. So contrast and brightness never make two grey levels equal.

What is cut out is *not valid*: it has been erased, so it may be neither matched nor carry mass. Pixels outside the
image are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from otcxr.data.records import Radiograph
from otcxr.errors import ConfigError

__all__ = [
    "FULLY",
    "KNEE",
    "MIN_VALID",
    "NOISE_PERIOD",
    "DrawnView",
    "GreyImage",
    "Resampling",
    "ViewsConfig",
    "blur_kernel",
    "draw_views",
    "grey_image",
    "noise_field",
    "noise_table",
    "resampling",
    "view_generator",
    "view_scale",
    "wholly_inside",
]

MIN_VALID = 0.25  # share of a view that must be valid; else the crop is drawn again
FULLY = 0.999  # share of the weight that must fall on valid pixels
KNEE = 0.25  # where toe and shoulder begin, from black and from white
NOISE_PERIOD = 2**20  # numbers in the table of noise
_TRIES = 10
_GRID = 24  # points a side at which a drawn crop is tried for validity


class _Limit(NamedTuple):
    """What a range must keep to, and why."""

    least: float
    most: float
    why: str


# Guard rails: beyond them a nodule of 10 mm may vanish in a view of 224 pixels, or anatomy is no longer what it was.
# tests/test_views.py plants nodules and measures them at these limits.
_LIMITS = {
    "scale": _Limit(0.08, 1.0, "a smaller crop shows no anatomy that tells where it lies"),
    "local_scale": _Limit(0.05, 1.0, "a smaller crop shows no anatomy that tells where it lies"),
    "aspect": _Limit(0.5, 2.0, "beyond it a heart looks enlarged or a chest hyperinflated"),
    "gamma": _Limit(0.5, 2.0, "beyond it nodules drown in dark or in bright regions"),
    "contrast": _Limit(0.5, 1.5, "below it nodules sink into the noise, above it regions lose their grey levels"),
    "blur_sigma": _Limit(0.0, 1.5, "more blur erases nodules of few pixels"),
    "cutout_area": _Limit(0.0, 0.25, "a larger hole hides a nodule and all that surrounds it"),
}
_LARGEST = {
    "rotation": _Limit(0.0, 30.0, "no patient is imaged further turned, and gravity gives fluid its level"),
    "brightness": _Limit(0.0, 0.2, "a larger shift leaves too few grey levels for the lungs"),
    "window_clip": _Limit(0.0, 0.1, "what lies beyond the window is gone, and dark lungs lie near its end"),
    "noise": _Limit(0.0, 0.05, "more noise drowns nodules"),
}


@dataclass(frozen=True)
class ViewsConfig:
    """How views are drawn. Ranges are (low, high), drawn uniformly unless stated. No hue, no vertical flip.

    Attributes:
        size: Side of a view in pixels.
        scale: Area of the crop as a share of the image, at least 0.08 to show where it lies.
        aspect: Width over height of the crop in image pixels, in [0.5, 2] lest hearts look enlarged; log-uniform. A
            side that would be longer than the image's is cut to it, so a large crop of an elongated image has a smaller
            area and an aspect nearer to the image's.
        rotation: Largest rotation in degrees, either way; at most 30: gravity gives fluid its level.
        flip: Probability of a horizontal flip. 0: laterality is information in a chest radiograph.
        window: Probability that the grey window is tightened.
        window_clip: Largest share of the grey range that it cuts off at either end, at most 0.1; drawn from 0 to this.
        gamma: Exponent of the intensity, in [0.5, 2]; log-uniform. 1 changes nothing.
        contrast: Factor on the distance from the mean of the view, in [0.5, 1.5].
        brightness: Largest shift of the intensity, either way; at most 0.2.
        blur: Probability of a Gaussian blur.
        blur_sigma: Its standard deviation in pixels of the view, at most 1.5 lest it erase small nodules.
        noise: Largest standard deviation of Gaussian noise, at most 0.05; drawn from 0 to this.
        cutout: Probability that a rectangle is erased; its pixels are not valid.
        cutout_area: Area of the rectangle as a share of the view, at most 0.25.
        local_count: Further, smaller views of the image (multi-crop), which come after the others.
        local_size: Side of a local view in pixels; 0: 3/7 of ``size`` (96 for 224), to a multiple of 16.
        local_scale: Area of its crop as a share of the image, at least 0.05.
        executor: Who makes them: host (OpenCV, in the loader's processes) or device (torch, where the network is).
        clean: Also return the views before intensity changes.
    """

    size: int = 224
    scale: tuple[float, float] = (0.3, 1.0)
    aspect: tuple[float, float] = (0.8, 1.25)
    rotation: float = 10.0
    flip: float = 0.0
    window: float = 0.5
    window_clip: float = 0.05
    gamma: tuple[float, float] = (0.7, 1.4)
    contrast: tuple[float, float] = (0.7, 1.3)
    brightness: float = 0.1
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 1.0)
    noise: float = 0.03
    cutout: float = 0.0
    cutout_area: tuple[float, float] = (0.02, 0.1)
    local_count: int = 0
    local_size: int = 0
    local_scale: tuple[float, float] = (0.05, 0.3)
    executor: str = "host"
    clean: bool = False

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ConfigError(f"views.size must be at least 16 pixels, received {self.size}")
        if self.local_size != 0 and self.local_size < 16:
            raise ConfigError(
                f"views.local_size must be at least 16 pixels, or 0 for 3/7 of views.size, received {self.local_size}"
            )
        for name, limit in _LIMITS.items():
            low, high = getattr(self, name)
            if not (limit.least <= low <= high <= limit.most and low > 0):
                least = f"{limit.least} <=" if limit.least else "0 <"
                raise ConfigError(f"views.{name} must be (low, high) with {least} low <= high <= {limit.most} "
                                  f"({limit.why}), received ({low}, {high}){_nearest(low, high, limit)}")  # fmt: skip
        for name, limit in _LARGEST.items():
            if not 0 <= getattr(self, name) <= limit.most:
                raise ConfigError(f"views.{name} must be in [0, {limit.most:g}] ({limit.why}), "
                                  f"received {getattr(self, name)}; 0 switches it off")  # fmt: skip
        for name in ("flip", "blur", "window", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"views.{name} is a probability, received {getattr(self, name)}; give 0 to 1")
        if self.local_count < 0:
            raise ConfigError(f"views.local_count must be >= 0, received {self.local_count}; 0 makes no local views")
        if self.executor not in ("host", "device"):
            raise ConfigError(f"views.executor must be host or device, received '{self.executor}'")

    @property
    def local_side(self) -> int:
        """Side of a local view in pixels."""
        return self.local_size or max(16, 16 * round(3 * self.size / 112))


def _nearest(low: float, high: float, limit: _Limit) -> str:
    """The range within the limits that is nearest to one outside of them, as advice."""
    if not low <= high:  # also where one is not a number
        return "; give the smaller one first"
    least = limit.least or 0.01
    return f"; the nearest is ({min(max(low, least), limit.most):g}, {min(max(high, least), limit.most):g})"


class GreyImage(NamedTuple):
    """What views are made of.

    Attributes:
        pixels: (H, W) uint8, bone bright.
        valid: (H, W) bool, or None where every pixel is valid.
    """

    pixels: NDArray[np.uint8]
    valid: NDArray[np.bool_] | None


def grey_image(radiograph: Radiograph) -> GreyImage:
    """Round a radiograph to 8 bits, from which views are made.

    An 8-bit file loses nothing. Of a deeper one the rounding takes 0.0011 (root of the mean square, of a scale of 1).
    """
    pixels = np.round(radiograph.image[0].numpy() * np.float32(255)).astype(np.uint8)
    return GreyImage(pixels, None if bool(radiograph.valid.all()) else radiograph.valid[0].numpy())


class DrawnView(NamedTuple):
    """Everything random about one view, as plain numbers.

    Attributes:
        size: Side in pixels.
        affine: (2, 3) map from view to image, both in [0, 1], row by row.
        window: Low and high end; (0, 1) changes nothing.
        gamma, contrast, brightness: See the module.
        blur: Standard deviation in pixels; 0: none.
        noise: Standard deviation; 0: none.
        noise_key: Where its field begins in the table of noise.
        cutout: Left, top, right (excluded), bottom (excluded) in pixels; zeros: none.
    """

    size: int
    affine: tuple[float, float, float, float, float, float]
    window: tuple[float, float]
    gamma: float
    contrast: float
    brightness: float
    blur: float
    noise: float
    noise_key: int
    cutout: tuple[int, int, int, int]

    def matrix(self) -> NDArray[np.float64]:
        """``affine`` as an array (2, 3)."""
        return np.array(self.affine, dtype=np.float64).reshape(2, 3)


def view_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random stream of one image in one epoch: a function of (seed, epoch, index) and of nothing else."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, index)))


def draw_views(
    shape: tuple[int, int],
    valid: NDArray[np.bool_] | None,
    config: ViewsConfig,
    generator: np.random.Generator,
    count: int = 2,
) -> tuple[DrawnView, ...]:
    """Draw the numbers of all views of one image: ``count`` of ``config.size``, then the local ones.

    How many numbers are taken for a view does not depend on what they are used for, so a change of one setting of
    intensity moves nothing else, and local views do not change the others.

    Args:
        shape: (H, W) of the image.
        valid: (H, W) bool, or None where every pixel is valid. A crop of which less than ``MIN_VALID`` is valid (judged
            at 24 x 24 points) is drawn again, up to ten times; then the image is shown whole.
        config: The distribution.
        generator: Source of all randomness.
        count: How many views of ``config.size``.
    """
    sizes = [(config.size, config.scale)] * count + [(config.local_side, config.local_scale)] * config.local_count
    return tuple(_draw(shape, valid, size, scale, config, generator) for size, scale in sizes)


def _draw(
    shape: tuple[int, int],
    valid: NDArray[np.bool_] | None,
    size: int,
    scale: tuple[float, float],
    config: ViewsConfig,
    generator: np.random.Generator,
) -> DrawnView:
    affine = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    # all tries at once: the numbers that follow are the same ones whatever was tried
    tries = generator.random((_TRIES, 6)).tolist()
    for numbers in tries:
        drawn = _draw_affine(shape, scale, config, numbers)
        if _valid_share(drawn, valid) >= MIN_VALID:
            affine = drawn
            break
    u = generator.random(16).tolist()
    tightened, blurred, cut = u[0] < config.window, u[6] < config.blur, u[10] < config.cutout
    return DrawnView(
        size,
        affine,
        (u[1] * config.window_clip, 1 - u[2] * config.window_clip) if tightened else (0.0, 1.0),
        _log_between(config.gamma, u[3]),
        _between(config.contrast, u[4]),
        (2 * u[5] - 1) * config.brightness,
        _between(config.blur_sigma, u[7]) if blurred else 0.0,
        u[8] * config.noise,
        int(u[9] * NOISE_PERIOD),
        _rectangle(size, _between(config.cutout_area, u[11]), u[12:15]) if cut else (0, 0, 0, 0),
    )


def _between(limits: tuple[float, float], u: float) -> float:
    return limits[0] + u * (limits[1] - limits[0])


def _log_between(limits: tuple[float, float], u: float) -> float:
    return math.exp(_between((math.log(limits[0]), math.log(limits[1])), u))


def _rectangle(size: int, area: float, u: Sequence[float]) -> tuple[int, int, int, int]:
    """A rectangle of ``area`` (share of the view), of width to height 1/2 to 2, anywhere in the view."""
    aspect = _log_between((0.5, 2.0), u[0])
    width = min(size, max(1, round(size * math.sqrt(area * aspect))))
    height = min(size, max(1, round(size * math.sqrt(area / aspect))))
    left, top = int(u[1] * (size - width + 1)), int(u[2] * (size - height + 1))
    return left, top, left + width, top + height


def _draw_affine(
    shape: tuple[int, int], scale: tuple[float, float], config: ViewsConfig, u: Sequence[float]
) -> tuple[float, float, float, float, float, float]:
    """Affine map from view to image: crop of random area, aspect and place, rotated about its centre, maybe flipped."""
    height, width = shape
    area, aspect = _between(scale, u[0]) * height * width, _log_between(config.aspect, u[1])
    crop_w, crop_h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    centre_x, centre_y = crop_w / 2 + u[2] * (width - crop_w), crop_h / 2 + u[3] * (height - crop_h)
    angle = math.radians((2 * u[4] - 1) * config.rotation)
    if u[5] < config.flip:
        crop_w = -crop_w
    cos, sin = math.cos(angle), math.sin(angle)
    xx, xy, yx, yy = cos * crop_w / width, -sin * crop_h / width, sin * crop_w / height, cos * crop_h / height
    shift_x, shift_y = centre_x / width - (xx + xy) / 2, centre_y / height - (yx + yy) / 2
    return xx, xy, shift_x, yx, yy, shift_y


def _valid_share(affine: Sequence[float], valid: NDArray[np.bool_] | None) -> float:
    """Share of a grid of points of the view that show valid pixels."""
    xx, xy, x0, yx, yy, y0 = affine
    if valid is None:
        low_x, low_y = x0 + min(xx, 0) + min(xy, 0), y0 + min(yx, 0) + min(yy, 0)
        high_x, high_y = low_x + abs(xx) + abs(xy), low_y + abs(yx) + abs(yy)
        if min(low_x, low_y) >= 0 and max(high_x, high_y) <= 1:
            return 1.0
    points = (np.arange(_GRID) + 0.5) / _GRID
    x, y = np.add.outer(xy * points, xx * points + x0), np.add.outer(yy * points, yx * points + y0)
    inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    if valid is not None:
        height, width = valid.shape
        inside[inside] = valid[(y[inside] * height).astype(np.intp), (x[inside] * width).astype(np.intp)]
    return float(np.count_nonzero(inside)) / inside.size


def wholly_inside(affine: Sequence[float], size: int) -> bool:
    """Whether the centres of all pixels of a view lie inside the image."""
    xx, xy, x0, yx, yy, y0 = affine
    first, last = 0.5 / size, (size - 0.5) / size
    corners = ((xx * a + xy * b + x0, yx * a + yy * b + y0) for a in (first, last) for b in (first, last))
    return all(0 <= x <= 1 and 0 <= y <= 1 for x, y in corners)


class Resampling(NamedTuple):
    """How an image is reduced before a view looks at it; pairs are (x, y).

    Attributes:
        halvings: Times that it is halved along each axis.
        weights: w of the filter along each axis; 0: none.
    """

    halvings: tuple[int, int]
    weights: tuple[float, float]


def view_scale(affine: Sequence[float], shape: tuple[int, int], size: int) -> tuple[float, float]:
    """Image pixels between neighbouring pixels of a view, along x and y of the image."""
    height, width = shape
    return math.hypot(affine[0], affine[1]) * width / size, math.hypot(affine[3], affine[4]) * height / size


def resampling(affine: Sequence[float], shape: tuple[int, int], size: int) -> Resampling:
    """The reduction that a view of ``size`` x ``size`` pixels needs; see the module."""
    (halvings_x, weight_x), (halvings_y, weight_y) = map(_reduction, view_scale(affine, shape, size))
    return Resampling((halvings_x, halvings_y), (weight_x, weight_y))


def _reduction(scale: float) -> tuple[int, float]:
    # a scale of 2 that rounding has made a little smaller is still one
    halvings = max(0, math.floor(math.log2(max(scale, 1e-12) * (1 + 1e-9))))
    weight = 0.35 * (1 - 2**halvings / scale) if scale > 2**halvings else 0.0
    return halvings, weight if weight >= 0.02 else 0.0


def blur_kernel(sigma: float) -> NDArray[np.float32]:
    """Weights of the Gaussian blur, 2 ceil(3 sigma) + 1 of them, summing to 1."""
    radius = max(1, math.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel: NDArray[np.float32] = (weights / weights.sum()).astype(np.float32)
    return kernel


@lru_cache(maxsize=1)
def noise_table() -> NDArray[np.float32]:
    """``NOISE_PERIOD`` independent standard normal numbers, twice over; the same in every process and on every machine.

    Box and Muller's formula on 32-bit hashes of 0, 1, 2, ...; no generator's stream, which may change with a version.
    """
    half = NOISE_PERIOD // 2
    first, second = (_hash(np.arange(half, dtype=np.uint32) + np.uint32(k * half)) for k in range(2))
    radius = np.sqrt(-2 * np.log((first + 0.5) / 2**32))
    angle = 2 * math.pi * second.astype(np.float64) / 2**32
    once = np.concatenate((radius * np.cos(angle), radius * np.sin(angle))).astype(np.float32)
    return np.concatenate((once, once))


def _hash(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A bijection of 32-bit numbers that mixes all bits: two rounds of multiplying and folding."""
    x = x * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15)
    for factor in (0x21F0AAAD, 0xD35A2D97):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(factor)
    return x ^ (x >> np.uint32(15))


def noise_field(key: int, size: int) -> NDArray[np.float32]:
    """The standard normal field (size, size) that begins at ``key`` in the table of noise, row by row, in a circle.

    Within one view of up to 1024 x 1024 pixels all numbers are different ones. Two views share numbers where their
    stretches of the table overlap (one pair in ten at 224 pixels), each number at another place than in the other view.
    """
    count = size * size
    table = noise_table()
    if count <= NOISE_PERIOD:
        return table[key : key + count].reshape(size, size)
    field: NDArray[np.float32] = np.resize(table[key : key + NOISE_PERIOD], (size, size))
    return field
