"""What a study is: the YAML file, checked, and the cells that it asks for.

    name: methods
    text: What this shows, and what it cannot.
    seeds: [0, 1]
    reference: otcxr                       # every row is compared with it, seed by seed
    methods:                               # a name, or what differs
      - otcxr
      - simclr
      - {method: otcxr, as: otcxr-literal, settings: {infuse: true}, views: {}, train: {}}
    pretrain:                              # of every row: as in a file for otcxr pretrain, without method and seed
      data: {source: "phantom:2750,seed=31,size=96"}
      views: {size: 96}
      encoder: {name: resnet18, width: 16}
      train: {epochs: 8, batch_size: 64}
    judge:
      source: "phantom:6000,seed=32,size=96"
      tasks: [linear, finetune]
      settings: {fractions: [0.01, 0.1, 1.0]}        # of EvaluateConfig
      finetune: {steps: 200}
      segment: {regions: [lungs, Mass], steps: 200}  # of the tasks segment-*
      matching: {images: 200}                        # of correspondence and focus: pairs drawn as pretrain.views says
    external:                              # other collections to judge on
      - {name: elsewhere, source: "folder:/data/x", split: test, labels: {Effusion: Pleural effusion}}
    imagenet: weights.pth                  # adds a row; encoder.width must be 64
    tuning:                                # one rule for every row
      grid: {train.learning_rate: [0.001, 0.002]}

A random network is always a row. With a ``tuning`` every row is trained once, with the first seed, at every point of
the grid; the point with the best macro AUROC of a linear probe on the *validation* patients is taken for all its seeds.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from otcxr.config import digest, flatten, read_settings, to_plain
from otcxr.errors import ConfigError, did_you_mean
from otcxr.evaluation.finetune import FinetuneConfig
from otcxr.evaluation.segment import SegmentConfig
from otcxr.evaluation.tasks import SHARED, EvaluateConfig
from otcxr.files import file_name
from otcxr.matching import MatchingConfig
from otcxr.settings import PretrainConfig, config_from_plain, identity
from otcxr.study.tasks import ENCODER_TASKS, PAIR_TASKS

__all__ = ["External", "Row", "Study", "Unit", "read_study"]

RANDOM, IMAGENET = "random", "imagenet"

_TOP = {"name", "text", "seeds", "reference", "methods", "pretrain", "judge", "external", "imagenet", "tuning"}
_UNUSED = {
    "seeds": "labels are drawn once for each of its seeds",
    "recalibration": "its cells are scores, and rankings of them are compared",
    "rule": "its cells are scores, and rankings of them are compared",
    "subgroups": "take within for groups",
}
SEED = "{seed}"  # in pretrain.data.source: the seed of the training
_JUDGE = {"source", "fit", "val", "test", "tasks", "settings", "finetune", "segment", "matching"}


class Row(NamedTuple):
    """One line of the table: what is trained.

    Attributes:
        name: Of the line.
        config: The training, without seed and folder; None for a network that is not trained.
    """

    name: str
    config: PretrainConfig | None


class External(NamedTuple):
    """Another collection that is judged on.

    Attributes:
        name: Of the column.
        source: READER:ARGUMENT.
        split: Which part of it; "" takes all.
        labels: Finding of the study -> name or names in that collection (present if any is); others keep their name.
    """

    name: str
    source: str
    split: str
    labels: Mapping[str, tuple[str, ...]]


class Unit(NamedTuple):
    """What one process does: train a row with a seed, then judge it.

    Attributes:
        row: Name of the row.
        seed: Of the training and of the label draw.
        point: Place on the tuning grid; None for the comparison itself.
    """

    row: str
    seed: int
    point: int | None = None

    @property
    def name(self) -> str:
        return f"{self.row}-s{self.seed}" if self.point is None else f"{self.row}-tune{self.point}"


@dataclass(frozen=True)
class Study:
    """A study, checked.

    Attributes:
        name: For headings and folders.
        text: What it shows and what it cannot, for the page.
        seeds: Of trainings and label draws.
        reference: Row that the others are compared with.
        rows: The random network last.
        source, fit, val, test: What is judged on.
        tasks: Of ``study.tasks``.
        evaluate: Settings of the evaluation.
        matching: Of what is measured on pairs of views.
        external: Other collections.
        imagenet: File of torchvision's weights; "" for none.
        grid: Settings that are tuned, and their values.
    """

    name: str
    text: str
    seeds: tuple[int, ...]
    reference: str
    rows: tuple[Row, ...]
    source: str
    tasks: tuple[str, ...]
    evaluate: EvaluateConfig
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    fit: str = "train"
    val: str = "val"
    test: str = "test"
    external: tuple[External, ...] = ()
    imagenet: str = ""
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the tuning grid; empty without one."""
        if not self.grid:
            return []
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def tuning_units(self) -> list[Unit]:
        count = len(self.points())
        trained = [row.name for row in self.rows if row.config is not None]
        return [Unit(name, self.seeds[0], point) for name in trained for point in range(count)] if count > 1 else []

    def units(self) -> list[Unit]:
        """Everything to do after tuning, the reference and random first: differences exist early."""
        first = [name for name in (self.reference, RANDOM) if any(row.name == name for row in self.rows)]
        names = [*first, *(row.name for row in self.rows if row.name not in first)]
        return [Unit(name, seed) for seed in self.seeds for name in names]

    def config(self, unit: Unit, chosen: Mapping[str, Any]) -> PretrainConfig | None:
        """The training of a unit with tuned settings; None for a network that is not trained."""
        base = self.row(unit.row).config
        if base is None:
            return None
        source = base.data.source.replace(SEED, str(unit.seed))
        return replace(_with(base, chosen), seed=unit.seed, data=replace(base.data, source=source))

    def judge_digest(self, task: str) -> str:
        """Digest of all that decides what a task says of an encoder; settings of other tasks are no part of it."""
        if task in PAIR_TASKS:  # every row is shown the same pairs, however it was trained
            first = self.rows[0].config
            assert first is not None
            return digest([self.source, self.test, to_plain(self.matching), to_plain(first.views)])
        plain = to_plain(self.evaluate)
        kept = {name: plain[name] for name in (*SHARED, *ENCODER_TASKS[task].settings)}
        outside = [(e.name, e.source, e.split, to_plain(e.labels)) for e in self.external]
        return digest([self.source, self.fit, self.val, self.test, kept, outside])


