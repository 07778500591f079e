"""Measures and their intervals: against slow formulas, scikit-learn, physically repeated rows and simulated truth."""

from __future__ import annotations

import ast
import json
import sys
from math import erf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from oracles import auroc_by_pairs, average_precision_by_steps, holm_by_closed_testing
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation import decisions, metrics, resampling, statistics
from otcxr.evaluation.metrics import assessed, auroc, average_precision, prevalence
from otcxr.evaluation.statistics import (
    BootstrapSettings,
    Counts,
    Estimate,
    as_json,
    bootstrap_metric,
    bootstrap_p_value,
    compare_scores,
    evaluate_scores,
    holm,
    patient_weights,
)

MEASURES = [
    (auroc, auroc_by_pairs, roc_auc_score),
    (average_precision, average_precision_by_steps, average_precision_score),
]


@st.composite
def ranked(draw, values=(0.0, 1.0)):
    """Labels, scores from distinct over heavily tied to constant, and integer weights with zeros."""
    n = draw(st.integers(1, 25))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    labels = draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))
    scores = draw(st.lists(st.integers(-levels, levels - 1).map(lambda k: k // 2 / 7), min_size=n, max_size=n))
    weights = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    return np.array(labels), np.array(scores), np.array(weights)


def table(images=400, per_patient=4, findings=3, seed=0, skill=1.0, prevalence=0.3):
    """Labels (N, F), scores (N, F) and patients (N,) whose images and findings resemble each other."""
    rng = np.random.default_rng(seed)
    patients = np.arange(images) // per_patient
    mood = rng.normal(size=patients[-1] + 1)[patients, None]
    labels = (rng.random((patients[-1] + 1, findings)) < prevalence)[patients].astype(float)
    return labels, skill * labels + mood + rng.normal(size=(images, findings)), patients


# --- measures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("measure", "oracle", "peer"), MEASURES)
@given(data=ranked())
@settings(deadline=None, max_examples=150)
def test_measure_equals_slow_formula_and_scikit_learn(measure, oracle, peer, data):
    labels, scores, weights = data
    assert measure(labels, scores) == pytest.approx(oracle(labels, scores), nan_ok=True, abs=1e-12)
    value = measure(labels, scores, weights)
    assert isinstance(value, float)
    assert value == pytest.approx(oracle(labels, scores, weights), nan_ok=True, abs=1e-12)
    if weights[labels == 1].any() and weights[labels == 0].any():
        assert value == pytest.approx(peer(labels, scores, sample_weight=weights), abs=1e-12)


@pytest.mark.parametrize(("measure", "oracle", "peer"), MEASURES)
def test_measure_equals_scikit_learn_on_many_images_and_real_weights(measure, oracle, peer):
    rng = np.random.default_rng(0)
    labels = (rng.random(3000) < 0.1).astype(float)
    scores = np.round(rng.normal(size=3000) + labels, 1)
    weights = rng.exponential(size=3000)
    assert measure(labels, scores) == pytest.approx(peer(labels, scores), abs=1e-13)
    assert measure(labels, scores, weights) == pytest.approx(peer(labels, scores, sample_weight=weights), abs=1e-12)


@pytest.mark.parametrize("measure", [auroc, average_precision])
@given(data=ranked())
@settings(deadline=None, max_examples=60)
def test_weight_k_is_the_row_repeated_k_times(measure, data):
    labels, scores, weights = data
    if weights.sum():
        repeated = measure(np.repeat(labels, weights), np.repeat(scores, weights))
        assert measure(labels, scores, weights) == pytest.approx(repeated, nan_ok=True, abs=1e-13)


@pytest.mark.parametrize("measure", [auroc, average_precision])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32, np.float64])
def test_many_sets_of_weights_equal_one_at_a_time(measure, dtype, monkeypatch):
    rng = np.random.default_rng(1)
    labels, scores = (rng.random(50) < 0.2).astype(float), np.round(rng.normal(size=50), 1)
    weights = rng.poisson(1, (37, 50)).astype(dtype)
    weights[5, labels == 1] = 0
    weights[36] = 0
    one_by_one = np.array([measure(labels, scores, row) for row in weights])
    assert np.isnan(one_by_one[[5, 36]]).all()
    at_once = measure(labels, scores, weights)
    assert at_once.shape == (37,)
    assert at_once.dtype == np.float64
    np.testing.assert_array_equal(at_once, one_by_one)
    monkeypatch.setattr(metrics, "_CHUNK_BYTES", 50 * metrics._BYTES_PER_WEIGHT * 10)  # 10 + 10 + 10 + 7 rows
    np.testing.assert_array_equal(measure(labels, scores, weights), one_by_one)
    assert measure(labels, scores, weights[:0]).shape == (0,)


@given(data=ranked())
@settings(deadline=None, max_examples=60)
def test_auroc_symmetries(data):
    labels, scores, weights = data
    value = auroc(labels, scores, weights)
    if not np.isnan(value):
        assert auroc(labels, -scores, weights) == pytest.approx(1 - value, abs=1e-13)
        assert auroc(1 - labels, scores, weights) == pytest.approx(1 - value, abs=1e-13)
        assert auroc(labels, np.exp(scores / 200), weights) == value


def test_exact_values():
    labels = np.repeat([0.0, 1.0], [700, 300])
    assert auroc(labels, np.zeros(1000)) == 0.5
    assert auroc(labels, labels) == 1.0
    assert auroc(labels, -labels) == 0.0
    assert prevalence(labels) == 0.3
    assert average_precision(labels, np.zeros(1000)) == pytest.approx(0.3, abs=1e-15)
    assert average_precision(labels, labels) == 1.0
    assert average_precision([1, 1], [0.1, 0.2]) == 1.0
    # By hand: thresholds 3, 2 (a tie of both classes), 1 give precision 1, 2/3, 1/2 and recall 1/2, 1, 1.
    assert average_precision([1, 0, 1, 0], [3, 2, 2, 1]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # By hand: the positive at 3 outranks both negatives, the one at 2 ties with one and outranks the other.
    assert auroc([1, 0, 1, 0], [3, 2, 2, 1]) == 3.5 / 4


def test_undefined_is_nan_without_a_warning():
    assert np.isnan(auroc([1, 1], [0, 1]))
    assert np.isnan(auroc([0, 0], [0, 1]))
    assert np.isnan(auroc([0, 1], [0, 1], [1, 0]))
    assert np.isnan(average_precision([0, 0], [0, 1]))
    assert np.isnan(average_precision([0, 1], [0, 1], [1, 0]))
    assert np.isnan(auroc([np.nan], [0.0]))
    assert np.isnan(prevalence([np.nan]))
    assert np.isnan(prevalence([0, 1], [0, 0]))


@given(data=ranked(values=(0.0, 1.0, np.nan)))
@settings(deadline=None, max_examples=80)
def test_rows_that_are_not_assessed_do_not_matter(data):
    labels, scores, weights = data
    known = ~np.isnan(labels)
    hidden = np.where(known, scores, np.nan)
    for measure in (auroc, average_precision):
        value = measure(labels, hidden, weights)
        if known.any():
            assert value == pytest.approx(measure(labels[known], scores[known], weights[known]), nan_ok=True, abs=0)
        else:
            assert np.isnan(value)
    if weights[known].any():
        assert prevalence(labels, weights) == pytest.approx(np.average(labels[known], weights=weights[known]))


def test_prevalence_of_many_weights():
    labels = np.array([1, 0, np.nan, 1])
    np.testing.assert_allclose(prevalence(labels, [[1, 1, 9, 1], [0, 2, 1, 2], [0, 0, 3, 0]]), [2 / 3, 0.5, np.nan])


@pytest.mark.parametrize(
    ("labels", "scores", "weights", "says"),
    [
        ([], [], None, "at least one image"),
        ([[0, 1]], [[0, 1]], None, r"labels have shape \(1, 2\)"),
        ([0, 1], [0, 1, 2], None, r"scores have shape \(3,\), but labels have shape \(2,\)"),
        ([0, 1, -1, 2], [0, 1, 2, 3], None, r"2 of 4 rows are not, the first is -1 \(rows 2, 3\)"),
        (["yes", "no"], [0, 1], None, "labels must be numbers"),
        ([0, 1, 1], [0, np.nan, np.inf], None, r"2 of 3 assessed rows are NaN or infinite \(rows 1, 2\)"),
        ([0, 1], [0, 1], [1, 1, 1], r"2 images need \(2,\) or \(R, 2\)"),
        ([0, 1], [0, 1], [[[1, 1]]], "weights have shape"),
        ([0, 1], [0, 1], [1, -1], "weights must be finite and >= 0"),
        ([0, 1], [0, 1], [[1.0, 1.0], [np.nan, 1.0]], "weights must be finite and >= 0"),
        ([0, 1], [0, 1], [1, np.inf], "weights must be finite and >= 0"),
        ([0, 1], [0, 1], ["a", "b"], "weights must be numbers"),
    ],
)
@pytest.mark.parametrize("measure", [auroc, average_precision])
def test_bad_input_is_refused(measure, labels, scores, weights, says):
    with pytest.raises(DataError, match=says):
        measure(labels, scores, weights)


def test_errors_name_the_finding():
    with pytest.raises(DataError, match="scores of 'Nodule' must be finite"):
        assessed([1.0], [np.nan], name="Nodule")
    with pytest.raises(DataError, match="labels of 'Nodule' must be 0"):
        assessed([3.0], [0.0], name="Nodule")


# --- resampling patients ---------------------------------------------------------------------------------------------


def test_patient_weights_are_counts_of_whole_patients():
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 40, 150).astype(str)
    weights = patient_weights(patients, 3000, seed=7)
    assert weights.shape == (3000, 150)
    assert weights.dtype == np.uint16
    names, first = np.unique(patients, return_index=True)
    for name, row in zip(names, first, strict=True):
        assert (weights[:, patients == name] == weights[:, [row]]).all()
    counts = weights[:, first].astype(float)
    assert (counts.sum(axis=1) == len(names)).all()
    # Multinomial: mean 1, variance 1 - 1/P, covariance -1/P. Five standard errors of 3000 resamples are below 0.1.
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.1)
    p = len(names)
    np.testing.assert_allclose(np.cov(counts.T), np.eye(p) - 1 / p, atol=0.2)
    assert counts.var(axis=0).mean() == pytest.approx(1 - 1 / p, abs=0.02)


