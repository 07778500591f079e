"""Any folder of radiographs, with or without a table."""

from __future__ import annotations

import csv
import io
import logging
import re
from pathlib import Path

from otcxr.data.decode import IMAGE_SUFFIXES
from otcxr.data.dicom import read_header
from otcxr.data.identity import site_key
from otcxr.data.records import Collection, Record, Skipped
from otcxr.errors import DataError

__all__ = ["read_folder"]

_log = logging.getLogger(__name__)

_OPTION = re.compile(r",(csv|image|patient|headers)=([^,]*)$")
# a table written from floating-point columns, as columns with gaps often are, says 1.0
_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": None}
_KNOWN = ("study", "sex", "age", "view", "split")


def read_folder(text: str) -> Collection:
    """Read every PNG, JPEG, TIFF and DICOM below a folder.

    ``PATH[,csv=FILE][,image=COLUMN][,patient=COLUMN][,headers=yes|no]``. Without ``csv=`` the only CSV file directly in
    the folder is used, if there is one; ``csv=none`` uses none. The table then is the list of images: it needs a column
    with the path below the folder (or the bare name, where only one file has it) of the image and one with the patient;
    columns study, sex, age, view and split are used where present; every other column that holds nothing but 0, 1 (or
    0.0, 1.0) and empty fields, and not only empty ones, is a finding (empty: not assessed).

    Without a table the headers of DICOM files say who they are of: patient and study (as names under the site's key,
    ``otcxr.data.identity``), sex, age, view and spacing. Of other files, and with ``headers=no``, nothing is known of
    patients, so every image counts as a patient of its own. Without a study, every image is a study of its own.

    Raises: DataError: no such folder, no image in it, or a table without the columns, with duplicates or bad values.
    """
    options: dict[str, str] = {}
    path_text = text
    while not Path(path_text).is_dir() and (match := _OPTION.search(path_text)):
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
    if options.get("headers", "yes") not in ("yes", "no"):
        raise DataError(f"headers must be yes or no, received '{options['headers']}'")
    if table is None:
        return _read_headers(name, root, files, wanted=options.get("headers") != "no")
    return _read_table(name, root, table, files, options.get("image", "image"), options.get("patient", "patient"))


def _read_headers(name: str, root: Path, files: list[Path], *, wanted: bool) -> Collection:
    """Records of files without a table, with what the headers of DICOM files say."""
    records, told, key = [], 0, None
    for path in files:
        place = path.relative_to(root).as_posix()
        record = Record(path, study=place, patient=place, source="folder")
        if wanted and path.suffix.lower() in (".dcm", ".dicom"):
            try:
                header = read_header(path)
            except DataError:  # counted and listed when its pixels are read
                records.append(record)
                continue
            key = key or site_key()
            told += header.patient is not None
            record = record._replace(
                patient=record.patient if header.patient is None else key.name("patient", header.patient),
                study=record.study if header.study is None else key.name("study", header.study),
                sex=header.sex, age=header.age, view=header.view, spacing=header.spacing,
            )  # fmt: skip
        records.append(record)
    note = f"{told:,} of {len(files):,} files name their patient in a DICOM header"
    notes = () if key is None else (f"{note}; names are hashed with the site's key",)
    return Collection(name, (), records, (), notes)


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
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table} is not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8 CSV"
        ) from error
    reader = csv.DictReader(io.StringIO(text), restval="")
    header = [column.strip() for column in reader.fieldnames or []]
    twice = next((column for column in header if column and header.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{table} has two columns '{twice}'; rename or remove one")
    reader.fieldnames = header
    lines = [(row, reader.line_num) for row in reader]
    rows = [row for row, _ in lines]
    for role, column in (("image", image_column), ("patient", patient_column)):
        if column not in header:
            raise DataError(
                f"{table} has no column '{column}'; expected 'image' and 'patient'. Found: {', '.join(header)}. "
                f"Rename it, or say which holds it: folder:PATH,{role}=COLUMN"
            )
    rest = [c for c in header if c and c not in (image_column, patient_column, *_KNOWN)]
    values = {column: {row[column].strip() for row in rows} for column in rest}
    findings = tuple(column for column in rest if values[column] - {""} and values[column] <= _LABELS.keys())
    for column in rest:
        if other := sorted(values[column] - _LABELS.keys()):
            _log.warning("%s: column '%s' is no finding: it holds '%s'; a finding is 0, 1 or empty", table.name, column,
                         other[0])  # fmt: skip
    by_name: dict[str, list[Path]] = {}
    for path in files:
        by_name.setdefault(path.name, []).append(path)
    by_name |= {path.relative_to(root).as_posix(): [path] for path in files}  # a path is never ambiguous
    records, skipped, used = [], [], set()
    for row, number in lines:
        image = row[image_column].strip()
        paths = by_name.get(image, [])
        if not paths:
            skipped.append(Skipped(image, "missing"))
            continue
        if len(paths) > 1 or paths[0] in used:
            why = f"{len(paths)} files have this name" if len(paths) > 1 else "an earlier line names it too"
            raise DataError(f"{table} line {number}: '{image}' is not one image: {why}; give paths relative to {root}")
        if not row[patient_column].strip():
            raise DataError(f"{table} line {number} has no patient; fill column '{patient_column}'")
        used.add(paths[0])
        study = paths[0].relative_to(root).as_posix()
        records.append(_record(row, paths[0], study, row[patient_column].strip(), findings))
    skipped += [
        Skipped(path.relative_to(root).as_posix(), f"not listed in {table.name}") for path in files if path not in used
    ]
    return Collection(name, findings, records, tuple(skipped))


def _record(row: dict[str, str], path: Path, study: str, patient: str, findings: tuple[str, ...]) -> Record:
    age = re.search(r"\d+", row.get("age") or "")
    years = float(age.group()) if age else None
    sex, view = (row.get("sex") or "").strip().upper()[:1], (row.get("view") or "").strip().upper()
    return Record(
        image=path,
        study=(row.get("study") or "").strip() or study,
        patient=patient,
        sex=sex if sex in ("M", "F") else None,
        age=years if years is not None and years <= 120 else None,
        view=view if view in ("PA", "AP", "LATERAL") else None,
        source="folder",
        labels={f: value for f in findings if (value := _LABELS[row[f].strip()]) is not None},
        split=(row.get("split") or "").strip(),
    )
