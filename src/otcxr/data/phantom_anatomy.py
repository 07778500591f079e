"""The body of a phantom: sizes of its structures, how a visit poses it, and their surfaces as closed formulas.

Lengths in mm of the body frame (`otcxr.data.phantom_geometry`). A surface is asked where a ray meets it, so that a
mask, a box and the rendered pixels come from one definition. Ellipsoids are met exactly. What is none (outline of the
lungs, trunk) is symmetric about the plane z = 0 and is taken where the ray crosses this plane: the error is of second
order in the slope of the ray.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from otcxr.data.phantom_geometry import Array, Geometry, Rays

__all__ = [
    "DOME_Z",
    "Anatomy",
    "Dice",
    "Ellipsoid",
    "Study",
    "breathe",
    "dome_angle",
    "dome_line",
    "draw_anatomy",
    "draw_study",
    "ellipsoid",
    "heart_level",
    "heart_parts",
    "heart_square",
    "lung_outline",
    "lung_room",
    "ramp",
    "reach",
    "seen",
]  # fmt: skip

DOME_Z = 12.0  # depth of the tops of the domes of the diaphragm


Ellipsoid: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float], float]  # centre, semi-axes, tilt


class Anatomy(NamedTuple):
    """One chest, the same in all studies of a patient."""

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
    heart: tuple[float, float, float, float]  # x of the centre; semi-axes long and short; tilt (radians)
    heart_depth: float  # semi-axis of the heart front to back
    heart_ratio: float  # width of the heart over inner width of the thorax, parallel rays, full inspiration
    knob: tuple[float, float]  # v and radius of the aortic arch
    ribs: int  # pairs of ribs
    rib_step: float  # distance between two ribs
    rib_drop: float  # how far a rib falls from the spine to the side
    rib_radius: float  # half the height of a rib
    rib_bone: float  # relative amount of bone
    spine: tuple[float, float, float]  # half-width, height of a vertebra, sideways curvature
    clavicle: tuple[float, float, float]  # v of the inner end, rise to the outer end, radius
    scapula: float  # how far the blade reaches inwards of the outer edge of the lung
    breast: tuple[float, float]  # v of the centre and radius; radius 0 for none
    vessels: float  # relative radius of the vessels
    pacemaker: int  # side of its generator, 0 for none
    wires: bool  # of the sternum, after surgery
    seed: tuple[int, int]  # of vessels and texture


class Study(NamedTuple):
    """One visit: pose, breathing, exposure, detector."""

    view: str
    geometry: Geometry
    lift: tuple[float, float]  # how far each dome stands above full inspiration, mm
    density: float  # of the lungs relative to soft tissue: higher with poor inspiration
    arm: float  # distance of the upper arms from the chest, mm
    gas: tuple[float, float]  # offset and radius of the stomach bubble; radius 0 for none
    tilt: float  # change of thickness over the field, relative
    scatter: float  # scattered to primary counts
    exposure: float  # relative counts
    blur: float  # of focus, motion and detector: standard deviation in mm
    sharpen: float  # gain of the unsharp mask of the workstation
    window: tuple[float, float, float]  # grey of the darkest and brightest percentile, gamma
    shutter: tuple[float, float, float, float, float]  # left, top, right, bottom as shares of the side; angle
    marker: tuple[float, float, float, float]  # x, y and height of the letter as shares of the side; angle
    letter: str  # the side on which the marker lies: "R" or "L"; "" for none
    line: bool  # central venous line
    tube: bool  # endotracheal tube
    feeding: bool  # nasogastric tube
    leads: int  # electrodes of an electrocardiogram


class Dice:
    """Uniform draws from one block of random numbers, the fast way to draw many named scalars."""

    def __init__(self, values: list[float]) -> None:
        self._values = iter(values)

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * next(self._values)

    def bell(self, low: float, high: float) -> float:
        """A draw that is rare at the ends: (low + high) / 2 +- half the span times |t| (0.45 + 0.55 t^2)."""
        t = 2.0 * next(self._values) - 1.0
        return low + (high - low) * (0.5 + t * (0.225 + 0.275 * t * t))


@lru_cache(maxsize=256)
def draw_anatomy(seed: int, patient: int, sex: str, devices: float) -> Anatomy:
    """Draw the chest of a patient from ``SeedSequence([seed, patient])``."""
    u = Dice(np.random.default_rng(np.random.SeedSequence([seed, patient])).random(64).tolist())
    s = u.bell(0.90, 1.08) * (1.0 if sex == "M" else 0.95)
    apex, right = s * u.bell(-158, -128), s * u.bell(84, 116)
    top = apex + s * u(20, 34)
    return Anatomy(
        width=s * u.bell(122, 150), lean=u.bell(-0.06, 0.06), apex=apex, belly=s * u(20, 60), taper=u(0.15, 0.8),
        depth=s * u.bell(66, 100), wall=s * (12 + 30 * u() * u()), fat=s * (34 + 90 * u() * u()), neck=s * u(42, 58),
        slope=u(0.28, 0.62), domes=(right, right + s * u.bell(-6, 24)), dome_fall=s * u.bell(34, 64),
        dome_radius=u(70, 170), inner=s * u.bell(17, 28),
        heart=(s * u.bell(14, 32), s * u.bell(60, 82), s * u.bell(42, 56), u.bell(0.45, 1.0)),
        heart_depth=s * u(60, 80), heart_ratio=u.bell(0.40, 0.50),
        knob=(apex + s * u(74, 92), s * u.bell(13, 21)), ribs=12 + int(u(0, 2)),
        rib_step=s * u.bell(23, 31), rib_drop=s * u.bell(42, 88), rib_radius=s * u.bell(4.4, 6.8),
        rib_bone=u.bell(0.5, 1.5), spine=(s * u(16, 21), s * u(22, 27), u.bell(-12, 12)),
        clavicle=(top, s * u(2, 30), s * u(5, 6.6)), scapula=s * u(-22, 10),
        breast=(s * u(35, 80), s * u(46, 72) if sex == "F" else 0.0), vessels=u.bell(0.85, 1.2),
        pacemaker=(1 if u() < 0.75 else -1) * (u() < 0.06 * devices), wires=u() < 0.06 * devices, seed=(seed, patient),
    )  # fmt: skip


def draw_study(anatomy: Anatomy, seed: int, patient: int, number: int, devices: float) -> Study:
    """Draw study ``number`` (from 1) of a patient from ``SeedSequence([seed, patient, number])``.

    Numbers start at 1 because numpy pads short entropy with zeros: [seed, patient, 0] would repeat [seed, patient].
    """
    u = Dice(np.random.default_rng(np.random.SeedSequence([seed, patient, number])).random(96).tolist())
    ap = u() < 0.4
    lordosis = u(0.0, 0.20)  # drawn for both views, so that a view changes no other draw
    breath = u.bell(0, 38) + (10.0 if ap else 0.0)
    palsy, side = (u(14, 42) if u() < 0.2 else 0.0), u() < 0.5
    focus = u(1000, 1300) if ap else u(1750, 1900)
    gap = u(20, 60) if ap else u(10, 40)
    behind = anatomy.depth + 0.5 * anatomy.fat + gap  # mid-chest to detector
    near = 1.0 - behind / focus
    shut = u() < 0.45
    # the radiographer centres on the lungs and takes a field that holds them at full inspiration
    foot = max(dome_angle(anatomy, -1), dome_angle(anatomy, 1))
    half = max((anatomy.width + anatomy.wall) * u.bell(0.92, 1.16), 0.5 * (foot - anatomy.apex) + 22.0)
    off = (u.bell(-14, 14), u.bell(-14, 14))
    geometry = Geometry(
        focus=focus, near=near, slope=(-1.0 if ap else 1.0) / focus, centre=(u.bell(-20, 20), u.bell(-30, 40)),
        yaw=u.bell(-0.11, 0.11), pitch=u.bell(-0.09, 0.09) - (lordosis if ap else 0.0), angle=u.bell(-0.09, 0.09),
        shift=(off[0], off[1] - (0.5 * (foot + anatomy.apex) - 8.0) / near),
        field=2.0 * (half / near + abs(off[1]) + 4.0) * (1.1 if shut else 1.0),
    )  # fmt: skip
    low, high = u(), u()
    edges = [(0.05 * u() if shut and u() < 0.6 else -0.2) for _ in range(4)]
    shutter = (edges[0], edges[1], 1.0 - edges[2], 1.0 - edges[3], u(-0.02, 0.02))
    right = u() < 0.5
    place = (u(0.05, 0.13), u(0.05, 0.2), u(0.035, 0.06), u(-0.3, 0.3))
    marker = place if right else (1.0 - place[0], *place[1:])
    often = devices * (1.0 if ap else 0.15)
    return Study(
        view="AP" if ap else "PA", geometry=geometry, lift=(breath + palsy * side, breath + palsy * (not side)),
        density=u.bell(0.19, 0.35) + 0.0012 * breath, arm=u(2, 60) + (0.0 if ap else 45.0),
        gas=(u(-14, 18), u(12, 28) * (u() < 0.6)), tilt=u.bell(-0.16, 0.16),
        scatter=u(0.25, 1.1) + (0.3 if ap else 0.0), exposure=math.exp(u(-0.9, 0.9)),
        blur=u(0.15, 0.4) + (0.2 if ap else 0.0), sharpen=u(0.3, 2.0),
        window=(0.02 + 0.16 * low, 0.80 + 0.18 * high, u(0.75, 1.45)), shutter=shutter, marker=marker,
        letter=("R" if right else "L") if u() < 0.75 else "", line=u() < 0.35 * often, tube=u() < 0.2 * often,
        feeding=u() < 0.2 * often, leads=int(u(3, 6)) if u() < 0.5 * often else 0,
    )  # fmt: skip


def breathe(anatomy: Anatomy, study: Study, enlarged: float) -> Anatomy:
    """The anatomy as this study shows it: domes risen with poor inspiration, heart as wide as it is.

    Args:
        anatomy: Of the patient.
        study: The visit.
        enlarged: What cardiomegaly adds to the ratio of heart to thorax, 0 for none.
    """
    x, long, short, tilt = anatomy.heart
    flat = 1.0 + 0.0016 * min(study.lift)  # a raised diaphragm lays the heart down and widens it
    tilt /= flat
    now = math.hypot(long * math.cos(tilt), short * math.sin(tilt)) + 0.56 * long + 0.74 * short
    # the two widths add up: to the left from the long ellipsoid, to the right from the atrium, see `heart_parts`
    scale = (anatomy.heart_ratio + enlarged) * 2.0 * anatomy.width / now * flat
    heart = (x * (1.0 + enlarged), long * scale, short * scale, tilt)
    domes = (anatomy.domes[0] - study.lift[0], anatomy.domes[1] - study.lift[1])
    return anatomy._replace(domes=domes, heart=heart, heart_depth=anatomy.heart_depth * math.sqrt(scale))


def reach(body: Anatomy, side: int) -> float:
    """Half-width of the thorax on one side."""
    return body.width * (1.0 + body.lean * side)


def dome_angle(body: Anatomy, side: int) -> float:
    """v of the costophrenic angle: where the dome meets the side (see `lung_outline`)."""
    middle = 0.46 * body.width
    return body.domes[side > 0] + body.dome_fall * ((reach(body, side) - middle) / (body.width - middle)) ** 2


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
    inner = body.inner * (1.0 + 0.15 * s2 * s2 + 0.30 / (1.0 + hilum * hilum))
    return outer, inner, dome_line(body, x), s


def dome_line(body: Anatomy, x: Array) -> Array:
    """v of the diaphragm over x, at its highest from front to back."""
    middle = 0.46 * body.width
    away = np.abs(x) - middle
    fall = np.where(away > 0, np.float32(body.dome_fall / (body.width - middle) ** 2), np.float32(16.0 / middle**2))
    dome = np.where(x < 0, np.float32(body.domes[0]), np.float32(body.domes[1])) + away * away * fall
    return np.asarray(dome, dtype=np.float32)


def ellipsoid(
    rays: Rays, centre: tuple[float, float, float], axes: tuple[float, float, float], tilt: float = 0.0
) -> tuple[Array, Array]:
    """Where rays pass an ellipsoid whose first two axes lie in a plane z = const, turned by ``tilt``.

    Returns: z of the middle of the path, and the square of half its length in z (negative: the ray passes by).
    """
    c, s = math.cos(tilt), math.sin(tilt)
    x, v = rays.at(centre[2])
    dx, dv = x - centre[0], v - centre[1]
    u, w = (dx * c + dv * s) / axes[0], (dv * c - dx * s) / axes[1]
    u1, w1 = (rays.x1 * c + rays.v1 * s) / axes[0], (rays.v1 * c - rays.x1 * s) / axes[1]
    # |(u + u1 t, w + w1 t, t / depth)| = 1 with t = z - centre: a t^2 + 2 b t + c = 0
    a = u1 * u1 + w1 * w1 + np.float32(1.0 / axes[2] ** 2)
    b = u * u1 + w * w1
    middle = b / a
    square = middle * middle - (u * u + w * w - 1.0) / a
    return np.asarray(centre[2] - middle, dtype=np.float32), np.asarray(square, dtype=np.float32)


def heart_level(body: Anatomy) -> float:
    """v of the centre of the heart."""
    return 0.35 * body.domes[0] + 0.65 * body.domes[1] - 0.62 * body.heart[2]  # it rests on the left dome


def heart_parts(body: Anatomy) -> tuple[Ellipsoid, ...]:
    """Centre, semi-axes and tilt of the ellipsoids of the heart: ventricles, right atrium, outflow of the left side."""
    cx, long, short, tilt = body.heart
    cv = heart_level(body)
    r = 0.74 * short
    d = body.heart_depth
    bulge_v = body.knob[0] + 0.55 * (cv - body.knob[0])
    return (
        ((cx, cv, 26.0), (long, short, d), tilt),
        ((cx - 0.56 * long, cv + 0.12 * short, 18.0), (r, 1.12 * r, 0.8 * d), 0.0),
        ((0.75 * body.inner, bulge_v, 20.0), (1.1 * body.inner, 0.75 * (cv - body.knob[0]), 0.7 * d), -0.25),
    )


def heart_square(body: Anatomy, rays: Rays) -> Array:
    """Largest square of half the path through one of the two large parts of the heart; negative beside it."""
    parts = [ellipsoid(rays, *part)[1] for part in heart_parts(body)[:2]]
    return np.asarray(np.maximum(*parts), dtype=np.float32)


def lung_room(body: Anatomy, rays: Rays) -> Array:
    """How far inside the seen lung a ray passes, about in mm; not positive where no lung is seen.

    The lungs are seen within the ribs, above the domes, beside mediastinum, aortic arch and heart.
    """
    x, v = rays.at(0.0)
    far = np.abs(x)
    outer, inner, _, _ = lung_outline(body, x, v)
    dome_x, dome_v = rays.at(DOME_Z)
    room = np.minimum(np.minimum(outer - far, far - inner), dome_line(body, dome_x) - dome_v)
    room = np.minimum(room, heart_square(body, rays) * np.float32(-0.5 / body.heart_depth))
    knob_v, knob_r = body.knob
    arch = np.sqrt((x - body.inner * 0.8) ** 2 + (v - knob_v) ** 2) - knob_r
    return np.asarray(np.minimum(room, arch), dtype=np.float32)


def seen(body: Anatomy, rays: Rays) -> NDArray[np.bool_]:
    """Where lung is seen."""
    return np.asarray(lung_room(body, rays) > 0, dtype=np.bool_)
