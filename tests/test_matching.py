"""What a method pairs on held-out images, against loops that are obviously right."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcxr.cli import main
from otcxr.data.dataset import DataConfig
from otcxr.data.records import Record
from otcxr.data.views import ViewsConfig, collate_views, make_views, view_generator
from otcxr.errors import CheckpointError, ConfigError
from otcxr.matching import MatchingConfig, cover, load_method, measure_matching, pair_scores, regions_of
from otcxr.methods import find_method
from otcxr.report import write_report
from otcxr.runs import Run
from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, build_method, pretrain

CPU = torch.device("cpu")


def tiny(out, method="otcxr"):
    return PretrainConfig(
        method=method, settings=find_method(method).settings,
        data=DataConfig("phantom:60,seed=3,size=64"), views=ViewsConfig(size=64),
        encoder=EncoderConfig(name="resnet18", width=8),
        train=TrainConfig(epochs=1, batch_size=8, accelerator="cpu", probes=0, online_images=0), out=str(out),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: pretrain(tiny(folder / name, name)) for name in ("otcxr", "simclr")}


def pairs_of(count=3, views=None, seed=0):
    image = torch.from_numpy(np.random.default_rng(seed).random((1, 80, 64), dtype=np.float32))
    views = views or ViewsConfig(size=64)
    return collate_views([make_views(image, views, view_generator(seed, 5, k)) for k in range(count)])


# --- the part of a cell that lies in a region ------------------------------------------------------------------------


def slow_cover(mask, geometry, grid, first):
    height, width = grid
    out = np.zeros((len(geometry), height * width))
    for b, (row_x, row_y) in enumerate(geometry.numpy()):
        for i in range(height):
            for j in range(width):
                for k in range(8):
                    for m in range(8):
                        x = (j + first + (m + 0.5) / 8 - 0.5) / width
                        y = (i + first + (k + 0.5) / 8 - 0.5) / height
                        u = (row_x[0] * x + row_x[1] * y + row_x[2]) * mask.shape[1]
                        v = (row_y[0] * x + row_y[1] * y + row_y[2]) * mask.shape[0]
                        if 0 <= u < mask.shape[1] and 0 <= v < mask.shape[0]:
                            out[b, i * width + j] += mask[int(v), int(u)] / 64
    return out


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([(2, 2), (3, 2), (1, 4)]), st.sampled_from([0.0, 0.25, 0.5]))
def test_cover_is_a_count_of_points(seed, grid, first):
    rng = np.random.default_rng(seed)
    mask = rng.random((13, 9)) < 0.4
    turn = rng.uniform(-0.4, 0.4, 2)
    scale = rng.uniform(0.3, 1.2, 2)
    geometry = torch.zeros(2, 2, 3)
    for b, (s, t) in enumerate(zip(scale, turn, strict=True)):
        linear = s * np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])
        geometry[b] = torch.from_numpy(np.hstack([linear, rng.uniform(-0.2, 0.5, (2, 1))]))
    got = cover(mask, geometry, grid, first).numpy()
    # a point within rounding of a pixel's edge may fall on either side
    assert np.abs(got - slow_cover(mask, geometry, grid, first)).max() <= 2 / 64


def test_cover_of_half_an_image():
    mask = np.zeros((64, 32), dtype=bool)
    mask[:, :16] = True
    whole = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    assert cover(mask, whole, (1, 2)).tolist() == [[1.0, 0.0]]
    assert cover(mask, whole, (1, 1)).tolist() == [[0.5]]
    outside = torch.tensor([[[1.0, 0.0, 1.5], [0.0, 1.0, 0.0]]])
    assert cover(~mask, outside, (2, 2)).sum() == 0


# --- one image -------------------------------------------------------------------------------------------------------


def inverse(geometry):
    return np.linalg.inv(np.vstack([geometry, [0.0, 0.0, 1.0]]))


@pytest.mark.parametrize("views", [ViewsConfig(size=64), ViewsConfig(size=64, rotation=20.0, flip=0.5, cutout=1.0)])
def test_hits_are_those_of_a_loop(views):
    method = build_method(tiny("unused")).eval()
    batch = pairs_of(3, views)
    with torch.no_grad():
        got = pair_scores(method.encoder, method.match, batch, {}, CPU)
        match = method.match(batch)
        maps = [method.encoder(view)[-1] for view in batch.views]
    height, width = maps[0].shape[-2:]
    first = method.encoder.first_centre
    valid = [v.float().reshape(3, height, 64 // height, width, 64 // width).mean((2, 4)).numpy() >= 0.5
             for v in batch.valid]  # fmt: skip
    known, hits = 0, dict.fromkeys(("plan", "exact", "nearest_by_cost", "nearest_by_map", "same_place", "chance"), 0.0)
    for b in range(3):
        to_second = inverse(batch.geometry[1, b].numpy())[:2] @ np.vstack([batch.geometry[0, b].numpy(), [0, 0, 1]])
        there = valid[1][b].ravel()
        vectors = [m[b].flatten(1).T.numpy() for m in maps]
        for i in range(height * width):
            if not valid[0][b].ravel()[i]:
                continue
            x, y = to_second @ [(i % width + first) / width, (i // width + first) / height, 1.0]
            if not (0 <= x < 1 and 0 <= y < 1):
                continue
            column = min(max(math.floor(x * width + 0.5 - first), 0), width - 1)
            row = min(max(math.floor(y * height + 0.5 - first), 0), height - 1)
            if not there[row * width + column]:
                continue
            known += 1

            def near(cell, row=row, column=column):
                return abs(cell % width - column) <= 1 and abs(cell // width - row) <= 1

            plan = int(match.plan[b, i].argmax())
            hits["plan"] += near(plan)
            hits["exact"] += plan == row * width + column
            cost = np.where(there, match.cost[b, i].numpy(), np.inf)
            hits["nearest_by_cost"] += near(int(cost.argmin()))
            cosine = vectors[1] @ vectors[0][i] / np.linalg.norm(vectors[1], axis=1)
            hits["nearest_by_map"] += near(int(np.where(there, cosine, -np.inf).argmax()))
            hits["same_place"] += near(i)
            hits["chance"] += np.mean([near(j) for j in np.flatnonzero(there)])
    assert known > 10
    assert got.known == known
    assert set(got.hits) == set(hits)
    for name, expected in hits.items():
        assert got.hits[name] == pytest.approx(expected, abs=1e-3), name


def test_a_method_that_looks_at_the_region_is_seen_to(monkeypatch):
    method = build_method(tiny("unused")).eval()
    batch = pairs_of(4)
    mask = np.zeros((80, 64), dtype=bool)
    mask[10:50, 5:30] = True
    empty = np.zeros((80, 64), dtype=bool)
    empty[0, 0] = True
    inside = [cover(mask, batch.geometry[side], (4, 4), method.encoder.first_centre) for side in (0, 1)]
    real = method.match(batch)
    # all mass where the region is; where a view shows nothing of it, anywhere
    masses = [torch.where(f.sum(-1, keepdim=True) > 0, f, torch.ones_like(f)) * (m > 0)
              for f, m in zip(inside, (real.a, real.b), strict=True)]  # fmt: skip
    monkeypatch.setattr(method, "match", lambda _: real._replace(a=masses[0], b=masses[1]))
    got = pair_scores(method.encoder, method.match, batch, {"region": mask, "corner": empty}, CPU)
    learned = uniform = 0.0
    views = 0
    for f, m, present in zip(inside, masses, (real.a > 0, real.b > 0), strict=True):
        for b in range(4):
            if (f[b] * present[b]).sum() > 0:
                views += 1
                learned += float((m[b] * f[b]).sum() / m[b].sum())
                uniform += float(f[b][present[b]].mean())
    assert got.views["region"] == views > 4
    assert got.focus["region"] == pytest.approx((learned, uniform), rel=1e-5)
    assert learned > 1.3 * uniform
    assert got.views["corner"] < views


def test_an_image_without_shared_positions_says_nothing():
    method = build_method(tiny("unused")).eval()
    batch = pairs_of(1)
    geometry = batch.geometry.clone()
    geometry[1, ..., 2] += 2.0  # another part of the world
    apart = batch._replace(geometry=geometry)
    with torch.no_grad():
        got = pair_scores(method.encoder, method.match, apart, {}, CPU)
    assert got.known == 0
    assert set(got.hits.values()) == {0.0}


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_is_measured_and_shown(runs, tmp_path, capsys):
    run = runs["otcxr"]
    words = ["match", str(run.path), "--data.source", "phantom:120,seed=9,size=64,prevalence=0.6", "--match.pairs", "1"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "cheapest by the method's cost" in printed
    result = json.loads((run.path / "evaluation" / "matching.json").read_text())
    assert result["images"] == result["pairs"] > 15
    found = result["correspondence"]
    for name in ("plan", "exact", "nearest_by_cost", "nearest_by_map", "same_place", "chance"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert found["exact"]["value"] <= found["plan"]["value"]
    gap = found["differences"]["chance"]
    assert gap["value"] == pytest.approx(found["plan"]["value"] - found["chance"]["value"])
    assert 0.2 < result["focus"]["lungs"]["uniform"]["value"] < 0.6
    assert result["focus"]["lungs"]["learned"]["value"] == pytest.approx(
        result["focus"]["lungs"]["uniform"]["value"] + result["focus"]["lungs"]["difference"]["value"]
    )
    assert {"heart", "Nodule"} <= set(result["focus"])
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "What the method pairs" in page
    assert f"{found['plan']['value']:.3f}" in page
    assert "trained on since" not in page
    again = measure_matching(run, "phantom:120,seed=9,size=64,prevalence=0.6", config=MatchingConfig(pairs=1))
    assert again["correspondence"] == found


def test_a_method_without_pairs_still_has_a_map(runs):
    result = measure_matching(runs["simclr"], config=MatchingConfig(images=12, pairs=1, resamples=50))
    assert set(result["correspondence"]) == {"nearest_by_map", "same_place", "chance"}
    assert set(result["focus"]["lungs"]) == {"images", "uniform"}
    assert result["images"] <= 12


@pytest.mark.parametrize("method", ["densecl", "moco"])
def test_a_queue_that_follows_the_number_of_images_is_loaded(tmp_path, method):
    """The queue of a small collection is smaller than the settings say; so is that of the method that is built anew."""
    run = pretrain(tiny(tmp_path / "run", method))
    learned = load_method(run)
    assert len(learned.state_dict()["queue.vectors"]) < type(learned.settings)().queue
    assert measure_matching(run, config=MatchingConfig(images=6, pairs=1, resamples=20))["method"] == method


def test_the_method_that_was_learned_is_loaded(runs, tmp_path):
    method = load_method(runs["otcxr"])
    state = runs["otcxr"].path / "method.safetensors"
    from safetensors.torch import load_file

    saved = load_file(state)
    assert set(saved) == set(method.state_dict())
    assert all(torch.equal(saved[name], value) for name, value in method.state_dict().items())
    empty = Run(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="end of the first epoch"):
        load_method(empty)


def test_boxes_are_regions_where_there_is_no_mask(tmp_path, save_png):
    from otcxr.data.records import Box

    path = save_png("a.png", np.arange(2400, dtype=np.uint16).reshape(40, 60).astype(np.uint8))
    record = Record(path, "s", "p", boxes=(Box("Nodule", 50.0, 10.0, 20.0, 5.0), Box("Nodule", 0.0, 0.0, 2.0, 2.0)))
    mask = regions_of(record)["Nodule"]
    assert mask.shape == (40, 60)
    assert mask.sum() == 10 * 5 + 4
    assert mask[10:15, 50:].all()
    assert regions_of(record._replace(boxes=(Box("Mass", 100.0, 100.0, 5.0, 5.0),))) == {}


@pytest.mark.parametrize("wrong", [{"pairs": 0}, {"images": -1}, {"seed": -1}, {"accelerator": "tpu"}, {"level": 1.0}])
def test_settings_have_limits(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(MatchingConfig(), **wrong)
