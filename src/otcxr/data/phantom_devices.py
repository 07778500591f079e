"""What lies on or in a patient and is not anatomy: pacemaker, sternal wires, lines, tubes, electrodes, the side marker.

Whether it is there depends on no disease; the leads of a pacemaker end in the heart, large or not. Attenuation is given
per structure, in total (dimensionless) or per mm.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from otcxr.data.phantom_anatomy import Anatomy, Study, heart_level
from otcxr.data.phantom_geometry import Array
from otcxr.data.phantom_tubes import Tubes

__all__ = ["device_tubes", "generator", "marker"]

_METAL, _PLASTIC, _STRIPE = 0.35, 0.06, 0.10  # attenuation per mm of leads and wires, of lines, of tubes with a stripe
_LEAD = 2.5  # attenuation of a marker's letter


def device_tubes(body: Anatomy, study: Study) -> Tubes:
    """Everything long and thin; the weights are attenuation per mm."""
    tubes = Tubes()
    front = body.depth + 0.4 * body.fat
    knob_v, inner = body.knob[0], body.inner
    heart_x, long, short, _ = body.heart
    heart_v = heart_level(body)
    atrium = (heart_x - 0.56 * long, heart_v - 10.0, 20.0)
    cava = [(-0.5 * inner, knob_v - 12.0, 15.0), (-0.6 * inner, knob_v + 40.0, 18.0)]
    vein = (body.width * 0.62, body.clavicle[0] + 4.0, 0.5 * front)
    if body.pacemaker:
        side = body.pacemaker
        start = (side * 0.66 * body.width, body.apex + 62.0, front)
        way = [start, (side * 0.8 * body.width, body.apex + 38.0, 0.6 * front), (side * vein[0], *vein[1:]), *cava]
        tip = (heart_x + 0.55 * long, heart_v + 0.45 * short, 35.0)
        tubes.path([*way, (atrium[0], atrium[1] + 20.0, 20.0), tip], (1.0, 1.0), _METAL, smooth=6)
        tubes.path([*way, atrium, (atrium[0] - 8.0, atrium[1] - 14.0, 30.0)], (0.9, 0.9), _METAL, smooth=6)
    if body.wires:
        for k in range(5):
            v, r = body.apex + 62.0 + 27.0 * k, 7.0
            turn = [0.3 * k + 2.0 * math.pi * i / 8 for i in range(9)]
            tubes.path([(r * math.cos(t), v + 0.7 * r * math.sin(t), 0.8 * body.depth) for t in turn], (0.6, 0.6),
                       _METAL)  # fmt: skip
    if study.line:
        start = (-0.62 * body.neck, body.apex - 60.0, 10.0)
        tubes.path([start, (-0.5 * body.neck, body.apex + 5.0, 12.0), *cava], (1.2, 1.2), _PLASTIC, smooth=6)
    if study.tube:
        tubes.path([(1.0, body.apex - 80.0, -10.0), (-2.0, knob_v - 40.0, -12.0), (-2.0, knob_v - 8.0, -12.0)],
                   (1.4, 1.4), _STRIPE, smooth=4)  # fmt: skip
    if study.feeding:
        dome = body.domes[1]
        tubes.path([(4.0, body.apex - 80.0, -20.0), (5.0, knob_v + 20.0, -30.0), (9.0, dome - 25.0, -25.0),
                    (30.0, dome + 18.0, 0.0), (0.5 * body.width, dome + 30.0, 20.0)], (1.3, 1.3), _STRIPE,
                   smooth=6)  # fmt: skip
    for k in range(study.leads):
        x = (-1) ** k * body.width * (0.45 + 0.12 * (k // 2))
        v = body.apex + 30.0 + 62.0 * (k // 2) + 9.0 * k
        tubes.path([(x, v, front), (x + 1.0, v, front)], (5.0, 5.0), 0.06)
        bend = (x * 1.25, v + 60.0, front)
        tubes.path([(x, v, front), bend, (math.copysign(0.9 * body.width, x), 230.0, front)], (0.7, 0.7), _METAL,
                   smooth=8)  # fmt: skip
    return tubes


def generator(body: Anatomy, study: Study, size: int) -> Array | None:
    """Attenuation of a pacemaker's can, (size, size); None without one."""
    if not body.pacemaker:
        return None
    x, v, z = body.pacemaker * 0.66 * body.width, body.apex + 62.0, body.depth + 0.4 * body.fat
    turn = np.linspace(0.0, 2.0 * math.pi, 40, endpoint=False, dtype=np.float32)
    cos, sin = np.cos(turn), np.sin(turn)
    round_x, round_v = np.sign(cos) * np.abs(cos) ** 0.55, np.sign(sin) * np.abs(sin) ** 0.55  # a rounded rectangle
    px, py = study.geometry.project(x + 22.0 * round_x, v + 19.0 * round_v, z)
    at = (np.stack((px, py), axis=1) / study.geometry.field + 0.5) * size - 0.5
    paint = np.zeros((size, size), np.float32)
    cv2.fillPoly(paint, [np.round(at * 16).astype(np.int32)], 1.6, lineType=cv2.LINE_8, shift=4)
    return np.asarray(cv2.GaussianBlur(paint, (0, 0), max(0.5, 0.0025 * size)), dtype=np.float32)


def marker(study: Study, size: int) -> Array | None:
    """Attenuation of the lead letter that names the side, (size, size); None where none was laid."""
    if not study.letter:
        return None
    fine = 64  # drawn large once, then turned and reduced
    glyph = np.zeros((fine, fine), np.uint8)
    cv2.putText(glyph, study.letter, (12, 52), cv2.FONT_HERSHEY_DUPLEX, 1.7, (255,), 5, cv2.LINE_AA)
    x, y, height, angle = study.marker
    scale = height * size / 40.0  # a capital is about 40 of the 64 fine pixels high
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    mid = fine / 2 - 0.5
    warp = np.array([[c, -s, x * size - 0.5 - c * mid + s * mid], [s, c, y * size - 0.5 - s * mid - c * mid]])
    soft = cv2.GaussianBlur(glyph.astype(np.float32) / 255.0, (0, 0), max(0.4 / scale, 0.3))
    return np.asarray(_LEAD * cv2.warpAffine(soft, warp, (size, size), flags=cv2.INTER_LINEAR), dtype=np.float32)
