"""The cells of a study: each a JSON file, made once, by one of several processes.

    OUT/cells/ROW-sSEED.train.json    how the training went
    OUT/cells/ROW-sSEED.TASK.json     scores of the test images for every share of labels
    OUT/cells/ROW-tuneK.tune.json     macro AUROC on validation patients at a point of the tuning grid

A cell that exists is not made again; one that was made with other settings is refused. A training that was stopped goes
on from its last checkpoint. Trainings lie in ``runs``, and may be removed when their cells exist.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from otcxr.config import digest, to_plain
from otcxr.console import Progress, SilentProgress
from otcxr.data.dataset import PixelCache
from otcxr.data.records import Collection, Record, Skipped
from otcxr.data.sources import open_collection
from otcxr.errors import ConfigError, DataError, OtcxrError
from otcxr.evaluation.features import calibrate_norms
from otcxr.evaluation.labelled import Material, draw_labels
from otcxr.evaluation.metrics import auroc
from otcxr.evaluation.protocols import Features, device_of
from otcxr.evaluation.tasks import prepare, protocol_config, view_for
from otcxr.faults import Interrupted
from otcxr.files import write_atomic
from otcxr.matching import PairScores, choose_images, load_method, match_images
from otcxr.nn.encoder import Encoder, build_encoder, encoder_digest, load_encoder
from otcxr.nn.imported import from_torchvision, read_weights
from otcxr.runs import Run, describe_environment
from otcxr.settings import PretrainConfig, config_to_plain
from otcxr.study.spec import IMAGENET, Study, Unit, read_study, training_digest
from otcxr.study.tasks import ENCODER_TASKS, PAIR_TASKS, answer_of_pairs
from otcxr.train import pretrain

__all__ = [
    "Views",
    "chosen_point",
    "external_collection",
    "read_cell",
    "run_folder",
    "run_study",
    "run_unit",
    "unpack",
    "untrained",
]


def run_study(
    path: str | Path, out: str | Path, *, runs: str | Path = "", workers: int = 2, threads: int = 1,
    only: Sequence[str] = (), progress: Progress | None = None,
) -> list[str]:  # fmt: skip
    """Make every cell of a study that is not there yet.

    Args:
        path: The study file.
        out: Folder of the cells.
        runs: Folder of the trainings; empty: ``runs/study-NAME``.
        workers: Processes at a time.
        threads: Of each.
        only: Names of rows; empty: all.
        progress: Where to show progress.
    Returns: What failed, one line each; empty when everything is there.
    Raises:
        ConfigError: a cell was made with other settings, or a name is unknown.
        Interrupted: a training was stopped by Ctrl-C or a signal; the study goes on from there when it is run again.
    """
    study, out = read_study(path), Path(out)
    progress = progress or SilentProgress()
    runs = Path(runs) if str(runs) else Path("runs") / f"study-{study.name}"
    unknown = [name for name in only if name not in {row.name for row in study.rows}]
    if unknown:
        raise ConfigError(f"the study has no row '{unknown[0]}'; known: {', '.join(row.name for row in study.rows)}")
    if study.imagenet and (not only or IMAGENET in only) and not Path(study.imagenet).is_file():
        raise ConfigError(f"imagenet: there are no weights at {study.imagenet}; give the file, or leave that row out")
    failed: list[str] = []
    untuned: set[str] = set()
    for title, units in (("tuning", study.tuning_units()), ("study", study.units())):
        wanted = [unit for unit in units if (not only or unit.row in only) and unit.row not in untuned]
        pending = [unit for unit in wanted if _pending(study, unit, out)]
        progress.say(f"{title}: {len(wanted) - len(pending)} of {len(wanted)} units are there")
        lost = _run_all(path, out, runs, pending, workers, threads, title, progress)
        untuned |= {unit.row for unit, _ in lost}  # the other rows go on
        failed += [line for _, line in lost]
    return failed


def run_unit(
    study: Study, unit: Unit, out: Path, runs: Path, progress: Progress, views: Callable[[str], Material]
) -> None:
    """Train and judge one unit, whatever of it is missing; see the module's text for what it writes.

    ``views`` gives the images as a task looks at them; "" is the material itself.
    """
    material = views("")
    chosen = study.points()[unit.point] if unit.point is not None else chosen_point(study, out, unit.row)
    config = study.config(unit, chosen)
    made = training_digest(config, study, unit)
    train_cell = out / "cells" / f"{unit.name}.train.json"
    tasks = ["tune"] if unit.point is not None else [t for t in study.tasks if _cell(study, unit, out, t, made) is None]
    encoder = None
    if tasks or _read(train_cell, made) is None:
        encoder = _encoder(study, unit, config, runs, material, progress, train_cell, made, chosen)
    if not tasks:
        return
    assert encoder is not None
    how = protocol_config(study.evaluate)
    cache = None if config is None else Run(run_folder(study, unit, config, runs)).features
    features = Features(encoder.to(device_of(study.evaluate.accelerator)), material, how, cache, progress, unit.name)
    paired: _Paired | None = None
    for task in tasks:
        begun = time.perf_counter()
        if task == "tune":
            given = draw_labels(material, 1.0, study.evaluate.seed + unit.seed)
            scored = ENCODER_TASKS["linear"].score(features, material, given, how, progress)
            assert scored.val is not None
            value = _macro(material.val.labels[given.val], scored.val)
            cell: dict[str, Any] = {"point": chosen, "validation_auroc": value}
        elif task in PAIR_TASKS:
            if paired is None:  # both tasks look at the same pairs
                folder = None if config is None else run_folder(study, unit, config, runs)
                paired = _match(study, features.encoder, folder, material, progress)
            cell = _paired_cell(study, task, paired, material)
        else:
            cell = _judged(study, unit, task, features, views(task), progress)
        cell = {
            "study": study.name, "unit": unit._asdict(), "task": task, "digest": _judge_digest(study, made, task),
            "encoder_digest": encoder_digest(encoder), "elapsed_s": round(time.perf_counter() - begun, 1),
            "environment": describe_environment(), **cell,
        }  # fmt: skip
        write_atomic(out / "cells" / f"{unit.name}.{task}.json", json.dumps(cell, allow_nan=False) + "\n")


def chosen_point(study: Study, out: Path, row: str) -> dict[str, Any]:
    """The point of the tuning grid with the best validation of a row; empty where nothing is tuned.

    Raises: DataError: a tuning cell is missing, or validation images are too few at every point.
    """
    points = study.points()
    if not points or study.row(row).config is None:
        return {}
    if len(points) == 1:
        return points[0]
    values: dict[int, float] = {}
    for unit in study.tuning_units():
        if unit.row != row:
            continue
        path = out / "cells" / f"{unit.name}.tune.json"
        if not path.is_file():
            raise DataError(f"{path} is missing: the study has to be tuned before its rows are trained")
        value = json.loads(path.read_text())["validation_auroc"]
        assert unit.point is not None
        if value is not None:
            values[unit.point] = value
    if not values:
        raise DataError(f"{row} cannot be tuned: no finding has three positive and three negative validation images; "
                        "give the study more of them, or leave tuning out")  # fmt: skip
    return points[max(values, key=lambda point: (values[point], -point))]


def external_collection(collection: Collection, labels: Mapping[str, tuple[str, ...]]) -> Collection:
    """A collection whose findings are called as the study calls them.

    A finding that several of its names mean is present if any of them is, absent if all are, else not assessed.

    Args:
        collection: The other collection.
        labels: Finding of the study -> names there; findings that are not named keep their name.
    Raises: ConfigError: it has no finding of a name.
    """
    for finding, names in labels.items():
        for name in names:
            if name not in collection.findings:
                raise ConfigError(f"external labels: {collection.name} has no finding '{name}' (for {finding}); it has "
                                  f"{', '.join(collection.findings)}")  # fmt: skip
    used = {name for names in labels.values() for name in names}
    kept = [finding for finding in collection.findings if finding not in used and finding not in labels]

    def renamed(given: Mapping[str, int]) -> dict[str, int]:
        out = {finding: given[finding] for finding in kept if finding in given}
        for finding, names in labels.items():
            known = [given[name] for name in names if name in given]
            if 1 in known:
                out[finding] = 1
            elif len(known) == len(names):
                out[finding] = 0
        return out

    records = [record._replace(labels=renamed(record.labels)) for record in collection.records]
    return collection._replace(findings=(*kept, *labels), records=records)


def pack(scores: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """An array as JSON: float32, compressed."""
    data = np.ascontiguousarray(scores, dtype="<f4")
    return {"shape": list(data.shape), "float32": base64.b64encode(zlib.compress(data.tobytes(), 9)).decode()}


def unpack(packed: Mapping[str, Any]) -> NDArray[np.float64]:
    """The array that ``pack`` packed."""
    data = zlib.decompress(base64.b64decode(packed["float32"]))
    return np.frombuffer(data, dtype="<f4").reshape(packed["shape"]).astype(np.float64)


def read_cell(study: Study, unit: Unit, out: Path, task: str, chosen: Mapping[str, Any]) -> dict[str, Any] | None:
    """A cell of a task, None where it is not there yet.

    Raises: ConfigError: it was made with other settings.
    """
    return _cell(study, unit, out, task, training_digest(study.config(unit, chosen), study, unit))


def _cell(study: Study, unit: Unit, out: Path, task: str, made: str) -> dict[str, Any] | None:
    return _read(out / "cells" / f"{unit.name}.{task}.json", _judge_digest(study, made, task))


def _judge_digest(study: Study, made: str, task: str) -> str:
    return digest([made, study.judge_digest("linear" if task == "tune" else task)])


def _read(path: Path, expected: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    cell: dict[str, Any] = json.loads(path.read_text())
    if cell["digest"] != expected:
        raise ConfigError(f"{path} was made with other settings than the study has now; take the file back, or remove "
                          "the cell so that it is made anew")  # fmt: skip
    return cell


def _pending(study: Study, unit: Unit, out: Path) -> bool:
    """Whether anything of a unit is missing; before tuning has ended nothing is known of what follows."""
    if unit.point is not None:
        made = training_digest(study.config(unit, study.points()[unit.point]), study, unit)
        return _cell(study, unit, out, "tune", made) is None
    made = training_digest(study.config(unit, chosen_point(study, out, unit.row)), study, unit)
    if _read(out / "cells" / f"{unit.name}.train.json", made) is None:
        return True
    return any(_cell(study, unit, out, task, made) is None for task in study.tasks)


def _run_all(
    path: str | Path, out: Path, runs: Path, units: list[Unit], workers: int, threads: int, title: str,
    progress: Progress,
) -> list[tuple[Unit, str]]:  # fmt: skip
    if not units:
        return []
    failed: list[tuple[Unit, str]] = []
    begun = time.perf_counter()
    with progress.bar(title, len(units), "units") as bar:
        if workers <= 1:
            for done, unit in enumerate(units, start=1):
                failed += [(unit, line) for line in _attempt(str(path), str(out), str(runs), unit)]
                bar(done, unit.name)
            return failed
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that are started now
        try:
            with ProcessPoolExecutor(
                min(workers, len(units)), multiprocessing.get_context("spawn"), _begin, (threads,)
            ) as pool:
                futures: dict[Future[list[str]], Unit] = {
                    pool.submit(_attempt, str(path), str(out), str(runs), unit): unit for unit in units
                }
                try:
                    for done, future in enumerate(as_completed(futures), start=1):
                        failed += [(futures[future], line) for line in future.result()]
                        bar(done, f"{futures[future].name}, {(time.perf_counter() - begun) / 60:.0f} min")
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            if before is None:
                os.environ.pop("OMP_NUM_THREADS", None)
            else:
                os.environ["OMP_NUM_THREADS"] = before
    return failed


def _begin(threads: int) -> None:
    """Begin a process of its own, which ends when the one that started it does, however that ended."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)  # what was written is whole: a training goes on from its last checkpoint

    threading.Thread(target=follow, daemon=True).start()


