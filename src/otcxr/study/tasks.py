"""What a study can ask of a row: the tasks of an evaluation, where heat maps lie, and what a method pairs.

Every answer has one form, so that one set of tables serves all: for each share of labels and each set of test images
numbers by measure, (images, findings). For pairs of views no label is spent, so there is one share; ``correspondence``
has one "finding", the positions of a view, and ``focus`` has the regions that a mass can lie in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from otcxr.data.records import Record
from otcxr.evaluation.localize import localized
from otcxr.evaluation.regions import placed
from otcxr.evaluation.tasks import TASKS, Task
from otcxr.matching import FOCUS, MATCHED, PairScores

__all__ = ["ENCODER_TASKS", "PAIR_TASKS", "Answer", "answer_of_pairs"]

ENCODER_TASKS: dict[str, Task] = {
    **TASKS,
    "localize-linear": Task(partial(localized, "linear"), ("strengths", "folds"), view=placed),
    "localize-finetune": Task(
        partial(localized, "finetune"), ("strengths", "folds", "finetune"), repeats=True, view=placed
    ),
}
PAIR_TASKS = ("correspondence", "focus")


class Answer(NamedTuple):
    """What was measured of images without spending labels.

    Attributes:
        findings: Columns, F.
        labels: (N, F), 1 where an image says something, else NaN.
        values: By measure, (N, F), 0 where it does not.
    """

    findings: tuple[str, ...]
    labels: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]


def answer_of_pairs(task: str, scores: Sequence[PairScores], findings: Sequence[str], used: Sequence[Record]) -> Answer:
    """The answer of one of ``PAIR_TASKS``: shares of each image, so every image counts the same.

    Args:
        task: Which.
        scores: Of the images.
        findings: Those of the collection, for the order of regions.
        used: The images.
    """
    if task == "correspondence":
        known = np.array([float(one.known) for one in scores])
        labels = np.where(known > 0, 1.0, np.nan)[:, None]
        names = [name for name in MATCHED if all(name in one.hits for one in scores)]
        values = {name: np.array([one.hits[name] for one in scores]) / np.maximum(known, 1) for name in names}
        return Answer(("positions",), labels, {name: value[:, None] for name, value in values.items()})
    there = {name for record in used for name in record.masks} | {b.finding for r in used for b in r.boxes}
    regions = (*sorted(there - set(findings)), *(f for f in findings if f in there))
    views = np.array([[float(one.views.get(name, 0)) for name in regions] for one in scores]).reshape(len(scores), -1)
    out = {}
    for k, name in enumerate(FOCUS):
        sums = np.array([[one.focus.get(region, (0.0, 0.0))[k] for region in regions] for one in scores])
        shares = sums.reshape(len(scores), -1) / np.maximum(views, 1)
        if not np.isnan(shares).any():  # a method without masses has none that could lie anywhere
            out[name] = shares
    return Answer(regions, np.where(views > 0, 1.0, np.nan), out)
