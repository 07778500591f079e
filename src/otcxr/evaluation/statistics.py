"""How sure a measure is: intervals over resampled patients and training seeds, differences, tests, power.

An interval answers one question: how far would the number move with *other patients* from the same population, and,
where several trainings are judged, with *other seeds*? It does not cover another hospital or errors in the labels.

With K seeds the estimate is the mean over seeds, and patients and seeds are two levels of variance. What resamples of
patients say of the mean is joined with what K values say of a mean,

    d_r = mean over k of metric_k(weights_r) + S / sqrt(K) t_r,   S^2 = var over seeds of metric_k on all patients

with t_r the quantiles of Student's distribution with K - 1 degrees of freedom in a random order; intervals and p-values
are those of d_r. Seeds share the patients, so S holds no variance of patients. The joint distribution of a known and a
Student part is that of Behrens and Fisher: its intervals hold their level or a little more, where an approximation by
degrees of freedom (Satterthwaite) rejects 10 % instead of 5 % with three seeds. With two seeds they are wide, because
two trainings say little of how trainings vary. A study of many methods knows more: where S^2 may be taken as equal, it
is pooled over them, with more degrees of freedom, unless a row visibly varies more (``pool_seeds``).

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13 (percentile interval); Fisher, Annals of
Eugenics 6, 1935; Bouthillier et al., MLSys 2021 (why seeds are a level of their own). Resampling: ``resampling``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from otcxr.errors import DataError
from otcxr.evaluation import calibration, decisions
from otcxr.evaluation.estimates import (
    BootstrapSettings,
    Comparison,
    Counts,
    Difference,
    Estimate,
    FindingComparison,
    FindingScores,
    MacroComparison,
    MacroScores,
    MeasureComparison,
    ScoreTable,
    as_json,
)
from otcxr.evaluation.metrics import assessed, auroc, average_precision, sensitivity_at_specificity
from otcxr.evaluation.resampling import (
    Column,
    Drawn,
    FloatArray,
    Metric,
    count_rows,
    draw,
    patient_weights,
)

__all__ = [
    "POWER",
    "BootstrapSettings",
    "Column",
    "Comparison",
    "Counts",
    "Difference",
    "Drawn",
    "Estimate",
    "FindingComparison",
    "FindingScores",
    "MacroComparison",
    "MacroScores",
    "MeasureComparison",
    "Metric",
    "Pool",
    "ScoreTable",
    "as_json",
    "bootstrap_metric",
    "bootstrap_p_value",
    "calibration_columns",
    "common_findings",
    "compare_drawn",
    "compare_scores",
    "decision_columns",
    "draw",
    "evaluate_scores",
    "holm",
    "patient_weights",
    "pool_seeds",
    "ranking_columns",
    "smallest_difference",
    "tabulate",
]

POWER = 0.8  # with which a test sees the difference that is called the smallest it can show

# A resample in which a measure is undefined is left out. More of them than this and what is left is no longer a fair
# picture of the resamples.
_MOST_UNDEFINED = 0.01

# Fewer patients than this on one side and the percentile interval is clearly too short. In 500 simulated samples with
# one image per patient, 400 negative patients and normal scores, 95 % intervals of a true AUROC of 0.75 (0.9) covered
# it in 82 (80) % with 5 positive patients, 89 (84) % with 10, 92 (89) % with 20 and 93 (93) % with 100.
_FEW_PATIENTS = 20

# Level of the F test by which a row varies too much over seeds to be pooled with others.
_ALIKE = 0.2

# Differences of averages of exact ratios: below this they are rounding, not a difference.
_ROUNDING = 1e-12


class Pool(NamedTuple):
    """How far seeds move the measures of a row, or of a difference of two.

    Attributes:
        deviation: By measure, (F,) root of the variance over seeds; NaN where nothing is known.
        freedom: By measure, (F,) degrees of freedom.
        macro: By measure, the root of the variance of the mean over findings.
        macro_freedom: Its degrees of freedom.
    """

    deviation: Mapping[str, FloatArray]
    freedom: Mapping[str, Sequence[int]]
    macro: Mapping[str, float]
    macro_freedom: Mapping[str, int]


def ranking_columns(scores: ArrayLike) -> dict[str, Column]:
    """AUROC, average precision and sensitivity at a specificity of 0.9, of scores (N, F) or (K, N, F)."""
    return {
        "auroc": Column(scores, auroc),
        "average_precision": Column(scores, average_precision),
        "sensitivity_at_specificity": Column(scores, sensitivity_at_specificity),
    }


def decision_columns(scores: ArrayLike, thresholds: ArrayLike, notes: Sequence[str] = ()) -> dict[str, Column]:
    """F1, sensitivity, specificity, predictive values and the share that is flagged, at thresholds chosen elsewhere.

    Args:
        scores: (N, F) or (K, N, F).
        thresholds: (F,) or (K, F); any number where ``notes`` has a reason.
        notes: For each finding "" or why it has no threshold.
    """
    rows = np.atleast_2d(np.asarray(thresholds, dtype=np.float64))

    def column(measure: Any, higher_is_better: bool | None = True) -> Column:
        metrics = [[partial(measure, threshold=float(t)) for t in row] for row in rows]
        return Column(scores, metrics, notes, anchor=False, higher_is_better=higher_is_better)

    return {
        "f1": column(decisions.f1),
        "sensitivity": column(decisions.sensitivity),
        "specificity": column(decisions.specificity),
        "positive_predictive_value": column(decisions.positive_predictive_value),
        "negative_predictive_value": column(decisions.negative_predictive_value),
        "flagged": column(decisions.flagged, None),
    }


def calibration_columns(probabilities: ArrayLike, notes: Sequence[str] = ()) -> dict[str, Column]:
    """Brier score, calibration slope, intercept and error of probabilities (N, F) or (K, N, F).

    Args:
        probabilities: In [0, 1].
        notes: For each finding "" or why it has no probabilities.
    """
    wide = (-math.inf, math.inf)

    def column(measure: Any, **more: Any) -> Column:
        return Column(probabilities, measure, notes, anchor=False, **more)

    return {
        "brier": column(calibration.brier, higher_is_better=False),
        "calibration_slope": column(calibration.calibration_slope, mean=False, bounds=wide, higher_is_better=None),
        "calibration_intercept": column(
            calibration.calibration_intercept, mean=False, bounds=wide, higher_is_better=None
        ),
        "calibration_error": column(calibration.calibration_error, higher_is_better=False)._replace(pivot=True),
    }


def bootstrap_metric(
    metric: Metric,
    labels: ArrayLike,
    scores: ArrayLike,
    patients: ArrayLike,
    *,
    resamples: int = BootstrapSettings.resamples,
    seed: int = BootstrapSettings.seed,
    level: float = BootstrapSettings.level,
    min_positive_patients: int = BootstrapSettings.min_positive_patients,
    min_negative_patients: int = BootstrapSettings.min_negative_patients,
) -> Estimate:
    """Estimate a measure of one finding with a percentile interval over resampled patients.

        low, high = quantiles (1 - level) / 2 and (1 + level) / 2 of metric(labels, scores, weights_r),   r = 1 .. R

    The percentile interval needs no assumption on how images of a patient depend on each other, but patients must be
    independent. With few patients it is too short, and scores that separate the sample perfectly get an interval of no
    width: ``caution`` says so. That of average precision leans upward when positives are few, because an image drawn
    twice ties with itself.

    Args:
        metric: ``auroc``, ``average_precision`` or any :class:`Metric`; NaN where undefined.
        labels: 1 present, 0 absent, NaN not assessed (the row is left out), shape (N,).
        scores: Higher means more suspect, shape (N,); finite where assessed.
        patients: Who each image is of, shape (N,): strings or whole numbers.
        resamples, seed, level, min_positive_patients, min_negative_patients: :class:`BootstrapSettings`.
    Returns: The estimate. Too few patients on one side, or the measure undefined in more than 1 % of the resamples, is
        not an error: value, low and high are None and ``note`` says why.
    Raises:
        DataError: shapes disagree, no rows, labels other than 0, 1 and NaN, scores not finite, patients missing.
        ConfigError: a setting out of range.
    """
    settings = BootstrapSettings(resamples, seed, level, min_positive_patients, min_negative_patients)
    label, score, _ = assessed(labels, scores)  # its messages speak of one finding
    columns = {"measure": Column(score[:, None], metric, bounds=(-math.inf, math.inf))}
    drawn = draw(label[:, None], columns, patients, ["the finding"], settings)
    return _columns(drawn, "measure")[0]


def evaluate_scores(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: ArrayLike,
    findings: Sequence[str],
    *,
    resamples: int = BootstrapSettings.resamples,
    seed: int = BootstrapSettings.seed,
    level: float = BootstrapSettings.level,
    min_positive_patients: int = BootstrapSettings.min_positive_patients,
    min_negative_patients: int = BootstrapSettings.min_negative_patients,
) -> ScoreTable:
    """Estimate how well scores rank every finding, and the means, with intervals over resampled patients.

        macro_r = mean over findings f of metric(labels_f, scores_f, weights_r)

    One resample draws the same patients for all findings, so the interval of the macro mean holds the correlation
    between findings. The mean is over the findings for which all ranking measures are estimable, the same ones in
    every resample; a resample in which one of them is undefined is left out of the mean's interval.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (left out of that finding only), shape (N, F).
        scores: Higher means more suspect, (N, F), or (K, N, F) from K training seeds; finite where assessed.
        patients: Who each image is of, shape (N,): strings or whole numbers.
        findings: F different names.
        resamples, seed, level, min_positive_patients, min_negative_patients: :class:`BootstrapSettings`.
    Returns: The table; :func:`as_json` makes it plain. A finding that is not estimable is not an error. Estimates of
        findings are those of :func:`bootstrap_metric` with the same settings. Intervals hold one finding at a time.
        Cost: ``benchmarks/bench_statistics.py``.
    Raises:
        DataError: as :func:`bootstrap_metric`; findings duplicated or not F names.
        ConfigError: a setting out of range.
    """
    settings = BootstrapSettings(resamples, seed, level, min_positive_patients, min_negative_patients)
    return tabulate(draw(labels, ranking_columns(scores), patients, findings, settings))


def compare_scores(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    patients: ArrayLike,
    findings: Sequence[str],
    *,
    resamples: int = BootstrapSettings.resamples,
    seed: int = BootstrapSettings.seed,
    level: float = BootstrapSettings.level,
    min_positive_patients: int = BootstrapSettings.min_positive_patients,
    min_negative_patients: int = BootstrapSettings.min_negative_patients,
) -> Comparison:
    """Estimate the difference a - b of two sets of scores for the same images, paired over resampled patients.

        d_r = metric(labels, scores_a, weights_r) - metric(labels, scores_b, weights_r),   r = 1 .. R

    Both sets see the same patients in every resample, so what they share (hard patients, rare findings) cancels. The
    interval of the difference is therefore not to be had from the intervals of a and b: those may overlap while the
    difference is clear.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (left out of that finding only), shape (N, F).
        scores_a, scores_b: Higher means more suspect, (N, F) or (K, N, F) each, with the same K: seed k of a is paired
            with seed k of b; finite where assessed. Scales may differ.
        patients: Who each image is of, shape (N,): strings or whole numbers.
        findings: F different names.
        resamples, seed, level, min_positive_patients, min_negative_patients: :class:`BootstrapSettings`.
    Returns: Per finding and for the macro mean the measures of a, of b and their difference with p-values. Estimates of
        a and b are those of :func:`evaluate_scores` with the same settings. Intervals hold one finding at a time; over
        many findings read ``p_holm``. Not estimable is not an error.
    Raises: DataError, ConfigError: as :func:`evaluate_scores`.
    """
    settings = BootstrapSettings(resamples, seed, level, min_positive_patients, min_negative_patients)
    a, b = (
        draw(labels, ranking_columns(scores), patients, findings, settings, what=what)
        for what, scores in (("scores_a", scores_a), ("scores_b", scores_b))
    )
    return compare_drawn(a, b)


def tabulate(drawn: Drawn, pool: Pool | None = None, over: Sequence[str] | None = None) -> ScoreTable:
    """Return the estimates of all measures of all findings, and their means.

    Args:
        drawn: The draws.
        pool: What seeds move, where more is known than the own seeds tell.
        over: Findings over which means are taken, as far as they are estimable; None for all.
    """
    columns = {name: _columns(drawn, name, pool=pool) for name in drawn.columns}
    rows = tuple(
        FindingScores(finding, counts, {name: column[f] for name, column in columns.items()})
        for f, (finding, counts) in enumerate(zip(drawn.findings, drawn.counts, strict=True))
    )
    both = _in_macro(drawn, columns, over)
    means = {
        name: _mean(drawn, name, both, columns[name], drawn.values[name], drawn.draws[name], pool)
        for name in _averaged(drawn)
    }
    return ScoreTable(rows, MacroScores(tuple(drawn.findings[f] for f in both), means), drawn.settings)


def compare_drawn(
    a: Drawn, b: Drawn, *, same_images: bool = True, pool: Pool | None = None, over: Sequence[str] | None = None
) -> Comparison:
    """Return the differences a - b of all measures that both have, paired; see :func:`compare_scores`.

    Args:
        a, b: Drawn with the same patients, findings and settings.
        same_images: Whether both must be of the same labels too. False compares groups of images: one resample of all
            patients then serves both, and counts are those of a.
        pool: What seeds move the *difference*, from several comparable pairs; that of a and of b alone is not pooled.
        over: Findings over which means are taken, as far as they are estimable; None for all.
    Raises: DataError: they were drawn on other images, patients, findings or resamples, or have other numbers of seeds.
    """
    _check_pair(a, b, same_images)
    shared = [name for name in a.columns if name in b.columns]
    columns: dict[str, list[MeasureComparison]] = {}
    gaps: dict[str, tuple[FloatArray, FloatArray]] = {}
    for name in shared:
        gap = gaps[name] = a.values[name] - b.values[name], a.draws[name] - b.draws[name]
        notes = [x or y for x, y in zip(a.notes[name], b.notes[name], strict=True)]
        found = _columns(a, name, gap, notes, difference=True, pool=pool)
        p = [
            _p_value(estimate, gap[0][f], gap[1][f], a.settings, _of_finding(pool, name, f), a.columns[name].pivot)
            for f, estimate in enumerate(found)
        ]
        differences = map(_difference, found, p, holm(p), [a.settings] * len(p))
        columns[name] = [
            MeasureComparison(*row) for row in zip(_columns(a, name), _columns(b, name), differences, strict=True)
        ]
    rows = tuple(
        FindingComparison(finding, counts, {name: columns[name][f] for name in shared})
        for f, (finding, counts) in enumerate(zip(a.findings, a.counts, strict=True))
    )
    estimates = {name: [row.difference.estimate for row in column] for name, column in columns.items()}
    both = _in_macro(a, estimates, over)
    means = {}
    for name in _averaged(a):
        if name not in shared:
            continue
        own, other = (
            _mean(side, name, both, given, side.values[name], side.draws[name], None)
            for side, given in ((a, [row.a for row in columns[name]]), (b, [row.b for row in columns[name]]))
        )
        gap_mean = _mean(a, name, both, estimates[name], *gaps[name], pool, difference=True)
        p_mean = None
        if gap_mean.value is not None:
            value, drawn = (part[both].mean(axis=0) for part in gaps[name])
            p_mean = _p_value(gap_mean, value, drawn, a.settings, _of_mean(pool, name), a.columns[name].pivot)
        means[name] = MeasureComparison(own, other, _difference(gap_mean, p_mean, None, a.settings))
    return Comparison(rows, MacroComparison(tuple(a.findings[f] for f in both), means), a.settings)


def pool_seeds(
    own: Mapping[str, FloatArray], others: Sequence[Mapping[str, FloatArray]], *, of_differences: bool = False
) -> Pool:
    """How far seeds move a number, from its own few seeds and those of comparable rows.

        S_own^2    = var over k of x_k                                              K - 1 degrees of freedom
        S_others^2 = mean over rows r of var over k of x_rk                         R (K - 1)
        or, for the difference of two rows that share their seeds,
        S_others^2 = 2 sum over r and k of e_rk^2 / ((R - 1) (K - 1)),
        e_rk = x_rk - mean_k x_rk - mean_r x_rk + mean x

    What a seed does to all rows alike (labels that are easy to learn from, an order of images) cancels in a difference.
    Both are put together, unless S_own^2 is larger than the others' by more than an F test at 20 % allows: such a row
    keeps its own, with few degrees of freedom. The pooled value is never below its own. In simulations of 3 to 14 rows
    that vary alike a true null is rejected at 5 % in 4 % of the cases; where one row varies 17 times as much as the
    others in 5 to 6 % with three seeds or more, in up to 10 % (15 % beside only two others) with two.

    Args:
        own: By measure, values (F, K), as ``Drawn.values``: of a row, or of the differences of two, paired by seed.
        others: The same of rows that may be taken to vary alike; for differences single rows, neither of the two, with
            the same seeds. NaN where a finding has no value.
        of_differences: Whether ``own`` are differences.
    Returns: For every measure what ``tabulate`` or ``compare_drawn`` take.
    """
    deviation, freedom, macro, macro_freedom = {}, {}, {}, {}
    for name, values in own.items():
        tables = [row[name] for row in others if name in row]
        found = [
            _spread_of(x, [t[f] for t in tables if np.isfinite(t[f]).all()], of_differences)
            for f, x in enumerate(values)
        ]
        deviation[name] = np.array([d for d, _ in found])
        freedom[name] = [n for _, n in found]
        known = np.flatnonzero(np.isfinite(values).all(axis=1))
        means = [t[known].mean(axis=0) for t in tables if known.size and np.isfinite(t[known]).all()]
        mean = values[known].mean(axis=0) if known.size else np.full(values.shape[1], np.nan)
        macro[name], macro_freedom[name] = _spread_of(mean, means, of_differences)
    return Pool(deviation, freedom, macro, macro_freedom)


def _spread_of(own: FloatArray, others: list[FloatArray], of_differences: bool) -> tuple[float, int]:
    """(K,) values and those of other rows -> root of the variance over seeds, and its degrees of freedom."""
    freedom = len(own) - 1
    if freedom < 1 or not np.isfinite(own).all():
        return math.nan, 0
    variance = float(own.var(ddof=1))
    apart = [x - x.mean() for x in others]
    if of_differences:
        common = np.mean(apart, axis=0) if apart else 0.0
        total = 2 * sum(float(((x - common) ** 2).sum()) for x in apart)
        more = (len(others) - 1) * freedom
    else:
        total = sum(float((x**2).sum()) for x in apart)
        more = sum(len(x) - 1 for x in others)
    if more < 1:
        return math.sqrt(variance), freedom
    from scipy.special import fdtri

    if variance > total / more * float(fdtri(freedom, more, 1 - _ALIKE)):
        return math.sqrt(variance), freedom
    return math.sqrt(max(variance, (total + freedom * variance) / (more + freedom))), more + freedom


def common_findings(estimable: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Over which findings means are taken so that they can be compared between shares of the labels.

    Args:
        estimable: By share, from the largest down, the places of the findings that are estimable.
    Returns: For every share the findings that are estimable at all of them; none for a share at which fewer than half
        of those of the largest are, and which then does not narrow the others.
    """
    most = set(next(iter(estimable.values())))
    kept = {share: set(own) for share, own in estimable.items() if 2 * len(most & set(own)) >= len(most) and own}
    common = sorted(most.intersection(*kept.values()))
    return {share: common if share in kept else [] for share in estimable}


