"""Does the evidence lie where the finding is? Heat maps of a classifier against expert boxes and masks.

No box or mask is trained on. The classifier is a linear probe on the frozen encoder, or the encoder fine-tuned on the
labels of images; its heat map of a finding (``attribution``) is judged on the test images that have the finding and say
where it is:

    pointing       whether the strongest place lies in the region
    energy         the share of the map's sum inside the region
    lung_energy    the share of it inside the lungs, of images with a mask of them
    region_iou     IoU of the region with what lies above Otsu's threshold of the map scaled to [0, 1]
    iou@T, iobb@T  whether the box around the joined part above that threshold that holds the strongest place has an
                   IoU, or an IoBB, of at least T with a true box

Beside it stand those who have not looked at the image, or have not learned to look:

    centre         a Gaussian at the middle of the image, with a deviation of a quarter of its side
    average        the mean of the regions of this finding in images that were fitted on (where those have none, in
                   those of the other test patients, which is more than it should know); for boxes their mean box
    random         the same classifier from a network with random weights; fine-tuned, it has learned too
    randomised     beside a fine-tuned encoder: a linear probe on random weights, whose maps should be worth nothing

Means over images have percentile intervals over resampled patients; differences are of the same resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from otcxr.attribution import HEAT_MAPS, ProbedEncoder, heat_map
from otcxr.config import to_plain
from otcxr.console import Progress, SilentProgress
from otcxr.data.images import fit_square
from otcxr.data.records import Collection
from otcxr.errors import ConfigError, DataError, did_you_mean
from otcxr.evaluation.features import calibrate_norms
from otcxr.evaluation.labelled import LabelDraw, Material, Part, draw_labels
from otcxr.evaluation.overlap import (
    Frame,
    box_overlap,
    energy_inside,
    iou,
    otsu_threshold,
    peak_box,
    pointing,
    scaled,
)
from otcxr.evaluation.protocols import Features, ProtocolConfig, Scored, device_of
from otcxr.evaluation.ratios import mean_of_ratios, ratio
from otcxr.evaluation.regions import placed
from otcxr.evaluation.resampling import patient_weights
from otcxr.evaluation.tasks import TASKS, EvaluateConfig, prepare, protocol_config, random_twin
from otcxr.evaluation.truth import Truth
from otcxr.nn.encoder import Encoder, encoder_digest
from otcxr.runs import describe_environment

__all__ = ["HEADS", "MEASURES", "OVERLAPS", "REFERENCES", "SIZES", "judge_map", "localize", "localized"]

HEADS = ("linear", "finetune")
REFERENCES = ("centre", "average", "random", "randomised")
OVERLAPS = (0.1, 0.25, 0.5, 0.75, 0.9)
MEASURES = (
    "pointing", "energy", "lung_energy", "region_iou", *(f"iou@{t}" for t in OVERLAPS), *(f"iobb@{t}" for t in OVERLAPS)
)  # fmt: skip
SIZES = {"under 1 %": (0.0, 0.01), "1 to 5 %": (0.01, 0.05), "over 5 %": (0.05, 1.01)}  # region, of the square
# settings of an evaluation that would do nothing here
_UNUSED = ("fractions", "seeds", "recalibration", "rule", "neighbours", "within", "subgroups", "segment")
_MOST = 200  # images of a finding whose regions are averaged

FloatArray = NDArray[np.float64]


def localize(
    encoder: Encoder,
    collection: Collection,
    splits: tuple[str, str],
    config: EvaluateConfig,
    *,
    head: str = "linear",
    kinds: Sequence[str] = ("grad-cam", "layer-cam"),
    val: str = "val",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge where a classifier on an encoder finds evidence.

    Args:
        encoder: The encoder.
        collection: Labelled records, some of the test split with boxes or masks of their findings.
        splits: Split to fit on, split to judge on.
        config: ``size`` must be positive; all labels and one training, so settings of shares, seeds, thresholds and
            groups are refused.
        head: One of ``HEADS``.
        kinds: Names in ``attribution.HEAT_MAPS``.
        val: Split to validate on.
        cache: Folder for features.
        progress: Where to show progress.
    Returns: For every kind under ``maps``: ``findings`` (number of images, every measure of the encoder under
        "encoder" and of the references, paired differences to each), the ``macro`` mean over findings, and ``sizes``,
        pooled over findings by the size of the region.
    Raises:
        DataError: no test image says where a finding is, or as ``labelled.gather``.
        ConfigError: an unknown head or heat map, or a setting that would do nothing.
    """
    for given, known, what in [(head, HEADS, "head"), *((kind, HEAT_MAPS, "heat map") for kind in kinds)]:
        if given not in known:
            raise ConfigError(f"unknown {what} '{given}'{did_you_mean(given, known)}; known: {', '.join(known)}")
    if not kinds:
        raise ConfigError(f"no heat map is named; known: {', '.join(HEAT_MAPS)}")
    for name in _UNUSED:
        if getattr(config, name) != getattr(EvaluateConfig(), name):
            raise ConfigError(f"eval.{name} has no effect on localisation, which takes all labels and one training; "
                              "leave it out")  # fmt: skip
    progress = progress or SilentProgress()
    whole = prepare(collection, splits, config, val, progress)
    material = placed(whole, config.size, (), progress)
    part = next(iter(material.tests.values()))
    device = device_of(config.accelerator)
    how = protocol_config(config)
    draw = draw_labels(whole, 1.0, config.seed)
    models = {}
    twin = random_twin(encoder, config.seed).to(device)
    with progress.bar("random network", len(material.fit.records), "images") as bar:
        calibrate_norms(twin, material.fit.records, config.size, config.batch_size, material.pixels, bar)
    fitted = np.ones(len(material.findings), dtype=bool)
    for name, network in (("encoder", encoder.to(device)), ("random", twin)):
        scored = TASKS[head].score(Features(network, whole, how, cache, progress, name), whole, draw, how, progress)
        assert scored.model is not None
        models[name] = scored.model.to(device).eval()
        fitted &= scored.fitted
    if head == "finetune":
        plain = TASKS["linear"].score(
            Features(twin, whole, how, cache, progress, "randomised"), whole, draw, how, progress
        )
        assert plain.model is not None
        models["randomised"] = plain.model.to(device).eval()
    means, source = _averages(material, part)
    judged = (part.labels == 1) & fitted & np.isin(np.arange(len(material.findings)), list(means))
    if not judged.any():
        raise DataError("the findings that have boxes or masks in the test split have too few labels to be fitted")
    share = np.full(judged.shape, np.nan)
    for row, f in np.argwhere(judged).tolist():
        share[row, f] = material.truth(part.records[row], f).share
    middle = _centre(config.size)

    def average(rows: Sequence[int], finding: int) -> list[tuple[FloatArray, Frame | None]]:
        return [means[finding](str(part.patients[row])) for row in rows]

    unlearned = {
        "centre": _measured(lambda rows, _f: [(middle, None)] * len(rows), material, part, judged, "centre", progress),
        "average": _measured(average, material, part, judged, "average", progress),
    }
    maps = {}
    for kind in kinds:
        learned = {
            name: _measured(
                _shown(model, material, part, kind, config.batch_size),
                material, part, judged, f"{kind}, {name}", progress,
            )
            for name, model in models.items()
        }  # fmt: skip
        maps[kind] = _tables({**learned, **unlearned}, share, part.patients, material.findings, config)
    return {
        "task": f"localize-{head}", "head": head, "encoder_digest": encoder_digest(encoder),
        "collection": collection.name,
        "splits": {role: p.summary(material.findings)
                   for role, p in (("fit", whole.fit), ("val", whole.val), ("test", whole.tests[splits[1]]))},
        "average_from": {material.findings[f]: where for f, where in source.items()},
        "maps": maps, "settings": to_plain(config), "environment": describe_environment(),
    }  # fmt: skip


