"""Pictures of what a run learned: pairs of views with their transport, and heat maps of a probe's findings.

Reads arrays and records only; the method that made them is not needed. Colours: viridis and inferno (perceptually
uniform, safe for colour-blind readers); right and wrong are told apart by line style as well as by colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otcxr.console import Progress, SilentProgress
from otcxr.explorer import true_cells
from otcxr.heatmaps import encoder_of, explain_probe, judged_records, save_figure, show_radiograph
from otcxr.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "draw_pair",
    "explain_pairs",
    "explain_run",
]

_RIGHT, _WRONG = "#56B4E9", "#E69F00"  # Okabe and Ito's colours
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
        encoder, records = encoder_of(run, result), judged_records(result, source)
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
            save_figure(figure, run.path / name)
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
    cell = true_cells(arrays)
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
        show_radiograph(axes, view, f"mass of the {name} view, times n")
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
