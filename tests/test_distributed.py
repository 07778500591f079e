"""Two processes equal one with the double batch: every exchange, every loss, every method, whole trainings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import distributed_worker as worker
from distributed_worker import CASES, WORLD, Part
from otcxr.distributed import SyncBatchNorm, convert_batch_norm

pytestmark = pytest.mark.distributed

PAIR_S = 300  # for all cases of a pair of processes together
SLOW = ()


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
    """The folder of what one process computes."""
    return Part(None, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("apart:") and name != "continued-by-one"])
def test_two_processes_equal_one(name, pair, whole):
    parts = pair.results(name)
    found = errors(parts, CASES[name].compute(whole))
    assert all(error <= CASES[name].tolerance for error in found.values()), found
