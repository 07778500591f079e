"""What frozen features tell: a logistic regression fitted on them (linear probe), and the nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.metrics import auroc

__all__ = ["LinearProbe", "fit_probe", "knn_scores", "nearest_share"]

# One of the arrays that a block of queries needs at a time; there are about four.
_BLOCK_BYTES = 16 * 2**20

# Cosines are rounded to this many decimals, far above float64's rounding (1e-16) and far below any difference that
# means something: what is equal in mathematics is equal here, wherever it stands in the matrix that BLAS computes.
_DECIMALS = 12


class LinearProbe(NamedTuple):
    """Logistic regressions on pooled features, one per finding: logit = features @ weights.T + bias.

    Attributes:
        findings: F names.
        weights: (F, C) in units of the raw features.
        bias: (F,).
        strength: (F,) the inverse penalty C that cross-validation chose; 0 for a finding that could not be fitted.
    """

    findings: tuple[str, ...]
    weights: NDArray[np.float64]
    bias: NDArray[np.float64]
    strength: NDArray[np.float64]

    def score(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logits (N, F)."""
        return features.astype(np.float64) @ self.weights.T + self.bias


def fit_probe(
    features: NDArray[np.float32],
    labels: NDArray[np.float64],
    patients: Sequence[str],
    findings: Sequence[str],
    *,
    strengths: Sequence[float],
    folds: int,
    seed: int,
) -> LinearProbe:
    """Fit one L2-penalised logistic regression per finding on standardised features.

    The penalty is chosen per finding among ``strengths`` by the mean AUROC over folds that never part a patient. A
    finding with fewer than ``folds`` patients on either side is not fitted: its weights and its strength are 0, and no
    measure of it may be reported. A single candidate is taken as it is: nothing is cross-validated.

    Args:
        features: (N, C).
        labels: (N, F), NaN where not assessed.
        patients: N identifiers.
        findings: F names.
        strengths: Candidates for scikit-learn's C.
        folds: Folds of the cross-validation.
        seed: Of the folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    std = np.where(std > 1e-8, std, 1.0)
    x = (features - mean) / std
    groups = np.unique(np.asarray(patients), return_inverse=True)[1]
    weights = np.zeros((len(findings), features.shape[1]))
    bias, chosen = np.zeros(len(findings)), np.zeros(len(findings))

    def model(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=5000, tol=1e-4)

    for f in range(len(findings)):
        seen = ~np.isnan(labels[:, f])
        y, xs, group = labels[seen, f].astype(int), x[seen], groups[seen]
        if min(len(np.unique(group[y == 1])), len(np.unique(group[y == 0]))) < folds:
            continue
        chosen[f] = strengths[0]
        if len(strengths) > 1:
            splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            parts = [(fit, held) for fit, held in splitter.split(xs, y, group) if 0 < y[fit].sum() < len(fit)]

            def held_out(strength: float, y: Any = y, xs: Any = xs, parts: Any = parts) -> float:
                fitted = (model(strength).fit(xs[fit], y[fit]).decision_function(xs[held]) for fit, held in parts)
                return float(np.nanmean([auroc(y[held], s) for s, (_, held) in zip(fitted, parts, strict=True)]))

            chosen[f] = max(strengths, key=held_out)
        best = model(chosen[f]).fit(xs, y)
        weights[f] = best.coef_[0] / std
        bias[f] = best.intercept_[0] - weights[f] @ mean
    return LinearProbe(tuple(findings), weights, bias, chosen)


def knn_scores(
    features: NDArray[np.floating[Any]],
    labels: NDArray[np.float64],
    queries: NDArray[np.floating[Any]],
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> NDArray[np.float64]:
    """Score queries by the weighted share of positives among their nearest neighbours.

        s(q, f) = sum_i w_i y_if / sum_i w_i,    w_i = exp(cos(q, x_i) / temperature)

    over the ``neighbours`` images i that are most similar to q among those assessed for finding f (all of them where
    there are fewer). Nothing is fitted and nothing is random. Images equally similar at the edge of the neighbourhood:
    the earlier row is taken. Cosines that agree to 12 decimals are equal; a vector of zeros has cosine 0 to all.

    Args:
        features: What neighbours are looked for in, (N, C), N >= 1; finite; any scale, only directions count.
        labels: 1 present, 0 absent, NaN not assessed (no neighbour for this finding), (N, F).
        queries: (M, C), finite; a query that is among ``features`` is its own nearest neighbour.
        neighbours: How many, >= 1.
        temperature: > 0; small: the nearest decides, large: all neighbours count the same.
    Returns: (M, F) in [0, 1], higher means more suspect; NaN for a finding that no image is assessed for.
        Cost: M N C operations in float64 (2000 queries among 50,000 images of 512 channels: 4 s on one core); the
        inputs twice in float64, and 64 MB.
    Raises:
        DataError: shapes disagree, no features, values that are not finite, labels other than 0, 1 and NaN.
        ConfigError: ``neighbours`` or ``temperature`` out of range.
    Source: Wu et al., CVPR 2018, arXiv:1805.01978, sec. 3.4; temperature and 20 neighbours as in DINO's evaluation,
        arXiv:2104.14294. Theirs is a vote among classes; here every finding is a question of its own.
    """
    if neighbours < 1 or not 0 < temperature < np.inf:
        raise ConfigError(f"neighbours must be >= 1 and temperature > 0, received {neighbours} and {temperature}")
    scores = np.full((len(queries), np.shape(labels)[-1] if np.ndim(labels) == 2 else 0), np.nan)
    for rows, columns, near, counted in _neighbourhoods(features, labels, queries, neighbours):
        weights = np.exp((near - near[:, :1]) / temperature)  # the factor cancels; exp never overflows
        # the total is summed beside the findings, in the same order: a share of all is 1, not 1 but for rounding
        sums = (weights[:, :, None] * counted).sum(axis=1)
        scores[rows, columns] = sums[:, :-1] / sums[:, -1:]
    return scores


def nearest_share(
    features: NDArray[np.floating[Any]],
    labels: NDArray[np.float64],
    queries: NDArray[np.floating[Any]],
    counts: Sequence[int],
) -> list[NDArray[np.float64]]:
    """Share of the nearest images that have a finding: the precision of retrieving by likeness.

        p_k(q, f) = (number with finding f among the k images most similar to q, of those assessed for f) / k

    For a query that has the finding, averaged over such queries, it is precision at k; by chance it is the prevalence
    among ``features``. Where fewer than k are assessed, the share of those.

    Args:
        features, labels, queries: As :func:`knn_scores`.
        counts: Numbers k, each >= 1.
    Returns: For each k, (M, F) in [0, 1]; NaN for a finding that no image is assessed for. Cost as :func:`knn_scores`.
    Raises: DataError, ConfigError: as :func:`knn_scores`.
    """
    if not counts or min(counts) < 1:
        raise ConfigError(f"retrieval looks at 1 image or more, received {list(counts)}")
    out = [np.full((len(queries), np.shape(labels)[-1] if np.ndim(labels) == 2 else 0), np.nan) for _ in counts]
    for rows, columns, _, counted in _neighbourhoods(features, labels, queries, max(counts)):
        for k, shares in zip(counts, out, strict=True):
            shares[rows, columns] = counted[:, :k, :-1].mean(axis=1)
    return out


def _neighbourhoods(
    features: NDArray[np.floating[Any]],
    labels: NDArray[np.float64],
    queries: NDArray[np.floating[Any]],
    neighbours: int,
) -> Iterator[tuple[slice, list[int], NDArray[np.float64], NDArray[np.float64]]]:
    """Blocks of queries m with the findings g that are assessed on the same images, and their k nearest among those.

    Yields: rows and columns of the scores, cosines (m, k) falling, and labels (m, k, g + 1), the last column being 1.
    """
    x, q = _directions(features, "features"), _directions(queries, "queries")
    y = np.asarray(labels, dtype=np.float64)
    if not len(x) or q.shape[1] != x.shape[1] or y.ndim != 2 or len(y) != len(x):
        raise DataError(
            f"features have shape {x.shape}, labels {y.shape} and queries {q.shape}; expected (N, C), (N, F) and "
            "(M, C) with at least one image to compare with"
        )
    seen = ~np.isnan(y)
    if bad := int((seen & (y != 0) & (y != 1)).sum()):
        raise DataError(
            f"labels must be 0 (absent), 1 (present) or NaN (not assessed), but {bad} of {y.size} are not; "
            "map uncertain labels to one of the three"
        )
    together: dict[bytes, list[int]] = {}  # findings assessed on the same images have the same neighbours
    for f in range(y.shape[1]):
        together.setdefault(seen[:, f].tobytes(), []).append(f)
    step = max(1, _BLOCK_BYTES // (8 * max(len(x), min(neighbours, len(x)) * (y.shape[1] + 1))))
    for start in range(0, len(q), step):
        cosine = np.round(q[start : start + step] @ x.T, _DECIMALS)
        for columns in together.values():
            rows = np.flatnonzero(seen[:, columns[0]])
            if not rows.size:
                continue
            among = cosine if rows.size == len(x) else cosine[:, rows]
            nearest = _nearest(among, min(neighbours, rows.size))
            near = np.take_along_axis(among, nearest, axis=1)
            counted = np.column_stack((y[rows][:, columns], np.ones(rows.size)))[nearest]
            yield slice(start, start + len(cosine)), columns, near, counted


def _directions(vectors: NDArray[np.floating[Any]], what: str) -> NDArray[np.float64]:
    """(N, C) -> the same in float64 at length 1; rows of zeros stay."""
    x = np.array(vectors, dtype=np.float64)  # a copy, changed below
    if x.ndim != 2 or not x.shape[1]:
        raise DataError(f"{what} have shape {x.shape}; expected (images, channels) with at least one channel")
    if bad := int((~np.isfinite(x)).any(axis=1).sum()):
        raise DataError(f"{what} must be finite, but {bad} of {len(x)} images have NaN or infinite values; "
                        "the encoder that made them has diverged")  # fmt: skip
    largest = np.abs(x).max(axis=1, keepdims=True)
    x /= np.where(largest > 0, largest, 1.0)  # so that no square overflows or vanishes
    length = np.linalg.norm(x, axis=1, keepdims=True)
    x /= np.where(length > 0, length, 1.0)
    return x


def _nearest(similarity: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """(M, N) -> (M, count) columns with the largest values, falling; of equal ones the first."""
    edge = similarity.shape[1] - count
    least = np.partition(similarity, edge, axis=1)[:, edge, None]
    above, level = similarity > least, similarity == least
    room = count - above.sum(axis=1, keepdims=True)
    inside = above | (level & (np.cumsum(level, axis=1) <= room))
    columns = np.nonzero(inside)[1].reshape(-1, count)
    order = np.argsort(-np.take_along_axis(similarity, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
