"""Stopped and gone on equals never stopped, bit for bit: every method, optimizer, moment and kind of damage."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from conftest import encode_png
from otcxr.config import to_plain
from otcxr.data.dataset import DataConfig
from otcxr.data.views import ViewsConfig
from otcxr.errors import CheckpointError, OtcxrError
from otcxr.methods import METHODS, Method, SSLMethod, StepOutput
from otcxr.methods.base import Observed, encode_views, tokens_of
from otcxr.nn.encoder import load_encoder, pool
from otcxr.optim import OPTIMIZERS
from otcxr.runs import Run
from otcxr.settings import EncoderConfig, PretrainConfig, TrainConfig, config_to_plain
from otcxr.train import build_method, pretrain

EPOCH = 5  # steps
RATES = {"adamw": 1e-3, "sgd": 0.05, "lars": 0.3}


def small_settings(method):
    """The method's own settings with heads that are quickly saved."""
    known = METHODS[method].settings
    wanted = {"hidden": 32, "outputs": 16, "global_hidden": 32, "global_outputs": 32, "predictor_hidden": 16}
    names = {name: value for name, value in wanted.items() if name in to_plain(known)}
    try:
        return replace(known, **names)
    except OtcxrError:  # a method that wants other numbers keeps its own
        return known


def small(out, method="simclr", *, source="phantom:64,seed=7,size=32", workers=0, settings=None, **train):
    """Five steps an epoch on 32-pixel phantoms, two epochs."""
    values = {"epochs": 2, "batch_size": 8, "accelerator": "cpu", "health_every": 3, "log_every": 1, "probes": 1}
    return PretrainConfig(
        data=DataConfig(source=source, workers=workers),
        method=method,
        settings=small_settings(method) if settings is None else settings,
        views=ViewsConfig(**{**METHODS[method].views, "size": 32}),  # with the local views that the method is made for
        encoder=EncoderConfig(width=4),
        train=TrainConfig(**{**values, **train}),
        out=str(out),
    )


# images enough that an encoder can be judged online; five steps an epoch too
JUDGED = {"source": "phantom:240,seed=7,size=32", "batch_size": 32}


def weights(run):
    return {name: (run / name).read_bytes() for name in ("encoder.safetensors", "method.safetensors")}


def outcome(run):
    """All that must not depend on interruptions: weights, metrics without times, and what is best."""
    lines = Run.open(run).read_metrics()
    for line in lines:
        line.pop("elapsed_s", None)
        line.pop("images_per_s", None)
    assert not list(run.rglob("*.tmp"))
    return {
        **weights(run),
        "metrics": json.dumps(lines),
        "best": (run / "best" / "encoder.safetensors").read_bytes(),
        "best facts": (run / "best" / "encoder.json").read_text(),
    }


def in_pieces(config, *stops):
    """Train with a stop after each of these steps; every piece begins from what is on the disk."""
    pretrain(config, stop_after=stops[0])
    for stop in (*stops[1:], None):
        state = Run.open(config.out).read_checkpoint()
        assert state["step"] == stops[stops.index(stop) - 1 if stop else -1]
        pretrain(replace(config, resume=True), stop_after=stop)
    return outcome(Path(config.out))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Function that gives the outcome of an uninterrupted run; the same run is done once."""
    known = {}

    def run(method="simclr", **changes):
        key = (method, tuple(sorted(changes.items())))
        if key not in known:
            out = tmp_path_factory.mktemp("whole") / "run"
            pretrain(small(out, method, **changes))
            known[key] = outcome(out)
        return known[key]

    return run


# --- where it is stopped, and what is trained ---


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_goes_on_bit_for_bit(method, whole, tmp_path):
    """Stops in mid-epoch and at an epoch's end."""
    assert in_pieces(small(tmp_path / "run", method), 2, EPOCH) == whole(method)


