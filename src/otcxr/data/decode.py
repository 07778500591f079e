"""Radiograph files to arrays, bone bright. No torch here: processes that only decode start in a moment.

Whole numbers stay whole numbers, so what an 8- or 16-bit file holds can be reduced and stored without a detour.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from otcxr.data import png
from otcxr.errors import DataError

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "About",
    "Decoded",
    "decode_bytes",
    "decode_file",
    "full_scale",
    "inside_border",
    "is_dicom",
    "jpeg_size",
    "read_bytes",
    "refuse_size",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom"})
MAX_PIXELS = 2**27  # a header that states more is damaged: the largest films are scanned with 2 * 10^7 pixels

_TIFF_STARTS = (b"II*\0", b"MM\0*")


class About(NamedTuple):
    """What a file says of itself, for counts and checks; "" where it does not.

    Attributes:
        format: PNG, JPEG, TIFF or DICOM.
        encoding: Name of the transfer syntax.
        photometric: PhotometricInterpretation; colour or grey of other formats.
        bits: BitsStored; bits of a pixel's channel of other formats.
        modality, body_part, position: Modality, BodyPartExamined, ViewPosition.
        sop_class: Name of the SOP class.
        burned_in: BurnedInAnnotation: YES, NO or "".
        sex, age, view: As in ``dicom.Header``.
    """

    format: str
    encoding: str = ""
    photometric: str = ""
    bits: int = 0
    modality: str = ""
    body_part: str = ""
    position: str = ""
    sop_class: str = ""
    burned_in: str = ""
    sex: str | None = None
    age: float | None = None
    view: str | None = None


class Decoded(NamedTuple):
    """The pixels of one file.

    Attributes:
        pixels: (H, W), uint8 or uint16 over their whole range, or float32 in [0, 1] (DICOM); bone bright.
        valid: (H, W) bool, False on padding and what the file declares as not measured; None where all is valid.
        spacing: (row, column) pixel pitch in mm, or None.
        about: What the file says of itself.
    """

    pixels: NDArray[Any]
    valid: NDArray[np.bool_] | None
    spacing: tuple[float, float] | None
    about: About


def full_scale(pixels: NDArray[Any]) -> float:
    """The value that stands for white: 255, 65535 or 1."""
    return 1.0 if pixels.dtype.kind == "f" else float(np.iinfo(pixels.dtype).max)


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises: DataError: it cannot be read, or it is empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error
    if not data:
        raise DataError(f"{path} is empty (0 bytes); copy it again")
    return data


def decode_file(path: Path) -> Decoded:
    """Decode a file; see ``decode_bytes``."""
    return decode_bytes(read_bytes(path), path)


def decode_bytes(data: bytes, path: Path) -> Decoded:
    """Decode a radiograph.

    PNG, JPEG and TIFF of 8 or 16 bits keep their values; colour is reduced to luminance. Where alpha is 0 there is no
    pixel; elsewhere alpha is ignored. DICOM: see ``otcxr.data.dicom``. Rows and columns at the border that are entirely
    black or entirely white are padding.

    Args:
        data: The file's content.
        path: Its name, for messages and for its suffix.
    Raises: DataError: cut short, of another format, too large, or it shows nothing: no pixel is valid or all that are
        stated to be pixels are equal.
    """
    spacing = None
    if is_dicom(data) or path.suffix.lower() in (".dcm", ".dicom"):
        from otcxr.data.dicom import decode_dicom

        pixels, valid, spacing, about = decode_dicom(data, str(path))
    else:
        pixels, valid, about = _decode(data, path)
    if valid is not None and not valid.any():
        raise DataError(f"{path} holds no picture: every pixel is transparent or declared padding; leave it out")
    low, high, *_ = cv2.minMaxLoc(pixels, None if valid is None else valid.view(np.uint8))
    if low == high:
        raise DataError(f"{path} holds no picture: every pixel is {high / full_scale(pixels):.3f}; leave it out")
    inside = inside_border(pixels)
    if inside != (slice(0, pixels.shape[0]), slice(0, pixels.shape[1])):
        within = np.zeros(pixels.shape, dtype=np.bool_)
        within[inside] = True
        valid = within if valid is None else valid & within
    if valid is not None:
        if not valid.any():
            raise DataError(f"{path} holds no picture: its rows or columns are all black or white; leave it out")
        valid = None if valid.all() else valid
    return Decoded(pixels, valid, spacing, about)


def is_dicom(data: bytes) -> bool:
    """Whether the bytes start as a DICOM file does (128 bytes preamble, then DICM)."""
    return data[128:132] == b"DICM"


def refuse_size(height: int, width: int, where: object) -> None:
    """Raise DataError for a size that no radiograph has, before memory is taken for it."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DataError(f"{where} states {height} x {width} pixels; expected 1 to {MAX_PIXELS:,} of them: its header "
                        "is damaged, or it is no radiograph; leave it out")  # fmt: skip


