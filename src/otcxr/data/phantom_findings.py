"""Disease in a phantom: drawn, placed in the chest, and outlined, so that label, box, mask and pixels agree.

Chronic findings (nodules, masses, cardiomegaly) are drawn per patient and stay; nodules and masses keep their place
and grow from study to study. Acute ones (consolidation, effusion, pneumothorax, edema) are drawn per study. Each
finding has draws of its own, so whether it is there depends on no other finding and on no pose. Lengths in mm of the
body frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from otcxr.data.phantom_anatomy import (
    Anatomy,
    Dice,
    Study,
    breathe,
    dome_angle,
    heart_parts,
    heart_square,
    lung_outline,
    lung_room,
    ramp,
    reach,
    seen,
)
from otcxr.data.phantom_geometry import Array, Geometry, Rays

__all__ = [
    "FINDINGS", "Collapse", "Disease", "Edema", "Fluid", "Patch", "Sphere", "collapsed_outer", "draw_disease",
    "edema_share", "extents", "fluid_share", "outlines", "patch_share",
]  # fmt: skip

FINDINGS = ("Nodule", "Mass", "Consolidation", "Effusion", "Pneumothorax", "Cardiomegaly", "Edema")
_CHRONIC = ("Nodule", "Mass", "Cardiomegaly")
_PLACES = 64  # random places among which a lesion takes the first with room
_REST = 26.0  # mm that the domes stand above full inspiration in a usual study
_ROWS = np.linspace(0.0, 1.0, 96, dtype=np.float32)
# from the ribs inwards: even steps, and many small ones at the ribs, where outlines end in thin tips
_STEPS = 56
_INWARDS = np.sort(np.r_[np.linspace(0.0, 1.0, _STEPS), 0.1 * np.linspace(0.02, 0.98, 16) ** 2]).astype(np.float32)


class Sphere(NamedTuple):
    """A nodule or a lobe of a mass; density relative to soft tissue."""

    x: float
    v: float
    z: float
    radius: float
    density: float


class Patch(NamedTuple):
    """Consolidated lung: an ellipse in the plane ``z`` with a wavy edge, over a share of the depth of the lung."""

    x: float
    v: float
    z: float
    long: float
    short: float
    tilt: float
    waves: tuple[float, float, float]  # two phases, and the wavelength in mm
    share: float


class Fluid(NamedTuple):
    """Pleural fluid of one side."""

    side: int  # -1 picture left, +1 picture right
    top: float  # v of the surface at the side
    fall: float  # how much lower the surface lies at the midline
    blur: float  # depth over which the fluid thins out at its surface
    medial: float = 0.0  # distance from the midline at which the surface goes under the dome, for good


class Collapse(NamedTuple):
    """Pneumothorax of one side: air between the ribs and a lung that has shrunk."""

    side: int
    gap: float  # between ribs and lung at the upper side
    drop: float  # of the apex of the lung


class Edema(NamedTuple):
    """Water in both lungs, most about the hila."""

    strength: float  # share of the air that is replaced at the hila
    spread: float
    base: float  # how much more the bases hold than the apices


class Disease(NamedTuple):
    """All findings of one study; ``severity`` has one entry for each of `FINDINGS`, in [0, 1], None where absent."""

    nodules: tuple[Sphere, ...] = ()
    masses: tuple[tuple[Sphere, ...], ...] = ()
    patches: tuple[Patch, ...] = ()
    fluids: tuple[Fluid, ...] = ()
    collapses: tuple[Collapse, ...] = ()
    edema: Edema | None = None
    severity: tuple[float | None, ...] = (None,) * len(FINDINGS)


def draw_disease(
    anatomy: Anatomy,
    study: Study,
    key: tuple[int, int, int],
    prevalences: Sequence[float],
    lesion_size: float,
) -> tuple[Anatomy, Disease]:
    """Draw the findings of a study.

    Args:
        anatomy: Of the patient, as `draw_anatomy` gives it.
        study: The visit.
        key: Seed, patient, number of the study.
        prevalences: One for each of `FINDINGS`.
        lesion_size: Factor on the size of nodules, masses, patches, on the height of fluid and on the gap of a
            pneumothorax.
    Returns: The anatomy as this study shows it, and the findings.
    """
    seed, patient, number = key
    chronic, acute = (
        np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(spawn,))).random((len(FINDINGS), 40)).tolist()
        for entropy, spawn in (([seed, patient], 5), ([seed, patient, number], 6))
    )
    dice: dict[str, Dice] = {}
    severity: dict[str, float] = {}
    for row, (finding, prevalence) in enumerate(zip(FINDINGS, prevalences, strict=True)):
        u = Dice((chronic if finding in _CHRONIC else acute)[row])
        if u() < prevalence:
            severity[finding], dice[finding] = u(), u
    enlarged = 0.0
    if "Cardiomegaly" in severity:
        enlarged = 0.52 + 0.10 * severity["Cardiomegaly"] - anatomy.heart_ratio
    body = breathe(anatomy, study, enlarged)
    fluids: tuple[Fluid, ...] = ()
    if "Effusion" in dice:
        u = dice["Effusion"]
        pick = u()
        sides = (-1, 1) if pick < 0.2 else ((-1,) if pick < 0.6 else (1,))
        fluids = tuple(_fluid(body, s, severity["Effusion"], lesion_size, u(22, 46), u(5, 12)) for s in sides)
    collapses: tuple[Collapse, ...] = ()
    if "Pneumothorax" in dice:
        u = dice["Pneumothorax"]
        gap = (7.0 + 42.0 * severity["Pneumothorax"] ** 1.3) * math.sqrt(lesion_size)
        collapses = (Collapse(-1 if u() < 0.5 else 1, gap, gap * u(0.7, 1.2)),)
    edema = None
    if "Edema" in dice:
        u = dice["Edema"]
        edema = Edema(0.10 + 0.40 * severity["Edema"], body.width * u(0.45, 0.75), u(0.1, 0.6))
    rest = breathe(anatomy, study._replace(lift=(_REST, _REST)), enlarged)
    finder = _Places(body, rest, study.geometry, fluids, collapses, (seed, patient), number)
    patches: tuple[Patch, ...] = ()
    if "Consolidation" in dice:
        u = dice["Consolidation"]
        patches = finder.patches(u, severity["Consolidation"], lesion_size)
    growth = 1.0 + 0.12 * (number - 1)
    nodules: tuple[Sphere, ...] = ()
    if "Nodule" in dice:
        u = dice["Nodule"]
        nodules = finder.nodules(u, severity["Nodule"], lesion_size, growth)
    masses: tuple[tuple[Sphere, ...], ...] = ()
    if "Mass" in dice:
        u = dice["Mass"]
        masses = (finder.mass(u, severity["Mass"], lesion_size, growth, nodules),)
    levels = tuple(severity.get(finding) for finding in FINDINGS)
    return body, Disease(nodules, masses, patches, fluids, collapses, edema, levels)


class _Places:
    """Finds room in the seen lungs.

    A patient's places are drawn once and tried in order; what counts is the room in a usual study, so a lesion stays
    where it is unless this study covers its place.
    """

    def __init__(
        self, body: Anatomy, rest: Anatomy, geometry: Geometry, fluids: Sequence[Fluid], collapses: Sequence[Collapse],
        patient: tuple[int, int], number: int,
    ) -> None:  # fmt: skip
        self._body, self._rest, self._geometry = body, rest, geometry
        self._fluids, self._collapses = fluids, collapses
        self._patient, self._number = patient, number

    def _candidates(self, stream: int, *entropy: int) -> tuple[Array, Array, Array, Array, Array]:
        """Places (x, v, z), the room about them in a usual study and in this one, (_PLACES,) each."""
        body = self._body
        rng = np.random.default_rng(np.random.SeedSequence([*self._patient, *entropy], spawn_key=(7, stream)))
        a, b, c = rng.random((3, _PLACES), dtype=np.float32)
        x, v = 2.0 * body.width * (a - 0.5), body.apex + b * (170.0 - body.apex)
        outer, _, _, s = lung_outline(body, x, v)
        half = body.depth * (1.0 - 0.4 * s * s) * np.sqrt(np.maximum(1.0 - (x / np.maximum(outer, 1.0)) ** 2, 0.0))
        z = half * (1.3 * c - 0.65)
        still = np.zeros_like(x)
        usual = lung_room(self._rest, Rays(x, v, still, still))
        px, py = self._geometry.project(x, v, z)
        rays = self._geometry.rays(px, py)
        room = lung_room(body, rays)
        at_x, at_v = rays.at(0.0)
        for fluid in self._fluids:
            room = np.minimum(room, fluid_top(body, fluid, at_x) - at_v - fluid.blur)
        for collapse in self._collapses:
            inside = collapsed_outer(body, collapse, at_x, at_v) - np.abs(at_x)
            room = np.where(np.sign(at_x) == collapse.side, np.minimum(room, inside), room)
        edge = 0.5 * self._geometry.field - np.maximum(np.abs(px), np.abs(py))
        return x, v, z, usual, np.asarray(np.minimum(room, edge - 0.04 * self._geometry.field), dtype=np.float32)

    @staticmethod
    def _first(x: Array, v: Array, usual: Array, room: Array, want: float, need: float) -> int:
        """The first place with room ``want`` in a usual study, or the nearest to it with room ``need`` in this one."""
        home = int(np.argmax(usual >= want)) if (usual >= want).any() else int(np.argmax(usual))
        away = np.where(room >= need, np.hypot(x - x[home], v - v[home]), np.inf)
        return int(np.argmin(away)) if np.isfinite(away).any() else int(np.argmax(room))

    def nodules(self, u: Dice, severity: float, lesion_size: float, growth: float) -> tuple[Sphere, ...]:
        found: list[Sphere] = []
        for k in range(1 + int(u(0, 3))):
            level = severity if k == 0 else severity * u()  # the severity is that of the largest
            first = 4.0 * (15.0 / 4.0) ** level * lesion_size
            radius = min(growth * first, 15.0 * lesion_size)
            x, v, z, usual, room = self._candidates(k)
            for other in found:
                room = np.minimum(room, np.hypot(x - other.x, v - other.v) - other.radius - 0.2 * radius)
            at = self._first(x, v, usual, room, 0.9 * first, 0.3 * radius)
            found.append(Sphere(float(x[at]), float(v[at]), float(z[at]), radius, u(1.0, 1.5)))
        return tuple(found)

    def mass(
        self, u: Dice, severity: float, lesion_size: float, growth: float, nodules: Sequence[Sphere]
    ) -> tuple[Sphere, ...]:
        first = 16.0 * (34.0 / 16.0) ** severity * lesion_size
        radius = min(growth * first, 38.0 * lesion_size)
        x, v, z, usual, room = self._candidates(8)
        for other in nodules:
            room = np.minimum(room, np.hypot(x - other.x, v - other.v) - other.radius - 0.5 * radius)
        at = self._first(x, v, usual, room, 0.6 * first, 0.25 * radius)
        density = u(0.95, 1.25)
        lobes = [Sphere(float(x[at]), float(v[at]), float(z[at]), 0.8 * radius, density)]
        turn = u(0.0, 2.0 * math.pi)
        for _ in range(3 + int(u(0, 3))):
            turn += u(0.8, 1.8)
            far, size = radius * u(0.35, 0.6), radius * u(0.35, 0.55)
            lobes.append(Sphere(lobes[0].x + far * math.cos(turn), lobes[0].v + far * math.sin(turn),
                                lobes[0].z + size * u(-0.5, 0.5), size, density))  # fmt: skip
        return tuple(lobes)

    def patches(self, u: Dice, severity: float, lesion_size: float) -> tuple[Patch, ...]:
        found = []
        for k in range(1 + int(u() < 0.3)):
            x, v, z, _, room = self._candidates(9 + k, self._number)
            long = (20.0 + 32.0 * severity) * lesion_size * u(0.85, 1.15)
            at = self._first(x, v, room, room, 0.4 * long, 0.4 * long)
            found.append(Patch(float(x[at]), float(v[at]), float(z[at]), long, long * u(0.6, 0.95), u(0.0, math.pi),
                               (u(0.0, 6.28), u(0.0, 6.28), long * u(0.8, 1.4)),
                               min(0.22 + 0.5 * severity + u(-0.07, 0.07), 0.9)))  # fmt: skip
        return tuple(found)


def _fluid(body: Anatomy, side: int, severity: float, lesion_size: float, fall: float, blur: float) -> Fluid:
    """Fluid from a blunted angle (severity 0) to about a third of the lung's height (1), times ``lesion_size``."""
    angle = dome_angle(body, side)
    fluid = Fluid(side, angle - 18.0 - lesion_size * severity**1.2 * (angle - body.apex) / 3.0, fall, blur)
    x = side * (
        body.inner + (reach(body, side) - body.inner) * 0.97 * (1.0 - np.linspace(0.0, 1.0, 64, dtype=np.float32))
    )  # from the side inwards
    hidden = fluid_top(body, fluid, x) > lung_outline(body, x, x)[2] - 5.0  # a thinner layer is cut off too
    return fluid._replace(medial=abs(float(x[int(np.argmax(hidden))])) if hidden.any() else 0.0)


