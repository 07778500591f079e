"""Segmentation transfer: measures and loss against loops that are obviously right, and the whole task."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcxr.attribution import to_pixels
from otcxr.cli import main
from otcxr.console import SilentProgress
from otcxr.data.phantom import read_phantom
from otcxr.data.records import Radiograph, full_valid
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.labelled import draw_labels
from otcxr.evaluation.metrics import auroc
from otcxr.evaluation.overlap import dice, hausdorff_95, iou
from otcxr.evaluation.regions import placed, segmented
from otcxr.evaluation.segment import (
    HEADS,
    MEASURES,
    SegmentConfig,
    Segmenter,
    _changed,
    _covered,
    choose_threshold,
    measure_image,
    segment,
    segmentation_loss,
)
from otcxr.evaluation.tables import mean_of_negatives, measured_columns
from otcxr.evaluation.tasks import EvaluateConfig, evaluate, prepare
from otcxr.nn.encoder import build_encoder
from otcxr.nn.unet import UNet

QUIET = SilentProgress()

# --- masks, pixel by pixel -------------------------------------------------------------------------------------------


@st.composite
def pairs(draw):
    """Two masks of one shape, also empty, full, of several parts, at the border, not square."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 9)))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    share = st.sampled_from([0.0, 0.1, 0.5, 1.0])
    return rng.random(shape) < draw(share), rng.random(shape) < draw(share)


def pixels_of(mask):
    return {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)}


def border_of(pixels):
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    return [p for p in pixels if any((p[0] + a, p[1] + b) not in pixels for a, b in steps)]


@settings(max_examples=200)
@given(pairs(), st.sampled_from([(1.0, 1.0), (0.5, 2.0)]))
def test_overlap_and_distance_by_hand(masks, spacing):
    found, truth = masks
    a, b = pixels_of(found), pixels_of(truth)
    if a | b:
        assert dice(found, truth) == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
        assert dice(found, truth) == pytest.approx(2 * iou(found, truth) / (1 + iou(found, truth)))
    else:
        assert math.isnan(dice(found, truth))
    got = hausdorff_95(found, truth, spacing)
    if not b:
        assert math.isnan(got)
    elif not a:
        assert got == pytest.approx(math.hypot(found.shape[0] * spacing[0], found.shape[1] * spacing[1]))
    else:

        def away(p, others):
            return min(math.hypot((p[0] - q[0]) * spacing[0], (p[1] - q[1]) * spacing[1]) for q in others)

        one, other = border_of(a), border_of(b)
        slow = max(np.percentile([away(p, other) for p in one], 95), np.percentile([away(p, one) for p in other], 95))
        assert got == pytest.approx(slow)


def test_masks_of_other_shapes_are_refused():
    for measure in (dice, hausdorff_95):
        with pytest.raises(DataError, match="one shape"):
            measure(np.ones((2, 3), bool), np.ones((3, 2), bool))


@settings(max_examples=60)
@given(st.integers(0, 10_000))
def test_the_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (4, 200))
    truth = rng.random((4, 200)) < rng.choice([0.0, 0.02, 0.3], 4)[:, None]
    level = np.clip(np.floor(logits * 16).astype(int) + 128, 0, 255)
    inside, outside = (
        np.array([np.bincount(row[chosen], minlength=256) for row, chosen in zip(level, side, strict=True)], float)
        for side in (truth, ~truth)
    )
    best = choose_threshold(inside, outside)
    shown = [k for k in range(4) if truth[k].any()]  # images without the region say nothing
    if not shown:
        assert best == 0.0
        return
    grid = np.arange(1, 256) / 16 - 8
    slow = [np.mean([dice((logits[k] >= t)[None], truth[k][None]) for k in shown]) for t in grid]
    assert best in grid
    assert slow[int(np.flatnonzero(grid == best)[0])] == pytest.approx(max(slow))


