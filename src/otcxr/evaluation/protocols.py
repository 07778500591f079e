"""The protocols that turn an encoder and labels into scores of unseen images.

    linear      logistic regression on frozen pooled features
    finetune    the encoder trained on, from the linear probe
    knn         weighted vote of the nearest labelled images
    retrieval   how many of the nearest labelled images share a finding
    segmented   a head on the maps, trained on masks

Each takes the same labels of the same draw and knows nothing of how the encoder was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from otcxr.attribution import ProbedEncoder
from otcxr.console import Progress
from otcxr.errors import ConfigError
from otcxr.evaluation.calibration import logit
from otcxr.evaluation.classify import LinearProbe, fit_probe, knn_scores, nearest_share
from otcxr.evaluation.features import pooled_features
from otcxr.evaluation.finetune import FinetuneConfig, finetune, predict_logits
from otcxr.evaluation.labelled import LabelDraw, Material, Part
from otcxr.evaluation.segment import SegmentConfig, segment
from otcxr.nn.encoder import Encoder

__all__ = [
    "RETRIEVED",
    "Features",
    "ProtocolConfig",
    "Scored",
    "device_of",
    "finetuned",
    "knn",
    "linear",
    "retrieval",
    "segmented",
]

RETRIEVED = (1, 5, 10)  # nearest images that retrieval looks at


class ProtocolConfig(NamedTuple):
    """What protocols need of the settings of an evaluation.

    Attributes:
        size: Side in pixels to which images are reduced.
        batch_size: Images at a time.
        strengths, folds: Of the linear probe.
        neighbours: Of kNN.
        finetune: Of fine-tuning.
        segment: Of segmentation.
    """

    size: int
    batch_size: int
    strengths: tuple[float, ...]
    folds: int
    neighbours: int
    finetune: FinetuneConfig
    segment: SegmentConfig


class Scored(NamedTuple):
    """What a protocol says of images it was not fitted on.

    Attributes:
        val: Logits (V, F) of the validation images of the draw; None for a protocol that measures each image itself.
        tests: For each set of test images, logits (N, F) under "score"; or, without ``val``, by measure what each
            image shows, (N, F).
        fitted: (F,) whether there were labels enough.
        probe: The linear probe, where one was fitted.
        model: Encoder with head, where there is one.
        facts: What else is worth knowing, for JSON.
        missing: Why a finding has no scores where it has none.
    """

    val: NDArray[np.float64] | None
    tests: Mapping[str, Mapping[str, NDArray[np.float64]]]
    fitted: NDArray[np.bool_]
    probe: LinearProbe | None = None
    model: ProbedEncoder | None = None
    facts: Mapping[str, Any] = {}
    missing: str = "not fitted: too few labelled patients with, or without, it"


class Features:
    """Pooled features of an encoder for a material and its linear probes, computed once, when first asked for."""

    def __init__(
        self, encoder: Encoder, material: Material, config: ProtocolConfig, cache: Path | None, progress: Progress,
        title: str,
    ) -> None:  # fmt: skip
        # channels last, as in training: on a CPU replicate padding is several times slower in the default layout
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.encoder = encoder
        self._parts = material.fit, material.val, material.tests

        def of(part: Part) -> NDArray[np.float32]:
            return pooled_features(encoder, part.records, config.size, config.batch_size, material.pixels, cache,
                                   progress, f"{title} {part.name}"[:28])  # fmt: skip

        self._of = of
        self._probes: dict[Any, LinearProbe] = {}

    @cached_property
    def fit(self) -> NDArray[np.float32]:
        """(N, C) of the images to fit on."""
        return self._of(self._parts[0])

    @cached_property
    def val(self) -> NDArray[np.float32]:
        """(V, C) of the images to validate on."""
        return self._of(self._parts[1])

    @cached_property
    def tests(self) -> dict[str, NDArray[np.float32]]:
        """(N, C) of every set of test images."""
        return {name: self._of(part) for name, part in self._parts[2].items()}

    def probe(self, material: Material, draw: LabelDraw, config: ProtocolConfig) -> LinearProbe:
        """The linear probe of the labels of a draw, fitted once for all protocols that begin with it."""
        key = material.findings, draw.digest, draw.seed, config.strengths, config.folds
        if key not in self._probes:
            part = material.fit
            self._probes[key] = fit_probe(
                self.fit[draw.fit], part.labels[draw.fit], part.patients[draw.fit].tolist(), material.findings,
                strengths=config.strengths, folds=config.folds, seed=draw.seed,
            )  # fmt: skip
        return self._probes[key]


def linear(
    features: Features, material: Material, draw: LabelDraw, config: ProtocolConfig, progress: Progress
) -> Scored:
    """Score the test images by logistic regression on frozen pooled features, fitted to the labels of a draw."""
    probe = features.probe(material, draw, config)
    return Scored(
        probe.score(features.val[draw.val]),
        {name: {"score": probe.score(x)} for name, x in features.tests.items()},
        probe.strength > 0,
        probe,
        ProbedEncoder(features.encoder, probe.weights, probe.bias),
        {"strength": dict(zip(material.findings, probe.strength.tolist(), strict=True))},
    )


def finetuned(
    features: Features, material: Material, draw: LabelDraw, config: ProtocolConfig, progress: Progress
) -> Scored:
    """Score the test images by the encoder trained on, from the linear probe."""
    probe = features.probe(material, draw, config)
    device = next(features.encoder.parameters()).device
    start = ProbedEncoder(features.encoder, probe.weights, probe.bias).to(device)
    fit, val = material.fit.take(draw.fit), material.val.take(draw.val)
    tuned = finetune(start, fit, val, config.finetune, size=config.size, pixels=material.pixels, seed=draw.seed,
                     progress=progress, title=f"fine-tuning {draw.fraction:.0%}")  # fmt: skip

    def logits(part: Part) -> NDArray[np.float64]:
        return predict_logits(tuned.model, part.records, config.size, material.pixels, config.batch_size)

    tests = {name: {"score": logits(part)} for name, part in material.tests.items()}
    facts = {"step": tuned.step, "validation": [list(look) for look in tuned.history]}
    return Scored(logits(val), tests, probe.strength > 0, None, tuned.model, facts)


def knn(features: Features, material: Material, draw: LabelDraw, config: ProtocolConfig, progress: Progress) -> Scored:
    """Score the test images by a weighted vote of their nearest labelled images."""
    x, y = features.fit[draw.fit], material.fit.labels[draw.fit]
    fitted = np.array([min((y[:, f] == k).sum() for k in (0, 1)) >= 1 for f in range(y.shape[1])])

    def logits(queries: NDArray[np.float32]) -> NDArray[np.float64]:
        shares = knn_scores(x, y, queries, neighbours=config.neighbours)
        return logit(np.where(np.isnan(shares), 0.5, shares))

    tests = {name: {"score": logits(queries)} for name, queries in features.tests.items()}
    return Scored(logits(features.val[draw.val]), tests, fitted, facts={"neighbours": config.neighbours},
                  missing="no labelled image with, or none without, it")  # fmt: skip


def retrieval(
    features: Features, material: Material, draw: LabelDraw, config: ProtocolConfig, progress: Progress
) -> Scored:
    """For every test image and finding: which share of its nearest labelled images has the finding."""
    x, y = features.fit[draw.fit], material.fit.labels[draw.fit]
    fitted = np.array([(y[:, f] == 1).any() for f in range(y.shape[1])])
    tests = {}
    for name, queries in features.tests.items():
        shares = nearest_share(x, y, queries, RETRIEVED)
        tests[name] = {f"precision_at_{k}": np.nan_to_num(share) for k, share in zip(RETRIEVED, shares, strict=True)}
    known = ~np.isnan(y)
    chance = [float(y[known[:, f], f].mean()) if known[:, f].any() else None for f in range(y.shape[1])]
    return Scored(None, tests, fitted, facts={"precision_by_chance": dict(zip(material.findings, chance, strict=True))},
                  missing="no labelled image has it")  # fmt: skip


def segmented(
    head: str, features: Features, material: Material, draw: LabelDraw, config: ProtocolConfig, progress: Progress
) -> Scored:
    """Measure the segmentation of the test images by a head of ``segment.HEADS``, trained on the masks of a draw."""
    found = segment(features.encoder, material, draw, config.segment, head, progress)
    return Scored(None, found.tests, found.fitted, facts=found.facts, missing="no labelled image shows it")


def device_of(accelerator: str) -> torch.device:
    """The device that a setting names.

    Raises: ConfigError: a GPU is asked for where none is usable.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("eval.accelerator is cuda but this machine has no usable GPU; use cpu or auto")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
