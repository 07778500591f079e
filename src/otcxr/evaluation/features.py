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
from otcxr.data.dataset import ImageDataset
from otcxr.data.records import Record
from otcxr.nn.encoder import Encoder, pool
from otcxr.runs import write_atomic

__all__ = ["calibrate_norms", "encoder_digest", "pooled_features"]


def encoder_digest(encoder: Encoder) -> str:
    """First 16 hexadecimal digits of the SHA-256 of all weights and statistics."""
    total = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


@torch.no_grad()
def pooled_features(
    encoder: Encoder, records: Sequence[Record], size: int, batch_size: int, cache: Path | None, progress: Progress,
    title: str,
) -> NDArray[np.float32]:  # fmt: skip
    """Pooled features (N, C) of whole images, from ``cache`` if the same encoder has seen the same images before.

    Args:
        encoder: In any mode; it is used, and left, in evaluation mode.
        records: Images, in the order of the rows.
        size: Side to which images are reduced.
        batch_size: Images at a time.
        cache: Folder of ``*.npy`` files named by what they depend on; None keeps nothing.
        progress, title: Where to show progress, and under what name.
    """
    encoder.eval()
    path = None
    if cache is not None:
        key = hashlib.sha256(repr((encoder_digest(encoder), size, [str(r.image) for r in records])).encode())
        path = cache / f"{key.hexdigest()[:16]}.npy"
        if path.is_file():
            return np.load(path)  # type: ignore[no-any-return]
    device = next(encoder.parameters()).device
    rows = []
    with progress.bar(title, len(records), "images") as bar:
        for batch in _batches(records, size, batch_size):
            rows.append(pool(encoder(batch.to(device))).float().cpu().numpy())
            bar(sum(map(len, rows)))
    features = np.concatenate(rows)
    if path is not None:
        buffer = io.BytesIO()
        np.save(buffer, features)
        write_atomic(path, buffer.getvalue())
    return features


@torch.no_grad()
def calibrate_norms(encoder: Encoder, records: Sequence[Record], size: int, batch_size: int, bar: Bar) -> None:
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
    for batch in _batches(records, size, batch_size):
        encoder(batch.to(device))
        done += len(batch)
        bar(done)
    encoder.eval()


def _batches(records: Sequence[Record], size: int, batch_size: int) -> DataLoader[torch.Tensor]:
    return DataLoader(ImageDataset(records, size), batch_size=batch_size)
