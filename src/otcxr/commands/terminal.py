"""What verbs share: words to settings, log lines, tables on a terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from otcxr.config import add_settings, parse, peek
from otcxr.console import RichProgress

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from otcxr.evaluation.tasks import EvaluateConfig

__all__ = [
    "add_splits",
    "add_training",
    "interval",
    "parsed",
    "print_rows",
    "print_table",
    "to_log",
    "whole_method",
    "with_evaluation",
]


def add_splits(parser: ArgumentParser) -> None:
    """Add ``--data.fit``, ``--data.val`` and ``--data.test``."""
    parser.add_argument("--data.fit", type=str, default="train", help="split to fit on")
    parser.add_argument("--data.val", type=str, default="val", help="split to validate on; without it patients are "
                        "held out of the one to fit on")  # fmt: skip
    parser.add_argument("--data.test", type=str, default="test", help="split to judge on")


def add_training(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add every setting of a training, with the defaults of the method that ``words`` name; but not ``--out``."""
    from otcxr.data.dataset import DataConfig
    from otcxr.data.view_spec import ViewsConfig
    from otcxr.methods import METHODS, find_method
    from otcxr.settings import EncoderConfig, PretrainConfig, TrainConfig

    name = peek(words, "method.name", PretrainConfig.method)
    row = find_method(name)
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


def with_evaluation(parser: ArgumentParser, words: Sequence[str]) -> tuple[dict[str, Any], EvaluateConfig]:
    """Parse words with the settings of an evaluation beside the parser's own."""
    from otcxr.config import read_settings
    from otcxr.evaluation.finetune import FinetuneConfig
    from otcxr.evaluation.segment import SegmentConfig
    from otcxr.evaluation.tasks import EvaluateConfig

    add_settings(parser, "eval", EvaluateConfig)
    add_settings(parser, "finetune", FinetuneConfig)
    add_settings(parser, "segment", SegmentConfig)
    plain = parsed(parser, words)
    to_log()
    parts = {
        "finetune": read_settings(FinetuneConfig, plain["finetune"]),
        "segment": read_settings(SegmentConfig, plain["segment"]),
    }
    return plain, read_settings(EvaluateConfig, plain["eval"] | parts)


def parsed(parser: ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """Parse words to plain nested values; what is wrong with them is a ConfigError."""
    plain: dict[str, Any] = parse(parser, words).as_dict()
    plain.pop("config", None)
    return plain


def to_log() -> None:
    """Let warnings of the library show as lines."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it tells how processes find each other
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


def interval(estimate: dict[str, Any], sign: str = "") -> str:
    """An estimate with its interval as text; ``sign`` "+" for differences."""
    if estimate["value"] is None:
        return "not estimable"
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


def print_rows(tables: Iterable[tuple[str, tuple[str, ...], list[tuple[str, ...]]]], progress: RichProgress) -> None:
    """Print tables (title, header, rows) with aligned columns."""
    from rich.table import Table

    for title, header, rows in tables:
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for name in header:
            table.add_column(name, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        progress.console.print(table)
        progress.console.print()


def print_table(result: dict[str, Any], progress: RichProgress) -> None:
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


def whole_method(words: Sequence[str]) -> list[str]:
    """--method NAME is short for --method.name NAME."""
    return [w if w.partition("=")[0] != "--method" else w.replace("--method", "--method.name", 1) for w in words]