def test_the_judgement_of_the_epochs_goes_on_bit_for_bit(whole, tmp_path):
    """The lines of the online probe are there once each, and the best epoch is the same."""
    assert in_pieces(small(tmp_path / "run", **JUDGED), 2, EPOCH) == whole(**JUDGED)
    lines = Run.open(tmp_path / "run").read_metrics()
    online = [line for line in lines if "online" in line]
    assert [line["step"] for line in online] == [EPOCH, 2 * EPOCH]
    assert not any("loss" in line for line in online)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 2 * EPOCH + 1))


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_goes_on_bit_for_bit(optimizer, whole, tmp_path):
    how = {"optimizer": optimizer, "learning_rate": RATES.get(optimizer, 1e-3)}
    assert in_pieces(small(tmp_path / "run", **how), 3, 7) == whole(**how)


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_other_ways_to_compute_go_on_bit_for_bit(changes, whole, tmp_path):
    assert in_pieces(small(tmp_path / "run", "otcxr", **changes), 4) == whole("otcxr", **changes)


def test_loader_processes_go_on_bit_for_bit(whole, tmp_path):
    """A stop with prepared batches on their way; and the number of workers may change."""
    config = small(tmp_path / "run", workers=2)
    pretrain(config, stop_after=3)
    pretrain(replace(config, resume=True), stop_after=6)
    pretrain(replace(config, data=replace(config.data, workers=0), resume=True))
    assert outcome(tmp_path / "run") == whole()


@pytest.mark.slow
def test_every_step_can_be_the_last_one_before_a_stop(whole, tmp_path):
    assert in_pieces(small(tmp_path / "run"), *range(1, 2 * EPOCH)) == whole()


# --- a method from outside ---


@dataclass(frozen=True)
class OutsideSettings:
    dropout: float = 0.3


class Outside(SSLMethod):
    """Random numbers in forward and after the step, a momentum copy, and a queue: all that a method may have."""

    def __init__(self, encoder, settings):
        super().__init__(encoder, settings)
        width = encoder.channels[-1]
        self.head = nn.Sequential(nn.Linear(width, 8), nn.Dropout(settings.dropout))
        self.slow = nn.Linear(width, 8).requires_grad_(False)
        self.register_buffer("queue", torch.randn(16, 8))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.register_buffer("newest", torch.zeros(8))
        self.drawn = []

    def forward(self, batch, *, observe=False):
        self.drawn.append(float(torch.rand(())))
        maps = encode_views(self.encoder, batch.views[:2])
        pooled = [pool(m) for m in maps]
        query = nn.functional.normalize(self.head(pooled[0]), dim=-1)
        with torch.no_grad():
            key = nn.functional.normalize(self.slow(pooled[1]), dim=-1)
            self.newest.copy_(key.mean(0))
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.T], 1) / 0.2
        loss = nn.functional.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
        observed = Observed(torch.cat(pooled).detach(), tokens_of(maps[0][-1]).detach(), None) if observe else None
        return StepOutput(loss, {"term": loss.detach()}, observed)

    @torch.no_grad()
    def after_step(self, progress):
        rate = 0.9 + 0.1 * progress
        self.slow.weight.lerp_(self.head[0].weight, 1 - rate)
        self.queue[self.place] = self.newest + 0.01 * torch.randn(8)
        self.place.copy_((self.place + 1) % 16)


@pytest.fixture
def outside(monkeypatch):
    """The method in the table, and every instance that the training has built."""
    built = []

    class Noted(Outside):
        def __init__(self, encoder, settings):
            super().__init__(encoder, settings)
            built.append(self)

    monkeypatch.setitem(METHODS, "outside", Method(Noted, OutsideSettings()))
    return built


def test_a_method_from_outside_goes_on_bit_for_bit(outside, tmp_path):
    pretrain(small(tmp_path / "whole", "outside"))
    uninterrupted = outside[-1].drawn
    outside.clear()
    assert in_pieces(small(tmp_path / "run", "outside"), 3, EPOCH, 6) == outcome(tmp_path / "whole")
    assert [number for method in outside for number in method.drawn] == uninterrupted
    assert len(set(uninterrupted)) == 2 * EPOCH  # other numbers at every step
    state = Run.open(tmp_path / "run").read_checkpoint()["method"]
    assert state["place"] == 2 * EPOCH
    assert not torch.equal(state["slow.weight"], state["head.0.weight"])


