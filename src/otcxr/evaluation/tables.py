"""From scores to numbers: measures of one encoder, its difference to another, groups, calibration, as plain values.

Scores of K seeds go in together; every estimate is the mean over them (``statistics``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from otcxr.evaluation import calibration
from otcxr.evaluation.classifier import Decision, fit_decisions, thresholds_of
from otcxr.evaluation.delong import delong
from otcxr.evaluation.estimates import BootstrapSettings, Comparison, as_json
from otcxr.evaluation.labelled import LabelDraw, Material, Part
from otcxr.evaluation.metrics import auroc
from otcxr.evaluation.protocols import Scored
from otcxr.evaluation.resampling import Column, Drawn, Metric, draw
from otcxr.evaluation.statistics import (
    POWER,
    calibration_columns,
    compare_drawn,
    decision_columns,
    ranking_columns,
    smallest_difference,
    tabulate,
)
from otcxr.evaluation.subgroups import attribute_of, measure_subgroups

__all__ = [
    "TESTS",
    "Judged",
    "compare_judged",
    "details",
    "draw_judged",
    "group_rows",
    "judge",
    "mean_of_negatives",
    "mean_of_positives",
    "measured_columns",
    "only",
    "power_json",
    "ranking",
    "reliability_json",
    "single_json",
    "table_json",
]


TESTS = ("p_value", "p_holm", "p_value_delong", "excludes_zero", "detectable")  # what belongs to a difference


class Judged(NamedTuple):
    """Scores of K seeds for one set of test images, ready to be measured.

    Attributes:
        columns: By measure.
        scores, probabilities: (K, N, F); None for retrieval.
        thresholds: (K, F).
        threshold_notes: For each finding "" or why it has no threshold.
        decisions: K times F.
    """

    columns: dict[str, Column]
    scores: NDArray[np.float64] | None
    probabilities: NDArray[np.float64] | None
    thresholds: NDArray[np.float64]
    threshold_notes: tuple[str, ...]
    decisions: tuple[tuple[Decision, ...], ...]


def judge(
    scored: Sequence[Scored],
    draws: Sequence[LabelDraw],
    material: Material,
    test: str,
    *,
    recalibration: str,
    rule: str,
    full: bool = True,
) -> Judged:
    """Prepare what K seeds said of a set of test images.

    Args:
        scored: K results of one protocol.
        draws: Their labels.
        material: Of all.
        test: Name of the test images.
        recalibration: One of ``calibration.RECALIBRATIONS``.
        rule: Of the operating point, a key of ``decisions.RULES``.
        full: Whether decisions and calibration are measured beside the ranking.
    """
    fitted = np.all([one.fitted for one in scored], axis=0)
    notes = tuple("" if ok else scored[0].missing for ok in fitted.tolist())
    values = {name: np.stack([one.tests[test][name] for one in scored]) for name in scored[0].tests[test]}
    if scored[0].val is None:
        columns = measured_columns(values, notes, material.tests[test])
        return Judged(columns, None, None, np.zeros((len(scored), len(notes))), notes, ())
    scores = values["score"]
    decisions = tuple(
        fit_decisions(material.val.labels[given.val], one.val, material.findings, recalibration)
        for one, given in zip(scored, draws, strict=True)
        if one.val is not None
    )
    probabilities = np.stack(
        [np.stack([d.recalibration(own[:, f]) for f, d in enumerate(row)], 1) for own, row in zip(scores, decisions,
                                                                                                  strict=True)]
    )  # fmt: skip
    points = [thresholds_of(row, rule) for row in decisions]
    thresholds = np.array([values for values, _ in points], dtype=np.float64)
    without = [next((own[f] for _, own in points if own[f]), "") for f in range(len(notes))]
    threshold_notes = tuple(a or b for a, b in zip(notes, without, strict=True))
    columns = {name: column._replace(notes=notes) for name, column in ranking_columns(scores).items()}
    if full:
        columns |= decision_columns(probabilities, thresholds, threshold_notes)
        raw = [next((f"not recalibrated: {own[f].recalibration.note}" for own in decisions
                     if own[f].recalibration.note), "") for f in range(len(notes))]  # fmt: skip
        columns |= calibration_columns(probabilities, [a or b for a, b in zip(notes, raw, strict=True)])
    return Judged(columns, scores, probabilities, thresholds, threshold_notes, decisions)


def measured_columns(values: Mapping[str, NDArray[np.float64]], notes: Sequence[str], part: Part) -> dict[str, Column]:
    """Columns of what each image shows by itself, (K, N, F) by measure: means over the images with the finding.

    Two measures look at images without it: ``empties`` (AUROC) and ``left_empty`` (mean over these).
    """
    negatives = [len(set(part.patients[part.labels[:, f] == 0].tolist())) for f in range(part.labels.shape[1])]
    least = BootstrapSettings.min_negative_patients
    few = [
        note or ("" if count >= least else f"not estimable: {count} patients without it, at least {least} needed")
        for note, count in zip(notes, negatives, strict=True)
    ]
    out = {}
    for name, array in values.items():
        column = Column(array, mean_of_positives, notes)
        if name == "hausdorff":
            column = column._replace(bounds=(0.0, math.sqrt(2)), higher_is_better=False, anchor=False)
        elif name == "plan_gain":
            column = column._replace(bounds=(-1.0, 1.0), anchor=False)
        elif name in ("empties", "left_empty"):
            metric: Metric = auroc if name == "empties" else mean_of_negatives
            column = column._replace(metrics=metric, notes=few, anchor=False)
        elif name == "found":
            column = column._replace(anchor=False)
        out[name] = column
    return out


def mean_of_negatives(labels: NDArray[np.float64], scores: NDArray[np.float64], weights: NDArray[Any]) -> Any:
    """As :func:`mean_of_positives`, over images without the finding."""
    return mean_of_positives(np.where(np.isnan(labels), labels, 1 - labels), scores, weights)


def mean_of_positives(labels: NDArray[np.float64], scores: NDArray[np.float64], weights: NDArray[Any]) -> Any:
    """Weighted mean of a number over images with the finding: labels (N,), scores (N,), weights (R, N) -> (R,)."""
    rows = np.flatnonzero(labels == 1)
    own = weights.take(rows, axis=1).astype(np.float64)
    total = own.sum(axis=1)
    return np.divide(own @ scores[rows], total, out=np.full(len(own), np.nan), where=total > 0)


def ranking(judged: Judged) -> Judged:
    """The same with the measures of the ranking only."""
    return judged._replace(columns={name: column for name, column in judged.columns.items() if column.anchor})


def only(judged: Judged, rows: NDArray[np.bool_]) -> Judged:
    """The same for some of the images."""

    def cut(column: Column) -> Column:
        scores = np.asarray(column.scores)
        return column._replace(scores=scores[..., rows, :])

    scores = None if judged.scores is None else judged.scores[:, rows]
    return judged._replace(columns={name: cut(column) for name, column in judged.columns.items()}, scores=scores)


def reliability_json(judged: Judged, part: Part, findings: tuple[str, ...]) -> dict[str, Any]:
    """What was said against what was, of the first seed, for every finding whose calibration is measured."""
    if judged.probabilities is None:
        return {}
    out = {}
    for f, finding in enumerate(findings):
        label, p = part.labels[:, f], judged.probabilities[0][:, f]
        notes = judged.columns["brier"].notes
        if (~np.isnan(label)).any() and not (notes and notes[f]):
            out[finding] = {
                "bins": [b._asdict() for b in calibration.reliability(label, p)],
                "calibration_error_by_chance": calibration.calibration_error_by_chance(label, p),
            }
    return out


def draw_judged(judged: Judged, part: Part, findings: tuple[str, ...], settings: BootstrapSettings) -> Drawn:
    """Draw all measures on resamples of the patients of a set of images."""
    return draw(part.labels, judged.columns, part.patients, findings, settings)


def compare_judged(a: Drawn, b: Drawn, part: Part, judged: tuple[Judged, Judged]) -> dict[str, Any]:
    """{findings, macro, intervals} of a, the same of b under "random", the differences under "difference".

    Where every patient has one image DeLong's p-value of the difference of AUROCs stands beside the bootstrap's.
    """
    table = table_json(compare_drawn(a, b))
    one, other = judged[0].scores, judged[1].scores
    if one is None or other is None or len(one) > 1 or len(set(part.patients.tolist())) < len(part.patients):
        return table
    for f, finding in enumerate(a.findings):
        entry = table["difference"]["findings"][finding]["auroc"]
        if entry["value"] is not None:
            found = delong(part.labels[:, f], one[0][:, f], other[0][:, f], part.patients)
            entry["p_value_delong"] = found.p_value
    return table


def table_json(comparison: Comparison) -> dict[str, Any]:
    """Comparison -> {findings, macro, intervals, random: {findings, macro}, difference: {findings, macro}}."""
    plain = as_json(comparison)

    def side(name: str) -> dict[str, Any]:
        def pick(row: dict[str, Any]) -> dict[str, Any]:
            return {k: v[name] if isinstance(v, dict) and name in v else v for k, v in row.items()}

        return {"findings": {f: pick(row) for f, row in plain["findings"].items()}, "macro": pick(plain["macro"])}

    return {**side("a"), "intervals": plain["intervals"], "random": side("b"), "difference": side("difference")}


def details(
    judged: Judged, part: Part, findings: tuple[str, ...], attributes: Sequence[str], settings: BootstrapSettings
) -> dict[str, Any]:
    """Decisions, reliability and subgroups: everything that has no counterpart in the other encoder."""
    if judged.scores is None or judged.probabilities is None:
        return {}
    first = judged.decisions[0]
    groups = {name: [attribute_of(record, name) for record in part.records] for name in attributes}
    return {
        "decisions": {
            d.finding: {"recalibration": d.recalibration.as_dict(), "operating_points": [x._asdict() for x in d.points]}
            for d in first
        },
        "reliability": reliability_json(judged, part, findings),
        "subgroups": measure_subgroups(
            part.labels, judged.scores, judged.probabilities, judged.thresholds, judged.threshold_notes, part.patients,
            findings, groups, settings,
        ),
    }  # fmt: skip


def single_json(drawn: Drawn) -> dict[str, Any]:
    """{findings, macro, intervals} without another encoder."""
    return as_json(tabulate(drawn))


def power_json(table: Mapping[str, Any], to: str) -> dict[str, Any]:
    """The smallest true difference that these test images can show, for every finding and the macro mean.

    Args:
        table: With ``difference``: of the paired difference there; without: of the value to a number that is known
            beforehand.
        to: What the difference is to, in words.
    Returns: Of the first measure that the table has: {measure, power, level, to, findings, findings_holm, macro};
        ``findings`` each tested alone, ``findings_holm`` when all of them are tested at once and corrected. None where
        it cannot be told, two seeds by themselves among it.
    """
    level = table["intervals"]["level"]
    rows = table.get("difference", table)
    measure = next((k for k, v in rows["macro"].items() if isinstance(v, Mapping) and "value" in v), "auroc")
    known = [v for v in rows["findings"].values() if v.get(measure, {}).get("value") is not None]

    def of(row: Mapping[str, Any], tests: int = 1) -> float | None:
        estimate = row.get(measure, {})
        if estimate.get("low") is None or estimate.get("high") is None or estimate.get("seed_freedom") == 1:
            return None
        return smallest_difference((estimate["high"] - estimate["low"]) / 2, level, tests)

    return {
        "measure": measure, "power": POWER, "level": level, "to": to,
        "findings": {finding: of(row) for finding, row in rows["findings"].items()},
        "findings_holm": {finding: of(row, len(known)) for finding, row in rows["findings"].items()},
        "macro": of(rows["macro"]),
    }  # fmt: skip


def group_rows(part: Part, attribute: str) -> Mapping[str, NDArray[np.bool_]]:
    """Rows of every value of an attribute, "unknown" for those without one; empty where all have the same."""
    values = np.array([attribute_of(record, attribute) or "unknown" for record in part.records])
    names = sorted(set(values.tolist()))
    return {name: values == name for name in names} if len(names) > 1 else {}
