"""The verbs of the command line: parse settings, call one function, say what came of it."""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otcxr.config import add_settings, make_parser, parse, peek
from otcxr.console import RichProgress
from otcxr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from otcxr.evaluation.tasks import EvaluateConfig

__all__ = [
    "cards",
    "data_inspect",
    "data_preview",
    "demo",
    "evaluate",
    "explain",
    "gallery",
    "localize",
    "match",
    "pretrain",
    "report",
    "reproduce",
    "study",
]


def pretrain(words: Sequence[str]) -> int:
    """otcxr pretrain."""
    from otcxr.data.dataset import DataConfig
    from otcxr.data.views import ViewsConfig
    from otcxr.distributed import process
    from otcxr.methods import METHODS, find_method
    from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, config_from_plain
    from otcxr.train import pretrain as run_pretraining

    words = _whole_method(words)
    saved = Path(peek(words, "out", "")) / "config.yaml"
    if peek(words, "resume", "false").lower() == "true" and saved.is_file() and "--config" not in words:
        words = ["--config", str(saved), *words]  # a run goes on with its own settings
    name = peek(words, "method.name", PretrainConfig.method)
    row = find_method(name)
    parser = make_parser("pretrain", "Learn an encoder from radiographs without labels; leaves a run folder.")
    parser.add_argument("--config", action="config", help="YAML file with settings; later options override it")
    add_settings(parser, "data", DataConfig)
    parser.add_argument(
        "--method.name", type=str, default=name,
        help=f"one of {', '.join(METHODS)}, or package.module:Class; also --method",
    )  # fmt: skip
    add_settings(parser, "method", row.settings, f"method {name}")
    add_settings(parser, "views", ViewsConfig(**row.views))
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
    parser.add_argument("--data.fit", type=str, default="train", help="split to fit on")
    parser.add_argument("--data.val", type=str, default="val", help="split to validate on; without it patients are "
                        "held out of the one to fit on")  # fmt: skip
    parser.add_argument("--data.test", type=str, default="test", help="split to judge on")
    parser.add_argument(
        "--out", type=str, default="", help="of a CSV: folder for evaluation.json, .csv and report.html"
    )
    parser.add_argument("--against", type=str, default="", help="of a CSV: another one, compared image by image")
    parser.add_argument("--findings", type=str, default="", help="of a CSV: those to judge, with commas between")
    plain, config = _with_evaluation(parser, words)
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
    _print_table(evaluation.result, progress)
    folder = Path(plain["run"]) / "evaluation"
    progress.say(f"written: {folder / plain['task']}.json, .csv; the labels that were spent: {folder / 'labels'}")
    if evaluation.classifier is not None:
        progress.say(f"classifier: {Path(plain['run']) / 'classifier' / plain['task']}")
    return 0


def _with_evaluation(parser: ArgumentParser, words: Sequence[str]) -> tuple[dict[str, Any], EvaluateConfig]:
    """Parse words with the settings of an evaluation beside the parser's own."""
    from otcxr.config import read_settings
    from otcxr.evaluation.finetune import FinetuneConfig
    from otcxr.evaluation.segment import SegmentConfig
    from otcxr.evaluation.tasks import EvaluateConfig

    add_settings(parser, "eval", EvaluateConfig)
    add_settings(parser, "finetune", FinetuneConfig)
    add_settings(parser, "segment", SegmentConfig)
    plain = _parsed(parser, words)
    _to_log()
    parts = {
        "finetune": read_settings(FinetuneConfig, plain["finetune"]),
        "segment": read_settings(SegmentConfig, plain["segment"]),
    }
    return plain, read_settings(EvaluateConfig, plain["eval"] | parts)


def _evaluate_csv(plain: dict[str, Any], config: Any, progress: RichProgress) -> int:
    import csv
    import io
    import json

    from otcxr.data.sources import open_collection
    from otcxr.evaluation.predictions import evaluate_predictions, read_predictions, rows_of_predictions
    from otcxr.report import write_predictions_page
    from otcxr.runs import write_atomic

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
    _print_table(result, progress)
    progress.say(f"written: {out / 'evaluation.json'}, .csv and {page}")
    return 0


