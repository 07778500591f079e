"""One file to what a pack keeps of it: a reduced picture, its validity, masks, and what tells pictures apart.

Runs in worker processes; nothing here needs torch, unless the picture is computed (a phantom).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from otcxr.data.decode import About, Decoded, decode_bytes, full_scale, read_bytes
from otcxr.data.records import ImageRef
from otcxr.errors import DataError
from otcxr.packing.burned import LEAST, longest_line
from otcxr.packing.frontal import unlike_frontal

__all__ = ["Reduced", "Task", "perceptual_hash", "reduce_image", "reduce_pixels", "thumbnail"]

_SQUARE = 0.01  # pixels whose sides differ by less are taken as square
_RADIOGRAPHS = ("CR", "DX", "RG", "XC", "SC", "OT", "")  # modalities that may be a radiograph; XC and OT: photographed


class Task(NamedTuple):
    """One record's picture: where it is, its masks, the pitch that its table states, and how it is kept."""

    image: ImageRef
    masks: Mapping[str, ImageRef]
    spacing: tuple[float, float] | None
    view: str | None
    size: int
    bits: int


class Reduced(NamedTuple):
    """What is kept.

    Attributes:
        pixels: (height, width), uint8 or uint16.
        valid: Packed bits, or None where all is valid.
        valid_share: Share of valid pixels.
        masks: Name -> packed bits.
        spacing: (row, column) in mm after the reduction, or None.
        source: (height, width) of the file.
        digest: SHA-256 of type, shape, pixels and validity, its first 16 bytes.
        phash: Perceptual hash, 32 bytes.
        flags: What a human should look at.
        about: What the file says of itself.
    """

    pixels: NDArray[Any]
    valid: NDArray[np.uint8] | None
    valid_share: float
    masks: dict[str, NDArray[np.uint8]]
    spacing: tuple[float, float] | None
    source: tuple[int, int]
    digest: bytes
    phash: bytes
    flags: tuple[str, ...]
    about: About


def reduce_image(task: Task) -> Reduced:
    """Read, reduce, look.

    Raises: DataError: the picture cannot be used.
    """
    decoded = _decoded(task.image)
    spacing = decoded.spacing or task.spacing
    shape = target_shape(decoded.pixels.shape, spacing, task.size)
    pixels = reduce_pixels(decoded.pixels, shape, task.bits)
    valid = None
    if decoded.valid is not None:
        # a pixel that is partly padding is darker than what it shows: only whole ones are valid
        share = cv2.resize(decoded.valid.astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA)
        valid = share > 0.999
        if not valid.any():
            raise DataError(f"{task.image} shows too little: no pixel of {shape[0]} x {shape[1]} is wholly valid; "
                            "leave it out")  # fmt: skip
    bits = None if valid is None else np.packbits(valid)
    height, width = decoded.pixels.shape
    scale = height / shape[0], width / shape[1]
    return Reduced(
        pixels=pixels, valid=bits, valid_share=1.0 if valid is None else float(valid.mean()),
        masks={name: np.packbits(_mask(mask, shape)) for name, mask in task.masks.items()},
        spacing=None if spacing is None else (spacing[0] * scale[0], spacing[1] * scale[1]),
        source=(height, width), digest=_digest(pixels, bits), phash=perceptual_hash(pixels),
        flags=_flags(pixels, decoded.about, task.view), about=decoded.about,
    )  # fmt: skip


def target_shape(shape: tuple[int, ...], spacing: tuple[float, float] | None, size: int) -> tuple[int, int]:
    """(height, width) with square pixels and a short side of ``size``; never more pixels than there are.

    Pixels that are not square (spacing) become square, by making the finer direction as coarse as the other.
    """
    tall, wide = shape[0], shape[1]
    if spacing is not None and abs(spacing[0] / spacing[1] - 1) > _SQUARE:
        coarse = max(spacing)
        tall, wide = (max(1, round(n * pitch / coarse)) for n, pitch in zip(shape, spacing, strict=False))
    shrink = min(1.0, size / min(tall, wide))
    return max(1, round(tall * shrink)), max(1, round(wide * shrink))


def reduce_pixels(pixels: NDArray[Any], shape: tuple[int, int], bits: int) -> NDArray[Any]:
    """Area average, then rounded to 8 or 16 bits; whole numbers of the wanted type are averaged as they are."""
    wanted = np.uint8 if bits == 8 else np.uint16
    if pixels.dtype == wanted:
        if pixels.shape == shape:
            return np.ascontiguousarray(pixels)
        return np.asarray(cv2.resize(pixels, shape[::-1], interpolation=cv2.INTER_AREA), dtype=wanted)
    wide = pixels.astype(np.float32)
    if pixels.shape != shape:
        wide = np.asarray(cv2.resize(wide, shape[::-1], interpolation=cv2.INTER_AREA), dtype=np.float32)
    top = float(np.iinfo(wanted).max)
    rounded: NDArray[Any] = np.clip(np.rint(wide * np.float32(top / full_scale(pixels))), 0, top).astype(wanted)
    return rounded


