"""Files that are whole or not there, names that lead nowhere else, folders that one process holds."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from otcxr.errors import ConfigError, StorageError

__all__ = ["file_name", "locked", "storage_error", "sweep", "write_atomic", "write_rows"]

_log = logging.getLogger(__name__)

_HELD: set[TextIO] = set()  # lock files of this process


def _let_go() -> None:
    """Close the locks in a forked process, such as a loader: a lock ends with the process that took it."""
    for file in _HELD:
        file.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def file_name(text: str) -> str:
    """A text, such as the name of a finding, as part of a file's name: it can lead nowhere else.

    Letters, digits, ``-``, ``_`` and inner dots stay; everything else is ``_``. Where that loses something, six digits
    of a hash keep different texts apart.
    """
    kept = re.sub(r"[^\w.-]|^\.+|\.+$", "_", text)[:80] or "_"
    return kept if kept == text else f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def write_atomic(path: Path, data: bytes | str, before: Callable[[], None] | None = None) -> None:
    """Write a file so that it is either the old one or the whole new one, also when the machine stops.

    Args:
        path: The file.
        data: Its content; text as UTF-8.
        before: Called when the whole content is on disk, before it gets its name.
    Raises: StorageError: the disk is full, the folder cannot be written to.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before()
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise storage_error(path, error) from error
        raise


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV as ``write_atomic`` does; bytes of a file name that are no text appear in escaped form.

    Raises: StorageError: as ``write_atomic``.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(header)
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue().encode("utf-8", errors="backslashreplace"))


def storage_error(path: Path, error: OSError) -> StorageError:
    """Say what could not be written, why, and what mends it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "free some space" if full else "check its rights and that it can be written to"
    return StorageError(f"writing {path} failed: {error.strerror or error}; {fix}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold it for writing; a second process that wants it is refused, a dead one holds nothing.

    Raises: ConfigError: another process holds it. StorageError: it cannot be written to.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("w")
    except OSError as error:
        raise storage_error(folder, error) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is writing to {folder}; wait for it or stop it") from error
        except OSError as error:  # some network file systems have no locks
            _log.warning("%s cannot be locked (%s): see to it that only one process writes there", folder,
                         error.strerror)  # fmt: skip
        _HELD.add(file)
        try:
            yield
        finally:
            _HELD.discard(file)


def sweep(folder: Path) -> None:
    """Remove what killed processes were writing into a folder, by its name; nothing else."""
    for left in folder.iterdir() if folder.is_dir() else ():
        number = re.search(r"\.(\d+)\.tmp$", left.name)
        if number and left.is_file() and not _alive(number[1]):
            left.unlink(missing_ok=True)


def _alive(process: str) -> bool:
    """Whether a process of this number runs here; a text that is no number belongs to none."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True
