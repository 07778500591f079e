"""Judging the predictions of any other tool: a CSV in, the numbers and tables of a run out.

    image,patient,Effusion_label,Effusion,Nodule_label,Nodule[,split][,sex][,age][,view]

``<Finding>_label`` is 1, 0 or empty (not assessed), ``<Finding>`` the score, higher means more suspect: a probability,
or any number. Rows with split ``val`` choose thresholds and fit the recalibration, rows with split ``test`` (or none)
are judged. Labels may also come from a labelled source; then only ``image`` and the scores are needed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from otcxr.config import flatten, to_plain
from otcxr.data.records import Collection
from otcxr.errors import ConfigError, DataError, did_you_mean
from otcxr.evaluation.calibration import logit, recalibrate
from otcxr.evaluation.decisions import RULES, OperatingPoint, choose_threshold
from otcxr.evaluation.estimates import BootstrapSettings
from otcxr.evaluation.labelled import Part
from otcxr.evaluation.statistics import calibration_columns, decision_columns, ranking_columns
from otcxr.evaluation.subgroups import ATTRIBUTES, age_band, measure_subgroups
from otcxr.evaluation.tables import (
    TESTS,
    Judged,
    compare_judged,
    draw_judged,
    only,
    power_json,
    ranking,
    reliability_json,
    single_json,
)
from otcxr.evaluation.tasks import EvaluateConfig
from otcxr.runs import describe_environment

__all__ = ["Predictions", "evaluate_predictions", "read_predictions", "rows_of_predictions"]

_KNOWN = ("image", "patient", "split", "sex", "age", "view")
_SPLITS = ("val", "test")
_MOST = 1e12  # of a score: more is a mistake, and its square no number
_SEXES = {"f": "F", "female": "F", "w": "F", "m": "M", "male": "M"}
_USED = ("resamples", "level", "recalibration", "rule", "within", "subgroups", "seed")  # settings of an evaluation


class Predictions(NamedTuple):
    """A table of predictions.

    Attributes:
        name: Of the file.
        findings: F.
        images: (N,) names, each once.
        patients: (N,).
        labels: (N, F), NaN where not assessed.
        scores: (N, F), NaN allowed where not assessed.
        split: (N,) "val" or "test".
        groups: By attribute, (N,) values; "" unknown.
        digest: First 16 hexadecimal digits of the file's SHA-256.
    """

    name: str
    findings: tuple[str, ...]
    images: tuple[str, ...]
    patients: NDArray[np.str_]
    labels: NDArray[np.float64]
    scores: NDArray[np.float64]
    split: NDArray[np.str_]
    groups: Mapping[str, tuple[str, ...]]
    digest: str

    def rows(self, split: str) -> NDArray[np.intp]:
        return np.flatnonzero(self.split == split)


def read_predictions(path: str | Path, source: Collection | None = None, findings: Sequence[str] = ()) -> Predictions:
    """Read predictions, and check all that would make their numbers meaningless.

    Args:
        path: The CSV.
        source: Where labels and patients are, if they are not in the file.
        findings: Those to judge; empty: all that the file has.
    Raises: DataError: a missing column; an image twice, or unknown to the source; a score that is missing or no number
        where there is a label; a label other than 1, 0 and empty; a finding without any positive or negative image; a
        patient in both splits. With the line and the fix.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected a CSV with columns image, patient, "
                        "FINDING_label, FINDING") from error  # fmt: skip
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8 CSV"
        ) from error
    # lines may end in any of the three ways; line breaks within quotes are kept
    reader = csv.reader(io.StringIO(text.replace("\r\n", "\n").replace("\r", "\n")))
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    try:
        header = [column.strip() for column in next(reader, [])]
        chosen = _findings(path, header, findings, source)
        for fields in reader:
            line = reader.line_num
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(f"{path} line {line} has {len(fields)} fields, its header {len(header)}; a line that "
                                "was cut off, or a comma that needs quotes around its field")  # fmt: skip
            rows.append({k: v.strip() for k, v in zip(header, fields, strict=True)})
            lines.append(line)
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} cannot be read as CSV: {error}") from error
    if not rows:
        raise DataError(f"{path} has a header but no rows")
    images = _images(path, rows, lines)
    records = _match(path, source, images, lines) if source is not None else None
    labels, scores = np.full((2, len(rows), len(chosen)), np.nan)
    for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
        for f, finding in enumerate(chosen):
            if records is not None and f"{finding}_label" not in header:
                labels[i, f] = records[i].labels.get(finding, np.nan)
            else:
                labels[i, f] = _label(path, line, finding, row[f"{finding}_label"])
            scores[i, f] = _score(path, line, finding, row[finding], needed=not math.isnan(labels[i, f]))
    patients = _patients(path, header, rows, lines, records)
    split = _splits(path, rows, lines, patients)
    for f, finding in enumerate(chosen):
        for value, kind in ((1, "positive"), (0, "negative")):
            if not (labels[split == "test", f] == value).any():
                raise DataError(f"{path} line 1: finding '{finding}' has no {kind} image to be judged on; leave it out "
                                f"(--findings {','.join(x for x in chosen if x != finding) or 'OTHER'})")  # fmt: skip
    groups = {name: _group(path, name, rows, lines, records) for name in ATTRIBUTES}
    return Predictions(
        path.name, chosen, images, patients, labels, scores, split, groups, hashlib.sha256(data).hexdigest()[:16]
    )


