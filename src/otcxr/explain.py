"""Pictures of what a run learned: pairs of views with their transport, and heat maps of a probe's findings.

Reads arrays and records only; the method that made them is not needed. Colours: viridis and inferno (perceptually
uniform, safe for colour-blind readers); right and wrong are told apart by line style as well as by colour.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from otcxr.attribution import ProbedEncoder, heat_map
from otcxr.console import Progress, SilentProgress
from otcxr.data.dataset import read_pixels
from otcxr.data.images import box_in_square, fit_square
from otcxr.data.records import Record
from otcxr.data.sources import open_again
from otcxr.errors import DataError
from otcxr.nn.encoder import Encoder, encoder_digest, load_encoder
from otcxr.runs import Run, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_heat_maps", "draw_pair", "explain_pairs", "explain_probe", "explain_run"]

_RIGHT, _WRONG, _BOX = "#56B4E9", "#E69F00", "#F0E442"  # Okabe and Ito's colours
_LINES = 24  # correspondences drawn: more hide the radiographs


def explain_run(run: Run, source: str = "", progress: Progress | None = None) -> list[dict[str, str]]:
    """Draw everything that the run's files allow and list it in ``explain/index.json``.

    Pairs where the method stores them; heat maps where a linear probe was evaluated, on the images it was judged on.

    Args:
        run: The run.
        source: Where those images are now; empty: where they were.
        progress: Where to show progress.
    Raises: DataError: the probe was fitted on an earlier state of the encoder, or its images are not these.
    """
    entries = explain_pairs(run, progress)
    result = run.read_json("evaluation/linear.json")
    if result is not None:
        encoder = load_encoder(run.path)
        if result["encoder_digest"] != encoder_digest(encoder):
            raise DataError(
                f"the probe in {run.path / 'evaluation'} belongs to an earlier state of the encoder; "
                f"run 'otcxr evaluate {run.path}' again"
            )
        test = open_again(source or result["collection"]).split(result["splits"]["test"]["name"])
        broken = set(result["splits"]["test"]["skipped"])
        records = [record for record in test.records if record.name not in broken]
        entries += explain_probe(run, encoder, records, result["settings"]["size"], progress=progress)
    run.write_json("explain/index.json", entries)
    return entries


def explain_pairs(run: Run, progress: Progress | None = None) -> list[dict[str, str]]:
    """Draw every stored probe pair of a run to ``explain/pair_NNN.png``.

    Returns: One entry (file, kind, title, text) per picture; empty for a method that pairs no positions.
    """
    entries: list[dict[str, str]] = []
    files = sorted((run.path / "pairs").glob("*.npz"))
    if not files:
        return entries
    with (progress or SilentProgress()).bar("transport pictures", len(files), "pictures") as bar:
        for number, path in enumerate(files):
            with np.load(path) as stored:
                arrays = dict(stored)
            figure, text = draw_pair(arrays)
            name = f"explain/pair_{path.stem}.png"
            _save(figure, run, name)
            entries.append({"file": name, "kind": "pair", "title": str(arrays["name"]), "text": text})
            bar(number + 1)
    return entries


def draw_pair(arrays: Mapping[str, NDArray[Any]]) -> tuple[Figure, str]:
    """Draw one stored pair: views, masses, correspondences, cost matrix and plan.

    Args:
        arrays: What training wrote to ``pairs/NNN.npz``.
    Returns: The figure, and a sentence that says in words what it shows.
    """
    from matplotlib.figure import Figure

    view_s, view_t = arrays["view_s"].astype(np.float32), arrays["view_t"].astype(np.float32)
    grid_s, grid_t = arrays["valid_s"].shape, arrays["valid_t"].shape
    cell = arrays["true"]
    known = cell >= 0
    goal = arrays["plan"].argmax(1)
    width = grid_t[1]
    near = (np.abs(goal % width - cell % width) <= 1) & (np.abs(goal // width - cell // width) <= 1)

    first = float(arrays["first_centre"])
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    grid = figure.add_gridspec(2, 12)
    wide = figure.add_subplot(grid[0, :8])
    _draw_correspondences(wide, view_s, view_t, arrays, goal, near, known)
    for column, (view, mass, shape, name) in enumerate(
        ((view_s, arrays["a"], grid_s, "first"), (view_t, arrays["b"], grid_t, "second"))
    ):
        axes = figure.add_subplot(grid[1, 4 * column : 4 * column + 4])
        _show(axes, view, f"mass of the {name} view, times n")
        shown = axes.imshow(
            mass.reshape(shape) * (mass > 0).sum(), cmap="viridis", alpha=0.5, extent=_cells(shape, first), vmin=0,
            vmax=max(2.0, float(mass.max() * (mass > 0).sum())),
        )  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(1, 0))
        figure.colorbar(shown, ax=axes, shrink=0.8)
    for row, (matrix, name, colours) in enumerate(
        ((arrays["cost"], "cost 1 - cos", "viridis"), (arrays["plan"], "plan, times n", "inferno"))
    ):
        axes = figure.add_subplot(grid[row, 8:])
        scaled = matrix * len(matrix) if row else matrix
        shown = axes.imshow(scaled, cmap=colours, aspect="auto", interpolation="nearest")
        axes.set(title=name, xlabel="position in the second view", ylabel="position in the first view")
        figure.colorbar(shown, ax=axes, shrink=0.8)
    share = f"{near[known].mean():.0%} of {int(known.sum())}" if known.any() else "none"
    text = (
        f"Two views of {arrays['name']}. Mass goes to within one cell of the true position for {share} positions that "
        f"both views show; the {min(_LINES, int(known.sum()))} heaviest of them are drawn, from dot to cross. "
        "Masses are drawn around the places that tokens look at, so a strip at the right and lower edge has none."
    )
    return figure, text


def _cells(shape: tuple[int, ...], first: float) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of a grid of cells whose first centre lies at ``first`` cells."""
    y, x = (first - 0.5) / shape[0], (first - 0.5) / shape[1]
    return (x, x + 1, y + 1, y)


