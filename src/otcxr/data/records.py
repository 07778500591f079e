"""What a collection of radiographs is: a table of records. Readers make it, one dataset class reads its pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from otcxr.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Box",
    "Collection",
    "Columns",
    "ImageRef",
    "Radiograph",
    "Record",
    "Skipped",
    "Stored",
    "StoredImage",
    "Table",
    "VirtualImage",
    "coded",
    "column",
    "full_valid",
    "split_by_hash",
    "take",
]


class Radiograph(NamedTuple):
    """The pixels of one radiograph.

    Attributes:
        image: (1, H, W) float32 in [0, 1], bone bright.
        valid: (1, H, W) bool, False on padding (and on what the file declares as not measured).
        spacing: (row, column) pixel pitch in millimetres, None where the source does not state it.
    """

    image: Tensor
    valid: Tensor
    spacing: tuple[float, float] | None


@runtime_checkable
class VirtualImage(Protocol):
    """An image that is computed instead of read from a file: a phantom, a row of a pack, a planted mask.

    Implementations are hashable and picklable; ``str()`` of one is a short name that is unique in its collection.
    A mask is an image whose pixels are 0 and 1.
    """

    def radiograph(self) -> Radiograph: ...


class Stored(NamedTuple):
    """Pixels as they are stored: (H, W) uint8 or uint16 over their whole range, validity (None: all), spacing."""

    pixels: NDArray[Any]
    valid: NDArray[np.bool_] | None
    spacing: tuple[float, float] | None


@runtime_checkable
class StoredImage(Protocol):
    """A virtual image that lies somewhere as whole numbers, ready to be used: it needs no place in memory."""

    def stored(self) -> Stored: ...


@runtime_checkable
class Columns(Protocol):
    """Records that know a quicker way to one field of all of them than making each."""

    def column(self, name: str) -> list[Any]:
        """The field ``name`` of every record, in their order."""
        ...


@runtime_checkable
class Table(Columns, Protocol):
    """Records of which a field, or a part, is had without making them."""

    def coded(self, name: str) -> tuple[NDArray[np.int64], list[Any]]:
        """One field of all records as numbers, and what they stand for."""
        ...

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Sequence[Record]: ...
    def checked(self) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
        """Share of valid pixels, and a number for the contents, of each; whoever stored them has read them all."""
        ...


def column(records: Sequence[Record], name: str) -> list[Any]:
    """One field of all records."""
    return records.column(name) if isinstance(records, Columns) else [getattr(record, name) for record in records]


def coded(records: Sequence[Record], name: str) -> tuple[NDArray[np.int64], list[Any]]:
    """One field of all records as numbers, and what they stand for: a million words take a moment and little memory."""
    if isinstance(records, Table):
        return records.coded(name)
    known: dict[Any, int] = {}
    codes = [known.setdefault(value, len(known)) for value in column(records, name)]
    return np.array(codes, dtype=np.int64), list(known)


def take(records: Sequence[Record], indices: Sequence[int] | NDArray[np.int64]) -> Sequence[Record]:
    """Some of the records, in this order."""
    return records.take(indices) if isinstance(records, Table) else [records[index] for index in indices]


ImageRef: TypeAlias = Path | VirtualImage


class Box(NamedTuple):
    """A box around a finding, in pixels of the image as stored; x to the right, y down, from the top left corner."""

    finding: str
    x: float
    y: float
    width: float
    height: float


class Record(NamedTuple):
    """One image and what is known about it.

    Attributes:
        image: Where the pixels come from.
        study: Identifier of the study (one visit); unique within the collection's source.
        patient: Identifier of the patient; splits and intervals group by it. Unknown: one patient an image.
        sex: "M", "F" or None.
        age: Years, or None (unknown or implausible).
        view: "PA", "AP", "LATERAL" or None.
        source: Name of the reader that made the record.
        spacing: (row, column) pixel pitch in millimetres of the pixels as stored, or None.
        labels: Finding -> 1 present, 0 absent; an absent key means *not assessed*.
        boxes: Expert boxes; empty where there are none.
        masks: Name -> image of a mask, for lungs, heart and findings.
        split: "train", "val", "test" or "" (the source defines none).
    """

    image: ImageRef
    study: str
    patient: str
    sex: str | None = None
    age: float | None = None
    view: str | None = None
    source: str = ""
    spacing: tuple[float, float] | None = None
    labels: Mapping[str, int] = {}
    boxes: tuple[Box, ...] = ()
    masks: Mapping[str, ImageRef] = {}
    split: str = ""

    @property
    def name(self) -> str:
        """A short name of the image for lists and pictures; it is the file's name where there is a file."""
        return self.image.name if isinstance(self.image, Path) else str(self.image)

    @property
    def boxed(self) -> bool:
        """Whether there are boxes."""
        return bool(self.boxes)

    @property
    def labelled(self) -> bool:
        """Whether any finding is assessed."""
        return bool(self.labels)


class Skipped(NamedTuple):
    """An image that the source names but that cannot be used, why, and its split where that is known."""

    image: str
    reason: str
    split: str = ""


def split_by_hash(patient: str) -> str:
    """A split for sources that have none: 70 % of the patients are "train", 10 % "val", 20 % "test".

    It depends on the identifier alone (SHA-256), so it is the same everywhere and images may come and go.
    """
    place = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
    return "train" if place < 0.7 else "val" if place < 0.8 else "test"


class Collection(NamedTuple):
    """Records of one source.

    Attributes:
        name: The source string that opened it.
        findings: Findings in the order in which tables list them.
        records: The records, in a stable order.
        skipped: Images that the reader left out, with the reason (listed, never silent).
        notes: Rules by which labels were read, and what an option of the source left out; said wherever it is opened
            to be looked at.
    """

    name: str
    findings: tuple[str, ...]
    records: Sequence[Record]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def has_splits(self) -> bool:
        """Whether any record is in a split."""
        return any(coded(self.records, "split")[1])

    def split(self, name: str) -> Collection:
        """Return the records of one split.

        Raises:
            DataError: No record has this split, or a patient is in this split and in another one.
        """
        codes, splits = coded(self.records, "split")
        if name not in splits or not name:
            known = set(splits) - {""}
            hint = did_you_mean(name, known) if known else "; this source defines no splits"
            raise DataError(f"{self.name} has no record in split '{name}'{hint}")
        inside = codes == splits.index(name)
        elsewhere = ~inside & (codes != (splits.index("") if "" in splits else -1))
        people, patients = coded(self.records, "patient")
        shared = sorted(patients[code] for code in np.intersect1d(people[inside], people[elsewhere]).tolist())
        if shared:
            raise DataError(
                f"{len(shared)} patients of {self.name} are in split '{name}' and in another one (first: {shared[0]}); "
                "a split must not cut through a patient: mend the split lists"
            )
        skipped = tuple(item for item in self.skipped if item.split in ("", name))
        return self._replace(records=take(self.records, np.flatnonzero(inside)), skipped=skipped)


def full_valid(image: Tensor) -> Tensor:
    """A validity mask that is True everywhere, (1, H, W) for an image (1, H, W)."""
    import torch

    return torch.ones_like(image, dtype=torch.bool)