def localized(
    head: str, features: Features, material: Material, draw: LabelDraw, config: ProtocolConfig, progress: Progress
) -> Scored:
    """Measure the Grad-CAM maps of a head, fitted to the labels of a draw, on all test images; a task for studies.

    Args:
        head: One of ``HEADS``.
        features, draw, config, progress: As of the protocols.
        material: Of ``regions.placed``.
    """
    assert material.classes is not None
    scored = TASKS[head].score(features, material.classes, draw, config, progress)
    assert scored.model is not None
    model = scored.model.to(next(features.encoder.parameters()).device).eval()
    tests = {}
    for name, part in material.tests.items():
        judged = (part.labels == 1) & scored.fitted
        shown = _shown(model, material, part, "grad-cam", config.batch_size)
        values = _measured(shown, material, part, judged, f"heat maps, {head}", progress)
        # a measure that some judged image does not have (no mask of the lungs) is none of this collection
        there = [k for k in range(len(MEASURES)) if not np.isnan(values[judged, k]).any()]
        tests[name] = {MEASURES[k]: np.nan_to_num(values[:, :, k]) for k in there}
    return Scored(None, tests, scored.fitted, facts=scored.facts, missing=scored.missing)


# rows of a part and a finding -> for each row its heat map, and the box that stands in for the map's own
_Shown = Callable[[Sequence[int], int], Iterable[tuple[FloatArray, Frame | None]]]


