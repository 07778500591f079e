"""Two processes equal one with the double batch: every exchange, every loss, every method, whole trainings."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import distributed_worker as worker
from distributed_worker import CASES, WORLD, Part
from otcxr.distributed import SyncBatchNorm, convert_batch_norm
from otcxr.runs import Run
from otcxr.train import config_to_plain, pretrain

pytestmark = pytest.mark.distributed

PAIR_S = 600  # for all cases of a pair of processes together
# the controls share all of OTCXR's exchange, which their contract cases cover; their whole trainings are slow
CONTROLS = tuple(f"train:otcxr-{name}" for name in ("uniform", "uniform-infused", "pixelwise", "nearest", "geometry"))
SLOW = ("fsdp-continued", *CONTROLS)
SPREAD = tuple(f"fsdp:{name}" for name in worker.SHARDED)


def combine(key, parts):
    """What the results of the processes make up, see ``distributed_worker``."""
    kind = key[0]
    if kind == "mean":
        return torch.stack([part[key] for part in parts]).mean(0)
    if kind == "same":
        assert all(torch.allclose(part[key], parts[0][key], rtol=1e-12, atol=1e-14) for part in parts), key
        return parts[0][key]
    if kind == "rows":
        return torch.cat([part[key] for part in parts])
    if kind == "share":
        return torch.cat([part[key] for part in parts]) / WORLD
    return parts[0][key]


def errors(parts, whole):
    """For each group the largest error relative to the largest number in it."""
    assert parts[0].keys() == whole.keys()
    size, error = {}, {}
    for key, expected in whole.items():
        found, group = combine(key, parts), key[1]
        assert found.shape == expected.shape, key
        assert found.dtype == expected.dtype == torch.float64, key
        assert found.isfinite().all(), key
        assert expected.isfinite().all(), key
        size[group] = max(size.get(group, 0.0), float(expected.abs().amax()))
        error[group] = max(error.get(group, 0.0), float((found - expected).abs().amax()))
    # what is 0 but for rounding has no relative error
    return {group: error[group] / max(size[group], 1e-3) for group in size}


class Pair:
    """Two processes that compute a list of cases; each is killed when its time is over."""

    def __init__(self, folder, names):
        self.folder, self.names = folder, list(names)
        self.folder.mkdir(exist_ok=True)
        (folder / "list").write_text("\n".join(self.names))
        words = [sys.executable, str(Path(worker.__file__)), str(folder)]
        self.until = time.monotonic() + PAIR_S
        self.logs = [(folder / f"log-{number}").open("wb") for number in range(WORLD)]
        self.started = [
            subprocess.Popen([*words, str(number), str(folder / "list")], stdout=log, stderr=log, env=quiet())
            for number, log in enumerate(self.logs)
        ]

    def wait(self):
        try:
            for process in self.started:
                process.wait(max(0.1, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.close()

    def close(self):
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait(30)
        for log in self.logs:
            log.close()

    def results(self, name):
        """What both processes found."""
        parts = []
        for number in range(WORLD):
            file = self.folder / f"{self.names.index(name)}-{number}.pt"
            if not file.exists():
                log = (self.folder / f"log-{number}").read_text()[-2000:]
                pytest.fail(f"process {number} did not get to {name}; an earlier case failed, or time was over\n{log}")
            parts.append(torch.load(file))
        broken = [f"process {number}:\n{part}" for number, part in enumerate(parts) if isinstance(part, str)]
        assert not broken, "\n".join(broken)
        return parts


def quiet(**more):
    """The environment of a process of its own, without what this one may have from a cluster."""
    known = ("SLURM_", "TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "NODE_RANK")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(known)}
    return kept | {"OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One pair of processes for every case; both have ended when a test sees it."""
    pair = Pair(tmp_path_factory.mktemp("pair"), [name for name in CASES if name not in SLOW])
    pair.wait()
    return pair


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Function that gives what one process computes for a case."""
    part = Part(None, tmp_path_factory.mktemp("whole"))
    return functools.cache(lambda name: CASES[name].compute(part))


def close(found, expected, tolerance):
    different = errors([found, {}], expected)
    assert all(error <= tolerance for error in different.values()), different


@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name not in (*SLOW, *worker.APART, *SPREAD) and name != "continued-by-one"],
)
def test_two_processes_equal_one(name, pair, whole):
    found = errors(pair.results(name), whole(name))
    assert all(error <= CASES[name].tolerance for error in found.values()), found


@pytest.mark.slow
def test_two_processes_equal_one_in_whole_trainings_of_the_controls(whole, tmp_path):
    pair = Pair(tmp_path / "pair", CONTROLS)
    pair.wait()
    for name in CONTROLS:
        found = errors(pair.results(name), whole(name))
        assert all(error <= CASES[name].tolerance for error in found.values()), (name, found)


def test_what_two_processes_left_one_process_ends(pair, whole):
    pair.results("continued-by-one")
    close(worker.taken_up(pair.folder), whole("continued-by-one"), 1e-7)


@pytest.mark.parametrize("name", worker.APART)
def test_without_common_batch_norm_two_processes_differ_from_one(name, pair, whole):
    """Or the equality of trainings would prove nothing."""
    found = errors(pair.results(name), whole(name))
    assert found["gradient norms"] > 1e-3
    assert max(error for group, error in found.items() if group.startswith("weights")) > 1e-3


@pytest.mark.parametrize("name", worker.SHARDED)
def test_spread_weights_are_as_exact_as_32_bits_allow(name, pair, tmp_path):
    """FSDP computes in 32 bits only, and how far norms over few channels enlarge rounding differs between methods and
    machines: so both are measured, here, against one process with 64 bits."""
    exact, rounded = (worker.sharded(name, Part(None, tmp_path), precision) for precision in ("64-true", "32-true"))
    rounding = max(errors([rounded, {}], exact).values())
    assert rounding < 0.02  # or nothing would be shown
    found = errors(pair.results(f"fsdp:{name}"), exact)
    assert max(found.values()) <= 10 * max(rounding, 1e-6), (found, rounding)


@pytest.mark.slow
def test_weights_that_are_spread_are_taken_up_bit_for_bit(tmp_path):
    pair = Pair(tmp_path, ["fsdp-continued"])
    pair.wait()
    pair.results("fsdp-continued")


# --- one process: BatchNorm, accumulation ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 4), (4, 5, 2, 3, 2)])
def test_alone_it_is_torchs_batch_norm(shape, training):
    plain = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](5, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        plain.weight.copy_(worker.normal(5))
        plain.running_mean.copy_(worker.normal(5, seed=1))
    ours = SyncBatchNorm(5, eps=1e-3, momentum=0.3)
    ours.load_state_dict(plain.state_dict())
    for step in range(2):
        x = worker.normal(*shape, seed=step).float()
        assert torch.equal(ours.train(training)(x), plain.train(training)(x))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in ours.state_dict().items())


def test_an_input_without_channels_is_refused():
    with pytest.raises(ValueError, match=r"needs an input \(B, C, ...\)"):
        SyncBatchNorm(5)._check_input_dim(torch.zeros(5))


def test_converted_networks_keep_names_weights_statistics_and_mode():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Sequential(nn.BatchNorm2d(4, affine=False).eval()),
        nn.ModuleDict({"a": nn.BatchNorm1d(3, eps=1e-2, track_running_stats=False)}),
    )  # fmt: skip
    network[1](worker.normal(2, 4, 3, 3).float())
    network[1].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    assert convert_batch_norm(network) is network
    found = [network[1], network[2][0], network[3]["a"]]
    assert all(isinstance(layer, SyncBatchNorm) for layer in found)
    assert [layer.training for layer in found] == [True, False, True]
    assert [layer.momentum for layer in found] == [None, 0.1, 0.1]
    assert [layer.eps for layer in found] == [1e-5, 1e-5, 1e-2]
    assert [layer.track_running_stats for layer in found] == [True, True, False]
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: id(value) for name, value in network.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert not network[1].weight.requires_grad
    layers = [id(layer) for layer in network.modules()]
    assert [id(layer) for layer in convert_batch_norm(network).modules()] == layers  # once is enough


def test_parts_of_a_batch_equal_the_whole_where_the_loss_is_a_mean_over_images(tmp_path):
    whole = worker.accumulated(tmp_path / "1", 1)
    for parts in (2, 4):
        close(worker.accumulated(tmp_path / str(parts), parts), whole, 1e-9)


def test_parts_of_a_batch_differ_from_the_whole_where_the_loss_couples_it(tmp_path):
    """As the settings say: negatives and BatchNorm see one part at a time."""
    whole, parts = (worker.accumulated(tmp_path / str(n), n, "simclr") for n in (1, 2))
    assert errors([parts, {}], whole)["gradient norms"] > 1e-3


def test_a_run_in_float64_goes_on_bit_for_bit(tmp_path):
    """What is loaded must not pass through 32 bits on its way."""
    whole, cut = (worker.tiny(tmp_path / name, "simclr", epochs=3) for name in ("whole", "cut"))
    pretrain(whole)
    pretrain(cut, stop_after=6)
    pretrain(replace(cut, resume=True))
    found, expected = (worker.outcome(tmp_path / name) for name in ("cut", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


# --- through the command line ---

COMMAND_S = 150  # for one command


class Command:
    """A command in a group of its own, which is killed as a whole when its time is over."""

    def __init__(self, words, **environment):
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet(**environment), text=True,
            start_new_session=True,
        )  # fmt: skip

    def end(self):
        """Exit code and what was said on standard error."""
        try:
            _, said = self.process.communicate(timeout=COMMAND_S)
        finally:
            self.kill()
        return self.process.returncode, said

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def child(self):
        """The process that this one has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def settings(folder, **train):
    """The words of a command, and the folder of its run."""
    config = worker.tiny(folder / "run", "simclr", **train)
    folder.mkdir(exist_ok=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump(config_to_plain(config)))
    return ["-m", "otcxr", "pretrain", "--config", str(folder / "settings.yaml")], folder / "run"


