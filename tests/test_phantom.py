"""Phantoms: the same bytes always, labels that agree with masks and boxes, signal that is there, and no shortcut."""

import hashlib
import os
import pickle
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency

from otcxr.data.phantom import FINDINGS, PhantomConfig, PhantomImage, parse_phantom, read_phantom, render
from otcxr.data.records import VirtualImage
from otcxr.errors import ConfigError


def pixels(image):
    return image.radiograph().image


def digest(image):
    return hashlib.sha256(pixels(image).numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def many():
    """3000 records, no pixels."""
    return list(read_phantom("3000,seed=11,size=64").records)


@pytest.fixture(scope="module")
def sick():
    """Phantoms that all have both findings."""
    return read_phantom("40,seed=5,size=96,nodule_prevalence=1,effusion_prevalence=1").records


def test_radiograph_keeps_the_contract():
    record = read_phantom("3,size=64").records[2]
    assert isinstance(record.image, VirtualImage)
    assert str(record.image) == "phantom-000002"
    assert str(record.masks["lungs"]) == "phantom-000002-lungs"
    assert record.name == "phantom-000002"
    assert record.source == "phantom"
    for layer, image in {"image": record.image, **record.masks}.items():
        got = image.radiograph()
        assert got.image.shape == got.valid.shape == (1, 64, 64)
        assert got.image.dtype == torch.float32
        assert got.valid.dtype == torch.bool
        assert got.valid.all()
        assert got.spacing == record.spacing == (6.25, 6.25)
        assert 0 <= float(got.image.min()) < float(got.image.max()) <= 1, layer
        if layer != "image":
            assert set(got.image.unique().tolist()) == {0.0, 1.0}
    assert len({*record.masks.values(), record.image}) == 1 + len(record.masks)  # hashable, distinct


@pytest.mark.parametrize("size", [33, 224])
def test_range_and_type_at_other_sizes(size):
    image = render(PhantomConfig(2, seed=1, size=size), 1)
    assert image.shape == (size, size)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert image.max() - image.min() > 0.4


def test_same_seed_gives_the_same_bytes_in_any_order_and_process():
    config = PhantomConfig(12, seed=7, size=64)
    images = [PhantomImage(config, i, layer) for i in range(12) for layer in ("image", "lungs")]
    np.random.seed(0)  # noqa: NPY002  (the global state must play no part)
    forward = [digest(image) for image in images]
    np.random.seed(1)  # noqa: NPY002
    assert [digest(image) for image in reversed(images)][::-1] == forward
    assert [digest(pickle.loads(pickle.dumps(image))) for image in images[:4]] == forward[:4]
    assert len(set(forward)) == len(forward)
    code = (
        "import hashlib\nfrom otcxr.data.phantom import PhantomConfig, PhantomImage\n"
        "i = PhantomImage(PhantomConfig(12, seed=7, size=64), 9).radiograph().image\n"
        "print(hashlib.sha256(i.numpy().tobytes()).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "3"},
    )
    assert run.stdout.strip() == forward[18]


def test_another_seed_gives_other_pixels_and_other_records():
    a, b = (read_phantom(f"60,seed={seed},size=64").records for seed in (1, 2))
    assert float((pixels(a[0].image) - pixels(b[0].image)).abs().mean()) > 0.01
    assert [r.labels for r in a] != [r.labels for r in b]
    assert [r.split for r in a] != [r.split for r in b]


def test_an_image_does_not_depend_on_the_count():
    few, more = read_phantom("5,seed=3,size=64").records, read_phantom("50,seed=3,size=64").records
    for a, b in zip(few, more, strict=False):
        assert a[1:8] == b[1:8]
        assert (a.labels, a.boxes, a.split) == (b.labels, b.boxes, b.split)
        assert digest(a.image) == digest(b.image)


def test_sequence_counts_and_slices():
    records = read_phantom("7").records
    assert len(records) == len(list(records)) == 7
    assert records[-1].name == "phantom-000006"
    assert [r.name for r in records[2:4]] == ["phantom-000002", "phantom-000003"]
    with pytest.raises(IndexError):
        records[7]


@pytest.mark.parametrize(("count", "size", "least"), [(80, 64, 15), (24, 200, 3)])
def test_labels_masks_and_boxes_agree(count, size, least):
    records = read_phantom(f"{count},seed=2,size={size}").records
    seen = Counter()
    for record in records:
        assert set(record.labels) == set(FINDINGS)
        for finding in FINDINGS:
            boxes = [box for box in record.boxes if box.finding == finding]
            assert record.labels[finding] == (finding in record.masks) == bool(boxes)
            if not boxes:
                assert not pixels(PhantomImage(record.image.config, record.image.index, finding)).any()
                continue
            seen[finding] += 1
            rows, columns = np.nonzero(pixels(record.masks[finding])[0].numpy())
            inside = np.zeros((len(boxes), len(rows)), bool)
            for k, box in enumerate(boxes):
                assert min(box.x, box.y, box.width, box.height) >= 0
                assert max(box.x + box.width, box.y + box.height) <= size
                left, top = box.x - 1e-3, box.y - 1e-3
                right, bottom = left + box.width + 2e-3, top + box.height + 2e-3
                inside[k] = (columns >= left) & (columns + 1 <= right) & (rows >= top) & (rows + 1 <= bottom)
                own = inside[k]
                assert own.any(), "a box without a pixel of its mask"
                # tight: no more than four pixels of air on any side
                assert right - columns[own].max() - 1 < 4
                assert columns[own].min() - left < 4
                assert bottom - rows[own].max() - 1 < 4
                assert rows[own].min() - top < 4
            assert inside.any(0).all(), "a pixel of the mask outside every box"
    assert min(seen.values()) > least


@pytest.mark.parametrize("size", [32, 48])
def test_no_planted_finding_vanishes_at_small_sizes(size):
    records = read_phantom(f"150,seed=3,size={size},nodule_prevalence=1,effusion_prevalence=1").records
    assert all(pixels(record.masks[finding]).any() for record in records for finding in FINDINGS)


def test_findings_lie_where_they_belong(sick):
    for record in sick:
        lungs = pixels(record.masks["lungs"]) > 0
        fluid = pixels(record.masks["Effusion"]) > 0
        nodule = pixels(record.masks["Nodule"]) > 0
        assert not (fluid & ~lungs).any()
        assert float((nodule & lungs).sum() / nodule.sum()) > 0.6
        assert not (nodule & fluid).sum() > 0.2 * nodule.sum()
        assert not (lungs & (pixels(record.masks["heart"]) > 0)).any()
        rows_of = [torch.nonzero(mask[0])[:, 0].float().mean() for mask in (fluid, lungs)]
        assert rows_of[0] > rows_of[1]  # fluid sinks
        assert float(fluid.sum() / lungs.sum()) < 0.5


def test_anatomy_has_the_right_greys():
    for record in read_phantom("30,seed=8,size=96,nodule_prevalence=0,effusion_prevalence=0").records:
        image = pixels(record.image)[0]
        lungs, heart = (pixels(record.masks[name])[0] > 0 for name in ("lungs", "heart"))
        columns = torch.nonzero(lungs)[:, 1]
        rows = torch.nonzero(lungs)[:, 0]
        middle = int((columns.min() + columns.max()) / 2)
        spine = image[int(rows.float().mean()) : int(rows.max()), middle - 3 : middle + 4]
        assert image[lungs].mean() < spine.mean() - 0.08
        assert image[lungs].mean() < image[heart].mean() - 0.05
        assert 0.12 < float(lungs.float().mean()) < 0.5
        assert torch.nonzero(heart)[:, 1].float().mean() > middle  # the heart lies to the patient's left


def test_planted_signal_is_in_the_pixels(sick):
    gains = defaultdict(list)
    for index, record in enumerate(sick):
        config = record.image.config
        difference = pixels(record.image)[0].numpy() - render(config, index, findings=False)
        outside = np.ones_like(difference, bool)
        for finding in FINDINGS:
            mask = pixels(record.masks[finding])[0].numpy() > 0
            gains[finding].append(float(difference[mask].mean()))
            outside &= ~mask
        assert np.abs(difference[: 96 // 8]).mean() < 0.01  # far from the findings next to nothing changes
        assert np.median(np.abs(difference[outside])) < 0.02
    for finding in FINDINGS:
        assert min(gains[finding]) > 0.005, finding
    assert np.mean(gains["Effusion"]) > 0.05
    assert np.mean(gains["Nodule"]) > 0.03


def test_findings_can_be_left_out_only_where_they_are():
    config = PhantomConfig(8, seed=4, size=64, nodule_prevalence=0, effusion_prevalence=0)
    assert np.array_equal(render(config, 3), render(config, 3, findings=False))


def test_patients_stay_within_a_split(many):
    splits, studies = defaultdict(set), defaultdict(list)
    for record in many:
        splits[record.patient].add(record.split)
        studies[record.patient].append(record.study)
    assert all(len(found) == 1 for found in splits.values())
    share = Counter(next(iter(found)) for found in splits.values())
    assert share["train"] / len(splits) == pytest.approx(0.7, abs=0.05)
    assert share["val"] / len(splits) == pytest.approx(0.1, abs=0.03)
    assert share["test"] / len(splits) == pytest.approx(0.2, abs=0.04)
    counts = [len(found) for found in studies.values()]
    assert set(counts) == {1, 2, 3, 4}
    assert np.mean(np.array(counts) > 1) > 0.4
    assert len({record.study for record in many}) == len(many)
    visits = {name: [len(s) for p, s in studies.items() if splits[p] == {name}] for name in share}
    assert np.mean(visits["train"]) == pytest.approx(np.mean(visits["test"]), abs=0.3)
    collection = read_phantom("300,seed=1")
    assert sum(len(collection.split(name).records) for name in ("train", "val", "test")) == 300


def test_anatomy_stays_with_the_patient():
    records = list(read_phantom("60,seed=6,size=64").records)
    lungs = [pixels(record.masks["lungs"]).numpy() > 0 for record in records]

    def centred(mask):
        rows, columns = np.nonzero(mask[0])
        return np.roll(mask[0], (32 - round(rows.mean()), 32 - round(columns.mean())), (0, 1))

    overlap = {True: [], False: []}
    for i in range(60):
        for j in range(i):
            a, b = centred(lungs[i]), centred(lungs[j])
            if records[i].sex == records[j].sex:  # women are drawn smaller: that must not be what tells patients apart
                overlap[records[i].patient == records[j].patient].append((a & b).sum() / (a | b).sum())
    assert len(overlap[True]) > 20
    assert np.mean(overlap[True]) > np.mean(overlap[False]) + 0.04
    assert max(overlap[True]) < 1  # pose and breathing differ


def test_first_study_does_not_repeat_the_draws_of_the_anatomy():
    """numpy pads entropy with zeros: a study numbered 0 would share its stream with the patient."""
    first = read_phantom("400,seed=9").records
    assert all(not record.study.endswith("-0") for record in first)


def test_prevalence_follows_the_settings(many):
    for finding in FINDINGS:
        assert np.mean([record.labels[finding] for record in many]) == pytest.approx(0.35, abs=0.03)
    rare = read_phantom("1000,nodule_prevalence=0.1,effusion_prevalence=0").records
    assert np.mean([record.labels["Nodule"] for record in rare]) == pytest.approx(0.1, abs=0.03)
    assert not any(record.labels["Effusion"] for record in rare)
    nodules = Counter(sum(box.finding == "Nodule" for box in record.boxes) for record in many)
    assert set(nodules) == {0, 1, 2, 3}


@pytest.mark.parametrize("finding", FINDINGS)
def test_findings_are_independent_of_what_is_not_disease(many, finding):
    other = FINDINGS[1 - FINDINGS.index(finding)]
    traits = {
        "view": lambda r: r.view, "sex": lambda r: r.sex, "age": lambda r: r.age >= 54, "split": lambda r: r.split,
        other: lambda r: r.labels[other],
    }  # fmt: skip
    for name, trait in traits.items():
        table = Counter((record.labels[finding], trait(record)) for record in many)
        values = sorted({value for _, value in table}, key=str)
        assert len(values) > 1, name
        assert chi2_contingency([[table[label, value] for value in values] for label in (0, 1)]).pvalue > 1e-3, name


def test_brightness_says_nothing_of_the_label():
    records = list(read_phantom("300,seed=12,size=64").records)
    mean = np.array([float(pixels(record.image).mean()) for record in records])
    assert mean.std() > 0.02  # exposure varies
    for finding in FINDINGS:
        label = np.array([record.labels[finding] for record in records])
        above = (mean[label == 1][:, None] > mean[label == 0]).mean()  # AUROC of the mean grey
        assert 0.38 < above < 0.62, finding


def test_ap_magnifies_the_heart():
    area = defaultdict(list)
    for record in read_phantom("150,seed=13,size=64").records:
        area[record.view].append(float(pixels(record.masks["heart"]).mean() / pixels(record.masks["lungs"]).mean()))
    assert set(area) == {"AP", "PA"}
    assert np.mean(area["AP"]) > 1.3 * np.mean(area["PA"])


def test_parse_reads_the_settings():
    assert parse_phantom("2000") == PhantomConfig(2000)
    assert parse_phantom("2000, seed=100 ,size=96") == PhantomConfig(2000, seed=100, size=96)
    assert parse_phantom("5,nodule_prevalence=0.5,noise=0").nodule_prevalence == 0.5
    collection = read_phantom("5,seed=1")
    assert (collection.name, collection.findings) == ("phantom:5,seed=1", ("Nodule", "Effusion"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2000,sed=1", "did you mean 'seed'"),
        ("2000,banana=1", "known: .*size"),
        ("2000,size=big", "must be a whole number, got 'big'"),
        ("2000,noise=much", "must be a number, got 'much'"),
        ("many", "count .*got 'many'"),
        ("", "count .*got ''"),
        ("seed=4", "lacks the number of images"),
        ("2000,seed=1,seed=2", "twice"),
        ("0", r"count is 0 but must be .*\[1"),
        ("9,size=16", r"size is 16 but .*\[32, 1024\]"),
        ("9,size=2048", "size is 2048"),
        ("9,seed=-1", "seed is -1"),
        ("9,nodule_prevalence=1.5", r"nodule_prevalence is 1.5 but .*\[0, 1\]"),
        ("9,effusion_prevalence=nan", "effusion_prevalence is nan"),
    ],
)
def test_bad_settings_name_the_fix(text, message):
    with pytest.raises(ConfigError, match=message):
        read_phantom(text)


def test_unknown_layer_is_an_error():
    with pytest.raises(ConfigError, match="did you mean 'lungs'"):
        PhantomImage(PhantomConfig(1, size=32), 0, "lung").radiograph()
