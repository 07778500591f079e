"""DICOM radiographs to grey values in [0, 1], bone bright.

Order of the standard's grey-scale pipeline (PS3.4 annex N): stored values -> modality LUT -> VOI LUT or window ->
presentation (inverted for MONOCHROME1 or PresentationLUTShape INVERSE).
"""

from __future__ import annotations

import logging
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

    Scaling: VOI LUT sequence, else the first window (VOILUTFunction honoured), else the stated bits of an 8-bit image,
    else the 0.5 and 99.5 percentile (logged: such an image has no defined display).

    Args:
        data: The file.
        where: Its name, for messages.
    Returns: Grey values (H, W) float32 in [0, 1]; validity (H, W), False on the stated pixel padding; spacing (row,
        column) in mm or None.
    Raises: DataError: not DICOM, no pixels, colour, several frames, or pixels that cannot be decoded.
    """
    import pydicom
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    with warnings.catch_warnings():
        # pydicom warns about every small departure from the standard; what matters is checked below
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(BytesIO(data), force=False)
        except Exception as error:
            raise DataError(f"{where} is not a readable DICOM file: {error}") from error
        if "PixelData" not in dataset:
            raise DataError(f"{where} has no pixels (SOP class {dataset.get('SOPClassUID', 'unknown')})")
        photometric = str(dataset.get("PhotometricInterpretation", ""))
        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        if frames != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise DataError(
                f"{where} has {frames} frame(s) and photometric interpretation '{photometric}'; "
                "expected one frame of MONOCHROME1 or MONOCHROME2"
            )
        try:
            stored = dataset.pixel_array
            padding = _padding(dataset, stored)
            values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
            if dataset.get("VOILUTSequence"):
                looked_up = np.asarray(apply_voi(values.astype(stored.dtype), dataset), dtype=np.float64)
                scaled = looked_up / (2.0 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1)
            else:
                scaled = _window(values, dataset, where)
        except DataError:
            raise
        except Exception as error:  # decoders raise many types; the file is at fault in all of them
            raise DataError(f"{where}: pixels cannot be decoded: {error}") from error
    if photometric == "MONOCHROME1" or str(dataset.get("PresentationLUTShape", "")) == "INVERSE":
        scaled = 1.0 - scaled
    return np.clip(scaled, 0.0, 1.0).astype(np.float32), ~padding, _spacing(dataset)


def _window(values: NDArray[np.float64], dataset: Dataset, where: str) -> NDArray[np.float64]:
    """Scale modality values to [0, 1] by window, stated bits or percentiles (PS3.3 C.11.2.1)."""
    center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    function = str(dataset.get("VOILUTFunction", "LINEAR") or "LINEAR").upper()
    if center is not None and width is not None and width > 0:
        if function == "SIGMOID":
            sigmoid: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-4.0 * (values - center) / width))
            return sigmoid
        if function == "LINEAR_EXACT":
            return (values - center) / width + 0.5
        linear: NDArray[np.float64] = (values - (center - 0.5)) / max(width - 1.0, 1e-6) + 0.5
        return linear
    bits = int(dataset.get("BitsStored", 16))
    if bits <= 8 and int(dataset.get("PixelRepresentation", 0)) == 0 and "RescaleSlope" not in dataset:
        return values / (2.0**bits - 1)
    low, high = np.percentile(values, (0.5, 99.5))
    if high <= low:
        raise DataError(f"{where} has no window and nearly constant pixels: it cannot be scaled")
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
