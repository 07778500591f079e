"""Run folders to one self-contained HTML page that opens offline. Reads files, never models."""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from otcxr.charts import efficiency_chart, line_chart, reliability_chart
from otcxr.config import flatten
from otcxr.errors import DataError
from otcxr.explorer import explorer_data
from otcxr.runs import Run, write_atomic
from otcxr.version import __version__

__all__ = [
    "MEASURE_NAMES",
    "RANKED",
    "STUDY_TASK_NAMES",
    "TASK_NAMES",
    "describe_training",
    "localize_rows",
    "matching_rows",
    "show_evaluation",
    "split_measures",
    "write_explorer_page",
    "write_predictions_page",
    "write_report",
    "write_study_page",
]

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
# tasks in the order of the page: title, and how scores come about
TASK_NAMES = {
    "linear": ("Linear probe", "Logistic regression on frozen features."),
    "finetune": (
        "Fine-tuning",
        "The whole encoder trained on, from the linear probe, the step chosen on validation images.",
    ),
    "knn": ("Nearest neighbours", "Weighted vote of the 20 nearest labelled images."),
    "retrieval": ("Retrieval", "Share of the nearest labelled images that have the finding that the image has."),
    "segment-token": ("Segmentation, linear probe of tokens", "A linear layer on every position of the last map."),
    "segment-frozen": ("Segmentation, frozen", "A U-Net decoder on the maps of the frozen encoder."),
    "segment-finetune": ("Segmentation, fine-tuned", "A U-Net decoder, trained together with the encoder."),
    "predictions": ("How good they are", ""),
}
STUDY_TASK_NAMES = TASK_NAMES | {
    "localize-linear": (
        "Localisation, linear probe",
        "Grad-CAM of a linear probe, against boxes and masks that were not trained on.",
    ),
    "localize-finetune": (
        "Localisation, fine-tuned",
        "Grad-CAM of the fine-tuned encoder, against boxes and masks that were not trained on.",
    ),
    "correspondence": (
        "Correspondence",
        "Share of positions of one view that are paired to within one cell of the true place in another, mean over "
        "images; the same pairs for every row.",
    ),
    "focus": ("Focus of masses", "Share of a view's mass inside regions, mean over images that show them."),
}
MEASURE_NAMES = {
    "auroc": "AUROC", "average_precision": "average precision",
    "sensitivity_at_specificity": "sensitivity at 90 % specificity",
    "precision_at_10": "precision at 10", "precision_at_5": "precision at 5", "precision_at_1": "precision at 1",
    "dice": "Dice", "iou": "IoU", "hausdorff": "Hausdorff 95 / side", "empties": "AUROC of empties",
    "found": "found", "left_empty": "left empty",
    "pointing": "strongest place inside", "energy": "heat inside", "lung_energy": "heat in the lungs",
    "region_iou": "IoU above Otsu", "iou@0.25": "IoU >= 0.25", "iobb@0.25": "IoBB >= 0.25",
    "plan": "plan", "exact": "plan, exact cell", "nearest_by_cost": "nearest by cost",
    "nearest_by_map": "nearest by map", "same_place": "same place", "chance": "chance",
    "learned": "method's mass inside", "uniform": "uniform mass inside",
}  # fmt: skip
RANKED = ("auroc", "precision_at_10")  # of tasks whose other measures say much the same
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
    write_atomic(out, _render("report.html", runs=[_facts(run) for run in runs]))
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


def write_predictions_page(result: Mapping[str, Any], out: Path) -> Path:
    """Write the page of predictions that another tool made, from ``evaluation.json``."""
    shown = show_evaluation(result)
    macro = result["macro"]["auroc"]
    test = result["splits"]["test"]
    shown["cards"] = [
        ("macro AUROC", "not estimable" if macro["value"] is None else f"{macro['value']:.3f}", _bounds(macro)),
        ("findings", str(len(result["findings"])), f"{len(result['macro']['findings'])} of them in the mean"),
        ("judged on", f"{test['images']:,} images", f"{test['patients']:,} patients"),
    ]
    shown["provenance"] = flatten({k: result[k] for k in ("source", "settings", "environment")})
    write_atomic(out, _render("predictions.html", e=shown))
    return out