# of this process: images are decoded once for all of its units, to judge and to train
_MATERIAL: dict[tuple[str, str], Views] = {}
_PIXELS: list[PixelCache] = []


class Views:
    """The images of a study as its tasks look at them, each way once."""

    def __init__(self, study: Study) -> None:
        self._study, self._whole = study, _gather(study)
        self._made: dict[Any, Material] = {}

    def __call__(self, task: str) -> Material:
        view = ENCODER_TASKS[task].view if task else None
        if view is None:
            return self._whole
        if view not in self._made:
            self._made[view] = view_for(ENCODER_TASKS[task], self._whole, self._study.evaluate, SilentProgress())
        return self._made[view]


def _attempt(path: str, out: str, runs: str, unit: Unit) -> list[str]:
    """Run a unit; what goes wrong in it is a line, so that the others go on."""
    try:
        study = read_study(path)
        own = (study.source, study.fit, study.val, study.test, study.evaluate.holdout, study.evaluate.max_skipped,
               study.evaluate.size, study.evaluate.segment)  # fmt: skip
        key = (path, repr((own, study.external)))
        if key not in _MATERIAL:
            _MATERIAL.clear()
            _MATERIAL[key] = Views(study)
        run_unit(study, unit, Path(out), Path(runs), SilentProgress(), _MATERIAL[key])
    except Interrupted:  # whoever stops a training means the study
        raise
    except OtcxrError as error:
        return [f"{unit.name}: {error}"]
    except Exception as error:  # a fault of the program or the machine; it must not take the other units with it
        log = Path(out) / "failed" / f"{unit.name}.txt"
        write_atomic(log, traceback.format_exc())
        return [f"{unit.name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; see {log}"]
    return []


