"""Verbs that draw and write pages: explain, report, cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from otcxr.commands.terminal import parsed
from otcxr.config import make_parser
from otcxr.console import RichProgress
from otcxr.errors import ConfigError

__all__ = ["cards", "explain", "report"]


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
    plain = parsed(parser, words)
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
    plain = parsed(parser, words)
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
    plain = parsed(parser, words)
    run = Run.open(plain["run"])
    written = write_cards(run, Path(plain["out"]) if plain["out"] else run.path / "cards")
    RichProgress().say(f"written: {', '.join(map(str, written))}")
    return 0
