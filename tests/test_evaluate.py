"""The linear probe: it finds planted signal, ignores what it must, and its numbers are those of the statistics."""

import csv
import json

import numpy as np
import pytest
import torch

from otcxr.console import SilentProgress
from otcxr.data import open_collection
from otcxr.data.dataset import PixelCache
from otcxr.data.records import Collection
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation import evaluate
from otcxr.evaluation.classify import fit_probe
from otcxr.evaluation.features import calibrate_norms, pooled_features
from otcxr.evaluation.results import rows_of
from otcxr.evaluation.statistics import evaluate_scores
from otcxr.evaluation.tasks import EvaluateConfig, random_twin
from otcxr.nn.encoder import build_encoder, encoder_digest


def planted(seed, images=400, patients=150, signal=1.5, dims=12):
    """Features whose first dimension carries a finding; every patient has an offset shared by its images."""
    generator = np.random.default_rng(seed)
    patient = generator.integers(0, patients, images)
    label = generator.integers(0, 2, images).astype(float)
    features = generator.standard_normal((images, dims)) + generator.standard_normal((patients, dims))[patient]
    features[:, 0] += signal * label
    return features.astype(np.float32), label[:, None], [f"P{p}" for p in patient]


def probe(features, labels, patients, findings=("A",), **changes):
    settings = {"strengths": (0.01, 0.1, 1.0), "folds": 3, "seed": 0} | changes
    return fit_probe(features, labels, patients, findings, **settings)


def test_probe_finds_a_planted_signal_in_new_images():
    fitted = probe(*planted(0))
    features, labels, patients = planted(1)
    table = evaluate_scores(labels, fitted.score(features), patients, ("A",), resamples=200)
    assert table.findings[0].measures["auroc"].low > 0.65
    assert abs(fitted.weights[0, 0]) > 3 * np.abs(fitted.weights[0, 1:]).max()


def test_probe_equals_scikit_learn_on_raw_features():
    from sklearn.linear_model import LogisticRegression

    features, labels, patients = planted(2)
    fitted = probe(features * 7 + 3, labels, patients, strengths=(0.1,))
    mean, std = features.mean(0), features.std(0)
    oracle = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit((features - mean) / std, labels[:, 0])
    expected = oracle.decision_function((features - mean) / std)
    assert np.abs(fitted.score(features * 7 + 3)[:, 0] - expected).max() < 5e-3


def test_probe_leaves_unassessed_images_and_rare_findings_out():
    features, labels, patients = planted(3)
    wild = np.vstack((features, 100 + features[:50]))
    unknown = np.vstack((labels, np.full((50, 1), np.nan)))
    rare = np.zeros((len(wild), 1))
    rare[0] = 1
    fitted = probe(wild, np.hstack((unknown, rare)), [*patients, *patients[:50]], ("A", "Rare"))
    assert fitted.strength[0] > 0
    assert fitted.strength[1] == 0
    assert (fitted.weights[1] == 0).all()


def test_constant_features_do_not_divide_by_zero():
    features, labels, patients = planted(4)
    features[:, 3] = 5.0
    assert np.isfinite(probe(features, labels, patients).weights).all()


def test_folds_never_part_a_patient(monkeypatch):
    """With random labels per patient, folds that part patients would favour the weakest penalty."""
    from sklearn.model_selection import StratifiedGroupKFold

    parted, made = StratifiedGroupKFold.split, []

    def watched(self, x, y, groups):
        for fit, held in parted(self, x, y, groups):
            made.append((fit, held))
            yield fit, held

    monkeypatch.setattr(StratifiedGroupKFold, "split", watched)
    generator = np.random.default_rng(5)
    patient = np.repeat(np.arange(40), 10)
    label = generator.integers(0, 2, 40)[patient].astype(float)[:, None]
    features = generator.standard_normal((40, 30))[patient] + 0.01 * generator.standard_normal((400, 30))
    fitted = fit_probe(
        features.astype(np.float32), label, [str(p) for p in patient], ("A",), strengths=(1e-4, 100.0), folds=4, seed=0
    )
    # Judged on unseen patients no penalty is better than chance; parted patients would give 100.0 an AUROC of 1.
    assert len(made) == 4
    assert all(not set(patient[fit]) & set(patient[held]) for fit, held in made)
    assert sorted(np.concatenate([held for _, held in made]).tolist()) == list(range(400))
    assert fitted.strength[0] in (1e-4, 100.0)