def test_patient_weights_depend_on_seed_and_patients_only(monkeypatch):
    patients = np.array(["b", "a", "b", "c", "a", "d"])
    weights = patient_weights(patients, 50, seed=3)
    state = np.random.get_state()[1].copy()  # noqa: NPY002 -- the global generator must not have moved
    np.testing.assert_array_equal(patient_weights(patients, 50, seed=3), weights)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert (patient_weights(patients, 50, seed=4) != weights).any()
    np.testing.assert_array_equal(patient_weights(patients, 20, seed=3), weights[:20])
    np.testing.assert_array_equal(patient_weights(list(patients), 50, seed=3), weights)
    order = np.array([5, 3, 1, 0, 2, 4])
    np.testing.assert_array_equal(patient_weights(patients[order], 50, seed=3), weights[:, order])
    monkeypatch.setattr(resampling, "_BLOCK_BYTES", 2 * 6 * 7)
    np.testing.assert_array_equal(patient_weights(patients, 50, seed=3), weights)


def test_interval_is_that_of_physically_drawn_patients():
    labels, scores, patients = table(images=120, findings=1)
    estimate = bootstrap_metric(auroc, labels[:, 0], scores[:, 0], patients, resamples=200, seed=5, level=0.9)
    draws = []
    for row in patient_weights(patients, 200, 5):
        images = [i for i in range(120) for _ in range(row[i])]
        draws.append(roc_auc_score(labels[images, 0], scores[images, 0]))
    assert estimate.value == pytest.approx(roc_auc_score(labels[:, 0], scores[:, 0]))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(draws, [0.05, 0.95])))
    assert estimate[3:8] == (120, int(labels.sum()), 30, "", 200)
    assert estimate.standard_error == pytest.approx(np.std(draws, ddof=1))
    assert (estimate.seeds, estimate.seed_deviation) == (1, None)


