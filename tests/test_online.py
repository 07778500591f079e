"""The online judgement: right numbers, honest patients, and no trace of it in the training."""

import copy
import json
import math
import random
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning

from conftest import encode_png
from otcxr import online
from otcxr.console import SilentProgress
from otcxr.data import open_collection
from otcxr.data.dataset import PixelCache
from otcxr.data.records import Collection, Record
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.classify import fit_probe, knn_scores
from otcxr.evaluation.features import pooled_features
from otcxr.evaluation.statistics import evaluate_scores
from otcxr.nn.encoder import Architecture, Encoder, build_encoder
from otcxr.online import OnlineProbe

# --- nearest neighbours ----------------------------------------------------------------------------------------------


def knn_by_loops(features, labels, queries, neighbours, temperature):
    """One query, one finding and one image at a time, straight from the definition."""

    def cosine(u, v):
        dot = math.fsum(a * b for a, b in zip(u, v, strict=True))
        length = math.sqrt(math.fsum(a * a for a in u)) * math.sqrt(math.fsum(b * b for b in v))
        return round(dot / length, 12) if length else 0.0

    scores = [[math.nan] * labels.shape[1] for _ in queries]
    for m, query in enumerate(queries):
        for f in range(labels.shape[1]):
            ranked = sorted(
                (-cosine(query, x), n) for n, x in enumerate(features) if not math.isnan(labels[n, f])
            )  # of equally similar ones the earlier first
            if not ranked:
                continue
            nearest = [(math.exp(-c / temperature), labels[n, f]) for c, n in ranked[:neighbours]]
            scores[m][f] = math.fsum(w * y for w, y in nearest) / math.fsum(w for w, _ in nearest)
    return np.array(scores).reshape(len(queries), labels.shape[1])


@st.composite
def knn_problems(draw):
    """Small whole numbers: many exact ties, repeated images, vectors of zeros; some labels missing, or all of one."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images, queries, channels = draw(st.integers(1, 30)), draw(st.integers(0, 6)), draw(st.integers(1, 4))
    span = draw(st.sampled_from([1, 2, 50]))
    features = rng.integers(-span, span + 1, (images + queries, channels)).astype(np.float64)
    labels = rng.integers(0, 2, (images, draw(st.integers(0, 4)))).astype(np.float64)
    labels[rng.random(labels.shape) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = np.nan
    options = {"neighbours": draw(st.integers(1, 35)), "temperature": draw(st.sampled_from([0.07, 0.5, 10.0]))}
    return features[:images], labels, features[images:], options


@settings(max_examples=150, deadline=None)
@given(knn_problems())
def test_knn_is_the_definition(problem):
    features, labels, queries, options = problem
    scores = knn_scores(features, labels, queries, **options)
    assert scores.shape == (len(queries), labels.shape[1])
    np.testing.assert_allclose(scores, knn_by_loops(features, labels, queries, **options), rtol=0, atol=1e-9)
    finite = scores[~np.isnan(scores)]
    assert ((finite >= 0) & (finite <= 1)).all()
    # only directions count, and float32 is enough to say whole numbers
    scaled = knn_scores((features * 8).astype(np.float32), labels, queries * 0.5, **options)
    np.testing.assert_array_equal(scores, scaled)


@settings(max_examples=50, deadline=None)
@given(knn_problems(), st.integers(0, 2**32 - 1))
def test_knn_forgets_what_is_not_assessed(problem, seed):
    """Images without a label are as if they were not there; queries do not know of each other."""
    features, labels, queries, options = problem
    scores = knn_scores(features, labels, queries, **options)
    for f in range(labels.shape[1]):
        seen = ~np.isnan(labels[:, f])
        alone = knn_scores(features[seen], labels[seen, f : f + 1], queries, **options) if seen.any() else np.nan
        np.testing.assert_array_equal(scores[:, f : f + 1], alone)
    order = np.random.default_rng(seed).permutation(len(queries))
    np.testing.assert_array_equal(knn_scores(features, labels, queries[order], **options), scores[order])


def test_knn_takes_the_earlier_of_equal_neighbours():
    features = np.array([[1.0, 0], [2, 0], [0, 1], [3, 0], [0.1, 0]])
    labels = np.array([[1.0], [0], [1], [0], [0]])
    for neighbours, share in ((1, 1), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)):
        assert knn_scores(features, labels, [[7.0, 0]], neighbours=neighbours)[0, 0] == share
    # parallel vectors, whose cosines differ by rounding alone
    line = np.random.default_rng(0).standard_normal(37)
    features, labels = np.outer(np.linspace(0.1, 9, 200), line), (np.arange(200) < 20)[:, None].astype(float)
    assert (knn_scores(features, labels, np.outer(np.linspace(0.3, 7, 50), line)) == 1).all()


def test_knn_weighs_by_similarity():
    features = np.array([[1.0, 0], [2, 0], [0, 1], [3, 0], [0.1, 0]])
    labels = np.array([[1.0], [0], [1], [0], [0]])
    far = knn_scores(features, labels, [[1.0, 0]], neighbours=5, temperature=0.07)[0, 0]
    assert far == pytest.approx((1 + math.exp(-1 / 0.07)) / (4 + math.exp(-1 / 0.07)))


def test_knn_of_equal_queries_is_equal_and_of_one_kind_exact(monkeypatch):
    """No rounding may rank what is the same: a collapsed encoder scores 0.5, not the noise of a matrix product."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((301, 37)).astype(np.float32)
    same = np.repeat(rng.standard_normal((1, 37)), 203, axis=0)
    labels = rng.integers(0, 2, (301, 3)).astype(float)
    labels[:, 1], labels[:, 2] = 1, 0
    scores = knn_scores(features, labels, same)
    assert (scores == scores[0]).all()
    assert 0 < scores[0, 0] < 1
    many = knn_scores(features, labels, rng.standard_normal((200, 37)))
    assert (many[:, 1] == 1).all()
    assert (many[:, 2] == 0).all()
    assert len(set(many[:, 0])) > 100
    monkeypatch.setattr("otcxr.evaluation.classify._BLOCK_BYTES", 10_000)  # many blocks, the same numbers
    assert (knn_scores(features, labels, same) == scores).all()


