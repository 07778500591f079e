"""Verbs that train: pretrain, reproduce, demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from otcxr.commands.terminal import add_training, interval, parsed, to_log, whole_method
from otcxr.config import make_parser, peek
from otcxr.console import RichProgress

__all__ = ["demo", "pretrain", "reproduce"]


def pretrain(words: Sequence[str]) -> int:
    """otcxr pretrain."""
    from otcxr.distributed import process
    from otcxr.train import config_from_plain
    from otcxr.train import pretrain as run_pretraining

    words = whole_method(words)
    saved = Path(peek(words, "out", "")) / "config.yaml"
    if peek(words, "resume", "false").lower() == "true" and saved.is_file() and "--config" not in words:
        words = ["--config", str(saved), *words]  # a run goes on with its own settings
    parser = make_parser("pretrain", "Learn an encoder from radiographs without labels; leaves a run folder.")
    add_training(parser, words)
    parser.add_argument("--out", type=str, default="", help="folder of the run (default: runs/METHOD)")
    parser.add_argument("--resume", type=bool, default=False, help="go on from the last checkpoint in --out")
    plain = parsed(parser, words)
    to_log()
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
    plain = parsed(parser, words)
    to_log()
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


def demo(words: Sequence[str]) -> int:
    """otcxr demo."""
    from otcxr.demo import run_demo

    parser = make_parser("demo", "Pre-train on phantoms, probe, explain and report: some minutes on two CPU cores.")
    parser.add_argument("--out", type=str, default="runs/demo", help="folder of the run")
    plain = parsed(parser, words)
    progress = RichProgress()
    _print_demo(run_demo(plain["out"], progress), progress)
    return 0


def _print_demo(result: dict[str, Any], progress: RichProgress) -> None:
    def show(part: dict[str, Any]) -> str:
        return interval(part["macro"]["auroc"])

    difference = result["difference"]["macro"]["auroc"]
    verdict = "excludes" if difference["excludes_zero"] else "does NOT exclude"
    progress.say(f"macro AUROC, pre-trained encoder   {show(result)}")
    progress.say(f"macro AUROC, untrained encoder     {show(result['random'])}")
    progress.say(f"paired difference                  {interval(difference, '+')}: the interval {verdict} zero")
    progress.say(f"report: {result['report']}")
