"""What the statistics say: estimates, tables of them and comparisons, and the same as plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from otcxr.errors import ConfigError

__all__ = [
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
        min_negative_patients: The same for patients with at least one negative image; 0 for measures that look at
            positive images only, which then need no negative ones, and whose caution does not count them.
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
        for name, least in (("min_positive_patients", 1), ("min_negative_patients", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {least} or larger")


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
        standard_error: Root of the variance over patients and seeds; None if not estimable.
        seeds: Trainings over which the value is the mean.
        seed_deviation: Standard deviation over them; None for one.
        seed_freedom: Degrees of freedom with which it is known how far seeds move the value; None for one seed. With
            1 a 95 % interval takes 6.5 times as much of the deviation as with many.
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
    standard_error: float | None = None
    seeds: int = 1
    seed_deviation: float | None = None
    seed_freedom: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON: numbers, strings and None, never NaN."""
        return self._asdict()


class FindingScores(NamedTuple):
    """What is measured of one finding, by the name of the measure."""

    finding: str
    counts: Counts
    measures: Mapping[str, Estimate]


class MacroScores(NamedTuple):
    """Unweighted means over ``findings``: those for which all measures of the ranking are estimable."""

    findings: tuple[str, ...]
    measures: Mapping[str, Estimate]


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
        detectable: The smallest true difference that one test on such data sees with a power of 80 %; None where seeds
            have one degree of freedom, of which the normal approximation knows nothing.
    """

    estimate: Estimate
    p_value: float | None
    p_holm: float | None
    excludes_zero: bool
    detectable: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate's fields and these, ready for JSON."""
        return self.estimate.as_dict() | {name: value for name, value in self._asdict().items() if name != "estimate"}


class MeasureComparison(NamedTuple):
    """One measure of two sets of scores and its difference, from the same resamples."""

    a: Estimate
    b: Estimate
    difference: Difference


class FindingComparison(NamedTuple):
    """Two sets of scores for one finding, by the name of the measure."""

    finding: str
    counts: Counts
    measures: Mapping[str, MeasureComparison]


class MacroComparison(NamedTuple):
    """Unweighted means over ``findings``: those for which all differences of ranking measures are estimable."""

    findings: tuple[str, ...]
    measures: Mapping[str, MeasureComparison]


class Comparison(NamedTuple):
    """Result of :func:`compare_scores`, in the order of the findings given."""

    findings: tuple[FindingComparison, ...]
    macro: MacroComparison
    settings: BootstrapSettings


def as_json(result: ScoreTable | Comparison) -> dict[str, Any]:
    """Return a result as plain dicts, lists, numbers, strings and None: no NaN, ready for ``json.dumps``.

    ``findings.<finding>`` holds the counts, the prevalence and the measures; ``macro`` the names of its findings,
    counts and measures; ``intervals`` how they were made. A measure of a :class:`ScoreTable` is an :class:`Estimate`
    without its counts; one of a :class:`Comparison` is {a, b, difference} of such.
    """
    macro = result.macro
    counts: dict[str, Any] = {"n": 0, "positives": 0, "patients": 0}
    for measure in macro.measures.values():
        estimate = measure.difference.estimate if isinstance(measure, MeasureComparison) else measure
        counts = {"n": estimate.n, "positives": estimate.positives, "patients": estimate.patients}
        break
    return {
        "findings": {
            row.finding: row.counts._asdict() | {"prevalence": row.counts.prevalence} | _measures_json(row.measures)
            for row in result.findings
        },
        "macro": {"findings": list(macro.findings)} | counts | _measures_json(macro.measures),
        "intervals": {"method": "patient bootstrap, percentile"} | asdict(result.settings),
    }


def _measures_json(measures: Mapping[str, Estimate] | Mapping[str, MeasureComparison]) -> dict[str, Any]:
    def plain(estimate: Estimate | Difference) -> dict[str, Any]:
        # The counts stand once, beside the measures.
        return {k: v for k, v in estimate.as_dict().items() if k not in ("n", "positives", "patients")}

    out: dict[str, Any] = {}
    for name, measure in measures.items():
        if isinstance(measure, MeasureComparison):
            out[name] = {part: plain(estimate) for part, estimate in measure._asdict().items()}
        else:
            out[name] = plain(measure)
    return out
