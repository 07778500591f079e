"""Other places that hear of a training: Fabric's loggers. ``metrics.jsonl`` is written in any case, and is what counts.

A logger that fails is dropped with a word; the training goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otcxr.config import flatten, import_named
from otcxr.console import Progress
from otcxr.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from lightning_fabric.loggers.logger import Logger

__all__ = ["LOGGERS", "Loggers", "make_logger"]

LOGGERS = ("csv", "tensorboard")


class Loggers:
    """The loggers of a run, written to by its first process.

    Args:
        names: Of ``LOGGERS``, or ``package.module:function``, see :func:`make_logger`.
        folder: Of the run.
        settings: Of the run, as plain values.
        progress: Where to say that one was dropped.
    Raises: ConfigError: a logger cannot be made.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], progress: Progress) -> None:
        self._progress = progress
        self._open = {name: make_logger(name, folder) for name in names}
        self._do("log_hyperparams", {k: v if isinstance(v, int | float | str) else str(v) for k, v in
                                     flatten(settings).items()})  # fmt: skip

    def log(self, line: Mapping[str, Any], step: int) -> None:
        """Log the numbers of a line of ``metrics.jsonl``; those inside others are named group/name."""
        numbers = {}
        for name, value in line.items():
            group = value if isinstance(value, Mapping) else {"": value}
            for key, one in group.items():
                if isinstance(one, int | float):
                    numbers[f"{name}/{key}" if key else name] = float(one)
        self._do("log_metrics", numbers, step)

    def close(self) -> None:
        """Write what is still held back."""
        self._do("finalize", "success")

    def _do(self, name: str, *given: Any) -> None:
        for logger, it in list(self._open.items()):
            try:
                getattr(it, name)(*given)
            except NotImplementedError:  # Fabric's CSVLogger takes no settings
                continue
            except Exception as error:  # of any library; a training of days must not end with it
                del self._open[logger]
                self._progress.say(f"warning: the logger '{logger}' failed and is left out from here on: {error}")


def make_logger(name: str, folder: Path) -> Logger:
    """Make a logger.

    Args:
        name: "csv" (``logs/csv/metrics.csv``), "tensorboard" (``logs/tensorboard``; needs the package), or
            ``package.module:function``, which is called with the folder of the run and returns a logger of Fabric.
        folder: Of the run.
    Raises: ConfigError: no such logger, or its package is not installed.
    """
    from lightning_fabric.loggers.csv_logs import CSVLogger
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    place = folder / "logs"
    if name == "csv":
        return CSVLogger(place, name="csv", version="", flush_logs_every_n_steps=1)
    if name == "tensorboard":
        try:
            return TensorBoardLogger(place, name="tensorboard", version="")
        except ModuleNotFoundError as error:
            raise ConfigError("train.loggers: tensorboard is not installed: pip install tensorboard") from error
    if ":" not in name:
        raise ConfigError(f"train.loggers: unknown logger '{name}'{did_you_mean(name, LOGGERS)}; known: "
                          f"{', '.join(LOGGERS)}, or package.module:function")  # fmt: skip
    make = import_named(name, "logger")
    if not callable(make):
        raise ConfigError(f"train.loggers: {name.partition(':')[0]} has no function named '{name.partition(':')[2]}'")
    made: Logger = make(folder)
    return made
