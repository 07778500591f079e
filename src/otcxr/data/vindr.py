"""VinDr-CXR: the Kaggle edition (VinBigData, ``train.csv``) and that of PhysioNet (``annotations/*.csv``).

Three readers looked at every image of ``train``, each for himself, so a rule must say when a finding counts: ``votes``
of them, 2 (the majority) unless the source says otherwise. With 1 there are 1.7 times as many positives in the Kaggle
edition. The test images of PhysioNet have the consensus of five. Boxes are in pixels of the DICOM files; no patient is
known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from otcxr.data.png import png_size
from otcxr.data.records import Box, Collection, Record, Skipped, split_by_hash
from otcxr.data.tables import first_file, image_files, parse_options, read_header, read_rows
from otcxr.errors import DataError, did_you_mean

__all__ = ["FINDINGS", "Reading", "read_readings", "read_vindr"]

FINDINGS = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration",
    "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis",
)  # fmt: skip
_NONE = "No finding"
_READERS = 3  # of every training image
_CELLS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": 0}
_RENAMED = {"Other disease": "Other diseases"}  # as the two tables of PhysioNet call the same


class Reading(NamedTuple):
    """What the readers of an image said.

    Attributes:
        readers: Who looked at it.
        votes: Finding -> how many of them saw it.
        boxes: All of theirs, (finding, left, top, right, bottom).
    """

    readers: frozenset[str]
    votes: dict[str, int]
    boxes: tuple[tuple[str, float, float, float, float], ...]


def read_vindr(text: str) -> Collection:
    """Read a folder that holds ``train.csv``, or ``annotations/``, and, at any depth, the images by their ``image_id``.

    Args:
        text: ``PATH[,votes=2|1|3]``.
    Returns: One record for each image of the table that is there, all 14 findings assessed (PhysioNet: those of its
        tables), with the boxes of the findings that have votes enough. Every image counts as a patient of its own; the
        split is ours (``split_by_hash``), but for PhysioNet's test images.
    Raises: DataError: no such folder, table or images, a box outside its PNG, or what :func:`read_readings` raises.
    """
    root, options = parse_options(text, {"votes": ("2", "1", "3")})
    votes = int(options["votes"])
    if not any((root / f"train.csv{end}").is_file() for end in ("", ".gz")):
        folder = next((f for f in (root / "annotations", root) if any(f.glob("image_labels_*.csv*"))), None)
        if folder is not None:
            return _read_physionet(f"vindr:{text}", root, folder, votes)
    readings = read_readings(first_file(root, ("train.csv",), "read_vindr expects the table with boxes there"))
    files = image_files(root)
    records = [
        _record(files[name], name, reading, votes) for name, reading in sorted(readings.items()) if name in files
    ]
    skipped = [Skipped(name, "missing") for name in sorted(readings) if name not in files]
    skipped += [Skipped(path.name, "not listed in train.csv") for name, path in files.items() if name not in readings]
    positives = sum(sum(record.labels.values()) for record in records)
    notes = (
        f"a finding counts where {votes} of {_READERS} readers or more saw it: {positives:,} pairs with an image",
        "no patients are known: every image counts as one",
        "the split is ours, by a hash of the image's name",
    )
    return Collection(f"vindr:{text}", FINDINGS, records, tuple(skipped), notes)


def _read_physionet(name: str, root: Path, folder: Path, votes: int) -> Collection:
    """The edition of PhysioNet: ``image_labels_{train,test}.csv`` and ``annotations_{train,test}.csv``."""
    files = image_files(root)
    findings: list[str] = []
    records: list[Record] = []
    missing: list[Skipped] = []
    listed: set[str] = set()
    for split in ("train", "test"):
        tables = [path for path in (folder / f"image_labels_{split}.csv", folder / f"image_labels_{split}.csv.gz")
                  if path.is_file()]  # fmt: skip
        if not tables:
            continue
        counted, readers = _votes_of(tables[0], by_readers=split == "train")
        findings += [finding for finding in next(iter(counted.values()), {}) if finding not in findings]
        boxes = _boxes_of(first_file(folder, (f"annotations_{split}.csv",), "its boxes are expected there"))
        for image, of in sorted(counted.items()):
            listed.add(image)
            present = {finding for finding, count in of.items() if count >= (votes if split == "train" else 1)}
            place = "test" if split == "test" else "val" if split_by_hash(image) == "val" else "train"
            if image not in files:
                missing.append(Skipped(image, "missing", place))
                continue
            kept = tuple(box for box in boxes.get(image, ()) if box.finding in present)
            _refuse_beyond(files[image], kept)
            labels = {finding: int(finding in present) for finding in of}
            records.append(Record(files[image], image, image, source="vindr", labels=labels, boxes=kept, split=place))
        if split == "train" and (wrong := next((i for i, n in readers.items() if n != _READERS), None)):
            raise DataError(f"{tables[0]}: {wrong} has {readers[wrong]} readers; expected {_READERS}, so that votes "
                            "can be counted")  # fmt: skip
    positives = sum(sum(record.labels.values()) for record in records if record.split != "test")
    stray = [Skipped(path.name, "not listed in image_labels_*.csv") for key, path in files.items() if key not in listed]
    notes = (
        f"a finding of a training image counts where {votes} of {_READERS} readers or more saw it: {positives:,} pairs "
        "with an image; test images have the consensus of five",
        "no patients are known: every image counts as one",
        "the test images are the official ones; a part of the training images is val, by a hash of the image's name",
    )
    return Collection(name, tuple(findings), records, (*missing, *stray), notes)


def _votes_of(table: Path, *, by_readers: bool) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Image -> finding -> how many rows say 1; image -> rows. Columns are findings, but names and *No finding*."""
    header = read_header(table)
    who = next((column for column in header if column.lower() == "rad_id"), None)
    if "image_id" not in header or (by_readers and who is None):
        raise DataError(f"{table} has no column 'image_id'{' or rad_id' if by_readers else ''}. Found: {header}")
    names = [column for column in header if column and column not in ("image_id", who, _NONE)]
    counted: dict[str, dict[str, int]] = {}
    rows: dict[str, int] = {}
    for number, row in enumerate(read_rows(table, ("image_id", *names)), start=2):
        image = row["image_id"]
        rows[image] = rows.get(image, 0) + 1
        of = counted.setdefault(image, {_RENAMED.get(name, name): 0 for name in names})
        for column in names:
            if row[column] not in _CELLS:
                raise DataError(
                    f"{table} line {number}: '{row[column]}' in column '{column}'; expected 0, 1 or nothing"
                )
            of[_RENAMED.get(column, column)] += _CELLS[row[column]]
    return counted, rows


