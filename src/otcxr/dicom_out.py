"""Heat maps as DICOM that opens beside the radiograph: Secondary Capture and Segmentation (highdicom, extra ``dicom``).

Both carry the patient, study and accession of the source and new identifiers of series and instance; patient names are
copied, so the files are as confidential as their source. Neither is meant for diagnosis, and both say so.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otcxr.errors import ConfigError, DataError
from otcxr.files import write_atomic
from otcxr.version import __version__

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["write_secondary_capture", "write_segmentation"]

_NOTE = "not for diagnosis"
# of type 2: the element has to be there, its value may be unknown
_TYPE_2 = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip


def write_secondary_capture(
    source: Path, picture: NDArray[np.uint8], title: str, out: Path, *, number: int = 1
) -> None:
    """Write a picture as a Secondary Capture of the study of a DICOM file.

    Args:
        source: The radiograph's file.
        picture: (H, W, 3) RGB, on the pixels of the radiograph.
        title: For the series description, which is cut to 64 characters.
        out: The file to write.
        number: Of the series.
    Raises: ConfigError: highdicom is not installed. DataError: the source is no DICOM, lacks what identifies it, or has
        another size.
    """
    highdicom = _highdicom()
    reference = _reference(source, picture.shape[:2])
    made = _quietly(
        highdicom.sc.SCImage.from_ref_dataset,
        reference, pixel_array=np.ascontiguousarray(picture), photometric_interpretation="RGB", bits_allocated=8,
        coordinate_system="PATIENT", series_instance_uid=highdicom.UID(), series_number=number,
        sop_instance_uid=highdicom.UID(), instance_number=1, manufacturer="otcxr", pixel_spacing=_spacing(reference),
        patient_orientation=tuple(reference.get("PatientOrientation") or ("L", "F")),
    )  # fmt: skip
    made.SeriesDescription = f"{_NOTE}: {title}"[:64]
    made.DerivationDescription = f"heat map by otcxr {__version__}, {_NOTE}"
    _save(made, out)


def write_segmentation(source: Path, mask: NDArray[np.bool_], title: str, out: Path, *, number: int = 2) -> None:
    """Write a region as a Segmentation that refers to a DICOM file.

    Args:
        source: The radiograph's file.
        mask: (H, W), on the pixels of the radiograph; not empty.
        title: Of the segment, which is cut to 64 characters.
        out: The file to write.
        number: Of the series.
    Raises: As ``write_secondary_capture``; DataError too for an empty mask.
    """
    highdicom = _highdicom()
    if not mask.any():
        raise DataError(f"there is no evidence of '{title}' in {source.name} that could be outlined")
    reference = _reference(source, mask.shape)
    from pydicom.sr.codedict import codes

    identity = highdicom.AlgorithmIdentificationSequence(
        name="otcxr heat map above Otsu's threshold", version=__version__, family=codes.cid7162.ArtificialIntelligence
    )
    segment = highdicom.seg.SegmentDescription(
        segment_number=1, segment_label=f"{_NOTE}: {title}"[:64],
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion, algorithm_type="AUTOMATIC", algorithm_identification=identity,
    )  # fmt: skip
    made = _quietly(
        highdicom.seg.Segmentation,
        source_images=[reference], pixel_array=mask[None].astype(np.uint8), segmentation_type="BINARY",
        segment_descriptions=[segment], series_instance_uid=highdicom.UID(), series_number=number,
        sop_instance_uid=highdicom.UID(), instance_number=1, manufacturer="otcxr", manufacturer_model_name="otcxr",
        software_versions=__version__, device_serial_number="0",
    )  # fmt: skip
    made.SeriesDescription = f"{_NOTE}: {title}"[:64]
    _save(made, out)


def _quietly(make: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Without warnings: that the name of a patient is a code, as in public collections, is no fault of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*given, **named)


def _highdicom() -> Any:
    try:
        import highdicom
    except ImportError as error:
        raise ConfigError("DICOM output needs highdicom: pip install 'otcxr[dicom]'") from error
    return highdicom


def _reference(source: Path, shape: tuple[int, ...]) -> Dataset:
    """The source as a data set, with what refers to it filled in where the standard allows it to be empty."""
    import pydicom

    try:
        reference = pydicom.dcmread(source)
    except Exception as error:
        raise DataError(f"{source} is not a readable DICOM file: {error}") from error
    for needed in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
        if not reference.get(needed):
            raise DataError(f"{source} has no {needed}; a file that is to open beside it could not refer to it")
    if (reference.Rows, reference.Columns) != shape[:2]:
        raise DataError(
            f"{source} has {reference.Rows} x {reference.Columns} pixels, the picture {shape[0]} x {shape[1]}"
        )
    for name in _TYPE_2:
        if name not in reference:
            setattr(reference, name, None)
    return reference


def _spacing(reference: Dataset) -> tuple[float, float] | None:
    pitch = reference.get("PixelSpacing") or reference.get("ImagerPixelSpacing")
    return (float(pitch[0]), float(pitch[1])) if pitch else None


def _save(made: Any, out: Path) -> None:
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    write_atomic(out, buffer.getvalue())