def bootstrap_p_value(differences: ArrayLike) -> float:
    """Return the two-sided bootstrap p-value of "the difference is 0" from resampled differences.

        p = min(1, 2 min(1 + #{d_r <= 0}, 1 + #{d_r >= 0}) / (R + 1))

    This inverts the percentile interval: p is, up to the resampling, the smallest 1 - level at which the interval still
    leaves 0 out. The added 1 counts the sample itself, so p is never 0; the smallest value is 2 / (R + 1), which says
    "at most this" and asks for more resamples where a correction over findings needs smaller ones. With few patients it
    is too small, as the interval is too short. Differences within 1e-12 of 0 are rounding and count on both sides.

    Args:
        differences: Resampled differences, shape (R,); NaN (undefined) are left out.
    Returns: A number in (0, 1].
    Raises: DataError: no difference is defined.
    Source: Efron and Tibshirani 1993, sec. 15.4 (tests from intervals); Davison and Hinkley 1997, ch. 4 (the added 1).
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[~np.isnan(d)]
    if not d.size:
        raise DataError("a p-value needs at least one defined difference; there is none")
    fewer = min(int((d <= _ROUNDING).sum()), int((d >= -_ROUNDING).sum()))
    return min(1.0, 2 * (1 + fewer) / (d.size + 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for being several, by Holm's step-down method; valid whatever their dependence.

        adjusted of the k-th smallest of m = max over j <= k of min(1, (m - j + 1) p_(j))

    Args:
        p_values: Numbers in [0, 1]; None (not estimable) stays None and is not counted in m.
    Returns: The adjusted values, in the same order. If the p-values are valid, rejecting where adjusted <= alpha
        rejects any true hypothesis at all with probability at most alpha.
    Source: Holm, Scand. J. Statist. 6, 1979.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted


def smallest_difference(half_width: float, level: float, tests: int = 1) -> float | None:
    """Return the smallest true difference that a two-sided test sees with a power of ``POWER``.

        half_width / z((1 + level) / 2) (z(1 - (1 - level) / (2 tests)) + z(POWER))

    1.43 half widths, or 2.80 standard errors, for one test at a level of 0.95.

    Args:
        half_width: Half the width of the interval of an estimated difference.
        level: Of the interval; the test's level is 1 - ``level``.
        tests: How many differences are tested at once, the first step of Holm's method (Bonferroni's).
    Returns: The difference; None where the interval has no width: that says nothing of what can be seen.
    Source: the normal approximation; Cohen, Statistical Power Analysis, 1988.
    """
    if half_width <= _ROUNDING:
        return None
    z = NormalDist().inv_cdf
    return half_width / z((1 + level) / 2) * (z(1 - (1 - level) / (2 * tests)) + z(POWER))


_ORDER = 7  # of the seed: in which order Student's quantiles meet the resamples


_Spread = tuple[float, int] | None  # deviation over seeds and its degrees of freedom, pooled; None: of the values


def _of_finding(pool: Pool | None, name: str, finding: int) -> _Spread:
    if pool is None or math.isnan(pool.deviation[name][finding]):
        return None
    return float(pool.deviation[name][finding]), int(pool.freedom[name][finding])


def _of_mean(pool: Pool | None, name: str) -> _Spread:
    return None if pool is None or math.isnan(pool.macro[name]) else (pool.macro[name], pool.macro_freedom[name])


def _seed_spread(values: FloatArray, spread: _Spread) -> tuple[float, int]:
    if spread is not None:
        return spread
    return (float(values.std(ddof=1)), len(values) - 1) if len(values) > 1 else (0.0, 0)


def _joint(
    values: FloatArray, draws: FloatArray, settings: BootstrapSettings, spread: _Spread, pivot: bool
) -> FloatArray:
    """Values (K,) and defined draws (K, R) -> what they say of the mean over K, (R,)."""
    mean = np.asarray(draws.mean(axis=0), dtype=np.float64)
    if pivot:
        mean = 2 * values.mean() - mean
    deviation, freedom = _seed_spread(values, spread)
    if deviation <= _ROUNDING:
        return mean
    from scipy.special import stdtrit

    order = np.random.default_rng((settings.seed, _ORDER)).permutation(mean.size)
    student = stdtrit(freedom, (order + 0.5) / mean.size)
    return np.asarray(mean + deviation / math.sqrt(len(values)) * student, dtype=np.float64)


def _standard_error(values: FloatArray, draws: FloatArray, spread: _Spread) -> float:
    """Root of the variance over patients and over seeds of the mean."""
    of_patients = float(draws.mean(axis=0).var(ddof=1)) if draws.shape[1] > 1 else 0.0
    return math.sqrt(of_patients + _seed_spread(values, spread)[0] ** 2 / len(values))


def _columns(
    drawn: Drawn,
    name: str,
    given: tuple[FloatArray, FloatArray] | None = None,
    notes: Sequence[str] | None = None,
    *,
    difference: bool = False,
    pool: Pool | None = None,
) -> list[Estimate]:
    """One estimate of a measure for each finding; of ``given`` (values, draws) instead of the measure's own."""
    values, draws = given or (drawn.values[name], drawn.draws[name])
    bounds = _bounds(drawn.columns[name], difference)
    return [
        _not_estimable(counts, note)
        if note
        else _estimate(
            values[f],
            draws[f],
            counts,
            drawn.settings,
            caution=_few(counts, drawn.settings),
            bounds=bounds,
            spread=_of_finding(pool, name, f),
            pivot=drawn.columns[name].pivot,
        )
        for f, (counts, note) in enumerate(zip(drawn.counts, notes or drawn.notes[name], strict=True))
    ]


