"""Views on the device: a batch of images at once, torch. The rules are in ``view_spec``, and the host obeys them too.

What depends on the drawn numbers in Python is only the grouping: views of one size whose images are halved equally
often go through together. Nothing is rounded to 8 bits on the way, which is the whole difference to the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from otcxr.data.geometry import ViewBatch
from otcxr.data.view_spec import (
    FULLY,
    KNEE,
    NOISE_PERIOD,
    DrawnView,
    GreyImage,
    blur_kernel,
    noise_table,
    resampling,
    wholly_inside,
)

__all__ = ["ViewRequest", "collate_requests", "device_views", "request_views"]

# pixels of images, and of views of one size, that are computed at once: on a CPU what its caches hold, else what
# bounds the memory
_AT_ONCE = {"cpu": (2**21, 2**18), "else": (2**28, 2**26)}


class ViewRequest(NamedTuple):
    """Pixels of a batch of images and the numbers of their views: what a device makes views from.

    Attributes:
        pixels: (B, H, W) uint8; a smaller image lies at the top left and goes on as its border pixels.
        valid: (B, H, W) bool, or None where every pixel of every image is valid.
        shapes: For each image its own (height, width).
        drawn: For each image its views, equally many, of equal sizes view by view.
        clean: Also return the views before intensity changes.
    """

    pixels: Tensor
    valid: Tensor | None
    shapes: tuple[tuple[int, int], ...]
    drawn: tuple[tuple[DrawnView, ...], ...]
    clean: bool


def request_views(image: GreyImage, drawn: Sequence[DrawnView], *, clean: bool = False) -> ViewRequest:
    """Ask for views of one image."""
    height, width = image.pixels.shape
    valid = None if image.valid is None else torch.from_numpy(image.valid)[None]
    return ViewRequest(torch.from_numpy(image.pixels)[None], valid, ((height, width),), (tuple(drawn),), clean)


def collate_requests(requests: Sequence[ViewRequest]) -> ViewRequest:
    """Join requests along the batch dimension; smaller images are extended by their border pixels."""
    height, width = (max(request.pixels.shape[d] for request in requests) for d in (1, 2))
    valid = None
    if any(request.valid is not None for request in requests):
        full = [torch.ones_like(r.pixels, dtype=torch.bool) if r.valid is None else r.valid for r in requests]
        valid = torch.cat([_extended(part.view(torch.uint8), height, width) for part in full]).view(torch.bool)
    return ViewRequest(
        torch.cat([_extended(request.pixels, height, width) for request in requests]),
        valid,
        tuple(shape for request in requests for shape in request.shapes),
        tuple(views for request in requests for views in request.drawn),
        requests[0].clean,
    )


def _extended(pixels: Tensor, height: int, width: int) -> Tensor:
    below, right = height - pixels.shape[1], width - pixels.shape[2]
    if not (below or right):
        return pixels
    grown = [cv2.copyMakeBorder(p.numpy(), 0, below, 0, right, cv2.BORDER_REPLICATE) for p in pixels]
    return torch.from_numpy(np.stack(grown))


@torch.no_grad()
def device_views(request: ViewRequest, device: torch.device | str = "cpu") -> ViewBatch:
    """Make the views of a batch on ``device``.

    Memory beside pixels and views: some 8 bytes a pixel of the images, and 40 of the views, that are computed at once.

    Returns: The views that the host would make of the same numbers: pixels up to what it rounds, geometry equal,
        validity equal but for pixels whose centre lies within 1e-5 of an edge.
    """
    device = torch.device(device)
    images, views = _AT_ONCE["cpu" if device.type == "cpu" else "else"]
    largest = max(view.size for view in request.drawn[0]) ** 2
    step = max(1, min(images // request.pixels[0].numel(), views // largest))
    parts = [_make_part(request, slice(first, first + step), device) for first in range(0, len(request.drawn), step)]
    made, valid, clean = (
        tuple(part[0] if len(part) == 1 else torch.cat(part) for part in zip(*kind, strict=True))
        for kind in zip(*parts, strict=True)
    )
    numbers = [[view.affine for view in column] for column in zip(*request.drawn, strict=True)]
    geometry = torch.tensor(numbers, dtype=torch.float32).view(len(numbers), -1, 2, 3)
    return ViewBatch(made, geometry.to(device), valid, clean if request.clean else None)


def _make_part(
    request: ViewRequest, which: slice, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Views, validity and views before their intensities changed of some images of the batch."""
    valid = None if request.valid is None else request.valid[which]
    part = ViewRequest(request.pixels[which], valid, request.shapes[which], request.drawn[which], request.clean)
    halved = _Halved(part, device, None), None if valid is None else _Halved(part, device, valid)
    made = [_make_view([drawn[v] for drawn in part.drawn], part, *halved, device) for v in range(len(part.drawn[0]))]
    return [view for view, _, _ in made], [inside for _, inside, _ in made], [clean for _, _, clean in made]


