"""Anatomy, pose and findings of a phantom: what `otcxr.data.phantom` renders, as numbers and outlines.

Two frames, both in millimetres. Body frame: x to the right of the picture (the patient's left), v downwards, origin in
mid-chest. Image frame: the same axes, origin in the middle of the detector; `to_image` and `to_body` go between them.
Outlines are closed formulas of a point, so a mask, a box and the rendered pixels come from one definition.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FIELD_MM", "Anatomy", "Array", "Fluid", "Nodule", "Study", "chest", "draw_anatomy", "draw_study", "fluid_extent",
    "fluid_top", "heart_depth", "lung_field", "lung_outline", "ramp", "to_body", "to_image",
]  # fmt: skip

Array: TypeAlias = NDArray[np.float32]
FIELD_MM = 400.0  # width and height of the detector
_LATTICE_X = np.linspace(0.0, 0.999, 48, dtype=np.float32)[None, :]
_LATTICE_V = np.linspace(0.0, 1.0, 32, dtype=np.float32)[:, None]


class Anatomy(NamedTuple):
    """One chest; lengths in mm of the body frame. The same in all studies of a patient."""

    width: float  # half-width of the thorax: midline to the outer edge of a lung
    lean: float  # relative difference of the two half-widths
    apex: float  # v of the lung tops
    belly: float  # v below which the lungs grow no wider
    taper: float  # shape of the shoulders of the lungs, 0 round to 1 square
    depth: float  # largest half-depth of the lungs, front to back
    wall: float  # soft tissue beside the ribs
    fat: float  # soft tissue before and behind the lungs, together
    neck: float  # half-width of the neck
    slope: float  # fall of the shoulder line, mm per mm
    domes: tuple[float, float]  # v of the tops of the diaphragm, picture left and right
    dome_fall: float  # drop from the top of a dome to the costophrenic angle
    dome_radius: float  # curvature of the domes, front to back
    inner: float  # half-width of the upper mediastinum
    heart: tuple[float, float, float, float]  # x of the centre, long and short semi-axis, tilt (radians)
    heart_depth: float  # half-depth of the heart
    knob: tuple[float, float]  # v and radius of the aortic arch
    ribs: int  # pairs of ribs
    rib_step: float  # distance between two ribs
    rib_drop: float  # how far a rib falls from the spine to the side
    rib_radius: float  # half the height of a rib
    rib_bone: float  # relative amount of bone
    spine: tuple[float, float, float]  # half-width, height of a vertebra, sideways curvature
    clavicle: tuple[float, float, float]  # v of the inner end, rise to the outer end, radius
    breast: tuple[float, float]  # v of the centre and radius; radius 0 for none
    seed: tuple[int, int]  # of vessels and texture


class Nodule(NamedTuple):
    """A sphere: centre and radius in mm of the image frame; density relative to soft tissue."""

    x: float
    y: float
    radius: float
    density: float


class Fluid(NamedTuple):
    """Pleural fluid of one side; lengths in mm of the body frame."""

    side: int  # -1 picture left, +1 picture right
    top: float  # v of the surface at the side
    fall: float  # how much lower the surface lies at the midline
    blur: float  # depth over which the fluid thins out at its surface
    medial: float = 0.0  # distance from the midline at which the surface goes under the dome, for good


class Study(NamedTuple):
    """One visit: pose, breathing, exposure and findings."""

    view: str
    shift: tuple[float, float]  # mm in the image frame
    angle: float  # radians
    zoom: float  # magnification, with the zoom of the collimator
    lift: tuple[float, float]  # how far each dome stands above full inspiration, mm
    heart_zoom: float  # magnification of the heart in its own plane
    arm: float  # distance of the upper arms from the chest, mm
    gas: tuple[float, float]  # offset and radius of the stomach bubble; radius 0 for none
    tilt: float  # change of thickness over the field, relative
    scatter: float  # scattered to primary counts
    exposure: float  # relative counts
    window: tuple[float, float, float]  # grey of the darkest and brightest percentile, gamma
    nodules: tuple[Nodule, ...]
    fluids: tuple[Fluid, ...]


class _Dice:
    """Uniform draws from one block of random numbers, the fast way to draw many named scalars."""

    def __init__(self, rng: np.random.Generator, count: int = 64) -> None:
        self._values = iter(rng.random(count).tolist())

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        value: float = next(self._values)
        return low + (high - low) * value

    def bell(self, low: float, high: float) -> float:
        """A draw that is rare at the ends: (low + high) / 2 +- half the span times |t| (0.45 + 0.55 t^2)."""
        t: float = 2.0 * next(self._values) - 1.0
        return low + (high - low) * (0.5 + t * (0.225 + 0.275 * t * t))


@lru_cache(maxsize=256)
def draw_anatomy(seed: int, patient: int, sex: str) -> Anatomy:
    """Draw the chest of a patient from ``SeedSequence([seed, patient])``."""
    u = _Dice(np.random.default_rng(np.random.SeedSequence([seed, patient])))
    s = u.bell(0.90, 1.08) * (1.0 if sex == "M" else 0.95)
    apex, right = s * u.bell(-158, -128), s * u.bell(80, 112)
    top = apex + s * u(22, 36)
    return Anatomy(
        width=s * u.bell(122, 150), lean=u.bell(-0.06, 0.06), apex=apex, belly=s * u(20, 60), taper=u(0.15, 0.95),
        depth=s * u.bell(66, 100), wall=s * (14 + 34 * u() * u()), fat=s * (34 + 90 * u() * u()), neck=s * u(44, 62),
        slope=u(0.28, 0.62), domes=(right, right + s * u.bell(-6, 24)), dome_fall=s * u.bell(34, 64),
        dome_radius=u(70, 170), inner=s * u.bell(22, 36),
        heart=(s * u.bell(14, 36), s * u.bell(60, 86), s * u.bell(40, 56), u.bell(0.45, 1.0)),
        heart_depth=s * u(60, 85), knob=(apex + s * u(78, 96), s * u.bell(13, 23)), ribs=10 + int(u(0, 2)),
        rib_step=s * u.bell(23, 32), rib_drop=s * u.bell(26, 66), rib_radius=s * u.bell(4.6, 7.4),
        rib_bone=u.bell(0.5, 1.5), spine=(s * u(16, 21), s * u(22, 27), u.bell(-14, 14)),
        clavicle=(top, s * u(2, 34), s * u(5, 7)),
        breast=(s * u(35, 80), s * u(46, 72) if sex == "F" else 0.0), seed=(seed, patient),
    )  # fmt: skip


def draw_study(
    anatomy: Anatomy, seed: int, patient: int, number: int, prevalences: tuple[float, float], lesion_size: float
) -> Study:
    """Draw study ``number`` (from 1) of a patient from ``SeedSequence([seed, patient, number])``.

    Numbers start at 1 because numpy pads short entropy with zeros: [seed, patient, 0] would repeat [seed, patient].
    Pose, exposure and findings come from disjoint draws, so findings depend on nothing but their own draws (their
    place depends on the lungs, of course).
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, patient, number]))
    u = _Dice(rng)
    has_nodule, has_fluid = u() < prevalences[0], u() < prevalences[1]
    ap = u() < 0.4
    breath = u.bell(0, 44) + (8.0 if ap else 0.0)
    palsy, side = (u(14, 42) if u() < 0.2 else 0.0), u() < 0.5
    study = Study(
        view="AP" if ap else "PA",
        shift=(u.bell(-16, 16), u.bell(-20, 20)), angle=u.bell(-0.09, 0.09),
        zoom=u.bell(0.96, 1.18) * (1.03 if ap else 1.0),
        lift=(breath + palsy * side, breath + palsy * (not side)),
        heart_zoom=(1.13 if ap else 1.0) * u(0.96, 1.04), arm=u(2, 60), gas=(u(-14, 18), u(14, 30) * (u() < 0.55)),
        tilt=u.bell(-0.16, 0.16), scatter=u(0.25, 1.1), exposure=math.exp(u(-0.9, 0.9)),
        window=(u(0.02, 0.20), u(0.78, 0.98), u(0.75, 1.45)), nodules=(), fluids=(),
    )  # fmt: skip
    body = chest(anatomy, study)
    if has_fluid:
        pick = u()
        sides = (-1, 1) if pick < 0.2 else ((-1,) if pick < 0.6 else (1,))
        study = study._replace(fluids=tuple(_fluid(body, s, u(), lesion_size, u(22, 46), u(5, 12)) for s in sides))
    if has_nodule:
        study = study._replace(nodules=place_nodules(body, study, lesion_size, rng))
    return study


