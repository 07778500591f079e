"""Phantoms: the same bytes always, labels that agree with masks and boxes, signal that is there, and no shortcut."""

import hashlib
import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter, defaultdict

import cv2
import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from otcxr.data.phantom import (
    FINDINGS,
    PhantomConfig,
    PhantomImage,
    _scene,
    parse_phantom,
    planted,
    read_phantom,
    render,
)
from otcxr.data.phantom_render import attenuation
from otcxr.data.records import VirtualImage, column
from otcxr.errors import ConfigError

ACUTE = ("Consolidation", "Effusion", "Pneumothorax", "Edema")
CHRONIC = ("Nodule", "Mass", "Cardiomegaly")


def alone(finding, count, seed=5, size=96, more=""):
    """A source whose phantoms all have one finding and no other."""
    return f"{count},seed={seed},size={size},prevalence=0,{finding.lower()}_prevalence=1{more}"


def pixels(image):
    return image.radiograph().image


def digest(image):
    return hashlib.sha256(pixels(image).numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def many():
    """3000 records, no pixels."""
    return list(read_phantom("3000,seed=11,size=64").records)


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
        assert got.valid.float().mean() > 0.75
        assert got.spacing == record.spacing
        assert 300 < got.spacing[0] * 64 < 560  # the field in mm
        assert 0 <= float(got.image.min()) < float(got.image.max()) <= 1, layer
        if layer != "image":
            assert set(got.image.unique().tolist()) == {0.0, 1.0}
    assert len({*record.masks.values(), record.image}) == 1 + len(record.masks)  # hashable, distinct


def test_what_the_collimator_covers_is_black_and_not_valid():
    covered = 0
    for record in read_phantom("40,size=64").records:
        got = record.image.radiograph()
        assert (got.image[~got.valid] == 0).all()
        assert (got.image[got.valid] > 0).all()
        covered += not got.valid.all()
        for mask in record.masks.values():
            lost = mask.radiograph()
            assert torch.equal(lost.valid, got.valid)
    assert 5 < covered < 35


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


def test_who_is_in_which_split_is_known_without_drawing_anything(monkeypatch):
    """Else every choice of a split of a large set draws all of it, and `phantom:100000` takes hours."""
    names = ("patient", "split", "view")
    told = [[getattr(record, name) for record in read_phantom("40,seed=3,size=64").records] for name in names]
    collection = read_phantom("40,seed=3,size=64")
    monkeypatch.setattr("otcxr.data.phantom._record", lambda config, index: pytest.fail("a record was made"))
    assert [column(collection.records, name) for name in names[:2]] == told[:2]
    monkeypatch.undo()
    assert column(collection.records, "view") == told[2]
    part = collection.split("test")
    assert [record.split for record in part.records] == ["test"] * told[1].count("test")


def test_sequence_counts_and_slices():
    records = read_phantom("7").records
    assert len(records) == len(list(records)) == 7
    assert records[-1].name == "phantom-000006"
    assert [r.name for r in records[2:4]] == ["phantom-000002", "phantom-000003"]
    with pytest.raises(IndexError):
        records[7]


@pytest.mark.parametrize(("count", "size", "least"), [(150, 64, 15), (40, 200, 3), (30, 512, 1)])
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
                # tight: little air on any side; thin ends of air and fluid fall between large pixels
                thin = {"Pneumothorax": 0.3, "Effusion": 0.1}.get(finding, 0.0) if size < 100 else 0.0
                air = max(3.5, 0.025 * size, thin * size)
                assert right - columns[own].max() - 1 < air
                assert columns[own].min() - left < air
                assert bottom - rows[own].max() - 1 < air
                assert rows[own].min() - top < air
            assert inside.any(0).all(), "a pixel of the mask outside every box"
    assert min(seen.values()) > least


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("finding", FINDINGS)
def test_no_planted_finding_vanishes_at_small_sizes(finding, size):
    for record in read_phantom(alone(finding, 80, seed=3, size=size)).records:
        assert pixels(record.masks[finding]).any()
        assert [box.finding for box in record.boxes].count(finding) == len(record.boxes) > 0


def test_findings_lie_where_they_belong():
    for finding in FINDINGS:
        for record in read_phantom(alone(finding, 25)).records:
            lungs, heart, mask = (pixels(record.masks[name])[0] > 0 for name in ("lungs", "heart", finding))
            assert not (lungs & heart).any()
            if finding == "Cardiomegaly":
                assert torch.equal(mask, heart)
            elif finding in ("Nodule", "Mass"):
                assert float((mask & lungs).sum() / mask.sum()) > 0.5
            else:
                assert not (mask & ~lungs).any()
            if finding == "Effusion":
                centre = [torch.nonzero(part)[:, 0].float().mean() for part in (mask, lungs)]
                assert centre[0] > centre[1]  # fluid sinks
                assert float(mask.sum() / lungs.sum()) < 0.5
            if finding == "Pneumothorax":
                inner = torch.nonzero(lungs & ~mask)[:, 0].float().mean()
                assert torch.nonzero(mask)[:, 0].float().mean() < inner + 3  # air rises


def test_anatomy_has_the_right_greys():
    for record in read_phantom("30,seed=8,size=96,prevalence=0").records:
        image = pixels(record.image)[0]
        lungs, heart = (pixels(record.masks[name])[0] > 0 for name in ("lungs", "heart"))
        columns = torch.nonzero(lungs)[:, 1]
        rows = torch.nonzero(lungs)[:, 0]
        middle = int((columns.min() + columns.max()) / 2)
        spine = image[int(rows.float().mean()) : int(rows.max()), middle - 3 : middle + 4]
        assert image[lungs].mean() < spine.mean() - 0.08
        assert image[lungs].mean() < image[heart].mean() - 0.05
        assert 0.10 < float(lungs.float().mean()) < 0.5
        assert torch.nonzero(heart)[:, 1].float().mean() > middle  # the heart lies to the patient's left


@pytest.mark.parametrize("finding", FINDINGS)
def test_planted_signal_changes_the_attenuation_where_the_mask_is_and_hardly_elsewhere(finding):
    config = parse_phantom(alone(finding, 30))
    inside, outside = [], []
    for index, record in enumerate(read_phantom(alone(finding, 30)).records):
        with_it, without = (
            attenuation(*_scene(config, index, findings), config.contrast, config.size) for findings in (True, False)
        )
        change = with_it - without
        mask, lungs = (pixels(record.masks[name])[0].numpy() > 0 for name in (finding, "lungs"))
        if finding == "Cardiomegaly":  # the middle of the heart stays what it was: look where it has grown
            healthy = pixels(PhantomImage(parse_phantom("30,seed=5,size=96,prevalence=0"), index, "lungs"))[0] > 0
            grown = mask & healthy.numpy()
            assert grown.any()
            inside.append(change[grown].mean())
        else:
            inside.append(change[mask].mean())
        ring = cv2.dilate(mask.astype(np.uint8), np.ones((13, 13), np.uint8)) == 0
        outside.append(np.abs(change[ring & ~lungs]).mean())
    sign = -1 if finding == "Pneumothorax" else 1
    gain = sign * np.array(inside)
    assert (gain > 0.005).all()
    assert gain.mean() > 0.04
    assert np.mean(outside) < 0.1 * gain.mean()


@pytest.mark.parametrize("finding", FINDINGS)
def test_settings_scale_the_signal(finding):
    def change(more):
        config = parse_phantom(alone(finding, 12, more=more))
        total = 0.0
        for index in range(12):
            pair = [attenuation(*_scene(config, index, on), config.contrast, config.size) for on in (True, False)]
            total += float(np.abs(pair[0] - pair[1]).sum())
        return total

    usual = change("")
    if finding == "Cardiomegaly":
        assert change(",contrast=0.5") == usual  # its size is its signal
    else:
        assert change(",contrast=0.5") < 0.8 * usual
        more = change(",contrast=1.5")
        # fluid and free air are all fluid and all air: only the pleural line grows
        assert more < 1.1 * usual if finding in ("Effusion", "Pneumothorax") else more > 1.2 * usual
    if finding in ("Edema", "Cardiomegaly"):
        assert change(",lesion_size=2") == usual
    else:
        assert change(",lesion_size=2") > 1.15 * usual


def test_noise_is_a_setting_and_falls_with_exposure():
    quiet, usual = (parse_phantom(f"40,seed=2,size=96,noise={noise}") for noise in (0, 0.02))
    level, exposure = [], []
    for index in range(40):
        assert np.array_equal(render(quiet, index), render(quiet, index))
        _, study, _ = _scene(usual, index)
        level.append(float(np.abs(render(usual, index) - render(quiet, index)).mean()))
        exposure.append(study.exposure)
    assert min(level) > 0
    assert np.corrcoef(np.log(level), np.log(exposure))[0, 1] < -0.4


def test_leaving_findings_out_changes_nothing_else():
    config = parse_phantom("8,seed=4,size=64,prevalence=0")
    for index in range(8):
        assert np.array_equal(render(config, index), render(config, index, findings=False))
    sick = parse_phantom("8,seed=4,size=64,prevalence=1")
    for index in range(8):
        assert np.array_equal(render(sick, index, findings=False), render(config, index))


def test_prevalences_do_not_disturb_each_other():
    some = read_phantom("60,seed=4,size=64").records
    more = read_phantom("60,seed=4,size=64,edema_prevalence=0.9").records
    for a, b in zip(some, more, strict=True):
        assert {**a.labels, "Edema": 0} == {**b.labels, "Edema": 0}
        assert (a.view, a.spacing, a.split) == (b.view, b.spacing, b.split)
    assert sum(r.labels["Edema"] for r in more) > 40


def test_planted_says_what_the_record_says():
    records = read_phantom("60,seed=9,size=64").records
    levels = []
    for index, record in enumerate(records):
        truth = planted(record.image.config, index)
        assert {p.finding for p in truth} == {f for f, label in record.labels.items() if label}
        assert tuple(box for p in truth for box in p.boxes) == record.boxes
        levels += [p.severity for p in truth]
    assert 0 <= min(levels) < 0.15
    assert 0.85 < max(levels) <= 1


@pytest.mark.parametrize("finding", ["Edema", "Cardiomegaly"])
def test_severity_is_how_much_it_changes(finding):
    config = parse_phantom(alone(finding, 60, size=48))
    change, severity = [], []
    for index in range(60):
        pair = [attenuation(*_scene(config, index, on), config.contrast, config.size) for on in (True, False)]
        change.append(float(np.abs(pair[0] - pair[1]).sum()))
        severity.append(planted(config, index)[0].severity)
    assert np.corrcoef(change, severity)[0, 1] > 0.4


@pytest.mark.parametrize("finding", ["Nodule", "Mass", "Consolidation", "Effusion", "Pneumothorax"])
def test_severity_is_size(finding):
    area, severity = [], []
    for index, record in enumerate(read_phantom(alone(finding, 60)).records):
        size = float(pixels(record.masks[finding]).sum()) * record.spacing[0] ** 2
        area.append(size if finding != "Nodule" else max(b.width for b in record.boxes))
        severity.append(planted(record.image.config, index)[0].severity)
    assert np.corrcoef(area, severity)[0, 1] > 0.4


def test_a_large_heart_is_wider_than_any_healthy_one():
    def ratios(prevalence):
        out = []
        for index in range(60):
            body, _, _ = _scene(parse_phantom(f"60,seed=6,size=96,prevalence={prevalence}"), index)
            out.append(body.heart)
        return out

    healthy, large = (np.array(ratios(p))[:, 1] for p in (0, 1))
    assert (large > healthy).all()
    wide = {}
    for label in (0, 1):
        wide[label] = []
        for record in read_phantom(f"80,seed=6,size=96,prevalence=0,cardiomegaly_prevalence={label}").records:
            columns = {name: np.nonzero(pixels(record.masks[name])[0].numpy().any(0))[0] for name in ("lungs", "heart")}
            if record.view == "PA":
                wide[label].append(np.ptp(columns["heart"]) / np.ptp(columns["lungs"]))
    above = (np.array(wide[1])[:, None] > np.array(wide[0])).mean()
    assert above > 0.9
    assert 0.38 < np.mean(wide[0]) < 0.52 < np.mean(wide[1]) < 0.68


def test_chronic_findings_stay_and_acute_ones_change():
    studies = defaultdict(list)
    for index, record in enumerate(read_phantom("600,seed=7,size=64,prevalence=0.4").records):
        studies[record.patient].append((index, record))
    config = parse_phantom("600,seed=7,size=64,prevalence=0.4")
    changes = Counter()
    moved, far = [], []
    for visits in studies.values():
        for (i, a), (j, b) in itertools.pairwise(visits):
            for finding in FINDINGS:
                changes[finding] += a.labels[finding] != b.labels[finding]
            nodules = [_scene(config, k)[2].nodules for k in (i, j)]
            for first, second in zip(*nodules, strict=True):
                far.append(float(np.hypot(first.x - second.x, first.v - second.v)))
                moved.append(far[-1] > 1)
                assert second.radius >= first.radius - 1e-6
    assert all(changes[finding] == 0 for finding in CHRONIC)
    assert all(changes[finding] > 50 for finding in ACUTE)
    assert np.median([way for way in far if way > 1]) < 80  # not to the other end of the chest
    assert np.mean(moved) < 0.3  # only where fluid, air or a raised diaphragm took the place


def test_lesions_stay_in_their_lung_and_nearly_all_in_their_place():
    """Without fluid and free air only the diaphragm, the heart and the edge of the picture can take a place."""
    source = "1500,seed=7,size=64,prevalence=0,nodule_prevalence=.5,mass_prevalence=.3"
    config = parse_phantom(source)
    studies = defaultdict(list)
    for index, record in enumerate(read_phantom(source).records):
        studies[record.patient].append(index)
    ways = []
    for i, j in (pair for visits in studies.values() for pair in itertools.pairwise(visits)):
        a, b = (_scene(config, k)[2] for k in (i, j))
        spots = [
            *zip(a.nodules, b.nodules, strict=True),
            *((m[0], n[0]) for m, n in zip(a.masses, b.masses, strict=True)),
        ]
        for first, second in spots:
            assert np.sign(first.x) == np.sign(second.x)
            ways.append(np.hypot(first.x - second.x, first.v - second.v))
    assert len(ways) > 900
    assert np.mean(np.array(ways) > 1) < 0.08
    assert max(ways) < 130


def test_severity_is_that_of_the_largest_nodule():
    config = parse_phantom("400,seed=8,size=64,prevalence=0,nodule_prevalence=1")
    patients = read_phantom("400,seed=8,size=64,prevalence=0,nodule_prevalence=1").records
    seen, several = set(), 0
    for index, record in enumerate(patients):
        if record.patient in seen:
            continue  # later studies: they have grown
        seen.add(record.patient)
        nodules, severity = _scene(config, index)[2].nodules, planted(config, index)[0].severity
        assert max(ball.radius for ball in nodules) == pytest.approx(4 * (15 / 4) ** severity, rel=1e-5)
        several += len(nodules) > 1
    assert several > 50


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


def test_no_two_streams_draw_the_same_numbers(monkeypatch):
    """numpy pads entropy with zeros: a study numbered 0 would share its stream with the patient."""
    first = read_phantom("400,seed=9").records
    assert all(not record.study.endswith("-0") for record in first)
    calls = []

    class Spy(np.random.SeedSequence):
        def __init__(self, entropy, **more):
            calls.append((np.atleast_1d(entropy).tolist(), more.get("spawn_key", ())))
            super().__init__(entropy, **more)

    monkeypatch.setattr(np.random, "SeedSequence", Spy)
    config = parse_phantom("40,seed=77,size=32,prevalence=1,nodule_prevalence=0.5")  # in no cache
    for index in range(40):
        render(config, index)
    monkeypatch.undo()
    streams = {}
    for entropy, spawn in calls:
        start = np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=spawn)).random(4).tobytes()
        assert streams.setdefault(start, (entropy, spawn)) == (entropy, spawn), "two streams draw the same numbers"
    assert len(streams) > 100


