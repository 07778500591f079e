"""Measures of where: regions against regions, heat maps against regions. Pure functions of one image.

A region is a mask (H, W) of booleans. Pixels are joined over edges and corners (8 neighbours). What is undefined is
NaN, never a flattering 1: whether an empty region is *found* empty is a question of detection, and asked apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from otcxr.errors import DataError

__all__ = [
    "Frame",
    "box_overlap",
    "dice",
    "energy_inside",
    "hausdorff_95",
    "iou",
    "otsu_threshold",
    "peak_box",
    "pointing",
    "region_boxes",
    "scaled",
]

Mask = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

_EIGHT = np.ones((3, 3), dtype=bool)
_LEVELS = 256  # of grey, for Otsu's histogram


class Frame(NamedTuple):
    """An upright box in pixels; left and top inside, right and bottom just outside, so the area is w x h."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)

    def common(self, other: Frame) -> float:
        """Area that both cover."""
        return Frame(max(self.left, other.left), max(self.top, other.top), min(self.right, other.right),
                     min(self.bottom, other.bottom)).area  # fmt: skip


def dice(found: Mask, truth: Mask) -> float:
    """2 |A and B| / (|A| + |B|); NaN where both are empty.

    Raises: DataError: shapes differ.
    Source: Dice, Ecology 26, 1945.
    """
    total = int(_checked(found, truth).sum()) + int(truth.sum())
    return 2.0 * int((found & truth).sum()) / total if total else math.nan


def iou(found: Mask, truth: Mask) -> float:
    """|A and B| / |A or B|, the Jaccard index; NaN where both are empty.

    Raises: DataError: shapes differ.
    """
    union = int((_checked(found, truth) | truth).sum())
    return int((found & truth).sum()) / union if union else math.nan


def hausdorff_95(found: Mask, truth: Mask, spacing: tuple[float, float] = (1.0, 1.0)) -> float:
    """95th percentile of the distances between the two borders, the larger of both directions.

        max(q95 over a in border(A) of d(a, border(B)), q95 over b in border(B) of d(b, border(A)))

    Border pixels are those of the region with a neighbour over an edge outside it; the edge of the image counts as
    outside. Distances go from centre to centre.

    Args:
        found, truth: (H, W).
        spacing: Of rows and columns; the result has its unit.
    Returns: >= 0. NaN where the truth is empty; where only ``found`` is, the diagonal of the image: a lesion that was
        not found at all is no better than one that was found at the far corner.
    Raises: DataError: shapes differ.
    Source: Huttenlocher et al., IEEE PAMI 15, 1993; Taha and Hanbury, BMC Medical Imaging 15:29, 2015 (percentile).
    """
    _checked(found, truth)
    if not truth.any():
        return math.nan
    if not found.any():
        return math.hypot(truth.shape[0] * spacing[0], truth.shape[1] * spacing[1])
    borders = [_border(mask) for mask in (found, truth)]
    # no distance is asked for outside the rectangle around both regions
    inside = ndimage.find_objects((found | truth).astype(np.uint8))[0]
    borders = [border[inside] for border in borders]
    away = [ndimage.distance_transform_edt(~border, sampling=spacing) for border in borders]
    return float(max(np.percentile(away[1][borders[0]], 95), np.percentile(away[0][borders[1]], 95)))


def pointing(heat: NDArray[np.floating], truth: Mask) -> float:
    """Whether the strongest place of a heat map lies in the region: the pointing game, without tolerance.

    Args:
        heat: (H, W), finite and >= 0; all 0 means no evidence.
        truth: (H, W).
    Returns: 1, 0, or the share of the strongest places that lie inside, where several are equally strong; 0 for a map
        without evidence; NaN where the region is empty.
    Raises: DataError: shapes differ, or values that are negative or not finite.
    Source: Zhang et al., IJCV 126, 2018 (there with a tolerance of 15 pixels).
    """
    values = _checked_heat(heat, truth)
    if not truth.any():
        return math.nan
    most = values.max()
    return float(truth[values == most].mean()) if most > 0 else 0.0


