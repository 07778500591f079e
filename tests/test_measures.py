"""Decisions, calibration and seeds: against slow formulas, scikit-learn, scipy, and simulations with a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, confusion_matrix, f1_score, roc_curve

from oracles import confusion_by_loop, logistic_by_search, sensitivity_at_by_thresholds
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation import calibration, decisions
from otcxr.evaluation.calibration import (
    Recalibration,
    brier,
    calibration_error,
    calibration_error_by_chance,
    calibration_intercept,
    calibration_slope,
    logit,
    recalibrate,
    reliability,
    sigmoid,
)
from otcxr.evaluation.decisions import RULES, choose_threshold
from otcxr.evaluation.metrics import auroc, sensitivity_at_specificity
from otcxr.evaluation.statistics import (
    BootstrapSettings,
    Column,
    calibration_columns,
    compare_drawn,
    compare_scores,
    decision_columns,
    draw,
    evaluate_scores,
    patient_weights,
    ranking_columns,
    smallest_difference,
    tabulate,
)

SHARES = {
    "sensitivity": lambda tp, fp, fn, tn: (tp, tp + fn),
    "specificity": lambda tp, fp, fn, tn: (tn, tn + fp),
    "positive_predictive_value": lambda tp, fp, fn, tn: (tp, tp + fp),
    "negative_predictive_value": lambda tp, fp, fn, tn: (tn, tn + fn),
    "f1": lambda tp, fp, fn, tn: (2 * tp, 2 * tp + fp + fn),
    "flagged": lambda tp, fp, fn, tn: (tp + fp, tp + fp + fn + tn),
}


@st.composite
def judged(draw, levels=(1, 3, 1000), least=1):
    """Labels, probabilities from distinct over tied to constant, integer weights with zeros."""
    n = draw(st.integers(least, 25))
    level = draw(st.sampled_from(levels))
    labels = draw(st.lists(st.sampled_from((0.0, 1.0)), min_size=n, max_size=n))
    scores = draw(st.lists(st.integers(0, level).map(lambda k: k / level), min_size=n, max_size=n))
    weights = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    return np.array(labels), np.array(scores), np.array(weights)


def divided(pair):
    return pair[0] / pair[1] if pair[1] else math.nan


def simulated(seed, images=300, slope=1.0, intercept=0.0):
    """Probabilities and labels whose calibration is known: logit P(y = 1) = intercept + slope logit p."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-0.5, 1.5, images)
    return (rng.random(images) < sigmoid(intercept + slope * z)).astype(float), sigmoid(z)


# --- ranking at a specificity ----------------------------------------------------------------------------------------


@given(data=judged(), least=st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.95, 1.0]))
@settings(deadline=None, max_examples=200)
def test_sensitivity_at_a_specificity_equals_a_search_over_thresholds(data, least):
    labels, scores, weights = data
    for w in (None, weights):
        expected = sensitivity_at_by_thresholds(labels, scores, least, w)
        assert sensitivity_at_specificity(labels, scores, w, specificity=least) == pytest.approx(expected, nan_ok=True)


def test_sensitivity_at_a_specificity_is_a_point_of_scikit_learns_curve():
    rng = np.random.default_rng(0)
    labels = (rng.random(3000) < 0.2).astype(float)
    scores = np.round(rng.normal(size=3000) + labels, 1)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    for least in (0.5, 0.8, 0.9, 0.95, 0.99):
        assert sensitivity_at_specificity(labels, scores, specificity=least) == tpr[fpr <= 1 - least + 1e-12].max()
    with pytest.raises(ConfigError, match="must lie in"):
        sensitivity_at_specificity(labels, scores, specificity=1.1)


