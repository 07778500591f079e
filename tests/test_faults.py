"""What goes wrong around a training, for real: killed loaders, signals, broken images, full disks, lack of rights.

Every fault ends in one line that says what happened and what is kept, and in a run that goes on bit for bit.
"""

import ctypes
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from conftest import encode_png
from otcxr.cli import main
from otcxr.data.dataset import DataConfig
from otcxr.data.views import ViewsConfig
from otcxr.errors import ConfigError, DataError, OtcxrError
from otcxr.faults import Collapsed, Interrupted
from otcxr.health import Verdict, Watch
from otcxr.methods import METHODS, Method
from otcxr.methods.simclr import SimCLR, SimCLRSettings
from otcxr.runs import Run
from otcxr.settings import EncoderConfig, PretrainConfig, TrainConfig, config_to_plain
from otcxr.train import pretrain

SETTINGS = SimCLRSettings(hidden=32, outputs=16)
STEPS = 8  # four an epoch


def tiny(out, *, method="simclr", source="phantom:48,seed=7,size=32", workers=0, cache_gb=2.0, skipped=0.05, **train):
    """Four steps an epoch on 32-pixel phantoms, two epochs, small files."""
    values = {"epochs": 2, "batch_size": 8, "accelerator": "cpu", "health_every": 3, "log_every": 1, "probes": 1}
    return PretrainConfig(
        data=DataConfig(source=source, workers=workers, cache_gb=cache_gb, max_skipped=skipped),
        method=method,
        settings=SETTINGS,
        views=ViewsConfig(size=32),
        encoder=EncoderConfig(width=4),
        train=TrainConfig(**{**values, **train}),
        out=str(out),
    )


class At:
    """A progress that does something after a step, and keeps what was said."""

    def __init__(self, do=None):
        self.do, self.said = do or (lambda step: None), []

    @contextmanager
    def bar(self, title, total, unit):
        def called(done, text=""):
            if title == "pre-training":
                self.do(done // 8)

        yield called

    def say(self, text):
        self.said.append(text)


def once(step, do):
    """Do it after a step, the first time that it is reached."""
    left = [step]

    def called(now):
        if now in left:
            left.remove(now)
            do()

    return called


def command_line(monkeypatch, config, tmp_path, do=None):
    """Exit code of the command in this process, and what it said; ``do`` is called after every step."""
    progress = At(do)
    monkeypatch.setattr("otcxr.commands.training.RichProgress", lambda: progress)
    monkeypatch.setattr("logging.basicConfig", lambda **how: None)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(config_to_plain(config)))
    return main(["pretrain", "--config", str(file)]), progress


def one_line(capsys):
    """The only line on standard error."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("otcxr: ")
    return line


def outcome(run):
    """Weights, and metrics without times."""
    lines = Run.open(run).read_metrics()
    for line in lines:
        del line["elapsed_s"], line["images_per_s"]
    assert not list(run.rglob("*.tmp"))
    return [(run / name).read_bytes() for name in ("encoder.safetensors", "method.safetensors")], lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run gives."""
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(tiny(out))
    return outcome(out)


def resumed(config):
    pretrain(replace(config, resume=True))
    return outcome(Run.open(config.out).path)


# --- processes ---


def kill_a_loader():
    """As the system does when memory runs out; wait until it is seen to be dead."""
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.2)


def test_a_killed_loader_is_named_and_costs_nothing(whole, tmp_path, monkeypatch, capsys):
    config = tiny(tmp_path / "run", workers=2)
    code, _ = command_line(monkeypatch, config, tmp_path, once(5, kill_a_loader))
    assert code == 1
    line = one_line(capsys)
    assert "a loader process died: it was killed, most often for want of memory" in line
    assert "lower data.workers (now 2)" in line
    assert f"holds step 4 of {STEPS}; go on with: otcxr pretrain --resume true" in line
    assert Run.open(config.out).read_checkpoint()["step"] == 4
    assert resumed(config) == whole
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda s: s.name)
def test_a_request_to_stop_saves_and_exits(sent, whole, tmp_path, monkeypatch, capsys):
    config = tiny(tmp_path / "run")
    before = signal.getsignal(sent)
    code, _ = command_line(monkeypatch, config, tmp_path, once(3, lambda: os.kill(os.getpid(), sent)))
    assert code == 130
    assert f"stopped after step 3 of {STEPS}; go on with: otcxr pretrain --resume true --out" in one_line(capsys)
    assert signal.getsignal(sent) is before
    assert resumed(config) == whole