def write_study_page(results: Mapping[str, Any], out: Path, gallery: Mapping[str, Any] | None = None) -> Path:
    """Write the page of a study from its ``results.json`` and, where there is one, its ``gallery.json``."""
    study = results["study"]
    tasks = []
    for task, shares in results["tasks"].items():
        title, how = STUDY_TASK_NAMES.get(task, (task, ""))
        for test in next(iter(shares.values())):
            tables = {share: table[test] for share, table in shares.items()}
            most = next(iter(tables.values()))
            ranked, single = split_measures(most)
            name = ranked[0]
            curves = {
                row: [(float(share), table["rows"][row]["macro"][name]) for share, table in reversed(tables.items())]
                for row, found in most["rows"].items()
                if name in found["macro"]
            }
            tasks.append({
                "title": title, "how": how, "test": test if len(results["images"]) > 1 else "", "measure": name,
                "ranked": ranked, "findings": list(next(iter(most["rows"].values()))["findings"]),
                "single": single, "several": len(ranked) > 1 and ranked[0] not in RANKED,
                "shares": tables, "most": most, "over": means_over(list(tables.values())),
                "within": {group: means_over([inside]) for group, inside in most["within"].items()},
                "svg": efficiency_chart(curves, f"macro {MEASURE_NAMES[name]}", {"random"}) if len(tables) > 1 else "",
            })  # fmt: skip
    trainings = {
        row: describe_training([one for one in seeds if one.get("last")])
        for row, seeds in results["rows"].items() if any(one.get("last") for one in seeds)
    }  # fmt: skip
    made = sorted({str(one["environment"]["date"]) for seeds in results["rows"].values() for one in seeds
                   if one.get("environment")})  # fmt: skip
    provenance = flatten({k: study[k] for k in ("source", "seeds", "reference", "grid", "pretrain", "settings")})
    environment: dict[str, Any] = next((one["environment"] for seeds in results["rows"].values() for one in seeds
                        if one.get("environment")), {})  # fmt: skip
    page = _render(
        "study.html", results=results, study=study, tasks=tasks, trainings=trainings, made=", ".join(made),
        provenance=provenance | flatten(environment), gallery=gallery,
    )  # fmt: skip
    write_atomic(out, page)
    return out


