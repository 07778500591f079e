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

__all__ = ["Conflict", "Names", "build_table", "conflicts", "facts_of", "source_root", "unpacked"]

_PIXEL = (
    "spacing_row", "spacing_column", "shard", "offset", "height", "width", "valid_shard", "valid_offset", "valid_share",
    "alias_of", "flags", "format", "encoding", "photometric", "bits", "modality", "body_part", "source_height",
    "source_width",
)  # fmt: skip


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


def facts_of(
    name: str, reduced: Reduced, place: Place, bits: Mapping[str, Place], alias_of: str | None
) -> dict[str, Any]:
    """A line of the journal: what is known of a picture's pixels.

    Args:
        name: Of the image.
        reduced: What was found.
        place: Where its pixels are.
        bits: Where its validity ("valid") and masks ("mask NAME") are.
        alias_of: The image whose pixels it shares.
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
        "sex": about.sex, "age": age_band(about.age), "view": about.view,
    }  # fmt: skip


def build_table(
    facts: Sequence[Mapping[str, Any]], records: Mapping[str, Record], names: Names, findings: Sequence[str],
    before: Mapping[str, Mapping[str, Any]],
) -> pa.Table:  # fmt: skip
    """The index.

    Args:
        facts: What is known of the pixels, a line a picture, in the order of the rows.
        records: Image -> its record, for pictures that the source has now.
        names: Of studies and patients.
        findings: Columns of labels.
        before: Image -> its row, for pictures that only an earlier run of ``otcxr pack`` has seen.
    """
    import pyarrow as pa

    schema = index_schema(tuple(findings))
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for line in facts:
        record = records.get(line["id"])
        row = dict(before[line["id"]]) if record is None else _described(record, line, names, findings)
        row |= {"id": line["id"], **{name: line[name] for name in _PIXEL}}
        row["digest"], row["phash"] = bytes.fromhex(line["digest"]), base64.b64decode(line["phash"])
        row["masks"] = [{"name": n, "shard": s, "offset": o} for n, (s, o) in line["masks"].items()] or None
        for name, values in columns.items():
            values.append(row.get(name))
    return pa.table({name: pa.array(columns[name], type=schema.field(name).type) for name in schema.names}, schema)


def unpacked(table: pa.Table) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """An index as lines of a journal, and its rows by image; what ``build_table`` takes."""
    lines, rows = [], {}
    for row in table.to_pylist():
        line = {name: row[name] for name in ("id", *_PIXEL)}
        line |= {"digest": row["digest"].hex(), "phash": base64.b64encode(row["phash"]).decode(),
                 "masks": {m["name"]: (m["shard"], m["offset"]) for m in row["masks"] or ()},
                 "sex": None, "age": None, "view": None}  # fmt: skip
        lines.append(line)
        rows[row["id"]] = row
    return lines, rows


def _described(record: Record, line: Mapping[str, Any], names: Names, findings: Sequence[str]) -> dict[str, Any]:
    tall, wide = line["height"] / line["source_height"], line["width"] / line["source_width"]
    boxes = [
        {"finding": box.finding, "x": box.x * wide, "y": box.y * tall, "width": box.width * wide,
         "height": box.height * tall}
        for box in record.boxes
    ]  # fmt: skip
    return {
        "study": names.of("study", record.study), "patient": names.of("patient", record.patient),
        "source": record.source, "sex": record.sex or line["sex"], "age": age_band(record.age) or line["age"],
        "view": record.view or line["view"], "split": record.split or None, "boxes": boxes or None,
        **{f"label:{finding}": record.labels.get(finding) for finding in findings},
    }  # fmt: skip


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