def test_an_image_without_the_region_is_asked_for_detection_alone():
    empty = np.zeros((4, 6), bool)
    quiet = measure_image(np.full((4, 6), -3.0), 0.0, empty)
    assert quiet == {"dice": 0, "iou": 0, "hausdorff": 0, "empties": -3.0, "found": 0.0, "left_empty": 1.0}
    loud = measure_image(np.full((4, 6), 2.0), 0.0, empty)
    assert (loud["empties"], loud["found"], loud["left_empty"]) == (2.0, 1.0, 0.0)
    truth = empty.copy()
    truth[1:3, 2:4] = True
    right = measure_image(np.where(truth, 1.0, -1.0), 0.0, truth)
    assert (right["dice"], right["iou"], right["hausdorff"], right["found"]) == (1.0, 1.0, 0.0, 1.0)
    missed = measure_image(np.full((4, 6), -3.0), 0.0, truth)
    assert missed["dice"] == 0
    assert missed["hausdorff"] == pytest.approx(math.hypot(4, 6) / 6)


def test_an_all_empty_prediction_is_not_flattered():
    """The trap of SIIM-ACR: 78 % of the images are empty, and counting those as 1 gives 0.78 for predicting nothing."""
    labels = np.array([1.0] * 22 + [0.0] * 78)
    nothing = np.zeros((1, 100, 1))
    part = _Part(labels[:, None], np.array([f"p{i}" for i in range(100)]))
    columns = measured_columns({m: nothing + (m == "left_empty") for m in MEASURES}, [""], part)
    weights = np.ones((1, 100))
    value = {m: float(c.metrics(labels, np.asarray(c.scores)[0, :, 0], weights)[0]) for m, c in columns.items()}
    assert value == {"dice": 0, "iou": 0, "hausdorff": 0, "empties": 0.5, "found": 0, "left_empty": 1}


class _Part:
    def __init__(self, labels, patients):
        self.labels, self.patients = labels, patients


def test_detection_needs_patients_without_the_region():
    labels = np.array([[1.0, 1.0]] * 20 + [[0.0, 1.0]] * 4)
    part = _Part(labels, np.array([f"p{i}" for i in range(24)]))
    columns = measured_columns({m: np.zeros((1, 24, 2)) for m in MEASURES}, ["", ""], part)
    assert columns["dice"].notes == ["", ""]
    assert "4 patients without it" in columns["empties"].notes[0]
    assert "0 patients without it" in columns["left_empty"].notes[1]


def test_means_over_negatives_by_hand():
    rng = np.random.default_rng(2)
    labels = rng.choice([0.0, 1.0, np.nan], 40)
    scores, weights = rng.random(40), rng.integers(0, 3, (5, 40))
    slow = [sum(w * s for w, s, y in zip(row, scores, labels, strict=True) if y == 0)
            / sum(w for w, y in zip(row, labels, strict=True) if y == 0) for row in weights]  # fmt: skip
    assert mean_of_negatives(labels, scores, weights) == pytest.approx(slow)


# --- loss, cells, changes --------------------------------------------------------------------------------------------


def test_the_loss_by_loops():
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 2, 4, 5), (torch.rand(3, 2, 4, 5) < 0.3).float()
    known = torch.tensor([[True, False], [True, True], [False, True]])
    entropy, count, parts = 0.0, 0, []
    for r in range(2):
        both = sums = 0.0
        for b in range(3):
            if not known[b, r]:
                continue
            for z, y in zip(logits[b, r].flatten().tolist(), masks[b, r].flatten().tolist(), strict=True):
                p = 1 / (1 + math.exp(-z))
                entropy -= y * math.log(p) + (1 - y) * math.log(1 - p)
                both, sums, count = both + p * y, sums + p + y, count + 1
        parts.append(1 - (2 * both + 1) / (sums + 1))
    assert float(segmentation_loss(logits, masks, known)) == pytest.approx(entropy / count + np.mean(parts), rel=1e-5)
    # what is not known moves nothing
    other = logits.clone()
    other[0, 1] += 5
    assert segmentation_loss(other, masks, known) == segmentation_loss(logits, masks, known)
    assert float(segmentation_loss(logits, masks, torch.zeros(3, 2, dtype=torch.bool))) == 0
    # a region that no image of the batch is known for is no part of the mean
    only = known & torch.tensor([True, False])
    alone = segmentation_loss(logits[:, :1], masks[:, :1], known[:, :1])
    assert float(segmentation_loss(logits, masks, only)) == pytest.approx(float(alone))