def fluid_top(body: Anatomy, fluid: Fluid, x: Array) -> Array:
    """v of the fluid's surface: lowest at the midline, climbing to ``fluid.top`` at the side (the meniscus)."""
    far = np.abs(x)
    t = np.minimum(np.maximum((far - body.inner) / (0.97 * reach(body, fluid.side) - body.inner), 0.0), 1.0)
    top = fluid.top + fluid.fall * (1.0 - t * t * t) + 0.05 * np.maximum(fluid.medial - far, 0.0) ** 2
    dry = (np.sign(x) != fluid.side) | (far < fluid.medial - 12.0)
    return np.asarray(np.where(dry, np.float32(1e4), top), dtype=np.float32)


def fluid_share(body: Anatomy, fluid: Fluid, rays: Rays) -> Array:
    """Share of the air that fluid replaces, 0 to 1."""
    x, v = rays.at(0.0)
    return ramp((v - fluid_top(body, fluid, x)) / fluid.blur + 0.5)


def collapsed_outer(body: Anatomy, collapse: Collapse, x: Array, v: Array) -> Array:
    """Half-width of a lung that has shrunk from the ribs, most at the apex, least at the base; 0 above its apex."""
    s = np.minimum(np.maximum((body.belly - v) / (body.belly - body.apex - collapse.drop), 0.0), 1.0)
    s2 = s * s
    gap = collapse.gap * (0.25 + 0.75 * ramp((30.0 - v) / 130.0 + 0.5))
    half = np.maximum(reach(body, collapse.side) - gap, 1.0)
    outer = half * np.sqrt(np.maximum(1.0 - s2 * (1.0 - body.taper + body.taper * s2), 0.0))
    return np.asarray(outer, dtype=np.float32)


