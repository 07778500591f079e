"""From the cells of a study to its numbers: a table with intervals, paired differences, label efficiency."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from otcxr.config import digest, to_plain
from otcxr.data.records import Collection
from otcxr.data.sources import open_collection
from otcxr.errors import DataError
from otcxr.evaluation.estimates import BootstrapSettings
from otcxr.evaluation.labelled import Part, part_of
from otcxr.evaluation.resampling import Column, Drawn, draw
from otcxr.evaluation.statistics import (
    as_json,
    common_findings,
    compare_drawn,
    holm,
    pool_seeds,
    ranking_columns,
    tabulate,
)
from otcxr.evaluation.subgroups import attribute_of
from otcxr.evaluation.tables import measured_columns
from otcxr.files import write_atomic
from otcxr.matching import choose_images
from otcxr.report import write_study_page
from otcxr.study.cells import chosen_point, external_collection, read_cell, unpack
from otcxr.study.markdown import write_markdown
from otcxr.study.spec import IMAGENET, RANDOM, Study, Unit
from otcxr.study.tasks import ENCODER_TASKS, PAIR_TASKS

__all__ = ["collect", "write_results"]

_KEPT = ("value", "low", "high", "note", "caution", "seeds", "seed_deviation", "seed_freedom")
_DIFFERENCE = (*_KEPT, "p_value", "p_holm", "excludes_zero", "detectable")


class _Cells(NamedTuple):
    """The cells of one row and task, by seed."""

    row: str
    seeds: tuple[int, ...]
    cells: tuple[dict[str, Any], ...]


def collect(study: Study, out: Path) -> dict[str, Any]:
    """Compute every number of a study from its cells; the images' labels are read again, their pixels are not.

    Returns: {study, rows: {row: how its trainings went}, tasks: {task: {share: {test: {rows, to_reference, to_random,
        within}}}}}; differences are paired over the seeds that both rows have.
    Raises: DataError: no cell is there, or the cells were made on other images.
    """
    chosen = {row.name: _chosen(study, out, row.name) for row in study.rows}
    made = {task: _cells(study, out, task, chosen) for task in study.tasks}
    if not any(made.values()):
        raise DataError(f"{out} holds no finished cell of the study {study.name}; run it first")
    # what is judged on labels of findings is of one set of images, every other task of its own
    for same in ([t for t in made if _on_labels(t)], *([t] for t in made if not _on_labels(t))):
        _refuse_different(cells for task in same for cells in made[task])
    sources = _sources(study)
    first = next(found[0].cells[0] for task, found in sorted(made.items(), key=lambda x: not _on_labels(x[0])) if found)
    tasks: dict[str, Any] = {}
    images: dict[str, Any] = {}
    judged_on: dict[str, Any] = {}  # of tasks that look at fewer images
    for task, found in made.items():
        if found:
            findings = tuple(found[0].cells[0]["findings"])
            least = BootstrapSettings.min_negative_patients if _on_labels(task) else 0
            settings = BootstrapSettings(study.evaluate.resamples, study.evaluate.seed, study.evaluate.level,
                                         min_negative_patients=least)  # fmt: skip
            shares = tasks[task] = {share: {} for share in first_shares(found)}
            for test, part in _parts(study, task, sources, findings, found[0].cells[0]).items():
                counts = {"images": len(part.records), "patients": len(set(part.patients.tolist()))}
                images.setdefault(test, counts)
                if counts != images[test]:
                    judged_on.setdefault(task, {})[test] = counts
                for share, table in _tables(study, found, list(shares), test, part, findings, settings).items():
                    shares[share][test] = table
    units = study.units()
    missing = [u.name for u in units if any(u.seed not in _seeds_of(made[t], u.row) for t in study.tasks)]
    return {
        "study": {
            "name": study.name, "text": study.text, "reference": study.reference, "seeds": list(study.seeds),
            "source": study.source, "tasks": list(study.tasks), "settings": to_plain(study.evaluate),
            "grid": to_plain(study.grid), "external": [e.name for e in study.external],
            "pretrain": _shared(study),
        },
        "findings": next((list(made[t][0].cells[0]["findings"]) for t in made if made[t] and _on_labels(t)), []),
        "images": images,
        "judged_on": judged_on,
        "splits": first["splits"],
        "rows": {row.name: _trained(study, out, row.name) for row in study.rows},
        "tasks": tasks,
        "missing": missing,
    }  # fmt: skip


def _refuse_different(rows: Iterable[_Cells]) -> None:
    """Rows are compared pair by pair: all cells must be of the same images, and of a seed of the same labels.

    Raises: DataError: they are not.
    """
    seen: dict[Any, tuple[Any, str]] = {}
    for row in rows:
        for seed, cell in zip(row.seeds, row.cells, strict=True):
            facts: dict[Any, Any] = {"images": cell["images"], "findings": cell["findings"], "skipped": cell["skipped"],
                     "splits": cell["splits"]}  # fmt: skip
            facts |= {(seed, share): one["labels"]["digest"] for share, one in cell["shares"].items()}
            for key, value in facts.items():
                first, name = seen.setdefault(key, (value, f"{row.row}, seed {seed}"))
                if first != value:
                    raise DataError(
                        f"the cells of {name} and of {row.row}, seed {seed}, were made with different "
                        f"{'labels' if isinstance(key, tuple) else key}: the source has changed in between. Remove the "
                        "cells that were made on the old one and run the study again"
                    )


def write_results(study: Study, out: Path, *, from_cells: bool = True) -> Path:
    """Write ``results.json`` from the cells (or take the one that is there), the tables and the page.

    Returns: The page.
    """
    path = out / "results.json"
    if from_cells:
        write_atomic(path, json.dumps(_rounded(collect(study, out)), allow_nan=False) + "\n")
    elif not path.is_file():
        raise DataError(f"{path} is missing; run the study first")
    results = json.loads(path.read_text())
    for name, text in write_markdown(results).items():
        write_atomic(out / name, text)
    gallery = out / "gallery.json"
    return write_study_page(
        results, out / "report.html", json.loads(gallery.read_text()) if gallery.is_file() else None
    )


def _rounded(value: Any) -> Any:
    """Plain values with numbers to seven digits: more of them only make files large."""
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def first_shares(found: Sequence[_Cells]) -> list[str]:
    """The shares of labels, falling from all to few as they stand in the cells."""
    return sorted(found[0].cells[0]["shares"], key=float, reverse=True)


def _chosen(study: Study, out: Path, row: str) -> dict[str, Any]:
    """The tuned settings of a row, as far as it is tuned: until then it has no cells either."""
    try:
        return chosen_point(study, out, row)
    except DataError:
        return {}


def _cells(study: Study, out: Path, task: str, chosen: Mapping[str, Any]) -> list[_Cells]:
    rows = []
    for row in study.rows:
        there = []
        for seed in study.seeds:
            cell = read_cell(study, Unit(row.name, seed), out, task, chosen.get(row.name, {}))
            if cell is not None:
                there.append((seed, cell))
        if there:
            rows.append(_Cells(row.name, tuple(s for s, _ in there), tuple(c for _, c in there)))
    return rows


def _seeds_of(found: Sequence[_Cells], row: str) -> tuple[int, ...]:
    return next((cells.seeds for cells in found if cells.row == row), ())


def _on_labels(task: str) -> bool:
    """Whether a task is judged on labels of findings, not on regions or pairs, whose cells say what they saw."""
    return task in ENCODER_TASKS and ENCODER_TASKS[task].view is None


def _sources(study: Study) -> dict[str, tuple[Collection, str]]:
    sources = {study.test: (open_collection(study.source), study.test)}
    for entry in study.external:
        sources[entry.name] = external_collection(open_collection(entry.source), entry.labels), entry.split
    return sources


def _parts(
    study: Study, task: str, sources: Mapping[str, tuple[Collection, str]], findings: tuple[str, ...],
    cell: Mapping[str, Any],
) -> dict[str, Part]:  # fmt: skip
    """Labels and patients of the images that a task judged, checked against what the cells were made on."""
    parts = {}
    for test in cell["images"]:
        collection, split = sources[test]
        records = (collection.split(split) if split else collection).records
        broken = set(cell["skipped"][test])
        records = [record for record in records if record.name not in broken]
        part = part_of(test, choose_images(records, study.matching) if task in PAIR_TASKS else records, findings)
        if "regions" in cell:
            part = part._replace(labels=unpack(cell["regions"][test]))
        if digest([record.name for record in part.records]) != cell["images"][test]:
            raise DataError(
                f"{collection.name} no longer holds the images that the cells of {study.name} were judged on"
            )
        parts[test] = part
    return parts


def _tables(
    study: Study, found: Sequence[_Cells], shares: Sequence[str], test: str, part: Part, findings: tuple[str, ...],
    settings: BootstrapSettings,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The table of every share of labels, pooled and within groups."""
    tables = _rows(study, found, shares, test, part, findings, settings, None)
    for table in tables.values():
        table["within"] = {}
    for attribute in study.evaluate.within:
        values = np.array([attribute_of(record, attribute) or "unknown" for record in part.records])
        for value in sorted(set(values.tolist())):
            rows = values == value
            if not rows.all():
                own = part.take(np.flatnonzero(rows))
                inside = _rows(study, found, shares, test, own, findings, settings, rows)
                for share, table in inside.items():
                    tables[share]["within"][f"{attribute}={value}"] = table
    return tables


