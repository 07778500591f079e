"""Slow, obviously right formulas that the tests hold the fast ones against."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.special import kl_div, logsumexp

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


# --- transport -------------------------------------------------------------------------------------------------------


class SlowTransport(NamedTuple):
    """One solved problem in float64."""

    plan: np.ndarray
    value: float
    f: np.ndarray
    g: np.ndarray
    residual: float


def sinkhorn_by_loop(cost, a, b, epsilon, tolerance=1e-12, limit=20_000) -> SlowTransport:
    """Sinkhorn in the log domain, one problem, positions without mass taken out before and put back as zeros."""
    cost, a, b = (np.asarray(x, dtype=np.float64) for x in (cost, a, b))
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    c, p, q = cost[np.ix_(rows, columns)], a[rows], b[columns]
    f, g = np.zeros(len(p)), np.zeros(len(q))
    for _ in range(limit):
        f = -epsilon * logsumexp((g[None, :] - c) / epsilon + np.log(q)[None, :], axis=1)
        g = -epsilon * logsumexp((f[:, None] - c) / epsilon + np.log(p)[:, None], axis=0)
        plan = np.outer(p, q) * np.exp((f[:, None] + g[None, :] - c) / epsilon)
        residual = max(np.abs(plan.sum(1) - p).sum(), np.abs(plan.sum(0) - q).sum())
        if residual <= tolerance:
            break
    value = (plan * c).sum() + epsilon * kl_div(plan, np.outer(p, q)).sum()
    shift = (p @ f - q @ g) / 2
    whole = SlowTransport(np.zeros(cost.shape), float(value), np.zeros(len(a)), np.zeros(len(b)), float(residual))
    whole.plan[np.ix_(rows, columns)] = plan
    whole.f[rows], whole.g[columns] = f - shift, g + shift
    return whole


def cosine_cost_by_loops(x, y) -> np.ndarray:
    """One minus the cosine of every pair; a zero vector has cosine 0 with everything."""
    out = np.ones((len(x), len(y)))
    for i, u in enumerate(np.asarray(x, dtype=np.float64)):
        for j, v in enumerate(np.asarray(y, dtype=np.float64)):
            if np.linalg.norm(u) and np.linalg.norm(v):
                out[i, j] = 1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    return out


# --- losses ----------------------------------------------------------------------------------------------------------


def nt_xent_by_loops(first, second, temperature) -> float:
    """SimCLR's equation 1, term by term: the positive stays in the denominator, only the point itself is left out."""
    z = [v / np.linalg.norm(v) for v in [*np.asarray(first, dtype=np.float64), *np.asarray(second, dtype=np.float64)]]
    n, losses = len(z) // 2, []
    for i in range(2 * n):
        positive = i + n if i < n else i - n
        others = sum(np.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i)
        losses.append(-np.log(np.exp(z[i] @ z[positive] / temperature) / others))
    return float(np.mean(losses))


def variance_by_loops(rows, target=1.0) -> float:
    """VICReg's hinge, one dimension after the other."""
    rows, total = np.asarray(rows, dtype=np.float64), 0.0
    for column in rows.T:
        unbiased = sum((x - column.mean()) ** 2 for x in column) / (len(column) - 1)
        total += max(0.0, target - np.sqrt(unbiased + 1e-4))
    return total / rows.shape[1]


def covariance_by_loops(rows) -> float:
    """VICReg's off-diagonal penalty, one pair of dimensions after the other."""
    rows, total = np.asarray(rows, dtype=np.float64), 0.0
    centred = rows - rows.mean(0)
    for i in range(rows.shape[1]):
        for j in range(rows.shape[1]):
            if i != j:
                total += (sum(x[i] * x[j] for x in centred) / (len(rows) - 1)) ** 2
    return total / rows.shape[1]


# --- networks --------------------------------------------------------------------------------------------------------


def attention_by_loops(queries, keys, values, allowed) -> tuple[np.ndarray, np.ndarray]:
    """One head, one image: every query over the allowed keys. Returns the mixed values and the weights."""
    mixed, weights = np.zeros((len(queries), values.shape[1])), np.zeros((len(queries), len(keys)))
    for i, q in enumerate(queries):
        scores = {j: np.exp(q @ keys[j] / np.sqrt(len(q))) for j in range(len(keys)) if allowed[j]}
        for j, score in scores.items():
            weights[i, j] = score / sum(scores.values())
            mixed[i] += weights[i, j] * values[j]
    return mixed, weights
