"""Run folders to one self-contained HTML page that opens offline. Reads files, never models."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from otcxr.config import flatten
from otcxr.errors import DataError
from otcxr.runs import Run, write_atomic
from otcxr.version import __version__

__all__ = ["write_report"]

# What the panels of the health section show: title, what it says, and the curves (name in metrics, label).
_HEALTH = (
    ("Effective rank of pooled embeddings", "1 is collapse; the dashed line is the most that a batch can show",
     (("effective_rank", "effective rank"), ("effective_rank_limit", "limit"))),
    ("Share of token variance within images", "near 0 the map is constant within each image",
     (("spatial_diversity", "within images"),)),
    ("Correspondence", "share of positions matched to within one cell of the true one; 'same place' is what a network "
     "scores that knows only where it is in the view",
     (("hits", "plan"), ("hits_nearest_neighbour", "nearest neighbour"), ("hits_same_cell", "same place"),
      ("hits_chance", "chance"))),
    ("Entropy of masses and plan, nats", "a plan at the dashed line matches nothing; near the masses it is one-to-one",
     (("entropy_plan", "plan"), ("entropy_mu", "first mass"), ("entropy_nu", "second mass"),
      ("entropy_independent", "no matching"))),
)  # fmt: skip
_DASHED = {"effective_rank_limit", "hits_chance", "entropy_independent", "chance"}
_NO_TERMS = {
    "step",
    "epoch",
    "loss",
    "gradient_norm",
    "learning_rate",
    "images_per_s",
    "elapsed_s",
    "health",
    "verdict",
}


def write_report(runs: Sequence[Run], out: Path) -> Path:
    """Write one page for one or several runs. A run that is still training is shown as far as it is.

    Returns: The page's path.
    Raises: DataError: no runs.
    """
    if not runs:
        raise DataError("no runs to report on; name at least one run folder")
    from jinja2 import Environment

    template = resources.files("otcxr").joinpath("templates/report.html").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["interval"] = _interval
    environment.filters["bounds"] = _bounds
    page = environment.from_string(template).render(
        runs=[_facts(run) for run in runs],
        version=__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomic(out, page)
    return out


def _facts(run: Run) -> dict[str, Any]:
    """Everything the template shows of one run."""
    lines = run.read_metrics()
    config = run.read_config()
    judged = next((line["verdict"] for line in reversed(lines) if "verdict" in line), None)
    encoder = run.read_json("encoder.json")
    evaluation = run.read_json("evaluation/linear.json")
    pictures = []
    for entry in run.read_json("explain/index.json") or []:
        path = run.path / entry["file"]
        if path.is_file():
            pictures.append({**entry, "image": _embed(path.read_bytes(), "image/png")})
    return {
        "name": run.name,
        "method": config["method"]["name"],
        "settings": flatten(config),
        "environment": run.read_json("environment.json") or {},
        "encoder": encoder,
        "last": lines[-1] if lines else None,
        "health": next((line["health"] for line in reversed(lines) if "health" in line), None),
        "verdict": judged,
        "speed": _median([line["images_per_s"] for line in lines]),
        "loss": _curves(lines, "loss and its terms"),
        "panels": _panels(lines),
        "skipped": _skipped(run),
        "evaluation": evaluation,
        "pictures": pictures,
        "stale": evaluation is not None
        and encoder is not None
        and evaluation.get("encoder_digest") != encoder.get("digest"),
    }


def _curves(lines: Sequence[Mapping[str, Any]], title: str) -> list[dict[str, str]]:
    """One chart of the loss, one small chart per term."""
    if len(lines) < 2:
        return []
    steps = [line["step"] for line in lines]
    names = ["loss", *[name for name in lines[-1] if name not in _NO_TERMS and name != "chance"]]
    charts = []
    for name in names:
        series = [(name, steps, [line.get(name) for line in lines])]
        if name in ("loss", "contrastive") and "chance" in lines[-1]:
            series.append(("chance", steps, [line.get("chance") for line in lines]))
        charts.append({"title": name, "svg": _chart(series), "text": f"{name} over training steps"})
    return charts


def _panels(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    seen = [line for line in lines if "health" in line]
    panels = []
    for title, text, curves in _HEALTH:
        present = [(key, label) for key, label in curves if seen and key in seen[-1]["health"]]
        if len(seen) < 2 or not present:
            continue
        steps = [line["step"] for line in seen]
        series = [(label, steps, [line["health"].get(key) for line in seen]) for key, label in present]
        dashed = {label for key, label in present if key in _DASHED}
        panels.append({"title": title, "text": text, "svg": _chart(series, dashed)})
    return panels


def _chart(
    series: Sequence[tuple[str, Sequence[int], Sequence[float | None]]], dashed: frozenset[str] | set[str] = frozenset()
) -> str:
    """Draw curves as inline SVG with a transparent ground and mid-grey text, readable in light and dark."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "otcxr"}):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        colours = ("#0072B2", "#D55E00", "#009E73", "#8a8a8a")
        for (label, steps, values), colour in zip(series, colours, strict=False):
            points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
            if points:
                style = "--" if label in dashed or label in _DASHED else "-"
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.5)
        axes.set_xlabel("step", color="#808080", fontsize=9)
        axes.tick_params(colors="#808080", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#a0a0a0")
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor="#808080")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _skipped(run: Run) -> list[dict[str, str]]:
    path = run.path / "skipped.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _embed(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _interval(estimate: Mapping[str, Any], sign: str = "") -> str:
    """An estimate as text; says so where there is none."""
    if estimate["value"] is None:
        return "not estimable"
    mark = " †" if estimate["caution"] else ""
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]{mark}"


def _bounds(estimate: Mapping[str, Any], sign: str = "") -> str:
    """The interval alone."""
    if estimate["value"] is None:
        return "not estimable"
    mark = " †" if estimate["caution"] else ""
    return f"[{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]{mark}"
