"""Rendering of phantoms: attenuation along every ray, then the detector. Lengths in mm, pictures (size, size)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from otcxr.data.phantom_anatomy import (
    DOME_Z,
    Anatomy,
    Ellipsoid,
    Study,
    dome_line,
    ellipsoid,
    heart_parts,
    lung_outline,
    ramp,
)
from otcxr.data.phantom_devices import device_tubes, generator, marker
from otcxr.data.phantom_findings import (
    Disease,
    collapsed_outer,
    edema_share,
    fluid_share,
    patch_share,
    sphere_square,
)
from otcxr.data.phantom_geometry import Array, Geometry, Rays, grid_rays
from otcxr.data.phantom_tubes import Tubes

__all__ = ["attenuation", "detect", "shutter_open"]

SOFT, BONE = 0.0180, 0.0220  # attenuation per mm: soft tissue; what bone adds to it
_SHEATH = 1.7  # an artery has a vein and a bronchus with its wall beside it, on much the same rays
HARDENING = 260.0  # mm of soft tissue behind which bone adds 1 / e of that


def attenuation(body: Anatomy, study: Study, disease: Disease, contrast: float, size: int) -> Array:
    """Sum of mu * path over everything between focus and detector, (size, size) float32.

        integral = mu_soft soft + mu_bone bone exp(-soft / hardening) + metal,   times ray length per z
        soft     = body - air + tissue in the air,   all in mm of z

    Air is the part of every ray within the ribs that neither diaphragm nor heart nor great vessels take. Findings
    replace air (fluid, consolidation, edema, lesions) or take tissue out of it (pneumothorax); ``contrast`` scales
    what they change, as far as there is air or tissue to change.
    """
    geometry = study.geometry
    rays = grid_rays(geometry, size)
    air, flat, outer = _air(body, geometry, rays)
    x, v = rays.at(0.0)
    solid = 1.0 - study.density  # what replaces air adds so much
    tissue = (study.density * air) * _texture(body, geometry, size)
    line, inside = None, np.ones_like(air)  # inside: what a pneumothorax has left of the lung
    for collapse in disease.collapses:
        shrunk = collapsed_outer(body, collapse, x, v)
        flank = np.sign(x) == collapse.side
        chord = np.sqrt(np.maximum(1.0 - (x / np.maximum(shrunk, 1.0)) ** 2, 0.0)) / np.maximum(flat, 0.05)
        left = np.minimum(chord, 1.0)
        denser = np.float32(1.0 + 0.5 * collapse.gap / body.width)
        most = min(contrast, 1.0)  # no less than air
        tissue *= np.where(flank, 1.0 - most * (1.0 - left * denser), 1.0)
        inside = np.where(flank, 1.0 - most * (1.0 - left), 1.0).astype(np.float32)
        width = max(0.9, 0.6 * geometry.field * geometry.near / size)  # the pleura, seen edge on
        away = (np.abs(x) - shrunk) / np.float32(width)
        line = np.where(flank & (shrunk > 8.0), np.exp(-away * away), 0.0) * np.float32(contrast * 4.5 * 0.9 / width)
    share = ramp(air / 60.0)
    swollen = 1.0 + 0.45 * contrast * disease.edema.strength if disease.edema else 1.0
    vessels = _vessels(body, study, disease, size, swollen, min(contrast, 1.0)) * (share * inside)
    tissue += (_SHEATH * solid) * vessels
    free = np.ones_like(air)  # share of the air that no finding replaces
    for fluid in disease.fluids:
        free *= 1.0 - min(contrast, 1.0) * fluid_share(body, fluid, rays)
    for patch in disease.patches:
        free *= 1.0 - inside * np.minimum(contrast * patch_share(patch, rays), 0.97)
    if disease.edema:
        free *= 1.0 - inside * np.minimum(contrast * edema_share(body, disease.edema, rays), 0.97)
    for group in [*((nodule,) for nodule in disease.nodules), *disease.masses]:
        # lobes overlap: the longest path counts, not the sum
        paths = [2.0 * np.sqrt(np.maximum(sphere_square(ball, rays), 0.0)) * ball.density for ball in group]
        tissue += (solid * contrast) * share * np.maximum.reduce(paths)
    if line is not None:
        tissue += line * share
    soft = _soft(body, study, rays) - np.maximum(air - tissue, 0.0) * free - _hollow(body, study, rays)
    bone = _bones(body, study, rays, flat, outer)
    soft = np.maximum(soft, 0.0)
    # the beam hardens in soft tissue: bone behind more of it adds less
    total = SOFT * soft + BONE * bone * np.exp(soft * np.float32(-1.0 / HARDENING))
    metal = device_tubes(body, study).longest(geometry, size)
    if metal is not None:
        total = total + metal
    for paint in (generator(body, study, size), marker(study, size)):
        if paint is not None:
            total = total + paint
    return np.asarray(total * rays.length(), dtype=np.float32)


def _air(body: Anatomy, geometry: Geometry, rays: Rays) -> tuple[Array, Array, Array]:
    """Millimetres of z in the lungs; the lung's cross-section 0 to 1; half-width of the thorax.

    Within the ribs |z| <= depth flat; the dome of the diaphragm cuts a piece out, which leaves lung before and behind
    it; from both pieces the heart and the great vessels take what they share with them.
    """
    x, v = rays.at(0.0)
    outer, inner, _, s = lung_outline(body, x, v)
    flat = np.sqrt(np.maximum(1.0 - (x / np.maximum(outer, 1.0)) ** 2, 0.0))
    half = body.depth * (1.0 - 0.4 * s * s) * flat
    dome_x, dome_v = rays.at(DOME_Z)
    cut = np.sqrt(np.maximum((2.0 * body.dome_radius) * (dome_v - dome_line(body, dome_x)), 0.0))
    front, back = np.clip(DOME_Z + cut, -half, half), np.clip(DOME_Z - cut, -half, half)
    air = (half - front) + (back + half)
    knob_v, knob_r = body.knob
    vessels = (
        ((0.75 * body.inner, knob_v, -8.0), (knob_r, knob_r, 30.0), 0.0),  # arch of the aorta
        ((-0.45 * body.inner, knob_v + 15.0, 22.0), (0.72 * body.inner, 70.0, 16.0), 0.0),  # superior vena cava
        ((0.62 * body.inner, knob_v + 90.0, -38.0), (0.62 * body.inner, 150.0, 14.0), 0.0),  # descending aorta
    )
    for solids in (heart_parts(body), *((vessel,) for vessel in vessels)):
        window = _window(geometry, solids, len(half))
        if window is None:
            continue
        low, high = _hull([ellipsoid(rays.window(*window), *solid) for solid in solids])
        edge, ahead, behind = half[window], front[window], back[window]
        air[window] -= np.maximum(np.minimum(edge, high) - np.maximum(ahead, low), 0.0)
        air[window] -= np.maximum(np.minimum(behind, high) - np.maximum(-edge, low), 0.0)
    # the lungs reach behind the breastbone and before the spine: two borders of the mediastinum, neither of them hard
    away = np.abs(x)
    air = np.maximum(air, 0.0)
    air *= 0.68 * ramp((away - inner) / 13.0 + 0.5) + 0.32 * ramp((away - 0.45 * inner) / 15.0 + 0.5)
    return np.asarray(air, dtype=np.float32), np.asarray(flat, dtype=np.float32), outer


def _window(geometry: Geometry, solids: Sequence[Ellipsoid], size: int) -> tuple[slice, slice] | None:
    """Rows and columns of the picture outside which no ray meets the ellipsoids; None where none does."""
    spots = []
    for (x, v, z), (long, short, deep), _ in solids:
        r = max(long, short) + 0.3 * deep  # slanted rays touch an ellipsoid beside its middle plane
        corners = np.array([(-r, -r), (r, -r), (-r, r), (r, r)], dtype=np.float32)
        spots.append(np.stack(geometry.project(x + corners[:, 0], v + corners[:, 1], z)))
    at = np.concatenate(spots, axis=1) * np.float32(size / geometry.field) + np.float32(size / 2)
    low = np.clip(np.floor(at.min(axis=1)).astype(int) - 1, 0, size)
    high = np.clip(np.ceil(at.max(axis=1)).astype(int) + 1, 0, size)
    if (low >= high).any():
        return None
    return slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0]))


def _hull(solids: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """First and last z of solids that overlap; an empty interval (low > high) where the ray meets none."""
    lows, highs = [], []
    for middle, square in solids:
        hit = square > 0
        half = np.sqrt(np.maximum(square, 0.0))
        lows.append(np.where(hit, middle - half, np.float32(1e3)))
        highs.append(np.where(hit, middle + half, np.float32(-1e3)))
    return np.minimum.reduce(lows), np.maximum.reduce(highs)


def _soft(body: Anatomy, study: Study, rays: Rays) -> Array:
    """Path through the body as if it had no lungs: trunk with shoulders, neck, arms, breasts."""
    x, v = rays.at(0.0)
    far = np.abs(x)
    low = ramp((v - (body.apex - 30.0)) / 190.0)
    half = (body.width + body.wall) + 90.0 * ramp(((body.apex + 92.0) - v) / 70.0)
    shoulder = (body.apex - 50.0 - body.slope * body.neck) + body.slope * far
    edge = (x / half) ** 2
    trunk = (2.0 * body.depth + body.fat) * (0.62 + 0.38 * low)
    trunk = trunk * np.sqrt(np.maximum(1.0 - edge * edge, 0.0) * np.clip((v - shoulder) / 55.0, 0.0, 1.0))
    neck = 2.0 * np.sqrt(np.maximum(body.neck**2 - x * x, 0.0)) * (v < body.apex + 40.0)
    path = np.maximum(trunk, neck)
    for side in (-1.0, 1.0):  # a cone from the shoulder downwards
        top, bottom = side * (body.width + 52.0), side * (body.width + body.wall + 44.0 + study.arm)
        t = np.clip((v - (body.apex + 30.0)) / (210.0 - body.apex), 0.0, 1.0)
        away = (x - (top + (bottom - top) * t)) ** 2 + np.minimum(v - (body.apex + 30.0), 0.0) ** 2
        path = np.maximum(path, 2.0 * np.sqrt(np.maximum((46.0 - 8.0 * t) ** 2 - away, 0.0)))
    breast_v, breast_r = body.breast
    if breast_r:
        bx, bv = rays.at(0.85 * body.depth)
        away = (np.abs(bx) - 0.56 * body.width) ** 2 + (bv - breast_v) ** 2
        path = path + 0.6 * np.maximum(breast_r**2 - away, 0.0) / breast_r
    return np.asarray(path * (1.0 + (study.tilt / 200.0) * x), dtype=np.float32)


def _hollow(body: Anatomy, study: Study, rays: Rays) -> Array:
    """Air outside the lungs: trachea, main bronchi, stomach bubble."""
    x, v = rays.at(-12.0)
    knob_v = body.knob[0]
    carina = knob_v + 26.0
    wind = np.maximum(1.0 - ((x + 2.0) / 8.5) ** 2, 0.0) * ramp((carina - v) / 14.0)
    path = 15.0 * np.sqrt(wind)
    for side, steep in ((-1.0, 0.95), (1.0, 0.62)):  # the right one falls more steeply
        along = side * (x + 2.0)
        off = (v - carina + 6.0 - steep * along) / math.hypot(1.0, steep)
        tube = np.maximum(1.0 - (off / 6.0) ** 2, 0.0) * ((along > 0) & (along < 0.9 * body.inner + 6.0))
        path = np.maximum(path, 11.0 * np.sqrt(tube))
    if study.gas[1]:
        gas_x, gas_v = rays.at(30.0)
        r = study.gas[1]
        dx = (gas_x - (0.5 * body.width + study.gas[0])) / (1.4 * r)
        dv = (gas_v - (body.domes[1] + 1.25 * r)) / r
        path = path + (1.5 * r) * np.sqrt(np.maximum(1.0 - dx * dx - dv * dv, 0.0))
    return np.asarray(path, dtype=np.float32)


def _bones(body: Anatomy, study: Study, rays: Rays, flat: Array, outer: Array) -> Array:
    """Effective path through bone.

    A rib lies on the front or back of the thorax, z = -+ depth sqrt(1 - u^2) with u = x / half-width. It leaves the
    spine at v = top + k step, reaches the side ``rib_drop`` lower and comes back in front, lower still; whole k is a
    rib's centre:
        k = (v - top - drop (1 -+ arc)) / step,   arc = 0.55 sqrt(1 - u^2) + 0.45 (1 - u^2),   - posterior, + anterior
    The lowest two fade out: short ribs, deep in the body.
    """
    bone = np.zeros_like(flat)
    near_spine = _columns(rays.x0, 60.0)
    bone[:, near_spine] = _spine(body, rays.window(slice(None), near_spine))
    half_spine = body.spine[0]
    half = body.depth * flat * 0.92
    for sign, weight in ((1.0, 1.0), (-1.0, 0.45)):
        x, v = rays.at(-sign * half)
        far = np.abs(x)
        curve = np.sqrt(np.maximum(1.0 - (x / np.maximum(outer, 1.0)) ** 2, 0.0))
        side = np.maximum(curve, 0.22)
        steep = body.rib_drop * x / np.maximum(outer, 20.0) ** 2 * (0.55 / side + 0.9)
        across = body.rib_step / np.sqrt(1.0 + steep * steep)
        arc = 0.55 * curve + 0.45 * (1.0 - (x / np.maximum(outer, 20.0)) ** 2)
        k = (v - (body.apex + 2.0 + body.rib_drop) + (sign * body.rib_drop) * arc) / body.rib_step
        near = np.rint(k)
        gap = ((k - near) * across / body.rib_radius) ** 2
        # a shell of compact bone, the marrow within four fifths of the radius counts a third
        shell = np.sqrt(np.maximum(1.0 - gap, 0.0)) - 0.53 * np.sqrt(np.maximum(1.0 - gap * 1.56, 0.0))
        shell *= (far < outer + 2.0) & (far > 0.6 * half_spine)
        last = body.ribs if sign > 0 else body.ribs - 4
        shell *= (near >= (0 if sign > 0 else 1)) * np.clip((last - near) / 2.5, 0.0, 1.0)
        shell *= (17.0 * weight * body.rib_bone) / np.maximum(side, 0.4)
        if sign < 0:
            shell *= ramp((far / outer.clip(20.0) - 0.42) / 0.2)  # cartilage near the breastbone is not seen
        bone += shell
    long = _limb_bones(body, study).longest(study.geometry, len(bone))
    if long is not None:
        bone += long
    bone += _blades(body, study, len(bone))
    return np.asarray(bone, dtype=np.float32)


def _columns(x: Array, reach: float) -> slice:
    """Columns of the picture of which some pixel lies within ``reach`` mm of the midline."""
    there = np.nonzero((np.abs(x) < reach).any(axis=0))[0]
    return slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, 0)


def _spine(body: Anatomy, rays: Rays) -> Array:
    """Effective path through vertebrae with pedicles and processes; nothing further than 50 mm from the midline."""
    x, v = rays.at(-0.72 * body.depth)
    half_spine, step_spine, bend = body.spine
    off = x - bend * np.sin((v + 40.0) / 110.0)
    level = v / step_spine
    phase = level - np.rint(level)  # 0 in the middle of a vertebra
    disc = ramp((np.abs(phase) - 0.34) / 0.1)
    column = np.sqrt(np.maximum(1.0 - (off / half_spine) ** 2, 0.0))
    bone = column * (17.0 - 7.0 * disc)
    pedicle = ((np.abs(off) - 0.58 * half_spine) / 4.2) ** 2 + ((phase + 0.12) * step_spine / 5.5) ** 2
    bone += 7.0 * np.maximum(1.0 - pedicle, 0.0)
    spinous = (off / 3.5) ** 2 + ((phase - 0.25) * step_spine / 6.0) ** 2
    bone += 6.0 * np.maximum(1.0 - spinous, 0.0)
    process = ((phase + 0.1) * step_spine + 0.12 * np.abs(off)) / 5.0
    bone += 6.0 * np.maximum(1.0 - process * process, 0.0) * ramp((36.0 - np.abs(off)) / 6.0) * (1.0 - column)
    return np.asarray(bone, dtype=np.float32)


def _limb_bones(body: Anatomy, study: Study) -> Tubes:
    """Clavicles, humeri and the borders of the scapulae."""
    tubes = Tubes()
    top, rise, radius = body.clavicle
    front, back = 0.62 * body.depth, -0.75 * body.depth
    for m in (-1.0, 1.0):
        ends = ((20.0, top), (52.0, top + 0.06 * rise), (92.0, top - 0.55 * rise), (body.width + 20.0, top - rise))
        depths = (front, front, 0.6 * front, 0.1 * front)
        tubes.path(
            [(m * x, v, z) for (x, v), z in zip(ends, depths, strict=True)], (1.3 * radius, radius), 1.7, smooth=4
        )
        head, arm = body.width + 50.0, body.width + body.wall + 40.0 + study.arm
        tubes.path([(m * head, body.apex + 30.0, 0.0), (m * head, body.apex + 31.0, 0.0)], (19.0, 19.0), 0.7)
        tubes.path([(m * (head + 5), body.apex + 40.0, 0.0), (m * arm, 240.0, 0.0)], (11.0, 10.0), 0.7)
        corner, tip, glenoid, root = _blade(body, study, m)
        tubes.path([(*glenoid, back), (*tip, back)], (5.0, 3.2), 1.3)
        tubes.path([(*corner, back), (*root, back), (*tip, back)], (2.0, 2.6), 1.4, smooth=3)
        tubes.path([(*root, back), (m * (body.width + 40.0), body.apex + 14.0, -0.3 * body.depth)], (2.5, 5.5), 1.3)
    return tubes


def _blade(body: Anatomy, study: Study, side: float) -> tuple[tuple[float, float], ...]:
    """Upper inner corner, lower tip, joint and root of the spine of a scapula, (x, v) each.

    PA the arms roll the blades off the lungs; AP they lie over them.
    """
    inwards = body.scapula - (24.0 if study.view == "AP" else 0.0)
    edge = body.width + inwards
    return (
        (side * (edge - 24.0), body.apex + 22.0), (side * (edge - 8.0), body.apex + 138.0),
        (side * (body.width + 34.0), body.apex + 38.0), (side * (edge - 28.0), body.apex + 48.0),
    )  # fmt: skip


def _blades(body: Anatomy, study: Study, size: int) -> Array:
    """The thin plates of the scapulae, 4.5 mm of bone as the ribs count it."""
    paint = np.zeros((size, size), np.float32)
    back = -0.75 * body.depth
    for side in (-1.0, 1.0):
        corner, tip, glenoid, root = _blade(body, study, side)
        xs, vs = (np.array(part, dtype=np.float32) for part in zip(corner, glenoid, tip, root, strict=True))
        px, py = study.geometry.project(xs, vs, np.full(4, back, np.float32))
        at = (np.stack((px, py), axis=1) / study.geometry.field + 0.5) * size - 0.5
        cv2.fillConvexPoly(paint, cv2.convexHull(np.round(at * 16).astype(np.int32)), 4.5, lineType=cv2.LINE_8, shift=4)
    return np.asarray(cv2.GaussianBlur(paint, (0, 0), max(0.6, 0.006 * size)), dtype=np.float32)


def _texture(body: Anatomy, geometry: Geometry, size: int) -> Array:
    """Relative density of lung, about 1: smooth noise fixed to the patient, moved with the pose."""
    rng = np.random.default_rng(np.random.SeedSequence(body.seed, spawn_key=(3,)))
    cells = cv2.resize(rng.standard_normal((9, 9), dtype=np.float32), (72, 72), interpolation=cv2.INTER_CUBIC)
    cells = 1.0 + 0.11 * cells + 0.05 * rng.standard_normal((72, 72), dtype=np.float32)
    warp = geometry.plane_map(size) * (72 / 520.0)  # cells per mm; the lattice spans 520 mm of the body
    warp[:, 2] += 35.5
    return np.asarray(
        cv2.warpAffine(cells, warp, (size, size), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
                       borderMode=cv2.BORDER_REFLECT_101), dtype=np.float32,
    )  # fmt: skip


def _vessels(
    body: Anatomy, study: Study, disease: Disease, size: int, swollen: float, collapsed: float
) -> Array:  # fmt: skip
    """Path through the vessels of both lungs: trees that leave the hila, fork three times and taper.

    They are straight from fork to fork and lie in the depth of the lung; a lung that has shrunk draws them inwards.
    """
    rng = np.random.default_rng(np.random.SeedSequence(body.seed, spawn_key=(4,)))
    dice = iter(rng.random(1200).tolist())
    tubes = Tubes()
    hilum_v = body.knob[0] + 44.0
    thick = body.vessels * swollen
    for side in (-1.0, 1.0):
        base = max(body.domes) if side > 0 else body.domes[0]
        pull = 1.0
        for collapse in disease.collapses:
            if collapse.side == side:
                pull = 1.0 - collapsed * collapse.gap / body.width
        origin = side * (1.25 * body.inner + 9.0)
        tubes.path(
            [(0.5 * origin, hilum_v - 10.0, 0.0), (origin + 8 * side, hilum_v + 4.0, 0.0)], (14.0 * thick, 11.5 * thick)
        )
        tubes.path([(origin, hilum_v, 0.0), (origin + 14 * side, hilum_v + 50.0, -8.0)], (11.5 * thick, 6.0 * thick))
        for k in range(9):
            angle = math.radians(-80.0 + 20.5 * k + 15.0 * (next(dice) - 0.5))
            full = (base - hilum_v if angle > 0.5 else 0.72 * body.width) if angle > -0.5 else hilum_v - body.apex
            length = pull * full * (0.34 + 0.10 * next(dice))
            depth = 70.0 * (next(dice) - 0.5)
            stack = [
                ((origin, hilum_v + 5.5 * (k - 4), 0.0), angle, length, thick * (6.4 + 2.6 * next(dice)), depth, 0)
            ]
            while stack:
                (px, pv, pz), turn, length, radius, depth, level = stack.pop()
                end = (px + side * length * math.cos(turn), pv + length * math.sin(turn), pz + depth * 0.4)
                tubes.path([(px, pv, pz), end], (radius, 0.74 * radius))
                if level < 3:
                    for way in (-1.0, 1.0):
                        fork = turn + way * (0.14 + 0.34 * next(dice))
                        small = radius * (0.78 if next(dice) < 0.5 else 0.62)
                        stack.append((end, fork, length * (0.55 + 0.35 * next(dice)), small,
                                      depth + 40.0 * (next(dice) - 0.5), level + 1))  # fmt: skip
    path = tubes.longest(study.geometry, size)
    assert path is not None
    return path


def shutter_open(study: Study, size: int) -> NDArray[np.bool_]:
    """Where the collimator let X-rays through, (size, size)."""
    left, top, right, bottom, angle = study.shutter
    axis = (np.arange(size) + 0.5) / size
    x, y = axis[None, :], axis[:, None]
    u, w = x + angle * (y - 0.5), y - angle * (x - 0.5)
    return np.asarray((u > left) & (u < right) & (w > top) & (w < bottom), dtype=np.bool_)


def detect(integral: Array, study: Study, noise: float, rng: np.random.Generator) -> Array:
    """From the integral to grey values: primary and scattered counts, noise, blur, logarithm, window, shutter."""
    size = len(integral)
    pixel = study.geometry.field / size
    counts = np.exp(-integral)
    wide = cv2.resize(counts * integral, (24, 24), interpolation=cv2.INTER_AREA)
    wide = cv2.GaussianBlur(wide, (0, 0), 2.5)
    counts = counts + (0.3 * study.scatter) * cv2.resize(wide, (size, size), interpolation=cv2.INTER_LINEAR)
    if noise:
        reference = math.exp(-120.0 * SOFT)
        level = np.float32(noise * (400.0 / 256) / pixel * math.sqrt(reference / study.exposure))
        counts += level * np.sqrt(counts) * rng.standard_normal((size, size), dtype=np.float32)
    blur = math.hypot(0.45, study.blur / pixel)  # 0.45 pixel stands for the area of a pixel
    counts = np.asarray(cv2.GaussianBlur(counts, (0, 0), blur), dtype=np.float32)
    dark = np.asarray(-np.log(np.maximum(counts, 1e-4)), dtype=np.float32)
    if study.sharpen:
        side = max(size // 4, 8)
        coarse = cv2.resize(dark, (side, side), interpolation=cv2.INTER_AREA)
        coarse = cv2.GaussianBlur(coarse, (0, 0), 0.05 * side)
        coarse = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)
        dark = dark + np.float32(study.sharpen) * (dark - coarse)
    lit = shutter_open(study, size)
    step = max(size // 96, 1)
    low, high = np.percentile(dark[::step, ::step][lit[::step, ::step]], (2.5, 99.0))
    floor, ceiling, gamma = study.window
    grey = np.clip((dark - np.float32(low)) / np.float32(max(high - low, 1e-3)), 0.0, 1.0) ** np.float32(gamma)
    return np.where(lit, np.float32(floor) + np.float32(ceiling - floor) * grey, np.float32(0)).astype(np.float32)
