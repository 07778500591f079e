"""Do a run again from what its folder says, and say whether the same came out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from otcxr.config import flatten
from otcxr.console import Progress, SilentProgress
from otcxr.distributed import process
from otcxr.errors import ConfigError, DataError
from otcxr.runs import Run
from otcxr.settings import config_from_plain
from otcxr.train import pretrain

__all__ = ["compare_runs", "reproduce"]

_TIMES = {"images_per_s", "elapsed_s"}
# what environment.json says besides where and when: a difference in these may change bits, or must change the result
_DECIDES = ("otcxr", "python", "system", "threads", "gpu", "versions", "device", "processes", "transport",
            "config_digest", "data_digest", "contents_digest")  # fmt: skip


def reproduce(
    run: Run, out: str | Path, *, source: str = "", steps: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Train again with a run's settings, images and number of threads, and compare.

    Args:
        run: The run to do again; as far as its last saved step if it is not finished.
        out: Folder of the new run; ``reproduction.json`` in it holds the result.
        source: Where the images are now, if they moved.
        steps: Do only so many steps; 0 does all.
        progress: Where to show progress.
    Returns: What ``compare_runs`` found.
    Raises: DataError: the run has not saved a step yet. ConfigError: ``out`` holds a run, or ``steps`` is too large.
    """
    progress = progress or SilentProgress()
    encoder = run.read_json("encoder.json")
    if encoder is None:
        raise DataError(f"{run.path} has not saved a step yet; there is nothing to compare with")
    done = int(encoder["step"])
    if not 0 <= steps <= done:
        raise ConfigError(f"steps must be between 0 (all) and {done}, which {run.path} has saved; received {steps}")
    config = config_from_plain(run.read_config())
    data = replace(config.data, source=source or config.data.source)
    before = run.read_json("environment.json") or {}
    with _threads(before.get("threads")):
        new = pretrain(replace(config, data=data, out=str(out), resume=False), progress, stop_after=steps or done)
    result = compare_runs(run, new, steps or done)
    if process() == 0:
        new.write_json("reproduction.json", result)
    return result


def compare_runs(old: Run, new: Run, step: int) -> dict[str, Any]:
    """Compare two runs up to a step.

    Returns:
        "identical": every number but times that both logged, and the weights where both saved them at that step, are
        equal bit for bit; "step", "lines": how far, and over how many lines of metrics; "lines_of_one_only": how many
        lines the old and the new run have alone (a continuation may log more often); "first_difference": step and name
        of the first number that differs, None if none; "largest_loss_difference": relative; "weights": "identical",
        "different" or "not compared" (not saved at the same step); "environment": what differs, as {name: [old, new]};
        "continued": where the old run was interrupted and what had changed by then.
    """
    first, largest = None, 0.0
    old_lines, new_lines = _lines(old, step), _lines(new, step)
    both = sorted(old_lines.keys() & new_lines.keys())
    for key in both:
        a, b = old_lines[key], new_lines[key]
        names = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
        if names and first is None:
            first = {"step": key[0], "name": names[0], "old": a.get(names[0]), "new": b.get(names[0])}
        if "loss" in a and "loss" in b:
            largest = max(largest, abs(a["loss"] - b["loss"]) / max(abs(a["loss"]), 1e-12))
    weights = _weights(old, new)
    before, now = (run.read_json("environment.json") or {} for run in (old, new))
    environment: dict[str, list[Any]] = {}
    for name in _DECIDES:
        a, b = flatten({name: before.get(name)}), flatten({name: now.get(name)})
        environment |= {key: [a.get(key), b.get(key)] for key in [*a, *b] if a.get(key) != b.get(key)}
    return {
        "identical": first is None and bool(both) and weights != "different",
        "step": step, "lines": len(both), "lines_of_one_only": [len(old_lines) - len(both), len(new_lines) - len(both)],
        "first_difference": first, "largest_loss_difference": largest,
        "weights": weights, "environment": environment, "continued": before.get("continued", []),
    }  # fmt: skip


def _lines(run: Run, step: int) -> dict[tuple[int, bool], dict[str, Any]]:
    """Numbers of each line up to a step, flat and without times, under (step, whether it is an online judgement)."""
    kept = {}
    for line in run.read_metrics():
        if line["step"] <= step:
            flat: Mapping[str, Any] = flatten(line)
            numbers = {name: value for name, value in flat.items() if name not in _TIMES}
            kept[int(line["step"]), "online" in line] = numbers
    return kept


def _weights(old: Run, new: Run) -> str:
    from safetensors.torch import load_file

    facts: Sequence[Any] = [run.read_json("encoder.json") for run in (old, new)]
    if None in facts or facts[0]["step"] != facts[1]["step"]:
        return "not compared"
    a, b = (load_file(run.path / "method.safetensors") for run in (old, new))
    same = a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
    return "identical" if same else "different"


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with as many threads as the run had: sums are taken in another order with another number."""
    before = torch.get_num_threads()
    said = os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(count or before)
    if count:
        os.environ["OMP_NUM_THREADS"] = str(count)  # for processes that are started, and because Fabric looks there
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if count:
            os.environ.pop("OMP_NUM_THREADS")
            if said is not None:
                os.environ["OMP_NUM_THREADS"] = said
