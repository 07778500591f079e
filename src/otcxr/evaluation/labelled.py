"""Which labels an evaluation spends: images that are fitted on, validated on and judged on, and fractions of them.

A fraction is drawn by patient and nested: every patient has a place in an order that depends on (seed, patient) alone,
and the first patients of the order are taken, so 1 % lies within 10 %, and a collection that grows keeps its order.
Validation labels are labels too: the same fraction of them is spent.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from otcxr.config import digest
from otcxr.console import Progress
from otcxr.data.dataset import PixelCache, check_records
from otcxr.data.records import Collection, Record, Skipped, column
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.truth import Masks, Truth

__all__ = ["LabelDraw", "Material", "Part", "draw_labels", "gather", "nested_order", "part_of", "write_draw"]


class Part(NamedTuple):
    """Images of one role whose pixels can be read.

    Attributes:
        name: The split they are of, or how they were chosen.
        records: N.
        labels: (N, F), NaN where not assessed.
        patients: (N,).
        skipped: What could not be used.
    """

    name: str
    records: list[Record]
    labels: NDArray[np.float64]
    patients: NDArray[np.str_]
    skipped: tuple[Skipped, ...] = ()

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> Part:
        """The same with some of its rows."""
        index = np.asarray(rows, dtype=np.intp)
        return self._replace(records=[self.records[i] for i in index.tolist()], labels=self.labels[index],
                             patients=self.patients[index])  # fmt: skip

    def summary(self, findings: Sequence[str]) -> dict[str, Any]:
        """What JSON says of it: how many, who, what they have."""
        ages = sorted(r.age for r in self.records if r.age is not None)
        quartiles = [float(q) for q in np.quantile(ages, (0.25, 0.5, 0.75))] if ages else None
        return {
            "name": self.name,
            "images": len(self.records),
            "patients": len(set(self.patients.tolist())),
            "sex": dict(Counter(r.sex or "unknown" for r in self.records)),
            "view": dict(Counter(r.view or "unknown" for r in self.records)),
            "age": {"quartiles": quartiles, "unknown": len(self.records) - len(ages)},
            "positives": {f: int((self.labels[:, k] == 1).sum()) for k, f in enumerate(findings)},
            "assessed": {f: int((~np.isnan(self.labels[:, k])).sum()) for k, f in enumerate(findings)},
            "skipped": [item.image for item in self.skipped],
        }


class Material(NamedTuple):
    """Everything an evaluation looks at.

    Attributes:
        collection: Name of the source that is fitted on.
        findings: F names.
        fit, val: Images to fit on, and to choose on; of other patients.
        tests: Images to judge on, by name; of other patients again.
        pixels: Decoded images.
        masks: Of a task that is judged on regions: where they are. ``findings`` are then regions, and ``labels`` say
            whether an image shows them.
        classes: Of such a task: the material with labels of findings that it was made of.
    """

    collection: str
    findings: tuple[str, ...]
    fit: Part
    val: Part
    tests: Mapping[str, Part]
    pixels: PixelCache
    masks: Masks | None = None
    classes: Material | None = None

    def truth(self, record: Record, finding: int) -> Truth:
        """Where a finding is, of an image whose label says that something tells; for tasks judged on regions."""
        assert self.masks is not None
        found = self.masks.truth(record, self.findings[finding], self.pixels)
        assert found is not None
        return found


class LabelDraw(NamedTuple):
    """Labels that are spent: rows of ``fit`` and ``val``.

    Attributes:
        fraction: Of the patients.
        seed: Of the order.
        fit, val: Rows.
        digest: Of the images' names; equal digests, equal labels.
    """

    fraction: float
    seed: int
    fit: NDArray[np.intp]
    val: NDArray[np.intp]
    digest: str


def gather(
    collection: Collection,
    splits: tuple[str, str],
    *,
    val: str,
    holdout: float,
    max_skipped: float,
    cache_gb: float,
    progress: Progress,
    external: Mapping[str, tuple[Collection, str]] | None = None,
) -> Material:
    """Read the images of an evaluation once.

    Args:
        collection: Labelled records.
        splits: Split to fit on, split to judge on.
        val: Split to choose thresholds, recalibration and epochs on. Where the collection has no such split, patients
            of the one to fit on are held out instead.
        holdout: Share of these patients, in (0, 1).
        max_skipped: Largest share of images that may be missing or broken.
        cache_gb: Memory in GB for decoded images.
        progress: Where to show progress.
        external: Other collections to judge on, by name, each with its split ("" for all of it); findings that it does
            not have are not assessed there.
    Raises: DataError: no labels, a split that does not exist, patients in two of the roles, images that cannot be read.
    """
    findings = collection.findings
    if not findings:
        raise DataError(f"{collection.name} has no labels; evaluation needs a table with a column for each finding")
    if len(set(splits)) < 2 or val in splits:
        raise DataError(f"splits to fit on, to validate on and to judge on must differ, received {splits[0]}, {val}, "
                        f"{splits[1]}")  # fmt: skip
    pixels = PixelCache(cache_gb)
    there = set(column(collection.records, "split"))

    def part(source: Collection, split: str) -> Part:
        records = source.split(split) if split else source
        with progress.bar("reading images", len(records.records), "images") as bar:
            usable, skipped, _ = check_records(records, pixels, max_skipped, bar)
        if skipped:
            progress.say(f"skipped {len(skipped)} images (first: {skipped[0].image}: {skipped[0].reason})")
        return part_of(split or "all", [records.records[index] for index in usable], findings, tuple(skipped))

    fit = part(collection, splits[0])
    if val in there:
        chosen = part(collection, val)
    else:
        held = set(nested_order(fit.patients, 0)[: max(1, round(holdout * len(set(fit.patients.tolist()))))])
        mask = np.array([patient in held for patient in fit.patients.tolist()])
        chosen = fit.take(np.flatnonzero(mask))._replace(name=f"patients held out of {splits[0]}", skipped=())
        fit = fit.take(np.flatnonzero(~mask))
        if not len(fit.records):
            raise DataError(f"no patient of split '{splits[0]}' is left to fit on; it needs more patients, or a split "
                            f"'{val}'")  # fmt: skip
    tests = {splits[1]: part(collection, splits[1])}
    for name, (source, split) in (external or {}).items():
        if not set(findings) & set(source.findings):
            raise DataError(
                f"{source.name} has none of the findings of {collection.name}, but "
                f"{', '.join(source.findings)}; give a map of labels that says what is called how"
            )
        tests[name] = part(source, split)
    # of another source an equal identifier is another person, for all that is known
    own = [part for name, part in tests.items() if not external or name not in external
           or external[name][0].name == collection.name]  # fmt: skip
    _refuse_shared([("to fit on", fit), ("to validate on", chosen), *(("to judge on", part) for part in own)])
    return Material(collection.name, findings, fit, chosen, tests, pixels)


def draw_labels(material: Material, fraction: float, seed: int) -> LabelDraw:
    """Draw the labels of a fraction of the patients, at least one patient each to fit on and to validate on.

    Raises: ConfigError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"a fraction of the labels must be in (0, 1], received {fraction}")
    rows = []
    for part in (material.fit, material.val):
        order = nested_order(part.patients, seed)
        taken = set(order[: max(1, math.ceil(fraction * len(order) - 1e-9))])
        rows.append(np.flatnonzero([patient in taken for patient in part.patients.tolist()]))
    names = [[part.records[i].name for i in own] for part, own in zip((material.fit, material.val), rows, strict=True)]
    return LabelDraw(fraction, seed, rows[0], rows[1], digest(names))


