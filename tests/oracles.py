"""Slow, obviously right formulas that the tests hold the fast ones against."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

# --- measures and statistics -----------------------------------------------------------------------------------------


def auroc_by_pairs(labels, scores, weights=None) -> float:
    """Every positive against every negative: 1 if it scores higher, a half if the same."""
    weights = np.ones(len(labels)) if weights is None else weights
    won = total = 0.0
    for y, s, w in zip(labels, scores, weights, strict=True):
        for z, t, v in zip(labels, scores, weights, strict=True):
            if y == 1 and z == 0:
                total += w * v
                won += w * v * (1.0 if s > t else 0.5 if s == t else 0.0)
    return won / total if total else float("nan")


def average_precision_by_steps(labels, scores, weights=None) -> float:
    """Lower the threshold through the distinct scores; add the gain in recall times the precision reached."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)
    positives = weights[labels == 1].sum()
    if not positives:
        return float("nan")
    area = recall_before = 0.0
    for threshold in sorted(set(scores[~np.isnan(labels)]), reverse=True):
        called = (scores >= threshold) & ~np.isnan(labels)
        if weights[called].sum():
            hits = weights[called & (labels == 1)].sum()
            area += (hits / positives - recall_before) * hits / weights[called].sum()
            recall_before = hits / positives
    return area


def holm_by_closed_testing(p_values: Sequence[float]) -> list[float]:
    """Reject a hypothesis only if Bonferroni rejects every set of hypotheses that holds it."""
    places = range(len(p_values))
    adjusted = [0.0] * len(p_values)
    for size in range(1, len(p_values) + 1):
        for chosen in combinations(places, size):
            bonferroni = min(1.0, size * min(p_values[i] for i in chosen))
            for i in chosen:
                adjusted[i] = max(adjusted[i], bonferroni)
    return adjusted
