"""SIIM-ACR Pneumothorax (Kaggle 2019): DICOM files, and masks as run lengths in a table.

The table has traps: a space before ``EncodedPixels``, starts that are relative to the end of the run before, runs that
go down columns, and several rows for an image with several parts (they are joined). No patient is known, and the images
are a part of NIH ChestX-ray14: an encoder that was pre-trained there has seen them.
"""

from __future__ import annotations

from pathlib import Path

from otcxr.data.masks import RunLengthMask
from otcxr.data.records import Collection, Record, Skipped, split_by_hash
from otcxr.data.tables import first_file, image_files, parse_options, read_rows
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
    Raises: DataError: no such folder, table or images, or what :func:`read_runs` raises.
    """
    root, _ = parse_options(text, {})
    table = first_file(root, _TABLES, "read_siim expects the table of run lengths there")
    files = image_files(root)
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
    notes = ("no patients are known: every image counts as one", "the split is ours, by a hash of the image's name",
             "the images are a part of NIH ChestX-ray14: do not judge what was pre-trained there")  # fmt: skip
    return Collection(f"siim:{text}", (FINDING,), records, tuple(skipped), notes)


def read_runs(table: Path) -> dict[str, tuple[str, ...]]:
    """Image -> its rows of run lengths, none where there is no pneumothorax.

    Raises: DataError: as ``read_rows``, or an image has a mask and is said to have none.
    """
    found: dict[str, list[str]] = {}
    denied: set[str] = set()
    for number, row in enumerate(read_rows(table, ("ImageId", "EncodedPixels")), start=2):
        name, value = row["ImageId"], row["EncodedPixels"]
        rows = found.setdefault(name, [])
        if value == _NONE:
            denied.add(name)
        else:
            rows.append(value)
        if rows and name in denied:
            raise DataError(f"{table} line {number}: {name} has a mask, and a row that says it has none")
    return {name: tuple(rows) for name, rows in found.items()}