def test_prevalence_follows_the_settings(many):
    for finding in FINDINGS:
        assert np.mean([record.labels[finding] for record in many]) == pytest.approx(0.2, abs=0.035)
    rare = read_phantom("2000,nodule_prevalence=0.1,effusion_prevalence=0").records
    assert np.mean([record.labels["Nodule"] for record in rare]) == pytest.approx(0.1, abs=0.03)
    assert not any(record.labels["Effusion"] for record in rare)
    nodules = Counter(sum(box.finding == "Nodule" for box in record.boxes) for record in many)
    assert set(nodules) == {0, 1, 2, 3}


@pytest.mark.parametrize("finding", FINDINGS)
def test_findings_are_independent_of_what_is_not_disease(many, finding):
    """On the first study of each patient: chronic findings make the studies of one patient alike."""
    first = [record for record in many if record.study.endswith("-1")]
    traits = {
        "view": lambda r: r.view, "sex": lambda r: r.sex, "age": lambda r: r.age >= 54, "split": lambda r: r.split,
        **{other: (lambda r, other=other: r.labels[other]) for other in FINDINGS if other != finding},
    }  # fmt: skip
    for name, trait in traits.items():
        table = Counter((record.labels[finding], trait(record)) for record in first)
        values = sorted({value for _, value in table}, key=str)
        assert len(values) > 1, name
        assert chi2_contingency([[table[label, value] for value in values] for label in (0, 1)]).pvalue > 1e-4, name