@pytest.mark.parametrize("first", [0.5, 0.5 / 16])
def test_a_cell_is_around_where_its_token_looks(first):
    masks = (torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    got = _covered(masks, 2, 3, first)
    shift = round((first - 0.5) * 16)
    for i in range(2):
        for j in range(3):
            total = torch.zeros(2, 3)
            for r in range(i * 16 + shift, i * 16 + shift + 16):
                for c in range(j * 16 + shift, j * 16 + shift + 16):
                    if 0 <= r < 32 and 0 <= c < 48:
                        total += masks[:, :, r, c]
            assert got[:, :, i, j] == pytest.approx(total / 256)


def test_images_and_masks_are_changed_alike():
    """A picture of a mask moves as its mask does; grey levels may change, so only what is bright is looked at."""
    masks = torch.zeros(8, 1, 64, 64)
    masks[:, :, 20:40, 12:30] = 1.0
    images, moved = _changed(masks.clone(), masks, torch.Generator().manual_seed(3))
    assert set(moved.unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(moved, masks)
    for image, mask in zip(images, moved, strict=True):
        assert dice((image[0] > 0.4).numpy(), (mask[0] > 0).numpy()) > 0.95
        assert 0.75 < float(mask.sum() / masks[0].sum()) < 1.3
    again = _changed(masks.clone(), masks, torch.Generator().manual_seed(3))
    assert torch.equal(again[0], images)


def test_the_unet_reaches_the_size_of_the_image():
    encoder = build_encoder("resnet18", width=4, stride=16, seed=0)
    net = UNet(encoder.channels, 3, 2)
    for size in (64, 72):  # 72 is no multiple of 16
        images = torch.rand(2, 1, size, size)
        out = net(encoder(images), (size, size))
        assert out.shape == (2, 3, size, size)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.ndim > 1)
    widths = [block.layers[0].out_channels for block in net.blocks]
    assert widths == [32, 16, 8, 4, 2]


# --- what is known of which image ------------------------------------------------------------------------------------

SIZE = 48
CONFIG = EvaluateConfig(size=SIZE, resamples=80, seeds=1, fractions=(1.0,), accelerator="cpu")


@pytest.fixture(scope="module")
def phantoms():
    return read_phantom(f"200,seed=5,size={SIZE},prevalence=0.5")


def material_of(collection, wanted=()):
    whole = prepare(collection, ("train", "test"), CONFIG, "val", QUIET)
    return segmented(whole, SIZE, wanted, QUIET)


class _Broken:
    def radiograph(self):
        raise DataError("the mask is cut short")

    def __str__(self):
        return "broken"


class _Empty:
    def radiograph(self):
        image = torch.zeros(1, 8, 8)
        return Radiograph(image, full_valid(image), None)

    def __str__(self):
        return "empty"


def test_regions_are_known_where_something_says_so(phantoms):
    records = list(phantoms.records)
    first = next(i for i, r in enumerate(records) if r.split == "train" and r.labels["Mass"] == 0)
    shown = next(i for i, r in enumerate(records) if r.split == "train" and r.labels["Mass"] == 1)
    records[first] = records[first]._replace(masks={"heart": _Empty()})  # lungs unknown, heart known to be nowhere
    records[shown] = records[shown]._replace(masks={k: v for k, v in records[shown].masks.items() if k != "Mass"})
    material = material_of(phantoms._replace(records=records))
    assert material.findings[:2] == ("heart", "lungs")
    assert set(material.findings[2:]) == set(phantoms.findings)
    where = [r.name for r in material.fit.records].index(records[first].name)
    row = dict(zip(material.findings, material.fit.labels[where], strict=True))
    assert row["heart"] == 0
    assert math.isnan(row["lungs"])
    assert row["Mass"] == 0
    where = [r.name for r in material.fit.records].index(records[shown].name)
    assert math.isnan(material.fit.labels[where][material.findings.index("Mass")])  # it is there, nobody says where
    assert material.classes.findings == phantoms.findings


def test_a_broken_mask_is_listed_and_many_are_refused(phantoms):
    records = list(phantoms.records)
    at = next(i for i, r in enumerate(records) if r.split == "train")
    records[at] = records[at]._replace(masks={**records[at].masks, "heart": _Broken()})
    material = material_of(phantoms._replace(records=records))
    assert [s.image for s in material.fit.skipped] == [records[at].name]
    assert "mask of heart" in material.fit.skipped[0].reason
    where = [r.name for r in material.fit.records].index(records[at].name)
    assert math.isnan(material.fit.labels[where][0])
    # training and measuring go on without it
    found = segment(build_encoder("resnet18", width=4, stride=16), material, draw_labels(material, 1.0, 0),
                    SegmentConfig(steps=40, width=2), "frozen", QUIET)  # fmt: skip
    assert found.fitted[0]
    every = [r._replace(masks={"heart": _Broken()}) for r in phantoms.records]
    with pytest.raises(DataError, match="masks of 'train' cannot be read"):
        material_of(phantoms._replace(records=every))


def test_what_cannot_be_segmented_is_said(phantoms):
    bare = phantoms._replace(records=[r._replace(masks={}) for r in phantoms.records])
    with pytest.raises(DataError, match="has a mask"):
        material_of(bare)
    with pytest.raises(DataError, match="'lung'; did you mean 'lungs'"):
        material_of(phantoms, ("lung",))
    nowhere = prepare(bare._replace(records=[r._replace(boxes=()) for r in bare.records]), ("train", "test"), CONFIG,
                      "val", QUIET)  # fmt: skip
    with pytest.raises(DataError, match="box or mask"):
        placed(nowhere, SIZE, (), QUIET)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 1}, {"width": 0}, {"learning_rate": 0.0},
                                   {"weight_decay": -1.0}])  # fmt: skip
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SegmentConfig(**wrong)