def _shown(model: ProbedEncoder, material: Material, part: Part, kind: str, batch_size: int) -> _Shown:
    """The heat maps of a classifier, so many at a time; their boxes are those of the maps."""

    def shown(rows: Sequence[int], finding: int) -> Iterator[tuple[FloatArray, Frame | None]]:
        assert material.masks is not None
        size = material.masks.size
        for start in range(0, len(rows), batch_size):
            records = [part.records[row] for row in rows[start : start + batch_size]]
            images = torch.stack([fit_square(material.pixels.get(record.image).image, size) for record in records])
            maps = heat_map(model, images.to(model.probe.weight.device), finding, kind).detach().cpu().numpy()
            for heat in maps:
                yield np.asarray(heat, dtype=np.float64), None

    return shown


def _measured(
    shown: _Shown, material: Material, part: Part, judged: NDArray[np.bool_], title: str, progress: Progress
) -> FloatArray:
    """All measures (N, F, M) of the maps that ``shown`` gives for rows and a finding; NaN where none is judged."""
    assert material.masks is not None
    values = np.full((*judged.shape, len(MEASURES)), np.nan)
    done = 0
    with progress.bar(title[:28], int(judged.sum()), "heat maps") as bar:
        for f in range(judged.shape[1]):
            rows = np.flatnonzero(judged[:, f]).tolist()
            for row, (heat, box) in zip(rows, shown(rows, f), strict=True):
                record = part.records[row]
                lungs = material.masks(record, "lungs")
                values[row, f] = judge_map(heat, material.truth(record, f), box, lungs)
                done += 1
                bar(done)
    return values


def judge_map(
    heat: NDArray[np.floating[Any]], truth: Truth, box: Frame | None = None, lungs: NDArray[np.bool_] | None = None
) -> FloatArray:
    """All ``MEASURES`` of one heat map.

    Args:
        heat: (S, S) >= 0.
        truth: Where the finding is.
        box: Stands in for the one around the map's strongest part.
        lungs: (S, S), where they are; without any ``lung_energy`` is NaN.
    """
    mask = truth.mask
    values = scaled(heat)
    threshold = otsu_threshold(values)
    overlap, of_found = box_overlap(box if box is not None else peak_box(values, threshold), list(truth.boxes))
    return np.array([
        pointing(heat, mask), energy_inside(heat, mask),
        np.nan if lungs is None else energy_inside(heat, lungs), iou(values > threshold, mask),
        *(float(overlap >= t) for t in OVERLAPS), *(float(of_found >= t) for t in OVERLAPS),
    ])  # fmt: skip


def _centre(size: int) -> FloatArray:
    line = np.exp(-0.5 * ((np.arange(size) + 0.5 - size / 2) / (size / 4)) ** 2)
    return np.asarray(np.outer(line, line), dtype=np.float64)


