"""DICOM radiographs to grey values in [0, 1], bone bright.

Order of the standard's grey-scale pipeline (PS3.4 annex N): stored values -> modality LUT -> VOI LUT or window ->
presentation (inverted for MONOCHROME1 or PresentationLUTShape INVERSE).
"""

from __future__ import annotations

import logging
import re
import struct
import threading
import warnings
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from otcxr.data.decode import About, jpeg_size, refuse_size
from otcxr.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["Header", "decode_dicom", "read_header", "window_pixels"]

_log = logging.getLogger(__name__)


class Header(NamedTuple):
    """Who and what a DICOM file is of; None where it does not say.

    Attributes:
        patient: PatientID, with IssuerOfPatientID before it where there is one: numbers of two hospitals differ.
        study: StudyInstanceUID.
        sex: "M" or "F".
        age: Years, from PatientAge or the dates of birth and study; above 120 it is unknown.
        view: "PA", "AP" or "LATERAL".
        spacing: (row, column) in mm, in the patient where the file knows the magnification.
    """

    patient: str | None
    study: str | None
    sex: str | None
    age: float | None
    view: str | None
    spacing: tuple[float, float] | None


def decode_dicom(
    data: bytes, where: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None, tuple[float, float] | None, About]:
    """Decode a single-frame grey radiograph.

    Scaling: VOI LUT sequence, else the first window (VOILUTFunction honoured), else the stated bits of an unsigned
    image of at most 8 bits that no modality LUT changes, else the 0.5 and 99.5 percentile of what is not padding
    (logged: such an image has no defined display). All of it is computed for each stored value once and looked up.

    Args:
        data: The file.
        where: Its name, for messages.
    Returns: Grey values (H, W) float32 in [0, 1]; validity (H, W), False on the stated pixel padding, under a shutter
        and outside a collimator, None where all is valid; spacing (row, column) in mm or None; what the file says.
    Raises: DataError: not DICOM, not a projection radiograph, no pixels, colour, several frames, or pixels that cannot
        be decoded.
    """
    import pydicom

    # pydicom warns about every small departure from the standard; what matters is checked below
    with _NO_WARNINGS:
        try:
            dataset = pydicom.dcmread(BytesIO(data), force=False)
        except Exception as error:
            raise DataError(
                f"{where} is not a readable DICOM file: {_line(error)}; copy it again or convert it"
            ) from error
        try:
            return *_decode(dataset, where), _about(dataset)
        except DataError:
            raise
        except Exception as error:  # decoders raise many types; the file is at fault in all of them
            raise DataError(
                f"{where}: pixels cannot be decoded: {_line(error)}; copy it again or convert it"
            ) from error


def read_header(path: Path) -> Header:
    """Read who and what a DICOM file is of, without its pixels.

    Raises: DataError: not a readable DICOM file.
    """
    import pydicom

    with _NO_WARNINGS:
        try:
            with path.open("rb") as file:
                dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS))
            return _header(dataset)
        except Exception as error:
            raise DataError(
                f"{path} is not a readable DICOM file: {_line(error)}; copy it again or convert it"
            ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]  # pydicom lists its decoders over several lines


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


_HEADER_TAGS = (
    "PatientID", "IssuerOfPatientID", "StudyInstanceUID", "PatientSex", "PatientAge", "PatientBirthDate", "StudyDate",
    "ViewPosition", "SeriesDescription", "PixelSpacing", "ImagerPixelSpacing",
    "EstimatedRadiographicMagnificationFactor",
)  # fmt: skip


def _header(dataset: Dataset) -> Header:
    patient, issuer = (_text(dataset.get(name)) for name in ("PatientID", "IssuerOfPatientID"))
    sex = _text(dataset.get("PatientSex")).upper()[:1]
    return Header(
        patient=(f"{issuer}|{patient}" if issuer else patient) if patient else None,
        study=_text(dataset.get("StudyInstanceUID")) or None,
        sex=sex if sex in ("M", "F") else None,
        age=_age(dataset),
        view=_view(dataset),
        spacing=_spacing(dataset),
    )


def _text(value: Any) -> str:
    """A value as one line: a damaged header may hold anything."""
    return "" if value is None else "".join(c if c.isprintable() else " " for c in str(value)).strip()[:256]


def _age(dataset: Dataset) -> float | None:
    """PatientAge as PS3.5 writes it (058Y, 018M, 003W, 010D) and without a unit (years); else from two dates."""
    match = re.fullmatch(r"(\d{1,3})([YMWD]?)", _text(dataset.get("PatientAge")).upper())
    if match:
        years = int(match[1]) / {"M": 12, "W": 52.18, "D": 365.25}.get(match[2], 1)
        # 0 without a unit, or with years, is how many archives write that they do not know
        return years if years <= 120 and (years > 0 or (match[2] in "MWD" and match[2])) else None
    born, taken = (_text(dataset.get(name))[:8] for name in ("PatientBirthDate", "StudyDate"))
    try:
        days = (date.fromisoformat(taken) - date.fromisoformat(born)).days
    except ValueError:
        return None
    return days / 365.25 if 0 <= days <= 120 * 365.25 else None