# ------------------------------------------------------------------------------------------- guards against shortcuts


@pytest.fixture(scope="module")
def crowd():
    """3,000 phantoms with a fixed seed: labels, whether they are for testing, what a table knows, and thumbnails."""
    records = list(read_phantom("3000,seed=0,size=64").records)
    images = [pixels(record.image)[0].numpy() for record in records]
    labels = np.array([[record.labels[finding] for finding in FINDINGS] for record in records])
    test = np.array([record.split == "test" for record in records])
    table = np.array([
        [image.mean(), image.std(), *np.histogram(image, 16, (0, 1))[0] / image.size,
         record.view == "AP", record.sex == "M", record.age]
        for record, image in zip(records, images, strict=True)
    ])  # fmt: skip
    thumbs = np.array([cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).ravel() for image in images])
    return labels, test, table, thumbs


def macro_auroc(features, labels, test, strength):
    scores = []
    for labelled in labels.T:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=3000))
        model.fit(features[~test], labelled[~test])
        scores.append(roc_auc_score(labelled[test], model.decision_function(features[test])))
    return float(np.mean(scores))


def test_brightness_histogram_view_sex_and_age_say_next_to_nothing(crowd):
    labels, test, table, _ = crowd
    assert macro_auroc(table, labels, test, 1.0) <= 0.60
    # the guard can tell: half a standard deviation per finding in the mean grey is noticed
    leak = table.copy()
    leak[:, 0] += 0.5 * table[:, 0].std() * labels.sum(axis=1)
    assert macro_auroc(leak, labels, test, 1.0) > 0.60


