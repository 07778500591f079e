"""The verbs of the command line: parse settings, call one function, say what came of it."""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otcxr.config import add_settings, make_parser, parse, peek
from otcxr.console import RichProgress
from otcxr.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["data_inspect", "demo", "evaluate", "explain", "pretrain", "report", "reproduce"]


def pretrain(words: Sequence[str]) -> int:
    """otcxr pretrain."""
    from otcxr.data.dataset import DataConfig
    from otcxr.data.views import ViewsConfig
    from otcxr.distributed import process
    from otcxr.methods import METHODS
    from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, config_from_plain
    from otcxr.train import pretrain as run_pretraining

    # --method NAME is short for --method.name NAME
    words = [w if w.partition("=")[0] != "--method" else w.replace("--method", "--method.name", 1) for w in words]
    saved = Path(peek(words, "out", "")) / "config.yaml"
    if peek(words, "resume", "false").lower() == "true" and saved.is_file() and "--config" not in words:
        words = ["--config", str(saved), *words]  # a run goes on with its own settings
    name = peek(words, "method.name", PretrainConfig.method)
    if name not in METHODS:
        raise ConfigError(f"unknown method '{name}'{did_you_mean(name, METHODS)}")
    parser = make_parser("pretrain", "Learn an encoder from radiographs without labels; leaves a run folder.")
    parser.add_argument("--config", action="config", help="YAML file with settings; later options override it")
    add_settings(parser, "data", DataConfig)
    parser.add_argument("--method.name", type=str, default=name, help=f"one of {', '.join(METHODS)}; also --method")
    add_settings(parser, "method", METHODS[name].settings, f"method {name}")
    add_settings(parser, "views", ViewsConfig)
    add_settings(parser, "encoder", EncoderConfig)
    add_settings(parser, "train", TrainConfig)
    parser.add_argument("--seed", type=int, default=0, help="one seed for weights, order and views")
    parser.add_argument("--out", type=str, default="", help="folder of the run (default: runs/METHOD)")
    parser.add_argument("--resume", type=bool, default=False, help="go on from the last checkpoint in --out")
    plain = _parsed(parser, words)
    _to_log()
    progress = RichProgress()
    run = run_pretraining(config_from_plain(plain), progress)
    if process() != 0:  # one of several talks
        return 0
    progress.say(f"encoder: {run.path / 'encoder.safetensors'}\nnext: otcxr evaluate {run.path}")
    return 0


def reproduce(words: Sequence[str]) -> int:
    """otcxr reproduce RUN; exit code 1 where something else came out."""
    from otcxr.distributed import process
    from otcxr.reproduce import reproduce as do_again
    from otcxr.runs import Run

    parser = make_parser("reproduce", "Do a run again with its settings, images and threads; compare bit for bit.")
    parser.add_argument("run", type=str, help="folder of the run")
    parser.add_argument("--out", type=str, default="", help="folder of the new run (default: RUN-reproduced)")
    parser.add_argument("--data.source", type=str, default="", help="where the images are now, if they moved")
    parser.add_argument("--steps", type=int, default=0, help="do only so many steps; 0 does all")
    plain = _parsed(parser, words)
    _to_log()
    progress = RichProgress()
    run = Run.open(plain["run"])
    out = plain["out"] or f"{run.path}-reproduced"
    result = do_again(run, out, source=plain["data"]["source"], steps=plain["steps"], progress=progress)
    if process() != 0:  # one of several talks
        return 0
    for name, (old, new) in result["environment"].items():
        progress.say(f"differs: {name} was {old}, is {new}")
    for part in result["continued"]:
        changed = ", ".join(part["changed"]) or "nothing"
        progress.say(f"the run was taken up again at step {part['step']}; changed when it went on: {changed}")
    weights = "the weights are identical" if result["weights"] == "identical" else f"weights {result['weights']}"
    if result["identical"]:
        progress.say(
            f"reproduced bit for bit: {result['lines']} lines of metrics up to step {result['step']}, {weights}"
        )
        return 0
    first = result["first_difference"] or {"step": result["step"], "name": "weights"}
    progress.say(
        f"NOT reproduced bit for bit: first difference at step {first['step']} in {first['name']}, loss differs by up "
        f"to {result['largest_loss_difference']:.1e} (relative), {weights}; written: {out}/reproduction.json"
    )
    return 1