def chest(anatomy: Anatomy, study: Study) -> Anatomy:
    """The anatomy as this study shows it: domes risen with poor inspiration, heart magnified by the view."""
    x, long, short, tilt = anatomy.heart
    flat = 1.0 + 0.0016 * min(study.lift)  # a raised diaphragm lays the heart down and widens it
    domes = (anatomy.domes[0] - study.lift[0], anatomy.domes[1] - study.lift[1])
    heart = (x, long * study.heart_zoom * flat, short * study.heart_zoom, tilt / flat)
    return anatomy._replace(domes=domes, heart=heart)


def _fluid(body: Anatomy, side: int, severity: float, lesion_size: float, fall: float, blur: float) -> Fluid:
    """Fluid from a blunted angle (severity 0) to about a third of the lung's height (1), times ``lesion_size``."""
    angle = _angle(body, side)
    fluid = Fluid(side, angle - 18.0 - lesion_size * severity**1.2 * (angle - body.apex) / 3.0, fall, blur)
    x = side * (body.inner + (_reach(body, side) - body.inner) * 0.97 * (1.0 - _LATTICE_X))  # from the side inwards
    hidden = fluid_top(body, fluid, x) > lung_outline(body, x, x)[2] - 5.0  # a thinner layer is cut off too
    return fluid._replace(medial=abs(float(x[0, int(np.argmax(hidden))])) if hidden.any() else 0.0)


