"""Views on the host: one image after the other, 8-bit pixels, OpenCV. The rules are in ``view_spec``.

Halvings are rounded to 8 bits, and so is the view before its intensities change: window, gamma, contrast and brightness
are one table of 256 entries. Everything after that is float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from otcxr.data.view_spec import (
    FULLY,
    KNEE,
    DrawnView,
    GreyImage,
    Resampling,
    blur_kernel,
    noise_field,
    resampling,
    wholly_inside,
)

__all__ = ["HostView", "host_views", "resample"]

_LEVELS = (np.arange(256) / 255).astype(np.float32)


class HostView(NamedTuple):
    """One view: (S, S) float32 in [0, 1], its valid pixels, and itself before its intensities changed."""

    view: NDArray[np.float32]
    valid: NDArray[np.bool_]
    clean: NDArray[np.float32] | None


class _Halved:
    """An image and its halvings, computed when they are asked for and kept for the next view."""

    def __init__(self, image: GreyImage, most: tuple[int, int]) -> None:
        height, width = image.pixels.shape
        below, right = -height % 2 ** most[1], -width % 2 ** most[0]
        pixels: Any = image.pixels
        valid = image.valid
        if below or right:  # the border goes on, so that the last mean is over as many pixels as the others
            pixels = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
            if valid is not None:
                valid = np.pad(valid, ((0, below), (0, right)), mode="edge")
        self._shape = height, width
        self._pixels: dict[tuple[int, int], NDArray[np.uint8]] = {(0, 0): pixels}
        self._valid: dict[tuple[int, int], NDArray[np.bool_] | None] = {(0, 0): valid}

    def shape(self, halvings: tuple[int, int]) -> tuple[int, int]:
        return -(-self._shape[0] // 2 ** halvings[1]), -(-self._shape[1] // 2 ** halvings[0])

    def pixels(self, halvings: tuple[int, int]) -> NDArray[np.uint8]:
        found = self._pixels.get(halvings)
        if found is None:
            before, across, down = _before(halvings)
            found = self._pixels[halvings] = _halve(self.pixels(before), across, down)
        return found

    def valid(self, halvings: tuple[int, int]) -> NDArray[np.bool_] | None:
        found = self._valid.get(halvings)
        if found is None and self._valid[0, 0] is not None:
            before, across, down = _before(halvings)
            found = self.valid(before)
            assert found is not None
            found = found[:, ::2] & found[:, 1::2] if across else found
            found = found[::2] & found[1::2] if down else found
            self._valid[halvings] = found
        return found


def _halve(pixels: NDArray[np.uint8], across: int, down: int) -> NDArray[np.uint8]:
    """Means of 2 or of 2 x 2 pixels, each by the call that is fast for it."""
    found: Any
    if across and down:
        found = cv2.resize(pixels, (pixels.shape[1] // 2, pixels.shape[0] // 2), interpolation=cv2.INTER_AREA)
    elif across:  # linear interpolation in the middle between two pixels is their mean
        found = cv2.resize(pixels, (pixels.shape[1] // 2, pixels.shape[0]), interpolation=cv2.INTER_LINEAR)
    else:
        found = cv2.addWeighted(pixels[::2], 0.5, pixels[1::2], 0.5, 0)
    halved: NDArray[np.uint8] = found
    return halved


def _before(halvings: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
    """The halvings before the last one, and along which axes that one was."""
    x, y = halvings
    across, down = int(x >= y), int(y >= x)  # both together while both are needed: that is the fast case
    return (x - across, y - down), across, down


def host_views(image: GreyImage, drawn: Sequence[DrawnView], *, clean: bool = False) -> list[HostView]:
    """Carry out the drawn numbers on one image."""
    shape: tuple[int, int] = image.pixels.shape
    plans = [resampling(view.affine, shape, view.size) for view in drawn]
    most = max((p.halvings[0] for p in plans), default=0), max((p.halvings[1] for p in plans), default=0)
    halved = _Halved(image, most)
    return [_make(halved, view, plan, shape, clean) for view, plan in zip(drawn, plans, strict=True)]


def resample(image: GreyImage, affine: Sequence[float], size: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The pixels and the validity of a view (size, size) before its intensities change."""
    shape: tuple[int, int] = image.pixels.shape
    plan = resampling(affine, shape, size)
    pixels, inside = _look(_Halved(image, plan.halvings), affine, plan, shape, size)
    return pixels, np.ones((size, size), np.bool_) if inside is None else inside


