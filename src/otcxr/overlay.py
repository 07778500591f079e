"""Heat maps over radiographs as pictures, pixel for pixel.

Colours are matplotlib's inferno (perceptually uniform, safe for colour-blind readers). The radiograph is never covered:
at the strongest evidence 40 % of it shows through, without evidence all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["FOUND", "TRUE", "frames", "from_square", "overlay"]

Picture = NDArray[np.uint8]
TRUE, FOUND = (86, 180, 233), (240, 228, 66)  # sky blue and yellow of Okabe and Ito, RGB
_MOST = 0.6  # weight of the heat map at its strongest


def overlay(image: NDArray[np.floating[Any]], heat: NDArray[np.floating[Any]], top: float) -> Picture:
    """Lay a heat map over a radiograph.

    Args:
        image: (H, W) in [0, 1].
        heat: (H, W) >= 0.
        top: What is shown as the strongest evidence: one for all pictures that are to be compared; 0: no evidence.
    Returns: (H, W, 3) RGB.
    """
    grey = np.repeat(np.clip(image, 0, 1).astype(np.float32)[..., None] * 255, 3, axis=2)
    share = np.clip(heat / top, 0, 1).astype(np.float32) if top > 0 else np.zeros(heat.shape, np.float32)
    levels = np.round(share * 255).astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1].astype(np.float32)
    weight = _MOST * share[..., None]
    return np.asarray(np.round(grey * (1 - weight) + colours * weight), dtype=np.uint8)


def frames(
    picture: Picture,
    boxes: Sequence[tuple[float, float, float, float]],
    colour: tuple[int, int, int],
    *,
    width: int = 1,
) -> Picture:
    """The same with boxes (left, top, right, bottom in pixels, right and bottom just outside) around their pixels."""
    out = picture.copy()
    for left, top, right, bottom in boxes:
        first = (round(left), round(top))
        last = (max(round(right) - 1, first[0]), max(round(bottom) - 1, first[1]))
        cv2.rectangle(out, first, last, colour, width)
    return out


def from_square(heat: NDArray[np.floating[Any]], height: int, width: int) -> NDArray[np.float32]:
    """A map of the padded square (S, S), as ``fit_square`` makes it, on the pixels of the image (height, width)."""
    side = max(height, width)
    whole = cv2.resize(np.asarray(heat, dtype=np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    top, left = (side - height) // 2, (side - width) // 2
    return np.ascontiguousarray(whole[top : top + height, left : left + width])