def evaluate_predictions(
    given: Predictions, config: EvaluateConfig, against: Predictions | None = None
) -> dict[str, Any]:
    """Judge predictions; ``evaluation.json`` of ``otcxr evaluate preds.csv``.

    Scores of a finding that all lie in [0, 1] are taken as probabilities, and their calibration is judged as they are;
    others only where validation rows let them be recalibrated. Thresholds are chosen on validation rows, on the scale
    of the scores.

    Args:
        given: The predictions.
        config: Resamples, level, recalibration, rule, within, subgroups, seed.
        against: Predictions for the same images, compared pair by pair.
    Raises: DataError: ``against`` is of other images, patients or labels. ConfigError: a setting that has no effect.
    """
    changed = flatten({k: v for k, v in to_plain(config).items() if k not in _USED})
    usual = flatten({k: v for k, v in to_plain(EvaluateConfig()).items() if k not in _USED})
    unused = [name for name, value in changed.items() if value != usual[name]]
    if unused:
        raise ConfigError(f"eval.{unused[0]} has no effect on a table of predictions; these have: "
                          f"{', '.join(f'eval.{name}' for name in _USED)}")  # fmt: skip
    settings = BootstrapSettings(config.resamples, config.seed, config.level)
    test, val = given.rows("test"), given.rows("val")
    judged, decisions = _judge(given, config)
    part = Part("test", [], given.labels[test], given.patients[test])
    result: dict[str, Any] = {
        "task": "predictions",
        "source": {"file": given.name, "digest": given.digest},
        "splits": {
            name: {"name": name, "images": len(rows), "patients": len(set(given.patients[rows].tolist()))}
            for name, rows in (("val", val), ("test", test))
        },
    }
    groups = {name: [given.groups[name][i] for i in test.tolist()] for name in ATTRIBUTES}
    sides = [judged]
    if against is not None:
        place = {image: i for i, image in enumerate(against.images)}
        _same_images(given, against, place)
        order = [place[given.images[i]] for i in test.tolist()]
        sides.append(_judge(against, config, order)[0])
    result |= _table(sides, part, given.findings, settings)
    result["decisions"] = decisions
    result["reliability"] = reliability_json(judged, part, given.findings)
    result["subgroups"] = measure_subgroups(
        part.labels, given.scores[test], given.scores[test], judged.thresholds[0], judged.threshold_notes,
        part.patients, given.findings, {name: groups[name] for name in config.subgroups}, settings,
    )  # fmt: skip
    result["within"] = {}
    for attribute in config.within:
        values = np.array([value or "unknown" for value in groups[attribute]])
        for value in sorted(set(values.tolist())) if len(set(values.tolist())) > 1 else []:
            rows = values == value
            own = part._replace(labels=part.labels[rows], patients=part.patients[rows])
            result["within"][f"{attribute}={value}"] = _table([only(ranking(s), rows) for s in sides], own,
                                                              given.findings, settings)  # fmt: skip
    if against is not None:
        for table in (result, *result["within"].values()):
            table["against"] = table.pop("random")
        result["against"]["source"] = {"file": against.name, "digest": against.digest}
    to = f"{against.name}, on the same images" if against is not None else "an AUROC that is known beforehand"
    result["power"] = power_json(result, to)
    result["settings"] = {k: v for k, v in to_plain(config).items() if k in _USED}
    result["environment"] = describe_environment()
    return result