# --- heads -----------------------------------------------------------------------------------------------------------


def run_head(phantoms, head, seed=0, **changes):
    material = material_of(phantoms, ("heart", "lungs"))
    encoder = build_encoder("resnet18", width=8, stride=16, seed=2)
    draw = draw_labels(material, 1.0, seed)
    config = SegmentConfig(**{"steps": 60, "batch_size": 8, "width": 4, "learning_rate": 3e-3, **changes})
    return encoder, material, segment(encoder, material, draw, config, head, QUIET)


def test_the_token_probe_reads_what_the_maps_say():
    """Where the picture is the mask itself the coarse maps say where it is, up to their resolution."""
    phantoms, size = read_phantom("90,seed=5,size=96"), 96
    scores, limit = [], 0.0
    for told in (False, True):
        records = [
            r._replace(image=r.masks["lungs"] if told else r.image, masks={"lungs": r.masks["lungs"]})
            for r in phantoms.records
        ]
        whole = prepare(phantoms._replace(records=records), ("train", "test"), replace(CONFIG, size=size), "val", QUIET)
        material = segmented(whole, size, (), QUIET)
        found = segment(build_encoder("resnet18", width=8, stride=16, seed=2), material, draw_labels(material, 1.0, 0),
                        SegmentConfig(), "token", QUIET)  # fmt: skip
        test = material.tests["test"]
        scores.append(found.tests["test"]["dice"][:, 0].mean())
        # the best that can be drawn with a bilinear map of 6 x 6 positions that know their cells exactly
        masks = torch.stack([torch.from_numpy(material.masks(r, "lungs")).float() for r in test.records])[:, None]
        first = found.model.encoder.first_centre
        smooth = to_pixels(_covered(masks, 6, 6, first), size, size, first)[:, 0].numpy()
        limit = max(
            np.mean([dice(s >= t, m[0].numpy() > 0) for s, m in zip(smooth, masks, strict=True)])
            for t in np.arange(0.1, 0.9, 0.05)
        )
    assert scores[0] < scores[1] <= limit + 0.02
    assert scores[1] > 0.85 * limit


