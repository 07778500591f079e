"""Judge an encoder while it is pre-trained: nearest neighbours and a linear probe on a few labelled radiographs.

The labels are looked at, never learned from: nothing of the judgement reaches the training, which goes on bit for bit
as if it had not been judged. What a person does with the numbers (stop, choose an epoch) is a use of those labels all
the same; the split "test" is therefore never touched.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcxr.data.dataset import ImageDataset, PixelCache, check_records
from otcxr.data.records import Collection, Record, column, take
from otcxr.errors import ConfigError, DataError
from otcxr.evaluation.classify import fit_probe, knn_scores
from otcxr.evaluation.metrics import auroc
from otcxr.evaluation.statistics import BootstrapSettings, as_json, bootstrap_metric, evaluate_scores
from otcxr.nn.encoder import Encoder, pool

__all__ = ["OnlineProbe"]

_log = logging.getLogger(__name__)

_STREAM = 9  # of the seed: whom the judgement is made on
_FEWEST = BootstrapSettings.min_positive_patients  # with and without a finding, in both parts
_RESAMPLES = 200
_BLOCK, _DECODED_GB = 64, 0.5  # images read at a time, and the memory for them
_STRENGTH = 0.01  # inverse penalty of the linear probe, from the middle of those that evaluation chooses from


class _Part(NamedTuple):
    """Chosen records and their pixels, (N, 1, size, size) float32: the very images that evaluation sees."""

    records: list[Record]
    images: Tensor

    @property
    def patients(self) -> list[str]:
        return [record.patient for record in self.records]

    def labels(self, findings: Sequence[str]) -> NDArray[np.float64]:
        """(N, F), NaN where not assessed."""
        return np.array([[record.labels.get(f, np.nan) for f in findings] for record in self.records], dtype=float)


class OnlineProbe:
    """A fixed set of labelled radiographs on which an encoder is judged again and again.

    Attributes:
        findings: What is judged: findings with at least 5 patients with, and 5 without, it in both parts.
        fit: Radiographs whose labels are known to the judge: neighbours, and what the probe is fitted on.
        judged: Radiographs whose labels are guessed, of other patients.
        judged_on: "val", or "patients held out of train" where there is no such split. The encoder has been trained on
            the pictures of the latter, without their labels.
    """

    def __init__(
        self, fit: _Part, judged: _Part, judged_on: str, findings: tuple[str, ...], *, seed: int, batch_size: int
    ) -> None:
        """Take what ``choose`` has chosen."""
        self.findings, self.fit, self.judged, self.judged_on = findings, fit, judged, judged_on
        self._seed, self._batch_size = seed, batch_size

    @classmethod
    def choose(
        cls, collection: Collection, training: Collection, *, images: int, size: int, seed: int, batch_size: int = 64,
        memory_gb: float = 1.0,
    ) -> OnlineProbe | None:  # fmt: skip
        """Choose at most ``images`` labelled radiographs to fit on and as many, of other patients, to judge on.

        The former come from ``training``; the latter from the split "val" where it has labels and is not trained on,
        else from ``training`` too: its patients are then divided evenly between both parts. The split "test" and any
        other one are never touched, nor is a patient who is in more than one split. Images are shuffled and taken in
        turn, nobody's second one before everyone's first: as many patients as possible. The draw depends on ``seed``
        and the collection only. What cannot be read, or is mostly padding, is passed over; it is counted where the
        split is used. Pixels are read here, never again.

        A finding is kept if at least 5 patients with it and 5 without it are in both parts, and if its AUROC is defined
        in 99 % of the resamples of patients.

        Args:
            collection: All records.
            training: Those that the encoder is pre-trained on.
            images: At most so many a part; 0: no judgement.
            size: Side in pixels to which images are reduced.
            seed: Of the draw and of the resamples; >= 0.
            batch_size: Images at a time through the encoder. Does not change what is chosen.
            memory_gb: Memory in GB for the reduced images, 4 size^2 bytes each: 0.04 for 512 + 512 of 96 px. Where they
                would need more (512 + 512 beyond 490 px with 1 GB), fewer are chosen.
        Returns: The probe; None where there is nothing to judge: ``images`` is 0, no labels, no finding that is kept.
        Raises: ConfigError: a setting out of range.
        """
        if images < 0 or size < 16 or batch_size < 1 or seed < 0 or memory_gb < 0:
            raise ConfigError(
                "the online judgement needs images, seed and memory_gb >= 0, size >= 16 and batch_size >= 1, received "
                f"images {images}, seed {seed}, memory_gb {memory_gb}, size {size}, batch_size {batch_size}"
            )
        images = min(images, int(memory_gb * 1e9) // (2 * 4 * size**2))
        if not images or not collection.findings:
            return None
        generator = np.random.default_rng((seed, _STREAM))
        own, val = _candidates(collection, training)
        fit, judged = _in_turn(own, generator), _in_turn(val, generator)
        judged_on = "val"
        if not val:
            judged_on = "patients held out of train"
            patients = column(fit, "patient")
            second = set(list(dict.fromkeys(patients))[1::2])
            fit, judged = (
                take(fit, [index for index, patient in enumerate(patients) if (patient in second) == other])
                for other in (False, True)
            )
        parts = (_read(fit, images, size), _read(judged, images, size))
        findings = tuple(f for f in collection.findings if _judgeable(f, *parts, seed))
        if not findings:
            _log.info("no online judgement: no finding of %s has %d patients with and %d without it both among the %d "
                      "images to fit on and among the %d to judge on (%s)", collection.name, _FEWEST, _FEWEST,
                      len(parts[0].records), len(parts[1].records), judged_on)  # fmt: skip
            return None
        return cls(*parts, judged_on, findings, seed=seed, batch_size=batch_size)

    def judge(self, encoder: Encoder) -> dict[str, Any]:
        """Judge an encoder as it is now, and leave no trace in it.

        Features are pooled maps of whole images in evaluation mode, without gradients, on the encoder's device and in
        its precision, in one fixed order. Weights, gradients, statistics of norms, the mode of every module and all
        global random states are afterwards what they were.

        Args:
            encoder: Any; not wrapped, compiled or under autocast if the numbers are to be those of evaluation.
        Returns: Plain values for JSON. ``knn`` (:func:`knn_scores`, 20 neighbours) and ``linear`` (:func:`fit_probe`,
            strength 0.01) each hold ``auroc``, the macro mean over ``findings``, and ``findings.<finding>.auroc``:
            {value, low, high, note, resamples, caution} as in evaluation, 95 % over 200 resamples of the judged
            patients. Beside them findings, images_fit, images_judged, patients_fit, patients_judged and judged_on.
            Resamples are the same at every judgement. Values are None, with a note, where features are not finite; a
            fit that did not converge is no error but a caution.
            Cost: a forward pass of all images; the rest takes 0.03 s for 512 + 512 images of 128 channels and two
            findings, after 1 s once to import scikit-learn.
        """
        with _as_evaluated(encoder):
            fit, judged = (_features(encoder, part.images, self._batch_size) for part in (self.fit, self.judged))
        return {
            **self._tables(fit, judged),
            "findings": list(self.findings),
            "images_fit": len(fit),
            "images_judged": len(judged),
            "patients_fit": len(set(self.fit.patients)),
            "patients_judged": len(set(self.judged.patients)),
            "judged_on": self.judged_on,
        }

    @staticmethod
    def score(result: dict[str, Any]) -> float:
        """Return the one number by which epochs compare: kNN's macro AUROC; NaN, never larger than any, if unknown.

        kNN rather than the probe because nothing is fitted: it moves with the features alone.
        """
        value = result["knn"]["auroc"]["value"]
        return float("nan") if value is None else float(value)

    def _tables(self, fit: NDArray[np.float32], judged: NDArray[np.float32]) -> dict[str, Any]:
        broken = sum(int((~np.isfinite(features)).any(axis=1).sum()) for features in (fit, judged))
        if broken:
            note = f"not estimable: features of {broken} of {len(fit) + len(judged)} images are not finite"
            return {"knn": self._nothing(note), "linear": self._nothing(note)}
        labels = self.fit.labels(self.findings)
        with warnings.catch_warnings(record=True) as heard:
            from sklearn.exceptions import ConvergenceWarning

            warnings.filterwarnings("always", category=ConvergenceWarning)
            probe = fit_probe(
                fit, labels, self.fit.patients, self.findings, strengths=(_STRENGTH,), folds=2, seed=self._seed
            )
        stopped = sum(issubclass(warning.category, ConvergenceWarning) for warning in heard)
        for other in heard:
            if not issubclass(other.category, ConvergenceWarning):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        linear = self._table(probe.score(judged))
        if stopped:
            caution = f"{stopped} of {len(self.findings)} fits stopped before they converged"
            linear["auroc"]["caution"] = "; ".join(filter(None, [linear["auroc"]["caution"], caution]))
        return {"knn": self._table(knn_scores(fit, labels, judged)), "linear": linear}

    def _nothing(self, note: str) -> dict[str, Any]:
        def none() -> dict[str, Any]:
            return {"value": None, "low": None, "high": None, "note": note, "resamples": 0, "caution": ""}

        return {"auroc": none(), "findings": {finding: {"auroc": none()} for finding in self.findings}}

    def _table(self, scores: NDArray[np.float64]) -> dict[str, Any]:
        plain = as_json(
            evaluate_scores(
                self.judged.labels(self.findings), scores, self.judged.patients, self.findings, resamples=_RESAMPLES,
                seed=self._seed,
            )
        )  # fmt: skip
        findings = {finding: {"auroc": row["auroc"]} for finding, row in plain["findings"].items()}
        return {"auroc": plain["macro"]["auroc"], "findings": findings}


@contextmanager
def _as_evaluated(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode for a while; then every module has the mode that it had, which need not be its parent's."""
    modes = [(module, module.training) for module in encoder.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def _features(encoder: Encoder, images: Tensor, batch_size: int) -> NDArray[np.float32]:
    """Pooled features (N, C). No ``DataLoader``: to iterate one draws from torch's global generator."""
    weight = next(encoder.parameters())
    batches = torch.split(images, batch_size)
    rows = [pool(encoder(batch.to(weight.device, weight.dtype))).float().cpu().numpy() for batch in batches]
    return np.concatenate(rows)


def _candidates(collection: Collection, training: Collection) -> tuple[Sequence[Record], Sequence[Record]]:
    """Labelled records of ``training``, and of "val" those of patients not trained on; nobody of several splits."""
    patients, splits = column(collection.records, "patient"), column(collection.records, "split")
    everyone: dict[str, set[str]] = {}
    for patient, split in zip(patients, splits, strict=True):
        everyone.setdefault(patient, set()).add(split)
    several = {patient for patient, of in everyone.items() if len(of - {""}) > 1}

    def chosen(records: Sequence[Record], without: set[str], split: str | None) -> Sequence[Record]:
        facts = zip(column(records, "patient"), column(records, "split"), column(records, "labelled"), strict=True)
        return take(records, [
            index for index, (patient, of, labelled) in enumerate(facts)
            if labelled and of != "test" and split in (None, of) and patient not in several and patient not in without
        ])  # fmt: skip

    trained = set(column(training.records, "patient"))
    return chosen(training.records, set(), None), chosen(collection.records, trained, "val")


def _in_turn(records: Sequence[Record], generator: np.random.Generator) -> Sequence[Record]:
    """Shuffle: first one image of everyone, then everyone's second, and so on."""
    turns: list[tuple[int, int]] = []
    had: dict[str, int] = {}
    patients = column(records, "patient")
    for index in generator.permutation(len(records)).tolist():
        patient = patients[index]
        had[patient] = had.get(patient, 0) + 1
        turns.append((had[patient], index))
    return take(records, [index for _, index in sorted(turns, key=lambda turn: turn[0])])


def _read(ranked: Sequence[Record], images: int, size: int) -> _Part:
    """The first ``images`` records that can be used, by the rule that evaluation has; fewer where there are no more."""
    records: list[Record] = []
    squares: list[Tensor] = []
    first = 0
    while len(records) < images and first < len(ranked):
        block = ranked[first : first + min(_BLOCK, images - len(records))]
        first += len(block)
        pixels = PixelCache(_DECODED_GB)  # of this block: whole images are many times larger than what is kept
        try:
            usable = check_records(Collection("", (), block), pixels, max_skipped=1.0)[0]
        except DataError:  # none of them
            continue
        found = [block[index] for index in usable]
        reduced = ImageDataset(found, size, pixels)
        records += found
        squares += [reduced[index] for index in range(len(found))]
    return _Part(records, torch.stack(squares) if squares else torch.empty(0, 1, size, size))


def _judgeable(finding: str, fit: _Part, judged: _Part, seed: int) -> bool:
    """Whether a finding can be learned from ``fit``, and its AUROC on ``judged`` has an interval for any scores."""
    if not fit.records or not judged.records:
        return False
    patients, known = np.array(fit.patients), fit.labels([finding])[:, 0]
    if min(len(set(patients[known == label])) for label in (0, 1)) < _FEWEST:
        return False
    labels = judged.labels([finding])[:, 0]
    return not bootstrap_metric(
        auroc, labels, np.zeros_like(labels), judged.patients, resamples=_RESAMPLES, seed=seed
    ).note