def test_interval_is_deterministic_and_blocks_do_not_matter(monkeypatch):
    labels, scores, patients = table(findings=1)
    once = bootstrap_metric(auroc, labels[:, 0], scores[:, 0], patients, resamples=100)
    assert bootstrap_metric(auroc, labels[:, 0], scores[:, 0], patients, resamples=100) == once
    assert bootstrap_metric(auroc, labels[:, 0], scores[:, 0], patients, resamples=100, seed=1).low != once.low
    monkeypatch.setattr(resampling, "_BLOCK_BYTES", 2 * len(labels) * 7)
    assert bootstrap_metric(auroc, labels[:, 0], scores[:, 0], patients, resamples=100) == once
    wide = bootstrap_metric(auroc, labels[:, 0], scores[:, 0], patients, resamples=100, level=0.99)
    assert wide.low < once.low < once.value < once.high < wide.high


def test_too_few_patients_are_not_estimable():
    labels, scores, patients = np.zeros(100), np.arange(100.0), np.arange(100) // 2
    labels[:8] = 1  # 8 images of 4 patients
    estimate = bootstrap_metric(auroc, labels, scores, patients, resamples=50)
    assert estimate == Estimate(None, None, None, 100, 8, 50, "not estimable: 4 positive patients, at least 5 needed")
    assert bootstrap_metric(auroc, labels, scores, patients, resamples=300, min_positive_patients=3).value is None
    other = bootstrap_metric(auroc, 1 - labels, scores, patients, resamples=50)
    assert other.note == "not estimable: 4 negative patients, at least 5 needed"
    one = bootstrap_metric(auroc, [0, 1], [0, 1], ["a", "b"], resamples=50)
    assert one.note == "not estimable: 1 positive patient, at least 5 needed"
    none = bootstrap_metric(auroc, labels * np.nan, scores, patients, resamples=50)
    assert none == Estimate(None, None, None, 0, 0, 0, "not estimable: no image is assessed")
    assert json.loads(json.dumps(none.as_dict(), allow_nan=False))["value"] is None


