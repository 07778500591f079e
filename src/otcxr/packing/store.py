"""Shards and the journal: what was written survives a kill at any moment, and going on gives the same bytes.

Pixels are appended to a shard first, then a line to the journal that says where they are. On going on, the journal's
whole lines count, and the shards are cut to what they say. A shard bears its name only when it is full.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from otcxr.errors import DataError
from otcxr.files import storage_error

__all__ = ["Journal", "Place", "Shards", "list_shards", "replay"]

Place = tuple[int, int]  # shard, first element

_HEADER = 128  # bytes before the elements: numpy pads a header to a multiple of 64, and no shape here needs more
_EVERY = 128  # lines of the journal written together, at most
_SECONDS = 2.0  # between two of these


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


class Shards:
    """One kind of shards of a pack, appended to in order.

    Args:
        folder: ``shards`` of the pack.
        prefix: "" for pixels, "bits-" for validity and masks.
        kind: uint8 or uint16.
        limit: Bytes of a full shard.
        first: Number of the first shard that may be written to; earlier ones are finished.
    """

    def __init__(self, folder: Path, prefix: str, kind: type[np.generic], limit: int, first: int = 0) -> None:
        self._folder, self._prefix, self._kind, self._limit = folder, prefix, np.dtype(kind), limit
        self._number, self._length, self._first = first, 0, first
        self._file: BinaryIO | None = None

    def go_on(self, number: int, length: int) -> None:
        """Take up after ``length`` elements of shard ``number``; what was written beyond is cut off."""
        self._number, self._length = number, length
        with _in_words(self._folder):
            for earlier in range(self._first, number):  # killed after its last picture, before it got its name
                if self._part(earlier).exists():
                    self._name(earlier, (self._part(earlier).stat().st_size - _HEADER) // self._kind.itemsize)
            if self._path(number).exists():
                self._path(number).rename(self._part(number))
            if length and not self._part(number).exists():
                raise DataError(f"{self._path(number)} is gone, but the journal says what is in it; remove "
                                f"{self._folder.parent} and pack anew")  # fmt: skip
            for later in self._folder.glob(f"{self._prefix}[0-9]*.npy*"):
                if int(later.name.removeprefix(self._prefix)[:6]) > number:
                    later.unlink()
            if length:
                os.truncate(self._part(number), _HEADER + length * self._kind.itemsize)
            else:
                self._part(number).unlink(missing_ok=True)

    def append(self, elements: NDArray[Any]) -> Place:
        """Write elements behind the others, in the next shard where this one would grow too large."""
        size = elements.size * self._kind.itemsize
        with _in_words(self._folder):
            if self._length and self._length * self._kind.itemsize + size > self._limit:
                self.finish()
                self._number, self._length = self._number + 1, 0
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = self._part(self._number).open("ab", buffering=0)
                if not self._length:
                    self._file.write(bytes(_HEADER))
            written = np.ascontiguousarray(elements, dtype=self._kind).data.cast("B")
            while written.nbytes:  # a disk that is nearly full takes a part
                written = written[self._file.write(written) :]
        place = self._number, self._length
        self._length += elements.size
        return place

    def handle(self) -> int | None:
        """A descriptor of the present shard, to be closed by whom it is given to; None where nothing is open."""
        return None if self._file is None else os.dup(self._file.fileno())

    def finish(self) -> None:
        """Give the present shard its name."""
        self.close()
        with _in_words(self._folder):
            if self._part(self._number).exists():
                self._name(self._number, self._length)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _name(self, number: int, length: int) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": np.lib.format.dtype_to_descr(self._kind), "fortran_order": False, "shape": (length,)}
        )
        if len(header.getvalue()) != _HEADER:
            raise AssertionError(f"numpy wrote a header of {len(header.getvalue())} bytes")
        with self._part(number).open("r+b") as file:
            file.write(header.getvalue())
            os.fsync(file.fileno())
        self._part(number).rename(self._path(number))

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._prefix}{number:06d}.npy"

    def _part(self, number: int) -> Path:
        return self._folder / f"{self._prefix}{number:06d}.npy.part"


class Journal:
    """What has been packed since the index was written, a line each; lines reach the disk after the pixels they name.

    Waiting for the disk is left to a thread: decoding goes on.

    Args:
        path: The file.
        shards: Those whose pixels the lines name.
    """

    def __init__(self, path: Path, *shards: Shards) -> None:
        self._path, self._shards = path, shards
        self._lines: list[str] = []
        self._last = time.monotonic()
        with _in_words(path):
            self._file = path.open("ab", buffering=0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="otcxr journal")
        self._pending: Future[None] | None = None

    def append(self, line: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(line, separators=(",", ":")) + "\n")
        due = len(self._lines) >= _EVERY or time.monotonic() - self._last > _SECONDS
        late = self._pending is not None and not self._pending.done()
        if due and (not late or len(self._lines) >= 16 * _EVERY):
            self._hand_over()

    def sync(self) -> None:
        """Return when everything is on the disk."""
        self._hand_over()
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        self._thread.shutdown()
        self._file.close()

    def _hand_over(self) -> None:
        if self._pending is not None:
            self._pending.result()  # what it could not do is raised here
        # descriptors of its own: a shard may be full, and closed, before the thread comes to it
        handles = [handle for shards in self._shards if (handle := shards.handle()) is not None]
        self._pending = self._thread.submit(self._write, handles, "".join(self._lines).encode())
        self._lines, self._last = [], time.monotonic()

    def _write(self, handles: list[int], lines: bytes) -> None:
        try:
            with _in_words(self._path):
                for handle in handles:
                    os.fsync(handle)
                self._file.write(lines)
                os.fsync(self._file.fileno())
        finally:
            for handle in handles:
                os.close(handle)


def replay(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal, one by one; a last one that was cut is dropped from the file first.

    Raises: DataError: a line is damaged.
    """
    if not path.exists():
        return
    with _in_words(path), path.open("r+b") as file:
        whole = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(whole)
                break
            whole += len(line)
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                told = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path} line {number} is damaged ({error}); remove the pack, or bring the journal back"
                ) from error
            if not isinstance(told, dict):
                raise DataError(f"{path} line {number} is no line of a journal; remove the pack, or bring the "
                                "journal back")  # fmt: skip
            yield told


def list_shards(folder: Path) -> list[dict[str, Any]]:
    """Name and bytes of every finished shard."""
    return [{"name": path.name, "bytes": path.stat().st_size} for path in sorted(folder.glob("*.npy"))]