def test_a_thumbnail_is_not_enough(crowd):
    labels, test, _, thumbs = crowd
    best = max(macro_auroc(thumbs, labels, test, strength) for strength in (0.001, 0.01, 0.1))
    assert 0.6 < best <= 0.75


def test_ap_magnifies_the_heart():
    area = defaultdict(list)
    for record in read_phantom("150,seed=13,size=64,prevalence=0").records:
        area[record.view].append(float(pixels(record.masks["heart"]).mean() / pixels(record.masks["lungs"]).mean()))
    assert set(area) == {"AP", "PA"}
    assert np.mean(area["AP"]) > 1.15 * np.mean(area["PA"])


def test_parse_reads_the_settings():
    assert parse_phantom("2000") == PhantomConfig(2000)
    assert parse_phantom("2000, seed=100 ,size=96") == PhantomConfig(2000, seed=100, size=96)
    assert parse_phantom("5,nodule_prevalence=0.5,noise=0").nodule_prevalence == 0.5
    collection = read_phantom("5,seed=1")
    assert (collection.name, collection.findings) == ("phantom:5,seed=1", FINDINGS)
    assert parse_phantom("5,prevalence=0.3,mass_prevalence=0.5").prevalences() == (0.3, 0.5, *(0.3,) * 5)


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
        ("9,contrast=0", r"contrast is 0.0 but .*\[0.1, 1.5\]"),
        ("9,devices=3", r"devices is 3.0 but .*\[0.0, 2.0\]"),
        ("9,lesion_prevalence=0.1", "unknown phantom setting 'lesion_prevalence'"),
    ],
)
def test_bad_settings_name_the_fix(text, message):
    with pytest.raises(ConfigError, match=message):
        read_phantom(text)


def test_unknown_layer_is_an_error():
    with pytest.raises(ConfigError, match="did you mean 'lungs'"):
        PhantomImage(PhantomConfig(1, size=32), 0, "lung").radiograph()
