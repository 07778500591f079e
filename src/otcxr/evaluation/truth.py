"""Where things are: masks and boxes of a record, in the square that an encoder sees.

``fit_square`` pads an image to a square and reduces it; boxes and masks go the same way. A mask is what at least half
of a pixel shows, or its fullest pixel where that is nowhere so: a small lesion must not vanish.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from otcxr.data.dataset import PixelCache
from otcxr.data.images import box_in_square, fit_square
from otcxr.data.masks import read_mask
from otcxr.data.records import ImageRef, Record
from otcxr.evaluation.overlap import Frame, region_boxes

__all__ = ["Masks", "Truth", "mask_in_square", "read_truth"]


class Truth(NamedTuple):
    """A region of one image, in the square of ``size`` pixels.

    Attributes:
        size: S.
        packed: The mask, one bit a pixel.
        boxes: Those of the experts, or of the joined parts of the mask; in pixels of the square.
    """

    size: int
    packed: NDArray[np.uint8]
    boxes: tuple[Frame, ...]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(S, S)."""
        bits = np.unpackbits(self.packed, count=self.size * self.size)
        return bits.reshape(self.size, self.size).astype(np.bool_)

    @property
    def share(self) -> float:
        """Area as a share of the square."""
        return float(np.unpackbits(self.packed, count=self.size * self.size).mean())


class Masks:
    """Masks of records in the square, read once and kept as bits.

    Args:
        size: Side of the square in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[ImageRef, NDArray[np.uint8]] = {}
        self._truths: dict[tuple[ImageRef, str], Truth | None] = {}

    def __call__(self, record: Record, name: str) -> NDArray[np.bool_]:
        """The mask of a record, (size, size); empty where the record has none of this name.

        Raises: DataError: it cannot be read.
        """
        if name not in record.masks:
            return np.zeros((self.size, self.size), dtype=np.bool_)
        reference = record.masks[name]
        if reference not in self._kept:
            self._kept[reference] = np.packbits(mask_in_square(record, name, self.size))
        bits = np.unpackbits(self._kept[reference], count=self.size * self.size)
        return bits.reshape(self.size, self.size).astype(np.bool_)

    def truth(self, record: Record, name: str, pixels: PixelCache) -> Truth | None:
        """As ``read_truth``, read once."""
        key = record.image, name
        if key not in self._truths:
            self._truths[key] = read_truth(record, name, self.size, pixels)
        return self._truths[key]


def mask_in_square(record: Record, name: str, size: int) -> NDArray[np.bool_]:
    """A mask of a record in the square, (size, size); empty where the mask is.

    Raises: DataError: the mask cannot be read.
    """
    whole = torch.from_numpy(read_mask(record.masks[name])).float()[None]
    pixels = fit_square(whole, size)[0].numpy()
    mask = pixels >= 0.5
    if not mask.any() and pixels.max() > 0:
        mask = pixels == pixels.max()
    return np.asarray(mask, dtype=np.bool_)


def read_truth(record: Record, name: str, size: int, pixels: PixelCache) -> Truth | None:
    """Where a finding or an organ is, from the record's mask, else from its boxes; None where neither tells.

    A region of boxes is every pixel whose centre lies in one, and of each box at least the pixel at its middle.

    Raises: DataError: an image or mask cannot be read.
    """
    own = [box for box in record.boxes if box.finding == name]
    boxes: tuple[Frame, ...] = ()
    mask = mask_in_square(record, name, size) if name in record.masks else None
    if own:
        shape = pixels.get(record.image).image.shape[-2:]
        parts = [box_in_square(box, *shape) for box in own]
        boxes = tuple(Frame(x * size, y * size, (x + w) * size, (y + h) * size) for x, y, w, h in parts)
        if mask is None:
            mask = np.zeros((size, size), dtype=np.bool_)
            for box in boxes:
                mask |= _covered(box, size)
    if mask is None or not mask.any():
        return None
    return Truth(size, np.packbits(mask), boxes or tuple(region_boxes(mask)))


def _covered(box: Frame, size: int) -> NDArray[np.bool_]:
    """Pixels whose centre lies in a box, at least the one that holds its middle."""
    mask = np.zeros((size, size), dtype=np.bool_)

    def span(low: float, high: float) -> slice:
        first, last = math.ceil(low - 0.5), math.ceil(high - 0.5)
        if last <= first:
            first = math.floor((low + high) / 2)
            last = first + 1
        return slice(min(max(first, 0), size - 1), max(min(last, size), 1))

    mask[span(box.top, box.bottom), span(box.left, box.right)] = True
    return mask
