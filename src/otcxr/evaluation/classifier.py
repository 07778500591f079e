"""What is handed out to be used on new radiographs: an encoder with its head, recalibrated, with operating points.

    classifier/weights.safetensors   encoder and head
    classifier/classifier.json       findings, how scores become probabilities, thresholds with their rules, provenance

Made by an evaluation; ``otcxr predict`` uses it. Nothing of the method that pre-trained the encoder is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from otcxr.attribution import ProbedEncoder
from otcxr.errors import CheckpointError, ConfigError
from otcxr.evaluation.calibration import Recalibration, recalibrate
from otcxr.evaluation.decisions import RULES, OperatingPoint, choose_threshold
from otcxr.files import write_atomic
from otcxr.nn.encoder import build_encoder, describe, load_state

__all__ = ["Classifier", "Decision", "fit_decisions", "load_classifier", "thresholds_of", "write_classifier"]


class Decision(NamedTuple):
    """How one finding's logits become probabilities and decisions; fitted on validation images.

    Attributes:
        finding: Its name.
        recalibration: Logits to probabilities.
        points: One operating point for every rule, on the scale of the probabilities.
    """

    finding: str
    recalibration: Recalibration
    points: tuple[OperatingPoint, ...]

    def point(self, rule: str) -> OperatingPoint:
        """The operating point of a rule."""
        return next(point for point in self.points if point.rule == rule)


class Classifier(NamedTuple):
    """Images to probabilities.

    Attributes:
        model: Encoder with head: images (B, 1, S, S) in [0, 1] to logits (B, F).
        decisions: F; their findings are those of the logits.
        size: S, to which whole images are fitted (``data.images.fit_square``).
        facts: Where it comes from.
    """

    model: ProbedEncoder
    decisions: tuple[Decision, ...]
    size: int
    facts: Mapping[str, Any]

    @property
    def findings(self) -> tuple[str, ...]:
        return tuple(decision.finding for decision in self.decisions)

    def probabilities(self, images: Tensor) -> NDArray[np.float64]:
        """Return probabilities (B, F) of images (B, 1, S, S) in [0, 1], bone bright."""
        with torch.no_grad():
            logits = self.model(images.to(next(self.model.parameters()).device)).double().cpu().numpy()
        columns = [d.recalibration(logits[:, f]) for f, d in enumerate(self.decisions)]
        return np.stack(columns, axis=1)


def fit_decisions(
    labels: NDArray[np.float64], logits: NDArray[np.float64], findings: tuple[str, ...], kind: str
) -> tuple[Decision, ...]:
    """Fit recalibration and operating points of every finding on validation images.

    Args:
        labels: (N, F), NaN where not assessed.
        logits: (N, F).
        findings: F names.
        kind: One of ``calibration.RECALIBRATIONS``.
    """
    out = []
    for f, finding in enumerate(findings):
        fitted = recalibrate(labels[:, f], logits[:, f], kind)
        p = fitted(logits[:, f])
        out.append(Decision(finding, fitted, tuple(choose_threshold(labels[:, f], p, rule) for rule in RULES)))
    return tuple(out)


def write_classifier(folder: Path, classifier: Classifier) -> None:
    """Write a classifier to a folder; the description last, so that a folder with one is whole."""
    from safetensors.torch import save

    state = {k: v.detach().cpu().contiguous() for k, v in classifier.model.state_dict().items()}
    description = {
        "encoder": describe(classifier.model.encoder),
        "size": classifier.size,
        "findings": [
            {
                "finding": d.finding,
                "recalibration": d.recalibration.as_dict(),
                "operating_points": [point._asdict() for point in d.points],
            }
            for d in classifier.decisions
        ],
        "facts": dict(classifier.facts),
    }
    write_atomic(folder / "weights.safetensors", save(state))
    write_atomic(folder / "classifier.json", json.dumps(description, indent=1, allow_nan=False) + "\n")


def load_classifier(folder: str | Path) -> Classifier:
    """Load what ``write_classifier`` wrote, in evaluation mode, on the CPU.

    Raises: CheckpointError: a file is missing or damaged, or both do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in ("classifier.json", "weights.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{name} is missing in {folder}; expected RUN/classifier, which 'otcxr evaluate RUN' "
                                  "writes")  # fmt: skip
    try:
        told = json.loads((folder / "classifier.json").read_text())
        rows = told["findings"]
        encoder = build_encoder(**told["encoder"]["architecture"])
        decisions = tuple(
            Decision(row["finding"], Recalibration.from_dict(row["recalibration"]),
                     tuple(OperatingPoint(**point) for point in row["operating_points"]))
            for row in rows
        )  # fmt: skip
        state, size, facts = load_file(folder / "weights.safetensors"), int(told["size"]), told["facts"]
    except (ValueError, KeyError, TypeError, ConfigError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no whole classifier ({error}); evaluate the run again") from error
    empty = np.zeros((len(rows), encoder.channels[-1]))
    model = ProbedEncoder(encoder, empty, np.zeros(len(rows)))
    load_state(model, state, str(folder / "weights.safetensors"))
    return Classifier(model.eval(), decisions, size, facts)


def thresholds_of(decisions: tuple[Decision, ...], rule: str) -> tuple[ArrayLike, tuple[str, ...]]:
    """Thresholds (F,) of a rule, and for each finding "" or why it has none (the number is then without meaning)."""
    points = [decision.point(rule) for decision in decisions]
    return [0.5 if p.threshold is None else p.threshold for p in points], tuple(p.note for p in points)