def evaluate(words: Sequence[str]) -> int:
    """otcxr evaluate RUN."""
    from otcxr.config import read_settings
    from otcxr.evaluation.results import evaluate_run
    from otcxr.evaluation.tasks import TASKS, EvaluateConfig
    from otcxr.runs import Run

    parser = make_parser("evaluate", "Judge a run's encoder beside a random one, with intervals by patient.")
    parser.add_argument("run", type=str, help="folder of the run")
    parser.add_argument("--task", type=str, default="linear", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--data.source", type=str, default="", help="labelled source (default: that of the run)")
    parser.add_argument("--data.fit", type=str, default="train", help="split to fit on")
    parser.add_argument("--data.test", type=str, default="test", help="split to judge on")
    add_settings(parser, "eval", EvaluateConfig)
    plain = _parsed(parser, words)
    _to_log()
    progress = RichProgress()
    config = read_settings(EvaluateConfig, plain["eval"])
    data = plain["data"]
    evaluation = evaluate_run(
        Run.open(plain["run"]), plain["task"], data["source"], (data["fit"], data["test"]), config, progress
    )
    _print_table(evaluation.result, progress)
    progress.say(f"written: {Path(plain['run']) / 'evaluation' / plain['task']}.json, .csv")
    return 0


def explain(words: Sequence[str]) -> int:
    """otcxr explain RUN."""
    from otcxr.explain import explain_run
    from otcxr.runs import Run

    parser = make_parser("explain", "Draw a run's transport plans, and heat maps of its linear probe, to RUN/explain/.")
    parser.add_argument("run", type=str, help="folder of the run")
    parser.add_argument("--data.source", type=str, default="", help="where the judged images are now, if they moved")
    plain = _parsed(parser, words)
    progress = RichProgress()
    run = Run.open(plain["run"])
    entries = explain_run(run, plain["data"]["source"], progress)
    if not any(entry["kind"] == "heat" for entry in entries):
        progress.say(f"no heat maps: run 'otcxr evaluate {run.path}' first")
    progress.say(f"{len(entries)} pictures in {run.path / 'explain'}")
    return 0


def report(words: Sequence[str]) -> int:
    """otcxr report RUN..."""
    from otcxr.report import write_report
    from otcxr.runs import Run

    parser = make_parser("report", "Gather runs into one offline HTML page.")
    parser.add_argument("runs", type=str, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=str, default="", help="the page (default: report.html in the first run)")
    plain = _parsed(parser, words)
    runs = [Run.open(path) for path in plain["runs"]]
    out = Path(plain["out"]) if plain["out"] else runs[0].path / "report.html"
    out = write_report(runs, out if out.suffix else out.with_suffix(".html"))
    RichProgress().say(f"report: {out}")
    return 0


def data_inspect(words: Sequence[str]) -> int:
    """otcxr data inspect SOURCE."""
    from otcxr.data.dataset import PixelCache, check_records, write_skipped
    from otcxr.data.sources import open_collection

    parser = make_parser("data inspect", "Count what a source holds, read every image once, list what cannot be used.")
    parser.add_argument("source", type=str, help="READER:ARGUMENT, such as nih:PATH")
    parser.add_argument("--skipped", type=str, default="", help="write the list of skipped images to this CSV file")
    plain = _parsed(parser, words)
    _to_log()
    progress = RichProgress()
    collection = open_collection(plain["source"])
    with progress.bar("reading images", len(collection.records), "images") as bar:
        usable, skipped, _ = check_records(collection, PixelCache(0.0), 1.0, bar)
    records = [collection.records[index] for index in usable]

    def count(title: str, values: list[Any]) -> None:
        counted = collections.Counter("unknown" if v is None or v == "" else str(v) for v in values)
        progress.say(f"{title:<10} " + ", ".join(f"{k} {n}" for k, n in sorted(counted.items())))

    # a folder without a table gives every image its own name as patient and study: that is not knowledge
    stated = any(r.patient != r.study for r in records)
    people = f"{len({r.patient for r in records})} patients, {len({r.study for r in records})} studies"
    progress.say(f"{collection.name}: {len(usable)} usable images, {people if stated else 'patients not stated'}, "
                 f"{len(skipped)} skipped")  # fmt: skip
    for split in sorted({r.split for r in records} - {""}):
        try:
            collection.split(split)
        except DataError as error:
            progress.say(f"warning: {error}")
    count("split", [r.split for r in records])
    count("view", [r.view for r in records])
    count("sex", [r.sex for r in records])
    ages = sorted(r.age for r in records if r.age is not None)
    if ages:
        progress.say(f"{'age':<10} {ages[0]:.0f} to {ages[-1]:.0f}, median {ages[len(ages) // 2]:.0f}, "
                     f"unknown {len(records) - len(ages)}")  # fmt: skip
    for finding in collection.findings:
        known = [r.labels[finding] for r in records if finding in r.labels]
        boxes = sum(b.finding == finding for r in records for b in r.boxes)
        progress.say(f"  {finding:<20} {sum(known):>7} of {len(known)} images" + (f", {boxes} boxes" if boxes else ""))
    for item in skipped[:5]:
        progress.say(f"skipped {item.image}: {item.reason}")
    if len(skipped) > 5 and not plain["skipped"]:
        progress.say(f"... and {len(skipped) - 5} more; --skipped FILE writes them all")
    if plain["skipped"]:
        write_skipped(Path(plain["skipped"]), skipped)
        progress.say(f"all skipped images: {plain['skipped']}")
    return 0


def demo(words: Sequence[str]) -> int:
    """otcxr demo."""
    from otcxr.demo import run_demo

    parser = make_parser("demo", "Pre-train on phantoms, probe, explain and report: some minutes on two CPU cores.")
    parser.add_argument("--out", type=str, default="runs/demo", help="folder of the run")
    plain = _parsed(parser, words)
    progress = RichProgress()
    _print_demo(run_demo(plain["out"], progress), progress)
    return 0


def _print_demo(result: dict[str, Any], progress: RichProgress) -> None:
    def show(part: dict[str, Any]) -> str:
        return _interval(part["macro"]["auroc"])

    difference = result["difference"]["macro"]["auroc"]
    verdict = "excludes" if difference["excludes_zero"] else "does NOT exclude"
    progress.say(f"macro AUROC, pre-trained encoder   {show(result)}")
    progress.say(f"macro AUROC, untrained encoder     {show(result['random'])}")
    progress.say(f"paired difference                  {_interval(difference, '+')}: the interval {verdict} zero")
    progress.say(f"report: {result['report']}")


def _parsed(parser: ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    plain: dict[str, Any] = parse(parser, words).as_dict()
    plain.pop("config", None)
    return plain


def _to_log() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it tells how processes find each other
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


def _interval(estimate: dict[str, Any], sign: str = "") -> str:
    if estimate["value"] is None:
        return "not estimable"
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


def _print_table(result: dict[str, Any], progress: RichProgress) -> None:
    """Print each measure for every finding and the macro mean, pooled and within groups, in 80 columns."""
    from rich.table import Table

    level = f"{result['intervals']['level']:.0%}"
    for group, part in [("all test images", result), *result["within"].items()]:
        for measure, name in (("auroc", "AUROC"), ("average_precision", "average precision")):
            table = Table(title=f"{name}, {group} ({level} intervals by patient)", title_justify="left", box=None,
                          padding=(0, 1, 0, 0))  # fmt: skip
            table.add_column("finding", no_wrap=True)
            for column in ("positive", "encoder", "random", "difference"):
                table.add_column(column, no_wrap=True, justify="right")
            for finding in [*part["findings"], "macro"]:
                row, random, gap = (
                    p["macro"] if finding == "macro" else p["findings"][finding]
                    for p in (part, part["random"], part["difference"])
                )
                other = random[measure]["value"]
                table.add_row(
                    f"macro of {len(row['findings'])}" if finding == "macro" else finding,
                    "" if finding == "macro" else f"{row['positives']}/{row['n']}", _short(row[measure]),
                    "" if other is None else f"{other:.3f}", _short(gap[measure], "+"),
                )  # fmt: skip
            progress.console.print(table)
            progress.console.print()
    progress.say("† fewer than 20 patients on one side, or scores that part them perfectly: too short an interval")


def _short(estimate: dict[str, Any], sign: str = "") -> str:
    if estimate["value"] is None:
        return "not estimable"
    mark = "†" if estimate["caution"] else ""
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.2f}, {estimate['high']:{sign}.2f}]{mark}"