def test_random_numbers_depend_on_seed_step_and_part_only(outside, tmp_path):
    def drawn(name, **changes):
        config = small(tmp_path / name, "outside", epochs=1, **changes)
        pretrain(replace(config, seed=1) if name == "seed" else config)
        return outside[-1].drawn

    torch.manual_seed(1)
    first = drawn("a")
    torch.manual_seed(2)
    assert drawn("b", workers=2, health_every=1, probes=0) == first
    assert drawn("seed") != first
    parts = drawn("parts", accumulate=2)
    assert parts[0::2] == first  # the first part of a step draws what a whole step draws
    assert len(set(parts)) == len(parts)


def test_training_leaves_the_random_state_of_the_caller_alone(outside, tmp_path):
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    random.seed(123)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    pretrain(small(tmp_path / "run", "outside", workers=2), stop_after=4)
    pretrain(replace(small(tmp_path / "run", "outside"), resume=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    for old, new in zip(before[1], np.random.get_state(), strict=True):  # noqa: NPY002
        assert np.array_equal(old, new)
    assert random.getstate() == before[2]


# --- what only watches does not touch ---


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_minutes": 1e-9},
        {"keep": 1},
        {"keep": 3},
        {"probes": 0},
        {"probes": 3},
        {"health_every": 1},
        {"health_every": 1000},
        {"log_every": 4},
        {"on_collapse": "ignore"},
    ],
    ids=str,
)
def test_watching_does_not_change_a_bit(changes, whole, tmp_path):
    pretrain(small(tmp_path / "run", "otcxr", **changes))
    expected = whole("otcxr")
    assert weights(tmp_path / "run") == {name: expected[name] for name in weights(tmp_path / "run")}
    losses = [(line["step"], line["loss"]) for line in Run.open(tmp_path / "run").read_metrics() if "loss" in line]
    known = {line["step"]: line["loss"] for line in json.loads(expected["metrics"]) if "loss" in line}
    assert losses
    assert all(known[step] == loss for step, loss in losses)


def test_judging_does_not_change_a_bit(whole, tmp_path):
    run = pretrain(small(tmp_path / "run", online_images=0, **JUDGED))
    assert not any("online" in line for line in run.read_metrics())
    expected = whole(**JUDGED)
    assert weights(run.path) == {name: expected[name] for name in weights(run.path)}


def test_checkpoints_by_time_are_whole_and_kept(tmp_path):
    """Every step is late: the last three are there, and each is one to go on from."""
    run = tmp_path / "run"
    pretrain(small(run, keep=3, checkpoint_minutes=1e-9), stop_after=8)
    names = sorted(path.name for path in run.glob("last*.ckpt"))
    assert names == ["last-1.ckpt", "last-2.ckpt", "last.ckpt"]
    steps = [torch.load(run / n, weights_only=True)["step"] for n in ("last.ckpt", "last-1.ckpt", "last-2.ckpt")]
    assert steps == [8, 7, 6]


# --- damage ---