def _bounds(column: Column, difference: bool) -> tuple[float, float]:
    low, high = column.bounds
    return (low - high, high - low) if difference else (low, high)


def _averaged(drawn: Drawn) -> list[str]:
    return [name for name, column in drawn.columns.items() if column.mean]


def _in_macro(drawn: Drawn, columns: Mapping[str, Sequence[Estimate]], over: Sequence[str] | None = None) -> list[int]:
    """The places of the findings, of those in ``over``, for which all anchoring measures are estimable."""
    anchors = [columns[name] for name in columns if drawn.columns[name].anchor]
    return [
        f
        for f, finding in enumerate(drawn.findings)
        if anchors and (over is None or finding in over) and not any(column[f].note for column in anchors)
    ]


def _mean(
    drawn: Drawn, name: str, included: list[int], estimates: Sequence[Estimate], values: FloatArray, draws: FloatArray,
    pool: Pool | None, *, difference: bool = False,
) -> Estimate:  # fmt: skip
    """The estimate of the mean over the included findings, of (F, K) values and (F, K, R) draws."""
    chosen = drawn.labels[:, included]
    positive, mask = np.asarray((chosen == 1).any(axis=1)), np.asarray((~np.isnan(chosen)).any(axis=1))
    counts = count_rows(positive, mask, drawn.codes)
    if not included:
        return _not_estimable(counts, f"not estimable: none of {len(drawn.findings)} findings is estimable")
    without = [drawn.findings[f] for f in included if estimates[f].note]
    if without:
        return _not_estimable(
            counts, f"not estimable for {', '.join(without)}: a mean over the others would be another"
        )
    # Each finding may miss 1 % of the resamples, and the mean misses what any of them misses: a mean over the others
    # would be another quantity.
    allowed = min(0.5, _MOST_UNDEFINED * len(included))
    few = [drawn.findings[f] for f in included if _few(drawn.counts[f], drawn.settings)]
    caution = f"of few patients: {', '.join(few)}; the interval is likely too narrow" if few else ""
    return _estimate(values[included].mean(axis=0), draws[included].mean(axis=0), counts, drawn.settings,
                     allowed=allowed, caution=caution, bounds=_bounds(drawn.columns[name], difference),
                     spread=_of_mean(pool, name), pivot=drawn.columns[name].pivot)  # fmt: skip


