"""Errors that a user can act on. The command line prints them in one line and exits with code 1.

Every message says what was expected, what came, where, and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["CheckpointError", "ConfigError", "DataError", "MissingExtra", "OtcxrError", "StorageError", "did_you_mean"]


_LONGEST = 1600  # signs of a message


class OtcxrError(Exception):
    """Base of all errors that otcxr raises on purpose.

    A message is one line: what it quotes of a damaged file may hold anything, and as much as the file.

    Attributes:
        told_elsewhere: Several processes raised this together and another one, process 0, shows it.
    """

    told_elsewhere: bool = False

    def __init__(self, message: str = "") -> None:
        # bytes of file names that are no text (surrogates) stay: lists write them in escaped form
        line = "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else " " for c in message)
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}")


class ConfigError(OtcxrError):
    """A setting is unknown, has the wrong type or contradicts another one."""


class DataError(OtcxrError):
    """A file, folder, table or image is not what its reader expects."""


class CheckpointError(OtcxrError):
    """A saved state is missing, cut short or belongs to another network or run."""


class StorageError(OtcxrError):
    """A folder or disk does not take what should be written."""


class MissingExtra(OtcxrError):
    """An optional package is needed for what was asked; the message names the extra."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of ``known``, else the list of what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}"
