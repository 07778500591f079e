"""Run folders to one self-contained HTML page that opens offline. Reads files, never models."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
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
    ("Effective rank of tokens", "of a sample of one batch's tokens; the dashed line is the most that it can show",
     (("effective_rank_tokens", "effective rank"), ("effective_rank_tokens_limit", "limit"))),
    ("Spread of normalised embeddings", "near 0 all images have the same embedding; at the dashed line, 1 / sqrt(d), "
     "their directions are spread evenly",
     (("embedding_std", "standard deviation"), ("embedding_std_reference", "even"))),
    ("Correlation between dimensions", "mean absolute off-diagonal correlation; the dashed line is what independent "
     "dimensions show in a batch of this size",
     (("correlation", "correlation"), ("correlation_chance", "independent"))),
    ("Share of token variance within images", "near 0 the map is constant within each image",
     (("spatial_diversity", "within images"),)),
    ("Correspondence", "share of positions matched to within one cell of the true one; 'same place' is what a network "
     "scores that knows only where it is in the view",
     (("hits", "plan"), ("hits_nearest_neighbour", "nearest neighbour"), ("hits_same_cell", "same place"),
      ("hits_chance", "chance"))),
    ("Correspondence, more strictly", "share of positions matched to exactly the true cell; share of the mass matched "
     "to within one cell",
     (("exact", "exact"), ("hits_by_mass", "by mass"))),
    ("Entropy of masses and plan, nats", "a plan at 'no matching' is transport in name only; 'one to one' is "
     "the sharpest",
     (("entropy_plan", "plan"), ("entropy_mu", "first mass"), ("entropy_nu", "second mass"),
      ("entropy_independent", "no matching"), ("entropy_one_to_one", "one to one"))),
)  # fmt: skip
_ONLINE = (("knn", "nearest neighbours"), ("linear", "linear"))
_DASHED = {  # what the other curves of a panel are compared with
    "effective_rank_limit",
    "effective_rank_tokens_limit",
    "embedding_std_reference",
    "correlation_chance",
    "hits_chance",
    "entropy_independent",
    "entropy_one_to_one",
}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#8a8a8a", "#CC79A7")
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
    "online",
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
        "last": next((line for line in reversed(lines) if "loss" in line), None),
        "health": next((line["health"] for line in reversed(lines) if "health" in line), None),
        "verdict": judged,
        "speed": _median([line["images_per_s"] for line in lines if "images_per_s" in line]),
        "loss": _curves(lines),
        "panels": _panels(lines),
        "online": _online(lines),
        "skipped": _skipped(run),
        "evaluation": evaluation,
        "pictures": pictures,
        "stale": evaluation is not None
        and encoder is not None
        and evaluation.get("encoder_digest") != encoder.get("digest"),
    }


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One chart of the loss, one small chart per term, one of the gradient's norm.

    What a term named T is worth without learning is named T_chance and drawn dashed in T's chart. Old runs name that of
    the contrastive loss just "chance".
    """
    lines = [line for line in lines if "loss" in line]
    if len(lines) < 2:
        return []
    steps = [line["step"] for line in lines]
    names = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, int | float))
    chances = {name for name in names if name.endswith("_chance") and name.removesuffix("_chance") in names}
    terms = [name for name in names if name not in {*_NO_TERMS, *chances, "chance"}]
    charts = []
    for name in ["loss", *terms, *(["gradient_norm"] if "gradient_norm" in names else [])]:
        new, old = f"{name}_chance", "chance" if name in ("loss", "contrastive") else ""
        chance = [line.get(new, line.get(old)) for line in lines]
        series = [(name, steps, [line.get(name) for line in lines])]
        if any(value is not None for value in chance):
            series.append(("chance", steps, chance))
        text = f"{name} over training steps" + (", before clipping" if name == "gradient_norm" else "")
        charts.append({"title": name, "svg": _chart(series, dashed={"chance"}), "text": text})
    return charts


def _panels(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    seen = [line for line in lines if "health" in line]
    panels = []
    for title, text, curves in _HEALTH:
        present = [(key, label) for key, label in curves if any(key in line["health"] for line in seen)]
        if len(seen) < 2 or not present:
            continue
        steps = [line["step"] for line in seen]
        series = [(label, steps, [line["health"].get(key) for line in seen]) for key, label in present]
        dashed = {label for key, label in present if key in _DASHED}
        panels.append({"title": title, "text": text, "svg": _chart(series, dashed)})
    return panels


def _online(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Macro AUROC of the probes that were fitted while the encoder trained, and on what; None where there are none."""
    seen = [line for line in lines if line.get("online")]
    if not seen:
        return None
    steps = [line["step"] for line in seen]
    last = seen[-1]
    series, bands, now = [], {}, []
    for key, label in _ONLINE:
        estimates = [(line["online"].get(key) or {}).get("auroc") or {} for line in seen]
        if estimates[-1]:
            now.append((label, estimates[-1]))
        series.append((label, steps, [estimate.get("value") for estimate in estimates]))
        bands[label] = [(estimate.get("low"), estimate.get("high")) for estimate in estimates]
    return {
        "svg": _chart(series, bands=bands) if len(seen) > 1 else None,
        "step": last["step"],
        "now": now,
        **{name: last["online"].get(name) for name in ("findings", "images_fit", "images_judged", "judged_on")},
    }


_Bounds = Sequence[tuple[float | None, float | None]]


def _chart(
    series: Sequence[tuple[str, Sequence[int], Sequence[float | None]]],
    dashed: Collection[str] = (),
    bands: Mapping[str, _Bounds] | None = None,
) -> str:
    """Draw curves as inline SVG with a transparent ground and mid-grey text, readable in light and dark.

    Args:
        series: Label, steps and values of each curve; values that are absent or not finite are left out.
        dashed: Labels of curves that others are compared with.
        bands: Lower and upper bounds at the same steps, by label.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "otcxr"}):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        for (label, steps, values), colour in zip(series, _COLOURS, strict=False):
            points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and math.isfinite(v)]
            if points:
                style = "--" if label in dashed else "-"
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.5)
            bounds = zip(steps, (bands or {}).get(label, ()), strict=False)
            known = [(s, low, high) for s, (low, high) in bounds if low is not None and high is not None]
            if known:
                at, lows, highs = zip(*known, strict=True)
                axes.fill_between(at, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("step", color="#808080", fontsize=9)
        axes.tick_params(colors="#808080", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#a0a0a0")
        if len(axes.lines) > 1:
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
    mark = " †" if estimate.get("caution") else ""
    if estimate["low"] is None or estimate["high"] is None:
        return f"{estimate['value']:{sign}.3f}{mark}"
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]{mark}"


def _bounds(estimate: Mapping[str, Any], sign: str = "") -> str:
    """The interval alone."""
    if estimate["value"] is None:
        return "not estimable"
    mark = " †" if estimate["caution"] else ""
    return f"[{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]{mark}"
