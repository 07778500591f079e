"""Heat maps of linear probes over radiographs: of one encoder, or of several side by side on one scale.

Colours: inferno (perceptually uniform, safe for colour-blind readers); the radiograph always shows through.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from otcxr.attribution import ProbedEncoder, heat_map
from otcxr.console import Progress, SilentProgress
from otcxr.data.dataset import read_pixels
from otcxr.data.decode import is_dicom
from otcxr.data.images import box_in_square, fit_square
from otcxr.data.masks import read_mask
from otcxr.data.records import Record
from otcxr.data.sources import open_again
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.overlap import otsu_threshold, scaled
from otcxr.files import file_name, write_atomic
from otcxr.nn.encoder import Encoder, encoder_digest, load_encoder
from otcxr.overlay import TRUE, frames, from_square, overlay
from otcxr.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Probed",
    "compare_runs",
    "draw_heat_maps",
    "encoder_of",
    "explain_probe",
    "judged_records",
    "read_probe",
    "save_figure",
    "show_radiograph",
]

_BOX = "#F0E442"  # of Okabe and Ito


class Probed(NamedTuple):
    """An encoder with its linear probe, and what it said of the test images.

    Attributes:
        name: Of the run.
        model: Encoder and probe.
        findings: F names.
        fitted: (F,) whether there were labels enough.
        scores: (N, F) of the test images.
    """

    name: str
    model: ProbedEncoder
    findings: tuple[str, ...]
    fitted: NDArray[np.bool_]
    scores: NDArray[np.float64]


def read_probe(run: Run, encoder: Encoder, records: Sequence[Record]) -> Probed:
    """Read the linear probe of a run.

    Raises: DataError: the run has no linear probe yet, or it was judged on other images.
    """
    path = run.path / "evaluation" / "linear.npz"
    if not path.is_file():
        raise DataError(f"{path} is missing; run 'otcxr evaluate {run.path}' first")
    with np.load(path) as stored:
        weights, bias, strength = stored["weights"], stored["bias"], stored["strength"]
        findings, names, scores = [str(f) for f in stored["findings"]], stored["images"].tolist(), stored["scores"]
    if names != [record.name for record in records]:
        raise DataError(f"{path} was made on other images than these; run 'otcxr evaluate {run.path}' again")
    return Probed(run.name, ProbedEncoder(encoder, weights, bias), tuple(findings), strength > 0, scores)


def explain_probe(
    run: Run,
    encoder: Encoder,
    records: Sequence[Record],
    size: int,
    *,
    each: int = 4,
    progress: Progress | None = None,
) -> list[dict[str, str]]:
    """Draw heat maps of the linear probe's findings over test images, with boxes and masks where there are any.

    For every finding that the probe fitted: up to ``each`` images that have it, those that say where first, in their
    order. The choice does not look at scores, so misses are shown as they come.

    Raises: DataError: as :func:`read_probe`.
    """
    return _draw_all([read_probe(run, encoder, records)], records, size, run.path, "explain/", each, False, progress)


def compare_runs(
    runs: Sequence[Run], out: Path, source: str = "", *, each: int = 4, dicom: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, str]]:  # fmt: skip
    """Draw the heat maps of several runs side by side, on the same images and one scale; ``index.json`` lists them.

    Args:
        runs: Each with a linear probe that was judged on the same images at the same size.
        out: Folder of the pictures.
        source: Where the images are now; empty: where the first run found them.
        each: Images of each finding.
        dicom: Whether images that come from DICOM files are written as Secondary Capture and Segmentation too.
        progress: Where to show progress.
    Raises:
        DataError: a run has no linear probe, or one of an earlier encoder, of other images or of another size.
        ConfigError: two runs have one name; DICOM output without highdicom.
    """
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"runs must have different names to stand side by side, received {', '.join(names)}")
    results = []
    for run in runs:
        result = run.read_json("evaluation/linear.json")
        if result is None:
            raise DataError(f"{run.path} has no linear probe; run 'otcxr evaluate {run.path}' first")
        results.append(result)
    sizes = {result["settings"]["size"] for result in results}
    if len(sizes) > 1:
        raise DataError(f"the runs were judged at different sizes ({', '.join(map(str, sorted(sizes)))} pixels); "
                        "evaluate them with one --eval.size")  # fmt: skip
    records = judged_records(results[0], source)
    probed = [read_probe(run, encoder_of(run, result), records) for run, result in zip(runs, results, strict=True)]
    entries = _draw_all(probed, records, sizes.pop(), out, "", each, dicom, progress)
    write_atomic(out / "index.json", json.dumps(entries, indent=1) + "\n")
    return entries


def encoder_of(run: Run, result: Mapping[str, Any]) -> Encoder:
    """Raises: DataError: the probe belongs to an earlier state of the encoder."""
    encoder = load_encoder(run.path)
    if result["encoder_digest"] != encoder_digest(encoder):
        raise DataError(f"the probe in {run.path / 'evaluation'} belongs to an earlier state of the encoder; run "
                        f"'otcxr evaluate {run.path}' again")  # fmt: skip
    return encoder


def judged_records(result: Mapping[str, Any], source: str) -> list[Record]:
    """The images that an evaluation was judged on."""
    test = open_again(source or result["collection"]).split(result["splits"]["test"]["name"])
    broken = set(result["splits"]["test"]["skipped"])
    return [record for record in test.records if record.name not in broken]


def _draw_all(
    probed: Sequence[Probed], records: Sequence[Record], size: int, folder: Path, prefix: str, each: int, dicom: bool,
    progress: Progress | None,
) -> list[dict[str, str]]:  # fmt: skip
    first = probed[0]
    findings = [f for k, f in enumerate(first.findings) if all(_fitted(p, f) for p in probed) and first.fitted[k]]
    entries = []
    with (progress or SilentProgress()).bar("heat maps", len(findings), "findings") as bar:
        for done, finding in enumerate(findings):
            rows = _choose(records, finding, each)
            if not rows:
                continue
            figure, text = _draw_finding(probed, [records[row] for row in rows], rows, size, finding, folder, dicom)
            name = f"{prefix}heat_{file_name(finding)}.png"
            save_figure(figure, folder / name)
            entries.append({"file": name, "kind": "heat", "title": finding, "text": text})
            bar(done + 1)
    return entries


def _fitted(probed: Probed, finding: str) -> bool:
    return finding in probed.findings and bool(probed.fitted[probed.findings.index(finding)])


def _choose(records: Sequence[Record], finding: str, each: int) -> list[int]:
    present = [row for row, record in enumerate(records) if record.labels.get(finding) == 1]
    told = {
        row for row in present
        if finding in records[row].masks or any(box.finding == finding for box in records[row].boxes)
    }  # fmt: skip
    return [*sorted(told), *(row for row in present if row not in told)][:each]


def _draw_finding(
    probed: Sequence[Probed], chosen: Sequence[Record], rows: Sequence[int], size: int, finding: str, folder: Path,
    dicom: bool,
) -> tuple[Figure, str]:  # fmt: skip
    images, boxes, outlines = [], [], []
    for record in chosen:
        image = read_pixels(record.image).image
        images.append(fit_square(image, size))
        own = [b for b in record.boxes if b.finding == finding]
        boxes.append([box_in_square(b, *image.shape[-2:]) for b in own])
        masked = finding in record.masks and not own
        outlines.append(
            fit_square(torch.from_numpy(read_mask(record.masks[finding])).float()[None], size)[0].numpy()
            if masked
            else None
        )
    stack = torch.stack(images)
    maps = {p.name: heat_map(p.model, stack, p.findings.index(finding)).numpy() for p in probed}
    top = max(float(m.max()) for m in maps.values())
    titles = {
        p.name: [
            f"above {np.mean(p.scores[:, f] < p.scores[row, f]):.0%} of test images, score {p.scores[row, f]:+.2f}"
            for row in rows
        ]
        for p in probed for f in [p.findings.index(finding)]
    }  # fmt: skip
    figure = draw_heat_maps([i[0].numpy() for i in images], maps, boxes, [r.name for r in chosen], finding,
                            titles=titles, outlines=outlines)  # fmt: skip
    boxed = sum(map(bool, boxes))
    who = "the linear probe" if len(probed) == 1 else f"the linear probes of {', '.join(p.name for p in probed)}"
    text = f"Grad-CAM of {who} for {finding} on {len(images)} test images that have it"
    text += f"; expert boxes on {boxed} of them" if boxed else "; no expert boxes for this finding here"
    if any(outline is not None for outline in outlines):
        text += f"; masks on {sum(outline is not None for outline in outlines)}"
    if boxed:
        hits = {n: sum(_peak_inside(m, b) for m, b in zip(own, boxes, strict=True) if b) for n, own in maps.items()}
        found = ", ".join(f"{n} {count}" if len(probed) > 1 else str(count) for n, count in hits.items())
        text += f", the strongest evidence inside a box on {found}"
    text += ". Colours are scaled by the strongest evidence in these images; they are not chosen by score."
    if dicom:
        for k, record in enumerate(chosen):
            if isinstance(record.image, Path) and is_dicom(record.image.read_bytes()[:200]):
                for number, p in enumerate(probed):
                    _write_dicom(record, maps[p.name][k], top, finding, p.name, number, folder)
    return figure, text


def _write_dicom(
    record: Record, heat: NDArray[np.float32], top: float, finding: str, name: str, number: int, folder: Path
) -> None:
    from otcxr.dicom_out import write_secondary_capture, write_segmentation

    assert isinstance(record.image, Path)
    image = read_pixels(record.image).image[0].numpy()
    whole = from_square(heat, *image.shape)
    boxes = [(b.x, b.y, b.x + b.width, b.y + b.height) for b in record.boxes if b.finding == finding]
    picture = frames(overlay(image, whole, top), boxes, TRUE, width=max(1, max(image.shape) // 300))
    stem = folder / "dicom" / file_name(f"{record.image.stem}-{finding}-{name}")
    title = f"{finding}, {name}"
    write_secondary_capture(
        record.image, picture, title, stem.with_name(f"{stem.name}-sc.dcm"), number=9000 + 2 * number
    )
    values = scaled(whole)
    region = values > otsu_threshold(values)
    if region.any():
        write_segmentation(
            record.image, region, title, stem.with_name(f"{stem.name}-seg.dcm"), number=9001 + 2 * number
        )


def _peak_inside(heat: NDArray[np.float32], boxes: Sequence[tuple[float, float, float, float]]) -> bool:
    """Whether the maximum of a map (S, S) lies in one of the boxes (in [0, 1]); a map without evidence hits nothing."""
    if float(heat.max()) <= 0:
        return False
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    y, x = (row + 0.5) / heat.shape[0], (column + 0.5) / heat.shape[1]
    return any(left <= x <= left + width and top <= y <= top + height for left, top, width, height in boxes)


def draw_heat_maps(
    images: Sequence[NDArray[np.float32]],
    maps: Mapping[str, NDArray[np.float32]],
    boxes: Sequence[Sequence[tuple[float, float, float, float]]],
    names: Sequence[str],
    finding: str,
    *,
    titles: Mapping[str, Sequence[str]] | None = None,
    outlines: Sequence[NDArray[np.float32] | None] | None = None,
) -> Figure:
    """Radiographs above, below them the same with the heat maps of each encoder; one colour scale for all.

    Args:
        images: (S, S) each, in [0, 1].
        maps: Encoder -> (N, S, S) >= 0.
        boxes: For each image its boxes (x, y, width, height) in [0, 1].
        names: Of each image.
        finding: Name of the finding.
        titles: Encoder -> a text for each image.
        outlines: For each image a mask (S, S) whose outline is drawn, or None.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(2.9 * len(images) + 0.9, 3.2 * (1 + len(maps))), layout="constrained")
    axes = figure.subplots(1 + len(maps), len(images), squeeze=False)
    top = max(max((float(m.max()) for m in maps.values()), default=0.0), 1e-12)
    shown = None
    for column, image in enumerate(images):
        show_radiograph(axes[0, column], image, names[column])
        for row, (encoder, heat) in enumerate(maps.items(), start=1):
            text = titles[encoder][column] if titles else ""
            show_radiograph(axes[row, column], image, f"{encoder}\n{text}" if len(maps) > 1 else text)
            shown = axes[row, column].imshow(
                heat[column] / top, cmap="inferno", vmin=0, vmax=1, alpha=0.2 + 0.45 * heat[column] / top,
                extent=(0, 1, 1, 0),
            )  # fmt: skip
        for panel in axes[:, column]:
            for x, y, width, height in boxes[column]:
                panel.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=_BOX, linewidth=1.6))
            outline = None if outlines is None else outlines[column]
            if outline is not None and outline.max() >= 0.5:
                places = (np.arange(len(outline)) + 0.5) / len(outline)
                panel.contour(places, places, outline, levels=[0.5], colors=[_BOX], linewidths=1.6)
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes[1:, :].ravel().tolist(), shrink=0.85)
        bar.set_label(f"evidence for {finding}", parse_math=False)
    return figure


def show_radiograph(axes: Axes, image: NDArray[np.float32], title: str) -> None:
    """Show an image (S, S) in [0, 1] in grey, over the unit square, with a title that may hold any sign."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0), interpolation="bilinear")
    axes.set_title(title, fontsize=8, parse_math=False)  # the name of a file may hold any sign
    axes.axis("off")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure of matplotlib as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
