"""Is there text in a picture? A screen for names and numbers that were burned in, without reading them.

    bright   pixels above the mean of what surrounds them (square of 1/16 of the short side) by more than 0.25
    signs    connected parts of these, 1 to 7 % of the short side high, not wider than 2 heights, within 30 % of an edge
    line     signs of about the same height whose middles lie on one level, with gaps of at most 3 heights

Flagged where a line has four signs or more: a single "L" or "R" is a marker, which most radiographs have. The tag
BurnedInAnnotation says NO in many files that show a name; this looks at the pixels. It is a screen: bright stitches or
leads can look like writing, and writing of low contrast is missed.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST", "longest_line"]

LEAST = 4  # signs of a line that count as writing
_CONTRAST = 0.25
_HIGH = (0.01, 0.07)  # of the short side


def longest_line(pixels: NDArray[Any]) -> int:
    """How many signs the longest line of text-like parts has, 0 without any; pixels (H, W), uint8 or uint16."""
    grey = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    height, width = grey.shape
    short = min(height, width)
    around = cv2.blur(grey, (max(3, short // 16), max(3, short // 16)))
    bright = cv2.threshold(cv2.subtract(grey, around), 255 * _CONTRAST, 1, cv2.THRESH_BINARY)[1]
    # outlines are found in one pass where little is bright; labelling every pixel takes several times as long
    outlines, _ = cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not outlines:
        return 0
    boxes = np.array([cv2.boundingRect(outline) for outline in outlines])
    x, y, wide, tall = boxes.T
    middle_x, middle_y = x + wide / 2, y + tall / 2
    edge = np.minimum.reduce([middle_x / width, 1 - middle_x / width, middle_y / height, 1 - middle_y / height])
    sign = (tall >= max(4, _HIGH[0] * short)) & (tall <= _HIGH[1] * short) & (wide <= 2 * tall) & (edge < 0.3)
    places = sorted(zip(middle_x[sign].tolist(), middle_y[sign].tolist(), tall[sign].tolist(), strict=True))
    longest = 0
    for k, (left, level, size) in enumerate(places):
        count, at = 1, left
        for x2, y2, size2 in places[k + 1 :]:
            if x2 - at > 3 * size:
                break
            if abs(y2 - level) <= 0.4 * size and 0.65 <= size2 / size <= 1.55:
                count, at = count + 1, x2
        longest = max(longest, count)
    return longest
