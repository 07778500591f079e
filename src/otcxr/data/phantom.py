"""Synthetic frontal chest radiographs with planted findings: the source ``phantom:N,seed=S,size=P``.

A phantom is computed, never stored: a record names (settings, index, layer), and pixels are rendered when they are
read, the same bytes in any order and any process. Its parts:

    phantom_anatomy    the body: sizes, surfaces, how a visit poses it
    phantom_geometry   rays from a point-like focus through the body to the detector
    phantom_findings   disease: drawn, placed, outlined
    phantom_tubes      vessels, bones of the limbs, lines
    phantom_devices    pacemakers, lines, electrodes, the side marker
    phantom_render     attenuation along every ray, then the detector

What physics is in it and what is not is in docs/phantoms.md. Scores on phantoms say whether a method can find planted
signal; they say nothing about patients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from otcxr.data.phantom_anatomy import Anatomy, Study, draw_anatomy, draw_study, heart_square, seen
from otcxr.data.phantom_findings import FINDINGS, Disease, draw_disease, extents, outlines
from otcxr.data.phantom_geometry import Array, grid_rays
from otcxr.data.phantom_render import attenuation, detect, shutter_open
from otcxr.data.records import Box, Collection, ImageRef, Radiograph, Record
from otcxr.errors import ConfigError, did_you_mean

__all__ = [
    "FINDINGS", "PhantomConfig", "PhantomImage", "Planted", "parse_phantom", "planted", "read_phantom", "render",
]  # fmt: skip

_SHARES = tuple(f"{finding.lower()}_prevalence" for finding in FINDINGS)
_WHOLE = {"count": (1, 10**6), "seed": (0, 2**32 - 1), "size": (32, 1024)}
_RANGES = {"lesion_size": (0.5, 2.0), "contrast": (0.1, 1.5), "devices": (0.0, 2.0)}  # all others: [0, 1]


@dataclasses.dataclass(frozen=True)
class PhantomConfig:
    """Settings of a set of phantoms.

    Attributes:
        count: Number of images, >= 1. Image i does not depend on it.
        seed: >= 0; another seed is another population.
        size: Height and width in pixels, 32 to 1024. The field of view does not change with it (drawn per study, some
            400 mm), so small sizes show less detail.
        prevalence: Share of studies (of patients for nodule, mass and cardiomegaly, which stay) with each finding that
            has no share of its own below, in [0, 1].
        nodule_prevalence: Share of patients with 1 to 3 nodules, in [0, 1]; None takes ``prevalence``.
        mass_prevalence: Share of patients with a mass.
        consolidation_prevalence: Share of studies with consolidated lung.
        effusion_prevalence: Share of studies with pleural fluid on one or both sides.
        pneumothorax_prevalence: Share of studies with a pneumothorax.
        cardiomegaly_prevalence: Share of patients with an enlarged heart.
        edema_prevalence: Share of studies with edema of the lungs.
        noise: Relative standard deviation of the counts behind 120 mm of soft tissue in a pixel of 1.56 mm, before the
            blur, in [0, 1]; a larger pixel collects more quanta, so the noise of a small picture is less. 0: none.
        contrast: Factor in [0.1, 1.5] on what a lesion changes in the attenuation (not on the size of the heart). With
            ``noise`` it sets the signal-to-noise ratio. Fluid and pneumothorax change nothing more above 1.
        lesion_size: Factor in [0.5, 2] on the radius of nodules (1: 4 to 15 mm), masses (16 to 34 mm) and patches, on
            the height of fluid (1: up to a third of the lung) and the gap of a pneumothorax (its root).
        devices: Factor in [0, 2] on how often pacemakers, wires, lines, tubes and electrodes are there.

    Raises:
        ConfigError: A setting is out of its range.
    """

    count: int
    seed: int = 0
    size: int = 256
    prevalence: float = 0.2
    nodule_prevalence: float | None = None
    mass_prevalence: float | None = None
    consolidation_prevalence: float | None = None
    effusion_prevalence: float | None = None
    pneumothorax_prevalence: float | None = None
    cardiomegaly_prevalence: float | None = None
    edema_prevalence: float | None = None
    noise: float = 0.02
    contrast: float = 1.0
    lesion_size: float = 1.0
    devices: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in _SHARES and value is None:
                continue
            low, high = {**_WHOLE, **_RANGES}.get(name, (0, 1))
            if not isinstance(value, int if name in _WHOLE else (int, float)) or not low <= value <= high:
                kind, example = ("whole number", "2000,seed=100,size=96") if name in _WHOLE else (
                    "number", f"2000,{name}={min(0.5, high)}")  # fmt: skip
                raise ConfigError(
                    f"phantom setting {name} is {value!r} but must be a {kind} in [{low}, {high}]; "
                    f"write for example 'phantom:{example}'"
                )

    def prevalences(self) -> tuple[float, ...]:
        """The share of each of `FINDINGS`."""
        own = (getattr(self, name) for name in _SHARES)
        return tuple(self.prevalence if share is None else share for share in own)


class Planted(NamedTuple):
    """A finding of one phantom, severity in [0, 1] (0: barely there), and its boxes."""

    finding: str
    severity: float
    boxes: tuple[Box, ...]


def parse_phantom(text: str) -> PhantomConfig:
    """Read settings from the part of a source after ``phantom:``, such as ``"2000,seed=100,size=96"``.

    Raises:
        ConfigError: A key is unknown or repeated, a value is no number, or a setting is out of its range.
    """
    kinds = {field.name: int if field.name in _WHOLE else float for field in dataclasses.fields(PhantomConfig)}
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
def _scene(config: PhantomConfig, index: int, findings: bool = True) -> tuple[Anatomy, Study, Disease]:
    """The anatomy as this study shows it, the study, and its findings (none of them without ``findings``)."""
    table = _table(config.seed, config.count)
    patient, number = table.patient[index], table.study[index]
    anatomy = draw_anatomy(config.seed, patient, table.sex[patient], config.devices)
    study = draw_study(anatomy, config.seed, patient, number, config.devices)
    shares = config.prevalences() if findings else (0.0,) * len(FINDINGS)
    body, disease = draw_disease(anatomy, study, (config.seed, patient, number), shares, config.lesion_size)
    return body, study, disease


@dataclasses.dataclass(frozen=True, slots=True)
class PhantomImage:
    """One layer of one phantom: ``"image"``, or the mask ``"lungs"``, ``"heart"`` or that of a finding."""

    config: PhantomConfig
    index: int
    layer: str = "image"

    def __str__(self) -> str:
        return f"phantom-{self.index:06d}" + ("" if self.layer == "image" else f"-{self.layer}")

    def radiograph(self) -> Radiograph:
        """Render the layer: (1, size, size) float32, in [0, 1] for the image, 0 or 1 for a mask.

        What the collimator covers is not valid.
        """
        size = self.config.size
        _, study, _ = _scene(self.config, self.index)
        pixels = render(self.config, self.index) if self.layer == "image" else _mask(self)
        valid = torch.from_numpy(shutter_open(study, size))[None]
        return Radiograph(torch.from_numpy(pixels)[None], valid, (study.geometry.field / size,) * 2)


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
            return [_record(self._config, i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} phantoms")
        return _record(self._config, index % len(self))

    def __iter__(self) -> Iterator[Record]:
        return (_record(self._config, i) for i in range(len(self)))

    def column(self, name: str) -> list[Any]:
        """One field of all records; who is in which split is known before anything is drawn."""
        table, people = _table(self._config.seed, self._config.count), range(len(self))
        if name == "patient":
            return [_patient(table, i) for i in people]
        if name == "split":
            return [table.split[table.patient[i]] for i in people]
        return [getattr(record, name) for record in self]


def _patient(table: _Table, index: int) -> str:
    return f"P{table.patient[index]:05d}"


@lru_cache(maxsize=10_000)  # boxes are looked for on a lattice
def _record(config: PhantomConfig, index: int) -> Record:
    table = _table(config.seed, config.count)
    patient, number = table.patient[index], table.study[index]
    body, study, disease = _scene(config, index)
    labels = {f: int(level is not None) for f, level in zip(FINDINGS, disease.severity, strict=True)}
    present = [finding for finding in FINDINGS if labels[finding]]
    boxes = [box for finding in present for box in _boxes(config, body, study, disease, finding) if box is not None]
    masks: dict[str, ImageRef] = {layer: PhantomImage(config, index, layer) for layer in ("lungs", "heart", *present)}
    return Record(
        image=PhantomImage(config, index), study=f"{_patient(table, index)}-{number}", patient=_patient(table, index),
        sex=table.sex[patient], age=table.age[patient], view=study.view, source="phantom",
        spacing=(study.geometry.field / config.size,) * 2, labels=labels, boxes=tuple(boxes), masks=masks,
        split=table.split[patient],
    )  # fmt: skip


def read_phantom(text: str) -> Collection:
    """Open a set of phantoms, for example ``read_phantom("2000,seed=100,size=96")``.

    Patients have 1 to 4 studies; 70 % of the patients are "train", 10 % "val", 20 % "test". Records are made on demand.

    Raises:
        ConfigError: See `parse_phantom`.
    """
    return Collection("phantom:" + text, FINDINGS, _Records(parse_phantom(text)))


def planted(config: PhantomConfig, index: int) -> tuple[Planted, ...]:
    """What one phantom holds, in the order of `FINDINGS`."""
    body, study, disease = _scene(config, index)
    return tuple(
        Planted(finding, severity, tuple(b for b in _boxes(config, body, study, disease, finding) if b is not None))
        for finding, severity in zip(FINDINGS, disease.severity, strict=True)
        if severity is not None
    )


def _boxes(config: PhantomConfig, body: Anatomy, study: Study, disease: Disease, finding: str) -> list[Box | None]:
    """Boxes in pixels that hold every whole pixel of the finding's outlines, cut to the picture; None where none is."""
    pitch, field = study.geometry.field / config.size, study.geometry.field
    grow = pitch / 2 if finding in ("Nodule", "Mass", "Cardiomegaly") else pitch
    boxes: list[Box | None] = []
    for extent in extents(body, study.geometry, _seen(disease, pitch), finding):
        if extent is None:
            boxes.append(None)
            continue
        left, top, right, bottom = extent
        edges = (left - grow, top - grow, right + grow, bottom + grow)
        x0, y0, x1, y1 = (config.size * min(max(edge / field + 0.5, 0.0), 1.0) for edge in edges)
        boxes.append(Box(finding, x0, y0, x1 - x0, y1 - y0))
    return boxes


