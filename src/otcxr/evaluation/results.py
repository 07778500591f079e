"""Evaluation of a run: from its folder, into its folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from otcxr.console import Progress
from otcxr.data.records import Collection
from otcxr.data.sources import open_again
from otcxr.errors import DataError
from otcxr.evaluation.classifier import write_classifier
from otcxr.evaluation.labelled import write_draw
from otcxr.evaluation.localize import localize
from otcxr.evaluation.tables import TESTS
from otcxr.evaluation.tasks import EvaluateConfig, Evaluation, evaluate
from otcxr.files import write_atomic
from otcxr.nn.encoder import Encoder, load_encoder
from otcxr.runs import Run

__all__ = ["evaluate_run", "localize_run", "measures_of", "rows_of", "write_evaluation"]


def evaluate_run(
    run: Run,
    task: str,
    source: str = "",
    splits: tuple[str, str] = ("train", "test"),
    config: EvaluateConfig | None = None,
    progress: Progress | None = None,
    *,
    val: str = "val",
) -> Evaluation:
    """Judge a run's encoder and write what came of it into its folder.

    ``evaluation/TASK.json``, ``.csv`` and ``.npz``; the drawn labels in ``evaluation/labels/``; for a task with a head
    ``classifier/TASK/``.

    Args:
        run: A run with at least one finished epoch.
        task: A key of ``TASKS``.
        source: Labelled source; empty takes that of the pre-training.
        splits: Split to fit on, split to judge on.
        config: Settings; None takes the defaults. ``size`` 0 becomes the size of the pre-training views.
        progress: Where to show progress.
        val: Split to validate on; where there is none, patients are held out of the one to fit on.
    """
    encoder, collection, config = _open(run, source, splits, config or EvaluateConfig(), progress)
    evaluation = evaluate(
        task, encoder, collection, splits, config, val=val, cache=run.features,
        progress=progress,
    )  # fmt: skip
    evaluation.result["pretraining"] = _pretraining(run)
    write_evaluation(run, evaluation)
    return evaluation


def localize_run(
    run: Run,
    source: str = "",
    splits: tuple[str, str] = ("train", "test"),
    config: EvaluateConfig | None = None,
    progress: Progress | None = None,
    *,
    head: str = "linear",
    kinds: Sequence[str] = ("grad-cam", "layer-cam"),
    val: str = "val",
) -> dict[str, Any]:
    """Judge where a classifier on a run's encoder finds evidence; writes ``evaluation/localize-HEAD.json``.

    Arguments as of ``evaluate_run`` and ``localize.localize``, and its result.
    """
    encoder, collection, config = _open(run, source, splits, config or EvaluateConfig(), progress)
    result = localize(
        encoder, collection, splits, config, head=head, kinds=kinds, val=val,
        cache=run.features, progress=progress,
    )  # fmt: skip
    result["pretraining"] = _pretraining(run)
    run.write_json(f"evaluation/localize-{head}.json", result)
    return result


def _open(
    run: Run, source: str, splits: tuple[str, str], config: EvaluateConfig, progress: Progress | None
) -> tuple[Encoder, Collection, EvaluateConfig]:
    """A run's encoder, the images it is judged on, and the settings at its size; says what is worth knowing of both.

    Raises: DataError: the source defines no splits.
    """
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
    if not collection.has_splits:
        raise DataError(
            f"{collection.name} defines no splits; give the table a column 'split' with {splits[0]} and {splits[1]}, "
            "by patient (NIH: put train_val_list.txt and test_list.txt beside the label table)"
        )
    if progress is not None and (collection.name, splits[1]) == (facts["source"], trained["split"]):
        progress.say(
            f"note: the encoder was pre-trained (without labels) on the images of '{splits[1]}' it is judged on"
        )
    return encoder, collection, config


def _pretraining(run: Run) -> dict[str, str]:
    return {"source": run.read_json("encoder.json")["source"], "split": run.read_config()["data"]["split"]}


def write_evaluation(run: Run, evaluation: Evaluation) -> None:
    """Write the numbers as JSON and CSV, the scores as arrays, the drawn labels as lists, and the classifier."""
    name = f"evaluation/{evaluation.task}"
    arrays = {
        "findings": np.array(evaluation.material.findings, dtype=np.str_),
        "images": np.array(evaluation.images, dtype=np.str_), "labels": evaluation.labels,
    }  # fmt: skip
    if evaluation.scores is not None:
        arrays["scores"] = evaluation.scores
    if (probe := evaluation.probe) is not None:
        arrays |= {"weights": probe.weights, "bias": probe.bias, "strength": probe.strength}
    run.write_arrays(f"{name}.npz", arrays)
    for given in evaluation.draws:
        file = run.path / "evaluation" / "labels" / f"{given.fraction:g}-seed{given.seed}.csv"
        write_atomic(file, write_draw(evaluation.material, given))
    if evaluation.classifier is not None:
        write_classifier(run.path / "classifier" / evaluation.task, evaluation.classifier)
    rows = rows_of(evaluation.result)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(run.path / f"{name}.csv", text.getvalue())
    run.write_json(f"{name}.json", evaluation.result)


def measures_of(entry: Mapping[str, Any]) -> list[str]:
    """Names of the measures in the entry of a finding or of the macro mean."""
    return [name for name, value in entry.items() if isinstance(value, Mapping) and "value" in value]


def rows_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flatten an evaluation to one row per (share of labels, group of images, finding, measure); the CSV.

    ``value, low, high`` of the pre-trained encoder, of the random one and of their paired difference; ``note`` says why
    something is not estimable.
    """
    rows = []
    shares = [table["fraction"] for table in result["fractions"]]
    tables = [(shares[-1], "all", result), *((shares[-1], name, part) for name, part in result["within"].items())]
    tables += [(table["fraction"], "all", table) for table in result["fractions"][:-1]]
    for share, group, table in tables:
        for finding in [*table["findings"], "macro"]:
            counts = _pick(table, finding)
            for measure in measures_of(counts):
                row = {"labels": share, "images": group, "finding": finding, "measure": measure, "n": counts["n"],
                       "positives": counts["positives"], "patients": counts["patients"]}  # fmt: skip
                for name, part in (("", table), ("random_", table["random"]), ("difference_", table["difference"])):
                    estimate = _pick(part, finding)[measure]
                    row |= {f"{name}{k}": estimate[k] for k in ("value", "low", "high")}
                gap = _pick(table["difference"], finding)[measure]
                row |= {f"difference_{k}": gap.get(k) for k in TESTS}
                row |= {"seeds": counts[measure]["seeds"], "note": counts[measure]["note"],
                        "caution": counts[measure]["caution"]}  # fmt: skip
                rows.append(row)
    return rows


def _pick(table: Mapping[str, Any], finding: str) -> dict[str, Any]:
    found: dict[str, Any] = table["macro"] if finding == "macro" else table["findings"][finding]
    return found