def inside_border(image: NDArray[Any], tolerance: float = 2 / 255) -> tuple[slice, slice]:
    """Rows and columns without those at the border that are black (or white) from end to end, within ``tolerance``.

    Args:
        image: (H, W), float32 in [0, 1] or whole numbers over their whole range.
        tolerance: Share of the range.
    Returns: Slices of rows and columns; both are empty where every row or every column is blank.
    """
    black, white = tolerance * full_scale(image), (1 - tolerance) * full_scale(image)

    def blank(line: NDArray[Any]) -> bool:
        if black < line[len(line) // 2] < white:  # says it for most lines without reading the others
            return False
        return bool(line.max() <= black or line.min() >= white)

    found = []
    for lines in (image, image.T):
        # from outside to the first line that shows something: most pictures are done after four lines
        first = next((k for k in range(len(lines)) if not blank(lines[k])), None)
        if first is None:
            return slice(0, 0), slice(0, 0)
        found.append(slice(first, next(k for k in range(len(lines), first, -1) if not blank(lines[k - 1]))))
    return found[0], found[1]


def _decode(data: bytes, path: Path) -> tuple[NDArray[Any], NDArray[np.bool_] | None, About]:
    # OpenCV fills the missing part of a cut PNG or JPEG with grey and says nothing, and takes gigabytes and seconds for
    # a chunk whose length is damaged, so both are checked here; a cut TIFF it refuses.
    size: tuple[int, int] | None
    tags: dict[int, list[int]] = {}
    if data.startswith(png.START):
        fault = png.fault(data)
        if fault:
            raise DataError(f"{path} is a PNG that is {fault} ({len(data)} bytes); copy it again")
        kind, size = "PNG", png.header(data)[:2]
    elif data.startswith(b"\xff\xd8"):
        if not _jpeg_ends(data):
            raise DataError(f"{path} is a JPEG that is cut short ({len(data)} bytes, no end marker); copy it again")
        kind, size = "JPEG", jpeg_size(data)
    elif data.startswith(_TIFF_STARTS):
        kind, tags = "TIFF", _tiff_tags(data)
        if not _tiff_ends(data, tags):
            raise DataError(f"{path} is a TIFF that is cut short ({len(data)} bytes); copy it again")
        size = (tags[256][0], tags[257][0]) if 256 in tags and 257 in tags else None
    else:
        raise DataError(f"{path} is neither PNG, JPEG, TIFF nor DICOM (starts with {data[:8]!r}); convert it")
    if size is None:
        raise DataError(f"{path} states no size in its header: it is damaged; copy it again")
    refuse_size(size[1], size[0], path)
    content = png.inflated(data) if kind == "PNG" else data
    if content is None:
        raise DataError(f"{path} cannot be decoded: its data are damaged; copy it again")
    logging = cv2.utils.logging
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)  # it writes to standard error what is said below
    try:
        array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise DataError(f"{path} cannot be decoded: {error.err or error}; reduce it or copy it again") from error
    finally:
        logging.setLogLevel(level)
    if array is None:
        raise DataError(f"{path} cannot be decoded: its data are damaged; copy it again")
    if array.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path} has pixels of type {array.dtype}; expected 8- or 16-bit integers")
    if tags.get(262) == [0] and array.dtype == np.uint16:  # white is zero; of 8 bits OpenCV turns it itself
        array = np.uint16(65535) - array
    colour = "grey" if array.ndim == 2 else {2: "grey, alpha", 3: "colour", 4: "colour, alpha"}.get(array.shape[2], "")
    about = About(kind, kind, colour, 8 * array.dtype.itemsize)
    valid = None
    if array.ndim == 3 and array.shape[2] in (2, 4):
        valid = array[..., -1] > 0
        array = array[..., :-1]
    if array.ndim == 3 and array.shape[2] == 3:
        array = cv2.cvtColor(np.ascontiguousarray(array), cv2.COLOR_BGR2GRAY)
    elif array.ndim == 3:
        array = array[..., 0]
    return np.ascontiguousarray(array), valid, about


def _jpeg_ends(data: bytes) -> bool:
    """Whether the end marker follows the start of the scan: one in an embedded thumbnail is not the picture's."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return data.rfind(b"\xff\xd9", max(at, len(data) - 1024)) >= 0
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that the frame header of a JPEG (markers C0 to CF but for C4, C8, CC) or JPEG-LS (F7) states."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


# width, height, what 0 stands for, where strips or tiles begin and how long they are
_TIFF_TAGS = (256, 257, 262, 273, 279, 324, 325)


def _tiff_tags(data: bytes) -> dict[int, list[int]]:
    """Tag -> values of the first directory; nothing where it is damaged."""
    order = "<" if data[:2] == b"II" else ">"
    found: dict[int, list[int]] = {}
    try:
        (at,) = struct.unpack_from(f"{order}I", data, 4)
        (entries,) = struct.unpack_from(f"{order}H", data, at)
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", data, entry)
            if tag in _TIFF_TAGS and kind in (3, 4) and count <= len(data):
                size = count * (2 if kind == 3 else 4)
                (place,) = (entry + 8,) if size <= 4 else struct.unpack_from(f"{order}I", data, entry + 8)
                found[tag] = list(struct.unpack_from(f"{order}{count}{'H' if kind == 3 else 'I'}", data, place))
    except struct.error:
        return {}
    return {tag: values for tag, values in found.items() if values}


def _tiff_ends(data: bytes, tags: dict[int, list[int]]) -> bool:
    """Whether every strip or tile ends inside the file: libtiff does not miss the last bytes of some."""
    parts = [(tags.get(273, []), tags.get(279, [])), (tags.get(324, []), tags.get(325, []))]
    return all(
        len(starts) == len(lengths) and all(a + n <= len(data) for a, n in zip(starts, lengths, strict=True))
        for starts, lengths in parts
    )
