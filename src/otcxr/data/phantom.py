"""Synthetic frontal chest radiographs with planted findings: the source ``phantom:N,seed=S,size=P``.

A phantom is computed, never stored: a record names (settings, index, layer), and pixels are rendered when they are
read, the same bytes in any order and any process. The picture is a projection, as on a detector of 400 mm x 400 mm:

    integral(p) = sum over structures of mu * path length at p        (closed formulas, mm)
    counts(p)   = exp(-integral) + scatter, blurred by the detector, plus quantum noise
    grey(p)     = low + (high - low) * clip((-log(counts) - q1) / (q99 - q1)) ** gamma       bone bright, in [0, 1]

q1 and q99 are percentiles of the picture itself, as a workstation would window it; low, high, gamma, exposure and
scatter are drawn per study, whatever the labels. Anatomy is drawn per patient; pose, breathing and findings per study.

Not modelled: three-dimensional rotation of the patient (only in the plane), beam hardening and energy, grid and heel
effect beyond a linear tilt, collimation, markers, tubes, leads and implants, fissures, bronchi, vertebral detail,
fractures, costal calcification, clothing; findings other than two; lobulated, cavitating or calcified nodules, nodules
behind heart or diaphragm; loculated, subpulmonic or supine (layering) effusions, and what fluid does to the
mediastinum; disease that stays or grows over a patient's studies (findings are drawn anew); differences between
children and adults, and any link of age or sex to disease. Scores on phantoms say whether a method can find planted
signal; they say nothing about patients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import overload

import cv2
import numpy as np
import torch

from otcxr.data.phantom_anatomy import (
    FIELD_MM,
    Anatomy,
    Array,
    Study,
    chest,
    draw_anatomy,
    draw_study,
    fluid_extent,
    fluid_top,
    heart_depth,
    lung_field,
    lung_outline,
    ramp,
    to_body,
    to_image,
)
from otcxr.data.records import Box, Collection, ImageRef, Radiograph, Record, full_valid
from otcxr.errors import ConfigError, did_you_mean

__all__ = ["FINDINGS", "PhantomConfig", "PhantomImage", "parse_phantom", "read_phantom", "render"]

FINDINGS = ("Nodule", "Effusion")
SOFT, BONE = 0.0180, 0.0220  # attenuation per mm: soft tissue; what bone adds to it
LUNG = 0.26  # density of lung relative to soft tissue


@dataclasses.dataclass(frozen=True)
class PhantomConfig:
    """Settings of a set of phantoms.

    Attributes:
        count: Number of images, >= 1. Image i does not depend on it.
        seed: >= 0; another seed is another population.
        size: Height and width in pixels, 32 to 1024; the field stays 400 mm, so small sizes show less detail.
        nodule_prevalence: Share of studies with 1 to 3 nodules, in [0, 1].
        effusion_prevalence: Share of studies with pleural fluid on one or both sides, in [0, 1].
        noise: Relative standard deviation of the counts behind 120 mm of soft tissue at 256 pixels, in [0, 1]; a
            larger pixel collects more quanta, so the noise falls with the size. 0 renders without noise.
        lesion_size: Factor in [0.5, 2] on the radius of nodules (1: 5 to 20 mm) and on the height of fluid (1: up to a
            third of the lung). Larger ones are easier to find.

    Raises:
        ConfigError: A setting is out of its range.
    """

    count: int
    seed: int = 0
    size: int = 256
    nodule_prevalence: float = 0.35
    effusion_prevalence: float = 0.35
    noise: float = 0.02
    lesion_size: float = 1.0

    def __post_init__(self) -> None:
        ranges = {"count": (1, 10**8), "seed": (0, 2**32 - 1), "size": (32, 1024)}
        factors = {"lesion_size": (0.5, 2.0)}
        for field in dataclasses.fields(self):
            whole = field.name in ranges
            low, high = {**ranges, **factors}.get(field.name, (0, 1))
            value = getattr(self, field.name)
            if not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
                kind, example = (
                    ("whole number", "2000,seed=100,size=96") if whole else ("number", f"2000,{field.name}=0.5")
                )
                raise ConfigError(
                    f"phantom setting {field.name} is {value!r} but must be a {kind} in [{low}, {high}]; "
                    f"write for example 'phantom:{example}'"
                )


def parse_phantom(text: str) -> PhantomConfig:
    """Read settings from the part of a source after ``phantom:``, such as ``"2000,seed=100,size=96"``.

    Raises:
        ConfigError: A key is unknown or repeated, a value is no number, or a setting is out of its range.
    """
    kinds = {field.name: int if field.name in ("count", "seed", "size") else float
             for field in dataclasses.fields(PhantomConfig)}  # fmt: skip
    values: dict[str, float] = {}
    for position, part in enumerate(text.split(",")):
        key, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals:
            key, number = ("count", key) if position == 0 else (key, "")
        if key not in kinds:
            raise ConfigError(f"unknown phantom setting '{key}' in 'phantom:{text}'{did_you_mean(key, kinds)}")
        if key in values:
            raise ConfigError(f"phantom setting '{key}' is given twice in 'phantom:{text}'; keep one")
        try:
            values[key] = kinds[key](number)
        except ValueError:
            what = "a whole number" if kinds[key] is int else "a number"
            raise ConfigError(
                f"phantom setting {key} in 'phantom:{text}' must be {what}, got '{number}'; "
                "write for example 'phantom:2000,seed=100,size=96'"
            ) from None
    if "count" not in values:
        raise ConfigError(f"'phantom:{text}' lacks the number of images; write for example 'phantom:2000,size=96'")
    return PhantomConfig(**values)  # type: ignore[arg-type]  # ints where ints belong, by `kinds`


class _Table:
    """Who is in the set: patients in order, each with 1 to 4 studies, until ``count`` images are reached."""

    def __init__(self, seed: int, count: int) -> None:
        rows = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,))).random((count, 4))
        studies = 1 + np.searchsorted([0.4, 0.7, 0.9], rows[:, 0], side="right")
        patients = np.repeat(np.arange(count), studies)[:count]
        first = np.cumsum(studies) - studies
        self.patient: list[int] = patients.tolist()
        self.study: list[int] = (np.arange(count) - first[patients] + 1).tolist()  # from 1
        self.split = np.array(["train", "val", "test"])[np.searchsorted([0.7, 0.8], rows[:, 1], side="right")].tolist()
        self.sex: list[str] = np.where(rows[:, 2] < 0.5, "F", "M").tolist()
        self.age: list[float] = np.floor(18.0 + 72.0 * rows[:, 3]).tolist()


@lru_cache(maxsize=8)
def _table(seed: int, count: int) -> _Table:
    return _Table(seed, count)


@lru_cache(maxsize=64)
def _scene(config: PhantomConfig, index: int) -> tuple[Anatomy, Study]:
    """The anatomy, as breathed in this study, and the study of an image."""
    table = _table(config.seed, config.count)
    patient, number = table.patient[index], table.study[index]
    anatomy = draw_anatomy(config.seed, patient, table.sex[patient])
    prevalences = (config.nodule_prevalence, config.effusion_prevalence)
    study = draw_study(anatomy, config.seed, patient, number, prevalences, config.lesion_size)
    return chest(anatomy, study), study


@dataclasses.dataclass(frozen=True, slots=True)
class PhantomImage:
    """One layer of one phantom: ``"image"``, or the mask ``"lungs"``, ``"heart"``, ``"Nodule"`` or ``"Effusion"``."""

    config: PhantomConfig
    index: int
    layer: str = "image"

    def __str__(self) -> str:
        return f"phantom-{self.index:06d}" + ("" if self.layer == "image" else f"-{self.layer}")

    def radiograph(self) -> Radiograph:
        """Render the layer: (1, size, size) float32, in [0, 1] for the image, 0 or 1 for a mask."""
        pixels = render(self.config, self.index) if self.layer == "image" else _mask(self)
        image = torch.from_numpy(pixels)[None]
        return Radiograph(image, full_valid(image), (FIELD_MM / self.config.size,) * 2)


class _Records(Sequence[Record]):
    """The records of a set, each made when it is asked for; no pixel is rendered."""

    def __init__(self, config: PhantomConfig) -> None:
        self._config = config

    def __len__(self) -> int:
        return self._config.count

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} phantoms")
        return self._record(index % len(self))

    def __iter__(self) -> Iterator[Record]:
        return (self._record(i) for i in range(len(self)))

    def _record(self, index: int) -> Record:
        config = self._config
        table = _table(config.seed, config.count)
        patient, number = table.patient[index], table.study[index]
        body, study = _scene(config, index)
        pitch = FIELD_MM / config.size
        boxes = [
            _box("Nodule", n.x - r, n.y - r, n.x + r, n.y + r, pitch)
            for n in study.nodules for r in [_seen_radius(n.radius, pitch)]
        ] + [_box("Effusion", *fluid_extent(body, study, fluid), 2 * pitch) for fluid in study.fluids]  # fmt: skip
        labels = {"Nodule": int(bool(study.nodules)), "Effusion": int(bool(study.fluids))}
        layers = ["lungs", "heart", *(name for name in FINDINGS if labels[name])]
        masks: dict[str, ImageRef] = {layer: PhantomImage(config, index, layer) for layer in layers}
        return Record(
            image=PhantomImage(config, index), study=f"P{patient:05d}-{number}", patient=f"P{patient:05d}",
            sex=table.sex[patient], age=table.age[patient], view=study.view,
            source="phantom", spacing=(pitch, pitch), labels=labels, boxes=tuple(boxes), masks=masks,
            split=table.split[patient],
        )  # fmt: skip


def read_phantom(text: str) -> Collection:
    """Open a set of phantoms, for example ``read_phantom("2000,seed=100,size=96")``.

    Patients have 1 to 4 studies; 70 % of the patients are "train", 10 % "val", 20 % "test". Records are made on demand.

    Raises:
        ConfigError: See `parse_phantom`.
    """
    return Collection("phantom:" + text, FINDINGS, _Records(parse_phantom(text)))


def _box(finding: str, left: float, top: float, right: float, bottom: float, pitch: float) -> Box:
    """A box in [0, 1] from an extent in mm of the image frame, grown by half of ``pitch`` to hold whole pixels."""
    edges = (left - pitch / 2, top - pitch / 2, right + pitch / 2, bottom + pitch / 2)
    x0, y0, x1, y1 = (min(max(edge / FIELD_MM + 0.5, 0.0), 1.0) for edge in edges)
    return Box(finding, x0, y0, x1 - x0, y1 - y0)


def _seen_radius(radius: float, pitch: float) -> float:
    """Radius of a nodule's disc: at least what always holds the centre of one pixel."""
    return max(radius, 0.72 * pitch)