def _view(dataset: Dataset) -> str | None:
    """ViewPosition; where that is empty, what the series is called, if it names one projection and no other."""
    stated = _text(dataset.get("ViewPosition")).upper()
    if stated:
        return {"PA": "PA", "AP": "AP", "LL": "LATERAL", "RL": "LATERAL", "LATERAL": "LATERAL", "LAT": "LATERAL",
                "LLD": None, "RLD": None}.get(stated)  # fmt: skip
    words = set(re.findall(r"[A-Z]+", _text(dataset.get("SeriesDescription")).upper()))
    named = {view for view, of in _VIEW_WORDS.items() if words & of}
    return named.pop() if len(named) == 1 else None


_VIEW_WORDS = {"PA": {"PA"}, "AP": {"AP"}, "LATERAL": {"LAT", "LATERAL", "LL", "RL"}}


def _about(dataset: Dataset) -> About:
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    kind, header = dataset.get("SOPClassUID"), _header(dataset)
    return About(
        "DICOM", "" if syntax is None else str(syntax.name), _text(dataset.get("PhotometricInterpretation")),
        int(dataset.get("BitsStored", 0) or 0), _text(dataset.get("Modality")),
        _text(dataset.get("BodyPartExamined")).upper(), _text(dataset.get("ViewPosition")).upper(),
        "" if kind is None else str(kind.name), _text(dataset.get("BurnedInAnnotation")).upper(),
        header.sex, header.age, header.view,
    )  # fmt: skip


def _decode(
    dataset: Dataset, where: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None, tuple[float, float] | None]:
    if "PixelData" not in dataset:
        kind = _text(dataset.get("SOPClassUID", "unknown"))
        raise DataError(f"{where} has no pixels or is cut short (SOP class {kind}); leave it out or copy it again")
    photometric = _text(dataset.get("PhotometricInterpretation"))
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(
            f"{where} has {frames} frame(s) and photometric interpretation '{photometric}'; "
            "expected one frame of MONOCHROME1 or MONOCHROME2: convert it or leave it out"
        )
    refuse_size(int(dataset.Rows), int(dataset.Columns), where)
    _refuse_other_size(dataset, where)
    if str(dataset.file_meta.TransferSyntaxUID).startswith("1.2.840.10008.1.2.4.9"):
        # JPEG 2000: GDCM, which pydicom asks first, ends the process where a header does not fit its picture
        dataset.pixel_array_options(decoding_plugin="pylibjpeg")
    stored = dataset.pixel_array
    if stored.ndim != 2 or stored.dtype.kind not in "iu":
        raise DataError(f"{where} has pixels of shape {stored.shape} and type {stored.dtype}; expected rows and "
                        "columns of whole grey values")  # fmt: skip
    stored = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("="))
    padding = _padding(dataset, stored)
    scaled = window_pixels(stored, padding, dataset, where)
    valid = _open(dataset, stored.shape)
    if padding is not None:
        valid = ~padding if valid is None else valid & ~padding
    return scaled, valid, _spacing(dataset)


def _refuse_other_size(dataset: Dataset, where: str) -> None:
    """Raise DataError where a compressed picture has another size than the header says: GDCM ends the process there."""
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    from pydicom.encaps import get_frame

    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    size = None
    if frame.startswith(b"\xff\xd8"):
        size = jpeg_size(frame)
    elif frame.startswith(b"\xff\x4f\xff\x51") and len(frame) >= 24:  # JPEG 2000: extent and offset of the grid
        right, lower, left, upper = struct.unpack(">4I", frame[8:24])
        size = right - left, lower - upper
    if size is not None and size != (int(dataset.Columns), int(dataset.Rows)):
        raise DataError(f"{where} states {dataset.Rows} x {dataset.Columns} pixels, its compressed picture has "
                        f"{size[1]} x {size[0]}; copy it again or convert it")  # fmt: skip


def window_pixels(
    stored: NDArray[Any], padding: NDArray[np.bool_] | None, dataset: Dataset, where: str
) -> NDArray[np.float32]:
    """Grey values: the standard's pipeline for every stored value that occurs between the lowest and the highest."""
    low, high = int(stored.min()), int(stored.max())
    first = low
    if stored.dtype.itemsize > 2:
        if high - low >= 2**16:
            raise DataError(f"{where} has pixels from {low} to {high}: more than 16 bits; export it with 16 bits")
        stored, first = (stored.astype(np.int64) - low).astype(np.uint16), 0
    table = np.arange(low, high + 1, dtype=np.int64)
    values = _modality(table, dataset)
    if dataset.get("VOILUTSequence"):
        scaled = _look_up(values, dataset.VOILUTSequence[0])
        scaled /= 2.0 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
    else:
        seen = stored if padding is None else stored[~padding]
        counts = (
            np.bincount(seen.ravel().astype(np.int64) - first, minlength=len(table)) if _no_window(dataset) else None
        )
        scaled = _window(values, table, counts, dataset, where)
    inverse = str(dataset.get("PresentationLUTShape", "")) == "INVERSE"
    if str(dataset.PhotometricInterpretation) == "MONOCHROME1" or inverse:
        scaled = 1.0 - scaled
    grey = np.zeros(256**stored.dtype.itemsize, dtype=np.float32)
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")
    grey[np.arange(first, first + len(table)) % len(grey)] = np.clip(scaled, 0.0, 1.0)
    return np.asarray(cv2.LUT(stored.view(unsigned), grey[None]), dtype=np.float32)


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