def test_knn_survives_extreme_numbers():
    features = np.array([[1e300, 0], [0, 1e-300], [0, 0]])
    labels = np.array([[1.0], [0], [0]])
    np.testing.assert_array_equal(
        knn_scores(features, labels, [[1e-310, 0], [0, 1e200]], neighbours=2, temperature=1e-4), [[1.0], [0.0]]
    )


def test_knn_refuses_what_makes_no_sense():
    x, y = np.ones((4, 3)), np.zeros((4, 2))
    for bad in ({"neighbours": 0}, {"temperature": 0.0}, {"temperature": math.nan}, {"temperature": -1.0}):
        with pytest.raises(ConfigError, match="received"):
            knn_scores(x, y, x, **bad)
    for features, labels, queries in (
        (x, y, np.ones((4, 2))), (x, y[:3], x), (x, y[:, 0], x), (x[0], y, x), (x[:0], y[:0], x),
        (x[:, :0], y, x[:, :0]),
    ):  # fmt: skip
        with pytest.raises(DataError, match="expected"):
            knn_scores(features, labels, queries)
    with pytest.raises(DataError, match=r"1 of 8 are not"):
        knn_scores(x, np.array([[0, 1], [1, -1], [0, 0], [1, np.nan]]), x)
    with pytest.raises(DataError, match=r"queries must be finite, but 1 of 4"):
        knn_scores(x, y, np.array([[1, 1, 1], [np.nan, 1, 1], [1, 1, 1], [1, 1, 1]]))


def test_a_single_strength_is_fitted_as_if_it_had_been_chosen():
    """Without cross-validation the probe is the very one that cross-validation among equals would have left."""
    rng = np.random.default_rng(3)
    features = rng.standard_normal((120, 9)).astype(np.float32)
    labels = (features[:, :2] + rng.standard_normal((120, 2)) > 0).astype(float)
    labels[rng.random(labels.shape) < 0.1] = np.nan
    patients = [f"P{i // 2}" for i in range(120)]
    one, two = (
        fit_probe(features, labels, patients, ("A", "B"), strengths=strengths, folds=3, seed=0)
        for strengths in ((0.01,), (0.01, 0.01))
    )
    assert all((a == b).all() for a, b in zip(one[1:], two[1:], strict=True))
    # among different ones it still chooses, whatever their order
    rising, falling = (
        fit_probe(features, labels, patients, ("A", "B"), strengths=strengths, folds=3, seed=0).strength
        for strengths in ((1e-3, 1e-1, 10.0), (10.0, 1e-1, 1e-3))
    )
    assert (rising == falling).all()


# --- whom it is judged on --------------------------------------------------------------------------------------------


