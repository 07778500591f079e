"""Ratios of sums over images, with intervals over resampled patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otcxr.evaluation.estimates import BootstrapSettings

__all__ = ["mean_of_ratios", "ratio"]

FloatArray = NDArray[np.float64]


def ratio(
    top: FloatArray, below: FloatArray, patients: NDArray[Any], weights: FloatArray, level: float
) -> tuple[dict[str, Any], FloatArray]:
    """A ratio sum(top) / sum(below) with its percentile interval over resampled patients.

    A mean over some of the images is the case of ``below`` 1 for those and 0 for the others.

    Args:
        top, below: (N,) of each image; images with ``below`` 0 say nothing, their ``top`` must be 0.
        patients: (N,).
        weights: (R, N), how often each image comes along, from ``patient_weights``.
        level: Of the interval.
    Returns: value, low, high, patients; None for the three where fewer than five patients say something, with a
        ``reason``; a ``caution`` below twenty. And the ratio of every resample, (R,), NaN where it is undefined.
    """
    count = len(set(patients[below > 0].tolist()))
    sums, bottoms = weights @ top, weights @ below
    drawn = np.divide(sums, bottoms, out=np.full(len(weights), np.nan), where=bottoms > 0)
    least = BootstrapSettings().min_positive_patients
    if count < least:
        why = f"not estimable: {count} patients show it, at least {least} are needed"
        return {"value": None, "low": None, "high": None, "patients": count, "reason": why}, drawn
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    out: dict[str, Any] = {
        "value": float(top.sum() / below.sum()), "low": float(low), "high": float(high), "patients": count,
    }  # fmt: skip
    if count < 20:
        out["caution"] = f"{count} patients: the interval promises more than it holds"
    return out, drawn


def mean_of_ratios(parts: Sequence[tuple[dict[str, Any], FloatArray]], level: float) -> dict[str, Any]:
    """The mean of those ratios that are estimable, with the interval of the same resamples.

    Returns: value, low, high, and ``count`` of the ratios averaged; None for the three where there is none. A caution
        where one of them has one.
    """
    kept = [(estimate, drawn) for estimate, drawn in parts if estimate["value"] is not None]
    if not kept:
        return {"value": None, "low": None, "high": None, "count": 0, "reason": "nothing is estimable"}
    means = np.mean([drawn for _, drawn in kept], axis=0)
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    out: dict[str, Any] = {
        "value": float(np.mean([estimate["value"] for estimate, _ in kept])), "low": float(low), "high": float(high),
        "count": len(kept),
    }  # fmt: skip
    few = sum("caution" in estimate for estimate, _ in kept)
    if few:
        out["caution"] = f"{few} of {len(kept)} rest on fewer than 20 patients"
    return out
