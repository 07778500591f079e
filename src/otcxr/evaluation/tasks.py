"""The tasks that judge an encoder, and their common result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from otcxr.config import to_plain
from otcxr.console import Progress, SilentProgress
from otcxr.data.records import Collection
from otcxr.errors import ConfigError, did_you_mean
from otcxr.evaluation import regions
from otcxr.evaluation.calibration import RECALIBRATIONS
from otcxr.evaluation.classifier import Classifier
from otcxr.evaluation.classify import LinearProbe
from otcxr.evaluation.decisions import RULES
from otcxr.evaluation.estimates import BootstrapSettings
from otcxr.evaluation.features import calibrate_norms
from otcxr.evaluation.finetune import FinetuneConfig
from otcxr.evaluation.labelled import LabelDraw, Material, Part, draw_labels, gather
from otcxr.evaluation.protocols import (
    Features,
    ProtocolConfig,
    Scored,
    device_of,
    finetuned,
    knn,
    linear,
    retrieval,
    segmented,
)
from otcxr.evaluation.resampling import Drawn
from otcxr.evaluation.segment import SegmentConfig
from otcxr.evaluation.statistics import common_findings, compare_drawn
from otcxr.evaluation.subgroups import ATTRIBUTES
from otcxr.evaluation.tables import (
    Judged,
    compare_judged,
    details,
    draw_judged,
    group_rows,
    judge,
    only,
    power_json,
    ranking,
    table_json,
)
from otcxr.nn.encoder import Encoder, build_encoder, encoder_digest
from otcxr.runs import describe_environment

__all__ = [
    "SHARED",
    "TASKS",
    "EvaluateConfig",
    "Evaluation",
    "Task",
    "bootstrap_for",
    "evaluate",
    "prepare",
    "protocol_config",
    "random_twin",
    "view_for",
]


class Task(NamedTuple):
    """What is asked of an encoder.

    Attributes:
        score: Encoder and labels of a draw -> what is said of the test images.
        settings: Those of ``EvaluateConfig`` that decide it, beside those of ``SHARED``.
        repeats: Whether seeds differ even with all labels.
        view: Of the material, for a task that is judged by where regions are and not by labels of findings: material,
            size, wanted regions -> material with ``masks``.
    """

    score: Callable[[Features, Material, LabelDraw, ProtocolConfig, Progress], Scored]
    settings: tuple[str, ...] = ()
    repeats: bool = False
    view: Callable[[Material, int, Sequence[str], Progress], Material] | None = None


TASKS: dict[str, Task] = {
    "linear": Task(linear, ("strengths", "folds")),
    "finetune": Task(finetuned, ("strengths", "folds", "finetune"), repeats=True),
    "knn": Task(knn, ("neighbours",)),
    "retrieval": Task(retrieval),
    "segment-token": Task(partial(segmented, "token"), ("segment",), view=regions.segmented),
    "segment-frozen": Task(partial(segmented, "frozen"), ("segment",), repeats=True, view=regions.segmented),
    "segment-finetune": Task(partial(segmented, "finetune"), ("segment",), repeats=True, view=regions.segmented),
}
_OF_SHARE = ("fraction", "draws", "facts", "curve")  # what a result says of a share of labels beside its table
SHARED = ("size", "fractions", "holdout", "seed")  # settings that decide what every task says


@dataclass(frozen=True)
class EvaluateConfig:
    """How an encoder is judged.

    Attributes:
        size: Side in pixels to which images are reduced; 0 takes the size of the pre-training views.
        batch_size: Images at a time.
        fractions: Shares of the labels, drawn by patient, nested.
        seeds: Draws of every share below 1, trainings of the fine-tuning, and random networks.
        holdout: Share of the patients that is validated on, where the source has no validation split.
        recalibration: none, temperature, platt or isotonic; fitted on the validation images.
        rule: What the operating point is chosen for, on the validation images.
        resamples: Bootstrap resamples of patients.
        level: Level of the intervals.
        folds: Folds, by patient, of the choice of the penalty.
        strengths: Inverse penalties to choose from.
        neighbours: Nearest images that vote in kNN.
        within: Attributes (view, sex, age) within whose values the comparison is made again.
        subgroups: Attributes whose groups are measured at the operating point.
        accelerator: auto, cpu or cuda; where features are computed.
        max_skipped: Largest share of images that may be missing or broken.
        cache_gb: Memory in GB for decoded images.
        seed: Of folds, resamples, label draws and the random-initialised encoders.
        finetune: Of the task finetune.
        segment: Of the tasks segment-token, segment-frozen and segment-finetune.
    """

    size: int = 0
    batch_size: int = 64
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    seeds: int = 3
    holdout: float = 0.2
    recalibration: str = "platt"
    rule: str = "largest F1"
    resamples: int = 2000
    level: float = 0.95
    folds: int = 3
    strengths: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    neighbours: int = 20
    within: tuple[str, ...] = ("view",)
    subgroups: tuple[str, ...] = ATTRIBUTES
    accelerator: str = "auto"
    max_skipped: float = 0.05
    cache_gb: float = 2.0
    seed: int = 0
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)

    def __post_init__(self) -> None:
        if self.folds < 2 or self.batch_size < 2 or not self.strengths or min(self.strengths) <= 0:
            raise ConfigError("folds and batch_size must be at least 2 and every strength > 0, received "
                              f"{self.folds}, {self.batch_size}, {self.strengths}")  # fmt: skip
        if self.seed < 0 or self.cache_gb < 0 or not 0 <= self.max_skipped <= 1:
            raise ConfigError(f"seed and cache_gb must be >= 0 and max_skipped in [0, 1], received {self.seed}, "
                              f"{self.cache_gb}, {self.max_skipped}")  # fmt: skip
        if not self.fractions or not all(0 < f <= 1 for f in self.fractions) or self.seeds < 1:
            raise ConfigError("fractions must be shares in (0, 1] and seeds at least 1, received "
                              f"{self.fractions}, {self.seeds}")  # fmt: skip
        if not 0 < self.holdout < 1 or self.neighbours < 1:
            raise ConfigError(f"holdout must be in (0, 1) and neighbours at least 1, received {self.holdout}, "
                              f"{self.neighbours}")  # fmt: skip
        if self.accelerator not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"accelerator must be auto, cpu or cuda, received '{self.accelerator}'")
        if self.recalibration not in RECALIBRATIONS:
            raise ConfigError(f"unknown recalibration '{self.recalibration}'"
                              f"{did_you_mean(self.recalibration, RECALIBRATIONS)}")  # fmt: skip
        if self.rule not in RULES:
            raise ConfigError(f"unknown rule '{self.rule}'{did_you_mean(self.rule, RULES)}")
        for name in (*self.within, *self.subgroups):
            if name not in ATTRIBUTES:
                raise ConfigError(f"within and subgroups may hold {', '.join(ATTRIBUTES)}; received '{name}'")


class Evaluation(NamedTuple):
    """Result of a task.

    Attributes:
        task: Its name.
        result: Plain numbers: findings and macro of the encoder with the largest share of labels, the same under
            "random" and "difference", all of it again within each value of ``within``; "fractions" holds every share;
            what was used under "splits", "settings" and "environment".
        probe: The linear probe of the first seed with the largest share; None for a task without one.
        classifier: What can be handed out: encoder, head, recalibration, operating points; None without a head.
        images: Names of the test images, in the order of ``scores``.
        scores: (N, F) logits of the test images, first seed, largest share; None for retrieval.
        labels: (N, F), NaN where not assessed.
        draws: Every draw of labels.
        material: What was looked at.
    """

    task: str
    result: dict[str, Any]
    probe: LinearProbe | None
    classifier: Classifier | None
    images: tuple[str, ...]
    scores: NDArray[np.float64] | None
    labels: NDArray[np.float64]
    draws: tuple[LabelDraw, ...]
    material: Material


def evaluate(
    task: str,
    encoder: Encoder,
    collection: Collection,
    splits: tuple[str, str],
    config: EvaluateConfig,
    *,
    val: str = "val",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge an encoder beside random-initialised ones of the same architecture, with the same labels and folds.

    Args:
        task: A key of ``TASKS``.
        encoder: The encoder.
        collection: Labelled records.
        splits: Names of the split to fit on and of the one to judge on; no patient may be in both.
        config: Settings; ``size`` must be positive.
        val: Split to validate on; where there is none, patients are held out of the one to fit on.
        cache: Folder for features; None keeps none.
        progress: Where to show progress.
    Raises: DataError: no labels, a split that does not exist, patients in two splits. ConfigError: unknown task.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task '{task}'{did_you_mean(task, TASKS)}")
    progress = progress or SilentProgress()
    material = view_for(TASKS[task], prepare(collection, splits, config, val, progress), config, progress)
    how = protocol_config(config)
    device = device_of(config.accelerator)
    encoder = encoder.to(device)
    own = Features(encoder, material, how, cache, progress, "encoder")
    fractions = sorted(set(config.fractions))
    plans = {f: [draw_labels(material, f, config.seed + k) for k in range(config.seeds)] for f in fractions}
    twins = []
    for k in range(config.seeds):
        twin = random_twin(encoder, config.seed + k).to(device)
        with progress.bar("random network", len(material.fit.records), "images") as bar:
            calibrate_norms(twin, material.fit.records, config.size, config.batch_size, material.pixels, bar)
        twins.append(Features(twin, material, how, cache, progress, f"random {k}"))
    test = next(iter(material.tests))
    part = material.tests[test]
    settings = bootstrap_for(TASKS[task], config)
    tables: dict[float, dict[str, Any]] = {}
    drawn: dict[float, tuple[Drawn, Drawn]] = {}
    largest: tuple[list[Scored], Judged, Judged] | None = None
    for fraction in fractions:
        plan = plans[fraction]
        if fraction == 1 and not TASKS[task].repeats:  # the draws hold the same labels: only random networks differ
            scored = [TASKS[task].score(own, material, plan[0], how, progress)] * len(plan)
        else:
            scored = [TASKS[task].score(own, material, given, how, progress) for given in plan]
        other = [TASKS[task].score(twins[k], material, given, how, progress) for k, given in enumerate(plan)]
        last = fraction == fractions[-1]
        both = [
            judge(side, plan, material, test, recalibration=config.recalibration, rule=config.rule, full=last)
            for side in (scored, other)
        ]  # fmt: skip
        a, b = (draw_judged(side, part, material.findings, settings) for side in both)
        drawn[fraction] = a, b
        tables[fraction] = {
            "fraction": fraction,
            "draws": [_draw_json(material, given) for given in _different(plan)],
            **compare_judged(a, b, part, (both[0], both[1])),
            "facts": [dict(one.facts) for one in scored],
        }
        if last:
            largest = scored, both[0], both[1]
    assert largest is not None
    scored, mine, random = largest
    _add_curve(tables, drawn, material.findings)
    within = {}
    for attribute in config.within:
        for value, rows in group_rows(part, attribute).items():
            group = part.take(np.flatnonzero(rows))
            sides = [only(ranking(side), rows) for side in (mine, random)]
            within[f"{attribute}={value}"] = _table(sides, group, material.findings, settings)
    top = tables[fractions[-1]]
    result = {
        "task": task,
        "encoder_digest": encoder_digest(encoder),
        "collection": collection.name,
        "splits": {
            role: own.summary(material.findings)
            for role, own in (("fit", material.fit), ("val", material.val), ("test", part))
        },
        **{k: v for k, v in top.items() if k not in _OF_SHARE},
        "power": power_json(top, "the random networks"),
        "within": within,
        **details(mine, part, material.findings, config.subgroups, settings),
        "fractions": [
            {k: v for k, v in table.items() if fraction != fractions[-1] or k in _OF_SHARE}
            for fraction, table in tables.items()
        ],
        **({"strength": top["facts"][0]["strength"]} if "strength" in top["facts"][0] else {}),
        "settings": to_plain(config),
        "environment": describe_environment(),
    }
    first = scored[0]
    classifier = None
    if first.model is not None and mine.decisions:
        facts = {
            "task": task, "fraction": fractions[-1], "rule": config.rule, "encoder_digest": result["encoder_digest"],
            "collection": collection.name, "validated_on": material.val.name,
            "labels_digest": plans[fractions[-1]][0].digest,
        }  # fmt: skip
        classifier = Classifier(first.model, mine.decisions[0], config.size, facts)
    return Evaluation(
        task, result, first.probe, classifier, tuple(r.name for r in part.records),
        None if mine.scores is None else mine.scores[0], part.labels,
        tuple(given for plan in plans.values() for given in _different(plan)), material,
    )  # fmt: skip


def prepare(
    collection: Collection,
    splits: tuple[str, str],
    config: EvaluateConfig,
    val: str,
    progress: Progress,
    external: Mapping[str, tuple[Collection, str]] | None = None,
) -> Material:
    """Read the images of an evaluation once; see ``labelled.gather``.

    Raises: ConfigError: a size below 16 pixels.
    """
    if config.size < 16:
        raise ConfigError(f"size must be at least 16 pixels, received {config.size}")
    return gather(collection, splits, val=val, holdout=config.holdout, max_skipped=config.max_skipped,
                  cache_gb=config.cache_gb, progress=progress, external=external)  # fmt: skip


def view_for(task: Task, material: Material, config: EvaluateConfig, progress: Progress) -> Material:
    """The material as a task looks at it: with labels of findings, or with places of regions.

    Raises: DataError: see ``regions``.
    """
    return material if task.view is None else task.view(material, config.size, config.segment.regions, progress)


def bootstrap_for(task: Task, config: EvaluateConfig) -> BootstrapSettings:
    """How a task's intervals are made: what is measured where a region is needs no images without it."""
    least = 0 if task.view is not None else BootstrapSettings.min_negative_patients
    return BootstrapSettings(config.resamples, config.seed, config.level, min_negative_patients=least)


