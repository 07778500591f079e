"""Whether probabilities mean what they say, and how they are made to on validation images.

    x = ln(p / (1 - p)),   p clipped to [1e-6, 1 - 1e-6]

Measures take weights as those of ``metrics`` do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.metrics import assessed, divide, over_weights

__all__ = [
    "BINS",
    "RECALIBRATIONS",
    "Recalibration",
    "ReliabilityBin",
    "brier",
    "calibration_error",
    "calibration_error_by_chance",
    "calibration_intercept",
    "calibration_slope",
    "logit",
    "recalibrate",
    "reliability",
    "sigmoid",
]

FloatArray = NDArray[np.float64]

BINS = 15  # of the calibration error and of a reliability diagram
RECALIBRATIONS = ("none", "temperature", "platt", "isotonic")

_CLIP = 1e-6
_MOST_NEWTON = 40
_WIDEST = 100.0  # a slope or intercept beyond it: the classes are parted, and no finite one fits


def sigmoid(x: ArrayLike) -> FloatArray:
    """1 / (1 + exp(-x)), for any finite x without overflow."""
    z = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(z))
    return np.asarray(np.where(z >= 0, 1.0, small) / (1.0 + small), dtype=np.float64)


def logit(p: ArrayLike) -> FloatArray:
    """ln(p / (1 - p)), with p clipped to [1e-6, 1 - 1e-6]."""
    clipped = np.clip(np.asarray(p, dtype=np.float64), _CLIP, 1 - _CLIP)
    return np.asarray(np.log(clipped) - np.log1p(-clipped), dtype=np.float64)


def brier(labels: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean squared difference between probability and label.

        sum_i w_i (p_i - y_i)^2 / sum_i w_i

    Args:
        labels: 1 present, 0 absent, NaN not assessed (the row is left out), shape (N,).
        probabilities: In [0, 1], shape (N,).
        weights: None (all 1), (N,) or (R, N); finite and >= 0.
    Returns: A number in [0, 1], smaller is better, or (R,) float64; prevalence (1 - prevalence) for whoever always says
        the prevalence. Nothing assessed: NaN.
    Raises: DataError: as ``metrics.auroc``, or probabilities outside [0, 1].
    Source: Brier, Monthly Weather Review 78, 1950.
    """
    label, p, mask = _probabilities(labels, probabilities)
    rows = np.flatnonzero(mask)
    square = (p[rows] - label[rows]) ** 2

    def compute(chunk: NDArray[Any]) -> FloatArray:
        own = chunk.take(rows, axis=1).astype(np.float64)
        return divide(own @ square, own.sum(axis=1))

    return over_weights(compute, weights, label.size)