@pytest.mark.parametrize("head", ["frozen", "finetune"])
def test_planted_organs_are_found(phantoms, head):
    """Lungs and heart lie where anatomy puts them: better than the best that ignores the image, the mean mask."""
    encoder, material, found = run_head(phantoms, head, steps=200, learning_rate=1e-2)
    before = {k: v.clone() for k, v in build_encoder("resnet18", width=8, stride=16, seed=2).state_dict().items()}
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])  # what is judged is not changed
    inside = dict(found.model.encoder.state_dict())
    moved = any(not torch.equal(value, before[name]) for name, value in inside.items())
    assert moved == (head == "finetune")  # a frozen encoder keeps its norms' statistics too
    test, fit = material.tests["test"], material.fit
    score = found.tests["test"]["dice"].mean(0)
    for r, name in enumerate(material.findings):
        mean = np.mean([material.masks(record, name) for record in fit.records], axis=0)
        prior = max(
            np.mean([dice(mean >= t, material.masks(record, name)) for record in test.records]) for t in (0.3, 0.5, 0.7)
        )
        assert score[r] > prior
    assert found.fitted.all()
    assert set(found.facts["thresholds"]) == {"heart", "lungs"}


@pytest.mark.parametrize("head", ["token", "frozen"])
def test_a_head_is_reproducible_and_its_numbers_are_of_its_model(phantoms, head):
    _, material, one = run_head(phantoms, head, steps=6)
    _, _, two = run_head(phantoms, head, steps=6)
    for measure in MEASURES:
        assert np.array_equal(one.tests["test"][measure], two.tests["test"][measure])
    part = material.tests["test"]
    from otcxr.data.images import fit_square

    record = part.records[4]
    image = fit_square(material.pixels.get(record.image).image, SIZE)
    with torch.no_grad():
        logits = one.model(image[None])[0].numpy()
    for r, name in enumerate(material.findings):
        truth = material.masks(record, name)
        found = logits[r] >= one.thresholds[r]
        assert one.tests["test"]["dice"][4, r] == pytest.approx(dice(found, truth), abs=1e-3)


def test_the_token_probe_is_the_penalised_regression(phantoms):
    """Its gradient is zero: checked by central differences of the objective in the module's text."""
    _, _, found = run_head(phantoms, "token")
    penalty = found.facts["penalty"]
    material = material_of(phantoms, ("heart", "lungs"))
    from otcxr.evaluation.segment import _entropy, _Source, _tokens

    source = _Source(material, material.masks, torch.device("cpu"))
    x, y, known = (t.double() for t in _tokens(found.model, material.fit, source, 16, 0))
    deviation = x.std(0).clamp_min(1e-6)
    weight = found.model.head.weight[:, :, 0, 0].double() * deviation
    bias = found.model.head.bias.double() + (found.model.head.weight[:, :, 0, 0].double() @ x.mean(0))
    x = (x - x.mean(0)) / deviation

    def objective(w):
        return float(_entropy(x @ w.T + bias, y, known) + penalty / 2 * w.square().sum())

    base = objective(weight)
    rng = np.random.default_rng(0)
    for _ in range(10):
        step = torch.from_numpy(rng.normal(size=tuple(weight.shape)))
        step /= step.norm()
        slope = (objective(weight + 1e-3 * step) - objective(weight - 1e-3 * step)) / 2e-3
        assert abs(slope) < 2e-3
        assert objective(weight + 0.3 * step) > base


