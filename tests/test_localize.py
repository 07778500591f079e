"""Where the evidence lies: measures against loops that are obviously right, heat maps, and the whole task."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcxr.attribution import HEAT_MAPS, ProbedEncoder, heat_map
from otcxr.cli import main
from otcxr.data.dataset import PixelCache
from otcxr.data.images import fit_square
from otcxr.data.phantom import FINDINGS, read_phantom
from otcxr.data.records import Box, Record
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation import localize as localizing
from otcxr.evaluation.localize import MEASURES, REFERENCES, _Average, judge_map, localize
from otcxr.evaluation.overlap import (
    Frame,
    box_overlap,
    energy_inside,
    iou,
    otsu_threshold,
    peak_box,
    pointing,
    region_boxes,
    scaled,
)
from otcxr.evaluation.ratios import mean_of_ratios, ratio
from otcxr.evaluation.resampling import patient_weights
from otcxr.evaluation.tasks import EvaluateConfig
from otcxr.evaluation.truth import Truth, read_truth
from otcxr.nn.encoder import build_encoder
from otcxr.report import localize_rows

# --- regions and maps, pixel by pixel --------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 7), st.integers(1, 9))


@st.composite
def pictures(draw):
    """Two masks and a heat map of one shape: sparse, full, empty, ties."""
    shape = draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    heat = rng.integers(0, draw(st.sampled_from([1, 3, 1000])), shape).astype(float)
    return rng.random(shape) < share, rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.7])), heat


def parts_by_hand(mask):
    """Sets of pixels joined over edges and corners, in the order of their first pixel."""
    left = {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)}
    out = []
    for start in sorted(left):
        if start not in left:
            continue
        part, todo = set(), [start]
        while todo:
            r, c = todo.pop()
            if (r, c) in left:
                left.remove((r, c))
                part.add((r, c))
                todo += [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        out.append(part)
    return out


def frame_of(part):
    rows, columns = [r for r, _ in part], [c for _, c in part]
    return Frame(min(columns), min(rows), max(columns) + 1, max(rows) + 1)


@settings(max_examples=150)
@given(pictures())
def test_regions_by_hand(given_):
    found, truth, heat = given_
    a = {(r, c) for r, c in zip(*np.nonzero(found), strict=True)}
    b = {(r, c) for r, c in zip(*np.nonzero(truth), strict=True)}
    union = len(a | b)
    got = iou(found, truth)
    assert math.isnan(got) if not union else got == pytest.approx(len(a & b) / union)
    assert sorted(region_boxes(truth)) == sorted(frame_of(part) for part in parts_by_hand(truth))
    if not b:
        assert math.isnan(pointing(heat, truth))
        assert math.isnan(energy_inside(heat, truth))
        return
    top = [(r, c) for r in range(heat.shape[0]) for c in range(heat.shape[1]) if heat[r, c] == heat.max()]
    inside = sum(p in b for p in top) / len(top) if heat.max() > 0 else 0.0
    assert pointing(heat, truth) == pytest.approx(inside)
    energy = sum(heat[p] for p in b) / heat.sum() if heat.sum() else 0.0
    assert energy_inside(heat, truth) == pytest.approx(energy)


@settings(max_examples=150)
@given(pictures(), st.sampled_from([0.0, 0.3, 0.7]))
def test_the_strongest_part_by_hand(given_, threshold):
    values = scaled(given_[2])
    parts = parts_by_hand(values > threshold)
    got = peak_box(values, threshold)
    if not parts:
        assert got is None
        return
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    assert got == frame_of(next(part for part in parts if (row, column) in part))


@settings(max_examples=100)
@given(st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=2, max_size=4))
def test_boxes_by_counting_pixels(corners):
    boxes = [Frame(min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1) for a, b, c, d in corners]

    def pixels(box):
        return {(x, y) for x in range(int(box.left), int(box.right)) for y in range(int(box.top), int(box.bottom))}

    own, others = pixels(boxes[0]), [pixels(box) for box in boxes[1:]]
    best = max(len(own & other) / len(own | other) for other in others), max(len(own & o) / len(own) for o in others)
    assert box_overlap(boxes[0], boxes[1:]) == pytest.approx(best)
    assert box_overlap(None, boxes) == (0.0, 0.0)
    assert all(map(math.isnan, box_overlap(boxes[0], [])))


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 60))
def test_otsu_parts_best(seed, count):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.beta(2, 8, count), rng.beta(8, 2, count // 2)])

    def between(low):
        levels = np.minimum(np.floor(values * 256), 255)
        below, above = levels[~(values > low)], levels[values > low]
        return len(below) * len(above) * (above.mean() - below.mean()) ** 2 if len(below) and len(above) else -1.0

    got = between(otsu_threshold(values))
    assert got == pytest.approx(max(between(np.nextafter(k / 256, 0)) for k in range(1, 257)))


@pytest.mark.parametrize("heat", [np.full((3, 4), -1.0), np.full((3, 4), np.nan), np.zeros((4, 3))])
def test_what_is_no_heat_map_is_refused(heat):
    with pytest.raises(DataError, match=r"finite|shape"):
        pointing(heat, np.ones((3, 4), dtype=bool))


def test_regions_that_touch_the_border_and_corners():
    mask = np.zeros((4, 6), dtype=bool)
    mask[0, 0] = mask[1, 1] = True  # joined over a corner
    mask[3, 5] = True
    assert region_boxes(mask) == [Frame(0, 0, 2, 2), Frame(5, 3, 6, 4)]


# --- one image -------------------------------------------------------------------------------------------------------


def truth_of(mask, boxes=()):
    return Truth(len(mask), np.packbits(mask), tuple(boxes) or tuple(region_boxes(mask)))


def test_a_map_that_is_the_region_gets_everything():
    mask = np.zeros((16, 16), dtype=bool)
    mask[2:8, 3:10] = True
    assert judge_map(mask.astype(float), truth_of(mask), None, mask).tolist() == [1.0] * len(MEASURES)
    assert np.isnan(judge_map(mask.astype(float), truth_of(mask))[MEASURES.index("lung_energy")])  # no lungs are known
    assert truth_of(mask).share == pytest.approx(42 / 256)
    away = np.zeros((16, 16))
    away[12:, 12:] = 1.0
    assert judge_map(away, truth_of(mask), None, mask).tolist() == [0.0] * len(MEASURES)
    lungs = np.zeros((16, 16), dtype=bool)
    lungs[12:, 14:] = True
    assert judge_map(away, truth_of(mask), None, lungs)[MEASURES.index("lung_energy")] == 0.5
    # half of the region, from the left: IoU 1/2, all of what is found lies in it
    half = np.zeros((16, 16))
    half[2:5, 3:10] = 1.0
    got = dict(zip(MEASURES, judge_map(half, truth_of(mask)), strict=True))
    assert (got["region_iou"], got["iou@0.5"], got["iou@0.75"], got["iobb@0.9"]) == (0.5, 1.0, 0.0, 1.0)


def test_no_evidence_finds_nothing():
    mask = np.ones((8, 8), dtype=bool)
    got = dict(zip(MEASURES, judge_map(np.zeros((8, 8)), truth_of(mask)), strict=True))
    assert got["pointing"] == got["energy"] == got["iou@0.1"] == got["iobb@0.1"] == 0.0


def test_the_average_leaves_the_patient_out():
    masks = np.zeros((3, 4, 4), dtype=bool)
    masks[0, 0], masks[1, 1], masks[2, 2] = True, True, True
    average = _Average([truth_of(m) for m in masks], ["a", "b", "c"])
    heat, box = average("b")
    assert heat[:, 0].tolist() == [0.5, 0.0, 0.5, 0.0]
    assert box == Frame(0, 1, 4, 2)
    assert average("z")[0][:, 0] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_the_truth_of_boxes_of_an_image_that_is_not_square(save_png):
    record = Record(save_png("a.png"), "s", "p", labels={"Mass": 1}, boxes=(Box("Mass", 8.0, 0.0, 16.0, 12.0),))
    truth = read_truth(record, "Mass", 32, PixelCache(1.0))  # (24, 32) in a square of 32: 4 rows above
    assert truth.boxes == (Frame(8.0, 4.0, 24.0, 16.0),)
    expected = np.zeros((32, 32), dtype=bool)
    expected[4:16, 8:24] = True
    assert np.array_equal(truth.mask, expected)
    assert read_truth(record, "Nodule", 32, PixelCache(1.0)) is None
    speck = record._replace(boxes=(Box("Mass", 8.1, 3.1, 0.1, 0.1),))
    assert read_truth(speck, "Mass", 16, PixelCache(1.0)).mask.sum() == 1


def test_the_truth_of_a_phantom_is_its_mask():
    collection = read_phantom("40,seed=2,size=64,prevalence=0.9")
    record = next(r for r in collection.records if "Nodule" in r.masks)
    planted = record.masks["Nodule"].radiograph().image[0].numpy() >= 0.5
    truth = read_truth(record, "Nodule", 64, PixelCache(1.0))
    assert np.array_equal(truth.mask, planted)
    small = read_truth(record, "Nodule", 16, PixelCache(1.0))
    assert small.mask.any()  # not averaged away


# --- heat maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEAT_MAPS)
def test_every_map_points_at_what_the_network_sees(kind):
    """A linear network that adds up brightness: the evidence is the bright square, for every kind of map."""

    class Bright(torch.nn.Module):
        first_centre = 0.5

        def forward(self, images):
            pooled = torch.nn.functional.avg_pool2d(images, 8)
            return [torch.cat((pooled, 0.3 - pooled), 1)]

    model = ProbedEncoder(Bright(), np.array([[4.0, 0.0], [0.0, 4.0]]), np.array([0.0, 0.0]))
    images = torch.zeros(2, 1, 64, 64)
    images[0, :, 8:24, 40:56] = 1.0
    images[1, :, 40:56, 8:24] = 1.0
    maps = heat_map(model, images, 0, kind)
    assert maps.shape == (2, 64, 64)
    assert maps.min() >= 0
    assert pointing(maps[0].numpy().astype(float), images[0, 0].numpy() > 0) == 1.0
    assert pointing(maps[1].numpy().astype(float), images[1, 0].numpy() > 0) == 1.0
    assert energy_inside(maps[0].numpy().astype(float), images[0, 0].numpy() > 0) > 0.5


@pytest.mark.parametrize("kind", HEAT_MAPS)
def test_a_map_does_not_depend_on_the_images_beside_it(kind):
    weights = np.random.default_rng(0).normal(size=(2, 64))
    model = ProbedEncoder(build_encoder("resnet18", width=8, seed=1), weights, np.zeros(2))
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    together = heat_map(model, images, 1, kind)
    assert together.max() > 0
    for image, found in zip(images, together, strict=True):
        assert torch.allclose(heat_map(model, image[None], 1, kind)[0], found, atol=1e-4 * float(together.max()))


def test_an_unknown_map_is_named():
    model = ProbedEncoder(build_encoder("resnet18", width=8, seed=0), np.zeros((1, 64)), np.zeros(1))
    with pytest.raises(ConfigError, match="grad-cam"):
        heat_map(model, torch.zeros(1, 1, 32, 32), 0, "gradcam")


# --- ratios over patients --------------------------------------------------------------------------------------------


def test_a_ratio_resamples_patients():
    rng = np.random.default_rng(1)
    patients = np.repeat([f"p{i}" for i in range(25)], 3)
    below = rng.integers(0, 9, 75).astype(float)
    top = below * rng.random(75)
    weights = patient_weights(patients.tolist(), 300, 4).astype(float)
    got, drawn = ratio(top, below, patients, weights, 0.9)
    slow = [sum(w * t for w, t in zip(row, top, strict=True)) / sum(w * b for w, b in zip(row, below, strict=True))
            for row in weights]  # fmt: skip
    assert drawn == pytest.approx(slow)
    assert got["value"] == pytest.approx(top.sum() / below.sum())
    assert (got["low"], got["high"]) == pytest.approx(tuple(np.quantile(slow, [0.05, 0.95])))
    assert "caution" not in got
    other, more = ratio(top**2, below, patients, weights, 0.9)
    mean = mean_of_ratios([(got, drawn), (other, more)], 0.9)
    assert mean["value"] == pytest.approx((got["value"] + other["value"]) / 2)
    assert mean["high"] == pytest.approx(np.quantile((drawn + more) / 2, 0.95))


def test_few_patients_are_named():
    patients = np.array([f"p{i}" for i in range(30)])
    weights = np.ones((10, 30))
    below = np.zeros(30)
    below[:4] = 1.0
    few = ratio(below, below, patients, weights, 0.95)
    assert few[0]["value"] is None
    assert "4 patients" in few[0]["reason"]
    assert mean_of_ratios([few], 0.95)["value"] is None
    below[:19] = 1.0
    some = ratio(below, below, patients, weights, 0.95)
    assert "19 patients" in some[0]["caution"]
    assert mean_of_ratios([few, some], 0.95)["count"] == 1
    assert "caution" in mean_of_ratios([few, some], 0.95)


# --- the task --------------------------------------------------------------------------------------------------------

LINEAR = [name for name in REFERENCES if name != "randomised"]  # that stands beside fine-tuning alone
QUICK = EvaluateConfig(size=64, resamples=100, strengths=(0.1,), folds=2, accelerator="cpu")


@pytest.fixture(scope="module")
def phantoms():
    return read_phantom("260,seed=5,size=64,prevalence=0.5")


@pytest.fixture(scope="module")
def judged(phantoms):
    return localize(build_encoder("resnet18", width=8, seed=3), phantoms, ("train", "test"), QUICK, kinds=["grad-cam"])


def test_the_task_has_everyone(judged, phantoms):
    found = judged["maps"]["grad-cam"]
    test = [r for r in phantoms.records if r.split == "test"]
    for finding, entry in found["findings"].items():
        assert entry["images"] == sum(finding in r.masks for r in test)
        for who in ("encoder", *LINEAR):
            assert set(entry[who]) == set(MEASURES)
            for measure in MEASURES:
                gap = entry[f"encoder - {who}"][measure] if who != "encoder" else None
                one = entry[who][measure]
                if one["value"] is None:
                    assert one["patients"] < 5
                    continue
                assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1
                if gap is not None:
                    assert gap["value"] == pytest.approx(entry["encoder"][measure]["value"] - one["value"])
        assert "fitted on" in judged["average_from"][finding]
    estimable = [e["average"]["pointing"]["value"] for e in found["findings"].values()]
    kept = [value for value in estimable if value is not None]
    assert found["macro"]["average"]["pointing"]["value"] == pytest.approx(np.mean(kept))
    pairs = sum(entry["images"] for entry in found["findings"].values())
    assert sum(entry["images"] for entry in found["sizes"].values()) == pairs
    json.dumps(judged, allow_nan=False)


def test_the_prior_of_an_organ_is_right_about_it(judged):
    """An enlarged heart is where hearts are: the average points at it, with an interval apart from chance."""
    heart = judged["maps"]["grad-cam"]["findings"]["Cardiomegaly"]
    assert heart["average"]["pointing"]["value"] > 0.9
    assert heart["average"]["energy"]["low"] > 0.3
    assert heart["random"]["energy"]["value"] < heart["average"]["energy"]["value"]


def test_a_network_that_is_told_is_ahead_of_one_that_is_not(phantoms, monkeypatch):
    """If the encoder's maps were the masks themselves, everything would be 1; so nothing is lost on the way."""
    test = [r for r in phantoms.records if r.split == "test"]
    pixels = torch.stack([fit_square(r.image.radiograph().image, 64) for r in test])
    told = []

    def first_is_told(model, images, finding, kind):
        told.append(model)
        if model is not told[0]:
            return torch.ones(len(images), 64, 64)
        rows = [int((pixels - image).abs().sum((1, 2, 3)).argmin()) for image in images]  # kept ones have 16 bits
        masks = [read_truth(test[row], FINDINGS[finding], 64, PixelCache(1.0)).mask for row in rows]
        return torch.from_numpy(np.stack(masks)).float()

    monkeypatch.setattr(localizing, "heat_map", first_is_told)
    few = replace(QUICK, batch_size=5)  # than there are of a finding
    result = localize(build_encoder("resnet18", width=8, seed=3), phantoms, ("train", "test"), few, kinds=["grad-cam"])
    macro = result["maps"]["grad-cam"]["macro"]
    for measure in ("pointing", "energy", "region_iou"):
        assert macro["encoder"][measure]["value"] == pytest.approx(1.0)
    assert macro["encoder - random"]["energy"]["low"] > 0.3
    assert macro["encoder - average"]["energy"]["low"] > 0


