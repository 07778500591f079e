"""Verbs that judge a run, or predictions: evaluate, localize, match."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from otcxr.commands.terminal import add_splits, parsed, print_rows, print_table, to_log, with_evaluation
from otcxr.config import add_settings, make_parser
from otcxr.console import RichProgress
from otcxr.errors import ConfigError

__all__ = ["evaluate", "localize", "match"]


def evaluate(words: Sequence[str]) -> int:
    """otcxr evaluate RUN, or otcxr evaluate PREDICTIONS.csv."""
    from otcxr.evaluation.results import evaluate_run
    from otcxr.evaluation.tasks import TASKS
    from otcxr.runs import Run

    parser = make_parser("evaluate", "Judge a run's encoder beside random ones, or the predictions of any tool, with "
                         "intervals by patient.")  # fmt: skip
    parser.add_argument("run", type=str, help="folder of the run; or a CSV with columns image, patient, FINDING_label, "
                        "FINDING and perhaps split (val, test), sex, age, view")  # fmt: skip
    parser.add_argument("--task", type=str, default="linear", help=f"of a run: one of {', '.join(TASKS)}")
    parser.add_argument("--data.source", type=str, default="",
                        help="labelled source (default: that of the run; of a CSV: its own labels)")  # fmt: skip
    add_splits(parser)
    parser.add_argument(
        "--out", type=str, default="", help="of a CSV: folder for evaluation.json, .csv and report.html"
    )
    parser.add_argument("--against", type=str, default="", help="of a CSV: another one, compared image by image")
    parser.add_argument("--findings", type=str, default="", help="of a CSV: those to judge, with commas between")
    plain, config = with_evaluation(parser, words)
    progress = RichProgress()
    data = plain["data"]
    if plain["run"].lower().endswith(".csv") or Path(plain["run"]).is_file():
        if (plain["task"], data["fit"], data["val"], data["test"]) != ("linear", "train", "val", "test"):
            raise ConfigError("--task, --data.fit, --data.val and --data.test have no effect on a table of "
                              "predictions; its rows say in column 'split' what they are for: val or test")  # fmt: skip
        return _evaluate_csv(plain, config, progress)
    given = [name for name in ("out", "against", "findings") if plain[name]]
    if given:
        raise ConfigError(f"--{given[0]} has no effect on a run; results go into its folder")
    evaluation = evaluate_run(
        Run.open(plain["run"]), plain["task"], data["source"], (data["fit"], data["test"]), config, progress,
        val=data["val"],
    )  # fmt: skip
    print_table(evaluation.result, progress)
    folder = Path(plain["run"]) / "evaluation"
    progress.say(f"written: {folder / plain['task']}.json, .csv; the labels that were spent: {folder / 'labels'}")
    if evaluation.classifier is not None:
        progress.say(f"classifier: {Path(plain['run']) / 'classifier' / plain['task']}")
    return 0


def _evaluate_csv(plain: dict[str, Any], config: Any, progress: RichProgress) -> int:
    import csv
    import io
    import json

    from otcxr.data.sources import open_collection
    from otcxr.evaluation.predictions import evaluate_predictions, read_predictions, rows_of_predictions
    from otcxr.files import write_atomic
    from otcxr.report import write_predictions_page

    if not plain["out"]:
        raise ConfigError(f"where should the results of {plain['run']} go? name a folder with --out")
    source = open_collection(plain["data"]["source"]) if plain["data"]["source"] else None
    findings = [name.strip() for name in plain["findings"].split(",") if name.strip()]
    given = read_predictions(plain["run"], source, findings)
    against = read_predictions(plain["against"], source, findings or given.findings) if plain["against"] else None
    result = evaluate_predictions(given, config, against)
    out = Path(plain["out"])
    rows, text = rows_of_predictions(result), io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "evaluation.csv", text.getvalue())
    page = write_predictions_page(result, out / "report.html")
    write_atomic(out / "evaluation.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    print_table(result, progress)
    progress.say(f"written: {out / 'evaluation.json'}, .csv and {page}")
    return 0


def localize(words: Sequence[str]) -> int:
    """otcxr localize RUN."""
    from otcxr.attribution import HEAT_MAPS
    from otcxr.evaluation.localize import HEADS
    from otcxr.evaluation.results import localize_run
    from otcxr.report import localize_rows
    from otcxr.runs import Run

    parser = make_parser("localize", "Judge the heat maps of a classifier on a run's encoder against boxes and masks "
                         "without training on them, beside a centre prior, average boxes, random weights.")  # fmt: skip
    parser.add_argument("run", type=str, help="folder of the run")
    parser.add_argument("--head", type=str, default="linear", help=f"classifier: {' or '.join(HEADS)}")
    parser.add_argument("--maps", type=str, default="grad-cam,layer-cam", help=f"of {', '.join(HEAT_MAPS)}")
    parser.add_argument("--data.source", type=str, default="", help="labelled source (default: that of the run)")
    add_splits(parser)
    plain, config = with_evaluation(parser, words)
    progress = RichProgress()
    data, run = plain["data"], Run.open(plain["run"])
    kinds = tuple(name.strip() for name in plain["maps"].split(",") if name.strip())
    result = localize_run(
        run, data["source"], (data["fit"], data["test"]), config, progress, head=plain["head"], kinds=kinds,
        val=data["val"],
    )  # fmt: skip
    print_rows(localize_rows(result, short=True), progress)
    progress.say("< the encoder is ahead of it, > behind: the paired interval excludes zero; \N{DAGGER} few patients")
    progress.say(f"written: {run.path / 'evaluation' / result['task']}.json, with every measure and threshold")
    return 0


def match(words: Sequence[str]) -> int:
    """otcxr match RUN."""
    from otcxr.config import read_settings
    from otcxr.matching import MatchingConfig, measure_matching
    from otcxr.report import matching_rows
    from otcxr.runs import Run

    parser = make_parser("match", "Measure what a run's method pairs on held-out images: correspondence, and the focus "
                         "of its masses, with intervals by patient.")  # fmt: skip
    parser.add_argument("run", type=str, help="folder of the run")
    parser.add_argument("--data.source", type=str, default="", help="images (default: those of the run)")
    parser.add_argument("--data.split", type=str, default="test", help="split to look at")
    add_settings(parser, "match", MatchingConfig)
    plain = parsed(parser, words)
    to_log()
    progress = RichProgress()
    run = Run.open(plain["run"])
    config = read_settings(MatchingConfig, plain["match"])
    result = measure_matching(run, plain["data"]["source"], plain["data"]["split"], config, progress)
    print_rows(matching_rows(result), progress)
    if result["skipped"]:
        progress.say(f"{len(result['skipped'])} images could not be read; they are listed in the file")
    progress.say(f"written: {run.path / 'evaluation' / 'matching.json'}")
    return 0
