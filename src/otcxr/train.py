"""Pre-training: the composition of a run, and the loop on Fabric. Its settings: ``otcxr.settings``."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader

from otcxr.config import digest, flatten
from otcxr.console import Progress, SilentProgress
from otcxr.data.dataset import EpochBatches, PixelCache, ViewDataset, check_records, write_skipped
from otcxr.data.records import Collection, Record
from otcxr.data.sources import open_collection
from otcxr.data.views import collate_views
from otcxr.errors import CheckpointError, ConfigError, OtcxrError
from otcxr.health import observe, verdict
from otcxr.methods import METHODS, SSLMethod
from otcxr.nn.encoder import build_encoder, load_state
from otcxr.optim import adamw, cosine_schedule
from otcxr.ot import backends
from otcxr.probes import choose_probes, write_pairs
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


class Interrupted(OtcxrError):
    """The run was stopped on request and can go on with ``resume``."""


def build_method(config: PretrainConfig) -> SSLMethod:
    """Build method and encoder with initial weights that depend on the seed only, not on the global random state.

    All methods of one seed start from the same encoder.
    """
    encoder = build_encoder(
        config.encoder.name,
        width=config.encoder.width,
        stride=config.encoder.stride or 32,
        padding=config.encoder.padding,
        seed=config.seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed + 1)  # not torch.manual_seed: it reseeds the GPU too
        return METHODS[config.method].build(encoder, config.settings)


def pretrain(config: PretrainConfig, progress: Progress | None = None) -> Run:
    """Pre-train an encoder and leave a run folder.

    Args:
        config: The settings.
        progress: Where to show progress; None shows nothing.
    Returns: The finished run.
    Raises:
        ConfigError: settings that contradict each other, the machine, or the run that is continued.
        DataError: the source cannot be read, or too much of it is broken.
        CheckpointError: the checkpoint is damaged or belongs to another network.
        Interrupted: stopped by Ctrl-C or SIGTERM; the run can go on.
    """
    progress = progress or SilentProgress()
    fabric = _fabric(config.train)
    with Run(config.out).lock():
        return _pretrain(config, fabric, progress)


def _pretrain(config: PretrainConfig, fabric: Fabric, progress: Progress) -> Run:
    """``pretrain`` in a folder that no other process writes to."""
    run, checkpoint = _open_run(config)
    if config.resume and checkpoint is None:
        progress.say(f"nothing to resume in {run.path}: starting from the beginning")
    collection = open_collection(config.data.source)
    has_split = any(record.split for record in collection.records)
    training = collection.split(config.data.split) if has_split else collection
    cache = PixelCache(config.data.cache_gb)
    with progress.bar("reading images", len(training.records), "images") as bar:
        usable, skipped = check_records(training, cache, config.data.max_skipped, bar)
    if len(usable) < config.train.batch_size:
        raise ConfigError(
            f"{config.data.source} has {len(usable)} usable images in this split, fewer than train.batch_size = "
            f"{config.train.batch_size}; set train.batch_size to at most {len(usable)}"
        )
    method = build_method(config)
    cells = math.ceil(config.views.size / method.encoder.strides[-1])
    if cells**2 < _FEW_TOKENS:
        progress.say(f"warning: a view has {cells**2} tokens, fewer than {_FEW_TOKENS}: dense alignment has little to "
                     "align; use larger views.size or encoder.stride 16")  # fmt: skip
    if checkpoint is not None:
        load_state(method, checkpoint["method"], str(run.path / "last.ckpt"))
    images = digest([(training.records[index].name, training.records[index].study) for index in usable])
    if checkpoint is not None and checkpoint["data_digest"] != images:
        raise ConfigError(
            f"{config.data.source} no longer holds the images that {run.path} was trained on, so it cannot go on as if "
            "nothing had happened; bring them back, or start anew with another --out"
        )
    write_skipped(run.path / "skipped.csv", skipped)
    if skipped:
        progress.say(f"skipped {len(skipped)} images, listed in {run.path / 'skipped.csv'}")
    plain = config_to_plain(config)
    # where the run lies and how it was started are no settings of it: the folder may be copied
    run.write_config({name: value for name, value in plain.items() if name not in ("out", "resume")})
    facts = {"config_digest": identity(plain), "data_digest": images,
             "images": len(usable), "input_size": config.views.size, "source": config.data.source}  # fmt: skip
    # back ends agree to rounding only, so which one solved the transport belongs to what a run is reproduced from
    where = {"device": str(fabric.device), "transport": backends(fabric.device.type)[0]}
    run.write_json("environment.json", {**describe_environment(), **facts, **where})
    probes = choose_probes(collection, training, config.train.probes, config.seed)
    fit(fabric, config, method, training.records, usable, cache, run, checkpoint, facts, probes, progress)
    return run


def fit(
    fabric: Fabric,
    config: PretrainConfig,
    method: SSLMethod,
    records: Sequence[Record],
    usable: Sequence[int],
    cache: PixelCache,
    run: Run,
    checkpoint: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    probes: Collection,
    progress: Progress,
) -> None:
    """The training loop: from the checkpoint, or from the start, to the last epoch."""
    train = config.train
    sampler = EpochBatches(usable, train.batch_size, config.seed)
    dataset = ViewDataset(records, config.views, config.seed, cache)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate_views, num_workers=config.data.workers,
        pin_memory=fabric.device.type == "cuda",
    )  # fmt: skip
    steps, total = len(sampler), len(sampler) * train.epochs
    warmup = round(train.warmup * total)
    optimizer = adamw(method, train.learning_rate, train.weight_decay)
    step, elapsed = 0, 0.0
    # channels last: on a CPU replicate padding is several times slower in the default layout
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module, optimizer = fabric.setup(method, optimizer)
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, elapsed = int(checkpoint["step"]), float(checkpoint["elapsed_s"])
    run.cut_metrics(step)
    if step >= total:
        progress.say(f"{run.path} has finished all {train.epochs} epochs already")
        return

    def save() -> None:
        state = {"method": method.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                 "elapsed_s": elapsed, "data_digest": facts["data_digest"]}  # fmt: skip
        run.write_weights(method, method.encoder, {**facts, "step": step, "epochs": step / steps})
        write_pairs(run, method, probes, config.views, config.seed, fabric.device)
        run.write_checkpoint(state)

    method.train()

    def diverged(what: str) -> OtcxrError:
        last = run.path / "last.ckpt"  # there is none before the end of the first epoch
        kept = f"{last} holds the last good state. " if last.exists() else ""
        return OtcxrError(
            f"the training diverged at step {step + 1}: {what}. {kept}"
            "Lower train.learning_rate, raise train.warmup, or use train.precision 32-true"
        )

    tick = time.perf_counter()
    with _stop_request() as stop, progress.bar("pre-training", total * train.batch_size, "images") as bar:
        while step < total:
            sampler.epoch, sampler.first = divmod(step, steps)
            for batch in loader:
                batch = fabric.to_device(batch)
                rate = train.learning_rate * cosine_schedule(step, warmup, total)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                last = step + 1 == total
                look = step % train.health_every == 0 or last
                try:
                    output = module(batch, observe=look)
                except ValueError as error:  # the transport refuses costs and masses that are not finite
                    if "nan" not in str(error).lower() and "finite" not in str(error):
                        raise
                    raise diverged("features are not finite") from error
                loss = float(output.loss.detach())
                if not math.isfinite(loss):
                    raise diverged(f"the loss is {loss}")
                optimizer.zero_grad()
                fabric.backward(output.loss)
                clipped = fabric.clip_gradients(module, optimizer, max_norm=train.clip, error_if_nonfinite=False)
                norm = 0.0 if clipped is None else float(clipped)
                if not math.isfinite(norm):  # before the step: no weight may take it in
                    raise diverged(f"the gradient's norm is {norm}")
                optimizer.step()
                step += 1
                method.after_step(step / total)
                # wall time since the last step ended, so views, health and checkpoints are in it
                spent, tick = time.perf_counter() - tick, time.perf_counter()
                elapsed += spent
                if look or step % train.log_every == 0:
                    line: dict[str, Any] = {
                        "step": step, "epoch": round(step / steps, 4), "loss": loss,
                        **{name: float(term) for name, term in output.terms.items()},
                        "gradient_norm": norm, "learning_rate": rate,
                        "images_per_s": round(train.batch_size / spent, 1), "elapsed_s": round(elapsed, 2),
                    }  # fmt: skip
                    if output.observed is not None:
                        line["health"] = observe(output.observed, batch, method.encoder.first_centre)
                        line["verdict"] = verdict(line["health"])._asdict()
                    run.append_metrics(line)
                bar(step * train.batch_size, f"loss {loss:.3f}")
                if stop.is_set():
                    save()
                    raise Interrupted(
                        f"stopped after step {step} of {total}; "
                        f"go on with: otcxr pretrain --resume true --out {run.path}"
                    )
            save()
    latest = [line["verdict"]["text"] for line in run.read_metrics() if "verdict" in line][-1]
    progress.say(latest)


def _fabric(train: TrainConfig) -> Fabric:
    if train.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.accelerator is cuda but this machine has no usable GPU; use cpu or auto")
    accelerator = train.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Any = train.precision
    return Fabric(accelerator=accelerator, devices=1, precision=precision)


def _open_run(config: PretrainConfig) -> tuple[Run, dict[str, Any] | None]:
    """Open the folder: new, or with the checkpoint to go on from.

    Raises: ConfigError: the folder holds a run and resume was not asked for, or its settings differ.
    """
    run = Run(config.out)
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError(f"{run.path} is a file; --out needs a folder")
    if not (run.path / "config.yaml").is_file():
        return run, None
    if not config.resume:
        raise ConfigError(f"{run.path} already holds a run; go on with --resume true, or choose another --out")
    old, new = flatten(run.read_config()), flatten(config_to_plain(config))
    for name in [*new, *old]:
        if name not in FREE and old.get(name) != new.get(name):
            kind = CheckpointError if name.startswith(("encoder.", "method.")) else ConfigError
            raise kind(
                f"{run.path} was trained with {name} = {old.get(name)}, now it is {new.get(name)}; "
                f"go on with the saved ones (otcxr pretrain --resume true --out {run.path}) or choose another --out"
            )
    return run, run.read_checkpoint()


@contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into a request that is honoured after the step; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