@lru_cache(maxsize=4)
def _axis(size: int) -> Array:
    """Centres of the pixels along one side in mm of the image frame."""
    axis = ((np.arange(size) + 0.5) / size - 0.5) * FIELD_MM
    return axis.astype(np.float32)


def _body_grid(study: Study, size: int) -> tuple[Array, Array]:
    axis = _axis(size)
    x, v = to_body(study, axis[None, :], axis[:, None])
    return x, v


def _mask(image: PhantomImage) -> Array:
    """The pixels of a mask, (size, size) float32, 0 or 1."""
    size = image.config.size
    body, study = _scene(image.config, image.index)
    if image.layer == "Nodule":
        axis, inside = _axis(size), np.zeros((size, size), np.bool_)
        for nodule in study.nodules:
            r = _seen_radius(nodule.radius, FIELD_MM / size)
            inside |= (axis[None, :] - nodule.x) ** 2 + (axis[:, None] - nodule.y) ** 2 <= r * r
        return inside.astype(np.float32)
    x, v = _body_grid(study, size)
    if image.layer == "heart":
        return (heart_depth(body, x, v) > 0).astype(np.float32)
    inside = lung_field(body, x, v)
    if image.layer == "Effusion":
        wet = np.zeros_like(inside)
        for fluid in study.fluids:
            part = inside & (v > fluid_top(body, fluid, x))
            if not part.any():  # a blunted angle between the centres of very large pixels
                left, top, right, bottom = fluid_extent(body, study, fluid)
                part[
                    int(size * ((top + bottom) / 2 / FIELD_MM + 0.5)), int(size * ((left + right) / 2 / FIELD_MM + 0.5))
                ] = True
            wet |= part
        return wet.astype(np.float32)
    if image.layer != "lungs":
        known = ("image", "lungs", "heart", *FINDINGS)
        raise ConfigError(f"a phantom has no layer '{image.layer}'" + did_you_mean(image.layer, known))
    return inside.astype(np.float32)


