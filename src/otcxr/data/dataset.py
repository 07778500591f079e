"""From records to pixels: the datasets that training and evaluation read."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from otcxr.data.images import fit_square, load_radiograph
from otcxr.data.records import Collection, ImageRef, Radiograph, Record, Skipped
from otcxr.data.views import MIN_VALID, ViewBatch, ViewsConfig, make_views, view_generator
from otcxr.errors import ConfigError, DataError

__all__ = [
    "DataConfig",
    "EpochBatches",
    "ImageDataset",
    "PixelCache",
    "ViewDataset",
    "check_records",
    "read_pixels",
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
        cache_gb: Memory in GB for decoded images, kept as 16-bit; what does not fit is decoded again.
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
    """Decoded images, 16-bit, up to a limit of memory. 8- and 16-bit sources survive without loss."""

    def __init__(self, limit_gb: float) -> None:
        self._free = int(limit_gb * 1e9)
        self._kept: dict[ImageRef, tuple[NDArray[np.uint16], NDArray[np.bool_] | None, tuple[float, float] | None]] = {}

    def get(self, image: ImageRef) -> Radiograph:
        """Return the pixels of an image, from memory where they are."""
        kept = self._kept.get(image)
        if kept is None:
            radiograph = read_pixels(image)
            pixels = np.round(radiograph.image.numpy() * 65535).astype(np.uint16)
            valid = None if bool(radiograph.valid.all()) else radiograph.valid.numpy()
            kept = (pixels, valid, radiograph.spacing)
            size = pixels.nbytes + (0 if valid is None else valid.nbytes)
            if size <= self._free:
                self._free -= size
                self._kept[image] = kept
        pixels, valid, spacing = kept
        mask = np.ones(pixels.shape, dtype=np.bool_) if valid is None else valid
        # through the cache even when it is full: the numbers must not depend on the memory limit
        image_01 = pixels.astype(np.float32) / np.float32(65535)
        return Radiograph(torch.from_numpy(image_01), torch.from_numpy(mask), spacing)


def check_records(
    collection: Collection, cache: PixelCache, max_skipped: float, progress: Callable[[int], None] | None = None
) -> tuple[list[int], list[Skipped]]:
    """Read every image once, so that a broken file is found before training and not in its middle.

    Args:
        collection: What to read.
        cache: Keeps what fits, so that the reading is not wasted.
        max_skipped: Largest share of missing and broken images.
        progress: Called with the number of images read so far.
    Returns: Indices of the usable records, and everything that is skipped with its reason, the reader's part first.
    Raises: DataError: nothing is usable, or more than ``max_skipped`` is not.
    """

    def read(index: int) -> Skipped | None:
        try:
            valid = cache.get(collection.records[index].image).valid
        except DataError as error:
            return Skipped(collection.records[index].name, str(error))
        share = float(valid.float().mean())
        if share < MIN_VALID:
            why = f"only {share:.1%} of its area is a picture, the rest is padding; at least {MIN_VALID:.0%} is needed"
            return Skipped(collection.records[index].name, why)
        return None

    usable, skipped = [], list(collection.skipped)
    total = len(collection.records)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for index, problem in enumerate(pool.map(read, range(total))):
            if problem is None:
                usable.append(index)
            else:
                skipped.append(problem)
            if progress is not None:
                progress(index + 1)
    named = total + len(collection.skipped)
    if not named:
        raise DataError(f"{collection.name} has no images; check data.source and data.split")
    share = len(skipped) / named
    if share > max_skipped or not usable:
        enough = f"set data.max_skipped to {math.ceil(share * 1000) / 1000:.3f}" if usable else "check data.source"
        raise DataError(
            f"{len(skipped)} of {named} images of {collection.name} cannot be used (first: {skipped[0].image}: "
            f"{skipped[0].reason}); at most {max_skipped:.1%} may be skipped. Mend them, or {enough}"
        )
    return usable, skipped


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write the list of skipped images as CSV (image, reason); an empty list still writes its header."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # a file name may hold bytes that are no text: they are listed in escaped form
    with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "reason"))
        writer.writerows((item.image, item.reason) for item in skipped)
    temporary.replace(path)


class ViewDataset(Dataset[ViewBatch]):
    """Views for pre-training. Item (epoch, index) depends on nothing but the seed, the epoch and the index."""

    def __init__(self, records: Sequence[Record], views: ViewsConfig, seed: int, cache: PixelCache) -> None:
        self._records, self._views, self._seed, self._cache = records, views, seed, cache

    def __getitem__(self, item: tuple[int, int]) -> ViewBatch:
        epoch, index = item
        radiograph = self._cache.get(self._records[index].image)
        return make_views(radiograph, self._views, view_generator(self._seed, epoch, index))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) in the random order of one epoch; the last incomplete batch is left out.

    Args:
        indices: Indices of the usable records.
        batch_size: Images a batch.
        seed: Of the run. The order depends on (seed, epoch) only.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, seed: int) -> None:
        self._indices = np.asarray(indices)
        self._batch_size, self._seed = batch_size, seed
        self.epoch = 0
        self.first = 0  # batches of this epoch that are already done (resume)

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self._indices) // self._batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # 2^32 - 1 sets the stream of the order apart from the streams of the views, whose third number is an index
        order = view_generator(self._seed, self.epoch, 2**32 - 1).permutation(len(self._indices))
        for batch in range(self.first, len(self)):
            chosen = self._indices[order[batch * self._batch_size : (batch + 1) * self._batch_size]]
            yield [(self.epoch, int(index)) for index in chosen]


class ImageDataset(Dataset[Tensor]):
    """Whole images (1, size, size) for evaluation: antialiased, padded to a square, nothing random."""

    def __init__(self, records: Sequence[Record], size: int, cache: PixelCache) -> None:
        self._records, self._size, self._cache = records, size, cache

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Tensor:
        return fit_square(self._cache.get(self._records[index].image).image, self._size)