def _estimate(
    values: FloatArray,
    draws: FloatArray,
    counts: Counts,
    settings: BootstrapSettings,
    *,
    caution: str = "",
    allowed: float = _MOST_UNDEFINED,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    spread: _Spread = None,
    pivot: bool = False,
) -> Estimate:
    """(K,) values and (K, R) draws -> the estimate of their mean over seeds."""
    defined = draws[:, ~np.isnan(draws).any(axis=0)]
    resamples = draws.shape[1]
    undefined = resamples - defined.shape[1]
    if np.isnan(values).any():
        return _not_estimable(counts, "not estimable: undefined on the full sample")
    if undefined > allowed * resamples:
        share = f"{undefined} of {resamples} resamples, at most {allowed:.0%} tolerated"
        return _not_estimable(counts, f"not estimable: undefined in {share}")
    joint = _joint(values, defined, settings, spread, pivot)
    low, high = (float(end) for end in np.quantile(joint, [(1 - settings.level) / 2, (1 + settings.level) / 2]))
    if pivot:  # where nearly all resamples are above the value the basic interval would end below it
        low, high = min(low, float(values.mean())), max(high, float(values.mean()))
    if high - low <= _ROUNDING:
        caution = "; ".join(filter(None, [caution, "resamples all agree: the interval cannot show the uncertainty"]))
    several = len(values) > 1
    return Estimate(
        float(values.mean()), max(low, bounds[0]), min(high, bounds[1]), counts.n, counts.positives, counts.patients,
        resamples=defined.shape[1], caution=caution, standard_error=_standard_error(values, defined, spread),
        seeds=len(values), seed_deviation=float(values.std(ddof=1)) if several else None,
        seed_freedom=_seed_spread(values, spread)[1] if several else None,
    )  # fmt: skip


