"""The composition: a source to a pack, killed and gone on with as often as may be."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from otcxr.console import Progress, SilentProgress
from otcxr.data.identity import SiteKey, site_key
from otcxr.data.pack import FORMAT, file_digest, forget_shards, open_index
from otcxr.data.records import Collection, Record, Skipped
from otcxr.data.sources import open_collection
from otcxr.errors import ConfigError, DataError
from otcxr.files import file_name, locked, sweep, write_atomic, write_rows
from otcxr.packing.index import Conflict, First, Index, Names, conflicts, describe, facts_of, source_root
from otcxr.packing.page import write_page
from otcxr.packing.reduce import Reduced, Task
from otcxr.packing.store import Journal, Place, Shards, list_shards, replay
from otcxr.packing.workers import decode_all
from otcxr.version import __version__

__all__ = ["PackConfig", "Packed", "pack_collection"]

_JOURNAL = "journal.jsonl"
_OWN = (".lock", "shards", _JOURNAL, "quarantine", "quarantine.csv", "conflicts.csv", "index.parquet", "data.html")
_THUMBNAILS = 200  # of files that were set aside


@dataclass(frozen=True)
class PackConfig:
    """How a pack is made.

    Attributes:
        size: Short side in pixels to which pictures are reduced; smaller ones keep their size.
        bits: 8 or 16, of the pixels that are kept.
        workers: Processes that decode; 0: one for each core.
        memory_gb: Memory in GB that decoding a file may take.
        timeout_s: Seconds that decoding a file may take.
        shard_gb: Largest size of a shard in GB.
        max_skipped: Largest share of images that may be missing or broken before the pack is refused.
    """

    size: int = 512
    bits: int = 8
    workers: int = 0
    memory_gb: float = 2.0
    timeout_s: float = 60.0
    shard_gb: float = 1.0
    max_skipped: float = 0.05

    def __post_init__(self) -> None:
        if self.bits not in (8, 16) or self.size < 16:
            raise ConfigError(f"a pack has 8 or 16 bits and a short side of at least 16, received {self.bits} bits and "
                              f"{self.size}")  # fmt: skip
        if self.workers < 0 or not 0 <= self.max_skipped <= 1:
            raise ConfigError(f"workers must be >= 0 and max_skipped in [0, 1], received {self.workers} and "
                              f"{self.max_skipped}")  # fmt: skip
        if not (self.memory_gb > 0 and self.timeout_s > 0 and self.shard_gb > 0):
            raise ConfigError("memory_gb, timeout_s and shard_gb must be above 0")


class Packed(NamedTuple):
    """What came of it.

    Attributes:
        path: The pack.
        rows: Records in it.
        new: Of them, those that this call added.
        aliases: Of the rows, those that share the pixels of another one.
        skipped: What is not in it.
        conflicts: Rows of equal pictures that say different things.
    """

    path: Path
    rows: int
    new: int
    aliases: int
    skipped: tuple[Skipped, ...]
    conflicts: tuple[Conflict, ...]


def pack_collection(
    source: str, out: str | Path, config: PackConfig | None = None, *, key: Path | None = None,
    progress: Progress | None = None,
) -> Packed:  # fmt: skip
    """Pack a source, go on with an interrupted pack, or add to a finished one what the source has since.

    Records that are in the pack already keep their pixels; what the source says of them now (labels, splits) replaces
    what it said before. What could not be used before is tried again.

    Args:
        source: READER:ARGUMENT.
        out: Folder of the pack.
        config: The settings; they must be those that the pack was begun with.
        key: File of the site's key; None: ``otcxr.data.identity.site_key``.
        progress: Where to show progress.
    Raises: ConfigError: other settings or another key than before, or another process is at it. DataError: the source
        cannot be read, or too much of it is broken. StorageError: the disk is full.
    """
    config, progress, out = config or PackConfig(), progress or SilentProgress(), Path(out)
    root = source_root(source)
    if root is not None and out.resolve() == root.resolve():
        raise ConfigError(f"the pack would be written into its source {out}; name another folder")
    names_key = site_key(key)
    progress.say(f"names are hashed with the key {names_key.path} (fingerprint {names_key.fingerprint}); keep it: "
                 "without it a second run takes everything for new")  # fmt: skip
    collection = open_collection(source)
    for note in collection.notes:
        progress.say(f"note: {note}")
    _refuse_foreign(out)
    with locked(out):
        sweep(out)
        sweep(out / "quarantine")
        return _Packing(collection, source, out, config, names_key, progress).run()


class _Packing:
    """One call of ``pack_collection``."""

    def __init__(
        self, collection: Collection, source: str, out: Path, config: PackConfig, key: SiteKey, progress: Progress
    ) -> None:
        self.collection, self.source, self.out = collection, source, out
        self.config, self.key, self.progress = config, key, progress
        self.root = source_root(source)
        self.names = Names(key, source)
        self.finished: dict[str, Any] | None = None
        table = None
        if (out / "pack.json").exists():
            self.finished, table = open_index(str(out))
        self.old = 0 if table is None else len(table)
        self.records: dict[str, Record] = {}
        for record in collection.records:
            if self.records.setdefault(self.names.image(record), record) is not record:
                raise DataError(f"{source} names {self.names.plain(record)} twice; remove one")
        findings = list(collection.findings)
        self.findings = findings + [f for f in (self.finished or {}).get("findings", ()) if f not in findings]
        self.index = Index(self.records, self.names, self.findings, table)
        self.failed: dict[str, str] = {}

    def run(self) -> Packed:
        head = self._head()
        first, first_bits = self._next_shards()
        limit = int(self.config.shard_gb * 1e9)
        kind = np.uint8 if self.config.bits == 8 else np.uint16
        pixels = Shards(self.out / "shards", "", kind, limit, first)
        bits = Shards(self.out / "shards", "bits-", np.uint8, limit, first_bits)
        path = self.out / _JOURNAL
        told = replay(path)
        begun = next(told, None)
        if begun is not None and begun | {"begun_with": self.old} == head != begun:
            # killed when the index was written and before its journal was removed: everything in it is in the index
            path.unlink()
            told, begun = iter(()), None
        if begun is not None and begun != head:
            raise ConfigError(f"{self.out} was begun with other settings or another key ({_difference(begun, head)})"
                              "; go on with those, or choose another folder")  # fmt: skip
        self._take_up(told, pixels, bits)
        journal = Journal(path, pixels, bits)
        try:
            if begun is None:
                journal.append(head)
                journal.sync()
            self._decode(journal, pixels, bits)
        finally:
            journal.close()
            pixels.close()
            bits.close()
        self._refuse_too_many()
        pixels.finish()
        bits.finish()
        packed = self._finish(head)
        path.unlink()
        return packed

    # --- where it was ---
    def _head(self) -> dict[str, Any]:
        head = {"format": FORMAT, "size": self.config.size, "bits": self.config.bits, "key": self.key.fingerprint,
                "shard_gb": self.config.shard_gb}  # fmt: skip
        if self.finished is not None:
            was = {name: self.finished.get(name) for name in head}
            if was != head:
                raise ConfigError(
                    f"{self.out} was packed with other settings or another key ({_difference(was, head)}); add to it "
                    "with those, or choose another folder"
                )
        return head | {"begun_with": self.old}

    def _next_shards(self) -> tuple[int, int]:
        if self.finished is None:
            return 0, 0
        names = [shard["name"] for shard in self.finished["shards"]]
        bits = [int(name.removeprefix("bits-")[:6]) for name in names if name.startswith("bits-")]
        pixels = [int(name[:6]) for name in names if not name.startswith("bits-")]
        return max(pixels, default=-1) + 1, max(bits, default=-1) + 1

    def _take_up(self, told: Iterable[dict[str, Any]], pixels: Shards, bits: Shards) -> None:
        """Everything that the journal tells of, and the shards cut to it."""
        end: dict[str, Place] = {}
        for line in told:
            if "reason" in line:
                self.failed[line["id"]] = line["reason"]
                continue
            end |= {name: tuple(place) for name, place in line.pop("end").items()}
            self.index.add(line)
        first, first_bits = self._next_shards()
        pixels.go_on(*end.get("pixels", (first, 0)))
        bits.go_on(*end.get("bits", (first_bits, 0)))

    # --- the work ---
    def _decode(self, journal: Journal, pixels: Shards, bits: Shards) -> None:
        known = self.index.known
        todo = [(n, record) for n, record in self.records.items() if n not in known and n not in self.failed]
        done = len(self.records) - len(todo)
        if done:
            self.progress.say(f"{done:,} of {len(self.records):,} images are there already")
        if not todo:
            return
        aliases = 0
        with self.progress.bar("packing", len(todo), "images") as bar:
            workers = self.config.workers or os.cpu_count() or 1
            results = decode_all(
                self._tasks(todo), workers=min(workers, len(todo)), memory_gb=self.config.memory_gb,
                timeout_s=self.config.timeout_s,
            )  # fmt: skip
            for number, result in results:
                name, record = todo[number]
                if not isinstance(result, Reduced):
                    reason = self._without_name(
                        result.reason, name, str(record.image), self.names.plain(record), record.name
                    )
                    if result.thumbnail is not None and len(self.failed) < _THUMBNAILS:
                        write_atomic(self.out / "quarantine" / f"{name}.png", result.thumbnail)
                    self.failed[name] = reason
                    journal.append({"id": name, "reason": reason})
                else:
                    first = self.index.first(result.digest)
                    aliases += first is not None
                    line, end = self._keep(name, record, result, first, pixels, bits)
                    journal.append(line | {"end": end})
                    self.index.add(line)
                bar(number + 1, f"{len(self.failed)} set aside, {aliases} duplicates")
            journal.sync()

    def _tasks(self, todo: Iterable[tuple[str, Record]]) -> Iterator[Task]:
        for _, record in todo:
            yield Task(
                record.image, dict(record.masks), record.spacing, record.view, self.config.size, self.config.bits
            )

    def _keep(
        self, name: str, record: Record, reduced: Reduced, first: First | None, pixels: Shards, bits: Shards
    ) -> tuple[dict[str, Any], dict[str, Place]]:
        """Write a picture; (line of the journal, where the shards end). An equal one lends its pixels."""
        end: dict[str, Place] = {}
        spots: dict[str, Place] = {}
        if first is None:
            place = pixels.append(reduced.pixels.ravel())
            end["pixels"] = place[0], place[1] + reduced.pixels.size
        else:
            place = first.shard, first.offset
            if first.valid_shard is not None and first.valid_offset is not None:
                spots["valid"] = first.valid_shard, first.valid_offset
        parts = {f"mask {mask}": packed for mask, packed in reduced.masks.items()}
        if first is None and reduced.valid is not None:
            parts["valid"] = reduced.valid
        for part, packed in parts.items():
            spots[part] = bits.append(packed)
            end["bits"] = spots[part][0], spots[part][1] + packed.size
        height, width = reduced.pixels.shape
        row = describe(record, (height, width), reduced.source, self.names, self.findings)
        return facts_of(name, reduced, place, spots, None if first is None else first.id, row), end

    def _without_name(self, reason: str, name: str, *texts: str) -> str:
        """A reason that says neither how the file is called nor where it lies: such names hold names of patients."""
        root = "" if self.root is None else str(self.root)
        for text in sorted(filter(None, texts), key=len, reverse=True):
            if root:  # with the folders between: they are named after patients, too
                reason = re.sub(f"{re.escape(root)}/.*?{re.escape(text)}", name, reason)
            reason = reason.replace(text, name)
        return reason.replace(root, "the source") if root else reason

    def _skipped(self) -> tuple[Skipped, ...]:
        missing = []
        for item in self.collection.skipped:
            name = self.key.name("image", item.image)
            missing.append(Skipped(name, self._without_name(item.reason, name, item.image)))
        return (*missing, *(Skipped(name, reason) for name, reason in self.failed.items()))

    def _refuse_too_many(self) -> None:
        skipped = self._skipped()
        named = len(self.index.known) + len(skipped)
        if not named:
            raise DataError(f"{self.source} has no images")
        share = len(skipped) / named
        if not self.index.known or share > self.config.max_skipped:
            first = f"first: {skipped[0].image}: {skipped[0].reason}"
            more = (
                f"Mend them, or run again with --max_skipped {np.ceil(share * 1000) / 1000:.3f}: what is packed is kept"
            )
            names = self._write_names(())
            raise DataError(f"{len(skipped)} of {named} images of {self.source} cannot be used ({first}); at most "
                            f"{self.config.max_skipped:.1%} may be left out. Their names: {names}. {more}")  # fmt: skip

    # --- the end ---
    def _finish(self, head: dict[str, Any]) -> Packed:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = self.index.table()
        skipped, disagree = self._skipped(), conflicts(table, self.findings)
        write_rows(self.out / "quarantine.csv", ("id", "reason"), [item[:2] for item in skipped])
        write_rows(self.out / "conflicts.csv", Conflict._fields, disagree)
        names = self._write_names(disagree)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=65536)
        index = sink.getvalue().to_pybytes()
        facts = {
            **{name: head[name] for name in ("format", "size", "bits", "key", "shard_gb")}, "otcxr": __version__,
            "reader": self.source.partition(":")[0], "findings": self.findings, "notes": list(self.collection.notes),
            "rows": len(table), "index_digest": file_digest(index), "shards": list_shards(self.out / "shards"),
        }  # fmt: skip
        write_atomic(self.out / "index.parquet", index)
        write_atomic(self.out / "pack.json", json.dumps(facts, indent=1) + "\n")
        for picture in (self.out / "quarantine").glob("*.png"):  # of files that have been mended since
            if picture.stem not in self.failed:
                picture.unlink()
        forget_shards()  # as they were before this run
        page = write_page(self.out, facts, table, skipped, disagree)
        if skipped or disagree:
            self.progress.say(f"names of the {len(skipped)} left out and the {len(disagree)} conflicts: {names}")
        self.progress.say(f"written: {page}")
        aliases = len(table) - table.column("alias_of").null_count
        return Packed(self.out, len(table), len(table) - self.old, aliases, skipped, tuple(disagree))

    def _write_names(self, disagree: Sequence[Conflict]) -> Path:
        """Id and name in the source of what is listed in the pack; beside the key, for the user's eyes only."""
        listed = {**{n: self.names.plain(r) for n, r in self.records.items() if n in self.failed},
                  **{self.key.name("image", item.image): item.image for item in self.collection.skipped}}  # fmt: skip
        for name in itertools.chain.from_iterable((c.image, c.first) for c in disagree):
            if name in self.records:
                listed[name] = self.names.plain(self.records[name])
        where = file_name(f"{self.out.resolve().name}-{self.key.name('pack', str(self.out.resolve()))[:8]}")
        path = self.key.path.parent / "packs" / f"{where}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        write_rows(path, ("id", "name"), sorted(listed.items()))
        path.chmod(0o600)
        return path


def _difference(was: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(f"{name} {was.get(name)}, now {now[name]}" for name in now if was.get(name) != now[name])


def _refuse_foreign(out: Path) -> None:
    """Raise ConfigError for a folder that holds other things than a pack, begun or finished."""
    if out.is_dir() and not (out / "pack.json").exists() and not (out / _JOURNAL).exists():
        held = sorted(path.name for path in out.iterdir() if path.name not in _OWN)
        if held:
            raise ConfigError(f"{out} holds other things ({held[0]}); name a new folder for the pack")
