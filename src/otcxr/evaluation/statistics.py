"""How sure a measure is: bootstrap intervals by patient, for one set of scores and for the difference of two.

Images of one patient resemble each other, so they are not independent observations. Resampling images pretends that
they are, and where patients have many images its intervals are two to three times too narrow; resampling patients does
not. The measures themselves weigh every image the same: a patient with many images counts for more.

An interval answers one question: how far would the number move with *other patients* from the same population? It does
not cover another training seed, another hospital or errors in the labels.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13 (percentile interval); Rutter, Academic
Radiology 7, 2000 (resampling patients for AUROC); Davison and Hinkley, Bootstrap Methods and their Application, 1997,
sec. 3.8 (resampling whole clusters).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcxr.errors import DataError
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
from otcxr.evaluation.metrics import assessed, auroc, average_precision

__all__ = [
    "BootstrapSettings",
    "Comparison",
    "Counts",
    "Difference",
    "Estimate",
    "FindingComparison",
    "FindingScores",
    "MacroComparison",
    "MacroScores",
    "MeasureComparison",
    "Metric",
    "ScoreTable",
    "as_json",
    "bootstrap_metric",
    "bootstrap_p_value",
    "compare_scores",
    "evaluate_scores",
    "holm",
    "patient_weights",
]

FloatArray: TypeAlias = NDArray[np.float64]
CodeArray: TypeAlias = NDArray[np.intp]

# Counts of a resample that are held at once, whatever the number of resamples: large enough that sorting the scores
# again for every block costs little beside it.
_BLOCK_BYTES = 64 * 2**20

# A resample in which a measure is undefined is left out. More of them than this and what is left is no longer a fair
# picture of the resamples.
_MOST_UNDEFINED = 0.01

# Fewer patients than this on one side and the percentile interval is clearly too short. In 500 simulated samples with
# one image per patient, 400 negative patients and normal scores, 95 % intervals of a true AUROC of 0.75 (0.9) covered
# it in 82 (80) % with 5 positive patients, 89 (84) % with 10, 92 (89) % with 20 and 93 (93) % with 100.
_FEW_PATIENTS = 20

# Differences of averages of exact ratios: below this they are rounding, not a difference.
_ROUNDING = 1e-12


class Metric(Protocol):
    """A measure such as ``metrics.auroc``: labels (N,), scores (N,), weights (R, N) -> (R,), NaN where undefined."""

    def __call__(self, labels: FloatArray, scores: FloatArray, weights: NDArray[Any], /) -> float | FloatArray: ...


# The measures of a table, by the name of their field.
_MEASURES: dict[str, Metric] = {"auroc": auroc, "average_precision": average_precision}


def patient_weights(patients: ArrayLike, resamples: int, seed: int) -> NDArray[np.uint16]:
    """Draw as many patients as there are, with replacement, and count how often each image comes along.

    Args:
        patients: Who each image is of, shape (N,): strings or whole numbers.
        resamples: Number of resamples R.
        seed: Seed of a generator of its own.
    Returns: (R, N) uint16, 2 R N bytes. All images of a patient have the same count in a resample, the counts of the P
        patients follow a multinomial distribution with P draws and sum to P, each has mean 1. The number of images of
        a resample varies. A patient's counts depend on the seed and on the patient's place among the sorted
        identifiers, not on the order of the rows; row r does not depend on ``resamples``.
    Raises:
        DataError: no rows, or identifiers that are missing or of mixed types.
        ConfigError: ``resamples`` or ``seed`` out of range.
    """
    settings = BootstrapSettings(resamples=resamples, seed=seed)
    codes, total = _patient_codes(patients)
    return np.concatenate(list(_weight_blocks(codes, total, settings)))


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
    """Estimate a measure with a percentile interval over resampled patients.

        low, high = quantiles (1 - level) / 2 and (1 + level) / 2 of metric(labels, scores, weights_r),   r = 1 .. R

    All patients given are resampled, also those not assessed, so the number of assessed ones varies as it would in a
    new sample. The percentile interval needs no assumption on how images of a patient depend on each other, but
    patients must be independent. With few patients it is too short, and scores that separate the sample perfectly get
    an interval of no width: ``caution`` says so. That of average precision leans upward when positives are few, because
    an image drawn twice ties with itself.

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
    label, score, mask = assessed(labels, scores)
    codes, total = _patient_codes(patients, label.size)
    counts = _count(label == 1, mask, codes)
    if note := _too_few(counts, settings):
        return _not_estimable(counts, note)
    draws = np.concatenate([_apply(metric, label, score, block) for block in _weight_blocks(codes, total, settings)])
    return _estimate(_full(metric, label, score), draws, counts, settings, caution=_few(counts))


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
    """Estimate AUROC and average precision of every finding and their means, with intervals over resampled patients.

        macro_r = mean over findings f of metric(labels_f, scores_f, weights_r)

    One resample draws the same patients for all findings, so the interval of the macro mean holds the correlation
    between findings. The mean is over the findings for which both measures are estimable, the same ones in every
    resample; a resample in which one of them is undefined is left out of the mean's interval.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (left out of that finding only), shape (N, F).
        scores: Higher means more suspect, shape (N, F); finite where assessed.
        patients: Who each image is of, shape (N,): strings or whole numbers.
        findings: F different names.
        resamples, seed, level, min_positive_patients, min_negative_patients: :class:`BootstrapSettings`.
    Returns: The table; :func:`as_json` makes it plain. A finding that is not estimable is not an error. Estimates of
        findings are those of :func:`bootstrap_metric` with the same settings. Intervals hold one finding at a time.
        Cost: about 1 s per finding for 2000 resamples of 25,000 images; 64 MB for the weights at any size.
    Raises:
        DataError: as :func:`bootstrap_metric`; findings duplicated or not F names.
        ConfigError: a setting out of range.
    """
    settings = BootstrapSettings(resamples, seed, level, min_positive_patients, min_negative_patients)
    sample = _resample(labels, {"scores": scores}, patients, findings, settings)
    columns = [_columns(sample, sample.values[0, m], sample.draws[0, m]) for m in range(len(_MEASURES))]
    rows = tuple(
        FindingScores(finding, counts, *estimates)
        for finding, counts, *estimates in zip(sample.findings, sample.counts, *columns, strict=True)
    )
    both = _in_macro(columns)
    means = [_mean(sample, both, sample.values[0, m], sample.draws[0, m]) for m in range(len(_MEASURES))]
    return ScoreTable(rows, MacroScores(tuple(sample.findings[f] for f in both), *means), settings)


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
        scores_a, scores_b: Higher means more suspect, shape (N, F) each; finite where assessed. Scales may differ.
        patients: Who each image is of, shape (N,): strings or whole numbers.
        findings: F different names.
        resamples, seed, level, min_positive_patients, min_negative_patients: :class:`BootstrapSettings`.
    Returns: Per finding and for the macro mean both measures of a, of b and their difference with p-values. Estimates
        of a and b are those of :func:`evaluate_scores` with the same settings. Intervals hold one finding at a time;
        over many findings read ``p_holm``. Not estimable is not an error.
    Raises: DataError, ConfigError: as :func:`evaluate_scores`.
    """
    settings = BootstrapSettings(resamples, seed, level, min_positive_patients, min_negative_patients)
    sample = _resample(labels, {"scores_a": scores_a, "scores_b": scores_b}, patients, findings, settings)
    values = [*sample.values, sample.values[0] - sample.values[1]]
    draws = [*sample.draws, sample.draws[0] - sample.draws[1]]
    measures: list[list[MeasureComparison]] = []
    for m in range(len(_MEASURES)):
        a, b, gap = (_columns(sample, value[m], draw[m]) for value, draw in zip(values, draws, strict=True))
        p = [_p_value(estimate, draw) for estimate, draw in zip(gap, draws[2][m], strict=True)]
        gaps = map(_difference, gap, p, holm(p))
        measures.append([MeasureComparison(*row) for row in zip(a, b, gaps, strict=True)])
    rows = tuple(
        FindingComparison(finding, counts, *row)
        for finding, counts, *row in zip(sample.findings, sample.counts, *measures, strict=True)
    )
    both = _in_macro([[row.difference.estimate for row in column] for column in measures])
    means = []
    for m in range(len(_MEASURES)):
        a_mean, b_mean, gap_mean = (
            _mean(sample, both, value[m], draw[m]) for value, draw in zip(values, draws, strict=True)
        )
        p_mean = _p_value(gap_mean, draws[2][m][both].mean(axis=0)) if both else None
        means.append(MeasureComparison(a_mean, b_mean, _difference(gap_mean, p_mean, None)))
    return Comparison(rows, MacroComparison(tuple(sample.findings[f] for f in both), *means), settings)


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


class _Sample(NamedTuple):
    """Checked input and what the resamples of S sets of scores gave for M measures of F findings."""

    findings: tuple[str, ...]
    counts: tuple[Counts, ...]
    notes: tuple[str, ...]  # per finding: why it is not even tried, or ""
    labels: FloatArray  # (N, F)
    codes: CodeArray  # (N,)
    values: FloatArray  # (S, M, F), NaN where not tried
    draws: FloatArray  # (S, M, F, R), NaN where undefined or not tried
    settings: BootstrapSettings


def _resample(
    labels: ArrayLike,
    score_sets: dict[str, ArrayLike],
    patients: ArrayLike,
    findings: Sequence[str],
    settings: BootstrapSettings,
) -> _Sample:
    names = _finding_names(findings)
    table = _matrix(labels, "labels", names)
    codes, total = _patient_codes(patients, len(table))
    columns = []  # per set of scores, per finding: labels, scores, mask
    for what, scores in score_sets.items():
        matrix = _matrix(scores, what, names)
        if matrix.shape != table.shape:
            raise DataError(f"{what} have shape {matrix.shape}, but labels have shape {table.shape}")
        suffix = "" if len(score_sets) == 1 else f" ({what})"
        columns.append([assessed(table[:, f], matrix[:, f], name=name + suffix) for f, name in enumerate(names)])
    counts = tuple(_count(label == 1, mask, codes) for label, _, mask in columns[0])
    notes = tuple(_too_few(count, settings) for count in counts)
    tried = [f for f, note in enumerate(notes) if not note]

    shape = (len(score_sets), len(_MEASURES), len(names))
    values = np.full(shape, np.nan)
    draws = np.full((*shape, settings.resamples), np.nan)
    jobs = [(s, m, f, metric) for s in range(shape[0]) for m, metric in enumerate(_MEASURES.values()) for f in tried]
    for s, m, f, metric in jobs:
        values[s, m, f] = _full(metric, *columns[s][f][:2])
    start = 0
    for block in _weight_blocks(codes, total, settings) if tried else ():
        for s, m, f, metric in jobs:
            draws[s, m, f, start : start + len(block)] = _apply(metric, *columns[s][f][:2], block)
        start += len(block)
    floats = np.stack([label for label, _, _ in columns[0]], axis=1)
    return _Sample(names, counts, notes, floats, codes, values, draws, settings)


def _columns(sample: _Sample, values: FloatArray, draws: FloatArray) -> list[Estimate]:
    """(F,) values, (F, R) draws -> one estimate per finding."""
    return [
        _not_estimable(counts, note)
        if note
        else _estimate(float(value), draw, counts, sample.settings, caution=_few(counts))
        for counts, note, value, draw in zip(sample.counts, sample.notes, values, draws, strict=True)
    ]


def _in_macro(columns: Sequence[Sequence[Estimate]]) -> list[int]:
    """Columns of estimates, one per measure -> the places of the findings for which all are estimable."""
    return [f for f, row in enumerate(zip(*columns, strict=True)) if not any(estimate.note for estimate in row)]


def _mean(sample: _Sample, included: list[int], values: FloatArray, draws: FloatArray) -> Estimate:
    """(F,) values, (F, R) draws -> the estimate of the mean over the included findings."""
    chosen = sample.labels[:, included]
    positive, mask = np.asarray((chosen == 1).any(axis=1)), np.asarray((~np.isnan(chosen)).any(axis=1))
    counts = _count(positive, mask, sample.codes)
    if not included:
        return _not_estimable(counts, f"not estimable: none of {len(sample.findings)} findings is estimable")
    # Each finding may miss 1 % of the resamples, and the mean misses what any of them misses: a mean over the others
    # would be another quantity.
    allowed = min(0.5, _MOST_UNDEFINED * len(included))
    value, draw = float(values[included].mean()), draws[included].mean(axis=0)
    few = [sample.findings[f] for f in included if _few(sample.counts[f])]
    caution = f"of few patients: {', '.join(few)}; the interval is likely too narrow" if few else ""
    return _estimate(value, draw, counts, sample.settings, allowed=allowed, caution=caution)


def _estimate(
    value: float,
    draws: FloatArray,
    counts: Counts,
    settings: BootstrapSettings,
    *,
    caution: str = "",
    allowed: float = _MOST_UNDEFINED,
) -> Estimate:
    defined = draws[~np.isnan(draws)]
    undefined = draws.size - defined.size
    if np.isnan(value):
        return _not_estimable(counts, "not estimable: undefined on the full sample")
    if undefined > allowed * draws.size:
        share = f"{undefined} of {draws.size} resamples, at most {allowed:.0%} tolerated"
        return _not_estimable(counts, f"not estimable: undefined in {share}")
    low, high = (float(end) for end in np.quantile(defined, [(1 - settings.level) / 2, (1 + settings.level) / 2]))
    if high - low <= _ROUNDING:
        caution = "; ".join(filter(None, [caution, "resamples all agree: the interval cannot show the uncertainty"]))
    return Estimate(
        value, low, high, counts.n, counts.positives, counts.patients, resamples=defined.size, caution=caution
    )


def _few(counts: Counts) -> str:
    sides = ((counts.positive_patients, "positive"), (counts.negative_patients, "negative"))
    few = " and ".join(f"{k} {side} patients" for k, side in sides if k < _FEW_PATIENTS)
    return f"only {few}: the interval is likely too narrow" if few else ""


def _not_estimable(counts: Counts, note: str) -> Estimate:
    return Estimate(None, None, None, counts.n, counts.positives, counts.patients, note)


def _too_few(counts: Counts, settings: BootstrapSettings) -> str:
    if not counts.n:
        return "not estimable: no image is assessed"
    if counts.positive_patients < settings.min_positive_patients:
        kind, found, needed = "positive", counts.positive_patients, settings.min_positive_patients
    elif counts.negative_patients < settings.min_negative_patients:
        kind, found, needed = "negative", counts.negative_patients, settings.min_negative_patients
    else:
        return ""
    return f"not estimable: {found} {kind} patient{'' if found == 1 else 's'}, at least {needed} needed"


def _p_value(estimate: Estimate, draws: FloatArray) -> float | None:
    return None if estimate.note else bootstrap_p_value(draws)


def _difference(estimate: Estimate, p_value: float | None, p_holm: float | None) -> Difference:
    excludes = (
        estimate.low is not None
        and estimate.high is not None
        and (estimate.low > _ROUNDING or estimate.high < -_ROUNDING)
    )
    return Difference(estimate, p_value, p_holm, excludes)


def _count(positive: NDArray[np.bool_], mask: NDArray[np.bool_], codes: CodeArray) -> Counts:
    """Which rows are positive and which assessed, (N,) bool each -> counts of images and patients."""
    negative = mask & ~positive
    patients = (int(np.unique(codes[rows]).size) for rows in (mask, positive, negative))
    return Counts(int(mask.sum()), int(positive.sum()), *patients)


def _full(metric: Metric, labels: FloatArray, scores: FloatArray) -> float:
    return float(_apply(metric, labels, scores, np.ones((1, labels.size), dtype=np.uint16))[0])


def _apply(metric: Metric, labels: FloatArray, scores: FloatArray, weights: NDArray[np.uint16]) -> FloatArray:
    values = np.asarray(metric(labels, scores, weights), dtype=np.float64)
    if values.shape != (len(weights),):
        raise ValueError(
            f"metric returned shape {values.shape} for weights {weights.shape}; expected ({len(weights)},)"
        )
    return values


def _weight_blocks(codes: CodeArray, patients: int, settings: BootstrapSettings) -> Iterator[NDArray[np.uint16]]:
    """Yield the rows of :func:`patient_weights` in blocks that fit into memory."""
    generator = np.random.default_rng(settings.seed)
    rows = max(1, _BLOCK_BYTES // (2 * codes.size))
    for start in range(0, settings.resamples, rows):
        block = np.empty((min(rows, settings.resamples - start), codes.size), dtype=np.uint16)
        for row in block:
            # Counting P draws is the multinomial, and many times faster than drawing its P binomials.
            drawn = generator.integers(patients, size=patients)
            row[:] = np.bincount(drawn, minlength=patients)[codes]
        yield block


def _patient_codes(patients: ArrayLike, images: int | None = None) -> tuple[CodeArray, int]:
    """Identifiers (N,) -> the place of each row's patient among the sorted P identifiers, (N,), and P."""
    # A list goes through objects: numpy would turn a missing entry among strings into the patient 'nan'.
    values = patients if isinstance(patients, np.ndarray) else np.asarray(patients, dtype=object)
    if values.ndim != 1 or not values.size:
        raise DataError(
            f"patients have shape {values.shape}; expected one identifier per image, (N,) with N at least 1"
        )
    if images is not None and values.size != images:
        raise DataError(f"there are {values.size} patients for {images} images; expected one identifier per image")
    try:
        missing = [
            i for i, patient in enumerate(values.tolist()) if patient is None or patient != patient or patient == ""
        ]
        if missing:
            raise DataError(
                f"patients are missing in {len(missing)} of {values.size} rows, the first is row {missing[0]}; give "
                "every image its patient, or an identifier of its own if it is known to be of no other patient"
            )
        identifiers, codes = np.unique(values, return_inverse=True)
    except TypeError as error:
        raise DataError(f"patients must be all strings or all whole numbers, none missing: {error}") from error
    return codes.astype(np.intp), int(identifiers.size)


def _finding_names(findings: Sequence[str]) -> tuple[str, ...]:
    if isinstance(findings, str) or not findings:
        raise DataError(f"findings must be a sequence of at least one name, got {findings!r}")
    names = tuple(findings)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"findings name {', '.join(map(repr, twice))} more than once; each column needs a name of its own"
        )
    return names


def _matrix(values: ArrayLike, what: str, findings: tuple[str, ...]) -> NDArray[Any]:
    try:
        matrix = np.asarray(values)
    except ValueError as error:
        raise DataError(f"{what} must be a table of shape (images, findings): {error}") from error
    if matrix.ndim != 2 or not len(matrix) or matrix.shape[1] != len(findings):
        raise DataError(
            f"{what} have shape {matrix.shape}; {len(findings)} findings need (N, {len(findings)}) with N at least 1"
        )
    return matrix