def render(config: PhantomConfig, index: int, *, findings: bool = True) -> Array:
    """Render one phantom, (size, size) float32 in [0, 1].

    Args:
        config: The set.
        index: Which image of it.
        findings: False leaves nodules and fluid out and changes nothing else: the same patient, pose and noise.
    """
    body, study = _scene(config, index)
    if not findings:
        study = study._replace(nodules=(), fluids=())
    integral = _integral(body, study, config.size)
    table = _table(config.seed, config.count)
    key = [config.seed, table.patient[index], table.study[index]]
    rng = np.random.default_rng(np.random.SeedSequence(key, spawn_key=(2,)))
    return _detect(integral, study, config, rng)


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
    axis = _axis(len(image))
    ends = np.asarray(points, dtype=np.float32)
    px, py = to_image(study, ends[:, 0], ends[:, 1])
    steps = len(points) - 1
    widths = [study.zoom * (radius[0] + (radius[1] - radius[0]) * k / steps) for k in range(steps + 1)]
    for k in range(steps):
        a, b = (float(px[k]), float(py[k])), (float(px[k + 1]), float(py[k + 1]))
        _tube(image, axis, a, b, (widths[k], widths[k + 1]))


def _integral(body: Anatomy, study: Study, size: int) -> Array:
    """Sum of mu * path over body, lungs, heart, fluid, nodules and bones, (size, size) float32."""
    x, v = _body_grid(study, size)
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
        _tube(sphere, _axis(size), (n.x, n.y), (n.x, n.y), (n.radius, n.radius))
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


