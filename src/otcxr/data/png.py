"""What a PNG says of itself, whether it is whole, and its data inflated ahead of the decoder.

Most of the time that OpenCV takes for a PNG goes into zlib, and ISA-L inflates faster: ``inflated`` puts what it finds
into a PNG whose data are stored instead of compressed, which OpenCV then only has to unfilter. What packing gains by it
is measured by ``benchmarks/bench_data.py``. Format: ISO/IEC 15948:2004; RFC 1950 and 1951 for the data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from isal import isal_zlib

from otcxr.errors import DataError

__all__ = ["START", "PngHeader", "fault", "header", "inflated", "png_size"]

START = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples of a pixel
_BLOCK = 65535  # bytes of a stored block


class PngHeader(NamedTuple):
    """IHDR; ``row_bytes`` counts a row with the byte that names its filter, 0 for a colour type that does not exist."""

    width: int
    height: int
    row_bytes: int
    interlaced: bool


def header(data: bytes) -> PngHeader:
    """Read IHDR of a PNG without ``fault``."""
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    bits = depth * _CHANNELS.get(colour, 0)
    return PngHeader(width, height, (1 + -(-width * bits // 8)) if bits else 0, interlace != 0)


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
    if not head.startswith(START):
        raise DataError(f"{path} is not a PNG (starts with {head[:8]!r}); convert it")
    width, height = struct.unpack(">II", head[16:24])
    return height, width


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of every chunk that is there from end to end."""
    at = len(START)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield data[at + 4 : at + 8], at, end
        at = end


def fault(data: bytes) -> str | None:
    """What is wrong with the chunks of a PNG: cut short, damaged (a checksum disagrees) or None."""
    if data[12:16] != b"IHDR":
        return "damaged"
    view = memoryview(data)
    for kind, start, end in _chunks(data):
        if isal_zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return "damaged"
        if kind == b"IEND":
            return None
    return "cut short"


def inflated(data: bytes) -> bytes | None:
    """The same PNG with its data stored, not compressed; itself where it is interlaced or of an unknown kind.

    Args: data: A PNG without ``fault`` whose size has been found plausible.
    Returns: None where the data are damaged, or fewer than the header states.
    """
    head = header(data)
    if head.interlaced or not head.row_bytes:
        return data
    view = memoryview(data)
    before, packed, after = [view[: len(START)]], list[memoryview](), list[memoryview]()
    for kind, start, end in _chunks(data):
        if kind == b"IDAT":
            packed.append(view[start + 8 : end - 4])
        else:
            (after if packed else before).append(view[start:end])
        if kind == b"IEND":
            break
    expected = head.height * head.row_bytes
    try:  # one byte more than is needed: the checksum at the end is then read, too
        raw = memoryview(isal_zlib.decompressobj().decompress(b"".join(packed), expected + 1))[:expected]
    except isal_zlib.error:  # type: ignore[misc]  # its stub says an instance
        return None
    if len(raw) < expected:
        return None
    stored: list[bytes | memoryview] = [b"IDAT\x78\x01"]
    for start in range(0, expected, _BLOCK):
        block = raw[start : start + _BLOCK]
        stored += [struct.pack("<BHH", start + _BLOCK >= expected, len(block), len(block) ^ 0xFFFF), block]
    stored.append(isal_zlib.adler32(raw).to_bytes(4, "big"))
    chunk = b"".join(stored)
    length, checksum = (len(chunk) - 4).to_bytes(4, "big"), isal_zlib.crc32(chunk).to_bytes(4, "big")
    return b"".join([*before, length, chunk, checksum, *after])