def read_study(path: str | Path) -> Study:
    """Read and check a study file.

    Raises: ConfigError: it cannot be read, a name is unknown, a value impossible, or rows have equal names.
    """
    path = Path(path)
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"study file {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"study file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"study file {path} must hold 'name: value' lines, found {type(plain).__name__}")
    _known(plain, _TOP, "")
    for needed in ("methods", "pretrain"):
        if not plain.get(needed):
            raise ConfigError(f"study file {path} lacks '{needed}'; see docs/studies.md")
    judge = dict(plain.get("judge") or {})
    _known(judge, _JUDGE, "judge.")
    rows = [_row(entry, dict(plain["pretrain"])) for entry in plain["methods"]]
    first = rows[0].config
    assert first is not None
    evaluate = {
        **(judge.get("settings") or {}),
        "finetune": read_settings(FinetuneConfig, judge.get("finetune") or {}),
        "segment": read_settings(SegmentConfig, judge.get("segment") or {}),
    }
    evaluate.setdefault("size", first.views.size)
    if plain.get("imagenet"):
        if first.encoder.width != 64:
            raise ConfigError("imagenet needs pretrain.encoder.width 64, that of the published weights, received "
                              f"{first.encoder.width}: a wide network beside narrow ones compares nothing")  # fmt: skip
        rows.append(Row(IMAGENET, None))
    rows.append(Row(RANDOM, None))
    names = [row.name for row in rows]
    lost = next((name for name in names if file_name(name) != name), None)
    if lost is not None:
        raise ConfigError(f"the name of a row is part of its files' names; '{lost}' cannot be: take letters, digits, "
                          "'-', '_' and '.'")  # fmt: skip
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"the study has two rows named '{twice}'; give one of them another name with 'as'")
    reference = str(plain.get("reference") or names[0])
    if reference not in names:
        raise ConfigError(f"reference is '{reference}'{did_you_mean(reference, names)}")
    tasks = tuple(judge.get("tasks") or ("linear",))
    for task in tasks:
        known = [*ENCODER_TASKS, *PAIR_TASKS]
        if task not in known:
            raise ConfigError(f"unknown task '{task}' in judge.tasks{did_you_mean(task, known)}")
    seeds = tuple(int(seed) for seed in plain.get("seeds") or (0,))
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds must be different and >= 0, received {list(seeds)}")
    unused = next((name for name in _UNUSED if name in evaluate), None)
    if unused is not None:
        raise ConfigError(f"judge.settings.{unused} has no effect in a study: {_UNUSED[unused]}; leave it out")
    external = tuple(map(_external, plain.get("external") or ()))
    roles = [str(judge.get(name) or default) for name, default in (("fit", "train"), ("val", "val"), ("test", "test"))]
    for place, entry in enumerate(external):
        if entry.name in (*roles, *(other.name for other in external[:place])):
            raise ConfigError(f"external: the name '{entry.name}' is taken; give every collection a name of its own")
    source = str(judge.get("source") or first.data.source)
    if SEED in source:
        raise ConfigError(f"judge.source is {source}: all trainings are judged on the same images; name them without "
                          f"{SEED}, which belongs into pretrain.data.source")  # fmt: skip
    study = Study(
        name=str(plain.get("name") or path.stem), text=" ".join(str(plain.get("text") or "").split()), seeds=seeds,
        reference=reference, rows=tuple(rows), source=source, tasks=tasks,
        evaluate=read_settings(EvaluateConfig, evaluate),
        matching=read_settings(MatchingConfig, judge.get("matching") or {}), fit=str(judge.get("fit") or "train"),
        val=str(judge.get("val") or "val"), test=str(judge.get("test") or "test"),
        external=external, imagenet=str(plain.get("imagenet") or ""),
        grid=_grid(plain.get("tuning"), first),
    )  # fmt: skip
    for row in study.rows:
        for point in study.points():
            if row.config is not None:
                _with(row.config, point)  # so that an impossible value is found before the first training
    return study


