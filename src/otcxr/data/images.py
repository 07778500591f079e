"""Radiograph files to pixels: PNG, JPEG and DICOM to float32 in [0, 1], bone bright."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcxr.data.records import Box, Radiograph
from otcxr.errors import DataError

__all__ = [
    "IMAGE_SUFFIXES",
    "border_valid",
    "box_in_square",
    "fit_square",
    "is_dicom",
    "load_image",
    "load_radiograph",
    "png_size",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".dcm", ".dicom"})

_PNG_START = b"\x89PNG\r\n\x1a\n"


def load_image(path: str | Path) -> Tensor:
    """Load a radiograph's pixels, never cropped, so that boxes hold. See ``load_radiograph``.

    Returns: (1, H, W) float32 in [0, 1], bone bright.
    """
    return load_radiograph(path).image


def load_radiograph(path: str | Path) -> Radiograph:
    """Load a radiograph.

    8- and 16-bit PNG and JPEG are divided by the largest value of their type. Colour is reduced to luminance. Where
    alpha is 0 there is no pixel (``valid`` False); elsewhere alpha is ignored. DICOM: see ``otcxr.data.dicom``.
    Rows and columns at the border that are entirely black or entirely white are padding (``valid`` False).

    Raises: DataError: the file is missing, empty, cut short, of another format, or it shows nothing: no pixel is valid
        or all that are stated to be pixels are equal.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error
    if not data:
        raise DataError(f"{path} is empty (0 bytes); copy it again")
    if is_dicom(data) or path.suffix.lower() in (".dcm", ".dicom"):
        from otcxr.data.dicom import decode_dicom

        array, valid, spacing = decode_dicom(data, str(path))
    else:
        array, valid = _decode(data, path)
        spacing = None
    seen = array[valid]
    if not seen.size:
        raise DataError(f"{path} holds no picture: every pixel is transparent or declared padding; leave it out")
    if float(seen.max()) == float(seen.min()):
        raise DataError(f"{path} holds no picture: every pixel is {float(seen.max()):.3f}; leave it out")
    valid = valid & border_valid(array)
    if not valid.any():
        raise DataError(f"{path} holds no picture: its rows or columns are all black or white; leave it out")
    return Radiograph(torch.from_numpy(array)[None], torch.from_numpy(valid)[None], spacing)


def is_dicom(data: bytes) -> bool:
    """Whether the bytes start as a DICOM file does (128 bytes preamble, then DICM)."""
    return data[128:132] == b"DICM"


def png_size(path: Path) -> tuple[int, int]:
    """Return (height, width) from a PNG's header without decoding it.

    Raises: DataError: missing, or not a PNG.
    """
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error
    if len(head) < 24:
        raise DataError(f"{path} is a PNG that is cut short ({len(head)} bytes); copy it again")
    if not head.startswith(_PNG_START):
        raise DataError(f"{path} is not a PNG (starts with {head[:8]!r}); convert it")
    width, height = struct.unpack(">II", head[16:24])
    return height, width


def _decode(data: bytes, path: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    # OpenCV fills the missing part of a cut file with grey and says nothing, and takes gigabytes and seconds for a
    # chunk whose length is damaged, so both are checked here.
    if data.startswith(_PNG_START):
        fault = _png_fault(data)
        if fault:
            raise DataError(f"{path} is a PNG that is {fault} ({len(data)} bytes); copy it again")
    elif data.startswith(b"\xff\xd8"):
        if not _jpeg_ends(data):
            raise DataError(f"{path} is a JPEG that is cut short ({len(data)} bytes, no end marker); copy it again")
    else:
        raise DataError(f"{path} is neither PNG, JPEG nor DICOM (starts with {data[:8]!r}); convert it")
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:  # such as a header that states more pixels than OpenCV accepts
        raise DataError(f"{path} cannot be decoded: {error.err or error}; reduce it or copy it again") from error
    if array is None:
        raise DataError(f"{path} cannot be decoded: its data are damaged; copy it again")
    if array.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path} has pixels of type {array.dtype}; expected 8- or 16-bit integers")
    scale = 255.0 if array.dtype == np.uint8 else 65535.0
    valid = np.ones(array.shape[:2], dtype=np.bool_)
    if array.ndim == 3 and array.shape[2] in (2, 4):
        valid = array[..., -1] > 0
        array = array[..., :-1]
    if array.ndim == 3 and array.shape[2] == 3:
        array = cv2.cvtColor(np.ascontiguousarray(array), cv2.COLOR_BGR2GRAY)
    elif array.ndim == 3:
        array = array[..., 0]
    return array.astype(np.float32) / np.float32(scale), valid


def _png_fault(data: bytes) -> str | None:
    """What is wrong with the chunks of a PNG: cut short, damaged (a checksum disagrees) or None."""
    at, view = len(_PNG_START), memoryview(data)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        if end > len(data):
            break
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return "damaged"
        if data[at + 4 : at + 8] == b"IEND":
            return None
        at = end
    return "cut short"


def _jpeg_ends(data: bytes) -> bool:
    """Whether the end marker follows the start of the scan: one in an embedded thumbnail is not the picture's."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return data.rfind(b"\xff\xd9", max(at, len(data) - 1024)) >= 0
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def border_valid(image: NDArray[np.float32], tolerance: float = 2 / 255) -> NDArray[np.bool_]:
    """False on border rows and columns that are black (or white) from end to end, within ``tolerance``; (H, W)."""
    valid = np.ones(image.shape, dtype=np.bool_)
    for axis in (0, 1):
        low, high = image.min(axis=1 - axis), image.max(axis=1 - axis)
        blank = (high <= tolerance) | (low >= 1 - tolerance)
        if blank.all():
            return ~valid
        first, last = int(np.argmin(blank)), len(blank) - int(np.argmin(blank[::-1]))
        outside = np.r_[0:first, last : len(blank)]
        if axis == 0:
            valid[outside, :] = False
        else:
            valid[:, outside] = False
    return valid


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
