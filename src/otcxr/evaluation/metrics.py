"""Measures of how well scores rank images with a finding above images without it.

Every measure takes weights, one set or many at once, because that is all a bootstrap needs: a resample in which an
image occurs k times is the same images with weight k. The scores are sorted once, whatever the number of resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcxr.errors import ConfigError, DataError

__all__ = [
    "assessed",
    "auroc",
    "average_precision",
    "checked_labels",
    "divide",
    "over_weights",
    "prevalence",
    "sensitivity_at_specificity",
]

FloatArray: TypeAlias = NDArray[np.float64]
RowArray: TypeAlias = NDArray[np.intp]

# Working memory for many sets of weights, and what one weight needs of it: gathered, accumulated and looked up again,
# each as float64. Small enough to stay mostly in cache, and far below the 2000 x 25,000 weights themselves.
_CHUNK_BYTES = 32 * 2**20
_BYTES_PER_WEIGHT = 4 * 8


@overload
def auroc(labels: ArrayLike, scores: ArrayLike, weights: None = None) -> float: ...
@overload
def auroc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> float | FloatArray: ...
def auroc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float | FloatArray:
    """Return the probability that an image with the finding scores higher than an image without it; ties count half.

        AUROC = sum_ij w_i w_j ([s_i > s_j] + [s_i = s_j] / 2) / (sum_i w_i  sum_j w_j),    i positive, j negative

    This is the weighted Mann-Whitney statistic, equal to the area under the ROC curve with straight lines across ties.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (the row is left out), shape (N,).
        scores: Any finite numbers, higher means more suspect, shape (N,); only their order matters.
        weights: None (all 1), one weight per image (N,), or R sets of weights (R, N); finite and >= 0: how often an
            image occurs in a resample, or how many images it stands for.
    Returns: A number in [0, 1], or (R,) float64 for (R, N) weights. 0.5 is chance. Exact up to one rounding for integer
        weights. Without positive or without negative weight there is no pair to rank: NaN, not an error.
        Cost: one sort, then O(N) per set of weights, in chunks of about 32 MB.
    Raises: DataError: shapes disagree, no rows, labels other than 0, 1 and NaN, scores of assessed rows or weights that
        are not finite, negative weights.
    Source: Mann and Whitney, Ann. Math. Statist. 18, 1947; Hanley and McNeil, Radiology 143, 1982.
    """
    labels, scores, _ = assessed(labels, scores)
    ranking = _rank(labels, scores)

    def compute(chunk: NDArray[Any]) -> FloatArray:
        positive = chunk.take(ranking.positives, axis=1).astype(np.float64)
        below = _cumulate(chunk, ranking.negatives)
        # Halves and products of counts are exact in float64, so ties and perfect rankings give exactly 0.5 and 1.
        outranked = below.take(ranking.smaller, axis=1)
        outranked += below.take(ranking.not_larger, axis=1)
        pairs = positive.sum(axis=1) * below[:, -1]
        return divide(0.5 * np.vecdot(positive, outranked), pairs)

    return over_weights(compute, weights, labels.size)


@overload
def average_precision(labels: ArrayLike, scores: ArrayLike, weights: None = None) -> float: ...
@overload
def average_precision(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> float | FloatArray: ...
def average_precision(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float | FloatArray:
    """Return the average precision, the step-wise area under the precision-recall curve.

        AP = sum_k (recall_k - recall_{k-1}) precision_k        over the distinct scores as thresholds, from the highest

    "Called positive" at a threshold means score >= threshold, so images with equal scores enter together and their
    order in the input does not matter. Points are not joined by straight lines, which would be optimistic.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (the row is left out), shape (N,).
        scores: Any finite numbers, higher means more suspect, shape (N,); only their order matters.
        weights: None (all 1), one weight per image (N,), or R sets of weights (R, N); finite and >= 0.
    Returns: A number in (0, 1], or (R,) float64 for (R, N) weights. Scores without information give about the
        :func:`prevalence`, so the two belong side by side, and values from collections of different prevalence do not
        compare. Without positive weight: NaN, not an error. Without negative weight: 1.
    Raises: DataError: as :func:`auroc`.
    Source: scikit-learn's ``average_precision_score``; Davis and Goadrich, ICML 2006, on why not straight lines.
    """
    labels, scores, _ = assessed(labels, scores)
    ranking = _rank(labels, scores)
    # Accumulated from the highest score down: subtracting from a total would leave rounding where nothing should be.
    falling_positives, falling_negatives = ranking.positives[::-1], ranking.negatives[::-1]
    called_positives = ranking.positives.size - ranking.smaller_positives[::-1]
    called_negatives = ranking.negatives.size - ranking.smaller[::-1]

    def compute(chunk: NDArray[Any]) -> FloatArray:
        positive = chunk.take(falling_positives, axis=1).astype(np.float64)
        hits = _cumulate(chunk, falling_positives).take(called_positives, axis=1)
        called = _cumulate(chunk, falling_negatives).take(called_negatives, axis=1)
        called += hits
        # The sum over thresholds is written as a sum over positives: each adds its weight to the recall at its score.
        # Where nothing is called, the positive itself has weight 0 and its precision does not count.
        precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
        return divide(np.vecdot(positive, precision), positive.sum(axis=1))

    return over_weights(compute, weights, labels.size)


@overload
def sensitivity_at_specificity(
    labels: ArrayLike, scores: ArrayLike, weights: None = None, *, specificity: float = 0.9
) -> float: ...
@overload
def sensitivity_at_specificity(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike, *, specificity: float = 0.9
) -> float | FloatArray: ...
def sensitivity_at_specificity(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None, *, specificity: float = 0.9
) -> float | FloatArray:
    """Return the sensitivity where the specificity is first reached: a point of the ROC curve, not between its points.

        max over thresholds c with  w(s <= c, negative) >= specificity w(negative)  of  w(s > c, positive) / w(positive)

    The threshold is looked for anew in every set of weights, so an interval covers that it was found on the same
    images. It describes the ranking; what a threshold found on *other* images does is ``decisions.sensitivity``.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (the row is left out), shape (N,).
        scores: Any finite numbers, higher means more suspect, shape (N,); only their order matters.
        weights: None (all 1), one weight per image (N,), or R sets of weights (R, N); finite and >= 0.
        specificity: Least specificity, in [0, 1].
    Returns: A number in [0, 1], or (R,) float64 for (R, N) weights; about 1 - ``specificity`` by chance. Without
        positive or without negative weight: NaN, not an error.
    Raises: DataError: as :func:`auroc`. ConfigError: ``specificity`` is not in [0, 1].
    """
    if not 0 <= specificity <= 1:
        raise ConfigError(f"specificity is {specificity}; it must lie in [0, 1], 0.9 is usual")
    labels, scores, _ = assessed(labels, scores)
    ranking = _rank(labels, scores)
    above, below = scores[ranking.positives], scores[ranking.negatives]
    # a threshold at the k-th negative leaves out the positives that score as it does, or less; k = 0 leaves out none
    left_out = np.concatenate(([0], np.searchsorted(above, below, side="right")))

    def compute(chunk: NDArray[Any]) -> FloatArray:
        negative = _cumulate(chunk, ranking.negatives)
        positive = _cumulate(chunk, ranking.positives)
        least = specificity * (1 - 1e-12) * negative[:, -1:]  # a share of a count is off by rounding
        k = (negative < least).sum(axis=1)
        found = positive[:, -1] - np.take_along_axis(positive, left_out[k][:, None], axis=1)[:, 0]
        return np.where(negative[:, -1] > 0, divide(found, positive[:, -1]), np.nan)

    return over_weights(compute, weights, labels.size)


@overload
def prevalence(labels: ArrayLike, weights: None = None) -> float: ...
@overload
def prevalence(labels: ArrayLike, weights: ArrayLike) -> float | FloatArray: ...
def prevalence(labels: ArrayLike, weights: ArrayLike | None = None) -> float | FloatArray:
    """Return the share of the assessed images that have the finding: what :func:`average_precision` is without skill.

        prevalence = sum_i w_i y_i / sum_i w_i

    Args:
        labels: 1 present, 0 absent, NaN not assessed (the row is left out), shape (N,).
        weights: None (all 1), one weight per image (N,), or R sets of weights (R, N); finite and >= 0.
    Returns: A number in [0, 1], or (R,) float64 for (R, N) weights. Nothing assessed: NaN, not an error.
    Raises: DataError: as :func:`auroc`.
    """
    labels = checked_labels(labels, "")
    present = np.flatnonzero(labels == 1)
    either = np.flatnonzero(~np.isnan(labels))

    def compute(chunk: NDArray[Any]) -> FloatArray:
        total = chunk.take(either, axis=1).sum(axis=1, dtype=np.float64)
        return divide(chunk.take(present, axis=1).sum(axis=1, dtype=np.float64), total)

    return over_weights(compute, weights, labels.size)


def assessed(
    labels: ArrayLike, scores: ArrayLike, *, name: str = ""
) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Check one finding's labels and scores and return both as float64 with the mask of the rows that have a label.

    Args:
        labels: 1 present, 0 absent, NaN not assessed, shape (N,).
        scores: Shape (N,). Only scores of assessed rows must be finite: the others are never looked at.
        name: What the error messages call these scores, usually the finding.
    Returns: labels (N,), scores (N,), mask (N,) bool, True where the label is not NaN. All False is not an error.
    Raises: DataError: shapes disagree, no rows, labels other than 0, 1 and NaN, scores of assessed rows not finite.
    """
    of = f" of {name!r}" if name else ""
    checked = checked_labels(labels, of)
    values = _as_floats(scores, f"scores{of}")
    if values.shape != checked.shape:
        raise DataError(f"scores{of} have shape {values.shape}, but labels{of} have shape {checked.shape}")
    mask = ~np.isnan(checked)
    bad = np.flatnonzero(mask & ~np.isfinite(values))
    if bad.size:
        raise DataError(
            f"scores{of} must be finite, but {bad.size} of {int(mask.sum())} assessed rows are NaN or infinite "
            f"(rows {_listed(bad)}); score these images again, or leave them out for every model that is compared"
        )
    return checked, values, mask


