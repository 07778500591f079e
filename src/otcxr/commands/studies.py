"""Verbs of studies: study, gallery."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from otcxr.commands.terminal import parsed, to_log
from otcxr.config import make_parser
from otcxr.console import RichProgress

__all__ = ["gallery", "study"]


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
    plain = parsed(parser, words)
    to_log()
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
        for line in failed:  # first: with nothing to show the tables below are an error of their own
            progress.say(f"failed: {line}")
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "study.yaml").exists() or not (out / "study.yaml").samefile(plain["file"]):
            shutil.copyfile(plain["file"], out / "study.yaml")
    page = write_results(given, out, from_cells=not plain["table"])
    progress.say(f"written: {out / 'README.md'}, {out / 'results.json'} and {page}")
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
    parser.add_argument("--seed", type=int | None, default=None, help="of the trainings that are drawn (default: the "
                        "study's first)")  # fmt: skip
    plain = parsed(parser, words)
    to_log()
    progress = RichProgress()
    given = read_study(plain["file"])
    out = Path(plain["out"] or f"studies/{given.name}")
    runs = Path(plain["runs"] or f"runs/study-{given.name}")
    found = make_gallery(given, out, runs, progress, each=plain["each"], seed=plain["seed"])
    page = write_results(given, out)
    progress.say(f"{len(found['entries'])} images of {len(found['methods'])} methods in {page}")
    return 0
