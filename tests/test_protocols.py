"""Protocols, the labels they spend, what they leave behind, and the predictions of other tools."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.neighbors import NearestNeighbors

from otcxr.attribution import ProbedEncoder
from otcxr.cli import main
from otcxr.console import SilentProgress
from otcxr.data import open_collection
from otcxr.data.records import Collection, Record
from otcxr.errors import CheckpointError, ConfigError, DataError
from otcxr.evaluation import evaluate
from otcxr.evaluation.calibration import sigmoid
from otcxr.evaluation.classifier import load_classifier
from otcxr.evaluation.classify import nearest_share
from otcxr.evaluation.decisions import sensitivity, specificity
from otcxr.evaluation.delong import delong
from otcxr.evaluation.features import pooled_features
from otcxr.evaluation.finetune import FinetuneConfig, finetune, masked_cross_entropy, predict_logits
from otcxr.evaluation.labelled import draw_labels, gather, nested_order, write_draw
from otcxr.evaluation.metrics import auroc
from otcxr.evaluation.predictions import evaluate_predictions, read_predictions
from otcxr.evaluation.statistics import BootstrapSettings, compare_scores, patient_weights, smallest_difference
from otcxr.evaluation.subgroups import age_band, attribute_of, measure_subgroups
from otcxr.evaluation.tables import power_json
from otcxr.evaluation.tasks import EvaluateConfig
from otcxr.nn.encoder import build_encoder
from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, pretrain

SOURCE = "phantom:300,seed=6,size=32"
QUICK = EvaluateConfig(size=32, resamples=60, fractions=(0.3, 1.0), seeds=2, finetune=FinetuneConfig(steps=4))
PLAIN = EvaluateConfig(resamples=60)  # predictions of other tools: settings without effect are refused


def material_of(collection=None, **changes):
    collection = collection or open_collection(SOURCE)
    options = {"val": "val", "holdout": 0.2, "max_skipped": 0.0, "cache_gb": 1.0} | changes
    return gather(collection, ("train", "test"), progress=SilentProgress(), **options)


# --- which labels are spent ------------------------------------------------------------------------------------------


@given(st.sets(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=30), st.integers(0, 50))
@settings(deadline=None)
def test_the_order_of_patients_ignores_the_order_of_rows_and_who_else_is_there(patients, seed):
    listed = sorted(patients)
    order = nested_order(listed, seed)
    assert sorted(order) == listed
    assert nested_order([*reversed(listed), *listed], seed) == order
    without = [p for p in listed if p != listed[0]]
    assert nested_order(without, seed) == [p for p in order if p != listed[0]]


def test_fractions_are_whole_patients_nested_and_differ_between_seeds():
    material = material_of()
    draws = {f: draw_labels(material, f, 3) for f in (0.01, 0.1, 0.5, 1.0)}
    for part, name in ((material.fit, "fit"), (material.val, "val")):
        people = len(set(part.patients))
        before = set()
        for fraction, drawn in draws.items():
            rows = getattr(drawn, name)
            taken = set(part.patients[rows])
            assert before <= set(rows)
            assert set(rows) == {i for i, p in enumerate(part.patients) if p in taken}  # all images of each
            assert len(taken) == max(1, int(np.ceil(fraction * people - 1e-9)))
            before = set(rows)
        assert len(before) == len(part.records)
    assert len({d.digest for d in draws.values()}) == 4
    assert draw_labels(material, 0.1, 3).digest == draws[0.1].digest
    assert draw_labels(material, 0.1, 4).digest != draws[0.1].digest
    for bad in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match="fraction of the labels"):
            draw_labels(material, bad, 0)


def test_the_list_of_labels_says_who_was_spent():
    material = material_of()
    drawn = draw_labels(material, 0.2, 1)
    first, *rest = write_draw(material, drawn).splitlines()
    assert first == f"# fraction 0.2, seed 1, digest {drawn.digest}"
    rows = list(csv.DictReader(rest))
    assert [row["image"] for row in rows if row["role"] == "fit"] == [material.fit.records[i].name for i in drawn.fit]
    assert [row["patient"] for row in rows if row["role"] == "val"] == list(material.val.patients[drawn.val])


def test_without_a_validation_split_patients_are_held_out():
    collection = open_collection(SOURCE)
    records = [r._replace(split="train" if r.split == "val" else r.split) for r in collection.records]
    plain = collection._replace(records=records)
    material = material_of(plain)
    assert material.val.name == "patients held out of train"
    held, kept = set(material.val.patients), set(material.fit.patients)
    assert not held & kept
    assert len(held) == round(0.2 * len(held | kept))
    assert len(material.fit.records) + len(material.val.records) == sum(r.split == "train" for r in records)
    assert set(material_of(plain, holdout=0.4).val.patients) > held  # nested too


def test_material_is_refused_where_roles_share_a_patient_or_a_split():
    collection = open_collection(SOURCE)
    shared = collection.split("train").records[0].patient
    mixed = [r._replace(patient=shared) if r.split == "val" else r for r in collection.records]
    with pytest.raises(DataError, match=r"are in split 'train' and in another one|to fit on \('train'\)"):
        material_of(collection._replace(records=mixed))
    for splits, val in ((("train", "train"), "val"), (("train", "test"), "test"), (("train", "test"), "train")):
        with pytest.raises(DataError, match="must differ"):
            gather(collection, splits, val=val, holdout=0.2, max_skipped=0, cache_gb=1, progress=SilentProgress())
    with pytest.raises(DataError, match="has no labels"):
        material_of(collection._replace(findings=()))


def test_another_collection_is_judged_on_what_it_has():
    collection, other = open_collection(SOURCE), open_collection("phantom:80,seed=9,size=32")
    relabelled = [r._replace(labels={k: v for k, v in r.labels.items() if k != "Mass"}) for r in other.records]
    other = other._replace(records=relabelled, findings=tuple(f for f in other.findings if f != "Mass"))
    material = material_of(collection, external={"elsewhere": (other, "")})
    part = material.tests["elsewhere"]
    mass = material.findings.index("Mass")
    assert np.isnan(part.labels[:, mass]).all()
    assert not np.isnan(np.delete(part.labels, mass, axis=1)).any()
    strange = other._replace(findings=("Pleural thing",))
    with pytest.raises(DataError, match="has none of the findings"):
        material_of(collection, external={"elsewhere": (strange, "")})


# --- protocols -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged():
    encoder = build_encoder("resnet18", width=4, stride=16, seed=11)
    return {task: evaluate(task, encoder, open_collection(SOURCE), ("train", "test"), QUICK)
            for task in ("linear", "knn", "retrieval", "finetune")}  # fmt: skip


@pytest.mark.parametrize("task", ["linear", "knn", "retrieval", "finetune"])
def test_every_task_gives_the_same_kind_of_result(judged, task):
    evaluation = judged[task]
    result = evaluation.result
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    measure = "precision_at_10" if task == "retrieval" else "auroc"
    for part in (result, result["random"], result["difference"], *result["within"].values()):
        assert {measure} <= part["macro"].keys()
        assert all(measure in row for row in part["findings"].values())
    assert [share["fraction"] for share in result["fractions"]] == [0.3, 1.0]
    assert [len(share["draws"]) for share in result["fractions"]] == [2, 1]
    small = result["fractions"][0]
    assert small["macro"][measure]["seeds"] == 2
    assert small["draws"][0]["digest"] != small["draws"][1]["digest"]
    gap = result["macro"][measure]["value"], result["random"]["macro"][measure]["value"]
    if None not in gap:
        assert result["difference"]["macro"][measure]["value"] == pytest.approx(gap[0] - gap[1])
    assert ("brier" in result["findings"]["Mass"]) == (task != "retrieval")
    assert ("decisions" in result) == (task != "retrieval")
    assert (evaluation.classifier is None) == (task in ("knn", "retrieval"))
    assert {"fit", "val", "test"} == result["splits"].keys()
    assert result["power"]["level"] == 0.95


def test_thresholds_and_recalibration_are_those_of_the_validation_images_alone(judged):
    encoder = build_encoder("resnet18", width=4, stride=16, seed=11)
    collection = open_collection(SOURCE)
    test = [i for i, record in enumerate(collection.records) if record.split == "test"]
    records = list(collection.records)
    for i, j in zip(test, [*test[7:], *test[:7]], strict=True):
        records[i] = records[i]._replace(labels=collection.records[j].labels)
    other = evaluate("linear", encoder, collection._replace(records=records), ("train", "test"), QUICK).result
    own = judged["linear"].result
    assert other["decisions"] == own["decisions"]
    assert other["findings"]["Edema"]["auroc"] != own["findings"]["Edema"]["auroc"]
    assert any(p["threshold"] is not None for d in own["decisions"].values() for p in d["operating_points"])


def test_what_could_be_seen_follows_from_the_interval_of_the_difference(judged):
    result = judged["linear"].result
    known = [f for f, row in result["difference"]["findings"].items() if row["auroc"]["value"] is not None]
    assert known
    gaps = {finding: result["difference"]["findings"][finding]["auroc"] for finding in known}
    macro = result["difference"]["macro"]["auroc"]
    # two seeds have one degree of freedom: of such an interval nothing follows
    assert {gap["seed_freedom"] for gap in (*gaps.values(), macro)} == {1}
    assert {result["power"][name][finding] for name in ("findings", "findings_holm") for finding in known} == {None}
    assert result["power"]["macro"] is None
    assert "random networks" in result["power"]["to"]
    more = copy.deepcopy(result)
    for gap in (*more["difference"]["findings"].values(), more["difference"]["macro"]):
        gap["auroc"] |= {"seed_freedom": 3}
    power = power_json(more, "random networks")
    for finding, gap in gaps.items():
        half = (gap["high"] - gap["low"]) / 2
        for name, tests in (("findings", 1), ("findings_holm", len(known))):
            assert power[name][finding] == pytest.approx(smallest_difference(half, 0.95, tests))
    assert power["macro"] == pytest.approx(smallest_difference((macro["high"] - macro["low"]) / 2, 0.95))


def test_tasks_judge_the_same_images_with_the_same_labels(judged):
    images = {evaluation.images for evaluation in judged.values()}
    assert len(images) == 1
    digests = {tuple(d.digest for d in evaluation.draws[:3]) for evaluation in judged.values()}
    assert len(digests) == 1


def test_an_unknown_task_and_bad_settings_are_refused():
    encoder = build_encoder("resnet18", width=4, seed=0)
    with pytest.raises(ConfigError, match="unknown task 'liner'; did you mean 'linear'"):
        evaluate("liner", encoder, open_collection(SOURCE), ("train", "test"), QUICK)
    for change, says in (
        ({"fractions": (0.0,)}, "fractions must be shares"),
        ({"fractions": ()}, "fractions must be shares"),
        ({"seeds": 0}, "seeds at least 1"),
        ({"holdout": 1.0}, "holdout must be in"),
        ({"recalibration": "plat"}, "unknown recalibration 'plat'; did you mean 'platt'"),
        ({"rule": "best"}, "unknown rule 'best'"),
        ({"within": ("site",)}, "received 'site'"),
        ({"neighbours": 0}, "neighbours at least 1"),
    ):
        with pytest.raises(ConfigError, match=says):
            replace(QUICK, **change)
    with pytest.raises(ConfigError, match="finetune"):
        FinetuneConfig(batch_size=1)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=40)
def test_the_share_of_the_nearest_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    x, q = rng.normal(size=(30, 4)), rng.normal(size=(7, 4))
    labels = np.where(rng.random((30, 3)) < 0.2, np.nan, rng.integers(0, 2, (30, 3)).astype(float))
    labels[:, 2] = np.nan if seed % 3 == 0 else labels[:, 2]
    found = nearest_share(x, labels, q, (1, 4))
    for f in range(3):
        known = ~np.isnan(labels[:, f])
        if not known.any():
            assert np.isnan(found[0][:, f]).all()
            continue
        for k, shares in zip((1, 4), found, strict=True):
            peer = NearestNeighbors(n_neighbors=min(k, known.sum()), metric="cosine").fit(x[known])
            near = peer.kneighbors(q, return_distance=False)
            np.testing.assert_allclose(shares[:, f], labels[known, f][near].mean(axis=1))
    with pytest.raises(ConfigError, match="1 image or more"):
        nearest_share(x, labels, q, (0,))


def test_retrieval_is_the_mean_over_images_that_have_the_finding(judged):
    result, labels = judged["retrieval"].result, judged["retrieval"].labels
    found = result["findings"]["Cardiomegaly"]
    assert found["positives"] == int(
        (labels[:, judged["retrieval"].material.findings.index("Cardiomegaly")] == 1).sum()
    )
    assert 0 <= found["precision_at_10"]["value"] <= 1
    material = judged["retrieval"].material
    f = material.findings.index("Cardiomegaly")
    encoder = build_encoder("resnet18", width=4, stride=16, seed=11)
    features = [
        pooled_features(encoder, part.records, 32, 64, material.pixels, None, SilentProgress(), "")
        for part in (material.fit, next(iter(material.tests.values())))
    ]
    features = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in features]
    nearest = np.argsort(-(features[1] @ features[0].T), axis=1)[:, :10]
    shares = (material.fit.labels[nearest, f] == 1).mean(axis=1)
    assert found["precision_at_10"]["value"] == pytest.approx(shares[labels[:, f] == 1].mean(), abs=0.02)
    chance = result["fractions"][-1]["facts"][0]["precision_by_chance"]["Cardiomegaly"]
    assert abs(found["precision_at_10"]["value"] - chance) < 0.3  # an untrained network


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def planted(images=64, side=32, seed=0):
    """Radiographs with a bright square that is the finding, and whose labels are sometimes unknown."""

    class Planted:
        def __init__(self, index, present):
            self.index, self.present = index, present

        def radiograph(self):
            from otcxr.data.records import Radiograph, full_valid

            rng = np.random.default_rng((seed, self.index))
            image = torch.from_numpy(rng.uniform(0.3, 0.5, (1, side, side)).astype(np.float32))
            if self.present:
                image[:, 8:16, 8:16] += 0.4
            return Radiograph(image, full_valid(image), None)

        def __str__(self):
            return f"planted-{self.index}"

    records = []
    for i in range(3 * images):
        split = ("train", "val", "test")[i % 3]
        records.append(
            Record(Planted(i, i // 3 % 2), study=str(i), patient=str(i), split=split, labels={"Square": i // 3 % 2})
        )
    return Collection("planted", ("Square",), records)


@pytest.fixture(scope="module")
def tuned():
    material = material_of(planted())
    encoder = build_encoder("resnet18", width=4, stride=16, seed=1)
    start = ProbedEncoder(encoder, np.zeros((1, encoder.channels[-1])), np.zeros(1))
    options = {"size": 32, "pixels": material.pixels, "seed": 0, "progress": SilentProgress()}
    config = FinetuneConfig(steps=40, batch_size=16, learning_rate=2e-3)
    return material, start, config, options, finetune(start, material.fit, material.val, config, **options)


def test_fine_tuning_learns_what_is_planted_and_leaves_the_start_alone(tuned):
    material, start, _, _, result = tuned
    before = {k: v.clone() for k, v in start.state_dict().items()}
    part = material.tests["test"]
    scores = predict_logits(result.model, part.records, 32, material.pixels)
    assert auroc(part.labels[:, 0], scores[:, 0]) > 0.95
    assert len(result.history) == 10
    assert result.step in [step for step, _ in result.history]
    best = max(value for _, value in result.history)
    assert dict(result.history)[result.step] == best
    assert all(torch.equal(v, before[k]) for k, v in start.state_dict().items())
    assert not any(p.requires_grad for p in result.model.parameters())
    assert not result.model.training


def test_fine_tuning_depends_on_its_seed_alone(tuned):
    material, start, config, options, result = tuned
    torch.manual_seed(5)  # not on this
    again = finetune(start, material.fit, material.val, config, **options)
    assert all(torch.equal(v, result.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    other = finetune(start, material.fit, material.val, config, **(options | {"seed": 1}))
    assert not torch.equal(other.model.probe.weight, result.model.probe.weight)


def test_the_loss_counts_what_is_assessed():
    logits, labels = torch.randn(5, 3), torch.tensor([[1.0, 0.0, float("nan")]] * 5)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, :2], labels[:, :2])
    torch.testing.assert_close(masked_cross_entropy(logits, labels), expected)
    logits.requires_grad_()
    masked_cross_entropy(logits, labels).backward()
    assert (logits.grad[:, 2] == 0).all()
    assert masked_cross_entropy(logits, labels * float("nan")) == 0


# --- the classifier --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train = TrainConfig(epochs=1, batch_size=8, accelerator="cpu", probes=0, online_images=0)
    from otcxr.data.dataset import DataConfig
    from otcxr.data.views import ViewsConfig

    return pretrain(PretrainConfig(DataConfig(SOURCE), views=ViewsConfig(size=32), encoder=EncoderConfig(width=4),
                                   train=train, out=str(out)))  # fmt: skip


QUICK_WORDS = ["--eval.resamples", "40", "--eval.fractions", "[0.3,1.0]", "--eval.seeds", "2"]


@pytest.mark.parametrize("task", ["linear", "finetune"])
def test_a_classifier_says_what_the_evaluation_said(run, task, capsys):
    words = ["evaluate", str(run.path), "--task", task, *QUICK_WORDS, "--finetune.steps", "4"]
    assert main(words) == 0
    assert f"classifier: {run.path / 'classifier' / task}" in capsys.readouterr().out.replace("\n", "")
    made = load_classifier(run.path / "classifier" / task)
    with np.load(run.path / "evaluation" / f"{task}.npz") as stored:
        scores, names = stored["scores"], stored["images"].tolist()
    result = run.read_json(f"evaluation/{task}.json")
    test = open_collection(SOURCE).split("test").records
    assert names == [record.name for record in test]
    from otcxr.data.images import fit_square

    images = torch.stack([fit_square(record.image.radiograph().image, made.size) for record in test])
    p = made.probabilities(images)
    for f, finding in enumerate(made.findings):
        fitted = made.decisions[f].recalibration
        np.testing.assert_allclose(p[:, f], fitted(scores[:, f]), atol=2e-3)  # pixels are kept with 16 bits
        kept = result["decisions"][finding]
        assert kept["recalibration"] == fitted.as_dict()
        assert [tuple(point.values()) for point in kept["operating_points"]] == list(
            map(tuple, made.decisions[f].points)
        )
    lists = sorted(path.name for path in (run.path / "evaluation" / "labels").iterdir())
    assert {"0.3-seed0.csv", "0.3-seed1.csv", "1-seed0.csv"} <= set(lists)


def test_a_damaged_classifier_is_named(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"classifier.json is missing in .*; expected RUN/classifier"):
        load_classifier(tmp_path)
    for name in ("classifier.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((run.path / "classifier" / "linear" / name).read_bytes())
    whole = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="no whole classifier"):
        load_classifier(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(whole)
    (tmp_path / "classifier.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no whole classifier"):
        load_classifier(tmp_path)


# --- DeLong ----------------------------------------------------------------------------------------------------------


def test_delong_is_the_covariance_of_its_components_by_pairs():
    rng = np.random.default_rng(0)
    labels = (rng.random(40) < 0.4).astype(float)
    a, b = np.round(rng.normal(size=(2, 40)) + labels, 1)
    b[5] = np.nan
    labels[5] = np.nan

    def components(s):
        positive, negative = s[labels == 1], s[labels == 0]
        psi = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        return psi.mean(axis=1), psi.mean(axis=0)

    (a10, a01), (b10, b01) = components(a), components(b)
    expected = np.cov(a10, b10) / len(a10) + np.cov(a01, b01) / len(a01)
    found = delong(labels, a, b, np.arange(40))
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-10)
    assert found.auroc == pytest.approx([auroc(labels, a), auroc(labels, b)])
    error = np.sqrt(expected[0, 0] + expected[1, 1] - 2 * expected[0, 1])
    assert found.p_value == pytest.approx(2 * norm.sf(abs(found.difference) / error))
    assert (found.low, found.high) == pytest.approx(norm.interval(0.95, found.difference, error))


def test_delong_agrees_with_the_bootstrap_where_each_patient_has_one_image():
    rng = np.random.default_rng(1)
    labels = (rng.random(1500) < 0.3).astype(float)
    base = rng.normal(size=1500) + labels
    a, b = base + 0.5 * rng.normal(size=1500) + 0.2 * labels, base + 0.5 * rng.normal(size=1500)
    found = delong(labels, a, b, np.arange(1500))
    row = compare_scores(labels[:, None], a[:, None], b[:, None], np.arange(1500), ["X"]).findings[0]
    difference = row.measures["auroc"].difference
    assert (found.low, found.high) == pytest.approx((difference.estimate.low, difference.estimate.high), abs=3e-3)
    assert delong(labels, a, a, np.arange(1500)).p_value == 1.0


def test_delong_refuses_several_images_of_a_patient():
    with pytest.raises(DataError, match="4 images of 3 patients: DeLong's test takes images as independent"):
        delong([0, 1, 0, 1], [1, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 3])
    with pytest.raises(DataError, match="1 positive and 3 negative"):
        delong([0, 1, 0, 0], [1, 2, 3, 4], [1, 2, 3, 4], range(4))


# --- groups ----------------------------------------------------------------------------------------------------------


def test_age_bands():
    assert [age_band(a) for a in (0, 39.9, 40, 59, 60, 79, 80, 110, None, -1)] == [
        "0-39", "0-39", "40-59", "40-59", "60-79", "60-79", "80+", "80+", "", ""
    ]  # fmt: skip
    record = Record(None, "s", "p", sex="F", age=41.0)
    assert [attribute_of(record, name) for name in ("view", "sex", "age")] == ["", "F", "40-59"]


def test_groups_are_measured_like_anything_else_and_gaps_are_to_the_others():
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(200), 2)
    labels = (rng.random((200, 2)) < 0.5)[patients].astype(float)
    sex = np.where(rng.random(200) < 0.4, "F", "M")[patients]
    sex[:8] = ""
    p = sigmoid(labels * np.where(sex == "F", 0.6, 2.0)[:, None] + rng.normal(size=labels.shape) - 0.5)
    age = np.where(patients < 195, "40-59", "80+")
    made = measure_subgroups(
        labels, p, p, [0.5, 0.5], ["", "no threshold"], patients, ("A", "B"), {"sex": sex, "age": age},
        BootstrapSettings(80),
    )  # fmt: skip
    assert list(made) == ["sex", "age"]
    inside, others = sex == "F", sex == "M"
    row = made["sex"]["F"]["findings"]["A"]
    assert (made["sex"]["F"]["images"], row["n"]) == (inside.sum(), inside.sum())
    weights = patient_weights(patients, 80, 0)
    for name, of in (
        ("auroc", lambda rows, w: auroc(labels[rows, 0], p[rows, 0], w)),
        ("sensitivity", lambda rows, w: sensitivity(labels[rows, 0], p[rows, 0], w, threshold=0.5)),
        ("false_positive_rate", lambda rows, w: 1 - specificity(labels[rows, 0], p[rows, 0], w, threshold=0.5)),
    ):
        draws = of(inside, weights[:, inside])
        assert row[name]["value"] == pytest.approx(of(inside, None))
        assert (row[name]["low"], row[name]["high"]) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
        gap = draws - of(others, weights[:, others])
        assert row[name]["gap"]["value"] == pytest.approx(of(inside, None) - of(others, None))
        assert (row[name]["gap"]["low"], row[name]["gap"]["high"]) == pytest.approx(
            tuple(np.quantile(gap, [0.025, 0.975]))
        )
    assert row["auroc"]["gap"]["high"] < 0  # women are served worse
    assert made["sex"]["F"]["findings"]["B"]["sensitivity"]["note"] == "no threshold"
    few = made["age"]["80+"]["findings"]["A"]["sensitivity"]
    assert few["value"] is None
    assert "at least" in few["note"]
    assert "site" not in measure_subgroups(
        labels, p, p, [0.5, 0.5], ["", ""], patients, ("A", "B"), {"site": ["x"] * 400}, BootstrapSettings(5)
    )


# --- predictions of other tools --------------------------------------------------------------------------------------


def write_csv(path, rows, header=("image", "patient", "A_label", "A", "B_label", "B", "split", "sex", "age", "view")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def predicted(seed=0, images=240, probabilities=True):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(images):
        y = rng.integers(0, 2, 2)
        z = 1.5 * y + rng.normal(size=2) - 0.7
        s = sigmoid(z) if probabilities else 10 * z
        split = "val" if i // 2 % 3 == 0 else "test"
        label = ["", *y[1:]] if i % 10 == 0 else y
        rows.append([f"i{i}.png", f"p{i // 2}", label[0], s[0], label[1], s[1], split, "MF"[i // 2 % 2], 30 + i % 60,
                     "PA"])  # fmt: skip
    return rows


def arrays(rows, split="test"):
    kept = [r for r in rows if r[6] == split]
    labels = np.array([[np.nan if r[k] == "" else float(r[k]) for k in (2, 4)] for r in kept])
    return labels, np.array([[r[3], r[5]] for r in kept], dtype=float), np.array([r[1] for r in kept])


def test_predictions_get_the_numbers_of_a_run(tmp_path, capsys):
    rows = predicted()
    path = write_csv(tmp_path / "preds.csv", rows)
    out = tmp_path / "out"
    assert main(["evaluate", str(path), "--out", str(out), "--eval.resamples", "60"]) == 0
    assert "macro of 2" in capsys.readouterr().out
    result = json.loads((out / "evaluation.json").read_text())
    labels, scores, patients = arrays(rows)
    from otcxr.evaluation.statistics import evaluate_scores

    table = evaluate_scores(labels, scores, patients, ["A", "B"], resamples=60)
    for row in table.findings:
        found = result["findings"][row.finding]["auroc"]
        expected = row.measures["auroc"]
        assert (found["value"], found["low"], found["high"]) == pytest.approx(expected[:3])
    assert {"f1", "sensitivity", "brier", "calibration_slope", "average_precision"} <= result["findings"]["A"].keys()
    assert result["splits"]["val"]["images"] == sum(r[6] == "val" for r in rows)
    from otcxr.evaluation.decisions import choose_threshold

    val_labels, val_scores, _ = arrays(rows, "val")
    chosen = choose_threshold(val_labels[:, 1], val_scores[:, 1], "largest F1").threshold
    points = {point["rule"]: point for point in result["decisions"]["B"]["operating_points"]}
    assert points["largest F1"]["threshold"] == pytest.approx(chosen)
    assert {"specificity 0.90", "specificity 0.95"} < points.keys()
    assert result["decisions"]["B"]["calibration_of"] == "the scores as given"
    assert set(result["subgroups"]) == {"sex", "age"}  # all have one view
    with (out / "evaluation.csv").open() as file:
        listed = {(r["finding"], r["measure"]): r for r in csv.DictReader(file)}
    assert float(listed["A", "auroc"]["value"]) == pytest.approx(result["findings"]["A"]["auroc"]["value"])
    page = (out / "report.html").read_text()
    assert "preds.csv" in page
    assert "<script" not in page
    assert result["source"]["digest"] in page
    assert sorted(p.name for p in out.iterdir()) == ["evaluation.csv", "evaluation.json", "report.html"]


def test_scores_that_are_no_probabilities_are_ranked_and_recalibrated_where_possible(tmp_path):
    rows = predicted(1, probabilities=False)
    with_val = evaluate_predictions(read_predictions(write_csv(tmp_path / "a.csv", rows)), PLAIN)
    assert with_val["decisions"]["A"]["calibration_of"] == "recalibrated (platt) on the rows 'val'"
    assert with_val["findings"]["A"]["calibration_slope"]["value"] == pytest.approx(1, abs=0.5)
    only_test = [[*r[:6], "", *r[7:]] for r in rows if r[6] == "test"]
    without = evaluate_predictions(read_predictions(write_csv(tmp_path / "b.csv", only_test)), PLAIN)
    assert without["findings"]["A"]["auroc"]["value"] == pytest.approx(with_val["findings"]["A"]["auroc"]["value"])
    note = "no probabilities: scores leave [0, 1], and there are no rows 'val' to recalibrate them on"
    assert without["findings"]["A"]["brier"]["note"] == note
    few = [r for r in rows if r[6] == "test" or r[2] == 0]  # no positive one left to fit on
    unfitted = evaluate_predictions(read_predictions(write_csv(tmp_path / "c.csv", few)), PLAIN)
    assert "and 0 positive and" in unfitted["findings"]["A"]["brier"]["note"]
    assert "no rows with split 'val'" in without["findings"]["A"]["f1"]["note"]
    assert without["power"]["to"] == "an AUROC that is known beforehand"


def test_two_tables_are_compared_image_by_image(tmp_path, capsys):
    rows = predicted(2)
    better = [[*r[:3], min(1.0, r[3] + 0.2 * (r[2] == 1)), *r[4:]] for r in rows]
    shuffled = [better[i] for i in np.random.default_rng(0).permutation(len(rows))]
    a, b = write_csv(tmp_path / "a.csv", shuffled), write_csv(tmp_path / "b.csv", rows)
    out = tmp_path / "out"
    assert main(["evaluate", str(a), "--against", str(b), "--out", str(out), "--eval.resamples", "200"]) == 0
    assert "difference" in capsys.readouterr().out
    result = json.loads((out / "evaluation.json").read_text())
    assert result["difference"]["findings"]["A"]["auroc"]["low"] > 0
    assert result["difference"]["findings"]["B"]["auroc"]["value"] == pytest.approx(0)
    assert result["against"]["source"]["file"] == "b.csv"
    fewer = write_csv(tmp_path / "c.csv", [r for r in rows if r[6] == "val" or r[0] != "i239.png"])
    assert main(["evaluate", str(a), "--against", str(fewer), "--out", str(out)]) == 1
    assert "c.csv has no row for image 'i239.png' of a.csv" in capsys.readouterr().err
    other = write_csv(tmp_path / "d.csv", [[*r[:2], 1 - r[2] if r[0] == "i239.png" else r[2], *r[3:]] for r in rows])
    assert main(["evaluate", str(a), "--against", str(other), "--out", str(out)]) == 1
    assert "another label or patient for image 'i239.png'" in capsys.readouterr().err


def test_a_comparison_is_made_within_groups_and_written_whole(tmp_path):
    """One image of each patient: DeLong's test stands beside the bootstrap's."""
    rows = [[*r[:1], f"q{i}", *r[2:9], "AP" if i % 3 else "PA"] for i, r in enumerate(predicted(3, 300))]
    worse = [[*r[:3], sigmoid(np.random.default_rng(i).normal()), *r[4:]] for i, r in enumerate(rows)]
    a, b = write_csv(tmp_path / "a.csv", rows), write_csv(tmp_path / "b.csv", worse)
    out = tmp_path / "out"
    assert main(["evaluate", str(a), "--against", str(b), "--out", str(out), "--eval.resamples", "100"]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    labels, scores, patients = arrays(rows)
    other = arrays(worse)[1]
    gap = result["difference"]["findings"]["A"]["auroc"]
    assert gap["p_value_delong"] == pytest.approx(delong(labels[:, 0], scores[:, 0], other[:, 0], patients).p_value)
    assert gap["p_holm"] >= gap["p_value"]
    assert gap["detectable"] == pytest.approx(smallest_difference((gap["high"] - gap["low"]) / 2, 0.95))
    assert set(result["within"]) == {"view=AP", "view=PA"}
    pa = np.array([r[9] == "PA" for r in rows if r[6] == "test"])
    part = result["within"]["view=PA"]
    assert part["findings"]["A"]["n"] == (pa & ~np.isnan(labels[:, 0])).sum()
    assert part["findings"]["A"]["auroc"]["value"] == pytest.approx(auroc(labels[pa, 0], scores[pa, 0]))
    assert part["against"]["findings"]["A"]["auroc"]["value"] == pytest.approx(auroc(labels[pa, 0], other[pa, 0]))
    with (out / "evaluation.csv").open() as file:
        listed = {(r["images"], r["finding"], r["measure"]): r for r in csv.DictReader(file)}
    for group, table in (("all", result), ("view=PA", part)):
        row = listed[group, "A", "auroc"]
        for prefix, source in (("", "findings"), ("against_", "against"), ("difference_", "difference")):
            entry = table[source]["A"] if source == "findings" else table[source]["findings"]["A"]
            for end in ("value", "low", "high"):
                assert float(row[prefix + end]) == pytest.approx(entry["auroc"][end])
    assert float(listed["all", "A", "auroc"]["difference_p_value"]) == pytest.approx(gap["p_value"])
    plain = tmp_path / "alone"
    assert main(["evaluate", str(a), "--out", str(plain), "--eval.resamples", "40", "--eval.within", "[]"]) == 0
    alone = json.loads((plain / "evaluation.json").read_text())
    assert alone["within"] == {}
    assert alone["findings"]["A"]["auroc"]["value"] == pytest.approx(result["findings"]["A"]["auroc"]["value"])


def test_labels_may_come_from_a_source(tmp_path):
    collection = open_collection("phantom:60,seed=2,size=32")
    rng = np.random.default_rng(0)
    rows = [[r.name, rng.random()] for r in collection.records]
    path = write_csv(tmp_path / "p.csv", rows, ("image", "Edema"))
    made = read_predictions(path, collection)
    assert made.findings == ("Edema",)
    assert made.labels[:, 0].tolist() == [float(r.labels["Edema"]) for r in collection.records]
    assert made.patients.tolist() == [r.patient for r in collection.records]
    assert made.groups["sex"] == tuple(r.sex for r in collection.records)
    write_csv(path, [*rows, ["nobody", 0.5]], ("image", "Edema"))
    with pytest.raises(DataError, match=r"line 62: phantom:60,seed=2,size=32 has no image 'nobody'"):
        read_predictions(path, collection)


def changed(rows, line, column, value):
    out = [list(r) for r in rows]
    out[line - 2][column] = value
    return out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: changed(r, 7, 3, "nan"), "line 7: the score of A is nan but there is a label; score"),
        (lambda r: changed(r, 7, 3, ""), "line 7: the score of A is missing but there is a label"),
        (lambda r: changed(r, 7, 3, "inf"), "line 7: the score of A is inf"),
        (lambda r: changed(r, 7, 3, "high"), "line 7: score 'high' of A is no number"),
        (lambda r: changed(r, 8, 2, "-1"), r"line 8: label '-1' of A is none of 1, 0 and empty .*; map"),
        (lambda r: changed(r, 9, 0, "i0.png"), r"line 9: image 'i0.png' stands in line 2 too; keep one row"),
        (lambda r: changed(r, 9, 0, ""), "line 9 has no image"),
        (lambda r: changed(r, 9, 1, ""), "line 9 has no patient"),
        (lambda r: changed(r, 3, 6, "test"), r"line 3: patient 'p0' is in split 'test' here and in 'val' in line 2"),
        (lambda r: changed(r, 3, 6, "train"), "line 3: split 'train' is none of val and test"),
        (lambda r: [[*x[:4], 0, *x[5:]] for x in r],
         r"line 1: finding 'B' has no positive image to be judged on; leave it out \(--findings A\)"),
        (lambda r: [[*x[:4], 1, *x[5:]] for x in r], "finding 'B' has no negative image"),
        (lambda r: [[*x[:6], "val", *x[7:]] for x in r], "no row with split 'test'"),
        (lambda r: [], "has a header but no rows"),
        (lambda r: [[*x, "more"] if i == 4 else x for i, x in enumerate(r)],
         "line 6 has 11 fields, its header 10; a line that was cut"),
        (lambda r: [x[:4] if i == 4 else x for i, x in enumerate(r)], "line 6 has 4 fields, its header 10"),
        (lambda r: changed(r, 5, 3, "0_5"), "line 5: score '0_5' of A is no number"),
        (lambda r: changed(r, 5, 3, "1e300"), "line 5: the score of A is 1e300"),
        (lambda r: changed(r, 5, 8, "61Y"), "line 5: age '61Y' is no number of years"),
        (lambda r: changed(r, 5, 7, "X"), "line 5: sex 'X' is none of F and M"),
    ],
)  # fmt: skip
def test_bad_predictions_are_refused_with_line_and_fix(change, says, tmp_path):
    path = write_csv(tmp_path / "p.csv", change(predicted()))
    with pytest.raises(DataError, match=says):
        read_predictions(path)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("patient,A_label,A", "no column 'image'"),
        ("image,A_label,A,more,still", "no column 'patient'; intervals are by patient"),
        ("image,patient,A,B", "has no finding: expected pairs of columns"),
        ("image,patient,Mass_label,Mas", "'Mass_label' but no column 'Mass' with its scores; did you mean 'Mas'"),
        ("image,patient,A_label,A,A", "two columns 'A'"),
    ],
)
def test_bad_headers_are_refused(header, says, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(f"{header}\nx,1,0.5,0.5,0.5\n")
    with pytest.raises(DataError, match=says):
        read_predictions(path)


def test_files_of_other_programs_are_read_or_told_how_to_be_saved(tmp_path):
    whole = write_csv(tmp_path / "p.csv", predicted()).read_text()
    expected = read_predictions(tmp_path / "p.csv")
    for name, text in (("mark", "\ufeff" + whole), ("old", whole.replace("\r\n", "\r"))):
        path = tmp_path / f"{name}.csv"
        path.write_bytes(text.encode())
        made = read_predictions(path)
        assert made.images == expected.images
        np.testing.assert_array_equal(made.scores, expected.scores)
    for text, says in (
        (whole.replace(",", ";"), "parts its columns by semicolons; save it with commas"),
        (whole.replace("image,", "Image,", 1), "has a column 'Image'; names are written in small letters"),
    ):
        (tmp_path / "q.csv").write_text(text)
        with pytest.raises(DataError, match=says):
            read_predictions(tmp_path / "q.csv")


def test_other_mistakes_of_the_command_are_one_line(run, tmp_path, capsys):
    path = write_csv(tmp_path / "p.csv", predicted())
    for words, says in (
        ([str(path)], "name a folder with --out"),
        ([str(tmp_path / "no.csv"), "--out", str(tmp_path)], "cannot be read: No such file"),
        ([str(path), "--out", str(tmp_path / "o"), "--findings", "C"], "has no finding 'C'"),
        ([str(path), "--out", str(tmp_path / "o"), "--task", "knn"], "have no effect on a table of predictions"),
        ([str(path), "--out", str(tmp_path / "o"), "--eval.fractions", "[0.5]"], "eval.fractions has no effect on"),
        ([str(run.path), "--out", str(tmp_path / "o")], "--out has no effect on a run"),
        ([str(run.path), "--against", str(path)], "--against has no effect on a run"),
    ):
        assert main(["evaluate", *words]) == 1
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    (tmp_path / "latin.csv").write_bytes(b"image,patient,\xe9_label,\xe9\n")
    assert main(["evaluate", str(tmp_path / "latin.csv"), "--out", str(tmp_path)]) == 1
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_names_with_markup_are_text_on_the_page(tmp_path):
    rows = [[r[0], r[1], r[2], r[3]] for r in predicted()]
    path = write_csv(tmp_path / "<b>p.csv", rows, ("image", "patient", "<i>A$x_{$_label", "<i>A$x_{$"))
    out = tmp_path / "out"
    assert main(["evaluate", str(path), "--out", str(out), "--eval.resamples", "20"]) == 0
    page = (out / "report.html").read_text()
    assert "<b>p" not in page
    assert "<i>A" not in page
    assert "&lt;i&gt;A$x_{$" in page


# --- cards -----------------------------------------------------------------------------------------------------------


def test_cards_are_filled_from_files_and_mark_the_rest(run, tmp_path, capsys):
    from otcxr.cards import CLAIM, OPEN, TRIPOD_AI

    if not (run.path / "evaluation" / "linear.json").is_file():
        assert main(["evaluate", str(run.path), *QUICK_WORDS]) == 0
    out = tmp_path / "cards"
    assert main(["cards", str(run.path), "--out", str(out)]) == 0
    result = run.read_json("evaluation/linear.json")
    claim, tripod, card = ((out / name).read_text() for name in ("claim.md", "tripod-ai.md", "model-card.md"))
    for text, items, count in ((claim, CLAIM, 44), (tripod, TRIPOD_AI, 27)):
        assert [item.number for item in items] == [str(k + 1) for k in range(count)]
        rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| item")]
        assert len(rows) == count
        assert all(line.count(" | ") >= 3 for line in rows)
        assert sum(OPEN[:-3] in row for row in rows) >= 10  # what no file can say
    macro = result["macro"]["auroc"]
    assert f"{macro['value']:.3f} [{macro['low']:.3f}, {macro['high']:.3f}]" in claim
    fit = result["splits"]["fit"]
    assert f"fit: {fit['images']} images of {fit['patients']} patients" in claim
    assert f"AP {fit['view']['AP']}, PA {fit['view']['PA']}" in claim
    for finding, row in result["findings"].items():
        assert f"| {finding} | {row['positives']} of {row['n']} |" in card
    assert "Not a medical device" in card
    assert sum(fit["sex"].values()) == fit["images"]


def test_cards_of_a_run_that_was_not_judged(tmp_path):
    from otcxr.cards import write_cards
    from otcxr.runs import Run

    unjudged = Run(tmp_path / "run")
    unjudged.path.mkdir()
    unjudged.write_config({"data": {}, "train": {}, "method": {}})
    with pytest.raises(DataError, match="has not been evaluated; run 'otcxr evaluate"):
        write_cards(unjudged, tmp_path)
    assert not (tmp_path / "claim.md").exists()