def patch_share(patch: Patch, rays: Rays) -> Array:
    """Share of the air that a consolidation replaces; half its most on the outline that the mask shows."""
    x, v = rays.at(patch.z)
    dx, dv = x - patch.x, v - patch.v
    c, s = math.cos(patch.tilt), math.sin(patch.tilt)
    q = ((dx * c + dv * s) / patch.long) ** 2 + ((dv * c - dx * s) / patch.short) ** 2
    first, second, wave = patch.waves
    k = 2.0 * math.pi / wave
    edge = np.sin(k * dx + first) + np.sin(k * 1.3 * dv + second)
    share = patch.share * ramp((1.0 - q * (1.0 + 0.22 * edge)) / 1.6 + 0.5)
    return np.asarray(np.where(np.sign(rays.at(0.0)[0]) == np.sign(patch.x), share, 0.0), dtype=np.float32)  # one lung


def edema_share(body: Anatomy, edema: Edema, rays: Rays) -> Array:
    """Share of the air that edema replaces."""
    x, v = rays.at(0.0)
    away = (np.abs(x) - 1.6 * body.inner) ** 2 + (0.8 * (v - body.knob[0] - 55.0)) ** 2
    height = np.minimum(np.maximum((v - body.apex) / (150.0 - body.apex), 0.0), 1.0)
    share = (0.15 + 0.85 * np.exp(away * np.float32(-1.0 / edema.spread**2))) * (1.0 - edema.base * (0.5 - height))
    return np.asarray(edema.strength * share, dtype=np.float32)