def rows_of_predictions(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flatten to one row per (group of images, finding, measure); the CSV. Beside another table: its values, too."""
    rows = []
    tables = [("all", result), *result["within"].items()]
    for group, table in tables:
        for finding, entry in [*table["findings"].items(), ("macro", table["macro"])]:
            for measure, estimate in entry.items():
                if not isinstance(estimate, Mapping):
                    continue
                row = {"images": group, "finding": finding, "measure": measure}
                row |= {name: entry[name] for name in ("n", "positives", "patients")}
                row |= {name: estimate[name] for name in ("value", "low", "high", "note", "caution")}
                if "against" in table:
                    other, gap = (
                        (table[k]["macro"] if finding == "macro" else table[k]["findings"][finding]).get(measure, {})
                        for k in ("against", "difference")
                    )
                    row |= {f"against_{k}": other.get(k) for k in ("value", "low", "high")}
                    row |= {f"difference_{k}": gap.get(k) for k in ("value", "low", "high", *TESTS)}
                rows.append(row)
    return rows


def _table(
    sides: Sequence[Judged], part: Part, findings: tuple[str, ...], settings: BootstrapSettings
) -> dict[str, Any]:
    drawn = [draw_judged(side, part, findings, settings) for side in sides]
    if len(sides) == 1:
        return single_json(drawn[0])
    return compare_judged(drawn[0], drawn[1], part, (sides[0], sides[1]))


def _judge(
    given: Predictions, config: EvaluateConfig, order: Sequence[int] | None = None
) -> tuple[Judged, dict[str, Any]]:
    """Measures of the test rows (in an order), and what was chosen and fitted on the validation rows, for JSON."""
    val = given.rows("val")
    test = given.rows("test") if order is None else np.asarray(order, dtype=np.intp)
    scores = given.scores[test]
    probabilities = np.full(scores.shape, np.nan)
    thresholds, notes, calibrated = [], [], []
    decisions: dict[str, Any] = {}
    for f, finding in enumerate(given.findings):
        known = ~np.isnan(given.labels[:, f])
        own = given.scores[known, f]
        as_given = bool(((own >= 0) & (own <= 1)).all())
        z = logit(given.scores[:, f]) if as_given else given.scores[:, f]
        fitted = recalibrate(given.labels[val, f], z[val], config.recalibration) if len(val) else None
        note, what = "", "the scores as given"
        if as_given:
            probabilities[:, f] = scores[:, f]
        elif fitted is not None and fitted.kind != "none":
            probabilities[:, f] = np.nan_to_num(fitted(z[test]))
            what = f"recalibrated ({fitted.kind}) on the rows 'val'"
        else:
            why = "there are no rows 'val' to recalibrate them on" if fitted is None else fitted.note or (
                "eval.recalibration is none")  # fmt: skip
            note, what = f"no probabilities: scores leave [0, 1], and {why}", ""
        if len(val):
            points = [choose_threshold(given.labels[val, f], given.scores[val, f], rule) for rule in RULES]
        else:
            missing = "no threshold: there are no rows with split 'val' to choose it on"
            points = [OperatingPoint(None, rule, 0, 0, missing) for rule in RULES]
        point = next(p for p in points if p.rule == config.rule)
        thresholds.append(0.5 if point.threshold is None else point.threshold)
        notes.append(point.note)
        calibrated.append(note)
        decisions[finding] = {
            "recalibration": None if fitted is None else fitted.as_dict(),
            "operating_points": [p._asdict() for p in points], "calibration_of": what,
        }  # fmt: skip
    columns = ranking_columns(scores) | decision_columns(scores, thresholds, notes)
    columns |= calibration_columns(probabilities, calibrated)
    own = np.nan_to_num(probabilities)[None]
    return Judged(columns, scores[None], own, np.array([thresholds]), tuple(notes), ()), decisions


def _findings(path: Path, header: list[str], wanted: Sequence[str], source: Collection | None) -> tuple[str, ...]:
    if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        sign = next(sign for sign in ";\t|" if sign in header[0])
        name = {";": "semicolons", "\t": "tabs", "|": "bars"}[sign]
        raise DataError(f"{path} parts its columns by {name}; save it with commas, and numbers with a point")
    if "image" not in header:
        near = [column for column in header if column.lower() == "image"]
        if near:
            raise DataError(f"{path} has a column '{near[0]}'; names are written in small letters here: image, patient")
        raise DataError(f"{path} has no column 'image'. Found: {', '.join(header) or 'nothing'}; expected image, "
                        "patient, FINDING_label, FINDING")  # fmt: skip
    twice = next((column for column in header if column and header.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has two columns '{twice}'; rename or remove one")
    labelled = [c.removesuffix("_label") for c in header if c.endswith("_label")]
    if source is not None:
        labelled += [c for c in header if c in source.findings and c not in labelled]
    for finding in labelled:
        if finding in _KNOWN:
            raise DataError(f"{path} has a column '{finding}_label', but '{finding}' says who the patient is; give the "
                            "finding another name")  # fmt: skip
        if finding not in header:
            raise DataError(f"{path} has '{finding}_label' but no column '{finding}' with its scores"
                            f"{did_you_mean(finding, [c for c in header if c not in _KNOWN])}")  # fmt: skip
    if not labelled:
        raise DataError(f"{path} has no finding: expected pairs of columns such as Effusion_label and Effusion, or "
                        f"--data.source with labels. Found: {', '.join(header)}")  # fmt: skip
    for finding in wanted:
        if finding not in labelled:
            raise DataError(f"{path} has no finding '{finding}'{did_you_mean(finding, labelled)}")
    return tuple(wanted) or tuple(labelled)


def _images(path: Path, rows: list[dict[str, str]], lines: list[int]) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    for row, line in zip(rows, lines, strict=True):
        image = row["image"]
        if not image:
            raise DataError(f"{path} line {line} has no image; fill column 'image'")
        if image in seen:
            raise DataError(f"{path} line {line}: image '{image}' stands in line {seen[image]} too; keep one row for "
                            "each image (average several scores of one image)")  # fmt: skip
        seen[image] = line
    return tuple(seen)


def _match(path: Path, source: Collection, images: tuple[str, ...], lines: list[int]) -> list[Any]:
    known = {record.name: record for record in source.records}
    for image, line in zip(images, lines, strict=True):
        if image not in known:
            near = did_you_mean(image, list(known)[:5000])
            near = near if "mean" in near else ""
            raise DataError(f"{path} line {line}: {source.name} has no image '{image}'{near}; name images as the "
                            "source does, or leave the row out")  # fmt: skip
    return [known[image] for image in images]


def _label(path: Path, line: int, finding: str, text: str) -> float:
    if text == "":
        return math.nan
    if text in ("0", "1", "0.0", "1.0"):
        return float(text)
    raise DataError(f"{path} line {line}: label '{text}' of {finding} is none of 1, 0 and empty (not assessed); map "
                    "uncertain labels to one of them")  # fmt: skip


def _score(path: Path, line: int, finding: str, text: str, *, needed: bool) -> float:
    try:
        value = math.nan if "_" in text else float(text)  # Python takes 0_5 for 5
    except ValueError:
        value = math.nan
    if math.isnan(value) and text and text.lower() not in ("nan", "na", "null"):
        raise DataError(f"{path} line {line}: score '{text}' of {finding} is no number")
    if abs(value) > _MOST:
        raise DataError(f"{path} line {line}: the score of {finding} is {text}; scores must be within +-{_MOST:g}")
    if needed and not math.isfinite(value):
        raise DataError(f"{path} line {line}: the score of {finding} is {text or 'missing'} but there is a label; "
                        "score the image again, or empty its label to leave it out")  # fmt: skip
    return value


def _patients(
    path: Path, header: list[str], rows: list[dict[str, str]], lines: list[int], records: list[Any] | None
) -> NDArray[np.str_]:
    if "patient" in header:
        for row, line in zip(rows, lines, strict=True):
            if not row["patient"]:
                raise DataError(f"{path} line {line} has no patient; fill it, intervals are by patient")
        return np.array([row["patient"] for row in rows])
    if records is not None:
        return np.array([record.patient for record in records])
    raise DataError(f"{path} has no column 'patient'; intervals are by patient, since images of one patient resemble "
                    "each other. Where every image is of another patient, repeat the image's name there")  # fmt: skip


def _splits(path: Path, rows: list[dict[str, str]], lines: list[int], patients: NDArray[np.str_]) -> NDArray[np.str_]:
    out = []
    home: dict[str, tuple[str, int]] = {}
    for row, line, patient in zip(rows, lines, patients.tolist(), strict=True):
        split = row.get("split", "") or "test"
        if split not in _SPLITS:
            raise DataError(f"{path} line {line}: split '{split}' is none of val and test; drop rows that the model "
                            "was trained on")  # fmt: skip
        before = home.setdefault(patient, (split, line))
        if before[0] != split:
            raise DataError(f"{path} line {line}: patient '{patient}' is in split '{split}' here and in '{before[0]}' "
                            f"in line {before[1]}; a split must not cut through a patient")  # fmt: skip
        out.append(split)
    if "test" not in out:
        raise DataError(f"{path} has no row with split 'test' (or without a split): nothing to judge")
    return np.array(out)


def _group(
    path: Path, name: str, rows: list[dict[str, str]], lines: list[int], records: list[Any] | None
) -> tuple[str, ...]:
    """The value of an attribute in every row; "" where it is not known."""
    out = []
    for i, row in enumerate(rows):
        text = row.get(name, "")
        if not text and records is not None:
            found = getattr(records[i], name)
            text = "" if found is None else str(found)
        if name == "age" and text:
            try:
                text = age_band(float(text))
            except ValueError:
                raise DataError(f"{path} line {lines[i]}: age '{text}' is no number of years; leave it empty where it "
                                "is not known") from None  # fmt: skip
        if name == "sex" and text:
            if text.lower() not in _SEXES:
                raise DataError(f"{path} line {lines[i]}: sex '{text}' is none of F and M; leave it empty where it is "
                                "not known")  # fmt: skip
            text = _SEXES[text.lower()]
        out.append(text.upper() if name == "view" else text)
    return tuple(out)


def _same_images(given: Predictions, against: Predictions, there: Mapping[str, int]) -> None:
    """Raise DataError where predictions that are compared are not of the same images, patients and labels."""
    here = set(given.images)
    if against.findings != given.findings:
        both = [f"{table.name} judges {', '.join(table.findings)}" for table in (given, against)]
        raise DataError(f"{', but '.join(both)}; give both the same with --findings")
    for i in given.rows("test").tolist():
        image = given.images[i]
        if image not in there:
            raise DataError(f"{against.name} has no row for image '{image}' of {given.name}; a paired comparison needs "
                            "the same images in both")  # fmt: skip
        j = there[image]
        same = np.array_equal(given.labels[i], against.labels[j], equal_nan=True)
        if not same or given.patients[i] != against.patients[j]:
            raise DataError(f"{against.name} has another label or patient for image '{image}' than {given.name}")
    extra = next((image for image in there if image not in here), None)
    if extra is not None:
        raise DataError(f"{given.name} has no row for image '{extra}' of {against.name}; a paired comparison needs the "
                        "same images in both")  # fmt: skip