def flip(path):
    """Flip one bit in the middle of the largest tensor: the file stays readable, only its checksum is wrong."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        data = archive.read(largest)
    content = bytearray(path.read_bytes())
    at = bytes(content).index(data) + len(data) // 2
    content[at] ^= 1
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


class Heard:
    """A progress that keeps what was said."""

    def __init__(self):
        self.said = []

    def bar(self, title, total, unit):
        from otcxr.console import SilentProgress

        return SilentProgress().bar(title, total, unit)

    def say(self, text):
        self.said.append(text)


@pytest.mark.parametrize("damage", [flip, cut, empty], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_passed_over(damage, whole, tmp_path):
    run, heard = tmp_path / "run", Heard()
    config = small(run, checkpoint_minutes=1e-9)
    pretrain(config, stop_after=7)
    damage(run / "last.ckpt")
    pretrain(replace(config, resume=True), heard)
    (told,) = [text for text in heard.said if "damaged" in text]
    assert f"{run / 'last.ckpt'} is damaged" in told
    assert "going on from last-1.ckpt, step 6" in told
    assert outcome(run) == whole()


def test_a_flipped_bit_would_not_be_noticed_without_the_checksum(tmp_path):
    """What the test above damages is data that torch reads without complaint."""
    run = pretrain(small(tmp_path / "run", epochs=1))
    flip(run.path / "last.ckpt")
    torch.load(run.path / "last.ckpt", weights_only=True)
    said = []
    assert run.read_checkpoint(said.append)["step"] == 0
    assert "checksum" in said[0]


def test_a_damaged_checkpoint_never_costs_the_whole_one(whole, tmp_path, monkeypatch):
    """After a fallback, a kill while the next one is written must leave something to go on from."""
    run = tmp_path / "run"
    config = small(run, checkpoint_minutes=1e-9)
    pretrain(config, stop_after=7)
    flip(run / "last.ckpt")

    replace_file = Path.replace

    def killed(self, target):
        if self.name.startswith("last.ckpt.") and Path(target).parent == run:
            raise KeyboardInterrupt
        return replace_file(self, target)

    with monkeypatch.context() as patch:  # as a kill after the old ones have moved and before the new one has its name
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(replace(config, resume=True))
    assert Run.open(run).read_checkpoint()["step"] == 6
    pretrain(replace(config, resume=True))
    assert outcome(run) == whole()


def test_all_damaged_is_an_error(tmp_path):
    run = tmp_path / "run"
    pretrain(small(run, keep=3), stop_after=6)
    for path, damage in zip(sorted(run.glob("last*.ckpt")), (flip, cut, empty), strict=True):
        damage(path)
    with pytest.raises(
        CheckpointError, match=r"last.ckpt is damaged .*last-1.ckpt is damaged .*last-2.ckpt is damaged"
    ):
        pretrain(replace(small(run, keep=3), resume=True))


# --- the best ---


def test_best_is_the_epoch_with_the_best_judgement(tmp_path):
    run = pretrain(small(tmp_path / "run", epochs=4, **JUDGED))
    judged = {line["step"]: line["online"]["knn"]["auroc"]["value"] for line in run.read_metrics() if "online" in line}
    assert len(judged) == 4
    facts = run.read_json("best/encoder.json")
    assert facts["best"]["value"] == max(judged.values()) == judged[facts["step"]]
    assert facts["step"] == min(step for step, value in judged.items() if value == max(judged.values()))
    assert "online kNN" in facts["best"]["measure"]
    best = torch.load(run.path / "best" / "last.ckpt", weights_only=True)
    assert best["step"] == facts["step"]
    encoder = load_encoder(run.path / "best").state_dict()
    assert all(torch.equal(value, best["method"][f"encoder.{name}"]) for name, value in encoder.items())


def test_best_is_the_lowest_mean_loss_where_nothing_is_labelled(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(26):
        (folder / f"{number:02d}.png").write_bytes(encode_png(generator.integers(0, 256, (40, 40), dtype=np.uint8)))
    changes = {"source": f"folder:{folder}", "batch_size": 8, "epochs": 5}
    run = pretrain(small(tmp_path / "run", **changes), stop_after=4)  # in mid-epoch: its mean loss is carried over
    pretrain(replace(small(tmp_path / "run", **changes), resume=True))
    losses = [line["loss"] for line in run.read_metrics()]
    means = [sum(losses[i : i + 3]) / 3 for i in range(0, 15, 3)]
    facts = run.read_json("best/encoder.json")
    assert facts["best"]["measure"] == "mean loss of the epoch"
    assert facts["best"]["value"] == pytest.approx(min(means), rel=1e-12)
    assert facts["step"] == 3 * (1 + int(np.argmin(means)))
    load_encoder(run.path / "best")


def test_best_can_be_gone_on_from(tmp_path):
    """best/last.ckpt is a whole checkpoint: put in place of the last one, the run goes on from there."""
    config = small(tmp_path / "run")
    run = pretrain(config)
    end = weights(run.path)
    for path in run.path.glob("last*.ckpt"):
        path.unlink()
    shutil.copy(run.path / "best" / "last.ckpt", run.path / "last.ckpt")
    pretrain(replace(config, resume=True))
    assert weights(run.path) == end


def test_a_checkpoint_of_step_0_is_the_start(whole, tmp_path):
    run = tmp_path / "run"
    pretrain(small(run, keep=9), stop_after=1)
    (run / "last.ckpt").unlink()
    assert Run.open(run).read_checkpoint()["step"] == 0
    start = build_method(small(run)).state_dict()
    assert all(torch.equal(v, start[k]) for k, v in Run.open(run).read_checkpoint()["method"].items())
    pretrain(replace(small(run, keep=9), resume=True))
    assert outcome(run) == whole()


# --- kills ---

KILLS = 30


def start(config, file):
    file.write_text(yaml.safe_dump(config_to_plain(config)))
    return subprocess.Popen(
        [sys.executable, "-m", "otcxr", "pretrain", "--config", str(file), "--resume", "true"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def nothing_half_written(run):
    """Every file under a final name is whole, whatever the moment."""
    for path in run.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            assert yaml.safe_load(path.read_text())["method"]
        elif path.suffix == ".ckpt":
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
        elif path.suffix == ".npz":
            with np.load(io.BytesIO(path.read_bytes())) as arrays:
                assert arrays["plan"].ndim == 2
        elif path.suffix == ".safetensors":
            from safetensors.torch import load

            assert load(path.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(METHODS)))
def test_kills_at_any_moment_change_nothing(number, tmp_path):
    """30 kills in all, a third of them while it starts: nothing is half-written, and the end is bitwise the same."""
    method = sorted(METHODS)[number]
    kills = KILLS // len(METHODS) + (number < KILLS % len(METHODS))
    generator = np.random.default_rng((20, number))
    # a checkpoint every 0.1 s or so: as much writing as training, so many kills hit it
    long = {"epochs": 60, "checkpoint_minutes": 0.0015, "workers": 2 * (number % 2)}
    config, whole = small(tmp_path / "run", method, **long), small(tmp_path / "whole", method, **long)
    reached, hits = [], 0
    for kill in range(kills):
        process = start(config, tmp_path / "settings.yaml")
        try:
            if kill % 3 == 0:
                time.sleep(generator.uniform(0.2, 4.0))  # start-up takes some seconds
            else:
                wait_for_news(tmp_path / "run" / "metrics.jsonl", process)
                time.sleep(generator.uniform(0.0, 1.0))
            over = process.poll()
            process.send_signal(signal.SIGKILL)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
        assert over in (None, 0), said.decode()
        hits += process.returncode == -signal.SIGKILL
        if not (tmp_path / "run" / "config.yaml").exists():
            continue
        nothing_half_written(tmp_path / "run")
        state = Run.open(tmp_path / "run").read_checkpoint()
        reached.append(0 if state is None else state["step"])
    assert hits > kills // 2  # the others came when all was done
    assert reached == sorted(reached)  # what is on the disk is never taken back
    process = start(config, tmp_path / "settings.yaml")
    try:
        _, said = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, said.decode()
    pretrain(whole)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    nothing_half_written(tmp_path / "run")
    steps = [line["step"] for line in Run.open(tmp_path / "run").read_metrics() if "loss" in line]
    assert steps == list(range(1, 60 * EPOCH + 1))


def wait_for_news(path, process):
    """Until the training writes to its metrics (again)."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns != before and path.stat().st_size:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_can_be_taken_up_at_once(workers, whole, tmp_path):
    """Also while its loader processes still live: they hold nothing that the next one needs."""
    config = small(tmp_path / "run", workers=workers, epochs=200)
    process = start(config, tmp_path / "settings.yaml")
    try:
        wait_for_news(tmp_path / "run" / "metrics.jsonl", process)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.stderr.close()  # its loaders have it still
    with Run.open(tmp_path / "run").lock():
        nothing_half_written(tmp_path / "run")