def energy_inside(heat: NDArray[np.floating], truth: Mask) -> float:
    """Share of a heat map's sum that lies in the region; 0 for a map without evidence, NaN where the region is empty.

    By chance (a flat map) it is the region's share of the image. Arguments and errors as :func:`pointing`.
    Source: Wang et al., CVPR Workshops 2020, arXiv:1910.01279 (energy-based pointing game).
    """
    values = _checked_heat(heat, truth)
    if not truth.any():
        return math.nan
    total = values.sum()
    return float(values[truth].sum() / total) if total > 0 else 0.0


def scaled(heat: NDArray[np.floating]) -> FloatArray:
    """A heat map brought to [0, 1] by its own least and largest value; 0 everywhere where they are equal."""
    values = np.asarray(heat, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def otsu_threshold(values: NDArray[np.floating]) -> float:
    """The threshold that parts values in [0, 1] best into two groups, without looking at any truth.

        max over t of  n_low(t) n_high(t) (mean_high(t) - mean_low(t))^2

    over a histogram of 256 levels; ``values > threshold`` is the upper group.

    Source: Otsu, IEEE Trans. SMC 9, 1979; used so by Saporta et al., Nature Machine Intelligence 4, 2022.
    """
    level = np.minimum((np.asarray(values, dtype=np.float64) * _LEVELS).astype(np.intp), _LEVELS - 1)
    count = np.bincount(level.ravel(), minlength=_LEVELS).astype(np.float64)
    below, total = np.cumsum(count), count.sum()
    sums = np.cumsum(count * np.arange(_LEVELS))
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * ((sums[-1] - sums) / above - sums / below) ** 2
    best = int(np.argmax(np.nan_to_num(between, nan=-1.0)))
    return float(np.nextafter((best + 1) / _LEVELS, 0))  # levels up to ``best`` are below


def region_boxes(mask: Mask) -> list[Frame]:
    """The upright box of every joined part of a region, from the top left."""
    labelled, _ = ndimage.label(mask, structure=_EIGHT)
    return [Frame(s[1].start, s[0].start, s[1].stop, s[0].stop) for s in ndimage.find_objects(labelled)]


def peak_box(heat: NDArray[np.floating], threshold: float) -> Frame | None:
    """The box of the joined part above a threshold that holds the strongest place; None where nothing is above.

    Args:
        heat: (H, W).
        threshold: In the unit of the heat map; what lies above it is called.
    """
    mask = np.asarray(heat) > threshold
    if not mask.any():
        return None
    labelled, _ = ndimage.label(mask, structure=_EIGHT)
    own = labelled[np.unravel_index(int(np.argmax(heat)), labelled.shape)]
    part = ndimage.find_objects(labelled)[own - 1]
    return Frame(part[1].start, part[0].start, part[1].stop, part[0].stop)


def box_overlap(found: Frame | None, truth: list[Frame]) -> tuple[float, float]:
    """How well a box meets the true one that it meets best.

        IoU  = |A and B| / |A or B|,   IoBB = |A and B| / |A|      A the box that was found

    Returns: The best IoU and the best IoBB over the true boxes, 0 where nothing was found; NaN where there is no truth.
        IoBB forgives a box that is too small: beside it belongs the IoU.
    Source: Wang et al., CVPR 2017, arXiv:1705.02315 (IoBB).
    """
    if not truth:
        return math.nan, math.nan
    if found is None or found.area == 0:
        return 0.0, 0.0
    common = [found.common(other) for other in truth]
    return (
        max(c / (found.area + other.area - c) for c, other in zip(common, truth, strict=True)),
        max(c / found.area for c in common),
    )


def _checked(found: Mask, truth: Mask) -> Mask:
    if found.shape != truth.shape or found.ndim != 2:
        raise DataError(f"regions must have one shape (H, W), received {found.shape} and {truth.shape}")
    return found


def _checked_heat(heat: NDArray[np.floating], truth: Mask) -> FloatArray:
    values = np.asarray(heat, dtype=np.float64)
    if values.shape != truth.shape or values.ndim != 2:
        raise DataError(f"heat map and region must have one shape (H, W), received {values.shape} and {truth.shape}")
    if not np.isfinite(values).all() or values.min() < 0:
        raise DataError("a heat map must be finite and >= 0; take what speaks for the finding, max(0, evidence)")
    return values


def _border(mask: Mask) -> Mask:
    inner: Mask = ndimage.binary_erosion(mask, border_value=0)
    return mask & ~inner