class Rendered(NamedTuple):
    """A phantom that is rendered once for all tests."""

    name: str

    def __str__(self):
        return self.name

    def radiograph(self):
        return RENDERED[self.name]


RENDERED = {}


@pytest.fixture(scope="module")
def phantoms():
    collection = open_collection("phantom:600,seed=1,size=32,lesion_size=2")
    records = list(collection.records)
    RENDERED.update((r.name, r.image.radiograph()) for r in records)
    return collection._replace(records=[r._replace(image=Rendered(r.name)) for r in records])


def choose(collection, training=None, **changes):
    options = {"images": 80, "size": 32, "seed": 0, "batch_size": 32} | changes
    return OnlineProbe.choose(collection, training or collection.split("train"), **options)


def names(part):
    return [record.name for record in part.records]


def people(part):
    return {record.patient for record in part.records}


def splits(part):
    return {record.split for record in part.records}


def without(collection, *unwanted):
    return collection._replace(records=[r for r in collection.records if r.split not in unwanted])


def test_fits_on_train_and_judges_on_val(phantoms):
    probe = choose(phantoms)
    assert (splits(probe.fit), splits(probe.judged), probe.judged_on) == ({"train"}, {"val"}, "val")
    assert len(probe.fit.records) == len(set(names(probe.fit))) == 80
    assert not people(probe.fit) & people(probe.judged)
    # everyone once before anyone twice
    assert len(people(probe.fit)) == 80
    val = phantoms.split("val")
    assert len(people(probe.judged)) == min(80, len(people(val)))
    assert len(probe.judged.records) == min(80, len(val.records))
    assert probe.findings == phantoms.findings


@pytest.mark.parametrize("training", ["train", "", "val", "no splits"])
def test_holds_patients_out_where_there_is_no_val(phantoms, training):
    if training == "no splits":
        collection = trained = phantoms._replace(records=[r._replace(split="") for r in phantoms.records])
    elif training == "":  # a source whose only other split is the test
        collection = phantoms._replace(
            records=[r if r.split == "test" else r._replace(split="train") for r in phantoms.records]
        )
        trained = collection.split("train")
    elif training == "val":  # trained on: it cannot be what is judged on as well
        collection = phantoms._replace(
            records=[r if r.split == "test" else r._replace(split="val") for r in phantoms.records]
        )
        trained = collection.split("val")
    else:
        collection = without(phantoms, "val")
        trained = collection.split("train")
    probe = choose(collection, trained)
    assert probe.judged_on == "patients held out of train"
    assert not people(probe.fit) & people(probe.judged)
    assert len(probe.fit.records) == len(probe.judged.records) == 80
    assert "test" not in splits(probe.fit) | splits(probe.judged)
    assert {*names(probe.fit), *names(probe.judged)} <= {r.name for r in trained.records}
    everything = choose(collection, trained, images=10_000)
    assert len(everything.fit.records) + len(everything.judged.records) == len(trained.records)
    assert abs(len(people(everything.fit)) - len(people(everything.judged))) <= 1
    assert not people(everything.fit) & people(everything.judged)


def test_nobody_of_another_split_is_ever_used(phantoms):
    """Also where the source's splits part patients, which pre-training without evaluation need not notice."""
    test = [r for r in phantoms.records if r.split == "test"]
    val_patients = sorted(people(phantoms.split("val")))[:5]
    train_patients = sorted(people(phantoms.split("train")))[:40]
    strays = [test[0]._replace(patient=patient) for patient in val_patients + train_patients]
    training = phantoms.split("train")
    shared = [training.records[0]._replace(split="val"), *(r._replace(split="odd") for r in test[1:3])]
    mixed = phantoms._replace(records=[*phantoms.records, *strays, *shared])
    probe = choose(mixed, training, images=10_000)
    chosen = people(probe.fit) | people(probe.judged)
    assert not chosen & {*val_patients, *train_patients, training.records[0].patient, test[1].patient}
    assert (splits(probe.fit), splits(probe.judged)) == ({"train"}, {"val"})
    assert choose(phantoms, phantoms._replace(records=test)) is None


def test_the_draw_depends_on_the_seed_only(phantoms):
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    one, two, other = choose(phantoms), choose(phantoms, batch_size=7, memory_gb=2.0), choose(phantoms, seed=1)
    assert (torch.get_rng_state() == before[0]).all()
    assert (repr(np.random.get_state()), random.getstate()) == before[1:]  # noqa: NPY002
    assert names(one.fit) == names(two.fit)
    assert names(one.judged) == names(two.judged)
    assert (one.fit.images == two.fit.images).all()
    assert names(one.fit) != names(other.fit)
    fewer = choose(phantoms, images=40)
    assert names(one.fit)[:40] == names(fewer.fit)