def test_where_only_test_images_have_boxes_the_others_serve(phantoms):
    records = [r if r.split == "test" else r._replace(masks={}, boxes=()) for r in phantoms.records]
    result = localize(build_encoder("resnet18", width=8, seed=3), phantoms._replace(records=records),
                      ("train", "test"), QUICK, kinds=["grad-cam"])  # fmt: skip
    assert set(result["average_from"].values()) == {"the other test patients"}


def test_without_a_box_there_is_nothing_to_judge(phantoms):
    bare = phantoms._replace(records=[r._replace(masks={}, boxes=()) for r in phantoms.records])
    with pytest.raises(DataError, match="box or mask"):
        localize(build_encoder("resnet18", width=8, seed=3), bare, ("train", "test"), QUICK)


@pytest.mark.parametrize(("head", "kinds", "said"), [
    ("liner", ["grad-cam"], "linear"), ("linear", ["gradcam"], "grad-cam"), ("linear", [], "no heat map"),
])  # fmt: skip
def test_unknown_words_are_named(phantoms, head, kinds, said):
    with pytest.raises(ConfigError, match=said):
        localize(build_encoder("resnet18", width=8), phantoms, ("train", "test"), QUICK, head=head, kinds=kinds)


def test_what_has_not_looked_is_the_same_beside_every_map(phantoms, judged):
    both = localize(build_encoder("resnet18", width=8, seed=3), phantoms, ("train", "test"), QUICK,
                    kinds=["layer-cam", "grad-cam"])["maps"]  # fmt: skip
    assert both["grad-cam"] == judged["maps"]["grad-cam"]
    for who in ("centre", "average"):
        assert both["layer-cam"]["macro"][who] == both["grad-cam"]["macro"][who]
    assert both["layer-cam"]["macro"]["encoder"] != both["grad-cam"]["macro"]["encoder"]


