"""Localisation and matching as rows of tables, for pages and terminals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from otcxr.report.words import LOCATED_NAMES, MATCHED_NAMES

__all__ = ["cell", "localize_rows", "matching_rows"]


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
        for measure, title in LOCATED_NAMES.items():
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
                    cells = [*(cell(one) for one in beside), *(cell(gap, "+") for gap in gaps)]
                rows.append((name, images, cell(entry["encoder"][measure]), *cells))
            tables.append((f"{kind}: {title}", header, rows))
    return tables


def _brief(estimate: Mapping[str, Any], gap: Mapping[str, Any]) -> str:
    if estimate["value"] is None or gap["value"] is None:
        return ""
    return f"{estimate['value']:.3f}" + (" <" if gap["low"] > 0 else " >" if gap["high"] < 0 else "")


def matching_rows(result: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Tables of ``evaluation/matching.json``: title, header and rows of each."""
    found, focus = result["correspondence"], result["focus"]
    gaps = found.get("differences", {})
    rows: list[tuple[str, ...]] = [
        (MATCHED_NAMES[name], cell(found[name]), cell(gaps[name], "+") if name in gaps else "")
        for name in MATCHED_NAMES if name in found
    ]  # fmt: skip
    tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [
        ("positions paired to within one cell of the true one", ("by", "share", "plan minus it"), rows)
    ]
    if focus:
        learned = any("learned" in entry for entry in focus.values())
        parts = [
            (name, str(entry["images"]), cell(entry["uniform"]),
             *((cell(entry["learned"]), cell(entry["difference"], "+")) if learned else ()))
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


def cell(estimate: Mapping[str, Any], sign: str = "") -> str:
    """An estimate (value, low, high, perhaps a caution) as text; "not estimable" without a value."""
    if estimate["value"] is None:
        return "not estimable"
    mark = " \N{DAGGER}" if "caution" in estimate else ""
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]{mark}"