@pytest.fixture(scope="module")
def judged():
    encoder = build_encoder("resnet18", width=4, stride=16, seed=11)
    collection = open_collection("phantom:240,seed=6,size=32")
    config = EvaluateConfig(size=32, resamples=100)
    return evaluate("linear", encoder, collection, ("train", "test"), config), collection, config


def test_result_is_that_of_the_statistics_on_its_own_scores(judged):
    evaluation, collection, _ = judged
    patients = [record.patient for record in collection.split("test").records]
    table = evaluate_scores(evaluation.labels, evaluation.scores, patients, collection.findings, resamples=100)
    for row in table.findings:
        assert evaluation.result["findings"][row.finding]["auroc"]["value"] == pytest.approx(
            row.measures["auroc"].value
        )
        assert evaluation.result["findings"][row.finding]["auroc"]["low"] == pytest.approx(row.measures["auroc"].low)
    assert evaluation.result["macro"]["auroc"]["high"] == pytest.approx(table.macro.measures["auroc"].high)
    assert evaluation.result["splits"]["test"]["images"] == len(patients)


def test_differences_are_encoder_minus_random(judged):
    result = judged[0].result
    for finding, row in result["findings"].items():
        gap = row["auroc"]["value"] - result["random"]["findings"][finding]["auroc"]["value"]
        assert result["difference"]["findings"][finding]["auroc"]["value"] == pytest.approx(gap)


def test_groups_within_a_view_hold_all_images_once(judged):
    result = judged[0].result
    sizes = [part["findings"]["Nodule"]["n"] for part in result["within"].values()]
    assert sum(sizes) == result["findings"]["Nodule"]["n"]


def test_result_is_json_and_rows_repeat_it(judged):
    result = judged[0].result
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    rows = rows_of(result)
    macro = next(r for r in rows if (r["images"], r["finding"], r["measure"]) == ("all", "macro", "auroc"))
    assert macro["difference_low"] == result["difference"]["macro"]["auroc"]["low"]
    measures = 3 + 6 + 4  # of the ranking, of decisions, of calibration
    means = measures - 2  # a mean of slopes or of intercepts says nothing
    within, shares = 2, len(result["fractions"]) - 1
    assert len(rows) == 7 * measures + means + (within + shares) * (7 + 1) * 3


def test_judging_twice_gives_the_same_numbers(judged):
    evaluation, collection, config = judged
    encoder = build_encoder("resnet18", width=4, stride=16, seed=11)
    again = evaluate("linear", encoder, collection, ("train", "test"), config)
    assert np.array_equal(again.scores, evaluation.scores)
    assert again.result["random"] == evaluation.result["random"]


def test_the_random_twin_is_the_same_architecture_with_other_weights():
    encoder = build_encoder("resnet18", width=4, stride=16, seed=1)
    twin = random_twin(encoder, 0)
    assert twin.architecture == encoder.architecture
    assert not torch.equal(twin.state_dict()["conv1.weight"], encoder.state_dict()["conv1.weight"])


def test_calibrating_norms_changes_statistics_only():
    collection = open_collection("phantom:24,seed=1,size=32")
    encoder = build_encoder("resnet18", width=4, seed=0)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    calibrate_norms(encoder, collection.records, 32, 8, PixelCache(1.0), lambda done: None)
    after = encoder.state_dict()
    for name, value in before.items():
        if name.endswith("running_mean"):
            assert not torch.equal(after[name], value), name
        elif "running" not in name and "tracked" not in name:
            assert torch.equal(after[name], value), name
    assert not encoder.training


def test_features_are_cached_by_encoder_and_images(tmp_path):
    records = open_collection("phantom:12,seed=1,size=32").records
    first, second = (build_encoder("resnet18", width=4, seed=s) for s in (0, 1))
    assert encoder_digest(first) != encoder_digest(second)

    def features(encoder, size=32):
        return pooled_features(encoder, records, size, 4, PixelCache(1.0), tmp_path, SilentProgress(), "features")

    one = features(first)
    assert one.shape == (12, 32)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert np.array_equal(features(first), one)
    assert not np.array_equal(features(second), one)
    features(first, 48)
    assert len(list(tmp_path.glob("*.npy"))) == 3
    # a cached file is really what is read
    for path in tmp_path.glob("*.npy"):
        np.save(path, np.zeros((12, 32), np.float32))
    assert (features(first) == 0).all()


