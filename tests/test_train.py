"""Pre-training from end to end on a few small phantoms: resume, kill, interruption, refusal."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from otcxr.config import to_plain
from otcxr.data.dataset import DataConfig
from otcxr.data.records import Record
from otcxr.data.views import ViewsConfig
from otcxr.errors import CheckpointError, ConfigError, DataError, OtcxrError
from otcxr.methods import METHODS
from otcxr.methods.otcxr import OTCXRSettings
from otcxr.nn.encoder import load_encoder
from otcxr.ot import backends
from otcxr.runs import Run
from otcxr.train import (
    EncoderConfig,
    PretrainConfig,
    TrainConfig,
    build_method,
    config_from_plain,
    config_to_plain,
    pretrain,
)


def tiny(out: Path, method: str = "otcxr", **changes: object) -> PretrainConfig:
    """Four steps an epoch on 32-pixel phantoms, two epochs."""
    config = PretrainConfig(
        data=DataConfig(source="phantom:48,seed=7,size=32"),
        method=method,
        views=ViewsConfig(size=32),
        encoder=EncoderConfig(width=4),
        train=TrainConfig(epochs=2, batch_size=8, accelerator="cpu", health_every=3, log_every=1, probes=2),
        out=str(out),
    )
    return replace(config, **changes)


SMALL = OTCXRSettings(hidden=32, outputs=16, global_hidden=32, global_outputs=32)  # heads that are quickly saved


def final_weights(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("encoder.safetensors", "method.safetensors")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    pretrain(tiny(out))
    return out


def test_a_run_leaves_every_file_that_the_later_steps_read(finished):
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    assert names >= {
        "config.yaml", "environment.json", "skipped.csv", "metrics.jsonl", "last.ckpt", "encoder.safetensors",
        "encoder.json", "method.safetensors", "pairs/000.npz", "pairs/001.npz", "last-1.ckpt",
        "best/encoder.safetensors", "best/encoder.json", "best/last.ckpt",
    }  # fmt: skip
    assert "last-2.ckpt" not in names  # train.keep is 2
    assert not [name for name in names if name.endswith(".tmp")]


def test_the_environment_names_what_solved_the_transport(finished):
    facts = Run.open(finished).read_json("environment.json")
    assert facts["transport"] == backends("cpu")[0]
    assert ("numba" in facts["versions"]) == ("native" in backends("cpu"))


def test_metrics_hold_loss_terms_transport_and_verdict(finished):
    lines = Run.open(finished).read_metrics()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(np.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in lines)
    assert not any("online" in line for line in lines)  # too few labelled images to judge on
    assert {"transport", "variance", "covariance", "residual"} <= set(lines[0])
    seen = [line for line in lines if "health" in line]
    assert len(seen) >= 3
    for line in seen:
        assert {"entropy_mu", "entropy_nu", "entropy_plan", "hits", "hits_chance"} <= set(line["health"])
        assert isinstance(line["verdict"]["healthy"], bool)


def test_there_is_a_checkpoint_before_the_first_step(tmp_path):
    """A folder that cannot be written to is found then, and there is something to go on from."""
    run = pretrain(tiny(tmp_path / "run"), stop_after=1)
    states = [torch.load(run.path / name, weights_only=True) for name in ("last-1.ckpt", "last.ckpt")]
    assert [state["step"] for state in states] == [0, 1]
    assert not states[0]["optimizer"]["state"]
    start = build_method(tiny(tmp_path)).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in states[0]["method"].items())
    assert not (run.path / "best").exists()  # no epoch has ended


def test_encoder_is_plain_and_describes_itself(finished):
    encoder = load_encoder(finished)
    facts = json.loads((finished / "encoder.json").read_text())
    assert facts["architecture"] == encoder.architecture._asdict()
    assert facts["input_size"] == 32
    assert not any("cross_view" in name or "projector" in name for name in encoder.state_dict())


def test_training_changes_the_weights(finished):
    start = build_method(tiny(finished)).encoder.state_dict()
    end = load_encoder(finished).state_dict()
    assert all(not torch.equal(start[name], end[name]) for name in end if name.endswith("weight"))


def test_pairs_store_what_the_method_matched(finished):
    with np.load(finished / "pairs" / "000.npz") as pair:
        assert pair["view_s"].shape == (32, 32)
        assert pair["plan"].shape == pair["cost"].shape == (pair["a"].size, pair["b"].size)
        # the tolerance of the method; the solver leaves the rows exact and the columns to the residual
        assert np.abs(pair["plan"].sum(0) - pair["b"]).sum() <= 1e-3
        assert np.abs(pair["plan"].sum(1) - pair["a"]).sum() <= 1e-3
        assert (pair["a"].reshape(pair["valid_s"].shape)[~pair["valid_s"]] == 0).all()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_same_seed_same_weights_other_seed_other_weights(method, tmp_path):
    train = TrainConfig(epochs=1, batch_size=8, accelerator="cpu", probes=0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(tiny(tmp_path / name, method, train=train, seed=seed))
    assert final_weights(tmp_path / "a") == final_weights(tmp_path / "b")
    assert final_weights(tmp_path / "a") != final_weights(tmp_path / "c")


def test_all_methods_start_from_one_encoder():
    states = [build_method(tiny(Path("x"), name)).encoder.state_dict() for name in METHODS]
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


def test_loader_workers_do_not_change_a_bit(tmp_path):
    for name, workers in (("a", 0), ("b", 2)):
        config = tiny(tmp_path / name)
        pretrain(replace(config, data=replace(config.data, workers=workers)))
    assert final_weights(tmp_path / "a") == final_weights(tmp_path / "b")


def command(config: PretrainConfig, file: Path) -> list[str]:
    plain = config_to_plain(config)
    file.write_text(yaml.safe_dump(plain))
    return [sys.executable, "-m", "otcxr", "pretrain", "--config", str(file)]


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.is_file() and path.read_text().count("\n") >= steps:
            return
        if process.poll() is not None:
            raise AssertionError(f"the run ended before it could be stopped: {process.communicate()}")
        time.sleep(0.01)
    process.kill()
    raise AssertionError("the run did not start")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_bit_for_bit(sent, tmp_path):
    """SIGKILL falls back to the last epoch, the others save where they are; both end as if nothing had happened."""
    long = TrainConfig(epochs=12, batch_size=8, accelerator="cpu", log_every=1, health_every=4, probes=1)
    stopped, whole = tiny(tmp_path / "stopped", train=long), tiny(tmp_path / "whole", train=long)
    stopped, whole = (replace(config, settings=SMALL) for config in (stopped, whole))
    words = command(stopped, tmp_path / "settings.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    wait_for_steps(tmp_path / "stopped", 7, process)
    process.send_signal(sent)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    if sent == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert b"--resume true" in error
        assert b"Traceback" not in error
    state = Run.open(tmp_path / "stopped").read_checkpoint()
    assert state is not None
    assert 4 <= state["step"] < 48
    for path in (tmp_path / "stopped").rglob("*"):  # nothing half-written under a final name
        if path.suffix == ".json":
            json.loads(path.read_text())
    # the run goes on with its own settings, as the message says; nothing else need be typed again
    again = [*words[:4], "--resume", "true", "--out", str(tmp_path / "stopped")]
    done = subprocess.run(again, env=environment, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    pretrain(whole)
    assert final_weights(tmp_path / "stopped") == final_weights(tmp_path / "whole")
    steps = [line["step"] for line in Run.open(tmp_path / "stopped").read_metrics()]
    assert steps == list(range(1, steps[-1] + 1))


def test_a_copied_run_goes_on_in_the_copy(finished, tmp_path):
    """The folder's own settings do not name the folder."""
    import shutil

    from otcxr.cli import main

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for path in copy.rglob("last*.ckpt"):
        path.unlink()
    before = (finished / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_text("")
    assert main(["pretrain", "--resume", "true", "--out", str(copy)]) == 0
    assert (copy / "last.ckpt").exists()
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert final_weights(copy) == final_weights(finished)


def test_resume_of_a_finished_run_changes_nothing(finished):
    before = final_weights(finished)
    pretrain(tiny(finished, resume=True))
    assert final_weights(finished) == before


def test_a_second_run_does_not_overwrite_the_first(finished):
    with pytest.raises(ConfigError, match="already holds a run; go on with --resume true"):
        pretrain(tiny(finished))


def test_resume_with_another_architecture_is_refused(finished):
    with pytest.raises(CheckpointError, match=r"encoder.width = 4, now it is 8"):
        pretrain(tiny(finished, encoder=EncoderConfig(width=8), resume=True))


def test_resume_with_other_data_is_refused(finished):
    with pytest.raises(ConfigError, match="no longer holds the images"):
        pretrain(tiny(finished, data=DataConfig(source="phantom:60,seed=7,size=32"), resume=True))


def test_a_source_that_moved_can_be_continued(tmp_path):
    import shutil

    import cv2

    generator = np.random.default_rng(0)
    (tmp_path / "here").mkdir()
    for number in range(16):
        cv2.imwrite(str(tmp_path / "here" / f"{number}.png"), generator.integers(0, 256, (40, 40), dtype=np.uint8))
    short = TrainConfig(epochs=1, batch_size=8, accelerator="cpu", probes=0)
    pretrain(tiny(tmp_path / "run", data=DataConfig(f"folder:{tmp_path / 'here'}"), train=short))
    shutil.move(tmp_path / "here", tmp_path / "there")
    there = tiny(tmp_path / "run", data=DataConfig(f"folder:{tmp_path / 'there'}"), train=short, resume=True)
    pretrain(there)
    (tmp_path / "there" / "3.png").unlink()
    with pytest.raises(ConfigError, match="no longer holds the images"):
        pretrain(there)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_half_precision_trains_and_leaves_float32_weights(method, tmp_path):
    half = TrainConfig(epochs=1, batch_size=8, accelerator="cpu", precision="bf16-mixed", probes=1, log_every=1)
    run = pretrain(tiny(tmp_path / "run", method, train=half))
    full = pretrain(tiny(tmp_path / "full", method, train=replace(half, precision="32-true")))
    assert all(value.dtype != torch.bfloat16 for value in load_encoder(run.path).state_dict().values())
    first, expected = run.read_metrics()[0]["loss"], full.read_metrics()[0]["loss"]
    assert first == pytest.approx(expected, rel=0.05, abs=0.005)  # cosines have their chance level at 0
    assert first != expected  # it did compute in half precision


def test_half_precision_leaves_pixels_and_geometry_alone(tmp_path, monkeypatch):
    """What a method gets is what the loader gave, to the bit: autocast rounds operations, nothing rounds inputs."""
    seen = []
    forward = METHODS["otcxr-geometry"].build.forward

    def noted(self, batch, **options):
        seen.append(batch)
        return forward(self, batch, **options)

    monkeypatch.setattr(METHODS["otcxr-geometry"].build, "forward", noted)
    for precision in ("bf16-mixed", "32-true"):
        train = TrainConfig(epochs=1, batch_size=8, accelerator="cpu", precision=precision, probes=0)
        pretrain(tiny(tmp_path / precision, "otcxr-geometry", train=train), stop_after=1)
    half, full = seen
    assert torch.equal(half.geometry, full.geometry)
    assert all(torch.equal(x, y) for x, y in zip(half.views, full.views, strict=True))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_double_precision_is_for_checks(method, tmp_path):
    double = TrainConfig(epochs=1, batch_size=8, accelerator="cpu", precision="64-true", probes=1, log_every=1)
    run = pretrain(tiny(tmp_path / "run", method, train=double))
    single = pretrain(tiny(tmp_path / "single", method, train=replace(double, precision="32-true")))
    state = run.read_checkpoint()
    assert {value.dtype for value in state["method"].values() if value.is_floating_point()} == {torch.float64}
    losses, expected = ([line["loss"] for line in r.read_metrics()] for r in (run, single))
    assert losses[0] == pytest.approx(expected[0], rel=1e-3)
    assert losses != expected
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("method", sorted(METHODS))
def test_divergence_stops_before_a_weight_takes_it_in(method, tmp_path):
    wild = TrainConfig(epochs=3, batch_size=8, accelerator="cpu", learning_rate=1e12, clip=1e30, warmup=0.0, probes=0)
    with pytest.raises(OtcxrError, match="diverged at step .* Start anew .*lower train.learning_rate"):
        pretrain(tiny(tmp_path / "run", method, train=wild))


def test_divergence_after_an_epoch_points_at_the_state_that_is_good(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", train=TrainConfig(epochs=3, batch_size=8, accelerator="cpu", clip=1e30, probes=0))
    monkeypatch.setattr("otcxr.loop.cosine_schedule", lambda step, warmup, total: 1e-3 if step < 5 else 1e15)
    with pytest.raises(OtcxrError, match=r"last\.ckpt holds the last good state"):
        pretrain(config)
    state = Run(tmp_path / "run").read_checkpoint()
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["method"].values())


def test_what_a_killed_process_left_is_swept(tmp_path):
    run = Run(tmp_path / "run")
    (run.path / "pairs").mkdir(parents=True)
    stranger = run.path / "deep" / "thesis.4194305.tmp"
    stranger.parent.mkdir()
    for file in (stranger, run.path / "notes.tmp"):
        file.write_text("not ours")
    with run.lock():  # a folder that holds no run is nobody's to clear
        assert stranger.exists()
    run.write_config({})
    gone, mine = run.path / "pairs" / "000.npz.4194305.tmp", run.path / f"last.ckpt.{os.getpid()}.tmp"
    gone.write_bytes(b"half")
    mine.write_bytes(b"at work")
    with run.lock():
        assert not gone.exists()
        assert mine.exists()
        assert stranger.exists()
        assert (run.path / "notes.tmp").exists()


def test_a_second_process_is_refused(tmp_path):
    run = Run(tmp_path / "run")
    with run.lock(), pytest.raises(ConfigError, match="another process is writing"):
        pretrain(tiny(run.path))


def test_time_holds_everything_and_metrics_are_json(finished):
    lines = Run.open(finished).read_metrics()
    assert [line["elapsed_s"] for line in lines] == sorted(line["elapsed_s"] for line in lines)
    for text in (finished / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in text
        json.loads(text)


def test_a_damaged_checkpoint_is_named(tmp_path):
    """One is passed over (see test_resume.py); where no whole one is left, all of them are named."""
    run = tmp_path / "run"
    pretrain(tiny(run, train=TrainConfig(epochs=1, batch_size=8, accelerator="cpu", probes=0)))
    for name in ("last.ckpt", "last-1.ckpt"):
        data = (run / name).read_bytes()
        (run / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"last.ckpt is damaged .*; .*last-1.ckpt is damaged .*; remove it to"):
        pretrain(tiny(run, train=TrainConfig(epochs=1, batch_size=8, accelerator="cpu", probes=0), resume=True))


def test_a_cut_line_of_metrics_is_dropped(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]
    run.cut_metrics(1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="no usable GPU; use cpu or auto"):
        pretrain(tiny(tmp_path / "run", train=TrainConfig(accelerator="cuda")))


def test_too_few_images_for_a_batch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fewer than train.batch_size = 640; set train.batch_size to at most"):
        pretrain(tiny(tmp_path / "run", train=TrainConfig(batch_size=640, accelerator="cpu")))


def test_broken_images_are_skipped_and_listed_up_to_the_limit(tmp_path):
    import cv2

    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        cv2.imwrite(str(folder / f"{number:02d}.png"), generator.integers(0, 256, (40, 40), dtype=np.uint8))
    (folder / "07.png").write_bytes(b"no picture")
    train = TrainConfig(epochs=1, batch_size=8, accelerator="cpu", probes=1)
    data = DataConfig(source=f"folder:{folder}", max_skipped=0.05)
    run = pretrain(tiny(tmp_path / "run", data=data, train=train))
    assert "07.png" in (run.path / "skipped.csv").read_text()
    (folder / "08.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 20 images .* set data.max_skipped to 0.1"):
        pretrain(tiny(tmp_path / "second", data=data, train=train))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_settings_survive_yaml(method, tmp_path):
    config = tiny(tmp_path, method)
    assert config_from_plain(yaml.safe_load(yaml.safe_dump(config_to_plain(config)))) == config


def test_stride_follows_the_size_of_the_views():
    source = DataConfig(source="phantom:8")
    assert PretrainConfig(data=source, views=ViewsConfig(size=128)).encoder.stride == 16
    assert PretrainConfig(data=source, views=ViewsConfig(size=224)).encoder.stride == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "otcxx"}, "unknown method 'otcxx'; did you mean 'otcxr'"),
        ({"settings": METHODS["simclr"].settings}, "needs settings of type OTCXRSettings"),
    ],
)
def test_impossible_settings_name_the_fix(change, message):
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(data=DataConfig(source="phantom:8"), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"accelerator": "tpu"},
        {"precision": "16-true"},
        {"precision": "64-true", "strategy": "fsdp"},
        {"strategy": "deepspeed"},
        {"on_collapse": "panic"},
        {"accumulate": 0},
        {"keep": 0},
        {"collapse_patience": 0},
        {"checkpoint_minutes": 0.0},
        {"online_images": -1},
        {"momentum": 1.0},
        {"trust": 0.0},
        {"optimizer": "adam"},
        {"weight_decay": -1.0},
        {"probes": -1},
    ],
)
def test_impossible_training_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        TrainConfig(**change)


def test_every_committed_configuration_is_parsed():
    files = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert files
    for file in files:
        plain = yaml.safe_load(file.read_text())
        config = config_from_plain(plain)
        assert to_plain(config.train)["epochs"] == plain["train"]["epochs"], file


def test_probes_come_from_the_test_split_and_prefer_boxes():
    from otcxr.data import open_collection
    from otcxr.probes import choose_probes

    collection = open_collection("phantom:60,seed=2,size=32")
    chosen: list[Record] = list(choose_probes(collection, collection.split("train"), 3, 0).records)
    assert [r.split for r in chosen] == ["test"] * 3
    assert all(r.boxes for r in chosen)