def study(words: Sequence[str]) -> int:
    """otcxr study FILE."""
    import shutil

    from otcxr.study import read_study, run_study
    from otcxr.study.results import write_results

    parser = make_parser("study", "Train and judge every row of a study file; cells that are there are kept.")
    parser.add_argument("file", type=str, help="the study, see docs/studies.md")
    parser.add_argument("--out", type=str, default="", help="folder of cells and tables (default: studies/NAME)")
    parser.add_argument("--runs", type=str, default="", help="folder of the trainings (default: runs/study-NAME)")
    parser.add_argument("--only", type=str, default="", help="names of rows, with commas between")
    parser.add_argument("--workers", type=int, default=2, help="units at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--table", type=bool, default=False, help="only write tables and page, from results.json")
    plain = _parsed(parser, words)
    _to_log()
    progress = RichProgress()
    given = read_study(plain["file"])
    out = Path(plain["out"] or f"studies/{given.name}")
    failed: list[str] = []
    if not plain["table"]:
        only = [name.strip() for name in plain["only"].split(",") if name.strip()]
        failed = run_study(
            plain["file"], out, runs=plain["runs"], workers=plain["workers"], threads=plain["threads"], only=only,
            progress=progress,
        )  # fmt: skip
        if not (out / "study.yaml").exists() or not (out / "study.yaml").samefile(plain["file"]):
            shutil.copyfile(plain["file"], out / "study.yaml")
    page = write_results(given, out, from_cells=not plain["table"])
    progress.say(f"written: {out / 'README.md'}, {out / 'results.json'} and {page}")
    for line in failed:
        progress.say(f"failed: {line}")
    return 1 if failed else 0


def gallery(words: Sequence[str]) -> int:
    """otcxr gallery FILE."""
    from otcxr.study import read_study
    from otcxr.study.gallery import make_gallery
    from otcxr.study.results import write_results

    parser = make_parser("gallery", "Draw the heat maps of every method of a study on test images where all miss, only "
                         "the reference is right, only a rival is right; they become a part of its page.")  # fmt: skip
    parser.add_argument("file", type=str, help="the study, with localize-linear among its tasks")
    parser.add_argument("--out", type=str, default="", help="folder of cells and tables (default: studies/NAME)")
    parser.add_argument("--runs", type=str, default="", help="folder of the trainings (default: runs/study-NAME)")
    parser.add_argument("--each", type=int, default=2, help="images of every group and finding")
    plain = _parsed(parser, words)
    _to_log()
    progress = RichProgress()
    given = read_study(plain["file"])
    out = Path(plain["out"] or f"studies/{given.name}")
    runs = Path(plain["runs"] or f"runs/study-{given.name}")
    found = make_gallery(given, out, runs, progress, each=plain["each"])
    page = write_results(given, out)
    progress.say(f"{len(found['entries'])} images of {len(found['methods'])} methods in {page}")
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
    parser.add_argument("--data.fit", type=str, default="train", help="split to fit on")
    parser.add_argument("--data.val", type=str, default="val", help="split to validate on")
    parser.add_argument("--data.test", type=str, default="test", help="split to judge on")
    plain, config = _with_evaluation(parser, words)
    progress = RichProgress()
    data, run = plain["data"], Run.open(plain["run"])
    kinds = tuple(name.strip() for name in plain["maps"].split(",") if name.strip())
    result = localize_run(
        run, data["source"], (data["fit"], data["test"]), config, progress, head=plain["head"], kinds=kinds,
        val=data["val"],
    )  # fmt: skip
    _print_rows(localize_rows(result, short=True), progress)
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
    plain = _parsed(parser, words)
    _to_log()
    progress = RichProgress()
    run = Run.open(plain["run"])
    config = read_settings(MatchingConfig, plain["match"])
    result = measure_matching(run, plain["data"]["source"], plain["data"]["split"], config, progress)
    _print_rows(matching_rows(result), progress)
    if result["skipped"]:
        progress.say(f"{len(result['skipped'])} images could not be read; they are listed in the file")
    progress.say(f"written: {run.path / 'evaluation' / 'matching.json'}")
    return 0


