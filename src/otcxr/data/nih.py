"""NIH ChestX-ray14 as downloaded: nested or flat folders, either label file, boxes, official split lists.

Source: Wang et al., CVPR 2017, arXiv:1705.02315. The files have traps: header fields that contain commas, trailing
commas, ages such as ``058Y`` or ``412``, boxes in the frame of the 1024-pixel images and a finding that is named
``Infiltrate`` there and ``Infiltration`` elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path

from otcxr.data.png import png_size
from otcxr.data.records import Box, Collection, Record, Skipped
from otcxr.data.tables import read_rows
from otcxr.errors import DataError

__all__ = ["FINDINGS", "read_nih"]

# The order of every published list for this collection.
FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
_BOXES = "BBox_List_2017.csv"
_BOX_FRAME = 1024  # side in pixels of the images on which the boxes were drawn
_COLUMNS = ("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender",
            "View Position", "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]")  # fmt: skip
_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}


def read_nih(text: str) -> Collection:
    """Read a folder in the NIH layout.

    Images are looked for as ``*.png`` in the folder itself and at any depth below its ``images*`` folders. An image
    that the table names but that is missing or is not a PNG is left out and listed in ``Collection.skipped``.

    Args:
        text: The folder.
    Returns: One record for each row with an image. All 14 findings are assessed in every record. Boxes are scaled
        from the 1024-pixel frame to the pixels of the file found. Split "train" is ``train_val_list.txt``.
    Raises: DataError: no such folder, no label table, columns or images; an unknown finding.
    """
    root = Path(text)
    if not root.is_dir():
        raise DataError(f"no such folder: {root}; expected the folder that holds {_TABLES[0]} and images/")
    table = next((root / name for name in _TABLES if (root / name).is_file()), None)
    if table is None:
        found = ", ".join(sorted(p.name + "/" * p.is_dir() for p in root.iterdir())[:8]) or "nothing"
        raise DataError(f"{_TABLES[0]} is missing under {root}; read_nih expects it beside images/. Found: {found}")
    images = _find_images(root)
    if not images:
        raise DataError(f"no *.png under {root} or its images* folders; unpack the archives there")
    boxes = _read_boxes(root / _BOXES)
    splits = _read_splits(root)
    records: list[Record] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for row in read_rows(table, _COLUMNS):
        name = row["Image Index"]
        if name in seen:
            raise DataError(f"{table} names {name} twice; remove one of the lines")
        seen.add(name)
        if not row["Patient ID"]:
            raise DataError(
                f"{table} names no patient for {name}; fill column 'Patient ID': splits and intervals go by it"
            )
        if name not in images:
            skipped.append(Skipped(name, "missing", splits.get(name, "")))
            continue
        try:
            height, width = png_size(images[name])
        except DataError as error:
            skipped.append(Skipped(name, str(error), splits.get(name, "")))
            continue
        records.append(_record(row, images[name], height, width, boxes.get(name, ()), splits.get(name, "")))
    return Collection(f"nih:{text}", FINDINGS, records, tuple(skipped))


def _record(
    row: dict[str, str], path: Path, height: int, width: int, boxes: tuple[Box, ...] | list[Box], split: str
) -> Record:
    named = set(row["Finding Labels"].split("|")) - {"No Finding"}
    unknown = named - set(FINDINGS)
    if unknown:
        raise DataError(f"{row['Image Index']} has the finding '{min(unknown)}', which is none of the 14 of NIH")
    age = re.search(r"\d+", row["Patient Age"])
    years = float(age.group()) if age else None
    spacing = _spacing(row, height, width)
    x, y = width / _BOX_FRAME, height / _BOX_FRAME
    return Record(
        image=path,
        study=f"{row['Patient ID']}_{row['Follow-up #']}",
        patient=row["Patient ID"],
        sex=row["Patient Gender"] if row["Patient Gender"] in ("M", "F") else None,
        age=years if years is not None and years <= 120 else None,  # ages up to 4xx are slips of the source
        view=row["View Position"] if row["View Position"] in ("PA", "AP") else None,
        source="nih",
        spacing=spacing,
        labels={finding: int(finding in named) for finding in FINDINGS},
        boxes=tuple(Box(b.finding, b.x * x, b.y * y, b.width * x, b.height * y) for b in boxes),
        split=split,
    )


def _spacing(row: dict[str, str], height: int, width: int) -> tuple[float, float] | None:
    """Pitch of the stored pixels: that of the original detector times the reduction from original to stored size."""
    try:
        pitch_x, pitch_y = float(row["OriginalImagePixelSpacing[x"]), float(row["y]"])
        original_width, original_height = float(row["OriginalImage[Width"]), float(row["Height]"])
    except ValueError:
        return None
    return pitch_y * original_height / height, pitch_x * original_width / width


def _find_images(root: Path) -> dict[str, Path]:
    """Name -> path; the first path in sorted order where a name occurs twice."""
    images: dict[str, Path] = {}
    nested = (path for folder in sorted(root.glob("images*")) if folder.is_dir() for path in folder.rglob("*.png"))
    for path in sorted([*root.glob("*.png"), *nested]):
        images.setdefault(path.name, path)
    return images


def _read_boxes(path: Path) -> dict[str, list[Box]]:
    """Boxes by image in the 1024-pixel frame; an absent file means no boxes. Both published headers begin alike."""
    boxes: dict[str, list[Box]] = {}
    if not path.is_file():
        return boxes
    for row in read_rows(path, ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")):
        finding = "Infiltration" if row["Finding Label"] == "Infiltrate" else row["Finding Label"]
        if finding not in FINDINGS:
            raise DataError(f"{path} has a box of '{finding}' on {row['Image Index']}, which is none of the 14 of NIH")
        try:
            numbers = [float(row[name]) for name in ("Bbox [x", "y", "w", "h]")]
        except ValueError as error:
            raise DataError(f"{path} has a box on {row['Image Index']} that is not four numbers: {error}") from error
        boxes.setdefault(row["Image Index"], []).append(Box(finding, *numbers))
    return boxes


def _read_splits(root: Path) -> dict[str, str]:
    """Image -> split from the lists that are present.

    Raises: DataError: an image is in both lists.
    """
    splits: dict[str, str] = {}
    for split, name in _LISTS.items():
        path = root / name
        for line in path.read_text().split() if path.is_file() else ():
            if splits.setdefault(line, split) != split:
                raise DataError(f"{line} is in {_LISTS['train']} and in {name}; remove it from one of them")
    return splits
