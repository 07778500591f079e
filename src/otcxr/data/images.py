"""Radiographs as tensors: float32 in [0, 1], bone bright; and the square in which networks see them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from otcxr.data.decode import decode_file, full_scale
from otcxr.data.records import Box, Radiograph

__all__ = ["box_in_square", "fit_square", "load_image", "load_radiograph"]


def load_image(path: str | Path) -> Tensor:
    """Load a radiograph's pixels, never cropped, so that boxes hold. See ``load_radiograph``.

    Returns: (1, H, W) float32 in [0, 1], bone bright.
    """
    return load_radiograph(path).image


def load_radiograph(path: str | Path) -> Radiograph:
    """Load a radiograph: PNG, JPEG, TIFF or DICOM, by the rules of ``otcxr.data.decode``.

    Whole numbers are divided by the largest value of their type.

    Raises: DataError: the file is missing, empty, cut short, of another format, or it shows nothing.
    """
    decoded = decode_file(Path(path))
    pixels = decoded.pixels
    if pixels.dtype.kind != "f":
        pixels = pixels.astype(np.float32) / np.float32(full_scale(pixels))
    valid = np.ones(pixels.shape, dtype=np.bool_) if decoded.valid is None else decoded.valid
    return Radiograph(torch.from_numpy(pixels)[None], torch.from_numpy(valid)[None], decoded.spacing)


def box_in_square(box: Box, height: int, width: int) -> tuple[float, float, float, float]:
    """A box in pixels of an image to (x, y, width, height) in [0, 1] of the square that ``fit_square`` makes of it."""
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return (box.x + left) / side, (box.y + top) / side, box.width / side, box.height / side


def fit_square(image: Tensor, size: int) -> Tensor:
    """Reduce an image (1, H, W) to (1, size, size): padded with black to a square, so anatomy keeps its proportions.

    The reduction is antialiased (area average); the centre of the image stays the centre of the square.
    """
    array = image[0].numpy()
    side = max(array.shape)
    top, left = (side - array.shape[0]) // 2, (side - array.shape[1]) // 2
    if array.shape[0] != array.shape[1]:
        array = cv2.copyMakeBorder(
            array, top, side - array.shape[0] - top, left, side - array.shape[1] - left, cv2.BORDER_CONSTANT, value=0
        )
    method = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return torch.from_numpy(cv2.resize(array, (size, size), interpolation=method))[None]
