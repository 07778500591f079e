"""SIIM-ACR Pneumothorax (Kaggle 2019): DICOM files, and masks as run lengths in a table.

The table has traps: a space before ``EncodedPixels``, starts that are relative to the end of the run before, runs that
go down columns, and several rows for an image with several parts (they are joined). No patient is known, and the images
are a part of NIH ChestX-ray14: an encoder that was pre-trained there has seen them.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from otcxr.data.images import IMAGE_SUFFIXES
from otcxr.data.masks import RunLengthMask
from otcxr.data.records import Collection, Record, Skipped, split_by_hash
from otcxr.errors import DataError

__all__ = ["FINDING", "read_runs", "read_siim"]

FINDING = "Pneumothorax"
_TABLES = ("train-rle.csv", "stage_2_train.csv", "siim-pneumothorax-train-rle.csv")
_NONE = "-1"


def read_siim(text: str) -> Collection:
    """Read a folder that holds the table and, at any depth, the images by their ``ImageId``.

    Args:
        text: The folder.
    Returns: One record for each image of the table that is there. Every image counts as a patient of its own; the split
        (70 % train, 10 % val, 20 % test, by a hash of the identifier) is ours, as the source has none.
    Raises: DataError: no such folder, table, columns or images, or what :func:`read_runs` raises.
    """
    root = Path(text)
    if not root.is_dir():
        raise DataError(f"no such folder: {root}; expected the folder that holds {_TABLES[0]} and the images")
    table = next((root / name for name in _TABLES if (root / name).is_file()), None)
    if table is None:
        raise DataError(f"{root} holds none of {', '.join(_TABLES)}; read_siim expects the table of run lengths there")
    files: dict[str, Path] = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()):
        if files.setdefault(path.stem, path) != path:
            raise DataError(f"{root} holds two images of {path.stem}: {files[path.stem]} and {path}; remove one")
    if not files:
        raise DataError(f"{root} holds no image; expected dicom-images-train/ or converted files named by ImageId")
    runs = read_runs(table)
    records = [
        Record(
            image=files[name], study=name, patient=name, source="siim", labels={FINDING: int(bool(rows))},
            masks={FINDING: RunLengthMask(f"{name} mask", rows)} if rows else {}, split=split_by_hash(name),
        )
        for name, rows in runs.items() if name in files
    ]  # fmt: skip
    skipped = [Skipped(name, "missing") for name in runs if name not in files]
    skipped += [Skipped(path.name, f"not listed in {table.name}") for name, path in files.items() if name not in runs]
    return Collection(f"siim:{text}", (FINDING,), records, tuple(skipped))


def read_runs(table: Path) -> dict[str, tuple[str, ...]]:
    """Image -> its rows of run lengths, none where there is no pneumothorax.

    Raises: DataError: not UTF-8, columns are missing, a row is short, or an image has a mask and is said to have none.
    """
    try:
        content = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 text ({error.reason}, byte {error.start})") from error
    reader = csv.reader(io.StringIO(content))
    header = [name.strip() for name in next(reader, [])]
    for column in ("ImageId", "EncodedPixels"):
        if column not in header:
            raise DataError(f"{table} has no column '{column}'. Found: {header}")
    image, pixels = header.index("ImageId"), header.index("EncodedPixels")
    found: dict[str, list[str]] = {}
    denied: set[str] = set()
    for row in reader:
        if not row:
            continue
        if len(row) <= max(image, pixels):
            raise DataError(f"{table} line {reader.line_num} has {len(row)} fields; expected {len(header)}")
        name, value = row[image].strip(), row[pixels].strip()
        rows = found.setdefault(name, [])
        if value == _NONE:
            denied.add(name)
        else:
            rows.append(value)
        if rows and name in denied:
            raise DataError(f"{table} line {reader.line_num}: {name} has a mask, and a row that says it has none")
    return {name: tuple(rows) for name, rows in found.items()}
