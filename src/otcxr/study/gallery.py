"""The failures of a study: where all methods miss, where only the reference is right, where only a rival is.

Right is a method on an image with a finding where the strongest place of its Grad-CAM lies inside the region: the
measure ``pointing`` of the cells of ``localize-linear``, one seed, largest share of labels. So images are chosen from
cells, and heat maps are drawn for these alone, with the trainings that the study left in its folder of runs. Of every
group and finding the same number is taken, in an order that depends on nothing but names; scores play no part.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from otcxr.attribution import heat_map
from otcxr.console import Progress
from otcxr.data.images import fit_square
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.labelled import Material, draw_labels
from otcxr.evaluation.localize import SIZES
from otcxr.evaluation.overlap import Frame, box_overlap, otsu_threshold, peak_box, pointing, scaled
from otcxr.evaluation.protocols import Features, device_of
from otcxr.evaluation.tasks import protocol_config
from otcxr.evaluation.truth import Truth
from otcxr.files import write_atomic
from otcxr.nn.encoder import Encoder, load_encoder
from otcxr.overlay import FOUND, TRUE, frames, overlay
from otcxr.runs import Run
from otcxr.study.cells import Views, chosen_point, read_cell, run_folder, unpack, untrained
from otcxr.study.spec import IMAGENET, RANDOM, Study, Unit
from otcxr.study.tasks import ENCODER_TASKS

__all__ = ["GROUPS", "Chosen", "choose", "groups_of", "make_gallery"]

TASK = "localize-linear"
GROUPS = {
    "all miss": "no method points at it",
    "only the reference": "only {reference} points at it",
    "only a rival": "one method points at it, and it is not {reference}",
}
_SIDE = 192  # of a picture, at least


class Chosen(NamedTuple):
    """An image and finding of the gallery.

    Attributes:
        row: Of the test images.
        finding: Index.
        group: A key of ``GROUPS``.
    """

    row: int
    finding: int
    group: str


def groups_of(hits: Mapping[str, NDArray[np.bool_]], reference: str) -> dict[str, NDArray[np.bool_]]:
    """Which (image, finding) pairs belong to each of ``GROUPS``, (N, F)."""
    own = hits[reference]
    others = np.sum([hit for name, hit in hits.items() if name != reference], axis=0)
    return {
        "all miss": np.asarray(~own & (others == 0)),
        "only the reference": np.asarray(own & (others == 0)),
        "only a rival": np.asarray(~own & (others == 1)),
    }


def choose(
    hits: Mapping[str, NDArray[np.bool_]], shown: NDArray[np.bool_], reference: str, names: Sequence[str], each: int
) -> list[Chosen]:
    """Choose up to ``each`` images of every group and finding.

    Args:
        hits: Method -> (N, F), whether it points at the region; untrained networks are none.
        shown: (N, F), where there is a region and every method was judged.
        reference: The method that is compared with the others.
        names: Of the images, which alone decide their order.
        each: Images of a group and finding.
    """
    order = sorted(range(len(names)), key=lambda row: hashlib.sha256(names[row].encode()).digest())
    return [
        Chosen(row, f, group)
        for group, found in groups_of(hits, reference).items()
        for f in range(shown.shape[1])
        for row in [row for row in order if shown[row, f] and found[row, f]][:each]
    ]


def make_gallery(
    study: Study, out: Path, runs: Path, progress: Progress, *, each: int = 2, seed: int | None = None
) -> dict[str, Any]:
    """Draw the gallery of a study; writes ``gallery.json`` (pictures inside), which the study's page shows.

    Args:
        study: With the task ``localize-linear``.
        out: Folder of the cells.
        runs: Folder of the trainings.
        progress: Where to show progress.
        each: Images of a group and finding.
        seed: One of the study's, whose trainings are there; None: its first.
    Returns: What was written.
    Raises:
        DataError: the study has no such task, its cells are not there, or its trainings were removed.
        ConfigError: the study has no such seed.
    """
    if TASK not in study.tasks:
        raise DataError(
            f"the gallery shows where heat maps point; add the task {TASK} to judge.tasks and run the study"
        )
    seed = study.seeds[0] if seed is None else seed
    if seed not in study.seeds:
        raise ConfigError(f"the study has no seed {seed}; it has {', '.join(map(str, study.seeds))}")
    cells = {}
    for row in study.rows:
        cell = read_cell(study, Unit(row.name, seed), out, TASK, chosen_point(study, out, row.name))
        if cell is not None:
            cells[row.name] = cell
    trained = [name for name in cells if name not in (RANDOM, IMAGENET)]
    if study.reference not in trained or len(trained) < 2:
        raise DataError(f"the gallery needs the cells of {study.reference} and of another method, seed {seed}; run the "
                        "study first")  # fmt: skip
    share = max(cells[study.reference]["shares"], key=float)
    views = Views(study)
    material = views(TASK)
    part = material.tests[study.test]
    of = {name: cell["shares"][share] for name, cell in cells.items()}
    fitted = np.all([one["fitted"] for one in of.values()], axis=0)
    hits = {name: unpack(of[name]["tests"][study.test]["pointing"]) > 0.5 for name in trained}
    names = [record.name for record in part.records]
    shown = (part.labels == 1) & fitted
    chosen = choose(hits, shown, study.reference, names, each)
    maps: dict[str, list[NDArray[np.float64]]] = {}
    scores: dict[str, NDArray[np.float64]] = {}
    with progress.bar("gallery", len(cells), "methods") as bar:
        for done, name in enumerate(cells):
            encoder, cache = _encoder(study, Unit(name, seed), out, runs, views(""))
            maps[name], scores[name] = _maps(study, encoder, cache, material, chosen, float(share), seed, progress)
            bar(done + 1)
    entries = [_entry(study, material, one, k, maps, scores) for k, one in enumerate(chosen)]
    counts = {group: int((shown & found).sum()) for group, found in groups_of(hits, study.reference).items()}
    result = {
        "reference": study.reference, "methods": list(cells), "trained": trained, "seed": seed, "share": float(share),
        "groups": {group: text.format(reference=study.reference) for group, text in GROUPS.items()}, "counts": counts,
        "pairs": int(shown.sum()), "entries": entries,
    }  # fmt: skip
    write_atomic(out / "gallery.json", json.dumps(result, allow_nan=False) + "\n")
    return result


def _encoder(study: Study, unit: Unit, out: Path, runs: Path, whole: Material) -> tuple[Encoder, Path | None]:
    """The encoder of a unit, and the folder in which judging it left features."""
    config = study.config(unit, chosen_point(study, out, unit.row))
    if config is None:
        return untrained(study, unit, whole), None
    folder = run_folder(study, unit, config, runs)
    if not (folder / "encoder.safetensors").is_file():
        raise DataError(f"the training of {unit.name} is not in {runs} any more; run the study again with --runs "
                        f"{runs}, or say where its trainings are")  # fmt: skip
    return load_encoder(folder), Run(folder).features


def _maps(
    study: Study,
    encoder: Encoder,
    cache: Path | None,
    material: Material,
    chosen: Sequence[Chosen],
    share: float,
    seed: int,
    progress: Progress,
) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
    """Heat maps of the chosen images, and logits (N, F) of all test images."""
    assert material.classes is not None
    how = protocol_config(study.evaluate)
    encoder = encoder.to(device_of(study.evaluate.accelerator))
    features = Features(encoder, material, how, cache, progress, "gallery")
    given = draw_labels(material, share, study.evaluate.seed + seed)
    scored = ENCODER_TASKS["linear"].score(features, material.classes, given, how, progress)
    assert scored.model is not None
    model = scored.model.to(next(encoder.parameters()).device).eval()
    records = material.tests[study.test].records
    out = []
    for one in chosen:
        image = fit_square(material.pixels.get(records[one.row].image).image, how.size)[None]
        heat = heat_map(model, image.to(model.probe.weight.device), one.finding)[0]
        out.append(np.asarray(heat.detach().cpu().numpy(), dtype=np.float64))
    return out, scored.tests[study.test]["score"]


def _entry(
    study: Study, material: Material, one: Chosen, k: int, maps: Mapping[str, list[NDArray[np.float64]]],
    scores: Mapping[str, NDArray[np.float64]],
) -> dict[str, Any]:  # fmt: skip
    assert material.masks is not None
    record, finding = material.tests[study.test].records[one.row], material.findings[one.finding]
    truth = material.truth(record, one.finding)
    image = fit_square(material.pixels.get(record.image).image, material.masks.size)[0].numpy()
    top = max(float(own[k].max()) for own in maps.values())
    methods = {}
    for name, own in maps.items():
        heat = own[k]
        values = scaled(heat)
        found = peak_box(values, otsu_threshold(values)) if heat.max() > 0 else None
        logits = scores[name][:, one.finding]
        methods[name] = {
            "score": float(logits[one.row]), "percentile": float((logits < logits[one.row]).mean()),
            "peak": float(heat.max()), "hit": pointing(heat, truth.mask) > 0.5,
            "iou": box_overlap(found, list(truth.boxes))[0],
            "box": None if found is None else [float(v) for v in found],
            "picture": _picture(image, heat, top, truth, found),
        }  # fmt: skip
    size = next(name for name, (low, high) in SIZES.items() if low <= truth.share < high)
    return {
        "image": record.name, "finding": finding, "view": record.view or "unknown", "size": size, "group": one.group,
        "share": truth.share, "radiograph": _picture(image, None, 0.0, truth, None), "methods": methods,
    }  # fmt: skip


def _picture(
    image: NDArray[np.floating[Any]], heat: NDArray[np.float64] | None, top: float, truth: Truth, found: Frame | None
) -> str:
    """A JPEG as data URI: the heat map over the radiograph, the true boxes and the one that was found."""
    factor = max(1, round(_SIDE / len(image)))
    side = factor * len(image)

    def large(values: NDArray[Any]) -> NDArray[Any]:
        return cv2.resize(values, (side, side), interpolation=cv2.INTER_LINEAR)

    shown = overlay(large(image), large(heat) if heat is not None else np.zeros((side, side)), top)
    shown = frames(shown, [tuple(factor * v for v in box) for box in truth.boxes], TRUE)  # type: ignore[misc]
    if found is not None:
        shown = frames(shown, [tuple(factor * v for v in found)], FOUND)  # type: ignore[list-item]
    done, data = cv2.imencode(".jpg", shown[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