def thumbnail(image: ImageRef, side: int = 96) -> bytes | None:
    """A small PNG of a file that was refused, as far as anything of it can be shown; None where nothing can."""
    if not isinstance(image, Path):
        return None
    try:
        data = np.frombuffer(read_bytes(image), np.uint8)
        pixels = cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_4)
        if pixels is None:
            import pydicom

            with image.open("rb") as file:
                pixels = np.asarray(pydicom.dcmread(file).pixel_array, dtype=np.float32)
            while pixels.ndim > 2 and pixels.shape[-1] not in (3, 4):
                pixels = pixels[0]  # the first frame
            pixels = pixels.mean(-1) if pixels.ndim == 3 else pixels
            spread = float(np.ptp(pixels)) or 1.0
            pixels = (255 * (pixels - pixels.min()) / spread).astype(np.uint8)
        shrink = side / max(pixels.shape)
        size = max(1, round(pixels.shape[1] * shrink)), max(1, round(pixels.shape[0] * shrink))
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if shrink < 1 else cv2.INTER_NEAREST)
        return bytes(cv2.imencode(".png", small)[1])
    except Exception:  # the file was refused already; a picture of it is a courtesy
        return None


def _decoded(image: ImageRef) -> Decoded:
    if isinstance(image, Path):
        return decode_bytes(read_bytes(image), image)
    radiograph = image.radiograph()
    valid = radiograph.valid[0].numpy()
    return Decoded(radiograph.image[0].numpy(), None if valid.all() else valid, radiograph.spacing, About("computed"))


def _mask(mask: ImageRef, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask at the size of its picture: at least half covered; one that would vanish keeps its most covered pixel."""
    from otcxr.data.masks import read_mask

    share = cv2.resize(read_mask(mask).astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA)
    inside: NDArray[np.bool_] = share >= 0.5
    if not inside.any() and share.max() > 0:
        inside.flat[int(share.argmax())] = True
    return inside


def _digest(pixels: NDArray[Any], valid: NDArray[np.uint8] | None) -> bytes:
    found = hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode())
    found.update(np.ascontiguousarray(pixels).data)
    if valid is not None:
        found.update(valid.data)
    return found.digest()[:16]


@cache
def _cosines() -> NDArray[np.float64]:
    """The 16 lowest rows of the cosine transform of 64 values (type II), (16, 64)."""
    from scipy.fft import dct

    return np.asarray(dct(np.eye(64), axis=0)[:16], dtype=np.float64)


def perceptual_hash(pixels: NDArray[Any]) -> bytes:
    """pHash of 256 bits (C. Zauner, 2010, as the library ImageHash has it), 32 bytes.

        x    the picture at 64 x 64, black 0, white 255
        c    lowest 16 x 16 coefficients of the cosine transform of x over both directions
        bit  c_ij > median of c

    A picture that is its own mirror image has coefficients that are zero but for rounding; they are rounded to 0.001
    so that the bits do not depend on the machine.

    Args: pixels: (H, W), uint8 or uint16.
    """
    small = cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_AREA)
    grey = small.astype(np.float64) * (255 / full_scale(small))
    low = np.round(_cosines() @ grey @ _cosines().T, 3).ravel()
    median = np.partition(low, (127, 128))[127:129].mean()  # several times as fast as np.median
    return np.packbits(low > median).tobytes()


def _flags(pixels: NDArray[Any], about: About, view: str | None) -> tuple[str, ...]:
    found = []
    if view == "LATERAL" or about.position in ("LL", "RL", "LATERAL", "LAT"):
        found.append("lateral by its header or table")
    if about.modality not in _RADIOGRAPHS:
        found.append(f"modality {about.modality}")
    if about.body_part and not any(word in about.body_part for word in ("CHEST", "THORA", "LUNG")):
        found.append(f"body part {about.body_part}"[:40])
    if about.burned_in == "YES":
        found.append("annotation burned in")
    if longest_line(pixels) >= LEAST:
        found.append("writing in the picture")
    if view != "LATERAL" and unlike_frontal(pixels):
        found.append("unlike a frontal chest radiograph")
    return tuple(found)
