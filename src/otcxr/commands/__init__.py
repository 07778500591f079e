"""The verbs of the command line: parse settings, call one function, say what came of it."""

from otcxr.commands.judging import evaluate, localize, match
from otcxr.commands.showing import cards, explain, report
from otcxr.commands.sources import data_estimate, data_inspect, data_preview, pack
from otcxr.commands.studies import gallery, study
from otcxr.commands.training import demo, pretrain, reproduce

__all__ = [
    "cards",
    "data_estimate",
    "data_inspect",
    "data_preview",
    "demo",
    "evaluate",
    "explain",
    "gallery",
    "localize",
    "match",
    "pack",
    "pretrain",
    "report",
    "reproduce",
    "study",
]