class _Average:
    """Mean region and mean box of a finding; without those of a patient where test images had to serve."""

    def __init__(self, truths: Sequence[Truth], patients: Sequence[str]) -> None:
        self.patients = np.asarray(patients)
        self.masks = np.stack([truth.mask for truth in truths])
        self.boxes = [np.array(truth.boxes, dtype=np.float64) for truth in truths]

    def __call__(self, patient: str) -> tuple[FloatArray, Frame]:
        kept = self.patients != patient
        boxes = np.concatenate([box for box, keep in zip(self.boxes, kept, strict=True) if keep])
        return self.masks[kept].mean(0, dtype=np.float64), Frame(*boxes.mean(0).tolist())


def _averages(material: Material, test: Part) -> tuple[dict[int, _Average], dict[int, str]]:
    """The average of every finding that the test images show, and what it is of."""
    out: dict[int, _Average] = {}
    source: dict[int, str] = {}
    for f, finding in enumerate(material.findings):
        rows = np.flatnonzero(test.labels[:, f] == 1).tolist()
        if not rows:
            continue
        known = [
            r
            for r in material.fit.records
            if r.labels.get(finding) == 1 and (finding in r.masks or any(b.finding == finding for b in r.boxes))
        ][:_MOST]
        assert material.masks is not None
        found = [(material.masks.truth(r, finding, material.pixels), r.patient) for r in known]
        kept = [(truth, patient) for truth, patient in found if truth is not None]
        where = f"{len(kept)} images that were fitted on"
        if not kept:
            kept = [(material.truth(test.records[row], f), str(test.patients[row])) for row in rows]
            where = "the other test patients"
        if len({patient for _, patient in kept}) > 1:  # one patient's mean cannot leave that patient out
            out[f] = _Average([truth for truth, _ in kept], [patient for _, patient in kept])
            source[f] = where
    return out, source


def _tables(
    values: Mapping[str, FloatArray], share: FloatArray, patients: NDArray[np.str_],
    findings: Sequence[str], config: EvaluateConfig,
) -> dict[str, Any]:  # fmt: skip
    weights = patient_weights(patients.tolist(), config.resamples, config.seed).astype(np.float64)
    own = values["encoder"]
    shown = ~np.isnan(own[:, :, 0])

    def mean(table: FloatArray, among: NDArray[np.bool_]) -> tuple[dict[str, Any], FloatArray]:
        there = among & ~np.isnan(table)
        below = there.sum(1).astype(np.float64)
        return ratio(np.where(there, table, 0.0).sum(1), below, patients, weights, config.level)

    def estimates(among: NDArray[np.bool_]) -> dict[str, dict[str, Any]]:
        """Of the (image, finding) pairs ``among`` (N, F): every measure of everyone, and differences to the encoder."""
        out: dict[str, dict[str, Any]] = {}
        for name, table in values.items():
            out[name] = {}
            for m, measure in enumerate(MEASURES):
                out[name][measure] = mean(table[:, :, m], among)
        for name in (name for name in REFERENCES if name in values):
            out[f"encoder - {name}"] = {}
            for m, measure in enumerate(MEASURES):
                out[f"encoder - {name}"][measure] = mean(own[:, :, m] - values[name][:, :, m], among)
        return out

    of = {}
    for f, finding in enumerate(findings):
        if shown[:, f].any():
            of[finding] = estimates(shown & (np.arange(len(findings)) == f))
    rows = next(iter(of.values())).keys()
    plain = {
        finding: {"images": int(shown[:, findings.index(finding)].sum()),
                  **{row: {m: pair[0] for m, pair in one[row].items()} for row in rows}}
        for finding, one in of.items()
    }  # fmt: skip
    macro = {
        row: {m: mean_of_ratios([one[row][m] for one in of.values()], config.level) for m in MEASURES} for row in rows
    }
    sizes = {}
    for name, (low, high) in SIZES.items():
        among = shown & (share >= low) & (share < high)
        if among.any():
            found = estimates(among)
            sizes[name] = {"images": int(among.sum()),
                           **{row: {m: pair[0] for m, pair in found[row].items()} for row in rows}}  # fmt: skip
    return {"findings": plain, "macro": macro, "sizes": sizes}
