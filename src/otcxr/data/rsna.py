"""RSNA Pneumonia Detection Challenge (Kaggle 2018): DICOM files, boxes of opacities.

``patientId`` is the name of an image, not of a patient. All images are of NIH ChestX-ray14; with the organisers'
mapping file the patients are known, and with NIH's official lists beside it the split is NIH's, so that an encoder
that was pre-trained on NIH's ``train_val_list.txt`` is judged on patients it has not seen.
"""

from __future__ import annotations

import json
from pathlib import Path

from otcxr.data.png import png_size
from otcxr.data.records import Box, Collection, Record, Skipped, split_by_hash
from otcxr.data.tables import first_file, image_files, parse_options, read_rows
from otcxr.errors import DataError

__all__ = ["FINDING", "read_opacities", "read_rsna"]

FINDING = "Lung Opacity"
_TABLE = "stage_2_train_labels.csv"
_MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
_FRAME = 1024  # side in pixels of the images on which the boxes were drawn


def read_rsna(text: str) -> Collection:
    """Read a folder that holds the label table and, at any depth, the images by their ``patientId``.

    Args:
        text: The folder. ``pneumonia-challenge-dataset-mappings_2018.json`` in it names the patients; with NIH's
            ``test_list.txt`` (and ``train_val_list.txt``) too, the split is NIH's.
    Returns: One record for each image of the table that is there. Without the mapping every image counts as a patient
        of its own and the split is ours (``split_by_hash``).
    Raises: DataError: no such folder, table or images, a broken mapping, or what :func:`read_opacities` raises.
    """
    root, _ = parse_options(text, {})
    boxes = read_opacities(first_file(root, (_TABLE,), "read_rsna expects the label table there"))
    files = image_files(root)
    origin = _origin(root / _MAPPING)
    tests = set((root / "test_list.txt").read_text().split()) if origin and (root / "test_list.txt").is_file() else None
    records = []
    for name, own in boxes.items():
        if name not in files:
            continue
        source = origin.get(name, "")
        patient = source.partition("_")[0] or name
        split = split_by_hash(patient) if tests is None or not source else "test" if source in tests else "train"
        records.append(Record(
            image=files[name], study=name, patient=patient, source="rsna", labels={FINDING: int(bool(own))},
            boxes=_scaled(own, files[name]), split=split,
        ))  # fmt: skip
    skipped = [Skipped(name, "missing") for name in boxes if name not in files]
    skipped += [Skipped(path.name, f"not listed in {_TABLE}") for name, path in files.items() if name not in boxes]
    notes = ["the images are a part of NIH ChestX-ray14"]
    if not origin:
        notes.append(f"without {_MAPPING} no patients are known: every image counts as one, and the split may put "
                     "images of one patient on both sides")  # fmt: skip
    notes.append("the split is NIH's" if tests is not None else "the split is ours, by a hash of the name")
    return Collection(f"rsna:{text}", (FINDING,), records, tuple(skipped), tuple(notes))


def read_opacities(table: Path) -> dict[str, tuple[Box, ...]]:
    """Image -> boxes in the 1024-pixel frame, none where there is no opacity.

    Raises: DataError: as ``read_rows``; a box that is none, or an image that is said to have both.
    """
    found: dict[str, list[Box]] = {}
    target: dict[str, str] = {}
    for number, row in enumerate(read_rows(table, ("patientId", "x", "y", "width", "height", "Target")), start=2):
        name = row["patientId"]
        if target.setdefault(name, row["Target"]) != row["Target"] or row["Target"] not in ("0", "1"):
            raise DataError(
                f"{table} line {number}: {name} has Target '{row['Target']}'; expected 0 or 1, one for all rows"
            )
        own = found.setdefault(name, [])
        if row["Target"] == "1":
            try:
                x, y, width, height = (float(row[c]) for c in ("x", "y", "width", "height"))
            except ValueError as error:
                raise DataError(f"{table} line {number}: a box of {name} is not four numbers: {error}") from error
            own.append(Box(FINDING, x, y, width, height))
    return {name: tuple(own) for name, own in found.items()}


def _scaled(boxes: tuple[Box, ...], path: Path) -> tuple[Box, ...]:
    """Boxes in pixels of the file: DICOM files have the frame's size, pictures may be smaller."""
    if not boxes or path.suffix.lower() != ".png":
        return boxes
    height, width = png_size(path)
    x, y = width / _FRAME, height / _FRAME
    return tuple(Box(b.finding, b.x * x, b.y * y, b.width * x, b.height * y) for b in boxes)


def _origin(path: Path) -> dict[str, str]:
    """Image -> name of the NIH image, from the organisers' mapping; empty where the file is not there."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())
        return {str(entry["subset_img_id"]): str(entry["img_id"]) for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no list of entries with 'subset_img_id' and 'img_id': {error}") from error
