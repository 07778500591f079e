"""The data page of a pack: what is in it, what was set aside and why, what looks alike, what looks odd."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from otcxr.data.pack import AGE_BANDS, open_shard
from otcxr.data.records import Skipped
from otcxr.files import write_atomic
from otcxr.report.pages import render

if TYPE_CHECKING:
    import pyarrow as pa

    from otcxr.packing.index import Conflict

__all__ = ["NEAR", "Near", "near_duplicates", "write_page"]

NEAR = 7  # of 256 bits: eight words of 32 bits, so two hashes that differ in 7 share a word
_SHOWN = 24  # pictures of each kind
_SIDE = 112  # of a small picture


class Near(NamedTuple):
    """Two rows whose perceptual hashes differ in at most ``NEAR`` of 256 bits."""

    first: int
    second: int
    bits: int


def near_duplicates(hashes: NDArray[np.uint8], crowd: int = 64) -> list[Near]:
    """Every pair of pictures whose hashes differ in at most ``NEAR`` bits, but for pairs within a crowd.

    Hashes that differ in at most 7 bits agree in one of eight words; only those that share a word are compared. A word
    that more than ``crowd`` pictures share (blank parts) would compare everything with everything: there each is
    compared with its ``crowd`` next ones only.

    Args:
        hashes: (N, 32) bytes.
        crowd: See above.
    """
    found: set[Near] = set()
    words = np.ascontiguousarray(hashes).view(np.uint32)
    for word in range(words.shape[1]):
        order = np.argsort(words[:, word], kind="stable")
        same = words[order, word]
        for step in range(1, min(crowd, len(order))):
            at = np.flatnonzero(same[step:] == same[:-step])
            if not at.size:
                break
            a, b = order[at], order[at + step]
            bits = np.bitwise_count(hashes[a] ^ hashes[b]).sum(1)
            for i, j, n in zip(a[bits <= NEAR].tolist(), b[bits <= NEAR].tolist(), bits[bits <= NEAR].tolist(),
                               strict=True):  # fmt: skip
                found.add(Near(min(i, j), max(i, j), n))
    return sorted(found, key=lambda pair: (pair.bits, pair.first, pair.second))


def write_page(
    out: Path, facts: Mapping[str, Any], table: pa.Table, skipped: Sequence[Skipped], disagree: Sequence[Conflict]
) -> Path:
    """Write ``data.html``, which loads nothing."""
    import pyarrow.compute as pc

    names = table.column("id").to_pylist()
    own = np.flatnonzero(table.column("alias_of").is_null().to_numpy())
    hashes = np.frombuffer(b"".join(table.column("phash").take(own).to_pylist()), np.uint8).reshape(-1, 32)
    patients = table.column("patient").to_pylist()
    pairs = [Near(int(own[a]), int(own[b]), bits) for a, b, bits in near_duplicates(hashes)]

    def small(row: int) -> str:
        one = table.slice(row, 1).to_pylist()[0]
        flat = open_shard(str(out), f"{one['shard']:06d}.npy")
        pixels = flat[one["offset"] : one["offset"] + one["height"] * one["width"]].reshape(one["height"], one["width"])
        return _picture(pixels)

    flagged = np.flatnonzero(pc.list_value_length(table.column("flags")).to_numpy() > 0).tolist()
    reasons: dict[str, list[Skipped]] = {}
    for item in skipped:
        reasons.setdefault(_kind(item.reason, item.image), []).append(item)
    groups = [
        {"reason": kind, "count": len(items), "example": items[0].reason,
         "pictures": [p for p in (_stored(out, item.image) for item in items[:200]) if p][:12]}
        for kind, items in sorted(reasons.items(), key=lambda pair: -len(pair[1]))
    ]  # fmt: skip
    page = render(
        "data.html", facts=facts, rows=len(table), patients=len(set(patients)),
        studies=len(set(table.column("study").to_pylist())), aliases=len(table) - len(own),
        pixels_gb=sum(shard["bytes"] for shard in facts["shards"]) / 1e9, skipped=len(skipped), groups=groups,
        counts=_counts(table), findings=_findings(table, facts["findings"]), sizes=_sizes(table),
        disagree=disagree[:200], disagreements=len(disagree), near=len(pairs), near_bits=NEAR,
        across=sum(patients[p.first] != patients[p.second] for p in pairs),
        pairs=[{"bits": p.bits, "same": patients[p.first] == patients[p.second],
                "rows": [{"name": names[row], "picture": small(row)} for row in (p.first, p.second)]}
               for p in _across_first(pairs, patients)[: _SHOWN // 2]],
        flagged=len(flagged), flags=Counter(flag for flags in table.column("flags").to_pylist() for flag in flags),
        odd=[{"name": names[row], "flags": ", ".join(table.column("flags")[row].as_py()), "picture": small(row)}
             for row in flagged[:_SHOWN]],
    )  # fmt: skip
    path = out / "data.html"
    write_atomic(path, page)
    return path


def _across_first(pairs: Sequence[Near], patients: Sequence[str]) -> list[Near]:
    """Those of different patients first: the same radiograph under two names, or a split that would be cut through."""
    return sorted(pairs, key=lambda pair: patients[pair.first] == patients[pair.second])


def _kind(reason: str, name: str) -> str:
    """A reason without what is peculiar to the file."""
    text = reason.replace(name, "").strip(" :")
    for mark in (";", " ("):
        text = text.partition(mark)[0]
    return "".join("#" if sign.isdigit() else sign for sign in text)[:120]


def _counts(table: pa.Table) -> list[tuple[str, list[tuple[str, int]]]]:
    counted = []
    for title, name in (("view", "view"), ("sex", "sex"), ("age", "age"), ("split", "split"), ("format", "format"),
                        ("transfer syntax", "encoding"), ("photometric interpretation", "photometric"),
                        ("bits stored", "bits"), ("modality", "modality"), ("body part", "body_part")):  # fmt: skip
        values = Counter("not stated" if v is None else str(v) for v in table.column(name).to_pylist())
        if name == "encoding" and set(values) <= {"PNG", "JPEG", "TIFF", "not stated"}:
            continue  # says what the format says
        if set(values) == {"not stated"} and name not in ("view", "sex", "age"):
            continue
        order = {band: place for place, band in enumerate(AGE_BANDS)}
        counted.append((title, sorted(values.items(), key=lambda v: (order.get(v[0], 99), -v[1], v[0]))))
    return counted


def _sizes(table: pa.Table) -> list[tuple[str, int]]:
    """The commonest sizes of the files; the rest together."""
    pairs = zip(table.column("source_height").to_pylist(), table.column("source_width").to_pylist(), strict=True)
    values = Counter(f"{height} x {width}" for height, width in pairs).most_common()
    rest = sum(count for _, count in values[10:])
    return values[:10] + ([(f"{len(values) - 10} others", rest)] if rest else [])


def _findings(table: pa.Table, findings: Sequence[str]) -> list[dict[str, Any]]:
    import pyarrow.compute as pc

    rows = []
    for finding in findings:
        column = table.column(f"label:{finding}")
        known = len(column) - column.null_count
        present = pc.sum(column).as_py() or 0
        rows.append({"name": finding, "known": known, "present": present, "share": present / known if known else None})
    return rows


def _picture(pixels: NDArray[Any]) -> str:
    """A picture as the source of an ``img``."""
    grey = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    shrink = min(1.0, _SIDE / max(grey.shape))
    size = max(1, round(grey.shape[1] * shrink)), max(1, round(grey.shape[0] * shrink))
    coded = cv2.imencode(".jpg", cv2.resize(grey, size, interpolation=cv2.INTER_AREA), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(bytes(coded[1])).decode()


def _stored(out: Path, name: str) -> str | None:
    path = out / "quarantine" / f"{name}.png"
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.is_file() else None