def _detect(integral: Array, study: Study, config: PhantomConfig, rng: np.random.Generator) -> Array:
    """From the integral to grey values: primary and scattered counts, blur, noise, logarithm, window."""
    size = config.size
    counts = np.exp(-integral)
    wide = cv2.resize(counts * integral, (24, 24), interpolation=cv2.INTER_AREA)
    wide = cv2.GaussianBlur(wide, (0, 0), 2.5)
    counts = counts + 0.3 * study.scatter * cv2.resize(wide, (size, size), interpolation=cv2.INTER_CUBIC)
    counts = np.asarray(cv2.GaussianBlur(counts, (0, 0), 0.35 + 0.2 * size / 256), dtype=np.float32)
    if config.noise:
        reference = math.exp(-120.0 * SOFT)
        level = config.noise * size / 256 * math.sqrt(reference / study.exposure)
        grain = rng.standard_normal((size, size), dtype=np.float32)
        counts = np.asarray(counts + level * np.sqrt(counts) * grain, dtype=np.float32)
    dark = -np.log(np.maximum(counts, 1e-4))
    step = max(size // 96, 1)
    low, high = np.percentile(dark[::step, ::step], (2.5, 99.0))
    floor, ceiling, gamma = study.window
    grey = np.clip((dark - low) / max(high - low, 1e-3), 0.0, 1.0) ** gamma
    return np.asarray(floor + (ceiling - floor) * grey, dtype=np.float32)
