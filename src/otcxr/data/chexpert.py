"""CheXpert and MIMIC-CXR-JPG: labels of one vocabulary, with uncertain and unmentioned findings.

Reports say *present* (1), *absent* (0), *uncertain* (-1), or nothing. What becomes of the last two is a decision that
moves results, so it is an option of the source and is said: ``uncertain=ignore|ones|zeros`` and ``blank=zeros|ignore``.

Source: Irvin et al., AAAI 2019, arXiv:1901.07031; Johnson et al., arXiv:1901.07042.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from otcxr.data.records import Collection, Record, Skipped
from otcxr.data.tables import first_file, parse_options, read_rows
from otcxr.errors import DataError

__all__ = ["FINDINGS", "read_chexpert", "read_mimic"]

FINDINGS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
_OPTIONS = {"uncertain": ("ignore", "ones", "zeros"), "blank": ("zeros", "ignore"), "view": ("all", "frontal")}
_VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": None}
_RULES = {"ignore": None, "ones": 1, "zeros": 0}
_FRONTAL, _LATERAL = {"PA", "AP"}, {"LATERAL", "LL", "RL", "XTABLE LATERAL", "SWIMMERS", "LAO", "RAO", "LPO", "RPO"}


def read_chexpert(text: str) -> Collection:
    """Read the folder ``CheXpert-v1.0`` or ``CheXpert-v1.0-small``.

    Args:
        text: ``PATH[,uncertain=ignore|ones|zeros][,blank=zeros|ignore][,view=all|frontal]``; the first is the default.
    Returns: A record for each row of ``train.csv`` ("train"), ``valid.csv`` ("val") and, if it is there, ``test.csv``
        ("test") whose image is there. Lateral images are kept, with view "LATERAL", unless the source says otherwise.
    Raises: DataError: no such folder or table, or values that are none of 1, 0, -1 and empty.
    """
    root, options = parse_options(text, _OPTIONS)
    tables = {"train": "train.csv", "val": "valid.csv", "test": "test.csv"}
    first_file(root, ("train.csv", "valid.csv"), "read_chexpert expects the label tables there")
    records: list[Record] = []
    skipped: list[Skipped] = []
    counts: Counter[str] = Counter()
    for split, name in tables.items():
        if not (root / name).is_file():
            continue
        columns = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS)
        for row in read_rows(root / name, columns):
            # paths begin with the name of the release, whatever the folder is called here
            parts = Path(row["Path"]).parts
            image = root.joinpath(*parts[1:]) if parts and parts[0].startswith("CheXpert") else root / row["Path"]
            found = re.search(r"(patient\d+)/(study\d+)", row["Path"])
            if found is None or ".." in parts:
                raise DataError(f"{root / name}: '{row['Path']}' is not .../patientN/studyN/...")
            lateral = row["Frontal/Lateral"] == "Lateral"
            if lateral and options["view"] == "frontal":
                counts["lateral"] += 1
                continue
            if not image.is_file():
                skipped.append(Skipped(row["Path"], "missing", split))
                continue
            view = "LATERAL" if lateral else row["AP/PA"] if row["AP/PA"] in _FRONTAL else None
            records.append(Record(
                image=image, study=f"{found[1]}/{found[2]}", patient=found[1],
                sex={"Male": "M", "Female": "F"}.get(row["Sex"]), age=_age(row["Age"]), view=view, source="chexpert",
                labels=_labels(row, options, counts, f"{root / name}: {row['Path']}"), split=split,
            ))  # fmt: skip
    return Collection(f"chexpert:{text}", FINDINGS, records, tuple(skipped), _notes(options, counts))


def read_mimic(text: str) -> Collection:
    """Read the folder of MIMIC-CXR-JPG 2: ``files/pNN/pSUBJECT/sSTUDY/DICOM.jpg`` and its tables (``.csv`` or
    ``.csv.gz``).

    Labels are of studies, and every image of a study has them. The split is the official one.

    Args:
        text: As of :func:`read_chexpert`.
    Raises: DataError: no such folder or table, or values that are none of 1, 0, -1 and empty.
    """
    root, options = parse_options(text, _OPTIONS)

    def table(names: Iterable[str]) -> Path:
        return first_file(
            root, [f"mimic-cxr-2.0.0-{name}.csv" for name in names], "read_mimic expects its tables there"
        )

    labels = {
        (row["subject_id"], row["study_id"]): row
        for row in read_rows(table(("chexpert", "negbio")), ("subject_id", "study_id", *FINDINGS))
    }
    splits = {row["dicom_id"]: row["split"] for row in read_rows(table(("split",)), ("dicom_id", "split"))}
    known = {"train": "train", "validate": "val", "test": "test"}
    records: list[Record] = []
    skipped: list[Skipped] = []
    counts: Counter[str] = Counter()
    metadata = table(("metadata",))
    for row in read_rows(metadata, ("dicom_id", "subject_id", "study_id", "ViewPosition")):
        name, subject, study = row["dicom_id"], row["subject_id"], row["study_id"]
        if not (re.fullmatch(r"\d+", subject) and re.fullmatch(r"\d+", study) and re.fullmatch(r"[\w-]+", name)):
            raise DataError(f"{metadata}: '{subject}', '{study}', '{name}' are not a subject, a study and an image")
        position = row["ViewPosition"].upper()
        if position not in _FRONTAL and options["view"] == "frontal":
            counts["lateral"] += 1
            continue
        split = known.get(splits.get(name, ""), "")
        image = root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{name}.jpg"
        if not image.is_file():
            skipped.append(Skipped(image.name, "missing", split))
            continue
        given = labels.get((subject, study))
        if given is None:
            counts["without labels"] += 1
        view = position if position in _FRONTAL else "LATERAL" if position in _LATERAL else None
        records.append(Record(
            image=image, study=f"s{study}", patient=f"p{subject}", view=view, source="mimic", split=split,
            labels={} if given is None else _labels(given, options, counts, f"{subject}/{study}"),
        ))  # fmt: skip
    return Collection(f"mimic:{text}", FINDINGS, records, tuple(skipped), _notes(options, counts))


def _labels(row: Mapping[str, str], options: Mapping[str, str], counts: Counter[str], where: str) -> dict[str, int]:
    out = {}
    for finding in FINDINGS:
        if row[finding] not in _VALUES:
            raise DataError(f"{where}: {finding} is '{row[finding]}'; expected 1, 0, -1 or nothing")
        value = _VALUES[row[finding]]
        if value == -1:
            counts["uncertain"] += 1
            value = _RULES[options["uncertain"]]
        elif value is None:
            counts["blank"] += 1
            value = _RULES[options["blank"]]
        if value is not None:
            out[finding] = value
    return out


def _notes(options: Mapping[str, str], counts: Counter[str]) -> tuple[str, ...]:
    said = {"ignore": "not assessed", "ones": "present", "zeros": "absent"}
    notes = [
        f"{counts['uncertain']:,} uncertain labels are taken as {said[options['uncertain']]}",
        f"{counts['blank']:,} labels that reports do not mention are taken as {said[options['blank']]}",
    ]
    if options["view"] == "frontal":
        notes.append(f"view=frontal leaves out {counts['lateral']:,} other images")
    if counts["without labels"]:
        notes.append(f"{counts['without labels']:,} images are of studies without labels")
    return tuple(notes)


def _age(text: str) -> float | None:
    found = re.search(r"\d+", text)
    years = float(found.group()) if found else None
    return years if years is not None and 0 < years <= 120 else None