def explain(words: Sequence[str]) -> int:
    """otcxr explain RUN..."""
    from otcxr.explain import explain_run
    from otcxr.heatmaps import compare_runs
    from otcxr.report import write_explorer_page
    from otcxr.runs import Run

    parser = make_parser("explain", "Draw a run's transport plans, and heat maps of its linear probe, to RUN/explain/; "
                         "of several runs their heat maps side by side, to --out.")  # fmt: skip
    parser.add_argument("runs", type=str, nargs="+", help="folders of runs")
    parser.add_argument("--data.source", type=str, default="", help="where the judged images are now, if they moved")
    parser.add_argument("--out", type=str, default="", help="of several runs: folder of the pictures")
    parser.add_argument("--each", type=int, default=4, help="of several runs: images of each finding")
    parser.add_argument("--dicom", type=bool, default=False, help="of several runs, or one with --out: images from "
                        "DICOM files also as Secondary Capture and Segmentation")  # fmt: skip
    plain = _parsed(parser, words)
    progress = RichProgress()
    if len(plain["runs"]) > 1 or plain["out"]:
        if not plain["out"]:
            raise ConfigError("where should the pictures of several runs go? name a folder with --out")
        entries = compare_runs(
            [Run.open(path) for path in plain["runs"]], Path(plain["out"]), plain["data"]["source"],
            each=plain["each"], dicom=plain["dicom"], progress=progress,
        )  # fmt: skip
        progress.say(f"{len(entries)} pictures in {plain['out']}")
        return 0
    if plain["dicom"]:
        raise ConfigError("--dicom needs --out: the files carry the names of patients, so say where they may go")
    run = Run.open(plain["runs"][0])
    entries = explain_run(run, plain["data"]["source"], progress)
    if not any(entry["kind"] == "heat" for entry in entries):
        progress.say(f"no heat maps: run 'otcxr evaluate {run.path}' first")
    page = write_explorer_page(run, run.path / "explain" / "explorer.html")
    progress.say(f"{len(entries)} pictures in {run.path / 'explain'}" + (f"; {page}" if page else ""))
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


def cards(words: Sequence[str]) -> int:
    """otcxr cards RUN."""
    from otcxr.cards import write_cards
    from otcxr.runs import Run

    parser = make_parser("cards", "Write CLAIM, TRIPOD+AI and a model card of an evaluated run; gaps are marked.")
    parser.add_argument("run", type=str, help="folder of the run")
    parser.add_argument("--out", type=str, default="", help="folder (default: RUN/cards)")
    plain = _parsed(parser, words)
    run = Run.open(plain["run"])
    written = write_cards(run, Path(plain["out"]) if plain["out"] else run.path / "cards")
    RichProgress().say(f"written: {', '.join(map(str, written))}")
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
    for note in collection.notes:
        progress.say(f"note: {note}")
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