class _Ranking(NamedTuple):
    """Where each positive stands among the others. Positives and negatives are rows of the input, by rising score."""

    positives: RowArray
    negatives: RowArray
    smaller: RowArray  # per positive: how many negatives score strictly less
    not_larger: RowArray  # per positive: how many negatives score less or the same
    smaller_positives: RowArray  # per positive: how many positives score strictly less


def _rank(labels: FloatArray, scores: FloatArray) -> _Ranking:
    def rising(label: int) -> RowArray:
        rows = np.flatnonzero(labels == label)
        return rows[np.argsort(scores[rows], kind="stable")]

    positives, negatives = rising(1), rising(0)
    above, below = scores[positives], scores[negatives]
    return _Ranking(
        positives,
        negatives,
        smaller=np.searchsorted(below, above, side="left"),
        not_larger=np.searchsorted(below, above, side="right"),
        smaller_positives=np.searchsorted(above, above, side="left"),
    )


def _cumulate(chunk: NDArray[Any], rows: RowArray) -> FloatArray:
    """(r, N) weights, K rows -> (r, K + 1): column k is the summed weight of the first k rows."""
    total = np.zeros((len(chunk), rows.size + 1))
    np.cumsum(chunk.take(rows, axis=1), axis=1, dtype=np.float64, out=total[:, 1:])
    return total