def test_a_second_signal_does_not_break_the_saving(whole, tmp_path, monkeypatch):
    """SLURM sends SIGUSR1 first and SIGTERM while the state is being written."""
    config = tiny(tmp_path / "run")
    write = Run.write_checkpoint

    def slow(self, state, keep=1, *, best=False):
        if state["step"]:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            write(self, state, keep, best=best)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            write(self, state, keep, best=best)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_checkpoint", slow)
        with pytest.raises(Interrupted, match="after step 3"):
            pretrain(config, At(once(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))))
    assert Run.open(config.out).read_checkpoint()["step"] == 3
    assert resumed(config) == whole


def test_a_second_ctrl_c_ends_at_once_and_leaves_what_was_saved(whole, tmp_path, monkeypatch):
    config = tiny(tmp_path / "run")

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    code, _ = command_line(monkeypatch, config, tmp_path, once(6, twice))
    assert code == 130
    assert Run.open(config.out).read_checkpoint()["step"] == 4
    assert resumed(config) == whole


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_to_the_whole_group_leaves_the_loaders_at_work(sent, tmp_path):
    """Ctrl-C in a terminal, and the end of a job, reach all processes."""
    config = tiny(tmp_path / "run", workers=2, epochs=40, online_images=0)
    process = start(config, tmp_path)
    try:
        wait_for_lines(tmp_path / "run", 6, process)
        os.killpg(process.pid, sent)
        said = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said.startswith("otcxr: stopped after step ")
    assert said.count("\n") == 1
    state = Run.open(config.out).read_checkpoint()
    assert f"after step {state['step']} of 160" in said
    # as far as both need to go, to be quick: the step it stopped at is whatever it was
    stop = state["step"] + 3
    pretrain(replace(config, resume=True), stop_after=stop)
    other = tiny(tmp_path / "other", epochs=40, online_images=0)
    pretrain(other, stop_after=stop)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "other")


