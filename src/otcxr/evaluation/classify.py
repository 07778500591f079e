"""Linear probe: what a logistic regression can read from frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from otcxr.evaluation.metrics import auroc

__all__ = ["LinearProbe", "fit_probe"]


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
    measure of it may be reported.

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