def _few(counts: Counts, settings: BootstrapSettings) -> str:
    sides = [(counts.positive_patients, "positive")]
    if settings.min_negative_patients:
        sides.append((counts.negative_patients, "negative"))
    few = " and ".join(f"{k} {side} patients" for k, side in sides if k < _FEW_PATIENTS)
    return f"only {few}: the interval is likely too narrow" if few else ""


def _not_estimable(counts: Counts, note: str) -> Estimate:
    return Estimate(None, None, None, counts.n, counts.positives, counts.patients, note)


def _p_value(
    estimate: Estimate, values: FloatArray, draws: FloatArray, settings: BootstrapSettings, spread: _Spread,
    pivot: bool,
) -> float | None:  # fmt: skip
    """Of (K,) differences and their (K, R) draws."""
    if estimate.note:
        return None
    return bootstrap_p_value(_joint(values, draws[:, ~np.isnan(draws).any(axis=0)], settings, spread, pivot))


def _difference(
    estimate: Estimate, p_value: float | None, p_holm: float | None, settings: BootstrapSettings
) -> Difference:
    excludes = (
        estimate.low is not None
        and estimate.high is not None
        and (estimate.low > _ROUNDING or estimate.high < -_ROUNDING)
    )
    detectable = None
    if estimate.low is not None and estimate.high is not None and estimate.seed_freedom != 1:
        detectable = smallest_difference((estimate.high - estimate.low) / 2, settings.level)
    return Difference(estimate, p_value, p_holm, excludes, detectable)


def _check_pair(a: Drawn, b: Drawn, same_images: bool) -> None:
    same = a.findings == b.findings and a.settings == b.settings and np.array_equal(a.codes, b.codes)
    if same and same_images:
        same = np.array_equal(a.labels, b.labels, equal_nan=True)
    if not same:
        raise DataError("two sets of scores are compared that were drawn on other images, patients, findings or "
                        "resamples; draw both from one table with one setting")  # fmt: skip
    for name in a.columns:
        if name in b.columns and a.values[name].shape != b.values[name].shape:
            sizes = " and ".join(str(side.values[name].shape[1]) for side in (a, b))
            raise DataError(f"{sizes} seeds are compared; a difference is paired seed by seed: give both the same")
