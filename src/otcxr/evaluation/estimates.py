"""What the statistics say: estimates, tables of them and comparisons, and the same as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from otcxr.errors import ConfigError

__all__ = [
    "MEASURES",
    "BootstrapSettings",
    "Comparison",
    "Counts",
    "Difference",
    "Estimate",
    "FindingComparison",
    "FindingScores",
    "MacroComparison",
    "MacroScores",
    "MeasureComparison",
    "ScoreTable",
    "as_json",
]

MEASURES = ("auroc", "average_precision")  # of a table, by the name of their field


@dataclass(frozen=True)
class BootstrapSettings:
    """How intervals are made.

    Attributes:
        resamples: Number of resamples R. With 2000 the resampling itself moves each end of a 95 % interval by about 3 %
            of half its width (one standard error); with 100 the interval is also a little too short.
        seed: Seed of the resamples; the same seed and patients give the same resamples, whatever the scores.
        level: Nominal coverage of the intervals, in (0, 1).
        min_positive_patients: Patients with at least one positive image that a finding needs. A resample misses all of
            k patients with probability below exp(-k); 5 is the first k for which that is under the 1 % of undefined
            resamples that are tolerated. It is what can be computed at all, not what is enough: see ``caution`` of
            :class:`Estimate`.
        min_negative_patients: The same for patients with at least one negative image.
    Raises: ConfigError: a value is out of its range.
    """

    resamples: int = 2000
    seed: int = 0
    level: float = 0.95
    min_positive_patients: int = 5
    min_negative_patients: int = 5

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ConfigError(f"resamples is {self.resamples}; an interval needs at least 1, 2000 is usual")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or larger")
        if not 0 < self.level < 1:
            raise ConfigError(f"level is {self.level}; it must lie between 0 and 1, 0.95 is usual")
        for name in ("min_positive_patients", "min_negative_patients"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; a measure needs at least 1")


class Counts(NamedTuple):
    """What an estimate rests on: the rows whose label is not NaN.

    A patient with positive and negative images counts among both positive and negative patients.
    """

    n: int
    positives: int
    patients: int
    positive_patients: int
    negative_patients: int

    @property
    def prevalence(self) -> float | None:
        """Share of positive images, what average precision is without skill; None if no image is assessed."""
        return self.positives / self.n if self.n else None


class Estimate(NamedTuple):
    """A measure on the full sample with its interval, or the reason why there is none.

    Attributes:
        value: The measure on the full sample (not the mean of the resamples); None if not estimable.
        low: Lower end of the percentile interval; None if not estimable.
        high: Upper end. The value need not lie in the middle.
        n: Assessed images. For a macro mean: images assessed for at least one of its findings.
        positives: Positive images; for a macro mean, images positive for at least one of its findings.
        patients: Patients with an assessed image.
        note: "" if estimable, else why not.
        resamples: Resamples behind the interval: those in which the measure is defined; 0 if not estimable.
        caution: "" or why the interval, although computed, promises more than it holds.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    positives: int
    patients: int
    note: str = ""
    resamples: int = 0
    caution: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON: numbers, strings and None, never NaN."""
        return self._asdict()


class FindingScores(NamedTuple):
    """How well one finding is ranked."""

    finding: str
    counts: Counts
    auroc: Estimate
    average_precision: Estimate


class MacroScores(NamedTuple):
    """Unweighted means over ``findings``: those for which both measures are estimable."""

    findings: tuple[str, ...]
    auroc: Estimate
    average_precision: Estimate


class ScoreTable(NamedTuple):
    """Result of :func:`evaluate_scores`, in the order of the findings given."""

    findings: tuple[FindingScores, ...]
    macro: MacroScores
    settings: BootstrapSettings


class Difference(NamedTuple):
    """A difference a - b of one measure on the same images.

    Attributes:
        estimate: The difference with its interval; ``value`` > 0 means that a is better.
        p_value: Two-sided, see :func:`bootstrap_p_value`; None if not estimable.
        p_holm: The same after Holm's correction over the estimable findings; None if not estimable, and for a macro
            mean, which is one question, asked once.
        excludes_zero: Whether the whole interval lies on one side of 0. No correction for several findings.
    """

    estimate: Estimate
    p_value: float | None
    p_holm: float | None
    excludes_zero: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate's fields and these, ready for JSON."""
        own = {"p_value": self.p_value, "p_holm": self.p_holm, "excludes_zero": self.excludes_zero}
        return self.estimate.as_dict() | own


class MeasureComparison(NamedTuple):
    """One measure of two sets of scores and its difference, from the same resamples."""

    a: Estimate
    b: Estimate
    difference: Difference


class FindingComparison(NamedTuple):
    """Two sets of scores for one finding."""

    finding: str
    counts: Counts
    auroc: MeasureComparison
    average_precision: MeasureComparison


class MacroComparison(NamedTuple):
    """Unweighted means over ``findings``: those for which both measures are estimable."""

    findings: tuple[str, ...]
    auroc: MeasureComparison
    average_precision: MeasureComparison


class Comparison(NamedTuple):
    """Result of :func:`compare_scores`, in the order of the findings given."""

    findings: tuple[FindingComparison, ...]
    macro: MacroComparison
    settings: BootstrapSettings


def as_json(result: ScoreTable | Comparison) -> dict[str, Any]:
    """Return a result as plain dicts, lists, numbers, strings and None: no NaN, ready for ``json.dumps``.

    ``findings.<finding>`` holds the counts, the prevalence and both measures; ``macro`` the names of its findings,
    counts and both measures; ``intervals`` how they were made. A measure of a :class:`ScoreTable` is {value, low, high,
    note, resamples, caution}; one of a :class:`Comparison` is {a, b, difference} of such, the difference with p_value,
    p_holm and excludes_zero.
    """
    macro = result.macro
    estimate = macro.auroc if isinstance(macro.auroc, Estimate) else macro.auroc.difference.estimate
    return {
        "findings": {
            row.finding: row.counts._asdict() | {"prevalence": row.counts.prevalence} | _measures_json(row)
            for row in result.findings
        },
        "macro": {
            "findings": list(macro.findings),
            "n": estimate.n,
            "positives": estimate.positives,
            "patients": estimate.patients,
        }
        | _measures_json(macro),
        "intervals": {"method": "patient bootstrap, percentile"} | asdict(result.settings),
    }


def _measures_json(row: FindingScores | MacroScores | FindingComparison | MacroComparison) -> dict[str, Any]:
    def plain(estimate: Estimate | Difference) -> dict[str, Any]:
        # The counts stand once, beside the measures.
        return {k: v for k, v in estimate.as_dict().items() if k not in ("n", "positives", "patients")}

    measures: dict[str, Any] = {}
    for name in MEASURES:
        measure = getattr(row, name)
        if isinstance(measure, MeasureComparison):
            measures[name] = {part: plain(estimate) for part, estimate in measure._asdict().items()}
        else:
            measures[name] = plain(measure)
    return measures
