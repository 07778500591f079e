"""Run folders to one self-contained HTML page that opens offline. Reads files, never models."""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from otcxr.charts import line_chart
from otcxr.config import flatten
from otcxr.errors import DataError
from otcxr.explorer import explorer_data
from otcxr.files import write_atomic
from otcxr.report.evaluation import show_evaluation
from otcxr.report.pages import render
from otcxr.report.rows import localize_rows, matching_rows
from otcxr.report.words import STUDY_TASK_NAMES, TASK_NAMES
from otcxr.runs import Run
from otcxr.version import __version__

__all__ = ["write_explorer_page", "write_report"]

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

    Beside it, with the suffix ``.json``, stands a twin with every number of it.

    Returns: The page's path.
    Raises: DataError: no runs.
    """
    if not runs:
        raise DataError("no runs to report on; name at least one run folder")
    if out.suffix == ".json":
        raise DataError(f"the page cannot be {out}: its twin with the numbers has that name; take .html")
    write_atomic(out, render("report.html", runs=[_facts(run) for run in runs]))
    twin = {"otcxr": __version__, "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "runs": [_numbers(run) for run in runs]}  # fmt: skip
    write_atomic(out.with_suffix(".json"), json.dumps(_finite(twin), allow_nan=False) + "\n")
    return out


def _finite(value: Any) -> Any:
    """Plain values with None for what is no number: a loss that has left the numbers is in ``metrics.jsonl``."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(run: Run) -> dict[str, Any]:
    """Every number that the page is made of, as the run's files hold them."""
    evaluations = {task: run.read_json(f"evaluation/{task}.json") for task in STUDY_TASK_NAMES}
    return {
        "name": run.name, "settings": run.read_config(), "environment": run.read_json("environment.json"),
        "encoder": run.read_json("encoder.json"), "skipped": _skipped(run), "metrics": run.read_metrics(),
        "evaluations": {task: found for task, found in evaluations.items() if found is not None},
        "matching": run.read_json("evaluation/matching.json"), "pictures": run.read_json("explain/index.json") or [],
    }  # fmt: skip


def _facts(run: Run) -> dict[str, Any]:
    """Everything the template shows of one run."""
    lines = run.read_metrics()
    config = run.read_config()
    judged = next((line["verdict"] for line in reversed(lines) if "verdict" in line), None)
    encoder = run.read_json("encoder.json")
    evaluations = [e for task in TASK_NAMES if (e := run.read_json(f"evaluation/{task}.json")) is not None]
    evaluation = next((e for e in evaluations if "auroc" in e["macro"]), None)
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
        "evaluations": [show_evaluation(e) for e in evaluations],
        "localized": _localized(run),
        "matching": _matching(run),
        "explorer": explorer_data(run),
        "pictures": pictures,
        "stale": encoder is not None and any(e.get("encoder_digest") != encoder.get("digest") for e in evaluations),
    }


def _localized(run: Run) -> list[dict[str, Any]]:
    """What the page says of where the evidence lies, for every head that was judged."""
    encoder, out = run.read_json("encoder.json"), []
    for head, name in (("linear", "a linear probe on the frozen encoder"), ("finetune", "the fine-tuned encoder")):
        result = run.read_json(f"evaluation/localize-{head}.json")
        if result is None:
            continue
        settings, test = result["settings"], result["splits"]["test"]
        origin = "; ".join(f"{finding}: {where}" for finding, where in result["average_from"].items())
        text = (
            f"Heat maps of {name} on test images ({result['collection']}, split {test['name']}) that have the finding "
            "and a box or mask of it; none was trained on. Beside it a Gaussian at the centre, the average region and "
            f"box of the finding ({origin}), and the same classifier from random weights. Threshold of boxes: Otsu's. "
            f"{100 * settings['level']:.0f} % intervals, {settings['resamples']:,} resamples of patients; differences "
            "are paired. \N{DAGGER} fewer than 20 patients: the interval promises more than it holds."
        )
        stale = encoder is not None and encoder.get("digest") != result["encoder_digest"]
        out.append({"title": name, "text": text, "tables": localize_rows(result), "stale": stale})
    return out


def _matching(run: Run) -> dict[str, Any] | None:
    """What the page says of the method's pairs; None where they were not measured."""
    result = run.read_json("evaluation/matching.json")
    if result is None:
        return None
    settings = result["settings"]
    text = (
        f"{result['pairs']:,} pairs of views of {result['images']:,} images of {result['patients']:,} patients "
        f"({result['collection']}, split {result['split']}), drawn as in training; {result['positions']:,} positions "
        f"of the first view lie in the second. {100 * settings['level']:.0f} % intervals, {settings['resamples']:,} "
        "resamples of patients. \N{DAGGER} fewer than 20 patients: the interval promises more than it holds."
    )
    encoder = run.read_json("encoder.json")
    stale = encoder is not None and encoder.get("digest") != result["encoder_digest"]
    return {"text": text, "tables": matching_rows(result), "stale": stale}


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
        charts.append({"title": name, "svg": line_chart(series, dashed={"chance"}), "text": text})
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
        panels.append({"title": title, "text": text, "svg": line_chart(series, dashed)})
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
        "svg": line_chart(series, bands=bands) if len(seen) > 1 else None,
        "step": last["step"],
        "now": now,
        **{name: last["online"].get(name) for name in ("findings", "images_fit", "images_judged", "judged_on")},
    }


def _skipped(run: Run) -> list[dict[str, str]]:
    path = run.path / "skipped.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_explorer_page(run: Run, out: Path) -> Path | None:
    """Write the transport explorer of a run as a page of its own; None for a method that pairs nothing."""
    part = explorer_data(run)
    if part is None:
        return None
    write_atomic(out, render("explorer.html", part=part, name=run.name))
    return out


def _embed(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