def calibration_slope(labels: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """The slope b of the logistic regression logit P(y = 1) = a + b x; 1 where probabilities are neither too bold.

    Below 1 they are too extreme, as those of a model that was fitted to few images are; above 1 too timid.

    Args: as :func:`brier`.
    Returns: A number, or (R,) float64. NaN where one class is missing, all probabilities are equal, or no finite slope
        fits because the classes are parted.
    Raises: DataError: as :func:`brier`.
    Source: Cox, Biometrika 45, 1958; Van Calster et al., BMC Medicine 17:230, 2019.
    """
    return _regressed(labels, probabilities, weights, sloped=True)


def calibration_intercept(labels: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """The intercept a of logit P(y = 1) = a + x (slope held at 1); 0 where probabilities are right on the whole.

    Above 0 they are too low, below 0 too high. Also called calibration in the large. Arguments, results and errors as
    :func:`calibration_slope`.
    """
    return _regressed(labels, probabilities, weights, sloped=False)


def calibration_error(
    labels: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None = None, *, bins: int = BINS
) -> Any:
    """Expected calibration error over bins of equal mass.

        sum over bins k of (n_k / n) |mean of p in k - mean of y in k|

    Bins hold equally many of the assessed images as they are; equal probabilities stay together. Weights change how
    much an image counts, not its bin. It is never 0 and falls with the number of images even if every probability is
    right: read it beside :func:`calibration_error_by_chance`. Resamples add noise of their own, so intervals lean
    upward.

    Args:
        labels, probabilities, weights: as :func:`brier`.
        bins: At most so many, >= 1.
    Returns: A number in [0, 1], or (R,) float64; NaN where nothing is assessed.
    Raises: DataError: as :func:`brier`. ConfigError: fewer than one bin.
    Source: Naeini, Cooper and Hauskrecht, AAAI 2015; equal mass after Nixon et al., CVPR Workshops 2019.
    """
    label, p, mask = _probabilities(labels, probabilities)
    rows = np.flatnonzero(mask)
    member = _bins(p[rows], bins)
    gaps = np.zeros((rows.size, member.max(initial=0) + 1))
    gaps[np.arange(rows.size), member] = label[rows] - p[rows]

    def compute(chunk: NDArray[Any]) -> FloatArray:
        own = chunk.take(rows, axis=1).astype(np.float64)
        return divide(np.abs(own @ gaps).sum(axis=1), own.sum(axis=1))

    return over_weights(compute, weights, label.size)


def calibration_error_by_chance(labels: ArrayLike, probabilities: ArrayLike, *, bins: int = BINS) -> float:
    """What :func:`calibration_error` would be on average if every probability were right and images independent.

        sum over bins k of sqrt(2 / pi sum_{i in k} p_i (1 - p_i)) / n          (normal approximation)

    Args: as :func:`calibration_error`.
    """
    _, p, mask = _probabilities(labels, probabilities)
    if not mask.any():
        return math.nan
    member = _bins(p[mask], bins)
    spread = np.bincount(member, p[mask] * (1 - p[mask]))
    return float(np.sqrt(2 / np.pi * spread).sum() / mask.sum())


class ReliabilityBin(NamedTuple):
    """One bin of a reliability diagram: images, mean probability, share of positive images."""

    images: int
    probability: float
    observed: float


def reliability(labels: ArrayLike, probabilities: ArrayLike, *, bins: int = BINS) -> list[ReliabilityBin]:
    """Return the bins of :func:`calibration_error`, by rising probability; empty where nothing is assessed."""
    label, p, mask = _probabilities(labels, probabilities)
    if not mask.any():
        return []
    member = _bins(p[mask], bins)
    count = np.bincount(member)
    means = (np.bincount(member, values) / count for values in (p[mask], label[mask]))
    return [ReliabilityBin(int(n), float(x), float(y)) for n, x, y in zip(count, *means, strict=True)]


class Recalibration(NamedTuple):
    """From scores to probabilities.

        none         p = sigmoid(z)
        temperature  p = sigmoid(z / T)
        platt        p = sigmoid(a + b z)
        isotonic     p = a step-wise rising function of z, straight between its steps, constant beyond them

    Attributes:
        kind: One of ``RECALIBRATIONS``.
        parameters: T; or a, b; or the steps' z and p, one list after the other.
        images: Validation images behind it.
        note: "" or why it is none although another was asked for.
    """

    kind: str
    parameters: tuple[float, ...] = ()
    images: int = 0
    note: str = ""

    def __call__(self, z: ArrayLike) -> FloatArray:
        """Return probabilities of logits, of any shape."""
        x = np.asarray(z, dtype=np.float64)
        if self.kind == "temperature":
            return sigmoid(x / self.parameters[0])
        if self.kind == "platt":
            return sigmoid(self.parameters[0] + self.parameters[1] * x)
        if self.kind == "isotonic":
            half = len(self.parameters) // 2
            return np.asarray(np.interp(x, self.parameters[:half], self.parameters[half:]), dtype=np.float64)
        return sigmoid(x)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return self._asdict() | {"parameters": list(self.parameters)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recalibration:
        """Return what ``as_dict`` gave.

        Raises: ConfigError: an unknown kind.
        """
        if values["kind"] not in RECALIBRATIONS:
            raise ConfigError(f"unknown recalibration '{values['kind']}'; known: {', '.join(RECALIBRATIONS)}")
        return cls(values["kind"], tuple(map(float, values["parameters"])), int(values["images"]), values["note"])


def recalibrate(labels: ArrayLike, logits: ArrayLike, kind: str, *, least: int = 5) -> Recalibration:
    """Fit a recalibration on validation images.

    Temperature and Platt's two numbers maximise the likelihood; Platt's with targets (n+ + 1) / (n+ + 2) and
    1 / (n- + 2) instead of 1 and 0, so that parted classes do not give an infinite slope. A negative slope (of scores
    that rank the wrong way round) is kept: it is what the images say. Isotonic needs many images; few it remembers.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (the row is left out), shape (N,).
        logits: z, shape (N,), finite where assessed; :func:`logit` of probabilities.
        kind: One of ``RECALIBRATIONS``.
        least: Positive and negative images that it takes; fewer gives kind "none" and a note.
    Raises: DataError: as ``metrics.auroc``. ConfigError: there is no such kind.
    Source: Platt, Advances in Large Margin Classifiers, 1999; Guo et al., ICML 2017 (temperature); Zadrozny and Elkan,
        KDD 2002 (isotonic).
    """
    if kind not in RECALIBRATIONS:
        raise ConfigError(f"unknown recalibration '{kind}'; known: {', '.join(RECALIBRATIONS)}")
    label, z, mask = assessed(labels, logits)
    label, z = label[mask], z[mask]
    positives, negatives = int((label == 1).sum()), int((label == 0).sum())
    if kind == "none":
        return Recalibration("none", images=label.size)
    if min(positives, negatives) < least:
        note = f"{positives} positive and {negatives} negative validation images, {least} of each needed"
        return Recalibration("none", images=label.size, note=note)
    if kind == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(z, label)
        return Recalibration(kind, (*fitted.X_thresholds_.tolist(), *fitted.y_thresholds_.tolist()), label.size)
    if kind == "temperature":
        from scipy.optimize import minimize_scalar

        def misfit(log_temperature: float) -> float:
            x = z * math.exp(-log_temperature)
            return float((np.logaddexp(0, x) - label * x).sum())

        best = minimize_scalar(misfit, bounds=(-7.0, 7.0), method="bounded", options={"xatol": 1e-8})
        return Recalibration(kind, (math.exp(float(best.x)),), label.size)
    target = np.where(label == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    scale = float(z.std()) or 1.0
    centre = float(z.mean())
    found = _newton((z - centre) / scale, target, np.ones((1, z.size)), sloped=True)[0]
    if not np.isfinite(found).all():  # all scores are equal
        return Recalibration("none", images=label.size, note="all validation scores are equal")
    slope = float(found[1]) / scale
    return Recalibration(kind, (float(found[0]) - slope * centre, slope), label.size)


def _probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    label, p, mask = assessed(labels, probabilities)
    bad = np.flatnonzero(mask & ~((p >= 0) & (p <= 1)))
    if bad.size:
        raise DataError(
            f"probabilities must lie in [0, 1], but {bad.size} of {int(mask.sum())} do not, the first is "
            f"{p[bad[0]]:g} (row {bad[0]}); recalibrate scores first, or judge their ranking only"
        )
    return label, p, mask


def _bins(p: FloatArray, bins: int) -> NDArray[np.intp]:
    """The bin of every image, from 0; none is empty."""
    if bins < 1:
        raise ConfigError(f"bins is {bins}; at least 1 is needed, 15 is usual")
    if not p.size:
        return np.zeros(0, dtype=np.intp)
    edges = np.quantile(p, np.arange(1, bins) / bins, method="inverted_cdf")
    return np.unique(np.searchsorted(edges, p, side="left"), return_inverse=True)[1].astype(np.intp)


def _regressed(labels: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None, *, sloped: bool) -> Any:
    label, p, mask = _probabilities(labels, probabilities)
    rows = np.flatnonzero(mask)
    x, y = logit(p[rows]), label[rows]
    start = _newton(x, y, np.ones((1, rows.size)), sloped=sloped)[0]
    near = _Near(x, y, start, sloped=sloped) if np.isfinite(start).all() else None

    def compute(chunk: NDArray[Any]) -> FloatArray:
        own = chunk.take(rows, axis=1).astype(np.float64)
        if near is None:  # without a fit of all images most resamples have none either
            return _newton(x, y, own, sloped=sloped)[:, int(sloped)]
        found = near.solve(own)
        far = np.flatnonzero(~near.exact(found))
        found[far] = _newton(x, y, own[far], sloped=sloped, start=start)
        return found[:, int(sloped)]

    return over_weights(compute, weights, label.size)


class _Near:
    """Weighted logistic regressions whose coefficients lie near those of all images, without a pass for each step.

    With (a, b) = start + (d, e) and h = d + e x the mean of image i is a series in h,

        mu_i(h) = mu_i + mu_i' h + mu_i'' h^2 / 2 + ... + mu_i^(5) h^5 / 120

    so the likelihood's slope, sum_i w_i (y_i - mu_i(h)) (1, x_i), is a polynomial in (d, e) whose coefficients are sums
    of w_i mu_i^(k) x_i^j: one product of matrices gives them for all sets of weights. What is left out is below
    |h|^6 max|mu^(6)| / 720 < 1e-6 for |h| <= ``_NEAR``; sets of weights that need more are solved by :func:`_newton`.
    """

    _ORDER, _NEAR = 5, 0.3

    def __init__(self, x: FloatArray, y: FloatArray, start: FloatArray, *, sloped: bool) -> None:
        self._sloped, self._start = sloped, start
        self._centre = float(x.mean())
        self._x = x - self._centre
        self._reach = float(np.abs(self._x).max())
        mu = sigmoid(start[0] + start[1] * x)
        v = mu * (1 - mu)
        # derivatives of the logistic function, as polynomials in mu
        rises = [v, v * (1 - 2 * mu), v * (1 - 6 * v), v * (1 - 2 * mu) * (1 - 12 * v),
                 v * (1 - 30 * v + 120 * v * v)]  # fmt: skip
        columns = [(y - mu) * self._x**j for j in (0, 1)]
        for k, rise in enumerate(rises, start=1):
            columns += [rise / math.factorial(k) * self._x**j for j in range(k + 2)]
        self._columns = np.stack(columns, axis=1)

    def solve(self, weights: FloatArray) -> FloatArray:
        """Coefficients (r, 2) for weights (r, N); NaN where the likelihood has no curvature."""
        sums = weights @ self._columns
        off = np.zeros((len(weights), 2))  # d (at the centre of x) and e
        with np.errstate(all="ignore"):  # what diverges is solved otherwise
            for _ in range(12):
                slope, curve = self._slope(sums, *off.T)
                step = _newton_step(*slope, *curve, sloped=self._sloped)
                off = off + step
                if not (np.abs(step) > 1e-11).any():  # what is not finite stays so
                    break
        return np.stack((self._start[0] + off[:, 0] - off[:, 1] * self._centre, self._start[1] + off[:, 1]), axis=1)

    def _slope(self, sums: FloatArray, d: FloatArray, e: FloatArray) -> tuple[list[FloatArray], list[FloatArray]]:
        """The likelihood's slope (2 of (r,)) and the negative of its curvature (3 of (r,)) at (d, e)."""
        slope = [sums[:, j].copy() for j in (0, 1)]
        curve = [np.zeros(len(d)) for _ in range(3)]
        at = 2
        for k in range(1, self._ORDER + 1):
            # sum w mu^(k) / k! (d + e x)^k x^j, and its derivative in d, k (d + e x)^(k - 1)
            part = sums[:, at : at + k + 2]
            at += k + 2
            for j in (0, 1):
                slope[j] -= sum(math.comb(k, m) * d ** (k - m) * e**m * part[:, m + j] for m in range(k + 1))
            for j in range(3):
                curve[j] += sum(k * math.comb(k - 1, m) * d ** (k - 1 - m) * e**m * part[:, m + j] for m in range(k))
        return slope, curve

    def exact(self, found: FloatArray) -> NDArray[np.bool_]:
        """Which of the solutions lie where the series is good, (r,)."""
        e = found[:, 1] - self._start[1]
        d = found[:, 0] - self._start[0] + e * self._centre
        with np.errstate(invalid="ignore"):
            return np.asarray(np.abs(d) + np.abs(e) * self._reach <= self._NEAR)


def _newton(
    x: FloatArray, y: FloatArray, weights: FloatArray, *, sloped: bool, start: FloatArray | None = None
) -> FloatArray:
    """Weighted logistic regressions of y on x: a and b, (r, 2); NaN where none converges.

    Newton's method on the concave log-likelihood from ``start`` (default a = 0, b = 1), each step halved until the
    likelihood does not fall. Without ``sloped`` b stays 1.
    """
    theta = np.tile(np.array([0.0, 1.0]) if start is None else start, (len(weights), 1))
    out = np.full_like(theta, np.nan)
    positive, total = weights @ y, weights.sum(axis=1)
    constant = x.size == 0 or np.ptp(x) == 0
    active = np.flatnonzero((positive > 0) & (positive < total) & ~(sloped and constant))
    if not sloped:
        theta[:, 1] = 1.0
    before = _likelihood(x, y, weights[active], theta[active])
    for _ in range(_MOST_NEWTON):
        if not active.size:
            break
        own, now = weights[active], theta[active]
        mu = sigmoid(now[:, :1] + now[:, 1:] * x)
        residual = own * (y - mu)
        curve = own * mu * (1 - mu)
        gradient = np.stack((residual.sum(axis=1), residual @ x), axis=1)
        h00, h01, h11 = curve.sum(axis=1), curve @ x, curve @ (x * x)
        step = _newton_step(gradient[:, 0], gradient[:, 1], h00, h01, h11, sloped=sloped)
        lost = ~np.isfinite(step).all(axis=1) | (np.abs(now) > _WIDEST).any(axis=1)
        step[lost] = 0.0
        after = _likelihood(x, y, own, now + step)
        for _ in range(30):
            worse = after < before - 1e-12 * np.abs(before)
            if not worse.any():
                break
            step[worse] /= 2
            after[worse] = _likelihood(x, y, own[worse], now[worse] + step[worse])
        theta[active] = now + step
        done = (np.abs(step) < 1e-9 * (1 + np.abs(now))).all(axis=1)
        lost |= after > -1e-9 * total[active]  # everything is fitted: the classes are parted, it would go on for ever
        out[active[done & ~lost]] = theta[active[done & ~lost]]
        keep = ~(done | lost)
        active, before = active[keep], after[keep]
    return out


def _newton_step(
    slope_a: FloatArray, slope_b: FloatArray, h00: FloatArray, h01: FloatArray, h11: FloatArray, *, sloped: bool
) -> FloatArray:
    """Steps (r, 2) from slopes and negative curvatures (r,); NaN where a and b cannot be told apart."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if not sloped:
            return np.stack((slope_a / h00, np.zeros(len(h00))), axis=1)
        det = h00 * h11 - h01 * h01
        det = np.where(det > 1e-12 * h00 * h11, det, np.nan)
        return np.stack((h11 * slope_a - h01 * slope_b, h00 * slope_b - h01 * slope_a), axis=1) / det[:, None]


def _likelihood(x: FloatArray, y: FloatArray, weights: FloatArray, theta: FloatArray) -> FloatArray:
    """Log-likelihoods (r,) of logistic regressions."""
    z = theta[:, :1] + theta[:, 1:] * x
    return np.asarray((weights * (y * z - np.logaddexp(0, z))).sum(axis=1), dtype=np.float64)