def _gather(study: Study) -> Material:
    external = {
        entry.name: (external_collection(open_collection(entry.source), entry.labels), entry.split)
        for entry in study.external
    }
    return prepare(open_collection(study.source), (study.fit, study.test), study.evaluate, study.val,
                   SilentProgress(), external)  # fmt: skip


def _encoder(
    study: Study, unit: Unit, config: Any, runs: Path, material: Material, progress: Progress, cell: Path, made: str,
    chosen: Mapping[str, Any],
) -> Encoder:  # fmt: skip
    """Train, or build, the encoder of a unit, and note how that went."""
    facts: dict[str, Any] = {"study": study.name, "unit": unit._asdict(), "digest": made, "tuned": dict(chosen)}
    if config is not None:
        folder = run_folder(study, unit, config, runs)
        if not _PIXELS:
            _PIXELS.append(PixelCache(config.data.cache_gb, bits=8))
        run = pretrain(replace(config, out=str(folder), resume=True), progress, pixels=_PIXELS[0])
        encoder = load_encoder(folder)
        lines = run.read_metrics()
        trained = [line for line in lines if "loss" in line]
        settings = config_to_plain(config) | {"out": "", "resume": False}
        facts |= {
            "settings": settings, "first": trained[0], "last": trained[-1],
            "health": next((line["health"] for line in reversed(lines) if "health" in line), None),
            "verdict": next((line["verdict"] for line in reversed(lines) if "verdict" in line), None),
            "images_per_s": float(np.median([line["images_per_s"] for line in trained])),
            "elapsed_s": max(line["elapsed_s"] for line in trained),
        }  # fmt: skip
    else:
        encoder = untrained(study, unit, material)
        facts |= {"settings": {"encoder": dict(encoder.architecture._asdict()), "seed": unit.seed}}
    if unit.point is None:
        facts |= {"encoder_digest": encoder_digest(encoder), "environment": describe_environment()}
        write_atomic(cell, json.dumps(facts, indent=1, allow_nan=False) + "\n")
    return encoder


