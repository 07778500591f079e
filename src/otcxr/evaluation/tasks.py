"""The tasks that judge an encoder, and their common result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from otcxr.config import to_plain
from otcxr.console import Progress, SilentProgress
from otcxr.data.dataset import PixelCache, check_records
from otcxr.data.records import Collection, Skipped
from otcxr.errors import ConfigError, DataError, did_you_mean
from otcxr.evaluation.classify import LinearProbe, fit_probe
from otcxr.evaluation.features import calibrate_norms, pooled_features
from otcxr.evaluation.statistics import Comparison, as_json, compare_scores
from otcxr.nn.encoder import Encoder, build_encoder, encoder_digest
from otcxr.runs import describe_environment

__all__ = ["TASKS", "EvaluateConfig", "Evaluation", "evaluate", "random_twin"]


@dataclass(frozen=True)
class EvaluateConfig:
    """How an encoder is judged.

    Attributes:
        size: Side in pixels to which images are reduced; 0 takes the size of the pre-training views.
        batch_size: Images at a time.
        resamples: Bootstrap resamples of patients.
        level: Level of the intervals.
        folds: Folds, by patient, of the choice of the penalty.
        strengths: Inverse penalties to choose from.
        accelerator: auto, cpu or cuda; where features are computed.
        max_skipped: Largest share of images that may be missing or broken.
        cache_gb: Memory in GB for decoded images.
        within: Attributes of a record (view, sex) within whose values the same scores are judged again.
        seed: Of folds, resamples and the random-initialised encoder.
    """

    size: int = 0
    batch_size: int = 64
    resamples: int = 2000
    level: float = 0.95
    folds: int = 3
    strengths: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    accelerator: str = "auto"
    max_skipped: float = 0.05
    cache_gb: float = 2.0
    within: tuple[str, ...] = ("view",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 2 or self.batch_size < 2 or not self.strengths or min(self.strengths) <= 0:
            raise ConfigError("folds and batch_size must be at least 2 and every strength > 0, received "
                              f"{self.folds}, {self.batch_size}, {self.strengths}")  # fmt: skip
        if self.seed < 0 or self.cache_gb < 0 or not 0 <= self.max_skipped <= 1:
            raise ConfigError(f"seed and cache_gb must be >= 0 and max_skipped in [0, 1], received {self.seed}, "
                              f"{self.cache_gb}, {self.max_skipped}")  # fmt: skip
        if self.accelerator not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"accelerator must be auto, cpu or cuda, received '{self.accelerator}'")
        for name in self.within:
            if name not in ("view", "sex"):
                raise ConfigError(f"within may hold view and sex; received '{name}'")


class Evaluation(NamedTuple):
    """Result of a task.

    Attributes:
        task: Its name.
        result: Plain numbers: findings and macro of the encoder, the same under "random" and "difference", and all of
            it again within each value of ``within``; what was used under "splits", "settings" and "environment".
        probe: What was fitted on the encoder's features.
        images: Names of the test images, in the order of ``scores``.
        scores: (N, F) logits of the test images.
        labels: (N, F), NaN where not assessed.
    """

    task: str
    result: dict[str, Any]
    probe: LinearProbe
    images: tuple[str, ...]
    scores: NDArray[np.float64]
    labels: NDArray[np.float64]


def evaluate(
    task: str,
    encoder: Encoder,
    collection: Collection,
    splits: tuple[str, str],
    config: EvaluateConfig,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge an encoder beside a random-initialised one of the same architecture, on the same images and folds.

    Args:
        task: A key of ``TASKS``.
        encoder: The encoder.
        collection: Labelled records.
        splits: Names of the split to fit on and of the one to judge on; no patient may be in both.
        config: Settings; ``size`` must be positive.
        cache: Folder for features; None keeps none.
        progress: Where to show progress.
    Raises: DataError: no labels, a split that does not exist, patients in both splits. ConfigError: unknown task.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task '{task}'{did_you_mean(task, TASKS)}")
    if not collection.findings:
        raise DataError(f"{collection.name} has no labels; evaluation needs a table with a column for each finding")
    return TASKS[task](encoder, collection, splits, config, cache, progress or SilentProgress())


def random_twin(encoder: Encoder, seed: int) -> Encoder:
    """Build the same architecture with the random weights of ``seed``."""
    return build_encoder(**encoder.architecture._asdict(), seed=seed)


def _linear(
    encoder: Encoder,
    collection: Collection,
    splits: tuple[str, str],
    config: EvaluateConfig,
    cache: Path | None,
    progress: Progress,
) -> Evaluation:
    if config.size < 16:
        raise ConfigError(f"size must be at least 16 pixels, received {config.size}")
    pixels = PixelCache(config.cache_gb)
    fit, fit_skipped = _usable(collection.split(splits[0]), config, pixels, progress)
    test, test_skipped = _usable(collection.split(splits[1]), config, pixels, progress)
    shared = {record.patient for record in fit.records} & {record.patient for record in test.records}
    if shared:
        raise DataError(
            f"{len(shared)} patients are in the split to fit on ('{splits[0]}') and in the one to judge on "
            f"('{splits[1]}'), first {min(shared)}; judge on other patients"
        )
    findings = collection.findings
    device = _device(config.accelerator)
    encoder, twin = encoder.to(device), random_twin(encoder, config.seed).to(device)
    with progress.bar("random network", len(fit.records), "images") as bar:
        calibrate_norms(twin, fit.records, config.size, config.batch_size, pixels, bar)
    fit_labels, test_labels = _labels(fit), _labels(test)
    fit_patients = [record.patient for record in fit.records]
    test_patients = np.array([record.patient for record in test.records])

    def judge(network: Encoder, title: str) -> tuple[LinearProbe, NDArray[np.float64]]:
        x_fit, x_test = (
            pooled_features(
                network, part.records, config.size, config.batch_size, pixels, cache, progress, f"{title} {name}"
            )
            for part, name in ((fit, splits[0]), (test, splits[1]))
        )
        probe = fit_probe(x_fit, fit_labels, fit_patients, findings, strengths=config.strengths, folds=config.folds,
                          seed=config.seed)  # fmt: skip
        return probe, probe.score(x_test)

    probe, scores = judge(encoder, "features")
    _, twin_scores = judge(twin, "random")
    fitted = probe.strength > 0
    table = _compare(test_labels, scores, twin_scores, test_patients, findings, fitted, config)
    within = {}
    for attribute in config.within:
        values = np.array([getattr(record, attribute) or "unknown" for record in test.records])
        for value in sorted(set(values)):
            rows = values == value
            if rows.all():
                continue
            within[f"{attribute}={value}"] = _compare(
                test_labels[rows], scores[rows], twin_scores[rows], test_patients[rows], findings, fitted, config
            )
    result = {
        "task": "linear",
        "encoder_digest": encoder_digest(encoder),
        "collection": collection.name,
        "splits": {
            role: {
                "name": part_name,
                "images": len(part.records),
                "patients": len({r.patient for r in part.records}),
                "skipped": [item.image for item in skipped],
            }
            for role, part_name, part, skipped in (
                ("fit", splits[0], fit, fit_skipped),
                ("test", splits[1], test, test_skipped),
            )
        },
        **table,
        "within": within,
        "strength": dict(zip(findings, probe.strength.tolist(), strict=True)),
        "settings": to_plain(config),
        "environment": describe_environment(),
    }
    return Evaluation("linear", result, probe, tuple(r.name for r in test.records), scores, test_labels)


def _device(accelerator: str) -> torch.device:
    """The device that a setting names.

    Raises: ConfigError: a GPU is asked for where none is usable.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("eval.accelerator is cuda but this machine has no usable GPU; use cpu or auto")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def _usable(
    part: Collection, config: EvaluateConfig, pixels: PixelCache, progress: Progress
) -> tuple[Collection, list[Skipped]]:
    """The records whose pixels can be read, and what cannot.

    Raises: DataError: nothing is left, or more than ``max_skipped`` is missing.
    """
    with progress.bar("reading images", len(part.records), "images") as bar:
        usable, skipped, _ = check_records(part, pixels, config.max_skipped, bar)
    if skipped:
        progress.say(f"skipped {len(skipped)} images (first: {skipped[0].image}: {skipped[0].reason})")
    return part._replace(records=[part.records[index] for index in usable]), skipped