# --- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARES)
@given(data=judged(), threshold=st.sampled_from([-1.0, 0.0, 1 / 3, 0.5, 1.0, 2.0]))
@settings(deadline=None, max_examples=80)
def test_decisions_equal_counting(name, data, threshold):
    labels, scores, weights = data
    measure = getattr(decisions, name)
    for w in (None, weights):
        expected = divided(SHARES[name](*confusion_by_loop(labels, scores, threshold, w)))
        assert measure(labels, scores, w, threshold=threshold) == pytest.approx(expected, nan_ok=True)
    many = measure(labels, scores, np.stack([weights, weights * 0, weights + 1]), threshold=threshold)
    single = [measure(labels, scores, w, threshold=threshold) for w in (weights, weights * 0, weights + 1)]
    np.testing.assert_array_equal(many, single)


def test_decisions_equal_scikit_learn():
    labels, p = simulated(1, 2000)
    tn, fp, fn, tp = confusion_matrix(labels, p >= 0.4).ravel()
    assert decisions.f1(labels, p, threshold=0.4) == pytest.approx(f1_score(labels, p >= 0.4))
    assert decisions.sensitivity(labels, p, threshold=0.4) == tp / (tp + fn)
    assert decisions.specificity(labels, p, threshold=0.4) == tn / (tn + fp)
    hidden = np.r_[p, 0.9], np.r_[labels, np.nan]
    assert decisions.f1(hidden[1], hidden[0], threshold=0.4) == decisions.f1(labels, p, threshold=0.4)


@given(data=judged(least=2))
@settings(deadline=None, max_examples=150)
def test_thresholds_do_what_their_rule_says(data):
    labels, scores, _ = data
    assume(0 < labels.sum() < len(labels))
    candidates = [*np.unique(scores), scores.max() + 1]
    best = max(decisions.f1(labels, scores, threshold=c) for c in candidates)
    chosen = choose_threshold(labels, scores, "largest F1", least=1).threshold
    assert decisions.f1(labels, scores, threshold=chosen) == pytest.approx(best)
    assert chosen == max(c for c in candidates if decisions.f1(labels, scores, threshold=c) > best - 1e-12)
    for rule, least in (("specificity 0.90", 0.9), ("specificity 0.95", 0.95)):
        chosen = choose_threshold(labels, scores, rule, least=1).threshold
        assert decisions.specificity(labels, scores, threshold=chosen) >= least - 1e-12
        expected = sensitivity_at_specificity(labels, scores, specificity=least)
        assert decisions.sensitivity(labels, scores, threshold=chosen) == pytest.approx(expected)


def test_too_few_validation_images_give_no_threshold():
    point = choose_threshold([1, 1, 0, 0, 0, 0, 0, np.nan], np.arange(8), "largest F1")
    assert point == (
        None,
        "largest F1",
        2,
        5,
        "no threshold: 2 positive and 5 negative validation images, 5 of each needed",
    )
    with pytest.raises(ConfigError, match="unknown rule 'best'"):
        choose_threshold([1, 0], [0, 1], "best")
    assert set(RULES) == {"largest F1", "specificity 0.90", "specificity 0.95"}


# --- calibration -----------------------------------------------------------------------------------------------------


@given(data=judged())
@settings(deadline=None, max_examples=100)
def test_brier_equals_scikit_learn(data):
    labels, p, weights = data
    assert brier(labels, p) == pytest.approx(np.mean((labels - p) ** 2))
    if weights.any():
        assert brier(labels, p, weights) == pytest.approx(
            brier_score_loss(labels, p, sample_weight=weights, pos_label=1)
        )
    else:
        assert math.isnan(brier(labels, p, weights))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("images", [60, 2000])
def test_slope_and_intercept_equal_an_unpenalised_regression(seed, images):
    labels, p = simulated(seed, images, slope=0.7, intercept=0.4)
    rng = np.random.default_rng(seed)
    for weights in (np.ones(images), rng.poisson(1, images)):
        kept = weights > 0
        peer = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(
            logit(p)[kept, None], labels[kept], sample_weight=weights[kept]
        )
        assert calibration_slope(labels, p, weights) == pytest.approx(peer.coef_[0, 0], abs=1e-5)
        intercept, _ = logistic_by_search(logit(p), labels, weights, sloped=False)
        assert calibration_intercept(labels, p, weights) == pytest.approx(intercept, abs=1e-6)


