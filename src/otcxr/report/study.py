"""A study's page from its results, and what its tables have in common with those in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from otcxr.charts import efficiency_chart
from otcxr.config import flatten
from otcxr.files import write_atomic
from otcxr.report.pages import render
from otcxr.report.words import MARKS, MEASURE_NAMES, RANKED, STUDY_TASK_NAMES

__all__ = ["describe_training", "efficiency_svg", "means_over", "split_measures", "write_study_page"]


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
            tasks.append({
                "title": title, "how": how, "test": test if len(results["images"]) > 1 else "", "measure": name,
                "ranked": ranked, "findings": list(next(iter(most["rows"].values()))["findings"]),
                "single": single, "several": len(ranked) > 1 and ranked[0] not in RANKED,
                "shares": tables, "most": most, "over": means_over(list(tables.values())),
                "within": {group: means_over([inside]) for group, inside in most["within"].items()},
                "svg": efficiency_svg(tables, name),
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
    page = render(
        "study.html", results=results, study=study, tasks=tasks, trainings=trainings, made=", ".join(made),
        provenance=provenance | flatten(environment), gallery=gallery, marks=MARKS,
    )  # fmt: skip
    write_atomic(out, page)
    return out


def efficiency_svg(tables: dict[str, Any], measure: str) -> str:
    """Draw the means of a measure by share of the labels, from the largest down; "" where fewer than two have any."""
    curves = {
        row: [(float(share), table["rows"][row]["macro"][measure]) for share, table in reversed(tables.items())]
        for row, found in next(iter(tables.values()))["rows"].items()
        if measure in found["macro"]
    }
    shares = {share for points in curves.values() for share, estimate in points if estimate["value"] is not None}
    return efficiency_chart(curves, f"macro {MEASURE_NAMES[measure]}", {"random"}) if len(shares) > 1 else ""


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
