"""Pre-training: the composition of a run, and the loop on Fabric. Its settings: ``otcxr.settings``.

The same training whatever it runs on: ``train.batch_size`` images a step, drawn in an order that depends on (seed,
epoch) only, in views that depend on (seed, epoch, image) only; random numbers that a method draws depend on (seed,
step, part, process) only. So a checkpoint needs no random state and no position besides the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning_fabric import Fabric

from otcxr.config import digest, flatten
from otcxr.console import Progress, SilentProgress
from otcxr.data.dataset import (
    PixelCache,
    check_records,
    write_skipped,
)
from otcxr.data.records import column
from otcxr.data.sources import open_collection
from otcxr.distributed import everyone, from_first, process, processes, together
from otcxr.errors import CheckpointError, ConfigError
from otcxr.faults import Collapsed, Interrupted
from otcxr.launch import make_fabric
from otcxr.loop import FORMAT, Data, Training, build_method
from otcxr.nn.encoder import load_state
from otcxr.online import OnlineProbe
from otcxr.ot import backends
from otcxr.probes import choose_probes
from otcxr.runs import Run, describe_environment
from otcxr.settings import (
    FREE,
    EncoderConfig,
    PretrainConfig,
    TrainConfig,
    config_from_plain,
    config_to_plain,
    identity,
)

__all__ = [
    "Collapsed",
    "EncoderConfig",
    "Interrupted",
    "PretrainConfig",
    "TrainConfig",
    "build_method",
    "config_from_plain",
    "config_to_plain",
    "pretrain",
]

_FEW_TOKENS = 36  # per view, below which dense methods are warned about


def pretrain(
    config: PretrainConfig, progress: Progress | None = None, *, stop_after: int | None = None,
    pixels: PixelCache | None = None,
) -> Run:  # fmt: skip
    """Pre-train an encoder and leave a run folder.

    Args:
        config: The settings.
        progress: Where to show progress; None shows nothing.
        stop_after: Save and return after so many steps of the training, as if it had been interrupted there.
        pixels: Images with 8 bits that were read before, for several trainings in one process; it is added to, and its
            limit of memory counts instead of ``data.cache_gb``.
    Returns: The run, finished unless ``stop_after`` ended it.
    Raises:
        ConfigError: settings that contradict each other, the machine, or the run that is continued.
        DataError: the source cannot be read, or too much of it is broken.
        CheckpointError: all checkpoints are damaged, or they belong to another network.
        Interrupted: stopped by Ctrl-C, SIGTERM or SIGUSR1; the run can go on.
        Collapsed: stopped by its health, with ``train.on_collapse = stop``; the run can go on.
    """
    progress = progress or SilentProgress()
    fabric = make_fabric(config.train)
    if process() != 0:
        progress = SilentProgress()
    with ExitStack() as held:
        checkpoint, run = None, Run(config.out)
        with together():
            if process() == 0:  # one process reads and writes the folder
                held.enter_context(run.lock())
                checkpoint = _open_run(config, run, progress)
        if pixels is None:
            pixels = PixelCache(config.data.cache_gb, bits=8)
        training = _prepare(config, fabric, run, from_first(checkpoint), pixels, progress)
        del checkpoint  # as large as the weights and the optimizer's state
        # methods that draw random numbers get streams of their own, and the caller's random state is left alone
        here = [fabric.device.index or 0] if fabric.device.type == "cuda" else []
        with torch.random.fork_rng(devices=here):
            training.run_to_end(stop_after)
    return run


def _prepare(
    config: PretrainConfig, fabric: Fabric, run: Run, checkpoint: dict[str, Any] | None, cache: PixelCache,
    progress: Progress,
) -> Training:  # fmt: skip
    """Everything before the first step: images, networks, what watches the run; all processes together."""
    if config.resume and checkpoint is None:
        progress.say(f"nothing to resume in {run.path}: starting from the beginning")
    with together():
        collection = open_collection(config.data.source)
        training = collection.split(config.data.split) if collection.has_splits else collection
    with together(), progress.bar("reading images", len(training.records), "images") as bar:
        usable, skipped, contents = check_records(
            training, cache, config.data.max_skipped, bar,
            process=process(), processes=processes(), everyone=everyone,
        )  # fmt: skip
    if checkpoint is not None:  # what has become unreadable since is stood in for, what has been mended stays out
        left_out = set(checkpoint["left_out"])
        usable = [index for index in range(len(training.records)) if index not in left_out]
    with together():
        if len(usable) < config.train.batch_size:
            raise ConfigError(
                f"{config.data.source} has {len(usable)} usable images in this split, fewer than train.batch_size = "
                f"{config.train.batch_size}; set train.batch_size to at most {len(usable)}"
            )
        method = build_method(config, len(usable))
    cells = math.ceil(config.views.size / method.encoder.strides[-1])
    if cells**2 < _FEW_TOKENS:
        progress.say(f"warning: a view has {cells**2} tokens, fewer than {_FEW_TOKENS}: dense alignment has little to "
                     "align; use larger views.size or encoder.stride 16")  # fmt: skip
    with together():
        if checkpoint is not None:
            if config.train.precision == "64-true":
                method.double()  # before: float32 would round what is loaded
            load_state(method, checkpoint["method"], str(run.path / "last.ckpt"))
    names, studies = column(training.records, "name"), column(training.records, "study")
    images = digest([(names[index], studies[index]) for index in usable])
    with together():
        if len(set(everyone((images, contents)))) > 1:
            raise ConfigError(f"the processes do not see the same images under {config.data.source}; give every "
                              "machine the same folder")  # fmt: skip
        if checkpoint is not None and checkpoint["data_digest"] != images:
            raise ConfigError(
                f"{config.data.source} no longer holds the images that {run.path} was trained on, so it cannot go on "
                "as if nothing had happened; bring them back, or start anew with another --out"
            )
    plain = config_to_plain(config)
    facts = {"config_digest": identity(plain), "data_digest": images, "contents_digest": contents,
             "images": len(usable), "input_size": config.views.size, "source": config.data.source}  # fmt: skip
    with together():
        if process() == 0:
            write_skipped(run.path / "skipped.csv", skipped)
            if skipped:
                progress.say(f"skipped {len(skipped)} images, listed in {run.path / 'skipped.csv'}")
            # where the run lies and how it was started are no settings of it: the folder may be copied
            run.write_config({name: value for name, value in plain.items() if name not in ("out", "resume")})
            _write_environment(run, fabric, facts, 0 if checkpoint is None else int(checkpoint["step"]), progress)
    data = Data(training, usable, skipped, cache)
    probes = choose_probes(collection, training, config.train.probes, config.seed)
    online = None
    with together():
        if process() == 0:
            online = OnlineProbe.choose(
                collection, training, images=config.train.online_images, size=config.views.size, seed=config.seed
            )
    return Training(config, fabric, run, method, data, facts, probes, online, checkpoint, progress)


def _write_environment(run: Run, fabric: Fabric, facts: Mapping[str, Any], step: int, progress: Progress) -> None:
    """What the run is reproduced from; a continuation is noted beside the first part, with what has changed."""
    # back ends agree to rounding only, so which one solved the transport belongs to what a run is reproduced from
    now = {**describe_environment(), **facts, "device": str(fabric.device), "processes": processes(),
           "transport": backends(fabric.device.type)[0]}  # fmt: skip
    before = run.read_json("environment.json") if step else None
    if before is None:
        run.write_json("environment.json", {**now, "continued": []})
        return
    changed = {name: value for name, value in now.items() if before.get(name) != value and name != "date"}
    if "contents_digest" in changed:
        progress.say("warning: the images are the same by name but not by content; the run goes on, but not as it "
                     "would have")  # fmt: skip
    before.setdefault("continued", []).append({"step": step, "date": now["date"], "changed": changed})
    run.write_json("environment.json", before)


def _open_run(config: PretrainConfig, run: Run, progress: Progress) -> dict[str, Any] | None:
    """Look into the folder: None if it is new, else the checkpoint to go on from.

    Raises: ConfigError: the folder holds a run and resume was not asked for, or its settings differ.
    """
    if not (run.path / "config.yaml").is_file():
        return None
    if not config.resume:
        raise ConfigError(f"{run.path} already holds a run; go on with --resume true, or choose another --out")
    # a setting that is younger than the run has the default, which is what the run was trained with
    old, new = flatten(config_to_plain(config_from_plain(run.read_config()))), flatten(config_to_plain(config))
    for name in [*new, *old]:
        if name not in FREE and old.get(name) != new.get(name):
            kind = CheckpointError if name.startswith(("encoder.", "method.")) else ConfigError
            raise kind(
                f"{run.path} was trained with {name} = {old.get(name)}, now it is {new.get(name)}; "
                f"go on with the saved ones (otcxr pretrain --resume true --out {run.path}) or choose another --out"
            )
    state = run.read_checkpoint(progress.say)
    if state is not None and state.get("format") != FORMAT:
        raise CheckpointError(f"{run.path / 'last.ckpt'} was written by another version of otcxr; finish the run with "
                              "that version, or choose another --out")  # fmt: skip
    return state