def test_undefined_resamples_are_left_out_up_to_one_percent():
    def spoiled(share):
        def metric(labels, scores, weights):
            values = np.asarray(auroc(labels, scores, weights))
            if len(values) > 1:
                values[: round(share * len(values))] = np.nan
            return values

        return metric

    labels, scores, patients = table(findings=1)
    estimate = bootstrap_metric(spoiled(0.01), labels[:, 0], scores[:, 0], patients, resamples=200)
    assert (estimate.note, estimate.resamples) == ("", 198)
    draws = auroc(labels[:, 0], scores[:, 0], patient_weights(patients, 200, 0))
    assert estimate.low == pytest.approx(np.quantile(draws[2:], 0.025))
    estimate = bootstrap_metric(spoiled(0.02), labels[:, 0], scores[:, 0], patients, resamples=200)
    assert estimate.note == "not estimable: undefined in 4 of 200 resamples, at most 1% tolerated"
    assert (estimate.value, estimate.low, estimate.high, estimate.resamples) == (None, None, None, 0)
    never = bootstrap_metric(lambda y, s, w: np.full(len(w), np.nan), labels[:, 0], scores[:, 0], patients, resamples=9)
    assert never.note == "not estimable: undefined on the full sample"
    with pytest.raises(ValueError, match="expected"):
        bootstrap_metric(lambda y, s, w: 0.5, labels[:, 0], scores[:, 0], patients, resamples=9)


def test_five_positive_patients_are_enough_and_four_are_not():
    # The documented reason for the default: four patients are absent from more than 1 % of the resamples, five are not.
    weights = patient_weights(np.arange(400), 20_000, 0)
    assert (weights[:, :5].sum(axis=1) == 0).mean() < 0.01 < (weights[:, :4].sum(axis=1) == 0).mean()


def test_cautions():
    labels, scores, patients = table(images=600, findings=1)
    estimate = bootstrap_metric(auroc, labels[:, 0], scores[:, 0], patients, resamples=50)
    assert estimate.caution == ""
    rare = np.where(patients < 10, 1.0, 0.0)
    estimate = bootstrap_metric(auroc, rare, scores[:, 0], patients, resamples=50)
    assert estimate.caution == "only 10 positive patients: the interval is likely too narrow"
    perfect = bootstrap_metric(auroc, labels[:, 0], labels[:, 0], patients, resamples=50)
    assert (perfect.value, perfect.low, perfect.high) == (1, 1, 1)
    assert perfect.caution == "resamples all agree: the interval cannot show the uncertainty"


# --- intervals against simulated truth -------------------------------------------------------------------------------


def clustered(rng, patients=120, spread=1.0, noise=0.5, gap=1.5):
    """One to nine images of each patient that share the label and a random effect; the true AUROC is known."""
    images = rng.integers(1, 10, patients)
    of = np.repeat(np.arange(patients), images)
    labels = (rng.random(patients) < 0.4)[of].astype(float)
    effect = rng.normal(scale=spread, size=patients)[of]
    return labels, gap * labels + effect + rng.normal(scale=noise, size=of.size), of