def _rows(
    study: Study, found: Sequence[_Cells], shares: Sequence[str], test: str, part: Part, findings: tuple[str, ...],
    settings: BootstrapSettings, rows: Any,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """By share of labels: every row, its difference to the reference and to random.

    Means are over the findings that are estimable for every row at every share: a mean over others would be another
    number, and a curve through it would show which findings came in. A share at which fewer than half of those are
    that the largest share has, gets no mean.
    """
    drawn = {
        share: {
            cells.row: draw(part.labels, _columns(cells, share, test, part, rows), part.patients, findings, settings)
            for cells in found
        }
        for share in shares
    }
    over = common_findings(
        {
            share: [
                f
                for f, finding in enumerate(findings)
                if not any(one.notes[m][f] for one in row.values() for m, c in one.columns.items() if c.anchor)
            ]
            for share, row in drawn.items()
        }
    )
    seeds = {cells.row: cells.seeds for cells in found}
    return {
        share: _one_share(study, one, seeds, [findings[f] for f in over[share]])
        | {"mean_over": [findings[f] for f in over[share]]}
        for share, one in drawn.items()
    }


def _one_share(
    study: Study, drawn: Mapping[str, Drawn], seeds: Mapping[str, tuple[int, ...]], over: Sequence[str]
) -> dict[str, Any]:
    # trained rows may be taken to vary alike over seeds until they are seen not to; weights from elsewhere do not vary
    trained = [name for name in drawn if study.row(name).config is not None]

    def others(names: tuple[str, ...], wanted: tuple[int, ...] = ()) -> list[Mapping[str, Any]]:
        if IMAGENET in names:
            return []
        return [drawn[name].values for name in trained if name not in names and (not wanted or seeds[name] == wanted)]

    out: dict[str, Any] = {
        "rows": {
            name: _short(as_json(tabulate(one, pool_seeds(one.values, others((name,))), over)), _KEPT)
            for name, one in drawn.items()
        }
    }
    for key, base in (("to_reference", study.reference), ("to_random", RANDOM)):
        if base not in drawn:
            continue
        gaps = {}
        for name, one in drawn.items():
            common = tuple(s for s in seeds[name] if s in seeds[base])
            if name == base or not common:
                continue
            shared = [measure for measure in one.values if measure in drawn[base].values]
            if not shared:
                continue
            a = _part_of(one, seeds[name], common, shared)
            b = _part_of(drawn[base], seeds[base], common, shared)
            apart = {measure: a.values[measure] - b.values[measure] for measure in shared}
            pool = pool_seeds(apart, others((name, base), common), of_differences=True)
            gaps[name] = _short(_differences(as_json(compare_drawn(a, b, pool=pool, over=over))), _DIFFERENCE)
        for measure in dict.fromkeys(name for one in drawn.values() for name in one.columns):
            p = holm([gap["macro"].get(measure, {}).get("p_value") for gap in gaps.values()])
            for gap, corrected in zip(gaps.values(), p, strict=True):
                if measure in gap["macro"]:
                    gap["macro"][measure]["p_holm"] = corrected  # over the rows
        out[key] = gaps
    return out


def _columns(cells: _Cells, share: str, test: str, part: Part, rows: Any) -> dict[str, Column]:
    shares = [cell["shares"][share] for cell in cells.cells]
    fitted = np.all([one["fitted"] for one in shares], axis=0)
    notes = ["" if ok else "not fitted: too few patients with, or without, it among the labelled" for ok in fitted]
    names = list(shares[0]["tests"][test])
    arrays = {name: np.stack([unpack(one["tests"][test][name]) for one in shares]) for name in names}
    if "plan" in arrays and "nearest_by_map" in arrays:
        arrays["plan_gain"] = arrays["plan"] - arrays["nearest_by_map"]
    if rows is not None:
        arrays = {name: array[:, rows] for name, array in arrays.items()}
    if names == ["score"]:
        return {name: column._replace(notes=notes) for name, column in ranking_columns(arrays["score"]).items()}
    return measured_columns(arrays, notes, part)


def _part_of(drawn: Drawn, seeds: Sequence[int], wanted: Sequence[int], measures: Sequence[str]) -> Drawn:
    """The same for some of its seeds and measures."""
    place = [seeds.index(seed) for seed in wanted]
    return drawn._replace(
        columns={name: drawn.columns[name] for name in measures},
        notes={name: drawn.notes[name] for name in measures},
        values={name: drawn.values[name][:, place] for name in measures},
        draws={name: drawn.draws[name][:, place] for name in measures},
    )


def _differences(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The differences of a comparison in the shape of a table."""

    def pick(row: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v["difference"] if isinstance(v, dict) else v for k, v in row.items()}

    return {"findings": {f: pick(row) for f, row in plain["findings"].items()}, "macro": pick(plain["macro"])}


def _short(plain: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """A table with what the page needs of every estimate."""

    def cut(row: Mapping[str, Any]) -> dict[str, Any]:
        return {k: {n: v[n] for n in kept if n in v} if isinstance(v, dict) else v for k, v in row.items()}

    return {"findings": {f: cut(row) for f, row in plain["findings"].items()}, "macro": cut(plain["macro"])}


def _trained(study: Study, out: Path, row: str) -> list[dict[str, Any]]:
    """How the trainings of a row went, by seed."""
    found = []
    for seed in study.seeds:
        path = out / "cells" / f"{Unit(row, seed).name}.train.json"
        if path.is_file():
            cell = json.loads(path.read_text())
            keys = ("tuned", "last", "health", "verdict", "images_per_s", "elapsed_s", "environment")
            found.append({"seed": seed, **{k: cell[k] for k in keys if k in cell}})
    return found


def _shared(study: Study) -> dict[str, Any]:
    """What all trainings have in common."""
    from otcxr.settings import config_to_plain

    first = study.rows[0].config
    assert first is not None
    plain = config_to_plain(first)
    return {name: plain[name] for name in ("data", "encoder", "train")} | {"views_size": plain["views"]["size"]}
