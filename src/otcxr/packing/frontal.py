"""Does a picture look like a frontal chest radiograph? A check for flags, not a diagnosis of projections.

    x    ranks of the grey values of the picture at 32 x 32, standardised: any monotone grey scale looks the same
    r    mean square of what is left of x - mean after projection on 10 principal components of frontal radiographs

Flagged where r exceeds the 99th percentile of frontal radiographs of other patients. Mean, components and threshold are
derived from NIH ChestX-ray14 (NIH Clinical Center) by ``benchmarks/fit_frontal.py``, which also measures what it finds.
It has never seen a lateral radiograph: how many of those it flags is not known.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["SIDE", "describe", "residual", "unlike_frontal"]

SIDE = 32


def describe(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """x of the module's text, (1024,)."""
    small = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA).ravel()
    x = np.empty(len(small), dtype=np.float32)
    x[np.argsort(small, kind="stable")] = _standard_ranks()  # whole numbers are sorted by counting
    return x


def residual(x: NDArray[np.float32], mean: NDArray[np.float32], components: NDArray[np.float32]) -> float:
    """r of the module's text."""
    off = x - mean
    left = off - (components @ off) @ components
    return float(np.square(left).mean())


def unlike_frontal(pixels: NDArray[Any]) -> bool:
    """Whether a picture (H, W) is unlike frontal chest radiographs."""
    mean, components, threshold = _model()
    return residual(describe(pixels), mean, components) > threshold


@cache
def _standard_ranks() -> NDArray[np.float32]:
    ranks = np.arange(SIDE * SIDE, dtype=np.float32)
    return np.asarray((ranks - ranks.mean()) / ranks.std(), dtype=np.float32)


@cache
def _model() -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    with resources.files("otcxr.packing").joinpath("frontal.npz").open("rb") as file, np.load(file) as data:
        return data["mean"].astype(np.float32), data["components"].astype(np.float32), float(data["threshold"])