def test_intervals_by_patient_cover_the_truth_and_intervals_by_image_do_not():
    # A positive and a negative image are of different patients: their difference is normal with mean gap and variance
    # 2 (spread^2 + noise^2), so AUROC = Phi(gap / sqrt(2 (spread^2 + noise^2))) = Phi(gap / 1.581).
    truth = 0.5 * (1 + erf(1.5 / np.sqrt(2 * 1.25) / np.sqrt(2)))
    rng = np.random.default_rng(11)
    covered, widths = np.zeros(2), np.zeros(2)
    repeats = 300
    for repeat in range(repeats):
        labels, scores, patients = clustered(rng)
        for way, units in enumerate((patients, np.arange(len(patients)))):
            estimate = bootstrap_metric(auroc, labels, scores, units, resamples=150, seed=repeat)
            covered[way] += estimate.low <= truth <= estimate.high
            widths[way] += estimate.high - estimate.low
    by_patient, by_image = covered / repeats
    # 300 repeats have a standard error of 1.3 percentage points at 95 %.
    assert 0.90 <= by_patient <= 0.985
    assert by_image < 0.75
    assert widths[0] > 1.8 * widths[1]


@pytest.mark.slow
@pytest.mark.parametrize("patients", [120, 300])
def test_coverage_in_many_repeats(patients):
    """3,000 repeats: a standard error of 0.4 percentage points at 95 %."""
    truth = 0.5 * (1 + erf(1.5 / np.sqrt(2 * 1.25) / np.sqrt(2)))
    rng = np.random.default_rng(12)
    covered, repeats = np.zeros(2), 3000
    for repeat in range(repeats):
        labels, scores, of = clustered(rng, patients)
        for way, units in enumerate((of, np.arange(len(of)))):
            estimate = bootstrap_metric(auroc, labels, scores, units, resamples=400, seed=repeat)
            covered[way] += estimate.low <= truth <= estimate.high
    by_patient, by_image = covered / repeats
    assert 0.92 <= by_patient <= 0.97
    assert by_image < 0.75


def test_paired_comparison_keeps_its_level_and_sees_what_single_intervals_miss():
    rng = np.random.default_rng(22)
    found = {0.0: 0, 0.25: 0}
    overlap = 0
    repeats = 400
    for repeat in range(repeats):
        labels, scores, patients = clustered(rng)
        noise = rng.normal(scale=0.4, size=(2, len(patients)))
        for better in found if repeat < 100 else (0.0,):
            a, b = scores + noise[0] + better * labels, scores + noise[1]
            result = compare_scores(
                labels[:, None], a[:, None], b[:, None], patients, ["X"], resamples=300, seed=repeat
            )
            row = result.findings[0].measures["auroc"]
            found[better] += row.difference.excludes_zero
            overlap += better > 0 and row.b.high > row.a.low
    # Nominal 5 % under no difference (5.4 % in 3000 repeats); the standard error of 400 is 1.1 percentage points.
    assert 0.02 <= found[0.0] / repeats <= 0.09
    assert found[0.25] > 80
    assert overlap > 80


# --- tables ----------------------------------------------------------------------------------------------------------

NAMES = ["Nodule", "Effusion", "Hernia"]


def test_table_equals_one_finding_at_a_time_with_labels_missing_per_finding():
    labels, scores, patients = table()
    labels[:100, 1] = np.nan
    scores[:100, 1] = np.nan
    result = evaluate_scores(labels, scores, patients, NAMES, resamples=80, seed=2)
    for f, row in enumerate(result.findings):
        known = ~np.isnan(labels[:, f])
        assert row.finding == NAMES[f]
        assert row.counts[:3] == (known.sum(), np.nansum(labels[:, f]), np.unique(patients[known]).size)
        assert row.counts.positive_patients + row.counts.negative_patients == row.counts.patients
        assert row.counts.prevalence == pytest.approx(labels[known, f].mean())
        for measure in (auroc, average_precision):
            estimate = row.measures[measure.__name__]
            alone = bootstrap_metric(measure, labels[:, f], scores[:, f], patients, resamples=80, seed=2)
            assert estimate == alone
            assert estimate.value == pytest.approx(measure(labels[known, f], scores[known, f]))
            assert estimate.low < estimate.value < estimate.high


def test_counts_tell_patients_with_both_labels():
    labels = np.array([1, 0, 1, 1, 0, np.nan])
    result = evaluate_scores(labels[:, None], np.zeros((6, 1)), list("aabbcd"), ["X"], resamples=2)
    assert result.findings[0].counts == Counts(n=5, positives=3, patients=3, positive_patients=2, negative_patients=2)