def start(launcher, words):
    """Start two processes in one of the ways in which users do; the commands that are to be waited for."""
    if launcher == "devices":
        return [Command([sys.executable, *words, "--train.devices", "2"])]
    if launcher == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        return [Command([*run, "--rdzv-endpoint", "127.0.0.1:0", *words])]
    cluster = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "otcxr", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [
        Command([sys.executable, *words], SLURM_PROCID=str(n), SLURM_LOCALID=str(n), **cluster) for n in range(WORLD)
    ]


def finish(commands):
    try:
        return [command.end() for command in commands]
    finally:
        for command in commands:
            command.kill()


LAUNCHERS = ["devices", pytest.param("torchrun", marks=pytest.mark.slow), pytest.param("slurm", marks=pytest.mark.slow)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_however_two_processes_are_started_they_equal_one(launcher, tmp_path, whole):
    words, run = settings(tmp_path, epochs=3)
    ended = finish(start(launcher, words))
    assert [code for code, _ in ended] == [0] * len(ended), ended
    assert Run.open(run).read_json("environment.json")["processes"] == WORLD
    close(worker.outcome(run), whole("continued-by-one"), 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("told", ["both", "first", "second"])
def test_a_stopped_pair_goes_on_as_a_pair_or_alone(told, tmp_path):
    words, run = settings(tmp_path, epochs=10)
    command = Command([sys.executable, *words, "--train.devices", "2"])
    try:
        deadline = time.monotonic() + COMMAND_S
        while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < 7:
            assert command.process.poll() is None, command.end()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pids = {"first": [command.process.pid], "second": [command.child()]}
        for pid in pids.get(told, [*pids["first"], *pids["second"]]):
            os.kill(pid, signal.SIGTERM)
        code, said = command.end()
    finally:
        command.kill()
    assert code == 130, said
    assert said.count("otcxr: stopped after step") == 1, said
    assert "Traceback" not in said
    state = Run.open(run).read_checkpoint()
    assert 7 <= state["step"] < 40
    assert f"stopped after step {state['step']} of 40" in said
    shutil.copytree(run, tmp_path / "copy")
    expected, _ = settings(tmp_path / "expected", epochs=10)
    again = [["--resume", "true", "--out", str(folder), "--train.devices", devices]
             for folder, devices in ((run, "2"), (tmp_path / "copy", "1"))]  # fmt: skip
    for more in ([*expected], *([*words[:3], *each] for each in again)):
        code, said = finish([Command([sys.executable, *more])])[0]
        assert code == 0, said
    uninterrupted = worker.outcome(tmp_path / "expected" / "run")
    close(worker.outcome(run), uninterrupted, 1e-7)
    close(worker.outcome(tmp_path / "copy"), uninterrupted, 1e-7)


MISTAKES = {
    "batch": (["--train.batch_size", "9"], "train.batch_size = 9 cannot be cut into 2 equal parts"),
    "source": (["--data.source", "folder:/nowhere/at/all"], "/nowhere/at/all"),
    "few": (["--train.batch_size", "640"], "fewer than train.batch_size = 640"),
    "run": ([], "already holds a run"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["devices", "slurm"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_once(mistake, launcher, tmp_path):
    words, run = settings(tmp_path)
    more, message = MISTAKES[mistake]
    if mistake == "run":
        run.mkdir()
        (run / "config.yaml").write_text("{}")
    ended = finish(start(launcher, [*words, *more]))
    said = "".join(text for _, text in ended)
    assert [code for code, _ in ended] == [1, 0][: len(ended)], said  # process 0 has the exit code
    lines = [line for line in said.splitlines() if line.startswith("otcxr: ")]
    assert len(lines) == 1, said
    assert message in lines[0]
    assert "Traceback" not in said
