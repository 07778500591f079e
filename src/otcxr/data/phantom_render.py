"""Rendering of phantoms: attenuation along every ray, then the detector. Lengths in mm, images (size, size)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

from otcxr.data.phantom_anatomy import (
    FIELD_MM,
    Anatomy,
    Array,
    Study,
    fluid_top,
    heart_depth,
    lung_outline,
    ramp,
    to_body,
    to_image,
)

__all__ = ["attenuation", "axis_mm", "body_grid", "detect"]

SOFT, BONE = 0.0180, 0.0220  # attenuation per mm: soft tissue; what bone adds to it
LUNG = 0.26  # density of lung relative to soft tissue


@lru_cache(maxsize=4)
def axis_mm(size: int) -> Array:
    """Centres of the pixels along one side in mm of the image frame."""
    axis = ((np.arange(size) + 0.5) / size - 0.5) * FIELD_MM
    return axis.astype(np.float32)


def body_grid(study: Study, size: int) -> tuple[Array, Array]:
    axis = axis_mm(size)
    x, v = to_body(study, axis[None, :], axis[:, None])
    return x, v


def _tube(image: Array, axis: Array, a: tuple[float, float], b: tuple[float, float], r: tuple[float, float]) -> None:
    """Raise ``image`` to the path (mm) through a cone from ``a`` to ``b`` with radii ``r``, in its window only.

    A tube thinner than a pixel is drawn one pixel wide and as much fainter, so that no size shows broken lines.
    """
    pitch = float(axis[1] - axis[0])
    wide = max(*r, 0.8 * pitch)
    window = []
    for low, high in ((min(a[1], b[1]), max(a[1], b[1])), (min(a[0], b[0]), max(a[0], b[0]))):
        start = max(int((low - wide - axis[0]) / pitch), 0)
        stop = min(int((high + wide - axis[0]) / pitch) + 2, len(axis))
        if start >= stop:
            return
        window.append(slice(start, stop))
    dy, dx = axis[window[0], None] - a[1], axis[None, window[1]] - a[0]
    ux, uy = b[0] - a[0], b[1] - a[1]
    length2 = max(ux * ux + uy * uy, 1e-6)
    t = np.clip(dx * (ux / length2) + dy * (uy / length2), 0.0, 1.0)
    radius = r[0] + (r[1] - r[0]) * t
    drawn = np.maximum(radius, 0.8 * pitch)
    far = (dx - t * ux) ** 2 + (dy - t * uy) ** 2
    path = 2.0 * np.sqrt(np.maximum(drawn * drawn - far, 0.0)) * (radius / drawn) ** 2
    part = image[window[0], window[1]]
    np.maximum(part, path, out=part)


def _line(image: Array, study: Study, points: Sequence[tuple[float, float]], radius: tuple[float, float]) -> None:
    """A tube through points of the body frame, tapering from the first radius to the second (mm)."""
    axis = axis_mm(len(image))
    ends = np.asarray(points, dtype=np.float32)
    px, py = to_image(study, ends[:, 0], ends[:, 1])
    steps = len(points) - 1
    widths = [study.zoom * (radius[0] + (radius[1] - radius[0]) * k / steps) for k in range(steps + 1)]
    for k in range(steps):
        a, b = (float(px[k]), float(py[k])), (float(px[k + 1]), float(py[k + 1]))
        _tube(image, axis, a, b, (widths[k], widths[k + 1]))


def attenuation(body: Anatomy, study: Study, size: int) -> Array:
    """Sum of mu * path over body, lungs, heart, fluid, nodules and bones, (size, size) float32."""
    x, v = body_grid(study, size)
    far = np.abs(x)
    outer, inner, dome, s = lung_outline(body, x, v)
    # lungs: an elliptic cylinder of air, less mediastinum, heart, aortic arch and what the domes fill
    flat = np.sqrt(np.maximum(1.0 - (x / np.maximum(outer, 1.0)) ** 2, 0.0))
    depth = (2.0 * body.depth) * (1.0 - 0.4 * s * s)
    lungs = depth * flat * ramp((far - inner) / 12.0 + 0.5)
    lungs -= 2.0 * np.sqrt(np.maximum(2.0 * body.dome_radius * (v - dome), 0.0))
    lungs -= 2.6 * np.sqrt(np.maximum(heart_depth(body, x, v), 0.0) * body.heart_depth)
    knob_v, knob_r = body.knob
    arch = knob_r**2 - (x - (0.8 * body.inner)) ** 2 - (v - knob_v) ** 2
    lungs = np.maximum(lungs - 3.0 * np.sqrt(np.maximum(arch, 0.0)), 0.0)
    texture = _texture(body, study, size)
    air = (1.0 - LUNG * texture) * lungs
    vessels = _vessels(body, study, size)
    air -= 1.5 * vessels * ramp(lungs / 60.0)
    for fluid in study.fluids:
        air *= 1.0 - ramp((v - fluid_top(body, fluid, x)) / fluid.blur + 0.5)
    soft = _soft(body, study, x, v) - air
    if study.gas[1]:
        gx, gv, gr = 0.5 * body.width + study.gas[0], body.domes[1] + 1.3 * study.gas[1], study.gas[1]
        bubble = 1.0 - ((x - gx) / (1.4 * gr)) ** 2 - ((v - gv) / gr) ** 2
        soft -= (1.5 * gr) * np.sqrt(np.maximum(bubble, 0.0))
    soft = np.maximum(soft, 0.0)
    for n in study.nodules:
        sphere = np.zeros((size, size), np.float32)
        _tube(sphere, axis_mm(size), (n.x, n.y), (n.x, n.y), (n.radius, n.radius))
        soft += (1.0 - LUNG) * n.density * sphere
    return np.asarray(SOFT * soft + BONE * _bones(body, study, x, v, outer, flat), dtype=np.float32)


def _soft(body: Anatomy, study: Study, x: Array, v: Array) -> Array:
    """Path through the body as if it had no lungs, mm: trunk with shoulders, neck, arms, breasts, less the trachea."""
    far = np.abs(x)
    low = ramp((v - (body.apex - 30.0)) / 190.0)
    half = (body.width + body.wall) + 90.0 * ramp(((body.apex + 92.0) - v) / 70.0)
    shoulder = (body.apex - 50.0 - body.slope * body.neck) + body.slope * far
    edge = (x / half) ** 2
    trunk = (2.0 * body.depth + body.fat) * (0.62 + 0.38 * low)
    trunk = trunk * np.sqrt(np.maximum(1.0 - edge * edge, 0.0) * np.clip((v - shoulder) / 55.0, 0.0, 1.0))
    neck = 2.0 * np.sqrt(np.maximum(body.neck**2 - x * x, 0.0)) * (v < body.apex + 40.0)
    arms = np.zeros_like(x)
    for side in (-1.0, 1.0):
        top, out = body.width + 52.0, body.width + body.wall + 44.0 + study.arm
        _line(arms, study, [(side * top, body.apex + 30.0), (side * out, 240.0)], (46.0, 38.0))
    path = np.maximum(np.maximum(trunk, neck), arms)
    breast_v, breast_r = body.breast
    if breast_r:
        away = (far - 0.56 * body.width) ** 2 + (v - breast_v) ** 2
        path += 0.6 * np.maximum(breast_r**2 - away, 0.0) / breast_r
    wind = np.maximum(1.0 - ((x + 2.0) / 8.5) ** 2, 0.0) * ramp(((body.knob[0] + 25.0) - v) / 20.0)
    path -= 22.0 * np.sqrt(wind) * (path > 40.0)
    return np.asarray(path * (1.0 + (study.tilt / 200.0) * x), dtype=np.float32)


def _bones(body: Anatomy, study: Study, x: Array, v: Array, outer: Array, flat: Array) -> Array:
    """Effective path through bone, mm.

    A rib is half an ellipse seen from the front: with a the half-width of the thorax it leaves the spine at
    v = top + k step, reaches the side ``rib_drop`` lower and comes back in front, lower still:
        k = (v - top - drop (1 -+ sqrt(1 - (x / a)^2))) / step,     - posterior, + anterior;  whole k is a rib's centre.
    """
    far = np.abs(x)
    half_spine, step_spine, bend = body.spine
    centre = bend * np.sin((v + 40.0) / 110.0)
    column = np.sqrt(np.maximum(1.0 - ((x - centre) / half_spine) ** 2, 0.0))
    bone = column * (15.0 + 3.5 * np.cos(v * (2.0 * math.pi / step_spine)))
    side = np.maximum(flat, 0.22)
    steep = body.rib_drop * x / (np.maximum(outer, 20.0) ** 2 * side)
    across = body.rib_step / np.sqrt(1.0 + steep * steep)
    seen = (far < outer + 2.0) & (far > 0.6 * half_spine)
    for sign, weight in ((1.0, 1.0), (-1.0, 0.62)):
        k = (v - (body.apex + 2.0 + body.rib_drop) + (sign * body.rib_drop) * flat) / body.rib_step
        near = np.rint(k)
        gap = ((k - near) * across / body.rib_radius) ** 2
        shell = np.sqrt(np.maximum(1.0 - gap, 0.0)) * (0.55 + 0.45 * gap)
        shell *= seen & (near >= (0 if sign > 0 else 1)) & (near < (body.ribs if sign > 0 else body.ribs - 3))
        shell *= (15.0 * weight * body.rib_bone) / np.maximum(side, 0.4)
        if sign < 0:
            shell *= ramp((far / outer.clip(20.0) - 0.42) / 0.2)
        bone += shell
    long = np.zeros_like(x)
    top, rise, radius = body.clavicle
    for mirror in (-1.0, 1.0):
        ends = ((22.0, top), (60.0, top - 0.2 * rise), (100.0, top - 0.75 * rise), (body.width + 22.0, top - rise))
        _line(long, study, [(mirror * px, pv) for px, pv in ends], (1.25 * radius, radius))
        head, arm = body.width + 50.0, body.width + body.wall + 40.0 + study.arm
        _line(long, study, [(mirror * head, body.apex + 30.0), (mirror * head, body.apex + 31.0)], (15.0, 15.0))
        _line(long, study, [(mirror * (head + 3), body.apex + 40.0), (mirror * arm, 240.0)], (11.0, 10.0))
        blade = (
            (body.width + 30.0, body.apex + 30.0),
            (body.width + 6.0, body.apex + 95.0),
            (body.width - 14.0, body.apex + 150.0),
        )
        _line(long, study, [(mirror * px, pv) for px, pv in blade], (6.0, 3.0))
    return np.asarray(bone + long, dtype=np.float32)


def _texture(body: Anatomy, study: Study, size: int) -> Array:
    """Relative density of lung, about 1: smooth noise fixed to the patient, moved with the pose."""
    rng = np.random.default_rng(np.random.SeedSequence(body.seed, spawn_key=(3,)))
    cells = cv2.resize(rng.standard_normal((9, 9), dtype=np.float32), (72, 72), interpolation=cv2.INTER_CUBIC)
    cells = 1.0 + 0.22 * cells + 0.14 * rng.standard_normal((72, 72), dtype=np.float32)
    c, s = math.cos(study.angle) / study.zoom, math.sin(study.angle) / study.zoom
    k, pitch = 72 / 520.0, FIELD_MM / size  # cells per mm; the lattice spans 520 mm of the body
    ox = pitch / 2 - FIELD_MM / 2 - study.shift[0]
    oy = pitch / 2 - FIELD_MM / 2 - study.shift[1]
    warp = np.array([[c * pitch * k, s * pitch * k, (c * ox + s * oy) * k + 35.5],
                     [-s * pitch * k, c * pitch * k, (c * oy - s * ox) * k + 35.5]])  # fmt: skip
    return np.asarray(
        cv2.warpAffine(cells, warp, (size, size), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
                       borderMode=cv2.BORDER_REFLECT_101), dtype=np.float32,
    )  # fmt: skip


def _vessels(body: Anatomy, study: Study, size: int) -> Array:
    """Path through the vessels of both lungs, mm: trees that leave the hila, fork twice and taper."""
    rng = np.random.default_rng(np.random.SeedSequence(body.seed, spawn_key=(4,)))
    dice = iter(rng.random(400).tolist())
    path = np.zeros((size, size), np.float32)
    hilum_v = body.knob[0] + 38.0
    for side in (-1.0, 1.0):
        base = max(body.domes) if side > 0 else body.domes[0]
        for k in range(7):
            angle = math.radians(-78.0 + 26.0 * k + 18.0 * (next(dice) - 0.5))
            reach = (0.42 + 0.16 * next(dice)) * (base - hilum_v if angle > 0.3 else 0.8 * body.width)
            start = (side * (body.inner + 8.0), hilum_v + 9.0 * (k - 3))
            stack = [(start, angle, reach * 0.55, 4.2 + 1.8 * next(dice), 0)]
            while stack:
                (px, pv), turn, length, radius, level = stack.pop()
                end = (px + side * length * math.cos(turn), pv + length * math.sin(turn))
                _line(path, study, [(px, pv), end], (radius, 0.72 * radius))
                if level < 2:
                    for way in (-1.0, 1.0) if level == 0 else (1.0 if next(dice) < 0.5 else -1.0,):
                        fork = turn + way * (0.16 + 0.34 * next(dice))
                        stack.append((end, fork, length * (0.65 + 0.3 * next(dice)), 0.66 * radius, level + 1))
    return path


def detect(integral: Array, study: Study, noise: float, rng: np.random.Generator) -> Array:
    """From the integral to grey values: primary and scattered counts, blur, noise, logarithm, window."""
    size = len(integral)
    counts = np.exp(-integral)
    wide = cv2.resize(counts * integral, (24, 24), interpolation=cv2.INTER_AREA)
    wide = cv2.GaussianBlur(wide, (0, 0), 2.5)
    counts = counts + 0.3 * study.scatter * cv2.resize(wide, (size, size), interpolation=cv2.INTER_CUBIC)
    counts = np.asarray(cv2.GaussianBlur(counts, (0, 0), 0.35 + 0.2 * size / 256), dtype=np.float32)
    if noise:
        reference = math.exp(-120.0 * SOFT)
        level = noise * size / 256 * math.sqrt(reference / study.exposure)
        grain = rng.standard_normal((size, size), dtype=np.float32)
        counts = np.asarray(counts + level * np.sqrt(counts) * grain, dtype=np.float32)
    dark = -np.log(np.maximum(counts, 1e-4))
    step = max(size // 96, 1)
    low, high = np.percentile(dark[::step, ::step], (2.5, 99.0))
    floor, ceiling, gamma = study.window
    grey = np.clip((dark - low) / max(high - low, 1e-3), 0.0, 1.0) ** gamma
    return np.asarray(floor + (ceiling - floor) * grey, dtype=np.float32)