def protocol_config(config: EvaluateConfig) -> ProtocolConfig:
    """The part of the settings that protocols need."""
    return ProtocolConfig(config.size, config.batch_size, config.strengths, config.folds, config.neighbours,
                          config.finetune, config.segment)  # fmt: skip


def random_twin(encoder: Encoder, seed: int) -> Encoder:
    """Build the same architecture with the random weights of ``seed``."""
    return build_encoder(**encoder.architecture._asdict(), seed=seed)


def _different(plan: list[LabelDraw]) -> list[LabelDraw]:
    """Draws without repetitions: with all labels every seed has the same."""
    return list({given.digest: given for given in reversed(plan)}.values())[::-1]


def _add_curve(
    tables: Mapping[float, dict[str, Any]], drawn: Mapping[float, tuple[Drawn, Drawn]], findings: tuple[str, ...]
) -> None:
    """Add to every share means over the findings that are estimable at all of them, so that shares can be compared."""
    falling = sorted(tables, reverse=True)
    notes = {
        fraction: [side.notes[name] for side in drawn[fraction] for name, c in side.columns.items() if c.anchor]
        for fraction in falling
    }
    over = common_findings({str(fraction): [f for f in range(len(findings)) if not any(n[f] for n in notes[fraction])]
                            for fraction in falling})  # fmt: skip
    for fraction in falling:
        chosen = [findings[f] for f in over[str(fraction)]]
        a, b = drawn[fraction]
        ranked = {name: column for name, column in a.columns.items() if column.anchor}
        table = table_json(compare_drawn(a._replace(columns=ranked), b, over=chosen))
        tables[fraction]["curve"] = {
            "findings": chosen, "macro": table["macro"],
            "random": table["random"]["macro"], "difference": table["difference"]["macro"],
        }  # fmt: skip


def _table(both: list[Judged], part: Part, findings: tuple[str, ...], settings: BootstrapSettings) -> dict[str, Any]:
    a, b = (draw_judged(side, part, findings, settings) for side in both)
    return compare_judged(a, b, part, (both[0], both[1]))


def _draw_json(material: Material, given: LabelDraw) -> dict[str, Any]:
    fit = material.fit.labels[given.fit]
    return {
        "seed": given.seed, "digest": given.digest, "images": len(given.fit), "validation_images": len(given.val),
        "patients": len(set(material.fit.patients[given.fit].tolist())),
        "positives": {f: int((fit[:, k] == 1).sum()) for k, f in enumerate(material.findings)},
    }  # fmt: skip