@pytest.mark.parametrize("unused", [{"fractions": (0.1,)}, {"seeds": 2}, {"within": ()}])
def test_settings_that_would_do_nothing_are_refused(phantoms, unused):
    with pytest.raises(ConfigError, match=f"eval.{next(iter(unused))} has no effect"):
        localize(build_encoder("resnet18", width=8), phantoms, ("train", "test"), replace(QUICK, **unused))


def test_from_the_command_line_to_the_page(tmp_path, capsys):
    from otcxr.data.dataset import DataConfig
    from otcxr.data.views import ViewsConfig
    from otcxr.report import write_report
    from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, pretrain

    run = pretrain(PretrainConfig(
        data=DataConfig("phantom:120,seed=5,size=64,prevalence=0.5"), views=ViewsConfig(size=64),
        encoder=EncoderConfig(name="resnet18", width=8), out=str(tmp_path / "run"),
        train=TrainConfig(epochs=1, batch_size=16, accelerator="cpu", probes=0, online_images=0),
    ))  # fmt: skip
    words = ["localize", str(run.path), "--head", "finetune", "--maps", "layer-cam", "--eval.resamples", "50",
             "--eval.strengths", "[0.1]", "--eval.folds", "2", "--finetune.steps", "4"]  # fmt: skip
    assert main(words) == 0
    assert "layer-cam: strongest place inside the region" in capsys.readouterr().out
    result = json.loads((run.path / "evaluation" / "localize-finetune.json").read_text())
    assert result["pretraining"]["split"] == "train"
    macro = result["maps"]["layer-cam"]["macro"]
    assert {"random", "randomised", "encoder - randomised"} <= set(macro)
    assert macro["random"] != macro["randomised"]
    assert [row[0] for row in localize_rows(result)[0][2]][:2] == list(result["maps"]["layer-cam"]["findings"])[:2]
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "Where the evidence lies" in page
    assert "the fine-tuned encoder" in page