def _reach(body: Anatomy, side: int) -> float:
    """Half-width of the thorax on one side, mm."""
    return body.width * (1.0 + body.lean * side)


def _angle(body: Anatomy, side: int) -> float:
    """v of the costophrenic angle: where the dome meets the side (see `lung_outline`)."""
    middle = 0.46 * body.width
    return body.domes[side > 0] + body.dome_fall * ((_reach(body, side) - middle) / (body.width - middle)) ** 2


def ramp(t: Array) -> Array:
    """Smooth step: 0 below t = 0, 1 above t = 1."""
    t = np.minimum(np.maximum(t, 0.0), 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), dtype=np.float32)


def lung_outline(body: Anatomy, x: Array, v: Array) -> tuple[Array, Array, Array, Array]:
    """Half-width of the thorax, half-width of the mediastinum, v of the diaphragm, height in the lung (0 low, 1 apex).

    With s the height:  outer = width sqrt(1 - (1 - taper) s^2 - taper s^4);  the dome falls as the square of the
    distance from its top, further at the side than towards the midline. All mm, shape of ``x``.
    """
    s = np.minimum(np.maximum((body.belly - v) / (body.belly - body.apex), 0.0), 1.0)
    s2 = s * s
    outer = (body.width * (1.0 + body.lean * np.sign(x))) * np.sqrt(1.0 - s2 * (1.0 - body.taper + body.taper * s2))
    hilum = (v - body.knob[0] - 42.0) / 34.0
    inner = body.inner * (1.0 + 0.35 * s2 * s2 + 0.32 / (1.0 + hilum * hilum))
    middle = 0.46 * body.width
    away = np.abs(x) - middle
    fall = np.where(away > 0, np.float32(body.dome_fall / (body.width - middle) ** 2), np.float32(16.0 / middle**2))
    dome = np.where(x < 0, np.float32(body.domes[0]), np.float32(body.domes[1])) + away * away * fall
    return outer, inner, np.asarray(dome, dtype=np.float32), s


def heart_depth(body: Anatomy, x: Array, v: Array) -> Array:
    """Path through the heart (tilted ellipsoid for the ventricles, sphere for the right atrium), mm; <= 0 outside."""
    cx, long, short, tilt = body.heart
    cy = sum(body.domes) / 2.0 - 0.62 * short
    c, s = math.cos(tilt), math.sin(tilt)
    dx, dy = x - cx, v - cy
    q = ((dx * c + dy * s) / long) ** 2 + ((dy * c - dx * s) / short) ** 2
    r = 0.74 * short
    dx, dy = x - (cx - 0.56 * long), v - (cy + 0.12 * short)
    return np.asarray(body.heart_depth * (1.0 - np.minimum(q, (dx * dx + dy * dy) / (r * r))), dtype=np.float32)


def lung_field(body: Anatomy, x: Array, v: Array) -> NDArray[np.bool_]:
    """Where the lungs are seen: within the ribs, above the domes, beside mediastinum, aortic arch and heart."""
    outer, inner, dome, _ = lung_outline(body, x, v)
    knob_v, knob_r = body.knob
    arch = (x - body.inner * 0.8) ** 2 + (v - knob_v) ** 2 < knob_r**2
    seen = (np.abs(x) < outer) & (np.abs(x) > inner) & (v < dome) & (heart_depth(body, x, v) <= 0) & ~arch
    return np.asarray(seen, dtype=np.bool_)