@given(data=judged(levels=(4, 50)), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_slope_equals_a_search_or_is_undefined(data, seed):
    labels, p, weights = data
    slope = calibration_slope(labels, p, weights)
    x, kept = logit(p), weights > 0
    both = len(set(labels[kept])) == 2
    low, high = (x[kept & (labels == y)] for y in (0, 1))
    parted = not both or low.max() <= high.min() or high.max() <= low.min()
    if parted or np.ptp(x[kept]) == 0:
        assert math.isnan(slope)
    elif not math.isnan(slope):
        assert slope == pytest.approx(logistic_by_search(x, labels, weights, sloped=True)[1], abs=2e-3, rel=1e-3)
    else:
        assert abs(logistic_by_search(x, labels, weights, sloped=True)[1]) > 20  # a slope without a use


def test_many_resamples_near_the_full_sample_are_solved_as_exactly_as_one(monkeypatch):
    """The series and Newton's method agree; small samples, where the series is not good, take Newton's."""
    for images, near in ((20_000, True), (40, False)):
        labels, p = simulated(3, images, slope=0.8)
        weights = patient_weights(np.arange(images), 60, 0)
        for measure in (calibration_slope, calibration_intercept):
            fast = measure(labels, p, weights)
            with monkeypatch.context() as patch:
                patch.setattr(calibration._Near, "exact", lambda self, found: np.zeros(len(found), dtype=bool))
                slow = measure(labels, p, weights)
            np.testing.assert_allclose(fast, slow, atol=2e-6, equal_nan=True)
        fit = calibration._newton(logit(p), labels, np.ones((1, images)), sloped=True)[0]
        series = calibration._Near(logit(p), labels, fit, sloped=True)
        assert series.exact(series.solve(weights.astype(float))).mean() == pytest.approx(float(near), abs=0.2)


def test_perfect_probabilities_have_slope_one_and_intercept_zero():
    labels, p = simulated(5, 200_000)
    assert calibration_slope(labels, p) == pytest.approx(1, abs=0.02)
    assert calibration_intercept(labels, p) == pytest.approx(0, abs=0.02)
    assert calibration_error(labels, p) == pytest.approx(calibration_error_by_chance(labels, p), rel=0.5)
    bold = sigmoid(2 * logit(p))
    assert calibration_slope(labels, bold) == pytest.approx(0.5, abs=0.02)
    assert calibration_error(labels, bold) > 5 * calibration_error_by_chance(labels, bold)


def test_calibration_error_by_chance_is_what_simulation_gives():
    rng = np.random.default_rng(0)
    p = sigmoid(rng.normal(-1, 1, 1500))
    found = [calibration_error((rng.random(1500) < p).astype(float), p) for _ in range(400)]
    assert calibration_error_by_chance(np.zeros(1500), p) == pytest.approx(np.mean(found), rel=0.03)


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error_equals_scikit_learns_quantile_bins(bins):
    labels, p = simulated(7, 3000, slope=0.6)
    observed, said = calibration_curve(labels, p, n_bins=bins, strategy="quantile")
    assert calibration_error(labels, p, bins=bins) == pytest.approx(np.mean(np.abs(observed - said)), abs=2e-3)
    parts = reliability(labels, p, bins=bins)
    assert len(parts) == bins
    assert max(part.images for part in parts) - min(part.images for part in parts) <= 1
    total = sum(part.images * abs(part.observed - part.probability) for part in parts) / 3000
    assert calibration_error(labels, p, bins=bins) == pytest.approx(total)


@given(data=judged(levels=(1, 2, 3)), bins=st.integers(1, 6))
@settings(deadline=None, max_examples=100)
def test_equal_probabilities_share_a_bin_and_none_is_empty(data, bins):
    labels, p, weights = data
    member = calibration._bins(p, bins)
    assert len({(value, k) for value, k in zip(p, member, strict=True)}) == len(set(p))
    assert set(member) == set(range(member.max() + 1))
    assert (np.diff(member[np.argsort(p, kind="stable")]) >= 0).all()
    expected = sum(
        abs((weights * (labels - p))[member == k].sum()) for k in range(member.max() + 1)
    ) / weights.sum() if weights.any() else math.nan  # fmt: skip
    assert calibration_error(labels, p, weights, bins=bins) == pytest.approx(expected, nan_ok=True)


def test_probabilities_are_checked():
    for measure in (brier, calibration_slope, calibration_intercept, calibration_error, calibration_error_by_chance):
        with pytest.raises(DataError, match=r"must lie in \[0, 1\], but 1 of 3 do not, the first is 1.5 \(row 1\)"):
            measure([0, 1, 1], [0.2, 1.5, 0.3])
    with pytest.raises(ConfigError, match="bins is 0"):
        calibration_error([0, 1], [0.2, 0.5], bins=0)
    assert math.isnan(calibration_error_by_chance([np.nan], [0.5]))
    assert reliability([np.nan], [0.5]) == []


def test_extreme_numbers_do_not_overflow():
    assert sigmoid([-1e4, 0, 1e4]).tolist() == [0.0, 0.5, 1.0]
    assert np.isfinite(logit([0.0, 1.0])).all()
    np.testing.assert_allclose(logit(sigmoid([-3.0, 0.1, 5.0])), [-3.0, 0.1, 5.0])


# --- recalibration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["temperature", "platt", "isotonic"])
def test_recalibration_mends_what_is_wrong(kind):
    labels, p = simulated(11, 4000)
    wrong = 3 * logit(p) if kind == "temperature" else 3 * logit(p) - 2
    fitted = recalibrate(labels, wrong, kind)
    new_labels, new_p = simulated(12, 4000)
    shown = 3 * logit(new_p) if kind == "temperature" else 3 * logit(new_p) - 2
    mended = fitted(shown)
    assert calibration_slope(new_labels, mended) == pytest.approx(1, abs=0.15)
    assert calibration_intercept(new_labels, mended) == pytest.approx(0, abs=0.15)
    assert brier(new_labels, mended) < brier(new_labels, sigmoid(shown)) - 0.01
    if kind != "isotonic":  # it may make ties
        assert auroc(new_labels, mended) == pytest.approx(auroc(new_labels, new_p), abs=1e-12)
    again = Recalibration.from_dict(fitted.as_dict())
    assert again == fitted
    np.testing.assert_array_equal(again(shown), mended)


def test_recalibrations_equal_their_peers():
    labels, p = simulated(13, 500, slope=0.5, intercept=-0.3)
    z = logit(p)
    positives = labels.sum()
    target = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2))
    a, b = logistic_by_search(z, target, np.ones(len(z)), sloped=True)
    assert recalibrate(labels, z, "platt").parameters == pytest.approx((a, b), abs=1e-5)
    grid = np.exp(np.linspace(-2, 3, 200_01))
    misfit = [float((np.logaddexp(0, z / t) - labels * z / t).sum()) for t in grid[::200]]
    near = grid[::200][int(np.argmin(misfit))]
    assert recalibrate(labels, z, "temperature").parameters[0] == pytest.approx(near, rel=0.06)
    peer = IsotonicRegression(out_of_bounds="clip").fit(z, labels)
    shown = np.linspace(-9, 9, 400)
    np.testing.assert_allclose(recalibrate(labels, z, "isotonic")(shown), peer.predict(shown), atol=1e-12)