def test_a_finding_without_a_probe_has_no_measure_and_is_in_no_mean():
    """It may be common among the test images: without a fit there is nothing to judge."""
    collection = open_collection("phantom:240,seed=6,size=32")
    kept = 0
    records = []
    for record in collection.records:
        nodule = record.labels["Nodule"]
        if record.split == "train" and nodule:
            kept += 1
            nodule = int(kept <= 1)
        records.append(record._replace(labels={**record.labels, "Nodule": nodule}))
    encoder = build_encoder("resnet18", width=4, stride=16, seed=11)
    changed = collection._replace(records=records)
    result = evaluate("linear", encoder, changed, ("train", "test"), EvaluateConfig(size=32, resamples=50)).result
    row = result["findings"]["Nodule"]
    assert row["positives"] > 5
    assert row["auroc"]["value"] is None
    assert "not fitted" in row["auroc"]["note"]
    assert result["macro"]["findings"] == [finding for finding in changed.findings if finding != "Nodule"]


def test_refusals_name_the_fix():
    encoder = build_encoder("resnet18", width=4, seed=0)
    phantoms = open_collection("phantom:24,seed=1,size=32")
    with pytest.raises(ConfigError, match="unknown task 'liner'; did you mean 'linear'"):
        evaluate("liner", encoder, phantoms, ("train", "test"), EvaluateConfig(size=32))
    with pytest.raises(DataError, match="has no labels"):
        evaluate("linear", encoder, Collection("x", (), ()), ("train", "test"), EvaluateConfig(size=32))
    with pytest.raises(DataError, match="no record in split 'tset'; did you mean 'test'"):
        evaluate("linear", encoder, phantoms, ("train", "tset"), EvaluateConfig(size=32))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no usable GPU; use cpu or auto"):
            evaluate("linear", encoder, phantoms, ("train", "test"), EvaluateConfig(size=32, accelerator="cuda"))
    with pytest.raises(ConfigError, match="accelerator must be"):
        EvaluateConfig(accelerator="tpu")
    with pytest.raises(ConfigError, match="within and subgroups may hold"):
        EvaluateConfig(within=("site",))


def test_judging_on_patients_that_were_fitted_on_is_refused():
    encoder = build_encoder("resnet18", width=4, seed=0)
    phantoms = open_collection("phantom:60,seed=1,size=32")
    with pytest.raises(DataError, match="must differ, received train, val, train"):
        evaluate("linear", encoder, phantoms, ("train", "train"), EvaluateConfig(size=32))


def test_a_broken_test_image_is_skipped_and_listed(tmp_path):
    import cv2

    generator = np.random.default_rng(0)
    lines = ["image,patient,split,A"]
    for number in range(60):
        label = number % 2
        pixels = generator.integers(0, 128, (40, 40)) + 100 * label
        cv2.imwrite(str(tmp_path / f"{number}.png"), pixels.astype(np.uint8))
        lines.append(f"{number}.png,P{number},{'train' if number < 30 else 'test'},{label}")
    (tmp_path / "45.png").write_bytes(b"no picture")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    encoder = build_encoder("resnet18", width=4, seed=0)
    collection = open_collection(f"folder:{tmp_path}")
    result = evaluate("linear", encoder, collection, ("train", "test"), EvaluateConfig(size=32, resamples=20)).result
    assert result["splits"]["test"]["images"] == 29
    assert result["splits"]["test"]["skipped"] == ["45.png"]
    with pytest.raises(DataError, match="cannot be used"):
        evaluate("linear", encoder, collection, ("train", "test"), EvaluateConfig(size=32, max_skipped=0.0))


def test_the_macro_mean_is_as_cautious_as_its_findings(judged):
    result = judged[0].result
    few = [name for name, row in result["findings"].items() if row["auroc"]["caution"]]
    assert bool(result["macro"]["auroc"]["caution"]) == bool(few)


def test_csv_of_a_run(tmp_path, judged):
    from otcxr.evaluation.results import write_evaluation
    from otcxr.runs import Run

    write_evaluation(Run(tmp_path), judged[0])
    with (tmp_path / "evaluation" / "linear.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["images"] == "all"
    assert float(rows[0]["value"]) == judged[0].result["findings"]["Nodule"]["auroc"]["value"]
    with np.load(tmp_path / "evaluation" / "linear.npz") as arrays:
        assert np.array_equal(arrays["scores"], judged[0].scores)
