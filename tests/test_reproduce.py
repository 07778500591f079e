"""A run done again: the same bits, or what differs; and the committed configuration that trains with plain SGD."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from otcxr.cli import main
from otcxr.data.dataset import DataConfig
from otcxr.data.views import ViewsConfig
from otcxr.errors import ConfigError, DataError
from otcxr.reproduce import compare_runs, reproduce
from otcxr.runs import Run
from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, config_from_plain, pretrain

CONFIGS = Path(__file__).parent.parent / "configs"


def write_pictures(folder: Path, change: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40), dtype=np.uint8)
        if number == 5:
            pixels[20, 20] = (int(pixels[20, 20]) + change) % 256
        cv2.imwrite(str(folder / f"{number:02d}.png"), pixels)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("reproduce")
    train = TrainConfig(epochs=3, batch_size=8, accelerator="cpu", log_every=1, health_every=4, probes=1)
    config = PretrainConfig(
        data=DataConfig(f"folder:{write_pictures(place / 'images')}"),
        views=ViewsConfig(size=32), encoder=EncoderConfig(width=4), train=train, out=str(place / "run"),
    )  # fmt: skip
    return pretrain(config)


def test_a_run_is_reproduced_bit_for_bit(run, tmp_path, capsys):
    assert main(["reproduce", str(run.path), "--out", str(tmp_path / "again")]) == 0
    assert (
        "reproduced bit for bit: 9 lines of metrics up to step 9, the weights are identical" in capsys.readouterr().out
    )
    result = json.loads((tmp_path / "again" / "reproduction.json").read_text())
    assert result["identical"] is True
    assert result["weights"] == "identical"
    assert (result["first_difference"], result["environment"], result["continued"]) == (None, {}, [])
    again = Run.open(tmp_path / "again")
    assert (again.path / "method.safetensors").read_bytes() == (run.path / "method.safetensors").read_bytes()


def test_the_first_steps_alone_can_be_done_again(run, tmp_path):
    result = reproduce(run, tmp_path / "again", steps=4)
    assert (result["identical"], result["step"], result["lines"]) == (True, 4, 4)
    assert result["weights"] == "not compared"
    assert Run.open(tmp_path / "again").read_checkpoint()["step"] == 4


def test_an_unfinished_run_is_done_again_as_far_as_it_came(run, tmp_path):
    config = config_from_plain({**run.read_config(), "out": str(tmp_path / "part")})
    part = pretrain(config, stop_after=5)
    result = reproduce(part, tmp_path / "again")
    assert (result["identical"], result["step"], result["weights"]) == (True, 5, "identical")


def test_a_number_that_differs_is_named(run, tmp_path, capsys):
    forged = Run(tmp_path / "forged")
    shutil.copytree(run.path, forged.path)
    lines = run.read_metrics()
    lines[6]["transport"] *= 1 + 1e-12
    lines[7]["loss"] *= 1.5
    (forged.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = compare_runs(forged, run, 9)
    assert result["identical"] is False
    assert (result["first_difference"]["step"], result["first_difference"]["name"]) == (7, "transport")
    assert result["largest_loss_difference"] == pytest.approx(1 / 3)
    assert main(["reproduce", str(forged.path), "--out", str(tmp_path / "again"), "--steps", "8"]) == 1
    assert "NOT reproduced bit for bit: first difference at step 7 in transport" in capsys.readouterr().out


def test_weights_that_differ_are_seen(run, tmp_path):
    from safetensors.torch import load_file, save_file

    other = Run(tmp_path / "other")
    shutil.copytree(run.path, other.path)
    weights = load_file(run.path / "method.safetensors")
    name = next(name for name, value in weights.items() if value.is_floating_point())
    weights[name] = weights[name] + 1e-6
    save_file(weights, other.path / "method.safetensors")
    result = compare_runs(run, other, 9)
    assert (result["identical"], result["weights"], result["first_difference"]) == (False, "different", None)


def test_a_missing_line_is_seen(run, tmp_path):
    other = Run(tmp_path / "other")
    shutil.copytree(run.path, other.path)
    other.cut_metrics(7)
    short = compare_runs(run, other, 9)
    assert (short["lines"], short["lines_of_one_only"], short["identical"]) == (7, [2, 0], True)
    text = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other.path / "metrics.jsonl").write_text("".join(text[:3] + text[4:]))
    assert compare_runs(other, run, 9)["lines_of_one_only"] == [0, 1]
    (other.path / "metrics.jsonl").write_text("")
    assert compare_runs(run, other, 9)["identical"] is False


def test_changed_pictures_are_reported_by_content(run, tmp_path):
    changed = write_pictures(tmp_path / "images", change=90)
    result = reproduce(run, tmp_path / "again", source=f"folder:{changed}")
    assert "contents_digest" in result["environment"]
    assert "data_digest" not in result["environment"]
    assert result["identical"] is False
    moved = write_pictures(tmp_path / "moved")
    same = reproduce(run, tmp_path / "third", source=f"folder:{moved}")
    assert (same["identical"], same["environment"]) == (True, {})


def test_it_computes_with_the_runs_own_threads(run, tmp_path, monkeypatch):
    seen = []
    copy = Run(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    facts = run.read_json("environment.json")
    copy.write_json("environment.json", {**facts, "threads": 2})

    def training(config, progress, stop_after):
        seen.append(torch.get_num_threads())
        return pretrain(config, progress, stop_after=stop_after)

    monkeypatch.setattr("otcxr.reproduce.pretrain", training)
    before = torch.get_num_threads()
    result = reproduce(copy, tmp_path / "again", steps=1)
    assert (seen, torch.get_num_threads()) == ([2], before)
    assert result["environment"] == {}


def test_interruptions_are_told(run, tmp_path):
    config = config_from_plain({**run.read_config(), "out": str(tmp_path / "twice")})
    pretrain(config, stop_after=4)
    whole = pretrain(replace(config, resume=True))
    assert whole.read_json("environment.json")["continued"] == [
        {"step": 4, "date": whole.read_json("environment.json")["date"], "changed": {}}
    ]
    result = compare_runs(whole, run, 9)
    assert result["identical"] is True
    assert [part["step"] for part in result["continued"]] == [4]


def test_what_cannot_be_done_again_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"between 0 \(all\) and 9"):
        reproduce(run, tmp_path / "again", steps=10)
    with pytest.raises(ConfigError, match="already holds a run"):
        reproduce(run, run.path)
    young = Run(tmp_path / "young")
    shutil.copytree(run.path, young.path)
    (young.path / "encoder.json").unlink()
    with pytest.raises(DataError, match="has not saved a step yet"):
        reproduce(young, tmp_path / "again")


@pytest.mark.slow
def test_plain_gradient_descent_learns_and_stays_healthy(tmp_path):
    """The committed configuration, shortened; all of it: benchmarks/train_config.py."""
    config = config_from_plain(yaml.safe_load((CONFIGS / "otcxr-sgd.yaml").read_text()))
    assert (config.train.optimizer, config.train.momentum) == ("sgd", 0.0)
    train = replace(config.train, epochs=6, log_every=1, health_every=5, accelerator="cpu")
    done = pretrain(replace(config, train=train, out=str(tmp_path / "run")))
    lines = [line for line in done.read_metrics() if "loss" in line]
    losses, transport = ([line[name] for line in lines] for name in ("loss", "transport"))
    assert np.median(losses[-12:]) < 0.85 * np.median(losses[:6])
    assert np.median(transport[-12:]) < 0.8 * np.median(transport[:6])
    verdicts = [line["verdict"] for line in lines if "verdict" in line]
    assert len(verdicts) >= 10
    assert all(verdict["healthy"] for verdict in verdicts), verdicts