def test_memory_bounds_the_number_of_images(phantoms):
    probe = choose(phantoms, memory_gb=2 * 4 * 32**2 * 60.5 / 1e9)
    assert len(probe.fit.records) == 60
    assert sum(part.images.nbytes for part in (probe.fit, probe.judged)) <= 2 * 4 * 32**2 * 60


def test_nothing_to_judge_is_none(phantoms, caplog):
    assert choose(phantoms, images=0) is None
    assert choose(phantoms, memory_gb=0.0) is None
    assert choose(phantoms._replace(findings=())) is None
    unlabelled = phantoms._replace(records=[r._replace(labels={}) for r in phantoms.records])
    assert choose(unlabelled) is None
    healthy = phantoms._replace(records=[r._replace(labels=dict.fromkeys(r.labels, 0)) for r in phantoms.records])
    assert choose(healthy) is None
    caplog.set_level("INFO")
    assert choose(phantoms, images=8) is None
    assert "no online judgement" in caplog.text
    for bad in ({"images": -1}, {"size": 8}, {"seed": -1}, {"batch_size": 0}, {"memory_gb": -1.0}):
        with pytest.raises(ConfigError, match="the online judgement needs"):
            choose(phantoms, **bad)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("label", [0, 1])
def test_a_finding_needs_five_patients_on_each_side_of_both_parts(phantoms, split, label):
    """Five are enough, four are not; the images of one patient count once."""

    def only(count):
        chosen = sorted(r.patient for r in phantoms.split(split).records)[:: 3 if split == "train" else 1]
        kept = set(list(dict.fromkeys(chosen))[:count])
        return phantoms._replace(
            findings=("A", "Rare"),
            records=[
                r._replace(labels={"A": r.labels["Effusion"], "Rare": label if r.patient in kept else 1 - label})
                if r.split == split
                else r._replace(labels={"A": r.labels["Effusion"], "Rare": r.labels["Nodule"]})
                for r in phantoms.records
            ],
        )

    assert choose(only(4), images=10_000).findings == ("A",)
    # with 5 of them a resample misses all in 0.7 % on average; whether that is tolerated is for the resamples to say
    assert choose(only(12), images=10_000).findings == ("A", "Rare")
    if split == "train":
        assert choose(only(5), images=10_000).findings == ("A", "Rare")


# --- pictures whose brightness is the label --------------------------------------------------------------------------


class Fake(Encoder):
    """An encoder of one map made from each picture's mean brightness, (B, 2): (mean, 1 - mean), times its weight."""

    channels, strides = (2,), (32,)

    def __init__(self, weight=1.0):
        super().__init__()
        self.architecture = Architecture("fake", 1, 4, 32)
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, images):
        mean = images.mean((1, 2, 3)) - 0.5
        features = torch.stack((0.5 + mean, 0.5 - mean), dim=1)
        return (features[:, :, None, None] * self.weight,)


class Constant(Fake):
    """Complete collapse."""

    def forward(self, images):
        return (torch.full((len(images), 3, 1, 1), 0.3, dtype=images.dtype) * self.weight,)