def test_parted_classes_have_a_finite_platt_and_few_images_none():
    z = np.arange(20.0)
    labels = (z >= 10).astype(float)
    fitted = recalibrate(labels, z, "platt")
    assert np.isfinite(fitted.parameters).all()
    assert 0 < fitted(z).min() < fitted(z).max() < 1
    few = recalibrate(labels[8:12], z[8:12], "platt")
    assert few == ("none", (), 4, "2 positive and 2 negative validation images, 5 of each needed")
    np.testing.assert_array_equal(few(z), sigmoid(z))
    assert recalibrate(labels, z * 0, "platt").note == "all validation scores are equal"
    assert recalibrate(labels, z, "none").kind == "none"
    with pytest.raises(ConfigError, match="unknown recalibration 'beta'"):
        recalibrate(labels, z, "beta")
    with pytest.raises(ConfigError, match="unknown recalibration 'beta'"):
        Recalibration.from_dict({"kind": "beta", "parameters": [], "images": 0, "note": ""})


# --- in tables -------------------------------------------------------------------------------------------------------

NAMES = ("A", "B")


def table(seed=0, seeds=1, patients=150, each=3, skill=1.2, drift=0.0):
    """Labels (N, F), scores (K, N, F) that share the patients' part, and patients (N,)."""
    rng = np.random.default_rng(seed)
    of = np.arange(patients * each) // each
    labels = (rng.random((patients, 2)) < 0.35)[of].astype(float)
    common = skill * labels + rng.normal(size=(patients, 2))[of] + 0.5 * rng.normal(size=labels.shape)
    own = drift * rng.normal(size=(seeds, 1, 1)) * labels + 0.3 * rng.normal(size=(seeds, *labels.shape))
    return labels, common + own, of


