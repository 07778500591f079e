"""A pack: reduced radiographs in plain ``.npy`` shards with a Parquet index, read at the speed of memory.

    pack.json             what it is: format, size, bits, findings, notes, fingerprint of the site's key, shards
    index.parquet         one row for each record of the source, in a stable order; equal pictures share their pixels
    shards/NNNNNN.npy     pixels one after another, uint8 or uint16, (elements,)
    shards/bits-NNNNNN.npy  validity and masks, one bit a pixel, each from a whole byte on

Columns of the index: id, study, patient (names under the site's key), source, sex, age (band), view, split; findings as
``label:NAME`` (1, 0, null: not assessed); boxes; masks; spacing in mm of the pixels as stored; shard, offset, height,
width; valid_shard, valid_offset (null: all valid), valid_share; digest of pixels and validity; phash (256 bits);
alias_of; flags; format, encoding, photometric, bits, modality, body_part, source_height, source_width.

``otcxr pack`` writes packs (``otcxr.packing``); here they are read. An index of a million rows opens in a second: rows
become records one by one, when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from otcxr.data.records import Box, Collection, ImageRef, Radiograph, Record, Stored
from otcxr.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "AGE_BANDS",
    "FORMAT",
    "PackRecords",
    "PackedImage",
    "PackedMask",
    "age_band",
    "file_digest",
    "forget_shards",
    "index_schema",
    "open_index",
    "open_shard",
    "read_facts",
    "read_pack",
]

FORMAT = 1
AGE_BANDS = (*(f"{low}-{low + 9}" for low in range(0, 90, 10)), "90+")
_LABEL = "label:"


def age_band(age: float | None) -> str | None:
    """Ten years, and one band from 90 on: few are so old that their age alone may name them."""
    return None if age is None else AGE_BANDS[min(int(age) // 10, 9)]


class PackedImage(NamedTuple):
    """The pixels of one row. ``str()`` is the row's id."""

    folder: str
    id: str
    shard: int
    offset: int
    height: int
    width: int
    valid: tuple[int, int] | None
    spacing: tuple[float, float] | None

    def __str__(self) -> str:
        return self.id

    def stored(self) -> Stored:
        """The pixels as they lie in the shard, without a copy; validity unpacked.

        Raises: DataError: the shard is missing or shorter than the index says.
        """
        count = self.height * self.width
        flat = _cut(_pixels(self.folder, self.shard), self.offset, count, self.id)
        valid = None if self.valid is None else _bits(self.folder, *self.valid, self.height, self.width, self.id)
        return Stored(flat.reshape(self.height, self.width), valid, self.spacing)

    def radiograph(self) -> Radiograph:
        import torch

        pixels, valid, spacing = self.stored()
        image = pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
        mask = np.ones(pixels.shape, dtype=np.bool_) if valid is None else valid
        return Radiograph(torch.from_numpy(image)[None], torch.from_numpy(mask)[None], spacing)


class PackedMask(NamedTuple):
    """A mask of one row: 0 and 1 at the size of its picture."""

    folder: str
    name: str
    shard: int
    offset: int
    height: int
    width: int

    def __str__(self) -> str:
        return self.name

    def radiograph(self) -> Radiograph:
        import torch

        inside = _bits(self.folder, self.shard, self.offset, self.height, self.width, self.name)
        image = torch.from_numpy(inside.astype(np.float32))[None]
        return Radiograph(image, torch.ones_like(image, dtype=torch.bool), None)


@lru_cache(maxsize=4096)
def open_shard(folder: str, name: str) -> NDArray[Any]:
    """A shard, mapped; nothing of it is read yet.

    Raises: DataError: missing, or no shard.
    """
    path = Path(folder, "shards", name)
    try:
        shard: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python, and raises what that raises
        raise DataError(f"{path} is no shard of a pack: {error}; copy it again, or pack anew") from error
    if shard.ndim != 1 or shard.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path} holds {shard.dtype} of shape {shard.shape}; expected one row of 8- or 16-bit pixels")
    return shard.view(np.ndarray)  # a plain array over the same map: slices of it are cheaper


@lru_cache(maxsize=4096)
def _pixels(folder: str, shard: int) -> NDArray[Any]:
    return open_shard(folder, f"{shard:06d}.npy")


def forget_shards() -> None:
    """Map every shard anew: what lay in a folder before may have grown, or be another pack."""
    open_shard.cache_clear()
    _pixels.cache_clear()


