"""VinDr-CXR: the Kaggle edition (VinBigData, ``train.csv``) with boxes by three readers of each image.

Three readers looked at every image of ``train``, each for himself, so a rule must say when a finding counts: ``votes``
of them, 2 (the majority) unless the source says otherwise. With 1 there are 1.7 times as many positives. Boxes are in
pixels of the DICOM files; no patient is known.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from otcxr.data.decode import png_size
from otcxr.data.records import Box, Collection, Record, Skipped, split_by_hash
from otcxr.data.tables import first_file, image_files, parse_options, read_rows
from otcxr.errors import DataError, did_you_mean

__all__ = ["FINDINGS", "Reading", "read_readings", "read_vindr"]

FINDINGS = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration",
    "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis",
)  # fmt: skip
_NONE = "No finding"
_READERS = 3  # of every image


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
    """Read a folder that holds ``train.csv`` and, at any depth, the images by their ``image_id``.

    Args:
        text: ``PATH[,votes=2|1|3]``.
    Returns: One record for each image of the table that is there, all 14 findings assessed, with the boxes of the
        findings that have votes enough. Every image counts as a patient of its own; the split is ours
        (``split_by_hash``).
    Raises: DataError: no such folder, table or images, a box outside its PNG, or what :func:`read_readings` raises.
    """
    root, options = parse_options(text, {"votes": ("2", "1", "3")})
    votes = int(options["votes"])
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
        try:
            left, top, right, bottom = (float(row[c]) for c in ("x_min", "y_min", "x_max", "y_max"))
        except ValueError as error:
            raise DataError(f"{table} line {number}: a box of {name} is not four numbers: {error}") from error
        if not (0 <= left <= right and 0 <= top <= bottom):
            raise DataError(f"{table} line {number}: a box of {name} ends before it begins")
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
    if boxes and path.suffix.lower() == ".png":
        height, width = png_size(path)
        if any(b.x + b.width > width + 1 or b.y + b.height > height + 1 for b in boxes):
            raise DataError(f"{path} has {width} x {height} pixels and a box beyond: boxes are in pixels of the DICOM "
                            "files; use those, or pictures of the same size")  # fmt: skip
    return Record(
        image=path, study=name, patient=name, source="vindr", labels={f: int(f in present) for f in FINDINGS},
        boxes=boxes, split=split_by_hash(name),
    )  # fmt: skip