def test_a_table_of_all_measures_equals_each_measure():
    labels, scores, patients = table()
    p = sigmoid(scores[0] - 1)
    thresholds = np.array([0.4, 0.6])
    columns = ranking_columns(p) | decision_columns(p, thresholds, ("", "no threshold")) | calibration_columns(p)
    made = tabulate(draw(labels, columns, patients, NAMES, BootstrapSettings(80, 3)))
    weights = patient_weights(patients, 80, 3)
    for f, row in enumerate(made.findings):
        for name, estimate in row.measures.items():
            of_threshold = hasattr(decisions, name) and name in SHARES
            if of_threshold and f == 1:
                assert (estimate.value, estimate.note) == (None, "no threshold")
                continue
            module = decisions if of_threshold else calibration if hasattr(calibration, name) else None
            measure = getattr(module, name) if module else {"auroc": auroc}.get(name)
            if measure is None:
                continue
            more = {"threshold": thresholds[f]} if of_threshold else {}
            draws = measure(labels[:, f], p[:, f], weights, **more)
            assert estimate.value == pytest.approx(measure(labels[:, f], p[:, f], **more))
            ends = np.quantile(draws, [0.025, 0.975])
            if name == "calibration_error":  # noise enlarges it in resamples: what they lean is taken back
                ends = np.maximum(2 * estimate.value - ends[::-1], 0)
            assert (estimate.low, estimate.high) == pytest.approx(tuple(ends))
            assert estimate.standard_error == pytest.approx(draws.std(ddof=1))
    assert made.macro.findings == NAMES  # decided by the ranking alone
    assert made.macro.measures["f1"].note == "not estimable for B: a mean over the others would be another"
    assert "calibration_slope" not in made.macro.measures
    assert made.macro.measures["brier"].value == pytest.approx(
        np.mean([r.measures["brier"].value for r in made.findings])
    )


def test_two_seeds_alone_tell_no_difference_that_could_be_seen():
    """Student's interval with one degree of freedom is no normal one; with three it is near enough to say."""
    for seeds, told in ((2, False), (4, True), (1, True)):
        labels, scores, patients = table(seeds=seeds, drift=0.4)
        gap = compare_scores(labels, scores, np.roll(scores, 1, axis=-2), patients, NAMES, resamples=200)
        difference = gap.findings[0].measures["auroc"].difference
        assert difference.estimate.seed_freedom == (seeds - 1 or None)
        assert (difference.detectable is not None) == told