def _seen(disease: Disease, pitch: float) -> Disease:
    """The findings with nodules as large as a disc that always holds the centre of one pixel."""
    return disease._replace(nodules=tuple(n._replace(radius=max(n.radius, 0.76 * pitch)) for n in disease.nodules))


def _mask(image: PhantomImage) -> Array:
    """The pixels of a mask, (size, size) float32, 0 or 1."""
    config, layer = image.config, image.layer
    body, study, disease = _scene(config, image.index)
    rays = grid_rays(study.geometry, config.size)
    if layer == "lungs":
        return seen(body, rays).astype(np.float32)
    if layer == "heart":
        return (heart_square(body, rays) > 0).astype(np.float32)
    if layer not in FINDINGS:
        known = ("image", "lungs", "heart", *FINDINGS)
        raise ConfigError(f"a phantom has no layer '{layer}'" + did_you_mean(layer, known))
    inside = np.zeros((config.size, config.size), np.bool_)
    if disease.severity[FINDINGS.index(layer)] is None:
        return inside.astype(np.float32)
    pitch = study.geometry.field / config.size
    parts = outlines(body, _seen(disease, pitch), layer, rays)
    for part, box in zip(parts, _boxes(config, body, study, disease, layer), strict=True):
        if box is None:
            continue
        # a lattice has found the box: a pixel of a thin tip that it has missed belongs to no box, so to no mask
        left, top = math.ceil(box.x - 1e-3), math.ceil(box.y - 1e-3)
        right, bottom = math.floor(box.x + box.width + 1e-3), math.floor(box.y + box.height + 1e-3)
        held = np.zeros_like(part)
        held[top:bottom, left:right] = part[top:bottom, left:right]
        if not held.any():  # smaller than the distance between the centres of large pixels
            held[int(box.y + box.height / 2), int(box.x + box.width / 2)] = True
        part[:] = held
        inside |= part
    return inside.astype(np.float32)


def render(config: PhantomConfig, index: int, *, findings: bool = True) -> Array:
    """Render one phantom, (size, size) float32 in [0, 1].

    Args:
        config: The set.
        index: Which image of it.
        findings: False leaves all disease out and changes nothing else: the same patient, pose, exposure and noise.
    """
    body, study, disease = _scene(config, index, findings)
    integral = attenuation(body, study, disease, config.contrast, config.size)
    table = _table(config.seed, config.count)
    key = [config.seed, table.patient[index], table.study[index]]
    rng = np.random.default_rng(np.random.SeedSequence(key, spawn_key=(2,)))
    return detect(integral, study, config.noise, rng)