def _cut(shard: NDArray[Any], offset: int, count: int, what: str) -> NDArray[Any]:
    if offset < 0 or count < 0 or offset + count > len(shard):
        raise DataError(f"{what} lies at {offset} to {offset + count} of a shard that has {len(shard)} elements; copy "
                        "the pack again")  # fmt: skip
    return shard[offset : offset + count]


def _bits(folder: str, shard: int, offset: int, height: int, width: int, what: str) -> NDArray[np.bool_]:
    packed = _cut(open_shard(folder, f"bits-{shard:06d}.npy"), offset, -(-height * width // 8), what)
    return np.unpackbits(packed, count=height * width).view(np.bool_).reshape(height, width)


class PackRecords(Sequence[Record]):
    """The rows of a pack, or some of them; each becomes a record when it is asked for.

    Args:
        folder: The pack.
        table: Its index.
        findings: Those of the pack.
        rows: Which rows, in which order; None: all.
    """

    def __init__(
        self, folder: str, table: pa.Table, findings: tuple[str, ...], rows: NDArray[np.int64] | None = None
    ) -> None:
        self._folder, self._table, self._findings = folder, table, findings
        self._rows = np.arange(len(table)) if rows is None else rows

    def __reduce__(self) -> tuple[Any, ...]:
        # another process opens the index itself: the table is larger than its name
        return _reopened, (self._folder, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackRecords) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> PackRecords: ...
    def __getitem__(self, index: int | slice) -> Record | PackRecords:
        if isinstance(index, slice):
            return PackRecords(self._folder, self._table, self._findings, self._rows[index])
        return self._record(int(self._rows[index]))

    def __iter__(self) -> Iterator[Record]:
        return (self._record(int(row)) for row in self._rows)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> PackRecords:
        """Some of them, in this order."""
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return PackRecords(self._folder, self._table, self._findings, rows)

    def column(self, name: str) -> list[Any]:
        """One field of all records, without making them: name, study, patient, sex, view, split, source,
        labelled, boxed."""
        if name == "boxed":
            boxed: list[Any] = self._columns.boxed[self._rows].tolist()
            return boxed
        if name == "labelled":
            known = np.asarray((self._columns.labels >= 0).any(axis=1))
            found: list[Any] = known[self._rows].tolist()
            return found
        name = "id" if name == "name" else name
        import pyarrow as pa

        values: list[Any] = self._table.column(name).take(pa.array(self._rows)).to_pylist()
        return ["" if v is None else v for v in values] if name == "split" else values

    def coded(self, name: str) -> tuple[NDArray[np.int64], list[Any]]:
        """One field of all records as numbers, and what they stand for."""
        import pyarrow as pa

        column = self._table.column(name)
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        column = column.combine_chunks()
        terms = ["" if name == "split" and v is None else v for v in [*column.dictionary.to_pylist(), None]]
        codes = column.indices.fill_null(len(terms) - 1).to_numpy()[self._rows].astype(np.int64)
        present, again = np.unique(codes, return_inverse=True)
        return again, [terms[code] for code in present.tolist()]

    def checked(self) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
        """Share of valid pixels, and a number for the contents, of each row, as found when it was packed."""
        import pyarrow as pa

        rows = pa.array(self._rows)
        share = self._table.column("valid_share").take(rows).to_numpy()
        digests = b"".join(value[:8] for value in self._table.column("digest").take(rows).to_pylist())
        return share.astype(np.float32), np.frombuffer(digests, dtype="<u8")

    def _record(self, row: int) -> Record:
        get = self._columns
        name = get.names["id"][row].as_py()
        shard, offset, height, width, valid_shard, valid_offset = get.places[row].tolist()
        spacing = None if get.spacing[row, 0] <= 0 else tuple(get.spacing[row].tolist())
        valid = None if valid_shard < 0 else (valid_shard, valid_offset)
        labels = {f: value for f, value in zip(self._findings, get.labels[row].tolist(), strict=True) if value >= 0}
        boxes: tuple[Box, ...] = ()
        if get.boxed[row]:
            boxes = tuple(Box(**box) for box in self._table.column("boxes")[row].as_py())
        masks: dict[str, ImageRef] = {}
        if get.masked[row]:
            masks = {
                m["name"]: PackedMask(self._folder, f"{name} {m['name']}", m["shard"], m["offset"], height, width)
                for m in self._table.column("masks")[row].as_py()
            }
        words = get.words
        return Record(
            PackedImage(self._folder, name, shard, offset, height, width, valid, spacing),
            get.names["study"][row].as_py(), get.names["patient"][row].as_py(), words["sex"][row],
            _MIDDLES[words["age"][row]], words["view"][row], words["source"][row] or "", spacing, labels, boxes, masks,
            words["split"][row] or "",
        )  # fmt: skip

    @property
    def _columns(self) -> _Columns:
        return _columns(self._folder, self._table, self._findings)


class _Columns(NamedTuple):
    """Arrays of what every record needs: making one must not cost more than reading its pixels.

    Attributes:
        names: id, study, patient.
        places: (N, 6): shard, offset, height, width, shard and offset of the validity (-1: all valid).
        spacing: (N, 2), -1 where it is not known.
        labels: (N, findings), -1 where one is not assessed.
        words: sex, age, view, source, split.
        boxed, masked: Whether a row has any.
    """

    names: dict[str, Any]
    places: NDArray[np.int64]
    spacing: NDArray[np.float64]
    labels: NDArray[np.int8]
    words: dict[str, NDArray[np.object_]]
    boxed: NDArray[np.bool_]
    masked: NDArray[np.bool_]


_KNOWN: dict[str, tuple[Any, _Columns]] = {}  # of the packs that are open, by folder


def _columns(folder: str, table: pa.Table, findings: tuple[str, ...]) -> _Columns:
    known = _KNOWN.get(folder)
    if known is not None and known[0] is table:
        return known[1]
    import pyarrow.compute as pc

    def numbers(*names: str, kind: type[np.generic]) -> NDArray[Any]:
        out = np.empty((len(table), len(names)), dtype=kind)
        for place, name in enumerate(names):
            out[:, place] = table.column(name).fill_null(-1).to_numpy()
        return out

    words = {}
    for name in ("sex", "age", "view", "source", "split"):
        column = table.column(name).combine_chunks()
        terms = np.array([*column.dictionary.to_pylist(), None], dtype=object)
        words[name] = terms[column.indices.fill_null(len(terms) - 1).to_numpy()]
    columns = _Columns(
        names={name: table.column(name).combine_chunks() for name in ("id", "study", "patient")},
        places=numbers("shard", "offset", "height", "width", "valid_shard", "valid_offset", kind=np.int64),
        spacing=numbers("spacing_row", "spacing_column", kind=np.float64),
        labels=numbers(*(_LABEL + finding for finding in findings), kind=np.int8),
        words=words,
        boxed=pc.list_value_length(table.column("boxes")).fill_null(0).to_numpy() > 0,
        masked=pc.list_value_length(table.column("masks")).fill_null(0).to_numpy() > 0,
    )
    _KNOWN[folder] = (table, columns)
    return columns


_MIDDLES: dict[str | None, float | None] = {None: None, **{band: 10.0 * k + 5 for k, band in enumerate(AGE_BANDS)}}


@lru_cache(maxsize=8)
def _open(folder: str, changed: int) -> tuple[dict[str, Any], Any]:
    """Facts and index of a pack; ``changed`` is the time its facts were written, so that new ones are read anew."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    forget_shards()
    root = Path(folder)
    facts = read_facts(root)
    path = root / "index.parquet"
    try:
        content = path.read_bytes()
        if file_digest(content) != facts["index_digest"]:
            raise DataError(f"{path} is not the file that pack.json was written for; copy the pack again")
        table = pq.read_table(pa.BufferReader(content)).cast(index_schema(tuple(facts["findings"])))
        _refuse_nonsense(table, facts)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}; copy the pack again") from error
    for shard in facts["shards"]:
        path = root / "shards" / shard["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            raise DataError(f"{path} has {'no' if size is None else size} bytes, expected {shard['bytes']}: copy the "
                            "pack again")  # fmt: skip
    return facts, table


def read_facts(root: Path) -> dict[str, Any]:
    """``pack.json`` of a finished pack.

    Raises: DataError: it is missing, damaged or of another format.
    """
    try:
        facts = json.loads((root / "pack.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{root} is no pack (pack.json: {error}); expected the OUT of 'otcxr pack SOURCE OUT', "
                        "finished; an interrupted one goes on with the same command") from error  # fmt: skip
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        what = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise DataError(f"{root} is a pack of format {what}; this version reads {FORMAT}: pack anew")

    def words(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    shards = facts.get("shards")
    known = {"name": str, "bytes": int}
    whole = (
        words(facts.get("findings")) and words(facts.get("notes")) and isinstance(facts.get("rows"), int)
        and isinstance(facts.get("index_digest"), str) and isinstance(shards, list)
        and all(isinstance(s, dict) and all(isinstance(s.get(k), kind) for k, kind in known.items())
                and "/" not in s["name"] and "\0" not in s["name"] for s in shards)
    )  # fmt: skip
    if not whole:
        raise DataError(f"{root / 'pack.json'} is damaged: a part of it is missing or of another type; copy it again")
    return facts


def file_digest(content: bytes) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _refuse_nonsense(table: pa.Table, facts: dict[str, Any]) -> None:
    """Raise DataError where an index can be read and yet is none; what its rows point to is checked when it is read."""
    import pyarrow.compute as pc

    if len(table) != facts["rows"]:
        raise ValueError(f"it has {len(table)} rows, pack.json says {facts['rows']}")
    for name in ("id", "study", "patient", "shard", "offset", "height", "width", "digest", "valid_share"):
        if table.column(name).null_count:
            raise ValueError(f"column '{name}' has gaps")
    if len(table) and (pc.min(table.column("height")).as_py() < 1 or pc.min(table.column("width")).as_py() < 1):
        raise ValueError("a picture of it has no pixels")
    if unknown := set(pc.unique(table.column("age").cast("string")).to_pylist()) - {*AGE_BANDS, None}:
        raise ValueError(f"'{unknown.pop()}' is no band of ages")


def index_schema(findings: tuple[str, ...]) -> Any:
    """The types of the index."""
    import pyarrow as pa

    word = pa.dictionary(pa.int32(), pa.string())
    box = pa.struct([("finding", pa.string()), *((n, pa.float32()) for n in ("x", "y", "width", "height"))])
    mask = pa.struct([("name", pa.string()), ("shard", pa.int32()), ("offset", pa.int64())])
    return pa.schema([
        ("id", pa.string()), ("study", pa.string()), ("patient", pa.string()), ("source", word), ("sex", word),
        ("age", word), ("view", word), ("split", word), *((_LABEL + finding, pa.int8()) for finding in findings),
        ("boxes", pa.list_(box)), ("masks", pa.list_(mask)), ("spacing_row", pa.float32()),
        ("spacing_column", pa.float32()), ("shard", pa.int32()), ("offset", pa.int64()), ("height", pa.int32()),
        ("width", pa.int32()), ("valid_shard", pa.int32()), ("valid_offset", pa.int64()), ("valid_share", pa.float32()),
        ("digest", pa.binary(16)), ("phash", pa.binary(32)), ("alias_of", pa.string()),
        ("flags", pa.list_(pa.string())),
        ("format", word), ("encoding", word), ("photometric", word), ("bits", pa.int32()), ("modality", word),
        ("body_part", word), ("source_height", pa.int32()), ("source_width", pa.int32()),
    ])  # fmt: skip


def open_index(folder: str) -> tuple[dict[str, Any], Any]:
    """``pack.json`` and the index of a pack, checked.

    Raises: DataError: see ``read_pack``.
    """
    return _open(folder, _changed(folder))


def _reopened(folder: str, rows: NDArray[np.int64]) -> PackRecords:
    facts, table = open_index(folder)
    return PackRecords(folder, table, tuple(facts["findings"]), rows)


def _changed(folder: str) -> int:
    try:
        return (Path(folder) / "pack.json").stat().st_mtime_ns
    except OSError:
        return 0


def read_pack(text: str) -> Collection:
    """Open a pack: ``PATH``.

    Names are those under the site's key; ages are the middle of their band of ten years (95 from 90 on); boxes, masks
    and spacing are of the pixels as stored. Equal pictures (``alias_of``) are records of their own.

    Raises: DataError: no pack, not finished, of another format, or a part of it is missing.
    """
    folder = str(Path(text))
    if not Path(folder).is_dir():
        raise DataError(f"no such folder: {folder}; check data.source (pack:PATH)")
    facts, table = open_index(folder)
    findings = tuple(facts["findings"])
    records = PackRecords(folder, table, findings)
    return Collection(f"pack:{text}", findings, records, (), tuple(facts["notes"]))
