"""Whether a model serves everyone alike: its measures within groups of patients, and gaps at one operating point.

    gap of a group = measure within the group - measure among all others whose attribute is known

The threshold is the same for everyone, as it would be in use. A sensitivity below that of the others is underdiagnosis
(Seyyed-Kalantari et al., Nature Medicine 27, 2021). Both sides are measured on the same resamples of patients. A group
with fewer than 20 positive (for false positives: negative) images of a finding is listed, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcxr.data.records import Record
from otcxr.evaluation.estimates import BootstrapSettings, Difference, Estimate
from otcxr.evaluation.resampling import Column, Drawn, draw
from otcxr.evaluation.statistics import compare_drawn, decision_columns, ranking_columns, tabulate

__all__ = ["AGE_BANDS", "ATTRIBUTES", "FEWEST", "age_band", "attribute_of", "measure_subgroups"]

ATTRIBUTES = ("view", "sex", "age")
AGE_BANDS = ((0, 40), (40, 60), (60, 80), (80, math.inf))  # years, the upper end not included
FEWEST = 20  # images on the side that a rate is of


def age_band(age: float | None) -> str:
    """The band of an age in years, such as "40-59"; "" where it is not known."""
    if age is None:
        return ""
    low, high = next((band for band in AGE_BANDS if band[0] <= age < band[1]), (0.0, math.nan))
    return f"{low:.0f}+" if math.isinf(high) else "" if math.isnan(high) else f"{low:.0f}-{high - 1:.0f}"


def attribute_of(record: Record, attribute: str) -> str:
    """Value of an attribute of ``ATTRIBUTES``; "" where it is not known."""
    return age_band(record.age) if attribute == "age" else str(getattr(record, attribute) or "")


def measure_subgroups(
    labels: NDArray[np.float64],
    scores: ArrayLike,
    probabilities: ArrayLike,
    thresholds: ArrayLike,
    notes: Sequence[str],
    patients: ArrayLike,
    findings: tuple[str, ...],
    groups: Mapping[str, Sequence[str]],
    settings: BootstrapSettings,
) -> dict[str, Any]:
    """Measure AUROC, sensitivity and false positive rate within groups, with the gaps to the others.

    Args:
        labels: (N, F), NaN where not assessed.
        scores: (N, F) or (K, N, F), for the ranking.
        probabilities: The same shape, on the scale of the thresholds.
        thresholds: (F,) or (K, F).
        notes: For each finding "" or why it has no threshold.
        patients: (N,).
        findings: F names.
        groups: By attribute, the value of each of the N images; "" is unknown.
        settings: Of the resamples.
    Returns: Plain values: {attribute: {value: {images, patients, findings: {finding: {n, positives, auroc, sensitivity,
        false_positive_rate}}}}}; each measure {value, low, high, note, gap: {value, low, high, p_value}}. Attributes
        with fewer than two known values are left out.
    """
    out: dict[str, Any] = {}
    people = np.asarray(patients)
    for attribute, given in groups.items():
        values = np.array([str(value) for value in given])
        names = sorted(set(values.tolist()) - {""})
        if len(names) < 2:
            continue
        out[attribute] = {}
        for name in names:
            inside, others = values == name, (values != name) & (values != "")
            sides = [
                _draw(labels, scores, probabilities, thresholds, notes, people, findings, rows, settings)
                for rows in (inside, others)
            ]
            out[attribute][name] = {
                "images": int(inside.sum()),
                "patients": len(set(people[inside].tolist())),
                "findings": _rows(*sides),
            }
    return out


def _draw(
    labels: NDArray[np.float64], scores: ArrayLike, probabilities: ArrayLike, thresholds: ArrayLike,
    notes: Sequence[str], patients: NDArray[Any], findings: tuple[str, ...], rows: NDArray[np.bool_],
    settings: BootstrapSettings,
) -> Drawn:  # fmt: skip
    """Measures among some rows, on resamples of all patients."""
    known = np.where(rows[:, None], labels, np.nan)
    positives, negatives = ((known == y).sum(axis=0) for y in (1, 0))

    def few(side: NDArray[np.int_], kind: str) -> list[str]:
        return [
            f"not measured: {n} {kind} images, at least {FEWEST} needed" if n < FEWEST else "" for n in side.tolist()
        ]

    both = [a or b for a, b in zip(few(positives, "positive"), few(negatives, "negative"), strict=True)]
    decided = decision_columns(probabilities, thresholds)
    columns = {
        "auroc": ranking_columns(scores)["auroc"]._replace(notes=both),
        "sensitivity": _noted(decided["sensitivity"], notes, few(positives, "positive")),
        # 1 - specificity; its estimates are turned below
        "specificity": _noted(decided["specificity"], notes, few(negatives, "negative")),
    }
    return draw(known, columns, patients, findings, settings)


def _noted(column: Column, *notes: Sequence[str]) -> Column:
    return column._replace(notes=[next(filter(None, given), "") for given in zip(*notes, strict=True)])


def _rows(inside: Drawn, others: Drawn) -> dict[str, Any]:
    table, gaps = tabulate(inside), compare_drawn(inside, others, same_images=False)
    out = {}
    for row, gap in zip(table.findings, gaps.findings, strict=True):
        entry: dict[str, Any] = {"n": row.counts.n, "positives": row.counts.positives}
        for name in ("auroc", "sensitivity", "specificity"):
            turned = name == "specificity"
            own = _plain(row.measures[name], turned)
            entry["false_positive_rate" if turned else name] = own | {
                "gap": _gap(gap.measures[name].difference, turned)
            }
        out[row.finding] = entry
    return out


def _plain(estimate: Estimate, turned: bool) -> dict[str, Any]:
    value, low, high = estimate.value, estimate.low, estimate.high
    if turned and value is not None and low is not None and high is not None:
        value, low, high = 1 - value, 1 - high, 1 - low
    return {"value": value, "low": low, "high": high, "note": estimate.note}


def _gap(difference: Difference, turned: bool) -> dict[str, Any]:
    value, low, high = difference.estimate.value, difference.estimate.low, difference.estimate.high
    if turned and value is not None and low is not None and high is not None:
        value, low, high = -value, -high, -low
    return {"value": value, "low": low, "high": high, "p_value": difference.p_value}