def _boxes_of(table: Path) -> dict[str, list[Box]]:
    """Image -> boxes of all its findings; rows without numbers are images without findings."""
    boxes: dict[str, list[Box]] = {}
    columns = ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max")
    for number, row in enumerate(read_rows(table, columns), start=2):
        corners = [row[column] for column in columns[2:]]
        if row["class_name"] == _NONE or not any(corners):
            continue
        left, top, right, bottom = _corners(corners, f"{table} line {number}: a box of {row['image_id']}")
        finding = _RENAMED.get(row["class_name"], row["class_name"])
        boxes.setdefault(row["image_id"], []).append(Box(finding, left, top, right - left, bottom - top))
    return boxes


def _corners(words: Sequence[str], what: str) -> tuple[float, ...]:
    try:
        corners = tuple(float(word) for word in words)
    except ValueError as error:
        raise DataError(f"{what} is not four numbers: {error}") from error
    left, top, right, bottom = corners
    if not (0 <= left <= right < math.inf and 0 <= top <= bottom < math.inf):
        raise DataError(f"{what} ends before it begins")
    return corners


def _refuse_beyond(path: Path, boxes: Sequence[Box]) -> None:
    """Raise DataError where a box lies beyond its PNG."""
    if boxes and path.suffix.lower() == ".png":
        height, width = png_size(path)
        if any(b.x + b.width > width + 1 or b.y + b.height > height + 1 for b in boxes):
            raise DataError(f"{path} has {width} x {height} pixels and a box beyond: boxes are in pixels of the DICOM "
                            "files; use those, or pictures of the same size")  # fmt: skip


def read_readings(table: Path) -> dict[str, Reading]:
    """Image -> what its readers said.

    Raises: DataError: as ``read_rows``; an unknown finding, a box that is none, or other than three readers of an
        image.
    """
    columns = ("image_id", "class_name", "rad_id", "x_min", "y_min", "x_max", "y_max")
    readers: dict[str, set[str]] = {}
    seen: dict[str, set[tuple[str, str]]] = {}
    boxes: dict[str, list[tuple[str, float, float, float, float]]] = {}
    for number, row in enumerate(read_rows(table, columns), start=2):
        name, finding = row["image_id"], row["class_name"]
        readers.setdefault(name, set()).add(row["rad_id"])
        if finding == _NONE:
            continue
        if finding not in FINDINGS:
            raise DataError(f"{table} line {number}: unknown finding '{finding}'{did_you_mean(finding, FINDINGS)}")
        seen.setdefault(name, set()).add((finding, row["rad_id"]))
        left, top, right, bottom = _corners([row[c] for c in columns[3:]], f"{table} line {number}: a box of {name}")
        boxes.setdefault(name, []).append((finding, left, top, right, bottom))
    for name, who in readers.items():
        if len(who) != _READERS:
            raise DataError(
                f"{table}: {name} has {len(who)} readers; expected {_READERS}, so that votes can be counted"
            )
    return {
        name: Reading(frozenset(who), dict(Counter(finding for finding, _ in seen.get(name, ()))),
                      tuple(boxes.get(name, ())))
        for name, who in readers.items()
    }  # fmt: skip


def _record(path: Path, name: str, reading: Reading, votes: int) -> Record:
    present = {finding for finding, count in reading.votes.items() if count >= votes}
    boxes = tuple(Box(f, x, y, right - x, bottom - y) for f, x, y, right, bottom in reading.boxes if f in present)
    _refuse_beyond(path, boxes)
    return Record(
        image=path, study=name, patient=name, source="vindr", labels={f: int(f in present) for f in FINDINGS},
        boxes=boxes, split=split_by_hash(name),
    )  # fmt: skip