def split_measures(table: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Measures of a study's table that have a mean for some row, and those that only single findings have.

    Detection of empties has no mean where a region (lungs) is in every image.
    """

    def known(estimates: Iterable[Mapping[str, Any] | None]) -> bool:
        return any(one is not None and one["value"] is not None for one in estimates)

    rows = list(table["rows"].values())
    there = [name for name in MEASURE_NAMES if any(name in row["macro"] for row in rows)]
    whole = [name for name in there if known(row["macro"].get(name) for row in rows)]
    single = [
        name for name in there
        if name not in whole and known(one.get(name) for row in rows for one in row["findings"].values())
    ]  # fmt: skip
    return whole or there[:1], single


def means_over(tables: Sequence[Mapping[str, Any]]) -> str:
    """Over which findings the means of a study's tables are taken: " over Effusion and 3 others ..." or how many."""
    over = tables[0]["mean_over"]
    known = next(iter(tables[0]["rows"].values()))["findings"]
    if not over:
        return ": not estimable, no finding is for every row"
    left = [finding for finding in known if finding not in over]
    text = f" over {len(over)} findings" if len(over) > 1 else f" over {over[0]} alone"
    if left:
        where = "for every row and share of labels" if len(tables) > 1 else "for every row"
        text += (
            f" ({', '.join(left)} not estimable {where})"
            if len(left) <= 6
            else f" ({', '.join(over)}: those that are estimable {where})"
        )
    return text


def describe_training(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Outcome over all seeds; loss against chance, rank, diversity, correspondence, tuned settings, speed of the first.

    Args:
        seeds: What the cells of a row's trainings keep.
    """
    first = seeds[0]
    last, health = first["last"], first.get("health") or {}
    said: list[str] = []
    for one in seeds:
        verdict = one.get("verdict") or {"healthy": True, "text": "", "notes": []}
        said += verdict.get("notes", []) if verdict["healthy"] else [verdict["text"]]
    counted = [f"{text} ({said.count(text)} of {len(seeds)} seeds)" if len(seeds) > 1 else text for text in
               dict.fromkeys(said)]  # fmt: skip
    loss = [
        f"{name.removesuffix('_chance').replace('_', ' ')} {last[name.removesuffix('_chance')]:.2f} ({value:.2f})"
        for name, value in last.items()
        if name.endswith("_chance") and name.removesuffix("_chance") in last
    ]
    place = f" ({health['hits_same_cell']:.2f})" if "hits_same_cell" in health else ""
    return [
        "; ".join(counted) or "no collapse seen",
        ", ".join(loss) or f"{last['loss']:.2f}",
        f"{health['effective_rank']:.1f} of {health['effective_rank_limit']:.0f}" if health else "",
        f"{health['spatial_diversity']:.2f}" if "spatial_diversity" in health else "",
        f"{health['hits']:.2f}{place}" if "hits" in health else "",
        ", ".join(f"{k} {v}" for k, v in first.get("tuned", {}).items()),
        f"{first['images_per_s']:.0f}",
        f"{first['elapsed_s'] / 60:.1f}",
    ]


def _render(template: str, **facts: Any) -> str:
    from jinja2 import Environment, FunctionLoader

    folder = resources.files("otcxr").joinpath("templates")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text()),
    )  # fmt: skip
    environment.filters |= {
        "interval": _interval,
        "json": _json,
        "bounds": _bounds,
        "p_value": lambda p: "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "measure": lambda name: MEASURE_NAMES.get(name, name),
    }
    return environment.get_template(template).render(
        version=__version__, date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **facts
    )


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


MATCHED_NAMES = {
    "plan": "plan",
    "exact": "plan, the very cell",
    "nearest_by_cost": "cheapest by the method's cost",
    "nearest_by_map": "most similar on the encoder's map",
    "same_place": "same place in both views",
    "chance": "chance",
}


_LOCATED = {
    "pointing": "strongest place inside the region (pointing game)",
    "energy": "share of the map's sum inside the region",
    "lung_energy": "share of the map's sum inside the lungs",
    "iou@0.25": "box around the strongest part: IoU of at least 0.25",
}


def localize_rows(
    result: Mapping[str, Any], *, short: bool = False
) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Tables of ``evaluation/localize-HEAD.json``: for every kind of heat map those of the measures that are shown.

    ``short`` is for a terminal: references without intervals, and a sign where the paired difference excludes zero.
    """
    first = next(iter(result["maps"].values()))["macro"]
    others = [name for name in first if name != "encoder" and not name.startswith("encoder - ")]
    header: tuple[str, ...] = ("finding", "images", "encoder", *others)
    if not short:
        header += tuple(f"- {name}" for name in others)
    tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = []
    for kind, found in result["maps"].items():
        for measure, title in _LOCATED.items():
            parts = [(name, str(entry["images"]), entry) for name, entry in found["findings"].items()]
            parts.append((f"macro of {found['macro']['encoder'][measure]['count']}", "", found["macro"]))
            parts += [(f"region {name}", str(entry["images"]), entry) for name, entry in found["sizes"].items()]
            rows: list[tuple[str, ...]] = []
            for name, images, entry in parts:
                gaps = [entry[f"encoder - {other}"][measure] for other in others]
                beside = [entry[other][measure] for other in others]
                if short:
                    cells = [_brief(one, gap) for one, gap in zip(beside, gaps, strict=True)]
                else:
                    cells = [*(_cell(one) for one in beside), *(_cell(gap, "+") for gap in gaps)]
                rows.append((name, images, _cell(entry["encoder"][measure]), *cells))
            tables.append((f"{kind}: {title}", header, rows))
    return tables


def _brief(estimate: Mapping[str, Any], gap: Mapping[str, Any]) -> str:
    if estimate["value"] is None or gap["value"] is None:
        return ""
    return f"{estimate['value']:.3f}" + (" <" if gap["low"] > 0 else " >" if gap["high"] < 0 else "")


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


def matching_rows(result: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Tables of ``evaluation/matching.json``: title, header and rows of each."""
    found, focus = result["correspondence"], result["focus"]
    gaps = found.get("differences", {})
    rows: list[tuple[str, ...]] = [
        (MATCHED_NAMES[name], _cell(found[name]), _cell(gaps[name], "+") if name in gaps else "")
        for name in MATCHED_NAMES if name in found
    ]  # fmt: skip
    tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [
        ("positions paired to within one cell of the true one", ("by", "share", "plan minus it"), rows)
    ]
    if focus:
        learned = any("learned" in entry for entry in focus.values())
        parts = [
            (name, str(entry["images"]), _cell(entry["uniform"]),
             *((_cell(entry["learned"]), _cell(entry["difference"], "+")) if learned else ()))
            for name, entry in focus.items()
        ]  # fmt: skip
        header = (
            "region",
            "images",
            "share of a uniform mass",
            *(("of the method's", "difference") if learned else ()),
        )
        tables.append(("mass inside regions, in views that show them", header, parts))
    return tables


def _cell(estimate: Mapping[str, Any], sign: str = "") -> str:
    if estimate["value"] is None:
        return "not estimable"
    mark = " \N{DAGGER}" if "caution" in estimate else ""
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]{mark}"


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


def show_evaluation(result: Mapping[str, Any]) -> dict[str, Any]:
    """A task's result with what the page says and draws of it."""
    paired = "difference" in result
    ranked = [name for name in MEASURE_NAMES if name in result["macro"]]
    level = f"{100 * result['intervals']['level']:.0f} %"
    title, how = TASK_NAMES.get(result["task"], (result["task"], ""))
    test = result["splits"]["test"]
    text = f"{how} Judged on {test['images']:,} images of {test['patients']:,} patients"
    if "collection" in result:
        fit, val = result["splits"]["fit"], result["splits"]["val"]
        text += (
            f" (split {test['name']}) of {result['collection']}; fitted on {fit['images']:,} images of "
            f"{fit['patients']:,} patients, validated on {val['images']:,} of {val['patients']:,} ({val['name']})"
        )
    text += f". Intervals: {level}, {result['intervals']['resamples']:,} resamples of patients"
    if paired and "against" not in result:
        text += (
            ". The random networks have the same architecture, random weights, and norms calibrated on the same "
            "images; differences are paired"
        )
    text += (". \N{DAGGER} fewer than 20 patients on one side, or scores that part the sample perfectly: the interval "
             "promises more than it holds.")  # fmt: skip
    first = next(iter(result["findings"].values()))
    thresholds = {
        finding: found if "threshold" in found else next(
            point for point in found["operating_points"] if point["rule"] == result["settings"]["rule"]
        )
        for finding, found in result.get("decisions", {}).items()
    }  # fmt: skip
    shown = {
        **result, "title": title, "text": text, "ranked": ranked, "anchor": f"task-{result['task']}",
        "other": result["against"]["source"]["file"] if "against" in result else "random network" if paired else "",
        "random": result.get("random", result.get("against")),
        "decided": bool(thresholds) and "f1" in first, "thresholds": thresholds, "calibrated": "brier" in first,
        "rule": result["settings"].get("rule", ""), "power_text": _power_text(result),
        "reliable": {f: reliability_chart(r["bins"]) for f, r in result.get("reliability", {}).items() if r["bins"]},
        "within": {
            name: {
                **part, "ranked": [measure for measure in ranked if measure in part["macro"]],
                "random": part.get("random", part.get("against")),
            }
            for name, part in result.get("within", {}).items()
        },
        "calibration_text": "Slope and intercept of a logistic regression of the labels on the logit of the "
        "probabilities; below 1 they are too extreme, above 0 too low. The error is over 15 bins of equal mass, beside "
        "what it would be if every probability were right. Below: what was said against what was, first seed.",
    }  # fmt: skip
    shares = result.get("fractions", [])
    if len(shares) > 1:
        # the largest share stands at the top of the result
        full = [share if "macro" in share else {**result, **share} for share in shares]
        name = ranked[0]
        curves = {
            "encoder": [(s["fraction"], s["curve"]["macro"][name]) for s in full],
            "random network": [(s["fraction"], s["curve"]["random"][name]) for s in full],
        }
        shown["fractions"] = [{**s, "images": ", ".join(f"{d['images']:,}" for d in s["draws"])} for s in full]
        shown["efficiency"] = {
            "svg": efficiency_chart(curves, MEASURE_NAMES[name], dashed={"random network"}),
            "text": f"Macro {MEASURE_NAMES[name]} of {len(full[-1]['curve']['findings'])} findings that are estimable "
            "at every share shown, over the share of labels that was spent, drawn by patient, each share within the "
            "next. With several draws intervals are over patients and draws.",
        }
    return shown


def _power_text(result: Mapping[str, Any]) -> str:
    power = result.get("power")
    if not power or power["macro"] is None:
        return ""
    rare = [f"{name} {value:.3f}" for name, value in power["findings"].items() if value is not None]
    return (
        f"What these images can show: with a power of {power['power']:.0%} a true difference of the macro AUROC to "
        f"{power['to']} of {power['macro']:.3f} or more; by finding {', '.join(rare)}. Smaller ones may exist "
        "unseen; beside another reference, the smallest difference is another."
    )


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
    write_atomic(out, _render("explorer.html", part=part, name=run.name))
    return out


def _json(value: Any) -> Any:
    """JSON inside a page: no text of it can end the element that holds it."""
    from markupsafe import Markup

    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))


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
    mark = " †" if estimate.get("caution") else ""
    return f"[{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]{mark}"