def _look(
    halved: _Halved, affine: Sequence[float], plan: Resampling, shape: tuple[int, int], size: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Pixels and validity; None where every pixel is valid."""
    height, width = halved.shape(plan.halvings)
    # pixel i of the view -> (i + 1/2) / size of the view -> of the image -> pixel of the halved image, centres at + 1/2
    to_x, to_y = shape[1] / 2 ** plan.halvings[0], shape[0] / 2 ** plan.halvings[1]
    xx, xy, yx, yy = (a * b / size for a, b in zip((*affine[:2], *affine[3:5]), (to_x, to_x, to_y, to_y), strict=True))
    x0, y0 = affine[2] * to_x + (xx + xy) / 2 - 0.5, affine[5] * to_y + (yx + yy) / 2 - 0.5
    # only the part that is looked at, with a margin for interpolation and filter
    last = size - 1
    left = math.floor(x0 + min(xx * last, 0) + min(xy * last, 0)) - 2
    top = math.floor(y0 + min(yx * last, 0) + min(yy * last, 0)) - 2
    right = left + math.ceil((abs(xx) + abs(xy)) * last) + 6
    bottom = top + math.ceil((abs(yx) + abs(yy)) * last) + 6
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    right, bottom = max(min(right, width), left + 1), max(min(bottom, height), top + 1)
    matrix = np.array([[xx, xy, x0 - left], [yx, yy, y0 - top]])

    part: Any = halved.pixels(plan.halvings)[top:bottom, left:right]
    filtered = plan.weights[0] > 0 or plan.weights[1] > 0
    if filtered:
        row, column = ((w, 1 - 2 * w, w) for w in plan.weights)
        part = cv2.sepFilter2D(part, cv2.CV_32F, np.array(row), np.array(column), borderType=cv2.BORDER_REPLICATE)
    sampled: Any = _warp(part, matrix, size)
    if filtered:
        sampled = cv2.convertScaleAbs(sampled)  # rounds
    inside = _inside(affine, size)
    mask = halved.valid(plan.halvings)
    if mask is not None:
        mask = mask[top:bottom, left:right]
        if not mask.all():
            share: Any = mask.astype(np.float32)
            if filtered:
                reach = np.ones((3 if plan.weights[1] else 1, 3 if plan.weights[0] else 1), np.uint8)
                share = cv2.erode(share, reach, borderType=cv2.BORDER_REPLICATE)
            within = _warp(share, matrix, size) > FULLY
            inside = within if inside is None else inside & within
    if inside is not None and inside.all():
        inside = None
    return sampled, inside


def _warp(part: NDArray[Any], matrix: NDArray[np.float64], size: int) -> NDArray[Any]:
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    out: Any = cv2.warpAffine(part, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    warped: NDArray[Any] = out
    return warped


def _inside(affine: Sequence[float], size: int) -> NDArray[np.bool_] | None:
    """Pixels whose centre lies inside the image; None: all of them."""
    if wholly_inside(affine, size):
        return None
    xx, xy, x0, yx, yy, y0 = affine
    centres = (np.arange(size) + 0.5) / size
    x, y = (
        np.add.outer((across * centres).astype(np.float32), (along * centres + (start - 0.5)).astype(np.float32))
        for along, across, start in ((xx, xy, x0), (yx, yy, y0))
    )
    np.maximum(np.abs(x, out=x), np.abs(y, out=y), out=x)
    inside: NDArray[np.bool_] = x <= np.float32(0.5)
    return inside


def _make(halved: _Halved, drawn: DrawnView, plan: Resampling, shape: tuple[int, int], clean: bool) -> HostView:
    pixels, inside = _look(halved, drawn.affine, plan, shape, drawn.size)
    counts: Any = cv2.calcHist([pixels], [0], None if inside is None else inside.view(np.uint8), [256], [0, 256])
    table, fill = _table(drawn, counts.ravel())  # OpenCV 4 gives a column, 5 a row
    out: Any = cv2.LUT(pixels, table)
    if drawn.blur > 0:
        if inside is not None:
            out[~inside] = fill
        kernel = blur_kernel(drawn.blur)
        out = cv2.sepFilter2D(out, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    if drawn.noise > 0:
        out = cv2.scaleAdd(noise_field(drawn.noise_key, drawn.size), drawn.noise, out)
    np.clip(out, 0, 1, out=out)
    before = _LEVELS[pixels] if clean else None
    valid = np.ones(pixels.shape, np.bool_) if inside is None else inside
    if inside is not None:
        np.multiply(out, inside, out=out)
        if before is not None:
            np.multiply(before, inside, out=before)
    left, top, right, bottom = drawn.cutout
    if right > left:
        hole = valid[top:bottom, left:right]
        out[top:bottom, left:right] = np.where(hole, fill, np.float32(0))
        hole[...] = False
    return HostView(out, valid, before)


def _table(drawn: DrawnView, counts: NDArray[np.float32]) -> tuple[NDArray[np.float32], np.float32]:
    """Window, gamma, contrast and brightness of each grey level, and what stands for the mean of the view."""
    low, high = drawn.window
    x = _LEVELS.astype(np.float64)
    if low > 0 or high < 1:
        x = np.clip((x - low) / (high - low), 0, 1)
    if drawn.gamma != 1:
        x = x**drawn.gamma
    count = counts.sum()
    mean = float(counts @ x / count) if count else 0.5
    shift = mean + drawn.brightness
    black, white = shift - drawn.contrast * mean, shift + drawn.contrast * (1 - mean)
    x = drawn.contrast * x + black
    if black < 0:
        x = np.where(x < KNEE, (x - black) * (KNEE / (KNEE - black)), x)
    if white > 1:
        x = np.where(x > 1 - KNEE, 1 - (white - x) * (KNEE / (KNEE + white - 1)), x)
    return x.astype(np.float32), np.float32(min(max(shift, 0.0), 1.0))