def outlines(body: Anatomy, disease: Disease, finding: str, rays: Rays) -> list[NDArray[np.bool_]]:
    """What is marked as a finding: one mask for each of its boxes."""
    if finding in ("Nodule", "Mass"):
        groups = [(nodule,) for nodule in disease.nodules] if finding == "Nodule" else disease.masses
        return [np.logical_or.reduce([sphere_square(ball, rays) > 0 for ball in group]) for group in groups]
    if finding == "Cardiomegaly":
        return [heart_square(body, rays) > 0]
    lungs = seen(body, rays)
    x, v = rays.at(0.0)
    beyond = [(np.sign(x) == c.side) & (np.abs(x) > collapsed_outer(body, c, x, v)) & lungs for c in disease.collapses]
    if finding in ("Consolidation", "Edema"):  # of lung, so not where a pneumothorax has taken it
        for part in beyond:
            lungs &= ~part
    if finding == "Consolidation":
        return [lungs & (patch_share(patch, rays) > 0.5 * patch.share) for patch in disease.patches]
    if finding == "Effusion":
        return [lungs & (v > fluid_top(body, fluid, x)) for fluid in disease.fluids]
    dry = np.ones_like(lungs)
    for fluid in disease.fluids:
        dry &= v < fluid_top(body, fluid, x)
    if finding == "Pneumothorax":
        return [part & dry for part in beyond]
    if disease.edema is None:
        return []
    wet = lungs & (edema_share(body, disease.edema, rays) > 0.4 * disease.edema.strength)
    return [wet & (x < 0), wet & (x > 0)]


