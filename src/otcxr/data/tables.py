"""What readers of public collections share: tables as text, options in a source string, files by name."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from otcxr.data.decode import IMAGE_SUFFIXES
from otcxr.errors import DataError, did_you_mean

__all__ = ["first_file", "image_files", "parse_options", "read_header", "read_rows"]


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV, perhaps compressed (``.gz``), as stripped text; surplus columns are left out.

    Raises: DataError: not readable, not UTF-8, a column is missing, or a row is shorter than the columns ask for.
    """
    text = _text(path)
    try:
        reader = csv.reader(io.StringIO(text))
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in columns if name not in header]
        if missing:
            raise DataError(f"{path} has no column '{missing[0]}'; expected {', '.join(columns)}. Found: {header}")
        at = [(name, header.index(name)) for name in columns]
        last = max(index for _, index in at)
        rows = []
        for row in reader:
            if not row:
                continue
            if len(row) <= last:
                raise DataError(f"{path} line {reader.line_num} has {len(row)} fields; expected at least {last + 1}")
            rows.append({name: row[index].strip() for name, index in at})
    except csv.Error as error:
        raise DataError(f"{path} is no CSV: {error}") from error
    return rows


def read_header(path: Path) -> list[str]:
    """Names of the columns of a CSV, perhaps compressed.

    Raises: DataError: as :func:`read_rows`.
    """
    try:
        return [name.strip() for name in next(csv.reader(io.StringIO(_text(path))), [])]
    except csv.Error as error:
        raise DataError(f"{path} is no CSV: {error}") from error


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8 CSV"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; copy it again") from error
    return text


def parse_options(text: str, known: Mapping[str, Sequence[str]]) -> tuple[Path, dict[str, str]]:
    """``PATH[,name=value]...`` to the folder and the value of every option; the first of each is the default.

    Raises: DataError: no such folder, an unknown option or value.
    """
    chosen = {name: values[0] for name, values in known.items()}
    path = text
    while not Path(path).is_dir() and "," in path:
        path, _, option = path.rpartition(",")
        name, equals, value = option.partition("=")
        if not equals or name not in known:
            every = ", ".join(f"{n}={'|'.join(v)}" for n, v in known.items()) or "none"
            raise DataError(f"unknown option '{option}' in data.source{did_you_mean(name, known)}; known: {every}")
        if value not in known[name]:
            raise DataError(f"{name} must be one of {', '.join(known[name])}, received '{value}'")
        chosen[name] = value
    if not Path(path).is_dir():
        raise DataError(f"no such folder: {path}; check data.source")
    return Path(path), chosen


def first_file(root: Path, names: Sequence[str], what: str) -> Path:
    """The first of some files that is there, also compressed.

    Raises: DataError: none is.
    """
    for name in names:
        for path in (root / name, root / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(f"{root} holds none of {', '.join(names)}; {what}")


def image_files(root: Path) -> dict[str, Path]:
    """Name without suffix -> file, of all images at any depth.

    Raises: DataError: no image, or two of one name.
    """
    files: dict[str, Path] = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()):
        if files.setdefault(path.stem, path) != path:
            raise DataError(f"{root} holds two images of {path.stem}: {files[path.stem]} and {path}; remove one")
    if not files:
        raise DataError(f"{root} holds no image; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return files