def test_macro_is_the_mean_over_estimable_findings_with_the_same_resamples():
    labels, scores, patients = table(findings=4)
    labels[:, 3] = 0
    labels[:8, 3] = 1  # two patients
    labels[:40, 0] = np.nan
    names = [*NAMES, "Rare"]
    result = evaluate_scores(labels, scores, patients, names, resamples=120, seed=4)
    assert result.findings[3].measures["auroc"].note == "not estimable: 2 positive patients, at least 5 needed"
    assert result.macro.findings == tuple(NAMES)
    weights = patient_weights(patients, 120, 4)
    for measure in (auroc, average_precision):
        macro = result.macro.measures[measure.__name__]
        draws = np.mean([measure(labels[:, f], scores[:, f], weights) for f in range(3)], axis=0)
        assert macro.value == pytest.approx(np.mean([measure(labels[:, f], scores[:, f]) for f in range(3)]))
        assert (macro.low, macro.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
        assert macro[3:6] == (400, (labels[:, :3] == 1).any(axis=1).sum(), 100)


def test_macro_keeps_the_correlation_between_findings():
    labels, scores, patients = table(findings=1)
    result = evaluate_scores(np.tile(labels, 3), np.tile(scores, 3), patients, NAMES, resamples=100)
    one = result.findings[0].measures["auroc"]
    # Three times the same finding is as uncertain as once; independent resamples would shrink it by sqrt(3).
    assert (result.macro.measures["auroc"].low, result.macro.measures["auroc"].high) == pytest.approx(
        (one.low, one.high)
    )


def test_macro_of_nothing():
    labels, scores, patients = table(images=40)
    result = evaluate_scores(labels * 0, scores, patients, NAMES, resamples=10)
    assert result.macro.findings == ()
    assert result.macro.measures["auroc"].note == "not estimable: none of 3 findings is estimable"
    json.dumps(as_json(result), allow_nan=False)


def test_macro_leaves_out_resamples_in_which_a_finding_is_undefined():
    labels, scores, patients = table(images=800, findings=2)
    for f, first in enumerate((0, 400)):
        labels[:, f] = 0
        labels[first : first + 20, f] = 1  # five patients
    result = evaluate_scores(labels, scores, patients, NAMES[:2], resamples=2000, seed=1)
    weights = patient_weights(patients, 2000, 1)
    missed = [(weights[:, labels[:, f] == 1].sum(axis=1) == 0) for f in range(2)]
    assert 0 < missed[0].sum() <= 20  # else the seed makes this test empty
    assert 0 < missed[1].sum() <= 20
    assert [row.measures["auroc"].resamples for row in result.findings] == [2000 - m.sum() for m in missed]
    assert result.macro.measures["auroc"].resamples == 2000 - (missed[0] | missed[1]).sum()


def test_comparison_with_itself_is_zero():
    labels, scores, patients = table()
    result = compare_scores(labels, scores, 3 * scores - 1, patients, NAMES, resamples=60)
    for row in (*result.findings, result.macro):
        for measure in row.measures.values():
            assert measure.a == measure.b
            assert measure.difference.estimate[:3] == (0, 0, 0)
            assert measure.difference.p_value == 1
            assert not measure.difference.excludes_zero


def test_comparison_is_paired_antisymmetric_and_agrees_with_single_tables():
    labels, a, patients = table(skill=1.5)
    labels[:60, 2] = np.nan
    rng = np.random.default_rng(8)
    b = a - 0.4 * labels * [1, 0, 1] + 0.3 * rng.normal(size=a.shape)
    b[:60, 2] = 0
    a[:60, 2] = np.nan  # not assessed: never looked at
    forth = compare_scores(labels, a, b, patients, NAMES, resamples=150, seed=6)
    back = compare_scores(labels, b, a, patients, NAMES, resamples=150, seed=6)
    table_a, table_b = (evaluate_scores(labels, s, patients, NAMES, resamples=150, seed=6) for s in (a, b))
    weights = patient_weights(patients, 150, 6)
    seen = set()
    for name in ("auroc", "average_precision"):
        measure = {"auroc": auroc, "average_precision": average_precision}[name]
        draws = np.array(
            [measure(labels[:, f], a[:, f], weights) - measure(labels[:, f], b[:, f], weights) for f in range(3)]
        )
        rows = [*range(3), None]
        for f in rows:
            of = (lambda result, f=f: result.macro) if f is None else (lambda result, f=f: result.findings[f])
            one, other = of(forth).measures[name], of(back).measures[name]
            assert one.a == other.b == of(table_a).measures[name]
            assert one.b == other.a == of(table_b).measures[name]
            d, e = one.difference, other.difference
            drawn = draws.mean(axis=0) if f is None else draws[f]
            assert d.estimate.value == pytest.approx(one.a.value - one.b.value)
            assert d.estimate[1:3] == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-12)
            ends = (d.estimate.low, d.estimate.high)
            assert (e.estimate.value, e.estimate.high, e.estimate.low) == pytest.approx(
                (-d.estimate.value, -ends[0], -ends[1]), abs=1e-12
            )
            assert d.p_value == e.p_value == bootstrap_p_value(drawn)
            assert d.excludes_zero == e.excludes_zero == (ends[0] > 0 or ends[1] < 0)
            seen.add(d.excludes_zero)
        p = [row.measures[name].difference.p_value for row in forth.findings]
        assert [row.measures[name].difference.p_holm for row in forth.findings] == pytest.approx(
            holm_by_closed_testing(p)
        )
        assert forth.macro.measures[name].difference.p_holm is None
    assert seen == {True, False}