def _draw_correspondences(
    axes: Axes,
    view_s: NDArray[np.float32],
    view_t: NDArray[np.float32],
    arrays: Mapping[str, NDArray[Any]],
    goal: NDArray[np.int64],
    near: NDArray[np.bool_],
    known: NDArray[np.bool_],
) -> None:
    """Both views side by side; a line from each of the heaviest positions to where the plan sends most of its mass."""
    gap = 0.15
    axes.imshow(view_s, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
    axes.imshow(view_t, cmap="gray", vmin=0, vmax=1, extent=(1 + gap, 2 + gap, 1, 0))
    axes.set(xlim=(0, 2 + gap), ylim=(1, 0), aspect="equal")
    axes.set_title("where the plan sends the mass", fontsize=10)
    axes.axis("off")
    (rows_s, columns_s), (rows_t, columns_t) = arrays["valid_s"].shape, arrays["valid_t"].shape
    heaviest = [i for i in np.argsort(-arrays["a"]) if known[i]][:_LINES]
    first = float(arrays["first_centre"])
    for i in heaviest:
        start = ((i % columns_s + first) / columns_s, (i // columns_s + first) / rows_s)
        end = (1 + gap + (goal[i] % columns_t + first) / columns_t, (goal[i] // columns_t + first) / rows_t)
        colour, style = (_RIGHT, "-") if near[i] else (_WRONG, "--")
        axes.plot(*zip(start, end, strict=True), style, color=colour, linewidth=1.0, alpha=0.9)
        axes.plot(*start, "o", color=colour, markersize=3)
        axes.plot(*end, "x", color=colour, markersize=4)
    for label, colour, style in (("within one cell of the truth", _RIGHT, "-"), ("farther off", _WRONG, "--")):
        axes.plot([], [], style, color=colour, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, frameon=False, fontsize=8)


def explain_probe(
    run: Run,
    encoder: Encoder,
    records: Sequence[Record],
    size: int,
    *,
    each: int = 4,
    progress: Progress | None = None,
) -> list[dict[str, str]]:
    """Draw heat maps of the linear probe's findings over test images, with expert boxes where there are any.

    For every finding that the probe fitted: up to ``each`` images that have it, those with a box first, in their order.
    The choice does not look at scores, so misses are shown as they come.

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
    model = ProbedEncoder(encoder, weights, bias)
    fitted = [f for f in range(len(findings)) if strength[f] > 0]
    entries = []
    with (progress or SilentProgress()).bar("heat maps", len(fitted), "findings") as bar:
        for done, f in enumerate(fitted):
            finding = findings[f]
            present = [row for row, record in enumerate(records) if record.labels.get(finding) == 1]
            boxed_rows = {row for row in present if any(box.finding == finding for box in records[row].boxes)}
            chosen = [*sorted(boxed_rows), *(row for row in present if row not in boxed_rows)][:each]
            if not chosen:
                continue
            images, boxes, titles = [], [], []
            for row in chosen:
                record = records[row]
                image = read_pixels(record.image).image
                images.append(fit_square(image, size))
                boxes.append([box_in_square(b, *image.shape[-2:]) for b in record.boxes if b.finding == finding])
                percentile = float((scores[:, f] < scores[row, f]).mean())
                titles.append(f"{record.name}\nscore above {percentile:.0%} of test images")
            maps = heat_map(model, torch.stack(images), f).numpy()
            figure = draw_heat_maps([i[0].numpy() for i in images], maps, boxes, titles, finding)
            name = f"explain/heat_{finding}.png"
            _save(figure, run, name)
            boxed = sum(map(bool, boxes))
            text = f"Grad-CAM of the linear probe for {finding} on {len(images)} test images that have it"
            text += f"; expert boxes on {boxed} of them" if boxed else "; no expert boxes for this finding here"
            if boxed:
                hit = sum(_peak_inside(m, b) for m, b in zip(maps, boxes, strict=True) if b)
                text += f", the strongest evidence inside a box on {hit}"
            text += ". Colours are scaled by the strongest evidence in these images; they are not chosen by score."
            entries.append({"file": name, "kind": "heat", "title": finding, "text": text})
            bar(done + 1)
    return entries


def _peak_inside(heat: NDArray[np.float32], boxes: Sequence[tuple[float, float, float, float]]) -> bool:
    """Whether the maximum of a map (S, S) lies in one of the boxes (in [0, 1]); a map without evidence hits nothing."""
    if float(heat.max()) <= 0:
        return False
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    y, x = (row + 0.5) / heat.shape[0], (column + 0.5) / heat.shape[1]
    return any(left <= x <= left + width and top <= y <= top + height for left, top, width, height in boxes)


def draw_heat_maps(
    images: Sequence[NDArray[np.float32]],
    maps: NDArray[np.float32],
    boxes: Sequence[Sequence[tuple[float, float, float, float]]],
    titles: Sequence[str],
    finding: str,
) -> Figure:
    """Radiographs above, the same with heat maps below; one colour scale for all, so maps can be compared.

    Args:
        images: (S, S) each, in [0, 1].
        maps: (N, S, S) >= 0.
        boxes: For each image its boxes (x, y, width, height) in [0, 1].
        titles: A text for each image.
        finding: Name of the finding.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(2.9 * len(images) + 0.9, 6.4), layout="constrained")
    axes = np.atleast_2d(figure.subplots(2, len(images), squeeze=False))
    top = max(float(maps.max()), 1e-12)
    shown = None
    for column, image in enumerate(images):
        _show(axes[0, column], image, titles[column])
        _show(axes[1, column], image, "")
        shown = axes[1, column].imshow(
            maps[column] / top, cmap="inferno", vmin=0, vmax=1, alpha=0.2 + 0.45 * maps[column] / top,
            extent=(0, 1, 1, 0),
        )  # fmt: skip
        for x, y, width, height in boxes[column]:
            for row in (0, 1):
                axes[row, column].add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=_BOX, linewidth=1.6))
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes[1, :].tolist(), shrink=0.85)
        bar.set_label(f"evidence for {finding}", parse_math=False)
    return figure


def _show(axes: Axes, image: NDArray[np.float32], title: str) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0), interpolation="bilinear")
    axes.set_title(title, fontsize=8, parse_math=False)  # the name of a file may hold any sign
    axes.axis("off")


def _save(figure: Figure, run: Run, name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(run.path / name, buffer.getvalue())