def data_preview(words: Sequence[str]) -> int:
    """otcxr data preview SOURCE, or --config of a training."""
    from otcxr.config import from_files, read_settings
    from otcxr.data.view_spec import ViewsConfig
    from otcxr.methods import METHODS, find_method
    from otcxr.preview import preview_views

    words = _whole_method(words)
    files = from_files(words)
    name = peek(words, "method.name", "otcxr")
    shown = {**find_method(name).views, **{k[6:]: v for k, v in files.items() if k.startswith("views.")}}
    parser = make_parser("data preview", "Draw the views that training would make of a source's first radiographs.")
    parser.add_argument("source", type=str, nargs="?", default=files.get("data.source", ""),
                        help="READER:ARGUMENT, such as nih:PATH (default: data.source of --config)")  # fmt: skip
    parser.add_argument("--config", type=str, help="YAML file of a training, or the config.yaml of a run; its views, "
                        "method, seed and source are taken, later options override them")  # fmt: skip
    parser.add_argument("--method.name", type=str, default=name,
                        help=f"whose default views are taken: {', '.join(METHODS)}; also --method")  # fmt: skip
    parser.add_argument("--out", type=str, default="preview.png", help="a .png file, or a folder for preview.png")
    parser.add_argument("--images", type=int, default=4, help="how many radiographs")
    parser.add_argument("--split", type=str, default=files.get("data.split", "train"),
                        help="split to look at, if the source has splits")  # fmt: skip
    parser.add_argument("--seed", type=int, default=files.get("seed", 0),
                        help="of the run: the same views as in its first epoch")  # fmt: skip
    add_settings(parser, "views", read_settings(ViewsConfig, shown))
    plain = parse(parser, words, whole_files=False).as_dict()
    if not plain["source"]:
        raise ConfigError("nothing to look at; name a source, such as nih:PATH, or a --config that has data.source")
    progress = RichProgress()
    path = preview_views(
        plain["source"], plain["out"], read_settings(ViewsConfig, plain["views"]), images=plain["images"],
        seed=plain["seed"], split=plain["split"], title=f"{plain['source']}, {name}, seed {plain['seed']}",
        progress=progress,
    )  # fmt: skip
    progress.say(f"written: {path}")
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


def _whole_method(words: Sequence[str]) -> list[str]:
    """--method NAME is short for --method.name NAME."""
    return [w if w.partition("=")[0] != "--method" else w.replace("--method", "--method.name", 1) for w in words]


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


def _print_rows(tables: Iterable[tuple[str, tuple[str, ...], list[tuple[str, ...]]]], progress: RichProgress) -> None:
    from rich.table import Table

    for title, header, rows in tables:
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for name in header:
            table.add_column(name, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        progress.console.print(table)
        progress.console.print()


def _print_table(result: dict[str, Any], progress: RichProgress) -> None:
    """Print the ranking of every finding and the macro mean, pooled, within groups and by share of labels."""
    from rich.table import Table

    from otcxr.report import MEASURE_NAMES

    level = f"{result['intervals']['level']:.0%}"
    other = "random" if "random" in result else "against" if "against" in result else ""
    tables = [("all test images", result), *result.get("within", {}).items()]
    shares = [part for part in result.get("fractions", []) if "macro" in part]
    tables += [(f"{100 * part['fraction']:.3g} % of the labels", part) for part in shares]
    for group, part in tables:
        for measure in [name for name in MEASURE_NAMES if name in part["macro"]][:2]:
            title = f"{MEASURE_NAMES[measure]}, {group} ({level} intervals by patient)"
            table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
            table.add_column("finding", no_wrap=True)
            for column in ("positive", "encoder" if other else "score", *([other, "difference", "p"] if other else [])):
                table.add_column(column, no_wrap=True, justify="right")
            for finding in [*part["findings"], "macro"]:
                rows = [
                    p["macro"] if finding == "macro" else p["findings"][finding]
                    for p in (part, *([part[other], part["difference"]] if other else []))
                ]
                cells = [
                    f"macro of {len(rows[0]['findings'])}" if finding == "macro" else finding,
                    "" if finding == "macro" else f"{rows[0]['positives']}/{rows[0]['n']}", _short(rows[0][measure]),
                ]  # fmt: skip
                if other:
                    value = rows[1][measure]["value"]
                    gap = rows[2][measure]
                    p = gap["p_value"] if finding == "macro" else gap["p_holm"]
                    cells += [
                        "" if value is None else f"{value:.3f}",
                        _short(gap, "+"),
                        "" if p is None else f"{p:.3f}",
                    ]
                table.add_row(*cells)
            progress.console.print(table)
            progress.console.print()
    progress.say("† fewer than 20 patients on one side, or scores that part them perfectly: too short an interval")
    if other:
        progress.say("p: two-sided; those of findings after Holm's correction")


def _short(estimate: dict[str, Any], sign: str = "") -> str:
    if estimate["value"] is None:
        return "not estimable"
    mark = "†" if estimate["caution"] else ""
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.2f}, {estimate['high']:{sign}.2f}]{mark}"