def test_comparison_of_a_finding_that_is_not_estimable():
    labels, scores, patients = table()
    labels[:, 1] = 0
    result = compare_scores(labels, scores, -scores, patients, NAMES, resamples=30)
    difference = result.findings[1].measures["auroc"].difference
    assert (difference.p_value, difference.p_holm, difference.excludes_zero) == (None, None, False)
    assert difference.estimate.note == "not estimable: 0 positive patients, at least 5 needed"
    assert result.macro.findings == ("Nodule", "Hernia")
    # Holm corrects over the two that are left.
    assert result.findings[0].measures["auroc"].difference.p_holm == pytest.approx(2 * 2 / 31)
    json.dumps(as_json(result), allow_nan=False)


def test_p_value():
    assert bootstrap_p_value(np.full(99, 0.1)) == pytest.approx(2 / 100)
    assert bootstrap_p_value(np.r_[np.full(95, 0.1), np.full(4, -0.1)]) == pytest.approx(2 * 5 / 100)
    assert bootstrap_p_value([-1.0, 1.0, np.nan]) == 1
    assert bootstrap_p_value([1e-17, -1e-17, 0.0]) == 1
    with pytest.raises(DataError, match="at least one"):
        bootstrap_p_value([np.nan])


@given(st.lists(st.integers(0, 20).map(lambda k: k / 20), max_size=6))
def test_holm_is_closed_testing_with_bonferroni(p_values):
    assert holm(p_values) == pytest.approx(holm_by_closed_testing(p_values))
    spaced = [x for p in p_values for x in (None, p)]
    assert [x for x in holm(spaced) if x is not None] == holm(p_values)
    assert all(x is None for x in holm(spaced)[::2])


