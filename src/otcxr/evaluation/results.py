"""Evaluation of a run: from its folder, into its folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from otcxr.console import Progress
from otcxr.data.sources import open_again
from otcxr.errors import DataError
from otcxr.evaluation.estimates import MEASURES
from otcxr.evaluation.tasks import EvaluateConfig, Evaluation, evaluate
from otcxr.nn.encoder import load_encoder
from otcxr.runs import Run, write_atomic

__all__ = ["evaluate_run", "rows_of", "write_evaluation"]


def evaluate_run(
    run: Run,
    task: str,
    source: str = "",
    splits: tuple[str, str] = ("train", "test"),
    config: EvaluateConfig | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge a run's encoder and write ``evaluation/TASK.json``, ``.csv`` and ``.npz`` into its folder.

    Args:
        run: A run with at least one finished epoch.
        task: A key of ``TASKS``.
        source: Labelled source; empty takes that of the pre-training.
        splits: Split to fit on, split to judge on.
        config: Settings; None takes the defaults. ``size`` 0 becomes the size of the pre-training views.
        progress: Where to show progress.
    """
    config = config or EvaluateConfig()
    encoder = load_encoder(run.path)
    facts = run.read_json("encoder.json")
    settings = run.read_config()
    trained, epochs = settings["data"], settings["train"]["epochs"]
    if progress is not None and facts["epochs"] < epochs:
        progress.say(
            f"note: the training stopped after {facts['epochs']:.1f} of {epochs} epochs; this judges it so far"
        )
    if config.size == 0:
        config = replace(config, size=int(facts["input_size"]))
    collection = open_again(source or facts["source"])
    if not any(record.split for record in collection.records):
        raise DataError(
            f"{collection.name} defines no splits; give the table a column 'split' with {splits[0]} and {splits[1]}, "
            "by patient (NIH: put train_val_list.txt and test_list.txt beside the label table)"
        )
    evaluation = evaluate(
        task, encoder, collection, splits, config, cache=run.path / "evaluation" / "features", progress=progress
    )
    evaluation.result["pretraining"] = {"source": facts["source"], "split": trained["split"]}
    if progress is not None and (collection.name, splits[1]) == (facts["source"], trained["split"]):
        progress.say(
            f"note: the encoder was pre-trained (without labels) on the images of '{splits[1]}' it is judged on"
        )
    write_evaluation(run, evaluation)
    return evaluation


def write_evaluation(run: Run, evaluation: Evaluation) -> None:
    """Write the numbers as JSON and CSV, and the probe with its test scores as arrays."""
    name = f"evaluation/{evaluation.task}"
    probe = evaluation.probe
    run.write_arrays(
        f"{name}.npz",
        {
            "findings": np.array(probe.findings, dtype=np.str_), "weights": probe.weights, "bias": probe.bias,
            "strength": probe.strength, "images": np.array(evaluation.images, dtype=np.str_),
            "scores": evaluation.scores, "labels": evaluation.labels,
        },
    )  # fmt: skip
    rows = rows_of(evaluation.result)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(run.path / f"{name}.csv", text.getvalue())
    run.write_json(f"{name}.json", evaluation.result)


def rows_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flatten an evaluation to one row per (group of images, finding, measure); the CSV and the printed table.

    ``value, low, high`` of the pre-trained encoder, of the random one and of their paired difference; ``note`` says why
    something is not estimable.
    """
    rows = []
    for group, table in [("all", result), *result["within"].items()]:
        for finding in [*table["findings"], "macro"]:
            counts = _pick(table, finding)
            for measure in MEASURES:
                row = {"images": group, "finding": finding, "measure": measure, "n": counts["n"],
                       "positives": counts["positives"], "patients": counts["patients"]}  # fmt: skip
                for name, part in (("", table), ("random_", table["random"]), ("difference_", table["difference"])):
                    estimate = _pick(part, finding)[measure]
                    row |= {f"{name}{k}": estimate[k] for k in ("value", "low", "high")}
                row["difference_p_value"] = _pick(table["difference"], finding)[measure]["p_value"]
                row |= {"note": counts[measure]["note"], "caution": counts[measure]["caution"]}
                rows.append(row)
    return rows


def _pick(table: Mapping[str, Any], finding: str) -> dict[str, Any]:
    found: dict[str, Any] = table["macro"] if finding == "macro" else table["findings"][finding]
    return found
