"""Any folder of radiographs, with or without a table."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from otcxr.data.images import IMAGE_SUFFIXES
from otcxr.data.records import Collection, Record, Skipped
from otcxr.errors import DataError

__all__ = ["read_folder"]

_OPTION = re.compile(r",(csv|image|patient)=([^,]*)$")
_KNOWN = ("study", "sex", "age", "view", "split")


def read_folder(text: str) -> Collection:
    """Read every PNG, JPEG and DICOM below a folder.

    ``PATH[,csv=FILE][,image=COLUMN][,patient=COLUMN]``. Without ``csv=`` the only CSV file directly in the folder is
    used, if there is one; ``csv=none`` uses none. The table then is the list of images: it needs a column with the
    path (or bare name) of the image and one with the patient; columns study, sex, age, view and split are used where
    present; every other column that holds nothing but 0, 1 and empty fields is a finding (empty: not assessed).
    Without a table nothing is known of patients, so every image counts as a patient of its own.

    Raises: DataError: no such folder, no image in it, or a table without the columns, with duplicates or bad values.
    """
    options: dict[str, str] = {}
    path_text = text
    while match := _OPTION.search(path_text):
        options[match.group(1)] = match.group(2)
        path_text = path_text[: match.start()]
    root = Path(path_text)
    if not root.is_dir():
        raise DataError(f"no such folder: {root}; check data.source (folder:PATH)")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise DataError(f"{root} holds no radiograph; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    table = _table(root, options.get("csv", ""))
    name = f"folder:{text}"
    if table is None:
        ids = [str(path.relative_to(root)) for path in files]
        return Collection(
            name, (), [Record(p, study=i, patient=i, source="folder") for p, i in zip(files, ids, strict=True)]
        )
    return _read_table(name, root, table, files, options.get("image", "image"), options.get("patient", "patient"))


def _table(root: Path, option: str) -> Path | None:
    if option == "none":
        return None
    if option:
        path = next((p for p in (root / option, Path(option)) if p.is_file()), None)
        if path is None:
            raise DataError(f"no such table: {option}, neither under {root} nor as a path of its own")
        return path
    found = sorted(root.glob("*.csv"))
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise DataError(f"{root} holds several tables ({names}); say which: folder:{root},csv={found[0].name}")
    return found[0] if found else None


def _read_table(
    name: str, root: Path, table: Path, files: list[Path], image_column: str, patient_column: str
) -> Collection:
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        header = [column.strip() for column in reader.fieldnames or []]
        reader.fieldnames = header
        rows = list(reader)
    for role, column in (("image", image_column), ("patient", patient_column)):
        if column not in header:
            raise DataError(
                f"{table} has no column '{column}'; expected 'image' and 'patient'. Found: {', '.join(header)}. "
                f"Rename it, or say which holds it: folder:PATH,{role}=COLUMN"
            )
    rest = [c for c in header if c and c not in (image_column, patient_column, *_KNOWN)]
    findings = tuple(c for c in rest if rows and all(row[c] in ("0", "1", "") for row in rows))
    by_name: dict[str, list[Path]] = {}
    for path in files:
        by_name.setdefault(path.name, []).append(path)
        by_name.setdefault(path.relative_to(root).as_posix(), []).append(path)
    records, skipped, used = [], [], set()
    for number, row in enumerate(rows, start=2):
        image = row[image_column].strip()
        paths = sorted(set(by_name.get(image, [])))
        if not paths:
            skipped.append(Skipped(image, "missing"))
            continue
        if len(paths) > 1 or paths[0] in used:
            why = f"{len(paths)} files have this name" if len(paths) > 1 else "an earlier line names it too"
            raise DataError(f"{table} line {number}: '{image}' is not one image: {why}; give paths relative to {root}")
        if not row[patient_column].strip():
            raise DataError(f"{table} line {number} has no patient; fill column '{patient_column}'")
        used.add(paths[0])
        records.append(_record(row, paths[0], row[patient_column].strip(), findings))
    skipped += [
        Skipped(path.relative_to(root).as_posix(), f"not listed in {table.name}") for path in files if path not in used
    ]
    return Collection(name, findings, records, tuple(skipped))


def _record(row: dict[str, str], path: Path, patient: str, findings: tuple[str, ...]) -> Record:
    age = re.search(r"\d+", row.get("age") or "")
    years = float(age.group()) if age else None
    sex, view = (row.get("sex") or "").strip().upper()[:1], (row.get("view") or "").strip().upper()
    return Record(
        image=path,
        study=(row.get("study") or "").strip() or path.stem,
        patient=patient,
        sex=sex if sex in ("M", "F") else None,
        age=years if years is not None and years <= 120 else None,
        view=view if view in ("PA", "AP") else None,
        source="folder",
        labels={finding: int(row[finding]) for finding in findings if row[finding] != ""},
        split=(row.get("split") or "").strip(),
    )
