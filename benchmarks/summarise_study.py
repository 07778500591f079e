"""The main numbers of a study of the exploration, as a small JSON and a table of the notebook.

    otcxr study configs/studies/exploration/explore-1.yaml --out FOLDER
    python benchmarks/summarise_study.py FOLDER         docs/results/studies/explore-1.json, docs/results/exploration.md

Only pooled numbers over findings are kept, with intervals by patient; the study's folder has everything else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pages import embed, machine

from otcxr.files import write_atomic

ROOT = Path(__file__).parent.parent
MEASURES = {
    "linear": ("auroc",), "segment-token": ("dice",), "localize-linear": ("pointing", "lung_energy"),
    "correspondence": ("plan", "nearest_by_map", "nearest_by_cost", "plan_gain"), "focus": ("learned", "uniform"),
}  # fmt: skip


def short(estimate: dict[str, Any]) -> dict[str, float | None]:
    kept = [name for name in ("value", "low", "high", "seed_deviation") if name in estimate]
    return {name: None if estimate[name] is None else round(estimate[name], 4) for name in kept}


HEALTH = ("effective_rank", "effective_rank_tokens", "spatial_diversity", "entropy_mu", "entropy_uniform", "mass_moved")


def healths(cells: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> seed -> what the health panel said last."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for path in sorted(cells.glob("*.train.json")):
        cell = json.loads(path.read_text())
        if health := cell.get("health"):
            kept = {name: round(health[name], 4) for name in HEALTH if name in health}
            found.setdefault(cell["unit"]["row"], {})[str(cell["unit"]["seed"])] = kept
    return found


def summarise(results: dict[str, Any], cell: dict[str, Any], health: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {name: {"health": health[name]} if name in health else {} for name in results["rows"]}
    for task, shares in results["tasks"].items():
        for share, tests in shares.items():
            table = tests["test"]
            for row, part in table["rows"].items():
                kept = rows[row].setdefault(task, {}).setdefault(share, {})
                for group, inside in (("", table), *table["within"].items()):
                    where = f", {group}" if group else ""
                    for less, found in (("", inside["rows"]), (", less reference", inside["to_reference"])):
                        macro = found.get(row, {}).get("macro", {})
                        kept |= {f"{m}{where}{less}": short(macro[m]) for m in MEASURES[task] if m in macro}
                if task == "focus" and "learned" in part["findings"].get("lungs", {}):
                    kept["lungs, learned"], kept["lungs, uniform"] = (
                        short(part["findings"]["lungs"][m]) for m in ("learned", "uniform")
                    )
    return {
        "study": results["study"]["name"], "reference": results["study"]["reference"],
        "command": f"python benchmarks/summarise_study.py studies/{results['study']['name']}",
        "seeds": results["study"]["seeds"], "machine": machine(), "environment": cell["environment"], "rows": rows,
    }  # fmt: skip


def table(summary: dict[str, Any]) -> list[str]:
    def at(row: dict[str, Any], task: str, share: str, measure: str) -> str:
        estimate = row.get(task, {}).get(share, {}).get(measure)
        if estimate is None or estimate["value"] is None:
            return ""
        wide = share == "1" and task in ("linear", "segment-token")
        return f"{estimate['value']:.3f}" + (f" [{estimate['low']:.3f}, {estimate['high']:.3f}]" if wide else "")

    lines = [
        "| row | AUROC, all labels | 10 % | 1 % | Dice, all labels | 10 % | 1 % | plan | nearest on the map | "
        "mass in the lungs, learned / uniform |", "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in summary["rows"].items():
        cells = [at(row, task, share, measure) for task, measure in (("linear", "auroc"), ("segment-token", "dice"))
                 for share in ("1", "0.1", "0.01")]  # fmt: skip
        focus = [at(row, "focus", "1", f"lungs, {kind}") for kind in ("learned", "uniform")]
        pairs = [at(row, "correspondence", "1", measure) for measure in ("plan", "nearest_by_map")]
        lines.append(f"| `{name}` | {' | '.join([*cells, *pairs])} | {' / '.join(focus) if focus[0] else ''} |")
    about = summary["environment"]
    over = "patient and seed" if len(summary["seeds"]) > 1 else "patient"
    lines += [
        "", "Linear probe (macro over 7 findings), linear probe of tokens (macro over 7 regions), correspondence; "
        f"intervals by {over}; seeds: {len(summary['seeds'])}. {summary['machine']}, one thread, "
        f"torch {about['versions']['torch']}, "
        f"{about['date']}; JSON: `studies/{summary['study']}.json`.",
    ]  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the study was written")
    folder = parser.parse_args().folder
    results = json.loads((folder / "results.json").read_text())
    cell = json.loads(next(iter(sorted((folder / "cells").glob("*.linear.json")))).read_text())
    summary = summarise(results, cell, healths(folder / "cells"))
    write_atomic(
        ROOT / "docs" / "results" / "studies" / f"{summary['study']}.json", json.dumps(summary, indent=1) + "\n"
    )
    lines = table(summary)
    embed(ROOT / "docs" / "results" / "exploration.md", summary["study"], lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