def test_the_empties_are_told_by_the_largest_logit(phantoms):
    material = material_of(phantoms, ("Mass",))
    encoder = build_encoder("resnet18", width=8, stride=16, seed=2)
    found = segment(encoder, material, draw_labels(material, 1.0, 0), SegmentConfig(steps=10, width=4), "frozen", QUIET)
    labels = material.tests["test"].labels[:, 0]
    assert {0.0, 1.0} == set(labels[~np.isnan(labels)].tolist())
    largest = found.tests["test"]["empties"][:, 0]
    slow = np.mean([(a > b) + 0.5 * (a == b) for a in largest[labels == 1] for b in largest[labels == 0]])
    assert auroc(labels, largest) == pytest.approx(slow, abs=1e-9)
    dices = found.tests["test"]["dice"][:, 0]
    assert (dices[labels == 0] == 0).all()


def test_a_segmenter_of_one_image_draws_needs_two(phantoms):
    material = material_of(phantoms, ("heart",))
    draw = draw_labels(material, 1.0, 0)
    with pytest.raises(DataError, match="at least two images"):
        segment(build_encoder("resnet18", width=4), material, draw._replace(fit=draw.fit[:1]), SegmentConfig(), "token",
                QUIET)  # fmt: skip


def test_a_frozen_encoder_stays_in_evaluation_mode():
    for head in HEADS:
        model = Segmenter(build_encoder("resnet18", width=4), 1, head, 2).train()
        assert model.encoder.training == (head == "finetune")
        assert model.head.training


# --- the task --------------------------------------------------------------------------------------------------------


def test_the_task_has_intervals_and_a_random_twin(phantoms):
    config = replace(CONFIG, fractions=(0.3, 1.0), seeds=2, segment=SegmentConfig(regions=("lungs", "Mass")))
    result = evaluate(
        "segment-token", build_encoder("resnet18", width=8, stride=16, seed=3), phantoms, ("train", "test"), config
    ).result
    assert list(result["findings"]) == ["lungs", "Mass"]
    lungs = result["findings"]["lungs"]
    assert 0 < lungs["dice"]["low"] < lungs["dice"]["value"] < lungs["dice"]["high"] < 1
    assert lungs["empties"]["value"] is None  # every image shows lungs
    assert "without it" in lungs["empties"]["note"]
    assert result["findings"]["Mass"]["empties"]["value"] is not None
    assert set(result["random"]["findings"]["lungs"]) >= set(MEASURES)
    assert result["difference"]["findings"]["lungs"]["dice"]["p_value"] is not None
    assert [share["fraction"] for share in result["fractions"]] == [0.3, 1.0]
    assert result["splits"]["test"]["positives"]["lungs"] == result["splits"]["test"]["images"]
    json.dumps(result, allow_nan=False)


def test_from_the_command_line_to_the_page(tmp_path, capsys):
    from otcxr.data.dataset import DataConfig
    from otcxr.data.views import ViewsConfig
    from otcxr.report import write_report
    from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, pretrain

    run = pretrain(PretrainConfig(
        data=DataConfig("phantom:120,seed=5,size=48,prevalence=0.5"), views=ViewsConfig(size=48),
        encoder=EncoderConfig(name="resnet18", width=8), out=str(tmp_path / "run"),
        train=TrainConfig(epochs=1, batch_size=16, accelerator="cpu", probes=0, online_images=0),
    ))  # fmt: skip
    words = ["evaluate", str(run.path), "--task", "segment-frozen", "--eval.resamples", "50",
             "--eval.fractions", "[1.0]", "--eval.seeds", "1", "--segment.steps", "4",
             "--segment.width", "2"]  # fmt: skip
    assert main([*words, "--segment.regions", "[lungs, Mass]"]) == 0
    assert "lungs" in capsys.readouterr().out
    result = json.loads((run.path / "evaluation" / "segment-frozen.json").read_text())
    assert result["pretraining"]["split"] == "train"
    rows = (run.path / "evaluation" / "segment-frozen.csv").read_text().splitlines()
    assert any(",lungs,dice," in row for row in rows)
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "Segmentation, frozen" in page
    assert "Hausdorff 95 / side" in page
    assert main([*words, "--segment.regions", "[lung]"]) == 1
    assert "did you mean 'lungs'" in capsys.readouterr().err
