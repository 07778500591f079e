"""What follows from calling an image positive at a threshold, and how a threshold is chosen on validation images.

An image is called positive where its score is at least the threshold. Every measure takes weights as those of
``metrics`` do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcxr.errors import ConfigError
from otcxr.evaluation.metrics import assessed, divide, over_weights

__all__ = [
    "RULES",
    "OperatingPoint",
    "choose_threshold",
    "f1",
    "flagged",
    "negative_predictive_value",
    "positive_predictive_value",
    "sensitivity",
    "specificity",
]

_Counted = NDArray[np.float64]


class OperatingPoint(NamedTuple):
    """A threshold with the rule that chose it and the images it was chosen on.

    Attributes:
        threshold: Images that score so much or more are called positive; None where none could be chosen.
        rule: A key of ``RULES``.
        positives, negatives: Validation images behind it.
        note: "" or why there is none.
    """

    threshold: float | None
    rule: str
    positives: int
    negatives: int
    note: str = ""


def sensitivity(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None, *, threshold: float) -> Any:
    """Share of positive images that are called positive.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (the row is left out), shape (N,).
        scores: Shape (N,), on the scale of the threshold.
        weights: None (all 1), (N,) or (R, N); finite and >= 0.
        threshold: Images that score so much or more are called positive.
    Returns: A number in [0, 1], or (R,) float64 for (R, N) weights; NaN without positive weight.
    Raises: DataError: as ``metrics.auroc``.
    """
    return _of(labels, scores, weights, threshold, lambda tp, fp, fn, tn: divide(tp, tp + fn))


def specificity(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None, *, threshold: float) -> Any:
    """Share of negative images that are not called positive; arguments as :func:`sensitivity`."""
    return _of(labels, scores, weights, threshold, lambda tp, fp, fn, tn: divide(tn, tn + fp))


def positive_predictive_value(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None, *, threshold: float
) -> Any:
    """Share of images called positive that are; NaN where none is called. Arguments as :func:`sensitivity`."""
    return _of(labels, scores, weights, threshold, lambda tp, fp, fn, tn: divide(tp, tp + fp))


def negative_predictive_value(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None, *, threshold: float
) -> Any:
    """Share of images not called positive that are not; NaN where all are called. Arguments as :func:`sensitivity`."""
    return _of(labels, scores, weights, threshold, lambda tp, fp, fn, tn: divide(tn, tn + fn))


def f1(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None, *, threshold: float) -> Any:
    """Harmonic mean of sensitivity and positive predictive value, 2 TP / (2 TP + FP + FN).

    0 where images are called or positive but none is both; NaN where there is neither. Arguments as
    :func:`sensitivity`.
    """
    return _of(labels, scores, weights, threshold, lambda tp, fp, fn, tn: divide(2 * tp, 2 * tp + fp + fn))


def flagged(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None, *, threshold: float) -> Any:
    """Share of the assessed images that are called positive: what somebody has to look at. Times 1000: of 1000."""
    return _of(labels, scores, weights, threshold, lambda tp, fp, fn, tn: divide(tp + fp, tp + fp + fn + tn))


def _of(
    labels: ArrayLike,
    scores: ArrayLike,
    weights: ArrayLike | None,
    threshold: float,
    share: Callable[[_Counted, _Counted, _Counted, _Counted], _Counted],
) -> Any:
    """A function of true and false positives, false and true negatives, (R,) each."""
    label, score, _ = assessed(labels, scores)
    called = score >= threshold
    kinds = [np.flatnonzero(kind) for kind in (
        (label == 1) & called, (label == 0) & called, (label == 1) & ~called, (label == 0) & ~called
    )]  # fmt: skip

    def compute(chunk: NDArray[Any]) -> _Counted:
        return share(*(chunk.take(rows, axis=1).sum(axis=1, dtype=np.float64) for rows in kinds))

    return over_weights(compute, weights, label.size)


def _largest_f1(label: NDArray[np.float64], score: NDArray[np.float64]) -> float:
    """The threshold, one of the scores, with the largest F1; of equal ones the highest."""
    order = np.argsort(-score, kind="stable")
    ranked, hits = score[order], np.cumsum(label[order])
    ends = np.append(np.flatnonzero(np.diff(ranked)), ranked.size - 1)  # last row of every distinct score
    value = 2 * hits[ends] / (ends + 1 + hits[-1])
    return float(ranked[ends[int(np.argmax(value))]])


def _least_specificity(least: float) -> Callable[[NDArray[np.float64], NDArray[np.float64]], float]:
    def choose(label: NDArray[np.float64], score: NDArray[np.float64]) -> float:
        """The lowest threshold, one of the scores or above all, at which the specificity is ``least`` or more."""
        negative = np.sort(score[label == 0])
        k = math.ceil(least * (1 - 1e-12) * negative.size)  # so many negatives must lie below the threshold
        if k == 0:
            return float(score.min())
        higher = score[score > negative[k - 1]]
        return float(higher.min()) if higher.size else float(np.nextafter(score.max(), np.inf))

    return choose


# what a threshold is chosen for
RULES: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], float]] = {
    "largest F1": _largest_f1,
    "specificity 0.90": _least_specificity(0.90),
    "specificity 0.95": _least_specificity(0.95),
}


def choose_threshold(labels: ArrayLike, scores: ArrayLike, rule: str, *, least: int = 5) -> OperatingPoint:
    """Choose a threshold on validation images.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (the row is left out), shape (N,).
        scores: Shape (N,), finite where assessed.
        rule: A key of ``RULES``.
        least: Positive and negative images that it takes; fewer is no error but a note.
    Returns: The operating point.
    Raises: DataError: as ``metrics.auroc``. ConfigError: there is no such rule.
    """
    if rule not in RULES:
        raise ConfigError(f"unknown rule '{rule}' for a threshold; known: {', '.join(RULES)}")
    label, score, mask = assessed(labels, scores)
    label, score = label[mask], score[mask]
    positives, negatives = int((label == 1).sum()), int((label == 0).sum())
    if min(positives, negatives) < least:
        note = f"no threshold: {positives} positive and {negatives} negative validation images, {least} of each needed"
        return OperatingPoint(None, rule, positives, negatives, note)
    return OperatingPoint(RULES[rule](label, score), rule, positives, negatives)
