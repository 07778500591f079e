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
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import overload

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
)
from otcxr.data.phantom_render import attenuation, axis_mm, body_grid, detect
from otcxr.data.records import Box, Collection, ImageRef, Radiograph, Record, full_valid
from otcxr.errors import ConfigError, did_you_mean

__all__ = ["FINDINGS", "PhantomConfig", "PhantomImage", "parse_phantom", "read_phantom", "render"]

FINDINGS = ("Nodule", "Effusion")


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
            _box("Nodule", n.x - r, n.y - r, n.x + r, n.y + r, pitch, config.size)
            for n in study.nodules for r in [_seen_radius(n.radius, pitch)]
        ]  # fmt: skip
        boxes += [_box("Effusion", *fluid_extent(body, study, fluid), 2 * pitch, config.size) for fluid in study.fluids]
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


def _box(finding: str, left: float, top: float, right: float, bottom: float, grow: float, size: int) -> Box:
    """A box in pixels from an extent in mm of the image frame, grown by half of ``grow`` (mm) to hold whole pixels."""
    edges = (left - grow / 2, top - grow / 2, right + grow / 2, bottom + grow / 2)
    x0, y0, x1, y1 = (size * min(max(edge / FIELD_MM + 0.5, 0.0), 1.0) for edge in edges)
    return Box(finding, x0, y0, x1 - x0, y1 - y0)


def _seen_radius(radius: float, pitch: float) -> float:
    """Radius of a nodule's disc: at least what always holds the centre of one pixel."""
    return max(radius, 0.72 * pitch)


def _mask(image: PhantomImage) -> Array:
    """The pixels of a mask, (size, size) float32, 0 or 1."""
    size = image.config.size
    body, study = _scene(image.config, image.index)
    if image.layer == "Nodule":
        axis, inside = axis_mm(size), np.zeros((size, size), np.bool_)
        for nodule in study.nodules:
            r = _seen_radius(nodule.radius, FIELD_MM / size)
            inside |= (axis[None, :] - nodule.x) ** 2 + (axis[:, None] - nodule.y) ** 2 <= r * r
        return inside.astype(np.float32)
    x, v = body_grid(study, size)
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
    integral = attenuation(body, study, config.size)
    table = _table(config.seed, config.count)
    key = [config.seed, table.patient[index], table.study[index]]
    rng = np.random.default_rng(np.random.SeedSequence(key, spawn_key=(2,)))
    return detect(integral, study, config.noise, rng)