def _known(given: Mapping[str, Any], names: set[str], prefix: str) -> None:
    for name in given:
        if name not in names:
            raise ConfigError(f"unknown setting {prefix}{name} in the study file{did_you_mean(name, names)}")


def _row(entry: Any, pretrain: dict[str, Any]) -> Row:
    entry = {"method": entry} if isinstance(entry, str) else dict(entry)
    _known(entry, {"method", "as", "settings", "views", "train"}, "methods.")
    if "method" not in entry:
        raise ConfigError(f"a row of the study has no method: {entry}")
    for forbidden in ("method", "seed", "out", "resume"):
        if forbidden in pretrain:
            raise ConfigError(f"pretrain.{forbidden} is decided by the rows and seeds of a study; leave it out")
    plain = {**pretrain, "method": {"name": entry["method"], **(entry.get("settings") or {})}}
    for group in ("views", "train"):
        plain[group] = {**(pretrain.get(group) or {}), **(entry.get(group) or {})}
    return Row(str(entry.get("as") or entry["method"]).replace(":", "."), config_from_plain(plain))


def _external(entry: Mapping[str, Any]) -> External:
    _known(entry, {"name", "source", "split", "labels"}, "external.")
    for needed in ("name", "source"):
        if needed not in entry:
            raise ConfigError(f"an entry of external lacks '{needed}': {dict(entry)}")
    labels = {
        str(k): (v,) if isinstance(v, str) else tuple(map(str, v)) for k, v in (entry.get("labels") or {}).items()
    }
    return External(str(entry["name"]), str(entry["source"]), str(entry.get("split") or ""), labels)


def _grid(tuning: Any, first: PretrainConfig) -> dict[str, tuple[Any, ...]]:
    if not tuning:
        return {}
    _known(tuning, {"grid"}, "tuning.")
    grid = {str(k): tuple(v if isinstance(v, list) else [v]) for k, v in (tuning.get("grid") or {}).items()}
    known = [f"train.{name}" for name in to_plain(first.train)] + [f"views.{name}" for name in to_plain(first.views)]
    for name in grid:
        if name not in known:
            raise ConfigError(f"tuning.grid may hold settings that every row has (train.*, views.*); received '{name}'"
                              f"{did_you_mean(name, known)}")  # fmt: skip
    return grid


def _with(config: PretrainConfig, chosen: Mapping[str, Any]) -> PretrainConfig:
    """The same with some settings changed, by dotted name."""
    for name, value in chosen.items():
        group, _, setting = name.partition(".")
        part = replace(getattr(config, group), **{setting: value})
        config = replace(config, **{group: part})
    return config


def training_digest(config: PretrainConfig | None, study: Study, unit: Unit) -> str:
    """Digest of all that decides a training."""
    from otcxr.settings import config_to_plain

    if config is None:
        first = study.rows[0].config
        assert first is not None
        weights = Path(study.imagenet) if unit.row == IMAGENET else None
        content = hashlib.sha256(weights.read_bytes()).hexdigest() if weights and weights.is_file() else ""
        # the norms of an untrained network depend on how many images are looked at at a time
        return digest([unit.row, unit.seed, flatten(to_plain(first.encoder)), content, study.evaluate.batch_size])
    return identity(config_to_plain(config))