class _Halved:
    """A batch of images (or of their validity) and its halvings, computed when they are asked for."""

    def __init__(self, request: ViewRequest, device: torch.device, valid: Tensor | None) -> None:
        self._mask, self._shapes, self._device = valid is not None, request.shapes, device
        plans = [
            resampling(view.affine, shape, view.size)
            for shape, views in zip(request.shapes, request.drawn, strict=True)
            for view in views
        ]
        start = (request.pixels if valid is None else valid.view(torch.uint8)).to(device, non_blocking=True)[:, None]
        most = [max(plan.halvings[axis] for plan in plans) for axis in range(2)]
        below, right = -start.shape[2] % 2 ** most[1], -start.shape[3] % 2 ** most[0]
        if below or right:
            padded = functional.pad(start.float(), (0, right, 0, below), mode="replicate")  # not there for uint8
            start = padded.to(torch.uint8)
        self._known = {(0, 0): start}
        self._level: dict[tuple[int, int], Tensor] = {}

    def _halve(self, halvings: tuple[int, int]) -> Tensor:
        """Means; of validity the smallest."""
        found = self._known.get(halvings)
        if found is None:
            x, y = halvings
            across, down = int(x >= y), int(y >= x)
            found = self._halve((x - across, y - down))
            if self._mask:
                found = torch.minimum(found[:, :, ::2], found[:, :, 1::2]) if down else found
                found = torch.minimum(found[..., ::2], found[..., 1::2]) if across else found
            else:  # slices, as pooling is many times slower on a CPU; sums of four bytes are exact in 16 bits
                whole = torch.int16 if found.dtype == torch.uint8 else found.dtype
                found = found[:, :, ::2].to(whole) + found[:, :, 1::2] if down else found
                found = found[..., ::2].to(whole) + found[..., 1::2] if across else found
                found = found.float().mul_(0.5 ** (across + down))
            self._known[halvings] = found
        return found

    def level(self, halvings: tuple[int, int]) -> Tensor:
        """(B, 1, h, w) float32; beyond the halved size of its image, each goes on as its border."""
        found = self._level.get(halvings)
        if found is None:
            found = self._halve(halvings).float()
            for axis, times, side in ((3, halvings[0], 1), (2, halvings[1], 0)):
                own = [-(-shape[side] // 2**times) for shape in self._shapes]
                most = max(own)
                found = found.narrow(axis, 0, most)
                if min(own) < most:
                    last = torch.tensor(own, device=self._device).view(-1, 1, 1, 1) - 1
                    index = torch.arange(most, device=self._device).view((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1))
                    found = found.take_along_dim(torch.minimum(index, last), dim=axis)
            self._level[halvings] = found
        return found


def _make_view(
    drawn: Sequence[DrawnView], request: ViewRequest, pixels: _Halved, valid: _Halved | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """One view of every image: (B, 1, S, S) pixels, validity, and the pixels before their intensities changed."""
    size, shapes = drawn[0].size, request.shapes
    plans = [resampling(view.affine, shape, size) for view, shape in zip(drawn, shapes, strict=True)]
    groups: dict[tuple[int, int], list[int]] = {}
    for member, plan in enumerate(plans):
        groups.setdefault(plan.halvings, []).append(member)
    inside, whole = _inside(drawn, size, device)
    sampled = torch.empty(len(drawn), 1, size, size, device=device)
    for halvings, members in groups.items():
        images, weights = pixels.level(halvings), [plans[m].weights for m in members]
        grid = _grid(drawn, shapes, halvings, members, images)
        rows = torch.tensor(members, device=device)
        sampled[rows] = _look(_taken(images, members, rows), grid, weights)
        if valid is not None:
            share = _look(_taken(valid.level(halvings), members, rows), grid, weights, mask=True)
            inside[rows] &= share > FULLY
    clean = sampled.mul_(1 / 255)
    if not whole or valid is not None:
        clean.mul_(inside)
    out, fill = _change(clean.clone() if request.clean else clean, inside, drawn, device)
    out = _blur(out, inside, fill, drawn)
    out = _add_noise(out, drawn, device).clamp_(0, 1)
    if not whole or valid is not None:
        out.mul_(inside)
    cut = _cutout(drawn, size, device)
    if cut is not None:
        out = torch.where(cut & inside, fill, out)
        inside &= ~cut
    return out, inside, clean


def _taken(level: Tensor, members: Sequence[int], rows: Tensor) -> Tensor:
    return level if len(members) == len(level) else level[rows]


def _inside(drawn: Sequence[DrawnView], size: int, device: torch.device) -> tuple[Tensor, bool]:
    """(B, 1, S, S) bool: the pixel's centre lies inside the image; and whether all of them do."""
    inside = torch.ones(len(drawn), 1, size, size, dtype=torch.bool, device=device)
    partly = [member for member, view in enumerate(drawn) if not wholly_inside(view.affine, size)]
    if partly:
        affine = torch.tensor([drawn[member].affine for member in partly], dtype=torch.float64).view(-1, 2, 3)
        centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        along = (affine[:, :, 0, None] * centres + (affine[:, :, 2, None] - 0.5)).float().to(device)  # (n, 2, S)
        across = (affine[:, :, 1, None] * centres).float().to(device)
        fits = [(across[:, k, :, None] + along[:, k, None, :]).abs_() <= 0.5 for k in range(2)]
        inside[torch.tensor(partly, device=device), 0] = fits[0].logical_and_(fits[1])
    return inside, not partly


def _grid(
    drawn: Sequence[DrawnView],
    shapes: Sequence[tuple[int, int]],
    halvings: tuple[int, int],
    members: Sequence[int],
    images: Tensor,
) -> Tensor:
    """(n, S, S, 2) places in the halved images, whose outer edges lie at -1 and 1."""
    size, rows = drawn[0].size, []
    for m in members:
        xx, xy, x0, yx, yy, y0 = drawn[m].affine
        # the share of the array that this image fills: an axis may be longer, for a larger image or an odd pixel
        x, y = (shapes[m][1 - k] / 2 ** halvings[k] / images.shape[3 - k] for k in range(2))
        rows.append([[x * xx, x * xy, x * (xx + xy + 2 * x0) - 1], [y * yx, y * yy, y * (yx + yy + 2 * y0) - 1]])
    matrix = torch.tensor(rows, dtype=torch.float64)
    centres = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    along = (matrix[:, :, 0, None] * centres + matrix[:, :, 2, None]).float().to(images.device)  # (n, 2, S)
    across = (matrix[:, :, 1, None] * centres).float().to(images.device)
    grid = torch.empty(len(members), size, size, 2, device=images.device)
    for k in range(2):  # many times faster on a CPU than affine_grid, and in the order that sampling wants
        torch.add(across[:, k, :, None], along[:, k, None, :], out=grid[..., k])
    return grid


def _look(images: Tensor, grid: Tensor, weights: Sequence[tuple[float, float]], *, mask: bool = False) -> Tensor:
    """Filter the halved images along both axes and interpolate them at ``grid``."""
    for axis in range(2):
        weight = [w[axis] for w in weights]
        if any(weight):
            images = _filter(images, torch.tensor(weight, device=images.device).view(-1, 1, 1, 1), 3 - axis, mask)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _filter(images: Tensor, weight: Tensor, axis: int, mask: bool) -> Tensor:
    """(w, 1 - 2 w, w) along an axis; of a mask the smallest of the three where w > 0."""
    count = images.shape[axis]
    if count == 1:
        return images
    first, last = images.narrow(axis, 0, 1), images.narrow(axis, count - 1, 1)
    longer = torch.cat((first, images, last), dim=axis)
    before, after = longer.narrow(axis, 0, count), longer.narrow(axis, 2, count)
    if mask:
        return torch.where(weight > 0, torch.minimum(torch.minimum(before, after), images), images)
    return torch.lerp(images, (before + after).mul_(0.5), 2 * weight)


def _change(x: Tensor, inside: Tensor, drawn: Sequence[DrawnView], device: torch.device) -> tuple[Tensor, Tensor]:
    """Window, gamma, contrast, brightness, toe and shoulder, in place; and m + brightness, (B, 1, 1, 1) in [0, 1].

    ``x`` is 0 where it is not valid, which window and gamma leave as it is, so its sum is that of the valid part.
    """

    def each(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32).to(device).view(-1, 1, 1, 1)

    if any(view.window != (0.0, 1.0) for view in drawn):
        low, high = each([view.window[0] for view in drawn]), each([view.window[1] for view in drawn])
        x.sub_(low).mul_(1 / (high - low)).clamp_(0, 1)
    if any(view.gamma != 1 for view in drawn):
        x.pow_(each([view.gamma for view in drawn]))
    count = inside.sum((2, 3), keepdim=True)
    mean = torch.where(count > 0, x.sum((2, 3), keepdim=True) / count.clamp_min(1), 0.5)
    contrast, brightness = each([view.contrast for view in drawn]), each([view.brightness for view in drawn])
    shift = mean + brightness
    black, white = shift - contrast * mean, shift + contrast * (1 - mean)
    x.mul_(contrast).add_(black)
    # both are lines of a slope of at most 1 through the knee: above x before it, below x beyond it
    toe, shoulder = KNEE / (KNEE - black.clamp_max(0)), KNEE / (KNEE + white.clamp_min(1) - 1)
    torch.maximum(x, torch.addcmul(KNEE * (1 - toe), x, toe), out=x)
    torch.minimum(x, torch.addcmul((1 - KNEE) * (1 - shoulder), x, shoulder), out=x)
    return x, shift.clamp(0, 1)


def _blur(views: Tensor, inside: Tensor, fill: Tensor, drawn: Sequence[DrawnView]) -> Tensor:
    blurred = [member for member, view in enumerate(drawn) if view.blur > 0]
    if not blurred:
        return views
    kernels = [blur_kernel(drawn[member].blur) for member in blurred]
    reach = max(len(kernel) for kernel in kernels) // 2
    stacked = np.stack([np.pad(kernel, reach - len(kernel) // 2) for kernel in kernels])
    weights = torch.from_numpy(stacked.T.copy()).to(views.device).view(2 * reach + 1, -1, 1, 1, 1)
    rows = torch.tensor(blurred, device=views.device)
    part = torch.where(inside[rows], views[rows], fill[rows])
    part = functional.pad(part, (reach, reach, reach, reach), mode="replicate")
    for axis in (3, 2):  # grouped convolutions take several times as long on a CPU
        count = part.shape[axis] - 2 * reach
        total = weights[0] * part.narrow(axis, 0, count)
        for k in range(1, 2 * reach + 1):
            total.addcmul_(weights[k], part.narrow(axis, k, count))
        part = total
    return views.index_copy_(0, rows, part)


@lru_cache(maxsize=4)
def _table_on(device: torch.device) -> Tensor:
    return torch.from_numpy(noise_table()).to(device)


def _add_noise(views: Tensor, drawn: Sequence[DrawnView], device: torch.device) -> Tensor:
    if not any(view.noise > 0 for view in drawn):
        return views
    size, table = drawn[0].size, _table_on(device)
    count = size * size
    # stretches of the table, one for each view; larger views than it go round it
    fields = [table[v.noise_key : v.noise_key + min(count, NOISE_PERIOD)] for v in drawn]
    stacked = torch.stack(fields)
    if count > NOISE_PERIOD:
        stacked = stacked.repeat(1, math.ceil(count / NOISE_PERIOD))[:, :count]
    sigma = torch.tensor([view.noise for view in drawn], dtype=torch.float32).to(device).view(-1, 1, 1, 1)
    return views.addcmul_(stacked.view(-1, 1, size, size), sigma)


def _cutout(drawn: Sequence[DrawnView], size: int, device: torch.device) -> Tensor | None:
    """(B, 1, S, S) bool: cut out; None: nothing is."""
    if not any(view.cutout[2] for view in drawn):
        return None
    edges = torch.tensor([view.cutout for view in drawn]).to(device)
    left, top, right, bottom = (edges[:, k].view(-1, 1, 1, 1) for k in range(4))
    index = torch.arange(size, device=device)
    column, row = index.view(1, 1, 1, -1), index.view(1, 1, -1, 1)
    return (column >= left) & (column < right) & (row >= top) & (row < bottom)