def test_json_shape():
    labels, scores, patients = table()
    labels[:, 2] = np.nan
    counts = {"n", "positives", "patients", "positive_patients", "negative_patients", "prevalence"}
    interval = {"value", "low", "high", "note", "resamples", "caution", "standard_error", "seeds", "seed_deviation",
                "seed_freedom"}  # fmt: skip
    measures = {"auroc", "average_precision", "sensitivity_at_specificity"}
    made = as_json(evaluate_scores(labels, scores, patients, NAMES, resamples=20, seed=3, level=0.9))
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made.keys() == {"findings", "macro", "intervals"}
    assert list(made["findings"]) == NAMES
    assert made["findings"]["Nodule"].keys() == counts | measures
    assert made["findings"]["Nodule"]["auroc"].keys() == interval
    assert made["findings"]["Hernia"]["prevalence"] is None
    assert made["macro"].keys() == {"findings", "n", "positives", "patients"} | measures
    assert made["macro"]["findings"] == ["Nodule", "Effusion"]
    assert made["intervals"] == {
        "method": "patient bootstrap, percentile",
        "resamples": 20,
        "seed": 3,
        "level": 0.9,
        "min_positive_patients": 5,
        "min_negative_patients": 5,
    }
    made = as_json(compare_scores(labels, scores, -scores, patients, NAMES, resamples=20))
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["findings"]["Nodule"]["auroc"].keys() == {"a", "b", "difference"}
    assert made["findings"]["Nodule"]["auroc"]["a"].keys() == interval
    assert made["macro"]["auroc"]["difference"].keys() == interval | {
        "p_value",
        "p_holm",
        "excludes_zero",
        "detectable",
    }
    assert made["macro"]["auroc"]["difference"]["excludes_zero"] is True


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"findings": ["A", "A", "B"]}, "'A' more than once"),
        ({"findings": ["A", "B"]}, r"labels have shape \(400, 3\); 2 findings need \(N, 2\)"),
        ({"findings": "ABC"}, "must be a sequence"),
        ({"findings": []}, "at least one name"),
        ({"labels": np.zeros((0, 3))}, "at least 1"),
        ({"labels": np.zeros(400)}, r"labels have shape \(400,\)"),
        ({"labels": np.full((400, 3), 2.0)}, "labels of 'Nodule' must be 0"),
        ({"labels": [[0, 1, 0], [0]]}, "labels must be a table"),
        ({"scores": np.zeros((399, 3))}, r"scores have shape \(399, 3\), but labels have shape \(400, 3\)"),
        ({"scores": np.full((400, 3), np.inf)}, r"400 of 400 assessed rows .* \(rows 0, 1, 2, 3, 4, \.\.\.\)"),
        ({"patients": np.arange(399)}, "399 patients for 400 images"),
        ({"patients": np.zeros((400, 1))}, r"patients have shape \(400, 1\)"),
        ({"patients": ["a"] * 398 + [None, "b"]}, "missing in 1 of 400 rows, the first is row 398"),
        ({"patients": ["a"] * 398 + [float("nan"), "b"]}, "missing in 1 of 400 rows"),
        ({"patients": np.r_[np.nan, np.arange(399)]}, "missing in 1 of 400 rows"),
        ({"patients": np.array([""] * 2 + ["a"] * 398)}, "missing in 2 of 400 rows"),
        ({"patients": ["a"] * 399 + [1]}, "all strings or all whole numbers"),
    ],
)
def test_bad_tables_are_refused(change, says):
    labels, scores, patients = table()
    given = {"labels": labels, "scores": scores, "patients": patients, "findings": NAMES} | change
    with pytest.raises(DataError, match=says):
        evaluate_scores(**given, resamples=2)


def test_a_comparison_says_which_scores_are_bad():
    labels, scores, patients = table()
    bad = scores.copy()
    bad[3, 1] = np.nan
    with pytest.raises(DataError, match=r"'Effusion \(scores_b\)' must be finite, but 1 of 400 .* \(rows 3\)"):
        compare_scores(labels, scores, bad, patients, NAMES, resamples=2)
    with pytest.raises(DataError, match="scores_b have shape"):
        compare_scores(labels, scores, scores[:-1], patients, NAMES, resamples=2)


@pytest.mark.parametrize(
    "change",
    [{"resamples": 0}, {"seed": -1}, {"level": 1.0}, {"level": 0.0}, {"min_positive_patients": 0}, {"level": np.nan}],
)
def test_bad_settings_are_refused(change):
    labels, scores, patients = table(findings=1)
    with pytest.raises(ConfigError, match=next(iter(change))):
        BootstrapSettings(**change)
    with pytest.raises(ConfigError, match=next(iter(change))):
        bootstrap_metric(auroc, labels[:, 0], scores[:, 0], patients, **change)


def test_defaults_are_the_settings():
    labels, scores, patients = table(images=60, findings=1)
    assert evaluate_scores(labels, scores, patients, ["X"]).settings == BootstrapSettings()
    assert compare_scores(labels, scores, scores, patients, ["X"]).settings == BootstrapSettings(2000, 0, 0.95, 5, 5)


@pytest.mark.parametrize("module", [metrics, decisions, resampling, statistics])
def test_modules_need_numpy_only(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    others = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert others <= {
            "numpy", "numpy.typing", "scipy.special", "otcxr.errors", "otcxr.evaluation",
            *(f"otcxr.evaluation.{name}" for name in ("metrics", "estimates", "resampling")),
        }  # fmt: skip


def test_degenerate_tables_give_no_warning():  # warnings are errors in this project's tests
    labels, scores, patients = table()
    empty = evaluate_scores(labels * np.nan, scores * np.nan, patients, NAMES, resamples=5)
    assert [row.measures["auroc"].note for row in empty.findings] == ["not estimable: no image is assessed"] * 3
    constant = evaluate_scores(labels, scores * 0, patients, NAMES, resamples=5)
    assert [row.measures["auroc"][:3] for row in constant.findings] == [(0.5, 0.5, 0.5)] * 3
