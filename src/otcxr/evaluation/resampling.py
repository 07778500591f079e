"""Resampling patients: what measures become when other patients of the same kind come.

Images of one patient resemble each other, so they are not independent observations. Resampling images pretends that
they are, and where patients have many images its intervals are two to three times too narrow; resampling patients does
not. The measures themselves weigh every image the same: a patient with many images counts for more.

    draws[k, r] = metric_k(labels, scores_k, weights_r),   k = 1 .. K training seeds,   r = 1 .. R resamples

The same resamples serve all findings, measures, seeds and models, so differences are paired and means keep the
correlation between findings.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13; Rutter, Academic Radiology 7, 2000
(resampling patients for AUROC); Davison and Hinkley, Bootstrap Methods and their Application, 1997, sec. 3.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcxr.errors import DataError
from otcxr.evaluation.estimates import BootstrapSettings, Counts
from otcxr.evaluation.metrics import assessed

__all__ = ["Column", "Drawn", "Metric", "apply_metric", "count_rows", "draw", "patient_codes", "patient_weights"]

FloatArray: TypeAlias = NDArray[np.float64]
CodeArray: TypeAlias = NDArray[np.intp]

# Counts of a resample that are held at once, whatever the number of resamples: large enough that sorting the scores
# again for every block costs little beside it.
_BLOCK_BYTES = 64 * 2**20


class Metric(Protocol):
    """A measure such as ``metrics.auroc``: labels (N,), scores (N,), weights (R, N) -> (R,), NaN where undefined."""

    def __call__(self, labels: FloatArray, scores: FloatArray, weights: NDArray[Any], /) -> float | FloatArray: ...


class Column(NamedTuple):
    """One measure of every finding: what is measured, on which scores.

    Attributes:
        scores: (N, F), or (K, N, F) from K training seeds; NaN allowed where ``notes`` says so or labels are missing.
        metrics: One metric for all; or K rows of F metrics, as a threshold may differ between findings and seeds.
        notes: For each finding "" or why it is not measured; empty: all are.
        anchor: Whether the findings over which means are taken are those for which this measure is estimable.
        mean: Whether a mean over findings says something.
        bounds: Least and largest value.
        higher_is_better: Whether it is; None where neither is (a slope should be 1).
        pivot: Whether resamples lean away from the value, as a distance from 0 does that noise enlarges. The interval
            is then (2 value - upper quantile, 2 value - lower quantile), which takes the lean back, instead of the
            quantiles.
    """

    scores: ArrayLike
    metrics: Metric | Sequence[Sequence[Metric]]
    notes: Sequence[str] = ()
    anchor: bool = True
    mean: bool = True
    bounds: tuple[float, float] = (0.0, 1.0)
    higher_is_better: bool | None = True
    pivot: bool = False


class Drawn(NamedTuple):
    """Checked input, and what every measure is on the full sample and on every resample.

    Attributes:
        findings: F names.
        counts: F; what they rest on.
        labels: (N, F), NaN where not assessed.
        codes: (N,) the place of each image's patient among the P sorted identifiers.
        columns: By measure.
        notes: By measure, F each: why it was not tried, or "".
        values: By measure, (F, K), NaN where not tried.
        draws: By measure, (F, K, R), NaN where undefined or not tried.
        settings: How it was drawn.
    """

    findings: tuple[str, ...]
    counts: tuple[Counts, ...]
    labels: FloatArray
    codes: CodeArray
    columns: Mapping[str, Column]
    notes: Mapping[str, tuple[str, ...]]
    values: Mapping[str, FloatArray]
    draws: Mapping[str, FloatArray]
    settings: BootstrapSettings


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
    codes, total = patient_codes(patients)
    return np.concatenate(list(_weight_blocks(codes, total, settings)))


def draw(
    labels: ArrayLike,
    columns: Mapping[str, Column],
    patients: ArrayLike,
    findings: Sequence[str],
    settings: BootstrapSettings,
    *,
    what: str = "scores",
) -> Drawn:
    """Compute every measure on the full sample and on resamples of patients.

    All patients given are resampled, also those not assessed, so the number of assessed ones varies as it would in a
    new sample.

    Args:
        labels: 1 present, 0 absent, NaN not assessed (left out of that finding only), shape (N, F).
        columns: What is measured, by name.
        patients: Who each image is of, shape (N,): strings or whole numbers.
        findings: F different names.
        settings: How many resamples, and what is too few.
        what: What messages call the scores, where there are several.
    Returns: The draws. 64 MB for the weights at any size, and 8 F K R bytes for each measure.
    Raises: DataError: shapes disagree, no rows, labels other than 0, 1 and NaN, scores not finite where assessed,
        patients missing, findings duplicated.
    """
    names = _finding_names(findings)
    table = _matrix(labels, "labels", names)
    codes, total = patient_codes(patients, len(table))
    checked = [assessed(table[:, f], np.zeros(len(table)), name=name) for f, name in enumerate(names)]
    floats = np.stack([label for label, _, _ in checked], axis=1)
    counts = tuple(count_rows(label == 1, mask, codes) for label, _, mask in checked)
    few = tuple(_too_few(count, settings) for count in counts)
    scores = {name: _score_sets(column, floats, names, what) for name, column in columns.items()}
    notes = {
        name: tuple(a or b for a, b in zip(few, column.notes or [""] * len(names), strict=True))
        for name, column in columns.items()
    }
    shapes = {name: (len(names), len(sets)) for name, sets in scores.items()}
    values = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
    draws = {name: np.full((*shape, settings.resamples), np.nan) for name, shape in shapes.items()}
    jobs = [
        (name, f, k, _metric(columns[name], k, f))
        for name, (_, seeds) in shapes.items() for k in range(seeds) for f in range(len(names)) if not notes[name][f]
    ]  # fmt: skip
    whole = np.ones((1, len(table)), dtype=np.uint16)
    for name, f, k, metric in jobs:
        values[name][f, k] = apply_metric(metric, floats[:, f], scores[name][k][:, f], whole)[0]
    start = 0
    for block in _weight_blocks(codes, total, settings) if jobs else ():
        for name, f, k, metric in jobs:
            draws[name][f, k, start : start + len(block)] = apply_metric(
                metric, floats[:, f], scores[name][k][:, f], block
            )
        start += len(block)
    return Drawn(names, counts, floats, codes, dict(columns), notes, values, draws, settings)


def apply_metric(metric: Metric, labels: FloatArray, scores: FloatArray, weights: NDArray[np.uint16]) -> FloatArray:
    """The measure for each of R sets of weights, (R,)."""
    values = np.asarray(metric(labels, scores, weights), dtype=np.float64)
    if values.shape != (len(weights),):
        raise ValueError(
            f"metric returned shape {values.shape} for weights {weights.shape}; expected ({len(weights)},)"
        )
    return values


def count_rows(positive: NDArray[np.bool_], mask: NDArray[np.bool_], codes: CodeArray) -> Counts:
    """Which rows are positive and which assessed, (N,) bool each -> counts of images and patients."""
    negative = mask & ~positive
    patients = (int(np.unique(codes[rows]).size) for rows in (mask, positive, negative))
    return Counts(int(mask.sum()), int(positive.sum()), *patients)


def patient_codes(patients: ArrayLike, images: int | None = None) -> tuple[CodeArray, int]:
    """Identifiers (N,) -> the place of each row's patient among the sorted P identifiers, (N,), and P.

    Raises: DataError: no rows, not ``images`` rows, or identifiers that are missing or of mixed types.
    """
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


def _score_sets(column: Column, labels: FloatArray, findings: tuple[str, ...], what: str) -> list[FloatArray]:
    """The K score tables (N, F) of a column, checked where they are used."""
    sets = np.asarray(column.scores)
    sets = sets[None] if sets.ndim != 3 else sets
    suffix = "" if what == "scores" else f" ({what})"
    out = []
    for scores in sets:
        matrix = _matrix(scores, what, findings)
        if matrix.shape != labels.shape:
            raise DataError(f"{what} have shape {matrix.shape}, but labels have shape {labels.shape}")
        for f, finding in enumerate(findings):
            if not (column.notes and column.notes[f]):
                assessed(labels[:, f], matrix[:, f], name=finding + suffix)
        out.append(np.asarray(matrix, dtype=np.float64))
    return out


def _metric(column: Column, seed: int, finding: int) -> Metric:
    return column.metrics if callable(column.metrics) else column.metrics[seed][finding]


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