def fluid_top(body: Anatomy, fluid: Fluid, x: Array) -> Array:
    """v of the fluid's surface: lowest at the midline, climbing to ``fluid.top`` at the side (the meniscus)."""
    far = np.abs(x)
    t = np.minimum(np.maximum((far - body.inner) / (0.97 * _reach(body, fluid.side) - body.inner), 0.0), 1.0)
    top = fluid.top + fluid.fall * (1.0 - t * t * t) + 1.2 * np.maximum(fluid.medial - far, 0.0)
    return np.asarray(np.where(np.sign(x) == fluid.side, top, np.float32(1e4)), dtype=np.float32)


def to_image(study: Study, x: Array, v: Array) -> tuple[Array, Array]:
    """Body frame to image frame: rotate, magnify, shift (mm)."""
    c, s = study.zoom * math.cos(study.angle), study.zoom * math.sin(study.angle)
    px, py = c * x - s * v + study.shift[0], s * x + c * v + study.shift[1]
    return np.asarray(px, dtype=np.float32), np.asarray(py, dtype=np.float32)


def to_body(study: Study, x: Array, y: Array) -> tuple[Array, Array]:
    """Image frame to body frame, the inverse of `to_image` (mm)."""
    c, s = math.cos(study.angle) / study.zoom, math.sin(study.angle) / study.zoom
    x, y = x - np.float32(study.shift[0]), y - np.float32(study.shift[1])
    return np.asarray(c * x + s * y, dtype=np.float32), np.asarray(c * y - s * x, dtype=np.float32)


def place_nodules(body: Anatomy, study: Study, lesion_size: float, rng: np.random.Generator) -> tuple[Nodule, ...]:
    """Draw 1 to 3 nodules in the visible lungs, off the fluid and off each other.

    Radius is log-uniform in 0.012 to 0.05 of the image width, times ``lesion_size``. Of 48 random places the first one
    with room is taken; where none has, the one with most room.
    """
    a, b = rng.random((2, 3, 48), dtype=np.float32)
    sizes = rng.random((3, 2)).tolist()
    x = 2.0 * body.width * (a - 0.5)
    v = body.apex + b * (max(body.domes) + 20.0 - body.apex)
    outer, inner, dome, _ = lung_outline(body, x, v)
    room = np.minimum(np.minimum(outer - np.abs(x), np.abs(x) - inner), dome - v)
    room = np.minimum(room, -heart_depth(body, x, v) / 2.0)
    for fluid in study.fluids:
        room = np.minimum(room, fluid_top(body, fluid, x) - v - fluid.blur)
    px, py = to_image(study, x, v)
    room = np.minimum(room, 0.5 * FIELD_MM - np.maximum(np.abs(px), np.abs(py)))
    found: list[Nodule] = []
    for k in range(1 + int(3 * rng.random())):
        radius = lesion_size * FIELD_MM * 0.012 * (0.05 / 0.012) ** sizes[k][0]
        free = room[k]
        for other in found:
            free = np.minimum(free, np.hypot(px[k] - other.x, py[k] - other.y) - other.radius - 0.2 * radius)
        at = int(np.argmax(np.minimum(free, 0.8 * radius / study.zoom)))  # the first with room, else the roomiest
        found.append(Nodule(float(px[k, at]), float(py[k, at]), radius, 1.1 + 0.8 * sizes[k][1]))
    return tuple(found)


def fluid_extent(body: Anatomy, study: Study, fluid: Fluid) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the visible fluid in the image frame (mm), from a 48 x 32 lattice of points."""
    reach = _reach(body, fluid.side)
    xs = fluid.side * (body.inner + (reach - body.inner) * _LATTICE_X)
    bottom = _angle(body, fluid.side)
    vs = fluid.top + (bottom - fluid.top) * _LATTICE_V
    at_v, at_x = np.nonzero(lung_field(body, xs, vs) & (vs > fluid_top(body, fluid, xs)))
    px, py = to_image(study, xs[0, at_x], vs[at_v, 0])
    step_x, step_y = (reach - body.inner) / 47.0, (bottom - fluid.top) / 31.0
    grow_x, grow_y = 1.3 * study.zoom * step_x, 1.3 * study.zoom * step_y  # sharp corners lie between the points
    return float(px.min()) - grow_x, float(py.min()) - grow_y, float(px.max()) + grow_x, float(py.max()) + grow_y
