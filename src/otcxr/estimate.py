"""What packing and training a source would take: measured on a few images and steps, multiplied by all of them.

    pack    hours = images * (seconds to decode and reduce one) / workers;   size = images * (bytes of a reduced one)
    step    seconds(b) = a + b s, through two batch sizes; each is the fastest of some steps
    memory  peak(b) = m + b k, through the same two
    hours   epochs * steps * (step and views: one after the other without loader workers, else the slower of both)

It is a guess by a straight line, on a machine that may be busy with other things: believe its order, not its digits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from otcxr.console import Progress
from otcxr.data.dataset import LoadedViews, PixelCache, ViewDataset, join_views
from otcxr.data.records import Record
from otcxr.data.sources import open_collection
from otcxr.data.views_device import ViewRequest, device_views
from otcxr.errors import ConfigError, DataError
from otcxr.launch import make_fabric, set_up
from otcxr.loop import build_method, optimizer_of
from otcxr.packing import PackConfig
from otcxr.packing.reduce import Task, reduce_image
from otcxr.settings import PretrainConfig

__all__ = ["Estimate", "estimate_training"]

_STEPS = 3  # of each batch size, after one that is not counted
_ROOM = 0.8  # of the memory that is free


class Estimate(NamedTuple):
    """What was measured, and what follows. Times in seconds, sizes in bytes.

    Attributes:
        images: That would be trained on.
        tried, broken: Images that were read, and those of them that cannot be.
        decode_s: To decode and reduce one, for a pack; 0 where the source is a pack.
        stored: Of one in a pack.
        view_s: To make the views of one, in one process.
        cached: Share of the images whose pixels stay in memory between epochs.
        step_s: (fixed, for each image of the batch).
        memory: (fixed, for each image of the batch).
        free: Memory that the training may take, all in all.
        device: Where.
        config: The training.
        pack: The pack.
    """

    images: int
    tried: int
    broken: int
    decode_s: float
    stored: float
    view_s: float
    cached: float
    step_s: tuple[float, float]
    memory: tuple[float, float]
    free: float
    device: str
    config: PretrainConfig
    pack: PackConfig

    @property
    def pack_s(self) -> float:
        """Seconds for a pack of all."""
        return self.images * self.decode_s / (self.pack.workers or os.cpu_count() or 1)

    @property
    def largest_batch(self) -> int:
        """Images a step for which the memory lasts; the line is cut at four fifths of what is free."""
        fixed, each = self.memory
        return max(0, int((_ROOM * self.free - fixed) / max(each, 1.0)))

    def training_s(self, *, packed: bool) -> float:
        """Seconds for the whole training, from the source as it is or from a pack of it."""
        train = self.config.train
        batch = train.batch_size
        step = self.step_s[0] + batch * self.step_s[1]
        again = 0.0 if packed else (1 - self.cached) * self.decode_s
        views = batch * (self.view_s + again)
        workers = self.config.data.workers
        each = step + views if workers == 0 else max(step, views / workers)
        return train.epochs * (self.images // batch) * each

    def lines(self) -> list[str]:
        """It in words."""
        train, batch = self.config.train, self.config.train.batch_size
        step = self.step_s[0] + batch * self.step_s[1]
        need = self.memory[0] + batch * self.memory[1]
        said = [f"images    {self.images:,}; of {self.tried} that were tried {self.broken} cannot be read"]
        if self.decode_s:
            said.append(f"pack      {_time(self.pack_s)} and {_size(self.images * self.stored)} "
                        f"({1e3 * self.decode_s:.0f} ms an image and core, short side {self.pack.size}, "
                        f"{self.pack.bits} bits)")  # fmt: skip
        if self.images < batch:
            return [*said, f"training  none: fewer images than train.batch_size {batch}"]
        how = (f"{step:.2f} s a step, {1e3 * self.view_s:.0f} ms for the views of an image, "
               f"{self.config.data.workers} loader workers")  # fmt: skip
        whole, anew = (_time(self.training_s(packed=packed)) for packed in (True, False))
        said.append(
            f"training  {whole} from a pack: {train.epochs} epochs of {batch} images a step on {self.device} ({how})"
        )
        if self.decode_s:
            said.append(f"          {anew} without one: {1 - self.cached:.0%} of the images decoded anew in every "
                        f"epoch (data.cache_gb {self.config.data.cache_gb:g})")  # fmt: skip
        enough = need <= _ROOM * self.free
        said.append(f"memory    {_size(need)} of {_size(self.free)} that are free at train.batch_size {batch}"
                    + ("" if enough else ": too much"))  # fmt: skip
        said.append(f"batch     up to about {self.largest_batch:,} images a step fit")
        said.append("measured on few images and steps: believe the order of it, not the digits")
        return said


def estimate_training(
    config: PretrainConfig, pack: PackConfig, sample: int = 32, progress: Progress | None = None
) -> Estimate:
    """Try some images and steps; nothing is written.

    Args:
        config: The training; ``config.out`` does not matter.
        pack: The pack that would be made.
        sample: Images that are tried, spread evenly over the source.
        progress: Where to say what is being tried.
    Raises: ConfigError: fewer than four images are to be tried. DataError: the source cannot be opened, or none of what
        was tried can be read.
    """
    if sample < 4:
        raise ConfigError(f"--sample must be at least 4, received {sample}")
    collection = open_collection(config.data.source)
    training = collection.split(config.data.split) if collection.has_splits else collection
    count = len(training.records)
    if progress is not None:
        progress.say(f"{config.data.source}: {count:,} images; trying {min(sample, count)} of them and some steps")
    chosen = sorted({int(k * count / sample) for k in range(sample)}) if count else []
    usable, broken, decode_s, stored = _decode([training.records[index] for index in chosen], pack)
    if not usable:
        raise DataError(f"none of the {len(chosen)} images that were tried can be read; list what is wrong: otcxr data "
                        f"inspect {config.data.source}")  # fmt: skip
    packed = config.data.source.startswith("pack:")
    train = replace(config.train, devices=1, nodes=1, strategy="ddp", accumulate=1)
    fabric = make_fabric(train)
    small = max(2, min(train.batch_size // 2, 8 if fabric.device.type == "cpu" else 64))
    sizes = small, 2 * small
    cache = PixelCache(4.0, bits=8)
    views = ViewDataset(usable, range(len(usable)), config.views, config.seed, cache)
    start = [views[0, index] for index in range(len(usable))]  # decoded, and kept
    view_s = _fastest(lambda: [views[1, index] for index in range(len(usable))]) / len(usable)
    with torch.random.fork_rng(devices=[fabric.device.index or 0] if fabric.device.type == "cuda" else []):
        times, peaks = _steps(config, train, fabric, start, sizes, count)
    each = max((times[1] - times[0]) / small, 0.0)
    room = max((peaks[1] - peaks[0]) / small, 0.0)
    kept = sum(cache.grey(record.image).pixels.nbytes for record in usable) / len(usable)
    return Estimate(
        images=count, tried=len(chosen), broken=broken, decode_s=0.0 if packed else decode_s, stored=stored,
        view_s=view_s, cached=1.0 if packed else min(1.0, config.data.cache_gb * 1e9 / max(kept * count, 1.0)),
        step_s=(max(times[0] - small * each, 0.0), each), memory=(max(peaks[0] - small * room, 0.0), room),
        free=_free(fabric.device), device=str(fabric.device), config=config, pack=pack,
    )  # fmt: skip


def _decode(records: list[Record], pack: PackConfig) -> tuple[list[Record], int, float, float]:
    """(usable records, how many are not, seconds for one, bytes of one)."""
    usable, spent, size = [], 0.0, 0
    for record in records:
        start = time.perf_counter()
        try:
            reduced = reduce_image(Task(record.image, {}, record.spacing, record.view, pack.size, pack.bits))
        except DataError:
            continue
        spent += time.perf_counter() - start
        size += reduced.pixels.nbytes + (0 if reduced.valid is None else reduced.valid.nbytes)
        usable.append(record)
    count = max(len(usable), 1)
    return usable, len(records) - len(usable), spent / count, size / count


def _steps(
    config: PretrainConfig, train: Any, fabric: Any, loaded: list[LoadedViews], sizes: tuple[int, int], count: int
) -> tuple[list[float], list[float]]:
    """Seconds of a step and peak of memory for two batch sizes."""
    method = build_method(config, count)
    if train.precision == "64-true":
        method.double()

    module, wrapped = set_up(fabric, method, train, optimizer_of(method, train))
    module.train()
    times, peaks = [], []
    for size in sizes:
        joined = join_views([loaded[index % len(loaded)] for index in range(size)])

        def step(joined: LoadedViews = joined) -> None:
            batch: Any = joined.batch
            on_device = isinstance(batch, ViewRequest)
            batch = device_views(batch, fabric.device) if on_device else fabric.to_device(batch)
            fabric.backward(module(batch).loss)
            wrapped.step()
            wrapped.zero_grad()
            method.after_step(0.0)
            if fabric.device.type == "cuda":
                torch.cuda.synchronize()

        step()  # the optimizer's state is made, kernels are chosen
        _forget_peak(fabric.device)
        times.append(_fastest(step))
        peaks.append(_peak(fabric.device))
    return times, peaks


def _fastest(call: Callable[[], object]) -> float:
    spent = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux: the peak begins anew at what is held now
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    with suppress(OSError, StopIteration):
        return _kilobytes("/proc/self/status", "VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if os.uname().sysname == "Darwin" else 1024.0)


def _free(device: torch.device) -> float:
    """What the training may take, what this process has already included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    with suppress(OSError, StopIteration):
        return _kilobytes("/proc/meminfo", "MemAvailable") + _kilobytes("/proc/self/status", "VmRSS")
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _kilobytes(path: str, name: str) -> float:
    """A size of /proc, in bytes."""
    lines = Path(path).read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(size: float) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
