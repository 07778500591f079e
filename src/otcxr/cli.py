"""The command line. A static table of subcommands, so ``--help`` and ``--version`` load nothing heavy."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from otcxr.errors import ConfigError, OtcxrError, did_you_mean
from otcxr.memory import keep_memory
from otcxr.version import __version__

__all__ = ["COMMANDS", "main"]

# name -> (function in otcxr.commands, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "phantoms to report in minutes: the whole path on two CPU cores"),
    "pretrain": ("pretrain", "learn an encoder from radiographs without labels"),
    "reproduce": ("reproduce", "do a run again from its folder and say whether the same came out"),
    "evaluate": ("evaluate", "judge a run's encoder, or any tool's predictions, with intervals"),
    "localize": ("localize", "judge where a classifier on a run's encoder finds evidence, against boxes and masks"),
    "match": ("match", "measure what a run's method pairs on held-out images: correspondence and focus of masses"),
    "gallery": ("gallery", "where all methods of a study miss, only the reference is right, only a rival is right"),
    "study": ("study", "methods x seeds x labels x tasks under one budget, compared pair by pair"),
    "explain": ("explain", "draw transport plans and heat maps of a run"),
    "cards": ("cards", "write CLAIM, TRIPOD+AI and a model card of a run, filled as far as its files go"),
    "report": ("report", "gather a run into one offline HTML page"),
    "pack": ("pack", "decode and reduce a source once, so that training reads it at the speed of memory"),
    "data inspect": ("data_inspect", "count what a source holds and list what cannot be read"),
    "data estimate": ("data_estimate", "measure what packing and training a source would take, before anything starts"),
    "data preview": ("data_preview", "draw the views that training would make of a source"),
}

_USAGE = """usage: otcxr COMMAND [settings]

Learn from chest radiographs without labels, by optimal transport between dense views.

commands:
{commands}

options:
  --help      this text, or the settings of a command: otcxr COMMAND --help
  --version   the version

Settings are --group.name VALUE, from YAML with --config FILE; --print_config shows the result.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Mistakes are one line on standard error and exit code 1; 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("--help", "-h", "help"):
        print(_usage())  # noqa: T201
        return 0
    if words[0] == "--version":
        print(f"otcxr {__version__}")  # noqa: T201
        return 0
    try:
        if words[0] == "data" and (len(words) == 1 or words[1].startswith("-")):
            words = ["data", "inspect", "--help"]
        name = " ".join(words[:2]) if words[0] == "data" else words[0]
        if name not in COMMANDS:
            raise ConfigError(f"unknown command '{name}'{did_you_mean(name, COMMANDS)}")
        # Threads that spin while they wait starve each other when another process is busy (loader workers, other
        # users); passive waiting costs little on an idle machine. Must be set before torch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        keep_memory()
        commands = importlib.import_module("otcxr.commands")
        status: int = getattr(commands, COMMANDS[name][0])(words[len(name.split()) :])
        return status
    except OtcxrError as error:
        if error.told_elsewhere:  # several processes stopped together; process 0 says why and has the exit code
            return 0
        # a loader worker sends its whole traceback along; the last line of it is the message
        text = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else str(error)
        print(f"otcxr: {text}", file=sys.stderr)  # noqa: T201
        return 130 if type(error).__name__ == "Interrupted" else 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"otcxr: {error.filename}: {error.strerror}; check the path, its rights and the space", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("otcxr: stopped", file=sys.stderr)  # noqa: T201
        return 130


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return _USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()))


if __name__ == "__main__":
    sys.exit(main())