def test_several_seeds_are_their_mean_and_widen_the_interval():
    labels, scores, patients = table(seeds=4, drift=0.4)
    made = evaluate_scores(labels, scores, patients, NAMES, resamples=200)
    alone = [evaluate_scores(labels, one, patients, NAMES, resamples=200) for one in scores]
    for f in range(2):
        estimate = made.findings[f].measures["auroc"]
        values = [one.findings[f].measures["auroc"].value for one in alone]
        assert estimate.value == pytest.approx(np.mean(values))
        assert estimate.seeds == 4
        assert estimate.seed_deviation == pytest.approx(np.std(values, ddof=1))
        assert estimate.seed_freedom == 3
        assert alone[0].findings[f].measures["auroc"].seed_freedom is None
        draws = np.mean([auroc(labels[:, f], one[:, f], patient_weights(patients, 200, 0)) for one in scores], axis=0)
        narrow = np.quantile(draws, [0.025, 0.975])
        assert estimate.low < narrow[0]
        assert estimate.high > narrow[1]
        expected = math.sqrt(draws.var(ddof=1) + np.var(values, ddof=1) / 4)
        assert estimate.standard_error == pytest.approx(expected)
    equal = evaluate_scores(labels, np.stack([scores[0]] * 3), patients, NAMES, resamples=200)
    one = alone[0].findings[0].measures["auroc"]
    assert equal.findings[0].measures["auroc"][:3] == pytest.approx(one[:3])


def test_intervals_over_patients_and_seeds_cover_the_truth_and_those_over_patients_alone_do_not():
    """Trainings differ in how well they rank: the truth is the mean over all trainings and all patients.

    Scores of an image: skill_k y + patient + image, so one training's AUROC is Phi(skill_k / sqrt(2 V)) by the same
    reasoning as in test_statistics; its mean over skill_k ~ N(m, s) is Phi(m / sqrt(2 V + s^2)).
    """
    rng = np.random.default_rng(3)
    mean, spread, seeds, repeats = 1.5, 0.35, 4, 400
    truth = 0.5 * (1 + math.erf(mean / math.sqrt(2 * 1.25 + spread**2) / math.sqrt(2)))
    covered = np.zeros(2)
    for repeat in range(repeats):
        of = np.repeat(np.arange(120), rng.integers(1, 6, 120))
        labels = (rng.random(120) < 0.4)[of].astype(float)
        base = rng.normal(size=120)[of] + rng.normal(scale=0.5, size=of.size)
        scores = base + rng.normal(mean, spread, (seeds, 1)) * labels
        made = evaluate_scores(labels[:, None], scores[..., None], of, ["X"], resamples=150, seed=repeat)
        both = made.findings[0].measures["auroc"]
        draws = np.mean([auroc(labels, one, patient_weights(of, 150, repeat)) for one in scores], axis=0)
        covered += both.low <= truth <= both.high, np.quantile(draws, 0.025) <= truth <= np.quantile(draws, 0.975)
    with_seeds, without = covered / repeats
    # 400 repeats have a standard error of 1.1 percentage points at 95 %.
    assert 0.92 <= with_seeds <= 0.985
    assert without < 0.91


def test_the_comparison_over_seeds_keeps_its_level():
    """Two methods that are equally good on the mean over trainings, their seeds paired."""
    rng = np.random.default_rng(5)
    small, wrong, repeats = 0, 0, 400
    for repeat in range(repeats):
        of = np.repeat(np.arange(100), rng.integers(1, 5, 100))
        labels = (rng.random(100) < 0.4)[of].astype(float)
        base = rng.normal(size=100)[of] + rng.normal(scale=0.5, size=of.size)
        a, b = (base + rng.normal(1.5, 0.3, (3, 1)) * labels for _ in range(2))
        row = compare_scores(labels[:, None], a[..., None], b[..., None], of, ["X"], resamples=150, seed=repeat)
        difference = row.findings[0].measures["auroc"].difference
        wrong += difference.excludes_zero
        small += difference.p_value < 0.05
    assert 0.02 <= wrong / repeats <= 0.085
    assert 0.02 <= small / repeats <= 0.085