def sphere_square(ball: Sphere, rays: Rays) -> Array:
    """Square of half the path through a sphere, in mm of the ray; negative beside it."""
    x, v = rays.at(ball.z)
    dx, dv = x - ball.x, v - ball.v
    # the slope of the ray matters to second order only: the distance from the centre is taken in the plane
    return np.asarray(ball.radius**2 - dx * dx - dv * dv, dtype=np.float32)


def extents(
    body: Anatomy, geometry: Geometry, disease: Disease, finding: str
) -> list[tuple[float, float, float, float] | None]:
    """Left, top, right, bottom of each outline in the image frame (mm), None where no point of it lies in the picture.

    Spheres and the heart by formula; other outlines by a lattice of points about them, grown by its step.
    """
    if finding in ("Nodule", "Mass"):
        groups = [(nodule,) for nodule in disease.nodules] if finding == "Nodule" else disease.masses
        return [_round_extent(geometry, [((b.x, b.v, b.z), (b.radius, b.radius), 0.0) for b in g]) for g in groups]
    if finding == "Cardiomegaly":
        rounds = []
        for centre, axes, tilt in heart_parts(body)[:2]:
            px, py = geometry.project(*centre)
            ray = geometry.rays(px[None], py[None])
            steep = math.hypot(float(ray.x1[0]), float(ray.v1[0])) + axes[0] * abs(geometry.slope)
            slant = axes[2] * steep  # slanted rays touch it further out
            rounds.append((centre, (math.hypot(axes[0], slant), math.hypot(axes[1], slant)), tilt))
        return [_round_extent(geometry, rounds)]
    found: list[tuple[float, float, float, float] | None] = []
    for k, (side, top, bottom) in enumerate(_windows(body, disease, finding)):
        v = top + (bottom - top) * _ROWS[:, None]
        outer = lung_outline(body, np.full_like(v, side), v)[0]
        x = side * outer * (1.0 - _INWARDS[None, :])
        px, py = geometry.project(x, v, 0.0)
        inside = outlines(body, disease, finding, geometry.rays(px, py))[k]
        if not inside.any():
            found.append(None)
            continue
        px, py = px[inside], py[inside]
        # an edge that slants takes a step in the other direction with it
        across, down = reach(body, side) / (_STEPS - 1), (bottom - top) / (len(_ROWS) - 1)
        wide, high = (across + 0.5 * down) / geometry.near, (down + 0.5 * across) / geometry.near
        found.append((float(px.min()) - wide, float(py.min()) - high, float(px.max()) + wide, float(py.max()) + high))
    return found


def _round_extent(
    geometry: Geometry, rounds: Sequence[tuple[tuple[float, float, float], tuple[float, float], float]]
) -> tuple[float, float, float, float]:
    """Extent of ellipses in planes z = const: centre, semi-axes, tilt."""
    turn = np.arange(64, dtype=np.float32) * np.float32(math.pi / 32)
    cos, sin = np.cos(turn) * np.float32(1.0013), np.sin(turn) * np.float32(1.0013)  # 64 corners around the ellipse
    px, py = [], []
    for (x, v, z), (long, short), tilt in rounds:
        c, s = math.cos(tilt), math.sin(tilt)
        a, b = geometry.project(x + long * c * cos - short * s * sin, v + long * s * cos + short * c * sin, z)
        px.append(a)
        py.append(b)
    at_x, at_y = np.concatenate(px), np.concatenate(py)
    return float(at_x.min()), float(at_y.min()), float(at_x.max()), float(at_y.max())


def _windows(body: Anatomy, disease: Disease, finding: str) -> list[tuple[int, float, float]]:
    """Side of the lung that holds each outline, and the rows of the plane z = 0 that do: side, top, bottom."""
    if finding == "Consolidation":
        return [
            (1 if p.x > 0 else -1, max(p.v - r, body.apex - 2.0), p.v + r)
            for p in disease.patches for r in [1.35 * p.long + 0.3 * abs(p.z)]
        ]  # fmt: skip
    sides = {
        "Effusion": [(f.side, f.top - 2.0) for f in disease.fluids],
        "Pneumothorax": [(c.side, body.apex - 2.0) for c in disease.collapses],
        "Edema": [(-1, body.apex - 2.0), (1, body.apex - 2.0)] if disease.edema else [],
    }[finding]
    return [(side, top, dome_angle(body, side) + 12.0) for side, top in sides]
