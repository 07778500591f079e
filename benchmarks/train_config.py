"""Train a committed configuration and keep what it shows: docs/results/training/NAME.json.

python benchmarks/train_config.py configs/otcxr-sgd.yaml
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pages import embed

from otcxr.console import RichProgress
from otcxr.files import write_atomic
from otcxr.runs import Run
from otcxr.train import config_from_plain, pretrain

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "training"


def summary(run: Run) -> dict[str, Any]:
    """First and last losses, the terms of the first and last line, every verdict, and where it was trained."""
    lines = run.read_metrics()
    trained = [line for line in lines if "loss" in line]
    quarter = max(1, len(trained) // 4)
    looks = [line for line in lines if "verdict" in line]
    return {
        "steps": trained[-1]["step"],
        "loss_first": trained[0]["loss"],
        "loss_median_of_first_quarter": statistics.median(line["loss"] for line in trained[:quarter]),
        "loss_median_of_last_quarter": statistics.median(line["loss"] for line in trained[-quarter:]),
        "first": trained[0], "last": trained[-1],
        "verdicts": [{"step": line["step"], **line["verdict"]} for line in looks],
        "online": [line for line in lines if "online" in line][-1:],
        "environment": run.read_json("environment.json"),
    }  # fmt: skip


def table(result: dict[str, Any]) -> list[str]:
    """The summary as a table for docs/training.md."""
    first, last, verdicts = result["first"], result["last"], result["verdicts"]
    healthy = sum(verdict["healthy"] for verdict in verdicts)
    environment = result["environment"]
    rows = ["| | first step | last step |", "|---|---|---|"]
    for name in ("loss", "transport", "variance", "covariance", "global"):
        rows.append(f"| {name} | {first[name]:.3f} | {last[name]:.3f} |")
    return [
        *rows, "",
        f"{result['steps']} steps; {healthy} of {len(verdicts)} verdicts healthy, the last one: "
        f"*{verdicts[-1]['text']}*. {environment['date']}, torch {environment['versions']['torch']}, "
        f"{environment['threads']} thread(s), {environment['system']}.",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    arguments = parser.parse_args()
    config = config_from_plain(yaml.safe_load(arguments.config.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        run = pretrain(replace(config, out=f"{folder}/run"), RichProgress())
        result = {"config": arguments.config.name, **summary(run)}
    path = OUT / f"{arguments.config.stem}.json"
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    print(f"loss {result['loss_first']:.1f} -> {result['loss_median_of_last_quarter']:.1f}; {path}")
    embed(ROOT / "docs" / "training.md", result["config"], table(result))


if __name__ == "__main__":
    main()
