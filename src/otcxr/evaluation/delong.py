"""DeLong's covariance of AUROCs: a test without resampling, for one image of each patient.

    V10_i = mean over negatives j of psi(s_i, s_j),   V01_j = mean over positives i of psi(s_i, s_j)
    psi(a, b) = [a > b] + [a = b] / 2,    AUROC = mean V10 = mean V01
    cov(A, B) = cov(V10^A, V10^B) / n_pos + cov(V01^A, V01^B) / n_neg

It takes images as independent; where a patient has several it is wrong, and refused.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcxr.errors import DataError
from otcxr.evaluation.metrics import assessed
from otcxr.evaluation.resampling import patient_codes

__all__ = ["DeLong", "delong"]


class DeLong(NamedTuple):
    """AUROCs of two sets of scores of the same images, their covariance, and the difference a - b.

    Attributes:
        auroc: (2,) of a and of b.
        covariance: (2, 2).
        difference, low, high: With its interval by the normal approximation.
        p_value: Two-sided, of "the difference is 0"; 1 where both sets rank all images alike.
    """

    auroc: NDArray[np.float64]
    covariance: NDArray[np.float64]
    difference: float
    low: float
    high: float
    p_value: float


def delong(
    labels: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike, patients: ArrayLike, *, level: float = 0.95
) -> DeLong:
    """Compare two AUROCs on the same images of different patients.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (the row is left out), shape (N,).
        scores_a, scores_b: Higher means more suspect, shape (N,).
        patients: Who each image is of, shape (N,).
        level: Of the interval.
    Raises: DataError: fewer than two positive or negative images, a patient with several assessed images, or what
        ``metrics.auroc`` raises.
    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988; Sun and Xu, IEEE Signal Processing Letters 21, 2014
        (midranks instead of pairs: N log N).
    """
    label, a, mask = assessed(labels, scores_a)
    _, b, _ = assessed(labels, scores_b)
    codes, _ = patient_codes(patients, label.size)
    if np.unique(codes[mask]).size < mask.sum():
        people = np.unique(codes[mask]).size
        raise DataError(f"{int(mask.sum())} images of {people} patients: DeLong's test takes images as independent; "
                        "compare by resampling patients (compare_scores)")  # fmt: skip
    positive, negative = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    if min(positive.size, negative.size) < 2:
        raise DataError(f"{positive.size} positive and {negative.size} negative images; DeLong's test needs 2 of each")
    parts = [_components(s[positive], s[negative]) for s in (a, b)]
    tens, ones = (np.stack([part[k] for part in parts]) for k in (0, 1))
    covariance = np.cov(tens) / positive.size + np.cov(ones) / negative.size
    auroc = tens.mean(axis=1)
    difference = float(auroc[0] - auroc[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    error = math.sqrt(max(variance, 0.0))
    normal = NormalDist()
    reach = normal.inv_cdf((1 + level) / 2) * error
    # where nothing varies, both rank alike or both part the classes
    still = 1.0 if abs(difference) <= 1e-12 else 0.0
    p = 2 * normal.cdf(-abs(difference) / error) if error > 1e-12 else still
    return DeLong(auroc, covariance, difference, difference - reach, difference + reach, p)


def _components(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """V10 of every positive and V01 of every negative image, from midranks."""
    m, n = positive.size, negative.size
    together = _midranks(np.concatenate((positive, negative)))
    v10 = (together[:m] - _midranks(positive)) / n
    v01 = 1 - (together[m:] - _midranks(negative)) / m
    return v10, v01


def _midranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    ordered = np.sort(x)
    low, high = (np.searchsorted(ordered, x, side=side) for side in ("left", "right"))
    return np.asarray((low + high + 1) / 2, dtype=np.float64)