def run_folder(study: Study, unit: Unit, config: PretrainConfig, runs: Path) -> Path:
    """Of a training: a point of the tuning grid that is chosen has been trained already."""
    return runs / f"{unit.row}-{training_digest(config, study, unit)}"


def untrained(study: Study, unit: Unit, material: Material) -> Encoder:
    """The encoder of a row that is not trained: random weights with calibrated norms, or weights from elsewhere."""
    first = study.rows[0].config
    assert first is not None
    plain = to_plain(first.encoder)
    if unit.row == IMAGENET:
        return from_torchvision(read_weights(study.imagenet), plain["name"], stride=plain["stride"])
    encoder = build_encoder(**plain, seed=unit.seed)
    with SilentProgress().bar("", 0, "") as bar:
        calibrate_norms(encoder, material.fit.records, study.evaluate.size, study.evaluate.batch_size, material.pixels,
                        bar)  # fmt: skip
    return encoder


def _judged(
    study: Study, unit: Unit, task: str, features: Features, material: Material, progress: Progress
) -> dict[str, Any]:
    """Scores for every share of labels; the label draw has the number of the unit's seed."""
    how = protocol_config(study.evaluate)
    shares: dict[str, Any] = {}
    for fraction in sorted(set(study.evaluate.fractions)):
        given = draw_labels(material, fraction, study.evaluate.seed + unit.seed)
        scored = ENCODER_TASKS[task].score(features, material, given, how, progress)
        shares[f"{fraction:g}"] = {
            "labels": {"digest": given.digest, "images": len(given.fit), "validation_images": len(given.val)},
            "fitted": scored.fitted.tolist(),
            "validation_auroc": None if scored.val is None else _macro(material.val.labels[given.val], scored.val),
            "tests": {name: {k: pack(v) for k, v in found.items()} for name, found in scored.tests.items()},
        }
    whole = material.classes or material  # whose images are skipped; a mask that is broken skips no image
    return {
        "findings": list(material.findings),
        "images": {name: digest([r.name for r in part.records]) for name, part in material.tests.items()},
        "skipped": {name: [item.image for item in part.skipped] for name, part in whole.tests.items()},
        **({"regions": {name: pack(part.labels) for name, part in material.tests.items()}} if material.masks else {}),
        "splits": {
            name: part.summary(material.findings) for name, part in (("fit", material.fit), ("val", material.val))
        },
        "shares": shares,
    }  # fmt: skip