def _labels(part: Collection) -> NDArray[np.float64]:
    return np.array([[record.labels.get(f, np.nan) for f in part.findings] for record in part.records], dtype=float)


def _compare(
    labels: NDArray[np.float64],
    scores: NDArray[np.float64],
    twin: NDArray[np.float64],
    patients: NDArray[np.str_],
    findings: tuple[str, ...],
    fitted: NDArray[np.bool_],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Compare both networks; a finding without a probe is not estimable and in no mean, however many have it here."""
    known = np.where(fitted, labels, np.nan)
    comparison = compare_scores(
        known, scores, twin, patients, findings, resamples=config.resamples, seed=config.seed, level=config.level
    )
    table = _table_json(comparison)
    for f in np.flatnonzero(~fitted):
        seen, positive = ~np.isnan(labels[:, f]), labels[:, f] == 1
        for part in (table, table["random"], table["difference"]):
            row = part["findings"][findings[f]]
            row |= {
                "n": int(seen.sum()), "positives": int(positive.sum()), "patients": len(set(patients[seen])),
                "positive_patients": len(set(patients[positive])),
                "negative_patients": len(set(patients[labels[:, f] == 0])),
                "prevalence": float(positive.sum() / seen.sum()) if seen.any() else None,
            }  # fmt: skip
            for measure in ("auroc", "average_precision"):
                row[measure]["note"] = (
                    f"not fitted: fewer than {config.folds} patients with, or without, it in the split to fit on"
                )
    return table


def _table_json(comparison: Comparison) -> dict[str, Any]:
    """Comparison -> {findings, macro, intervals, random: {findings, macro}, difference: {findings, macro}}."""
    plain = as_json(comparison)

    def side(name: str) -> dict[str, Any]:
        def pick(row: dict[str, Any]) -> dict[str, Any]:
            return {k: v[name] if isinstance(v, dict) and name in v else v for k, v in row.items()}

        return {"findings": {f: pick(row) for f, row in plain["findings"].items()}, "macro": pick(plain["macro"])}

    return {**side("a"), "intervals": plain["intervals"], "random": side("b"), "difference": side("difference")}


TASKS: dict[str, Callable[..., Evaluation]] = {"linear": _linear}
