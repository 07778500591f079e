"""Frozen features of an encoder, computed once."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from otcxr.console import Bar, Progress
from otcxr.data.dataset import ImageDataset, PixelCache
from otcxr.data.records import ImageRef, Record
from otcxr.files import write_atomic
from otcxr.nn.encoder import Encoder, encoder_digest, pool

__all__ = ["calibrate_norms", "pooled_features"]


@torch.no_grad()
def pooled_features(
    encoder: Encoder, records: Sequence[Record], size: int, batch_size: int, pixels: PixelCache, cache: Path | None,
    progress: Progress, title: str,
) -> NDArray[np.float32]:  # fmt: skip
    """Pooled features (N, C) of whole images, from ``cache`` if the same encoder has seen the same images before.

    Args:
        encoder: In any mode; it is used, and left, in evaluation mode.
        records: Images, in the order of the rows.
        size: Side to which images are reduced.
        batch_size: Images at a time.
        pixels: Decoded images, shared by all that read them.
        cache: Folder of ``*.npy`` files named by what they depend on; None keeps nothing.
        progress, title: Where to show progress, and under what name.
    """
    encoder.eval()
    path = None
    if cache is not None:
        key = hashlib.sha256(repr((encoder_digest(encoder), size, [_stamp(r.image) for r in records])).encode())
        path = cache / f"{key.hexdigest()[:16]}.npy"
        if path.is_file():
            return np.load(path)  # type: ignore[no-any-return]
    device = next(encoder.parameters()).device
    rows = []
    with progress.bar(title, len(records), "images") as bar:
        for batch in _batches(records, size, batch_size, pixels):
            rows.append(pool(encoder(batch.to(device))).float().cpu().numpy())
            bar(sum(map(len, rows)))
    features = np.concatenate(rows)
    if path is not None:
        buffer = io.BytesIO()
        np.save(buffer, features)
        write_atomic(path, buffer.getvalue())
    return features


@torch.no_grad()
def calibrate_norms(
    encoder: Encoder, records: Sequence[Record], size: int, batch_size: int, pixels: PixelCache, bar: Bar
) -> None:
    """Set the running statistics of BatchNorm to those of the images, without touching a weight.

    A random network whose statistics are still 0 and 1 would be a weaker opponent than it need be.
    """
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average over all batches
    encoder.train()
    device = next(encoder.parameters()).device
    done = 0
    for batch in _batches(records, size, batch_size, pixels):
        encoder(batch.to(device))
        done += len(batch)
        bar(done)
    encoder.eval()


def _batches(records: Sequence[Record], size: int, batch_size: int, pixels: PixelCache) -> DataLoader[torch.Tensor]:
    return DataLoader(ImageDataset(records, size, pixels), batch_size=batch_size)


def _stamp(image: ImageRef) -> tuple[object, ...]:
    """What tells one image from another, also when a file is replaced under its name."""
    if not isinstance(image, Path):
        return (repr(image),)
    facts = image.stat()
    return (str(image.resolve()), facts.st_size, facts.st_mtime_ns)