class _Paired(NamedTuple):
    scores: list[PairScores]
    used: list[Record]
    skipped: list[Skipped]


def _match(study: Study, encoder: Encoder, folder: Path | None, material: Material, progress: Progress) -> _Paired:
    """What a method pairs on the test images; of an encoder without one only what its maps tell."""
    first = study.rows[0].config
    assert first is not None
    match = None
    if folder is not None:
        method = load_method(Run.open(folder)).to(next(encoder.parameters()).device).eval()
        encoder, match = method.encoder, method.match
    records = choose_images(material.tests[study.test].records, study.matching)
    return _Paired(*match_images(
        encoder, match or (lambda _: None), records, first.views, study.matching, study.source, progress
    ))  # fmt: skip


def _paired_cell(study: Study, task: str, paired: _Paired, material: Material) -> dict[str, Any]:
    answer = answer_of_pairs(task, paired.scores, material.findings, paired.used)
    skipped = (*material.tests[study.test].skipped, *paired.skipped)
    return {
        "findings": list(answer.findings), "images": {study.test: digest([r.name for r in paired.used])},
        "skipped": {study.test: [item.image for item in skipped]},
        "regions": {study.test: pack(answer.labels)},
        "splits": {"fit": {"images": 0, "patients": 0}, "val": {"images": 0, "patients": 0}},
        "shares": {"1": {
            "labels": {"digest": "", "images": 0, "validation_images": 0}, "fitted": [True] * len(answer.findings),
            "validation_auroc": None, "tests": {study.test: {name: pack(v) for name, v in answer.values.items()}},
        }},
    }  # fmt: skip


def _macro(labels: NDArray[np.float64], scores: NDArray[np.float64]) -> float | None:
    """Mean AUROC over findings with at least three positive and three negative images; None without any."""
    values = [
        auroc(labels[:, f], scores[:, f])
        for f in range(labels.shape[1])
        if min((labels[:, f] == y).sum() for y in (0, 1)) >= 3
    ]
    return float(np.mean(values)) if values else None
