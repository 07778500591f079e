"""From records to pixels: the datasets that training and evaluation read."""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from otcxr.data.geometry import ViewBatch
from otcxr.data.images import fit_square, load_radiograph
from otcxr.data.records import Collection, ImageRef, Radiograph, Record, Skipped, StoredImage, Table, column
from otcxr.data.view_spec import MIN_VALID, GreyImage, ViewsConfig, draw_views, view_generator
from otcxr.data.views import carry_out, collate_views
from otcxr.data.views_device import ViewRequest, collate_requests, request_views
from otcxr.errors import ConfigError, DataError
from otcxr.files import write_rows

__all__ = [
    "Checked",
    "DataConfig",
    "EpochBatches",
    "ImageDataset",
    "LoadedViews",
    "PixelCache",
    "ViewDataset",
    "check_records",
    "join_views",
    "read_pixels",
    "refuse_too_many",
    "write_skipped",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Where radiographs come from.

    Attributes:
        source: READER:ARGUMENT, such as nih:PATH, folder:PATH or phantom:2000,seed=1,size=96.
        split: Split that is used for pre-training; a source without splits is used whole.
        max_skipped: Largest share of images that may be missing or broken before the run refuses to start.
        cache_gb: Memory in GB for decoded images, kept with the 8 bits that views are made of; what does not fit is
            decoded again.
        workers: Processes that prepare views; 0 prepares them in the main process.
    """

    source: str
    split: str = "train"
    max_skipped: float = 0.05
    cache_gb: float = 2.0
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.max_skipped <= 1:
            raise ConfigError(f"data.max_skipped is a share in [0, 1], received {self.max_skipped}")
        if self.workers < 0 or self.cache_gb < 0:
            raise ConfigError(f"data.workers and data.cache_gb must be >= 0, received {self.workers}, {self.cache_gb}")


def read_pixels(image: ImageRef) -> Radiograph:
    """Read or compute the pixels that a record points to.

    Raises: DataError: the file cannot be used.
    """
    return load_radiograph(image) if isinstance(image, Path) else image.radiograph()


class PixelCache:
    """Decoded images up to a limit of memory, rounded to 16 bits, or to the 8 bits that views are made of.

    With 16 bits, 8- and 16-bit sources survive without loss.
    """

    def __init__(self, limit_gb: float, bits: int = 16) -> None:
        self._free = int(limit_gb * 1e9)
        self._type: type[np.uint8] | type[np.uint16] = np.uint8 if bits == 8 else np.uint16
        self._kept: dict[ImageRef, tuple[NDArray[Any], NDArray[np.bool_] | None, tuple[float, float] | None]] = {}

    def get(self, image: ImageRef) -> Radiograph:
        """Return the pixels of an image, from memory where they are."""
        pixels, valid, spacing = self._find(image)
        mask = np.ones(pixels.shape, dtype=np.bool_) if valid is None else valid
        # through the cache even when it is full: the numbers must not depend on the memory limit
        image_01 = pixels.astype(np.float32) / np.float32(np.iinfo(self._type).max)
        return Radiograph(torch.from_numpy(image_01)[None], torch.from_numpy(mask)[None], spacing)

    def grey(self, image: ImageRef) -> GreyImage:
        """Return the 8-bit pixels of an image, from which views are made."""
        pixels, valid, _ = self._find(image)
        if pixels.dtype != np.uint8:
            pixels = np.round(pixels * np.float32(1 / 257)).astype(np.uint8)
        return GreyImage(pixels, valid)

    def _find(self, image: ImageRef) -> tuple[NDArray[Any], NDArray[np.bool_] | None, tuple[float, float] | None]:
        kept = self._kept.get(image)
        if kept is None:
            if isinstance(image, StoredImage):  # it lies in a file that the system keeps in memory: no need to copy it
                pixels, valid, spacing = image.stored()
                if pixels.dtype != self._type:
                    wide = self._type is np.uint16
                    pixels = (
                        pixels * np.uint16(257) if wide else np.round(pixels * np.float32(1 / 257)).astype(np.uint8)
                    )
                return pixels, valid, spacing
            radiograph = read_pixels(image)
            most = np.float32(np.iinfo(self._type).max)
            pixels = np.round(radiograph.image[0].numpy() * most).astype(self._type)
            valid = None if bool(radiograph.valid.all()) else radiograph.valid[0].numpy()
            kept = (pixels, valid, radiograph.spacing)
            size = pixels.nbytes + (0 if valid is None else valid.nbytes)
            if size <= self._free:
                self._free -= size
                self._kept[image] = kept
        return kept


class Checked(NamedTuple):
    """What reading every image once has shown.

    Attributes:
        usable: Indices of the records that can be used.
        skipped: Everything that is skipped, with its reason; the reader's part first.
        contents: A number that changes when the pixels of a usable image change; independent of the order of reading.
    """

    usable: list[int]
    skipped: list[Skipped]
    contents: str


def check_records(
    collection: Collection,
    cache: PixelCache,
    max_skipped: float,
    progress: Callable[[int], None] | None = None,
    *,
    process: int = 0,
    processes: int = 1,
    everyone: Callable[[object], list[Any]] | None = None,
    again: bool = False,
) -> Checked:
    """Read every image once, so that a broken file is found before training and not in its middle.

    What a pack holds was read when it was packed; its records say what was found.

    Args:
        collection: What to read.
        cache: Keeps what fits, so that the reading is not wasted.
        max_skipped: Largest share of missing and broken images.
        progress: Called with the number of images read so far.
        process, processes: This process reads every ``processes``-th image, from ``process`` on.
        everyone: Gathers a plain value of each process; needed with more than one.
        again: Read the images of a pack as well.
    Raises: DataError: nothing is usable, or more than ``max_skipped`` is not.
    """

    total = len(collection.records)
    if not again and isinstance(collection.records, Table):
        shares, digests = collection.records.checked()
        usable = np.flatnonzero(shares >= MIN_VALID).tolist()
        # the place tells two equal pictures apart; modulo 2^64, as below
        contents = int((digests * (2 * np.arange(total, dtype=np.uint64) + 1))[usable].sum())
        names = column(collection.records, "name")
        skipped = [
            *collection.skipped,
            *(Skipped(names[i], _little(float(shares[i]))) for i in np.flatnonzero(shares < MIN_VALID).tolist()),
        ]
    else:
        usable, broken, contents = _read_all(collection, cache, progress, process, processes, everyone)
        skipped = [*collection.skipped, *broken]
    named = total + len(collection.skipped)
    if not named:
        raise DataError(f"{collection.name} has no images; check data.source and data.split")
    refuse_too_many(skipped, named, max_skipped, collection.name, anything=bool(usable))
    return Checked(usable, skipped, f"{contents:016x}")


def _little(share: float) -> str:
    return f"only {share:.1%} of its area is a picture, the rest is padding; at least {MIN_VALID:.0%} is needed"


def _read_all(
    collection: Collection, cache: PixelCache, progress: Callable[[int], None] | None, process: int, processes: int,
    everyone: Callable[[object], list[Any]] | None,
) -> tuple[list[int], list[Skipped], int]:  # fmt: skip
    """Usable indices, what is not, and the contents; see ``check_records``."""

    def read(index: int) -> Skipped | int:
        record = collection.records[index]
        try:
            radiograph = cache.get(record.image)
        except DataError as error:
            return Skipped(record.name, str(error))
        share = float(radiograph.valid.float().mean())
        if share < MIN_VALID:
            return Skipped(record.name, _little(share))
        # index and shape tell two equal pictures apart, and a picture from its transpose
        pixels = radiograph.image.numpy()
        return zlib.crc32(pixels.tobytes(), zlib.crc32(repr((index, pixels.shape)).encode()))

    total = len(collection.records)
    own = range(process, total, processes)
    found: dict[int, Skipped | int] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(own), 4096):  # in blocks: the pool holds what it was given until it is done
            block = own[first : first + 4096]
            for index, result in zip(block, pool.map(read, block), strict=True):
                found[index] = result
                if progress is not None:
                    progress(min(total, len(found) * processes))
    if everyone is not None:
        found = {index: result for part in everyone(found) for index, result in part.items()}
    usable = [index for index in range(total) if not isinstance(found[index], Skipped)]
    broken = [found[index] for index in range(total)]
    contents = sum(item for item in broken if not isinstance(item, Skipped)) % 2**64
    return usable, [item for item in broken if isinstance(item, Skipped)], contents


def refuse_too_many(
    skipped: Sequence[Skipped], named: int, max_skipped: float, name: str, *, anything: bool = True
) -> None:
    """Raise DataError where more than the share ``max_skipped`` of ``named`` images, or everything, cannot be used."""
    share = len(skipped) / named
    if share > max_skipped or not anything:
        enough = f"set data.max_skipped to {math.ceil(share * 1000) / 1000:.3f}" if anything else "check data.source"
        raise DataError(
            f"{len(skipped)} of {named} images of {name} cannot be used (first: {skipped[0].image}: "
            f"{skipped[0].reason}); at most {max_skipped:.1%} may be skipped. Mend them, or {enough}"
        )


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write the list of skipped images as CSV (image, reason); an empty list still writes its header."""
    write_rows(path, ("image", "reason"), ((item.image, item.reason) for item in skipped))


class LoadedViews(NamedTuple):
    """Views of one image or of a batch, and the images that could not be read and were stood in for.

    With ``views.executor`` = device ``batch`` is what the device makes the views from.
    """

    batch: ViewBatch | ViewRequest
    lost: tuple[Skipped, ...]


def join_views(samples: Sequence[LoadedViews]) -> LoadedViews:
    """Join samples along the batch dimension."""
    lost = tuple(item for s in samples for item in s.lost)
    requests = [s.batch for s in samples if isinstance(s.batch, ViewRequest)]
    if requests:
        return LoadedViews(collate_requests(requests), lost)
    return LoadedViews(collate_views([s.batch for s in samples if isinstance(s.batch, ViewBatch)]), lost)


class ViewDataset(Dataset[LoadedViews]):
    """Views for pre-training. Item (epoch, index) depends on nothing but the seed, the epoch, the index and the files.

    All images were readable when the training began. One that is not any more is stood in for by another, drawn from
    (seed, epoch, index), so that a batch stays whole and a resume sees the same; it is reported in ``lost``.

    Args:
        records: What ``index`` counts.
        usable: Indices of the records that may stand in.
        views: How views are drawn.
        seed: Of the run.
        cache: Decoded images.
    Raises: DataError: several images in a row cannot be read.
    """

    _TRIES = 10

    def __init__(
        self, records: Sequence[Record], usable: Sequence[int], views: ViewsConfig, seed: int, cache: PixelCache
    ) -> None:
        self._records, self._usable, self._views, self._seed, self._cache = records, usable, views, seed, cache

    def __getitem__(self, item: tuple[int, int]) -> LoadedViews:
        epoch, index = item
        lost: list[Skipped] = []
        others = np.random.default_rng(np.random.SeedSequence((self._seed, epoch, index, 1)))
        wanted = index
        while True:
            record = self._records[wanted]
            try:
                image = self._cache.grey(record.image)
                break
            except DataError as error:
                lost.append(Skipped(record.name, f"unreadable in epoch {epoch + 1}: {error}"))
            if len(lost) == self._TRIES:
                raise DataError(
                    f"{len(lost)} images in a row cannot be read any more (last: {lost[-1].image}: {lost[-1].reason}); "
                    "is the folder still there?"
                )
            wanted = self._usable[int(others.integers(len(self._usable)))]
        shape: tuple[int, int] = image.pixels.shape
        drawn = draw_views(shape, image.valid, self._views, view_generator(self._seed, epoch, index))
        make = request_views if self._views.executor == "device" else carry_out
        return LoadedViews(make(image, drawn, clean=self._views.clean), tuple(lost))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) in the random order of one epoch; the last incomplete batch is left out.

    The order of the whole batches does not depend on the number of processes: batch k is cut into ``accumulate`` parts,
    each part into one piece for each process, and this sampler gives the pieces of one of them.

    Args:
        indices: Indices of the usable records.
        batch_size: Images a step, over all processes and parts; a multiple of ``processes * accumulate``.
        seed: Of the run. The order depends on (seed, epoch) only.
        process, processes: Which pieces.
        accumulate: Parts of a batch.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        process: int = 0,
        processes: int = 1,
        accumulate: int = 1,
    ) -> None:
        self._indices = np.asarray(indices)
        self._batch_size, self._seed = batch_size, seed
        self._process, self._processes, self._accumulate = process, processes, accumulate
        self.epoch = 0
        self.first = 0  # whole batches of this epoch that are already done (resume)

    def __len__(self) -> int:
        """Whole batches, so optimizer steps, in an epoch."""
        return len(self._indices) // self._batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # 2^32 - 1 sets the stream of the order apart from the streams of the views, whose third number is an index
        order = view_generator(self._seed, self.epoch, 2**32 - 1).permutation(len(self._indices))
        piece = self._batch_size // (self._processes * self._accumulate)
        for batch in range(self.first, len(self)):
            for part in range(self._accumulate):
                start = batch * self._batch_size + (part * self._processes + self._process) * piece
                yield [(self.epoch, int(index)) for index in self._indices[order[start : start + piece]]]


class ImageDataset(Dataset[Tensor]):
    """Whole images (1, size, size) for evaluation: antialiased, padded to a square, nothing random."""

    def __init__(self, records: Sequence[Record], size: int, cache: PixelCache) -> None:
        self._records, self._size, self._cache = records, size, cache

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Tensor:
        return fit_square(self._cache.get(self._records[index].image).image, self._size)
