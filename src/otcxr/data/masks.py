"""Masks: from a file, joined from several, from run lengths in a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from otcxr.data.records import ImageRef, Radiograph, full_valid
from otcxr.errors import DataError

__all__ = ["JoinedMask", "RunLengthMask", "decode_runs", "load_mask", "read_mask"]


def read_mask(mask: ImageRef) -> NDArray[np.bool_]:
    """Read or compute a mask of a record, (H, W); it may be empty.

    Raises: DataError: the file cannot be used.
    """
    if isinstance(mask, Path):
        return load_mask(mask)
    inside: NDArray[np.bool_] = mask.radiograph().image[0].numpy() >= 0.5
    return inside


def load_mask(path: Path) -> NDArray[np.bool_]:
    """Load a mask from a picture, (H, W).

    Inside is what is brighter than half of the type's largest value; where the picture has no more than two values, as
    masks of 0 and 1 have, the brighter one, unless both are 0. Colour is reduced to its brightest channel.

    Raises: DataError: the file is missing or no picture.
    """
    try:
        data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error
    pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path} is no PNG or JPEG of 8 or 16 bits; a mask is a picture, black where nothing is")
    if pixels.ndim == 3:
        pixels = pixels[..., :3].max(axis=2)
    values = np.unique(pixels)
    half = values[-1] if len(values) <= 2 and values[-1] > 0 else np.iinfo(pixels.dtype).max / 2
    inside: NDArray[np.bool_] = pixels >= half
    return inside


@dataclass(frozen=True)
class JoinedMask:
    """What any of several mask files covers, such as both lungs; see :func:`load_mask`."""

    files: tuple[Path, ...]

    def __str__(self) -> str:
        return "+".join(f"{path.parent.name}/{path.name}" for path in self.files)

    def radiograph(self) -> Radiograph:
        """Read and join them.

        Raises: DataError: one cannot be read, or they have different sizes.
        """
        parts = [load_mask(path) for path in self.files]
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            raise DataError(f"the masks {self} have different sizes {sorted(shapes)}; copy them again")
        image = torch.from_numpy(np.any(parts, axis=0)).float()[None]
        return Radiograph(image, full_valid(image), None)


@dataclass(frozen=True)
class RunLengthMask:
    """What any of several rows of run lengths covers; see :func:`decode_runs`."""

    name: str
    rows: tuple[str, ...]
    side: int = 1024

    def __str__(self) -> str:
        return self.name

    def radiograph(self) -> Radiograph:
        """Decode and join the rows.

        Raises: DataError: see :func:`decode_runs`.
        """
        mask = np.zeros((self.side, self.side), dtype=np.bool_)
        for row in self.rows:
            mask |= decode_runs(row, self.side, self.name)
        image = torch.from_numpy(mask).float()[None]
        return Radiograph(image, full_valid(image), None)


def decode_runs(text: str, side: int, where: str) -> NDArray[np.bool_]:
    """Decode the run lengths of SIIM-ACR: pairs of (pixels to skip since the last run, pixels to fill), down columns.

    Args:
        text: Whole numbers with spaces between.
        side: Of the square image.
        where: Of which image, for messages.
    Returns: (side, side).
    Raises: DataError: not pairs of whole numbers >= 0, or more pixels than the image has.
    """
    try:
        numbers = np.array([int(word) for word in text.split()], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"the run lengths of {where} are no whole numbers: {error}") from error
    total = side * side
    if numbers.size % 2 or not numbers.size or numbers.min() < 0 or numbers.max() > total:
        raise DataError(
            f"the run lengths of {where} must be pairs (skip, length) of numbers in [0, {total}], received "
            f"{numbers.size} numbers from {numbers.min(initial=0)} to {numbers.max(initial=0)}"
        )
    ends = np.cumsum(numbers)
    if ends[-1] > total:
        raise DataError(f"the run lengths of {where} reach pixel {ends[-1]} of {total}; the table belongs to images of "
                        "another size")  # fmt: skip
    change = np.zeros(total + 1, dtype=np.int64)
    np.add.at(change, ends[0::2], 1)
    np.add.at(change, ends[1::2], -1)
    filled: NDArray[np.bool_] = np.cumsum(change)[:-1] > 0
    return filled.reshape(side, side).T  # numbered down the columns