def test_seeds_are_paired():
    labels, scores, patients = table(seeds=3, drift=0.5)
    made = compare_scores(labels, scores + 0.02 * labels, scores, patients, NAMES, resamples=150)
    loose = compare_scores(labels, scores[::-1] + 0.02 * labels, scores, patients, NAMES, resamples=150)
    paired, crossed = (x.findings[0].measures["auroc"].difference for x in (made, loose))
    assert paired.estimate.value == pytest.approx(crossed.estimate.value)
    assert paired.estimate.standard_error < 0.2 * crossed.estimate.standard_error
    assert paired.excludes_zero
    with pytest.raises(DataError, match="3 and 2 seeds are compared"):
        compare_scores(labels, scores, scores[:2], patients, NAMES, resamples=10)


def test_the_interval_of_the_calibration_error_holds_its_value():
    """Of probabilities that are right: the error is noise alone, and resamples add more."""
    rng = np.random.default_rng(8)
    for repeat in range(20):
        p = rng.beta(1, 4, 600)
        labels = (rng.random(600) < p).astype(float)
        made = tabulate(draw(labels[:, None], calibration_columns(p[:, None]), np.arange(600), ["X"],
                             BootstrapSettings(200, repeat)))  # fmt: skip
        estimate = made.findings[0].measures["calibration_error"]
        assert 0 <= estimate.low <= estimate.value <= estimate.high
        by_chance = calibration.calibration_error_by_chance(labels, p)
        assert estimate.low < by_chance * 1.5


def test_what_is_drawn_on_other_images_is_not_compared():
    labels, scores, patients = table()
    how = BootstrapSettings(20)
    one = draw(labels, ranking_columns(scores), patients, NAMES, how)
    for other in (
        draw(1 - labels, ranking_columns(scores), patients, NAMES, how),
        draw(labels, ranking_columns(scores), np.arange(len(labels)), NAMES, how),
        draw(labels, ranking_columns(scores), patients, ("A", "C"), how),
        draw(labels, ranking_columns(scores), patients, NAMES, BootstrapSettings(20, 1)),
    ):
        with pytest.raises(DataError, match="drawn on other images"):
            compare_drawn(one, other)


def test_the_smallest_difference_is_seen_four_times_in_five():
    assert smallest_difference(1.95996, 0.95) == pytest.approx(2.8016, abs=1e-4)
    rng = np.random.default_rng(9)
    assert smallest_difference(1.95996, 0.95, tests=14) == pytest.approx(2.9137 + 0.8416, abs=2e-3)  # z of 0.05 / 28
    assert smallest_difference(0.0, 0.95) is None
    gap = smallest_difference(1.95996, 0.95)  # of an estimate with a standard error of 1
    assert np.mean(np.abs(rng.normal(gap, 1, 20_000)) > 1.95996) == pytest.approx(0.8, abs=0.01)
    labels, scores, patients = table()
    made = compare_scores(labels, scores, scores * 0.9 + 0.1 * labels, patients, NAMES, resamples=100)
    difference = made.findings[0].measures["auroc"].difference
    half = (difference.estimate.high - difference.estimate.low) / 2
    assert difference.detectable == pytest.approx(1.4294 * half, rel=1e-4)


def test_intervals_stay_within_what_a_measure_can_be():
    labels = np.repeat([1.0, 0.0], 60)[:, None]
    scores = np.stack([labels * k + np.linspace(0, 1, 120)[:, None] for k in (0.9, 3.0)])  # one seed nearly perfect
    estimate = evaluate_scores(labels, scores, np.arange(120), ["A"], resamples=100).findings[0].measures["auroc"]
    assert estimate.high <= 1.0
    assert estimate.low >= 0.0
    columns = {"slope": Column(scores[0], lambda y, s, w: np.full(len(w), 7.0), bounds=(-math.inf, math.inf))}
    wide = tabulate(draw(labels, columns, np.arange(120), ["A"], BootstrapSettings(10)))
    assert wide.findings[0].measures["slope"].value == 7.0
