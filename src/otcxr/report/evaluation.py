"""What a page says of an evaluation, of a run or of the predictions of any tool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from otcxr.charts import efficiency_chart, reliability_chart
from otcxr.config import flatten
from otcxr.files import write_atomic
from otcxr.report.pages import bounds, render
from otcxr.report.words import MEASURE_NAMES, TASK_NAMES

__all__ = ["show_evaluation", "write_predictions_page"]


def write_predictions_page(result: Mapping[str, Any], out: Path) -> Path:
    """Write the page of predictions that another tool made, from ``evaluation.json``."""
    shown = show_evaluation(result)
    macro = result["macro"]["auroc"]
    test = result["splits"]["test"]
    shown["cards"] = [
        ("macro AUROC", "not estimable" if macro["value"] is None else f"{macro['value']:.3f}", bounds(macro)),
        ("findings", str(len(result["findings"])), f"{len(result['macro']['findings'])} of them in the mean"),
        ("judged on", f"{test['images']:,} images", f"{test['patients']:,} patients"),
    ]
    shown["provenance"] = flatten({k: result[k] for k in ("source", "settings", "environment")})
    write_atomic(out, render("predictions.html", e=shown))
    return out


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