def nested_order(patients: NDArray[np.str_] | Sequence[str], seed: int) -> list[str]:
    """All patients, in an order that depends on (seed, patient) alone: whoever comes or goes moves nobody else."""
    return sorted({str(p) for p in patients}, key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).digest())


def write_draw(material: Material, draw: LabelDraw) -> str:
    """The drawn images as CSV (role, image, patient) below a line with fraction, seed and digest."""
    text = io.StringIO()
    text.write(f"# fraction {draw.fraction:g}, seed {draw.seed}, digest {draw.digest}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("role", "image", "patient"))
    for role, part, rows in (("fit", material.fit, draw.fit), ("val", material.val, draw.val)):
        for i in rows.tolist():
            record = part.records[i]
            image = str(record.image) if isinstance(record.image, Path) else record.name
            writer.writerow((role, Path(image).name, record.patient))
    return text.getvalue()


def part_of(name: str, records: list[Record], findings: tuple[str, ...], skipped: tuple[Skipped, ...] = ()) -> Part:
    """Records with their labels of some findings; no pixels are looked at."""
    labels = np.array([[r.labels.get(f, np.nan) for f in findings] for r in records], dtype=float)
    return Part(name, records, labels.reshape(len(records), len(findings)), np.array([r.patient for r in records]),
                skipped)  # fmt: skip


def _refuse_shared(parts: Sequence[tuple[str, Part]]) -> None:
    """Raise DataError where a patient is in two roles of one collection."""
    for place, (role, one) in enumerate(parts):
        for other_role, other in parts[place + 1 :]:
            shared = set(one.patients.tolist()) & set(other.patients.tolist())
            if shared and role != other_role:
                raise DataError(
                    f"{len(shared)} patients are in the split {role} ('{one.name}') and in the one {other_role} "
                    f"('{other.name}'), first {min(shared)}; judge on other patients"
                )