@pytest.fixture
def bright(tmp_path):
    """60 + 40 PNG files of as many patients, bright with the finding and dark without; a few that are no pictures."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(100):
        label, split = number % 2, "train" if number < 60 else "val"
        path = tmp_path / f"{number:03d}.png"
        path.write_bytes(encode_png(rng.integers(20, 100, (20, 30), dtype=np.uint8) + np.uint8(100 * label)))
        records.append(Record(path, f"S{number}", f"P{number}", labels={"Bright": label}, split=split))
    broken = [tmp_path / "cut.png", tmp_path / "missing.png", tmp_path / "empty.png"]
    broken[0].write_bytes((tmp_path / "000.png").read_bytes()[:60])
    broken[2].write_bytes(b"")
    records += [
        Record(path, f"{split}{path.name}", f"{split}{path.name}", labels={"Bright": 1}, split=split)
        for path in broken
        for split in ("train", "val")
    ]
    return Collection("bright", ("Bright",), records)


def test_a_perfect_encoder_scores_one_and_a_constant_one_a_half(bright):
    probe = choose(bright)
    assert (len(probe.fit.records), len(probe.judged.records)) == (60, 40)  # all that can be read
    perfect = probe.judge(Fake())
    for kind in ("knn", "linear"):
        assert (perfect[kind]["auroc"]["value"], perfect[kind]["auroc"]["low"]) == (1, 1)
        assert perfect[kind]["auroc"]["caution"]  # resamples all agree
        assert perfect[kind]["findings"]["Bright"]["auroc"]["value"] == 1
    assert OnlineProbe.score(perfect) == 1
    constant = probe.judge(Constant())
    for kind in ("knn", "linear"):
        assert [constant[kind]["auroc"][name] for name in ("value", "low", "high")] == [0.5, 0.5, 0.5]
    assert OnlineProbe.score(constant) == 0.5
    held_out = choose(without(bright, "val"))
    assert held_out.judged_on == "patients held out of train"
    assert OnlineProbe.score(held_out.judge(Fake())) == 1


def test_broken_images_are_replaced_by_readable_ones(bright):
    """``images`` are found although others before them cannot be read, also when a whole block is broken."""
    for seed in range(4):
        probe = choose(bright, images=38, seed=seed)
        assert len(probe.fit.records) == len(probe.judged.records) == 38
    cut = bright.records[100].image
    ruined = [r._replace(image=cut, patient=f"{r.patient}-{i}") for i in range(40) for r in bright.records[:60]]
    probe = choose(bright._replace(records=[*bright.records, *ruined]), images=60)
    assert len(probe.fit.records) == 60
    assert "cut.png" not in names(probe.fit)
    all_broken = bright._replace(records=[r._replace(image=cut) for r in bright.records])
    assert choose(all_broken) is None


def test_features_that_are_not_finite_are_told(bright):
    probe = choose(bright)
    result = probe.judge(Fake(math.inf))
    assert math.isnan(OnlineProbe.score(result))
    assert not OnlineProbe.score(result) > -math.inf
    for kind in ("knn", "linear"):
        assert result[kind]["auroc"]["value"] is None
        assert "features of 100 of 100 images are not finite" in result[kind]["findings"]["Bright"]["auroc"]["note"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_fit_that_does_not_converge_is_a_caution_and_no_warning(bright, monkeypatch):
    def stubborn(*args, **kwargs):
        warnings.warn("lbfgs failed to converge", ConvergenceWarning, stacklevel=1)
        return fit_probe(*args, **kwargs)

    def odd(*args, **kwargs):
        warnings.warn("something else", UserWarning, stacklevel=1)
        return fit_probe(*args, **kwargs)

    probe = choose(bright)
    plain = probe.judge(Fake())
    assert "converged" not in plain["linear"]["auroc"]["caution"]
    monkeypatch.setattr(online, "fit_probe", stubborn)
    result = probe.judge(Fake())
    assert result["linear"]["auroc"]["caution"].endswith("; 1 of 1 fits stopped before they converged")
    assert result["linear"]["auroc"]["value"] == 1
    assert result["knn"] == plain["knn"]
    monkeypatch.setattr(online, "fit_probe", odd)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.warns(UserWarning, match="something else"):
            probe.judge(Fake())


# --- what it says, and that it leaves no trace -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(phantoms):
    return choose(phantoms)


@pytest.fixture
def encoder():
    """A tiny network that is in the middle of something: statistics, gradients, and modes that do not agree."""
    encoder = build_encoder("resnet18", width=4, stride=16, seed=0)
    encoder.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        encoder(torch.rand(4, 1, 32, 32, generator=generator))[-1].square().mean().backward()
    for number, module in enumerate(encoder.modules()):
        module.training = number % 3 != 1
    return encoder


def test_numbers_are_those_of_evaluation(phantoms, probe, encoder):
    """The same features, scores and statistics as the parts that evaluation is made of."""
    result = probe.judge(encoder)
    parts = [phantoms._replace(records=part.records) for part in (probe.fit, probe.judged)]
    fit, judged = (
        pooled_features(copy.deepcopy(encoder), part.records, 32, 32, PixelCache(1.0), None, SilentProgress(), "")
        for part in parts
    )
    labels, truth = (
        np.array([[r.labels[f] for f in phantoms.findings] for r in p.records], dtype=float) for p in parts
    )
    patients = [[r.patient for r in p.records] for p in parts]
    linear = fit_probe(fit, labels, patients[0], phantoms.findings, strengths=(0.01,), folds=2, seed=0)
    for kind, scores in (("knn", knn_scores(fit, labels, judged)), ("linear", linear.score(judged))):
        table = evaluate_scores(truth, scores, patients[1], phantoms.findings, resamples=200, seed=0)
        assert result[kind]["auroc"]["value"] == table.macro.measures["auroc"].value
        assert (result[kind]["auroc"]["low"], result[kind]["auroc"]["high"]) == table.macro.measures["auroc"][1:3]
        for row in table.findings:
            assert result[kind]["findings"][row.finding]["auroc"]["value"] == row.measures["auroc"].value
    assert result["findings"] == list(phantoms.findings)
    assert (result["images_fit"], result["images_judged"]) == (len(fit), len(judged))
    assert (result["patients_fit"], result["patients_judged"]) == (len(set(patients[0])), len(set(patients[1])))
    assert result["judged_on"] == "val"
    assert OnlineProbe.score(result) == result["knn"]["auroc"]["value"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert probe.judge(encoder) == result


def state(encoder):
    return (
        {name: value.clone() for name, value in encoder.state_dict().items()},
        {name: p.grad if p.grad is None else p.grad.clone() for name, p in encoder.named_parameters()},
        [module.training for module in encoder.modules()],
        [p.requires_grad for p in encoder.parameters()],
        [p.data_ptr() for p in encoder.parameters()],
    )


def test_leaves_no_trace_in_the_encoder_or_the_random_states(probe, encoder):
    next(iter(encoder.parameters())).requires_grad_(False)
    modes = {module.training for module in encoder.modules()}
    assert modes == {True, False}
    before = state(encoder)
    states = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    seen = []
    hook = encoder.register_forward_hook(lambda m, _, __: seen.append({c.training for c in m.modules()}))
    probe.judge(encoder)
    hook.remove()
    assert seen
    assert all(modes == {False} for modes in seen)
    assert (torch.get_rng_state() == states[0]).all()
    assert (repr(np.random.get_state()), random.getstate()) == states[1:]  # noqa: NPY002
    after = state(encoder)
    for old, new in zip(before[:2], after[:2], strict=True):
        assert old.keys() == new.keys()
        assert all((old[k] is None and new[k] is None) or torch.equal(old[k], new[k]) for k in old)
    assert before[2:] == after[2:]
    assert torch.is_grad_enabled()


def test_modes_come_back_when_the_encoder_fails(probe, encoder):
    class Broken(Fake):
        def forward(self, images):
            raise RuntimeError("out of memory")

    broken = Broken()
    broken.part = encoder
    before = state(broken)[2]
    with pytest.raises(RuntimeError, match="out of memory"):
        probe.judge(broken)
    assert state(broken)[2] == before
    assert torch.is_grad_enabled()


def test_a_training_that_is_judged_is_the_one_that_is_not(probe):
    """Bit for bit, with BatchNorm, momentum, and noise from the global generators that the judgement must not move."""

    def train(judge):
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        random.seed(5)
        encoder = build_encoder("resnet18", width=4, stride=16, seed=0).train()
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
        for _ in range(4):
            images = torch.rand(8, 1, 32, 32) + float(np.random.random()) + random.random()  # noqa: NPY002
            (torch.nn.functional.dropout(encoder(images)[-1]).square().mean() - 1).square().backward()
            if judge:
                probe.judge(encoder)  # in the worst moment, between backward and step
            optimizer.step()
            optimizer.zero_grad()
            if judge:
                probe.judge(encoder)
        return encoder.state_dict(), optimizer.state_dict()["state"]

    with torch.random.fork_rng():
        kept = np.random.get_state(), random.getstate()  # noqa: NPY002
        (weights, moments), (other, other_moments) = train(False), train(True)
        np.random.set_state(kept[0])  # noqa: NPY002
        random.setstate(kept[1])
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert all(torch.equal(moments[i][name], other_moments[i][name]) for i in moments for name in moments[i])


def test_an_encoder_in_double_precision_is_judged_as_it_is(probe, encoder):
    single = probe.judge(encoder)
    seen = []
    double = copy.deepcopy(encoder).double()
    double.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    result = probe.judge(double)
    assert set(seen) == {torch.float64}
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    for kind in ("knn", "linear"):
        assert result[kind]["auroc"]["value"] == pytest.approx(single[kind]["auroc"]["value"], abs=2e-3)


def test_batches_do_not_change_the_judgement(phantoms, probe, encoder):
    other = choose(phantoms, batch_size=11).judge(encoder)
    assert other["knn"]["auroc"]["value"] == pytest.approx(probe.judge(encoder)["knn"]["auroc"]["value"], abs=2e-3)
