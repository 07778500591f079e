"""What is known of every picture, as columns: records of the source, and what packing them has found."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from otcxr.data.identity import SiteKey
from otcxr.data.pack import age_band, index_schema
from otcxr.data.records import Record
from otcxr.packing.reduce import Reduced
from otcxr.packing.store import Place

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Conflict", "First", "Index", "Names", "conflicts", "describe", "facts_of", "source_root"]

_DESCRIBED = ("study", "patient", "source", "sex", "age", "view", "split", "boxes")
_FILLED = ("sex", "age", "view")  # the header of the file says them where the source does not
_ROWS = 20_000  # that wait as Python values


class Names:
    """Names of a source's images, studies and patients under the site's key.

    Args:
        key: The key.
        source: READER:ARGUMENT; a file is named by its path below the folder of the argument, so the folder may move.
    """

    def __init__(self, key: SiteKey, source: str) -> None:
        self._key, self._root = key, source_root(source)
        self._reader = source.partition(":")[0]
        self._known: dict[tuple[str, str], str] = {}

    def plain(self, record: Record) -> str:
        """The name of an image in its source."""
        if not isinstance(record.image, Path):
            return f"{self._reader}:{record.image}"
        if self._root is not None and record.image.is_relative_to(self._root):
            return record.image.relative_to(self._root).as_posix()
        return record.image.as_posix()

    def image(self, record: Record) -> str:
        return self._key.name("image", self.plain(record))

    def of(self, kind: str, text: str) -> str:
        """The name of a study or patient."""
        if (kind, text) not in self._known:
            self._known[kind, text] = self._key.name(kind, text)
        return self._known[kind, text]


def source_root(source: str) -> Path | None:
    """The folder that a source string names; None where it names none."""
    path = source.partition(":")[2]
    while not Path(path).is_dir() and "," in path:
        path = path.rpartition(",")[0]
    return Path(path) if path and Path(path).is_dir() else None


class First(NamedTuple):
    """The row whose pixels equal pictures share, and where they are."""

    id: str
    shard: int
    offset: int
    valid_shard: int | None
    valid_offset: int | None


def facts_of(
    name: str, reduced: Reduced, place: Place, bits: Mapping[str, Place], alias_of: str | None, row: Mapping[str, Any]
) -> dict[str, Any]:
    """A line of the journal: what is known of a picture.

    Args:
        name: Of the image.
        reduced: What was found.
        place: Where its pixels are.
        bits: Where its validity ("valid") and masks ("mask NAME") are.
        alias_of: The image whose pixels it shares.
        row: What its record says, see :func:`describe`: the source may have lost it when the pack goes on.
    """
    about = reduced.about
    height, width = reduced.pixels.shape
    valid = bits.get("valid", (None, None))
    return {
        "id": name, "shard": place[0], "offset": place[1], "height": height, "width": width,
        "valid_shard": valid[0], "valid_offset": valid[1], "valid_share": reduced.valid_share,
        "masks": {key.removeprefix("mask "): spot for key, spot in bits.items() if key.startswith("mask ")},
        "spacing_row": None if reduced.spacing is None else reduced.spacing[0],
        "spacing_column": None if reduced.spacing is None else reduced.spacing[1],
        "digest": reduced.digest.hex(), "phash": base64.b64encode(reduced.phash).decode(), "alias_of": alias_of,
        "flags": list(reduced.flags), "source_height": reduced.source[0], "source_width": reduced.source[1],
        "format": about.format, "encoding": about.encoding or None, "photometric": about.photometric or None,
        "bits": about.bits or None, "modality": about.modality or None, "body_part": about.body_part[:40] or None,
        "row": {**row, **{name: row[name] or value for name, value in (
            ("sex", about.sex), ("age", age_band(about.age)), ("view", about.view))}},
    }  # fmt: skip


def describe(
    record: Record, size: tuple[int, int], source: tuple[int, int], names: Names, findings: Sequence[str]
) -> dict[str, Any]:
    """What a record says, as columns: names, sex, age band, view, split, labels, boxes in pixels as stored.

    Args:
        record: Of the source.
        size, source: (height, width) as stored and of the file.
        names: Of studies and patients.
        findings: Columns of labels.
    """
    tall, wide = size[0] / source[0], size[1] / source[1]
    boxes = [
        {"finding": box.finding, "x": box.x * wide, "y": box.y * tall, "width": box.width * wide,
         "height": box.height * tall}
        for box in record.boxes
    ]  # fmt: skip
    return {
        "study": names.of("study", record.study), "patient": names.of("patient", record.patient),
        "source": record.source, "sex": record.sex, "age": age_band(record.age), "view": record.view,
        "split": record.split or None, "boxes": boxes or None,
        **{f"label:{finding}": record.labels.get(finding) for finding in findings},
    }  # fmt: skip


class Index:
    """The rows of a pack: those of an earlier one, then those that come, kept as Arrow tables of some thousand rows.

    Args:
        records: Image -> its record, for pictures that the source has now; what it says replaces what was said before.
        names: Of studies and patients.
        findings: Columns of labels.
        old: Index of the pack that is added to, or None.
    """

    def __init__(
        self, records: Mapping[str, Record], names: Names, findings: Sequence[str], old: pa.Table | None
    ) -> None:
        self._records, self._names, self._findings, self._old = records, names, findings, old
        self._parts: list[pa.Table] = []
        self._lines: list[dict[str, Any]] = []
        self._first: dict[bytes, First | int] = {}  # of earlier rows only their number
        self.known: set[str] = set()
        if old is not None:
            self.known.update(old.column("id").to_pylist())
            digests, aliases = old.column("digest").to_pylist(), old.column("alias_of").is_null().to_pylist()
            self._first.update((d, row) for row, (d, own) in enumerate(zip(digests, aliases, strict=True)) if own)

    def first(self, digest: bytes) -> First | None:
        """The row whose pixels have this digest; None where they are new."""
        found = self._first.get(digest)
        if isinstance(found, int):
            assert self._old is not None
            row = self._old.slice(found, 1).select(First._fields).to_pylist()[0]
            return First(**row)
        return found

    def add(self, line: Mapping[str, Any]) -> None:
        """Add what the journal says of a picture."""
        line = dict(line)
        self.known.add(line["id"])
        line["digest"], line["phash"] = bytes.fromhex(line["digest"]), base64.b64decode(line["phash"])
        line["masks"] = [{"name": n, "shard": s, "offset": o} for n, (s, o) in line["masks"].items()] or None
        if line["alias_of"] is None:
            self._first.setdefault(line["digest"], First(*(line[name] for name in First._fields)))
        was = line.pop("row")
        record = self._records.get(line["id"])
        now = {} if record is None else self._describe(record, line)
        self._lines.append({**line, **was, **{name: value for name, value in now.items() if value is not None or
                                             name not in _FILLED}})  # fmt: skip
        if len(self._lines) >= _ROWS:
            self._close_part()

    def table(self) -> pa.Table:
        """All of them."""
        import pyarrow as pa

        self._close_part()
        old = [] if self._old is None else [self._refreshed(self._old)]
        if not old and not self._parts:
            return index_schema(tuple(self._findings)).empty_table()
        return pa.concat_tables([*old, *self._parts]).unify_dictionaries().combine_chunks()

    def _close_part(self) -> None:
        import pyarrow as pa

        schema = index_schema(tuple(self._findings))
        if self._lines:
            columns = {field.name: pa.array([line.get(field.name) for line in self._lines], type=field.type)
                       for field in schema}  # fmt: skip
            self._parts.append(pa.table(columns, schema))
        self._lines = []

    def _describe(self, record: Record, line: Mapping[str, Any]) -> dict[str, Any]:
        size, source = (line["height"], line["width"]), (line["source_height"], line["source_width"])
        return describe(record, size, source, self._names, self._findings)

    def _refreshed(self, old: pa.Table) -> pa.Table:
        """Earlier rows with what the source says of them now; those that it no longer has stay as they are."""
        import pyarrow as pa

        schema = index_schema(tuple(self._findings))
        described = [name for name in schema.names if name in _DESCRIBED or name.startswith("label:")]
        columns = {name: old.column(name).to_pylist() if name in old.schema.names else [None] * len(old)
                   for name in described}  # fmt: skip
        sizes = old.select(["id", "height", "width", "source_height", "source_width"])
        for start in range(0, len(old), _ROWS):
            for row, line in enumerate(sizes.slice(start, _ROWS).to_pylist(), start):
                record = self._records.get(line["id"])
                if record is None:
                    continue
                for name, value in self._describe(record, line).items():
                    if value is not None or name not in _FILLED:
                        columns[name][row] = value
        arrays = {
            field.name: pa.array(columns.pop(field.name), type=field.type) if field.name in columns
            else old.column(field.name) for field in schema
        }  # fmt: skip
        return pa.table(arrays, schema)


class Conflict(NamedTuple):
    """Two rows of one picture that do not agree."""

    image: str
    first: str
    field: str
    here: str
    there: str


def conflicts(table: pa.Table, findings: Sequence[str]) -> list[Conflict]:
    """Where rows of equal pictures say different things of patient, sex, age, view, split or a finding that both
    assess."""
    import pyarrow as pa
    import pyarrow.compute as pc

    aliases = table.filter(pc.is_valid(table.column("alias_of")))
    if not len(aliases):
        return []
    first = table.take(pc.index_in(aliases.column("alias_of"), value_set=table.column("id").combine_chunks()))
    found = []
    fields = ("patient", "sex", "age", "view", "split", *(f"label:{finding}" for finding in findings))
    for name in fields:
        here, there = (t.column(name).cast(pa.string()).to_pylist() for t in (aliases, first))
        for image, other, a, b in zip(aliases.column("id").to_pylist(), first.column("id").to_pylist(), here, there,
                                      strict=True):  # fmt: skip
            if a is not None and b is not None and a != b:
                found.append(Conflict(image, other, name.removeprefix("label:"), a, b))
    return sorted(found)