def divide(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Divide; NaN where the denominator is 0, that is where a measure is undefined."""
    return np.divide(numerator, denominator, out=np.full_like(denominator, np.nan), where=denominator > 0)


def over_weights(
    compute: Callable[[NDArray[Any]], FloatArray], weights: ArrayLike | None, images: int
) -> float | FloatArray:
    """Compute a measure for one set of weights or for many, in chunks that fit into memory.

    Args:
        compute: Weights (r, N) -> the measure for each of the r sets, (r,).
        weights: None (all 1), (N,) or (R, N); finite and >= 0.
        images: N.
    Returns: A number, or (R,) for (R, N) weights.
    Raises: DataError: weights of another shape, not finite or negative.
    """
    if weights is None:
        return float(compute(np.ones((1, images), dtype=np.uint8))[0])
    checked = _checked_weights(weights, images)
    if checked.ndim == 1:
        return float(compute(checked[None])[0])
    values = np.empty(len(checked))
    step = max(1, _CHUNK_BYTES // (_BYTES_PER_WEIGHT * images))
    for start in range(0, len(checked), step):
        values[start : start + step] = compute(checked[start : start + step])
    return values


def checked_labels(labels: ArrayLike, of: str = "") -> FloatArray:
    """Labels as float64, (N,).

    Raises: DataError: no rows, or labels other than 0, 1 and NaN; ``of`` says of what.
    """
    values = _as_floats(labels, f"labels{of}")
    if values.ndim != 1 or not values.size:
        raise DataError(f"labels{of} have shape {values.shape}; expected (N,) with at least one image")
    bad = np.flatnonzero(~((values == 0) | (values == 1) | np.isnan(values)))
    if bad.size:
        raise DataError(
            f"labels{of} must be 0 (absent), 1 (present) or NaN (not assessed), but {bad.size} of {values.size} rows "
            f"are not, the first is {values[bad[0]]:g} (rows {_listed(bad)}); map uncertain labels to one of the three"
        )
    return values


def _checked_weights(weights: ArrayLike, images: int) -> NDArray[Any]:
    values = np.asarray(weights)
    if values.dtype.kind not in "buif":
        values = _as_floats(weights, "weights")
    if values.ndim not in (1, 2) or values.shape[-1] != images:
        raise DataError(f"weights have shape {values.shape}; {images} images need ({images},) or (R, {images})")
    # Counts of a resample are unsigned: nothing to check, and no pass over what may be 50 million of them.
    if values.dtype.kind in "if" and values.size and not (values.min() >= 0 and values.max() < np.inf):
        raise DataError("weights must be finite and >= 0; to leave an image out, give it weight 0 or the label NaN")
    return values


def _as_floats(values: ArrayLike, what: str) -> FloatArray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be numbers: {error}") from error


def _listed(rows: RowArray, most: int = 5) -> str:
    return ", ".join(str(row) for row in rows[:most]) + (", ..." if rows.size > most else "")
