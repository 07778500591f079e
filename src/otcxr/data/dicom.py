"""DICOM radiographs to grey values in [0, 1], bone bright.

Order of the standard's grey-scale pipeline (PS3.4 annex N): stored values -> modality LUT -> VOI LUT or window ->
presentation (inverted for MONOCHROME1 or PresentationLUTShape INVERSE).
"""

from __future__ import annotations

import logging
import threading
import warnings
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otcxr.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["decode_dicom"]

_log = logging.getLogger(__name__)


def decode_dicom(data: bytes, where: str) -> tuple[NDArray[np.float32], NDArray[np.bool_], tuple[float, float] | None]:
    """Decode a single-frame grey radiograph.

    Scaling: VOI LUT sequence, else the first window (VOILUTFunction honoured), else the stated bits of an unsigned
    image of at most 8 bits that no modality LUT changes, else the 0.5 and 99.5 percentile of what is not padding
    (logged: such an image has no defined display).

    Args:
        data: The file.
        where: Its name, for messages.
    Returns: Grey values (H, W) float32 in [0, 1]; validity (H, W), False on the stated pixel padding; spacing (row,
        column) in mm or None.
    Raises: DataError: not DICOM, no pixels, colour, several frames, or pixels that cannot be decoded.
    """
    import pydicom

    # pydicom warns about every small departure from the standard; what matters is checked below
    with _NO_WARNINGS:
        try:
            dataset = pydicom.dcmread(BytesIO(data), force=False)
        except Exception as error:
            raise DataError(f"{where} is not a readable DICOM file: {error}; copy it again or convert it") from error
        try:
            return _decode(dataset, where)
        except DataError:
            raise
        except Exception as error:  # decoders raise many types; the file is at fault in all of them
            reason = " ".join(str(error).split())  # pydicom lists its decoders over several lines
            raise DataError(f"{where}: pixels cannot be decoded: {reason}; copy it again or convert it") from error


class _NoWarnings:
    """Ignore warnings while any thread is inside; ``catch_warnings`` alone may restore another thread's filters."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


_NO_WARNINGS = _NoWarnings()


def _decode(dataset: Dataset, where: str) -> tuple[NDArray[np.float32], NDArray[np.bool_], tuple[float, float] | None]:
    if "PixelData" not in dataset:
        kind = dataset.get("SOPClassUID", "unknown")
        raise DataError(f"{where} has no pixels or is cut short (SOP class {kind}); leave it out or copy it again")
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(
            f"{where} has {frames} frame(s) and photometric interpretation '{photometric}'; "
            "expected one frame of MONOCHROME1 or MONOCHROME2: convert it or leave it out"
        )
    stored = dataset.pixel_array
    if stored.ndim != 2:
        raise DataError(f"{where} has pixels of shape {stored.shape}; expected rows and columns of grey values")
    padding = _padding(dataset, stored)
    values = _modality(stored, dataset)
    if dataset.get("VOILUTSequence"):
        scaled = _look_up(values, dataset.VOILUTSequence[0])
        scaled /= 2.0 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
    else:
        scaled = _window(values, padding, stored, dataset, where)
    if photometric == "MONOCHROME1" or str(dataset.get("PresentationLUTShape", "")) == "INVERSE":
        scaled = 1.0 - scaled
    return np.clip(scaled, 0.0, 1.0).astype(np.float32), ~padding, _spacing(dataset)


def _modality(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.float64]:
    """Stored values to modality values: table, else slope and intercept, else unchanged (PS3.3 C.11.1)."""
    if dataset.get("ModalityLUTSequence"):
        return _look_up(stored, dataset.ModalityLUTSequence[0])
    slope, intercept = _first(dataset.get("RescaleSlope")), _first(dataset.get("RescaleIntercept"))
    values: NDArray[np.float64] = stored * (1.0 if slope is None else slope) + (intercept or 0.0)
    return values


def _look_up(values: NDArray[Any], table: Dataset) -> NDArray[np.float64]:
    """Values through a table of PS3.3 C.11.1.1; those before its first and after its last entry take these.

    pydicom's own functions fail for tables of 12 bits and count the entries of an 8-bit table modulo 256.
    """
    entries, first = int(table.LUTDescriptor[0]) or 2**16, int(table.LUTDescriptor[1])
    if first >= 2**15 and values.min() < 0:
        first -= 2**16  # stated as unsigned for values that are signed
    content = table.LUTData
    if isinstance(content, bytes):
        order = ">" if table.original_encoding[1] is False else "<"
        content = np.frombuffer(content, np.uint8 if len(content) < 2 * entries else f"{order}u2")
    looked_up = np.asarray(content, dtype=np.float64)[:entries]
    if len(looked_up) < entries:
        raise ValueError(f"its look-up table has {len(looked_up)} of {entries} entries")
    result: NDArray[np.float64] = looked_up[np.clip(np.rint(values).astype(np.int64) - first, 0, entries - 1)]
    return result


def _window(
    values: NDArray[np.float64], padding: NDArray[np.bool_], stored: NDArray[Any], dataset: Dataset, where: str
) -> NDArray[np.float64]:
    """Scale modality values to [0, 1] by window, stated bits or percentiles (PS3.3 C.11.2.1)."""
    center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    function = str(dataset.get("VOILUTFunction", "LINEAR") or "LINEAR").upper()
    if center is not None and width is not None and width > 0:
        if function == "SIGMOID":
            sigmoid: NDArray[np.float64] = 1.0 / (1.0 + np.exp(np.minimum(-4.0 * (values - center) / width, 700.0)))
            return sigmoid
        if function == "LINEAR_EXACT":
            return (values - center) / width + 0.5
        linear: NDArray[np.float64] = (values - (center - 0.5)) / max(width - 1.0, 1e-6) + 0.5
        return linear
    bits = int(dataset.get("BitsStored", 16))
    if bits <= 8 and int(dataset.get("PixelRepresentation", 0)) == 0 and np.array_equal(values, stored):
        return values / (2.0**bits - 1)
    low, high = np.percentile(values[~padding], (0.5, 99.5)) if not padding.all() else (0.0, 0.0)
    if high <= low:
        raise DataError(f"{where} has no window and nearly constant pixels: it cannot be scaled; leave it out")
    _log.info("%s has no window: scaled by its 0.5 and 99.5 percentile (%g, %g)", where, low, high)
    return (values - low) / (high - low)


def _padding(dataset: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_]:
    """Where the file declares padding: PixelPaddingValue up to PixelPaddingRangeLimit, in stored values."""
    if "PixelPaddingValue" not in dataset:
        return np.zeros(stored.shape, dtype=np.bool_)
    low = int(dataset.PixelPaddingValue)
    high = int(dataset.get("PixelPaddingRangeLimit", low))
    return (stored >= min(low, high)) & (stored <= max(low, high))


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        pair = dataset.get(name)
        if pair is not None and len(pair) == 2:
            return float(pair[0]), float(pair[1])
    return None