def _no_window(dataset: Dataset) -> bool:
    width = _first(dataset.get("WindowWidth"))
    return _first(dataset.get("WindowCenter")) is None or width is None or not width > 0


def _window(
    values: NDArray[np.float64], stored: NDArray[np.int64], counts: NDArray[np.int64] | None, dataset: Dataset,
    where: str,
) -> NDArray[np.float64]:  # fmt: skip
    """Scale modality values to [0, 1] by window, stated bits or percentiles (PS3.3 C.11.2.1).

    Args:
        values: Modality value of each stored value.
        stored: These stored values.
        counts: How many pixels have each of them and are no padding; needed where there is no window.
    """
    if counts is None:
        center, width = _first(dataset.get("WindowCenter")) or 0.0, _first(dataset.get("WindowWidth")) or 1.0
        function = str(dataset.get("VOILUTFunction", "LINEAR") or "LINEAR").upper()
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
    low, high = (_percentile(values, counts, share) for share in (0.005, 0.995)) if counts.any() else (0.0, 0.0)
    if high <= low:
        raise DataError(f"{where} has no window and nearly constant pixels: it cannot be scaled; leave it out")
    _log.info("%s has no window: scaled by its 0.5 and 99.5 percentile (%g, %g)", where, low, high)
    return (values - low) / (high - low)


def _percentile(values: NDArray[np.float64], counts: NDArray[np.int64], share: float) -> float:
    """The percentile of values that occur ``counts`` times, between neighbours as numpy's default has it."""
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(counts[order])
    place = share * (int(upto[-1]) - 1)
    ranks = int(place), min(int(place) + 1, int(upto[-1]) - 1)
    below, above = (float(values[order[np.searchsorted(upto, rank, "right")]]) for rank in ranks)
    return below + (place - ranks[0]) * (above - below)


def _padding(dataset: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Where the file declares padding: PixelPaddingValue up to PixelPaddingRangeLimit, in stored values."""
    if "PixelPaddingValue" not in dataset:
        return None
    low = int(dataset.PixelPaddingValue)
    high = int(dataset.get("PixelPaddingRangeLimit", low))
    if stored.dtype.kind == "i":  # stated as unsigned for values that are signed
        bits = 8 * stored.dtype.itemsize
        low, high = (value - 2**bits if value >= 2 ** (bits - 1) else value for value in (low, high))
    return (stored >= min(low, high)) & (stored <= max(low, high))


def _open(dataset: Dataset, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """What neither a display shutter (PS3.3 C.7.6.11) nor a collimator (C.8.7.3) covers; None where there is none.

    Edges are the first row or column that is hidden; several shapes hide together.
    """
    seen: NDArray[np.bool_] | None = None
    height, width = shape
    for kind in ("Shutter", "Collimator"):
        shapes = dataset.get(f"{kind}Shape")
        for name in [shapes] if isinstance(shapes, str) else list(shapes or ()):
            part = np.zeros(shape, dtype=np.uint8)
            if name == "RECTANGULAR":
                left, right, upper, lower = (
                    int(dataset[f"{kind}{side}Edge"].value)
                    for side in ("LeftVertical", "RightVertical", "UpperHorizontal", "LowerHorizontal")
                )
                part[max(upper, 0) : max(lower - 1, 0), max(left, 0) : max(right - 1, 0)] = 1
            elif name == "CIRCULAR":
                row, column = (int(v) for v in dataset[f"CenterOfCircular{kind}"].value)
                radius = int(dataset[f"RadiusOfCircular{kind}"].value)
                rows, columns = np.ogrid[1 : height + 1, 1 : width + 1]
                part[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = 1
            elif name == "POLYGONAL":
                corners = [int(v) for v in dataset[f"VerticesOfThePolygonal{kind}"].value]
                points = np.array([(x - 1, y - 1) for y, x in zip(corners[::2], corners[1::2], strict=True)], np.int32)
                cv2.fillPoly(part, [points], 1)
            else:
                continue  # BITMAP: an overlay, which is display and not measurement
            seen = part > 0 if seen is None else seen & (part > 0)
    return seen if seen is None or seen.any() else None  # all hidden: the tags are nonsense, the pixels may not be


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    """PixelSpacing; else ImagerPixelSpacing over the magnification; without either nothing is known in mm."""
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        pair = dataset.get(name)
        if pair is not None and len(pair) == 2 and min(float(pair[0]), float(pair[1])) > 0:
            factor = _first(dataset.get("EstimatedRadiographicMagnificationFactor")) or 1.0
            factor = factor if name == "ImagerPixelSpacing" and factor > 0 else 1.0
            return float(pair[0]) / factor, float(pair[1]) / factor
    return None