def start(config, tmp_path, **how):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(config_to_plain(config)))
    return subprocess.Popen(
        [sys.executable, "-m", "otcxr", "pretrain", "--config", str(file)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **how,
    )  # fmt: skip


def wait_for_lines(run, lines, process):
    deadline = time.monotonic() + 60
    path = run / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text().count("\n") >= lines:
            return
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    raise AssertionError("the run did not start")


# --- images that break in mid-run ---


@pytest.fixture
def pictures(tmp_path):
    """A folder of 40 pictures: five steps an epoch."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(encode_png(generator.integers(0, 256, (40, 40), dtype=np.uint8)))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_an_image_that_breaks_in_mid_run_is_listed_and_stood_in_for(damage, workers, pictures, tmp_path):
    """The training goes on, with the same bits whether or not it is interrupted afterwards."""

    def spoil():
        for name in ("07.png", "21.png"):
            path = pictures / name
            path.write_bytes(path.read_bytes()[:200]) if damage == "cut" else path.unlink()

    def config(name):
        return tiny(tmp_path / name, source=f"folder:{pictures}", workers=workers, cache_gb=0.0, probes=40)

    originals = {path: path.read_bytes() for path in pictures.iterdir()}
    progress = At(once(5, spoil))  # between two epochs: no worker has read ahead
    run = pretrain(config("whole"), progress)
    assert [line["step"] for line in run.read_metrics()] == list(range(1, 11))
    listed = (run.path / "skipped.csv").read_text().splitlines()
    assert len(listed) == 3
    reason = "cut short" if damage == "cut" else "missing"
    for name in ("07.png", "21.png"):
        (row,) = [row for row in listed if row.startswith(name)]
        assert "unreadable in epoch 2: " in row
        assert reason in row or damage == "deleted"
    (warning,) = [text for text in progress.said if "can no longer be read" in text]
    assert warning.startswith("warning: 2 images can no longer be read, others stand in for them (first: ")
    assert str(run.path / "skipped.csv") in warning
    expected = outcome(run.path)
    # once more, interrupted while the files are broken
    for path, data in originals.items():
        path.write_bytes(data)
    pretrain(config("run"), At(once(5, spoil)), stop_after=7)
    heard = At()
    if damage == "deleted":  # a folder does not name what is not there: it is another set of images
        with pytest.raises(ConfigError, match="no longer holds the images"):
            pretrain(replace(config("run"), resume=True))
        return
    pretrain(replace(config("run"), resume=True), heard)
    assert any("skipped 2 images" in text for text in heard.said)
    assert outcome(tmp_path / "run") == expected
    # and it was not the same as with all images
    for path, data in originals.items():
        path.write_bytes(data)
    pretrain(config("sound"))
    assert outcome(tmp_path / "sound")[0] != expected[0]


def test_too_many_lost_images_end_the_run_after_saving(pictures, tmp_path, monkeypatch, capsys):
    originals = {path: path.read_bytes() for path in pictures.iterdir()}

    def spoil():
        for number in range(0, 40, 4):
            (pictures / f"{number:02d}.png").write_bytes(b"")

    config = tiny(tmp_path / "run", source=f"folder:{pictures}", cache_gb=0.0, probes=2)
    code, _ = command_line(monkeypatch, config, tmp_path, once(5, spoil))
    assert code == 1
    line = one_line(capsys)
    assert "10 of 40 images" in line
    assert "set data.max_skipped to 0.250" in line
    assert Run.open(config.out).read_checkpoint()["step"] == 10
    assert len((tmp_path / "run" / "skipped.csv").read_text().splitlines()) == 11
    with pytest.raises(DataError, match="10 of 40 images"):  # and it is not gone on with by mistake
        pretrain(replace(config, resume=True))
    for path, data in originals.items():
        path.write_bytes(data)
    pretrain(replace(config, resume=True))


def test_a_folder_that_vanishes_ends_the_run_in_words(pictures, tmp_path, monkeypatch, capsys):
    config = tiny(tmp_path / "run", source=f"folder:{pictures}", cache_gb=0.0, workers=1)
    code, _ = command_line(monkeypatch, config, tmp_path, once(5, lambda: pictures.rename(tmp_path / "elsewhere")))
    assert code == 1
    assert "10 images in a row cannot be read any more" in one_line(capsys)
    assert Run.open(config.out).read_checkpoint()["step"] == 5
    (tmp_path / "elsewhere").rename(pictures)
    pretrain(tiny(tmp_path / "whole", source=f"folder:{pictures}", cache_gb=0.0))
    assert resumed(config) == outcome(tmp_path / "whole")


# --- the folder of the run ---


@contextmanager
def ordinary_user():
    """Give up root's right to ignore permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) for a while."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    if not hasattr(libc, "capget") or libc.capget(header, data):
        pytest.skip("rights of root cannot be given up here")
    effective = data[0]
    data[0] &= ~(1 << 1 | 1 << 2)
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = effective
        assert libc.capset(header, data) == 0


@contextmanager
def read_only(*folders):
    modes = [(folder, folder.stat().st_mode) for folder in folders]
    try:
        for folder in folders:
            folder.chmod(0o555)
        yield
    finally:
        for folder, mode in modes:
            folder.chmod(mode)


@pytest.mark.parametrize("made", [True, False], ids=["the folder", "the one above"])
def test_a_folder_that_cannot_be_written_to_is_found_at_once(made, tmp_path, monkeypatch, capsys):
    """Before an image is read."""
    (tmp_path / "above").mkdir()
    run = tmp_path / "above" / "run"
    if made:
        run.mkdir()
    steps = []
    with ordinary_user(), read_only(run if made else tmp_path / "above"):
        code, progress = command_line(monkeypatch, tiny(run), tmp_path, steps.append)
    assert code == 1
    line = one_line(capsys)
    assert str(run) in line
    assert "Permission denied; check" in line
    assert not steps
    assert not progress.said
    assert run.exists() == made


def test_a_folder_that_becomes_read_only_stops_the_run(whole, tmp_path, monkeypatch, capsys):
    config, run = tiny(tmp_path / "run"), tmp_path / "run"
    with ordinary_user():
        code, _ = command_line(monkeypatch, config, tmp_path, once(6, lambda: run.chmod(0o555)))
        assert code == 1
        with pytest.raises(OSError, match="Permission denied"):  # the chmod had an effect on this process
            (run / "x").write_text("x")
    run.chmod(0o755)
    line = one_line(capsys)
    assert f"writing {run}/" in line
    assert "Permission denied; check its rights" in line
    assert f"{run / 'last.ckpt'} holds step 4 of {STEPS}; go on with" in line
    assert Run.open(run).read_checkpoint()["step"] == 4
    assert resumed(config) == whole


def test_a_full_disk_names_the_step_that_is_kept(whole, tmp_path, monkeypatch, capsys):
    """The temporary file of a later checkpoint lies on a disk that is full."""
    config, run = tiny(tmp_path / "run"), tmp_path / "run"
    full = run / f"last.ckpt.{os.getpid()}.tmp"
    code, _ = command_line(monkeypatch, config, tmp_path, once(6, lambda: full.symlink_to("/dev/full")))
    assert code == 1
    line = one_line(capsys)
    assert f"writing {run}/last.ckpt failed: No space left on device; free some space." in line
    assert f"{run / 'last.ckpt'} holds step 4 of {STEPS}; go on with: otcxr pretrain --resume true --out {run}" in line
    assert not full.is_symlink()
    assert Run.open(run).read_checkpoint()["step"] == 4
    assert resumed(config) == whole


@pytest.mark.parametrize("name", ["metrics.jsonl", "skipped.csv", "encoder.safetensors"])
def test_every_file_may_be_the_one_that_finds_the_disk_full(name, whole, pictures, tmp_path):
    config, run = tiny(tmp_path / "run"), tmp_path / "run"
    kept = b""

    def fill():
        nonlocal kept
        if name == "metrics.jsonl":
            kept = (run / name).read_bytes()
            (run / name).unlink()
            (run / name).symlink_to("/dev/full")
        else:
            (run / f"{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
        if name == "skipped.csv":
            (pictures / "00.png").unlink()

    if name == "skipped.csv":
        config = tiny(run, source=f"folder:{pictures}", cache_gb=0.0)
    with pytest.raises(OtcxrError, match=r"No space left on device; free some space. .*last.ckpt holds step"):
        pretrain(config, At(once(5, fill)))
    assert not list(run.rglob("*.tmp"))
    if name == "metrics.jsonl":
        (run / name).unlink()
        (run / name).write_bytes(kept)
    assert Run.open(run).read_checkpoint()["step"] == (10 if name == "skipped.csv" else 4)
    if name != "skipped.csv":
        assert resumed(config) == whole


def test_a_limit_of_file_size_is_found_before_the_first_step(tmp_path):
    config = tiny(tmp_path / "run")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(config, tmp_path, preexec_fn=limited)
    try:
        said = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 1
    assert said == (
        f"otcxr: writing {tmp_path / 'run' / 'last.ckpt'} failed: File too large; free some space. "
        "Nothing has been trained yet.\n"
    )
    assert not list((tmp_path / "run").glob("*.ckpt"))
    assert not list((tmp_path / "run").rglob("*.tmp"))
    pretrain(replace(config, resume=True), stop_after=1)


# --- memory, numbers, collapse ---


class Faulty(SimCLR):
    """SimCLR that does something at a step; the step is counted in a buffer, so it survives a resume."""

    fault = None

    def __init__(self, encoder, settings):
        super().__init__(encoder, settings)
        self.register_buffer("done", torch.zeros((), dtype=torch.long))

    def forward(self, batch, *, observe=False):
        output = super().forward(batch, observe=observe)
        return output if self.fault is None else type(self).fault(int(self.done), output)

    def after_step(self, progress):
        self.done += 1


@pytest.fixture
def faulty(monkeypatch):
    """The method in the table; set ``fault`` to a function of (steps done, output)."""
    kind = type("Kind", (Faulty,), {})
    monkeypatch.setitem(METHODS, "faulty", Method(kind, SETTINGS))
    return kind


def test_lack_of_memory_names_what_to_lower(faulty, tmp_path, monkeypatch, capsys):
    def greedy(done, output):
        if done == 5:
            torch.empty(2**50, dtype=torch.uint8)
        return output

    config = tiny(tmp_path / "run", method="faulty")
    pretrain(replace(config, out=str(tmp_path / "whole")))
    faulty.fault = staticmethod(greedy)
    code, _ = command_line(monkeypatch, config, tmp_path)
    assert code == 1
    line = one_line(capsys)
    assert "out of memory with train.batch_size = 8 in 1 part(s) of views of 32 pixels" in line
    assert "with a lower train.batch_size, train.accumulate = 2 or train.precision bf16-mixed" in line
    assert f"holds step 4 of {STEPS}; go on with" in line
    faulty.fault = None
    assert resumed(config) == outcome(tmp_path / "whole")


def test_an_unknown_error_is_not_dressed_up(faulty, tmp_path):
    """A mistake in a method keeps its type and its traceback."""

    def broken(done, output):
        raise RuntimeError("shapes disagree")

    faulty.fault = staticmethod(broken)
    with pytest.raises(RuntimeError, match="^shapes disagree$"):
        pretrain(tiny(tmp_path / "run", method="faulty"))
    assert Run.open(tmp_path / "run").read_checkpoint()["step"] == 0


class NotFinite(torch.autograd.Function):
    """A finite value whose gradient is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda loss: loss * math.nan, "the loss is nan"),
        (lambda loss: loss + math.inf, "the loss is inf"),
        (NotFinite.apply, "the gradient's norm is nan"),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_a_number_that_is_not_finite_reaches_no_weight(spoil, words, faulty, tmp_path):
    config = tiny(tmp_path / "run", method="faulty", checkpoint_minutes=1e-9)
    pretrain(replace(config, out=str(tmp_path / "whole")))
    faulty.fault = staticmethod(
        lambda done, output: output._replace(loss=spoil(output.loss)) if done == 5 else output
    )  # fmt: skip
    with pytest.raises(
        OtcxrError, match=rf"diverged at step 6: {words}. .*last good state, step 5. Start anew .*lower train.learn"
    ):
        pretrain(config)
    state = Run.open(config.out).read_checkpoint()
    assert state["step"] == 5
    assert all(value.isfinite().all() for value in state["method"].values())
    moments = [v for part in state["optimizer"]["state"].values() for v in part.values() if torch.is_tensor(v)]
    assert moments
    assert all(value.isfinite().all() for value in moments)
    with pytest.raises(OtcxrError, match="diverged at step 6"):  # nor does a resume get past it
        pretrain(replace(config, resume=True))
    faulty.fault = None
    assert resumed(config) == outcome(tmp_path / "whole")


def collapse(after, until=10**9):
    """All images get the same embedding, in a range of steps."""

    def fault(done, output):
        if output.observed is None or not after <= done < until:
            return output
        observed = output.observed._replace(
            pooled=torch.ones_like(output.observed.pooled), tokens=torch.ones_like(output.observed.tokens)
        )
        return output._replace(observed=observed)

    return staticmethod(fault)


WORDS = "collapse: all images have nearly the same embedding"


def watched(out, how, **changes):
    return tiny(out, method="faulty", on_collapse=how, health_every=1, collapse_patience=3, warmup=0.0, **changes)


def test_a_collapse_stops_the_run_where_that_is_wanted(faulty, tmp_path, monkeypatch, capsys):
    faulty.fault = collapse(2)
    config = watched(tmp_path / "run", "stop")
    code, progress = command_line(monkeypatch, config, tmp_path)
    assert code == 1
    line = one_line(capsys)
    assert f"stopped after step 5 of {STEPS}: {WORDS}. The state is saved" in line  # looks 3, 4 and 5
    assert f"--train.on_collapse warn --out {tmp_path / 'run'}" in line
    assert [text for text in progress.said if "warning, step" in text] == [f"warning, step 3: {WORDS}"]
    assert Run.open(config.out).read_checkpoint()["step"] == 5
    with pytest.raises(Collapsed, match="after step 6"):  # it has not forgotten: one more look is enough
        pretrain(replace(config, resume=True))
    pretrain(replace(watched(tmp_path / "run", "warn"), resume=True))
    pretrain(watched(tmp_path / "whole", "ignore"))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_patience_is_counted_across_a_resume(faulty, tmp_path):
    faulty.fault = collapse(2)
    config = watched(tmp_path / "run", "stop")
    pretrain(config, stop_after=4)
    assert Run.open(config.out).read_checkpoint()["watch"] == {"unhealthy": 1, "looks": 2}
    heard = At()
    with pytest.raises(Collapsed, match="after step 5"):
        pretrain(replace(config, resume=True), heard)
    assert not any("warning, step" in text for text in heard.said)  # that was said before


def test_a_collapse_is_said_once_and_its_end_too(faulty, tmp_path):
    faulty.fault = collapse(2, 6)
    heard = At()
    pretrain(watched(tmp_path / "run", "warn"), heard)
    told = [text for text in heard.said if text.startswith(("warning, step", "step"))]
    assert told[0] == f"warning, step 3: {WORDS}"
    assert told[1].startswith("step 7: healthy again: no collapse seen")
    assert len(told) == 2


def test_a_collapse_can_be_ignored(faulty, tmp_path):
    faulty.fault = collapse(0)
    heard = At()
    run = pretrain(watched(tmp_path / "run", "ignore"), heard)
    assert not any("warning, step" in text for text in heard.said)
    assert all(not line["verdict"]["healthy"] for line in run.read_metrics())  # it is in the metrics all the same


def test_a_healthy_run_is_not_stopped(faulty, tmp_path):
    run = pretrain(watched(tmp_path / "run", "stop"))
    assert all(line["verdict"]["healthy"] for line in run.read_metrics())
    assert Run.open(run.path).read_checkpoint()["watch"] == {"unhealthy": 0, "looks": 0}


def test_an_encoder_that_gives_nothing_is_a_collapse(monkeypatch, tmp_path):
    """Not only in what is shown: features that are zero in truth."""

    class Dead(SimCLR):
        def __init__(self, encoder, settings):
            super().__init__(encoder, settings)
            encoder.register_forward_hook(lambda module, args, maps: tuple(0 * m for m in maps))

    monkeypatch.setitem(METHODS, "faulty", Method(Dead, SETTINGS))
    with pytest.raises(Collapsed, match=f"after step 3 of {STEPS}: .*{WORDS}"):
        pretrain(watched(tmp_path / "run", "stop"))
    assert Run.open(tmp_path / "run").read_checkpoint()["step"] == 3


def test_the_watch_keeps_all_it_needs():
    one, sick = Watch(3, 2), Verdict(False, "x")
    assert [one.see(step, sick) for step in (1, 2, 3, 4)] == ["warn", "", "", ""]
    two = Watch(3, 2)
    two.load(one.state())
    assert [w.see(5, sick) for w in (one, two)] == ["stop", "stop"]
    assert [w.see(6, Verdict(True, "")) for w in (one, two)] == ["recovered", "recovered"]
