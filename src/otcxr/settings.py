"""Everything that decides a pre-training run, as frozen dataclasses, and the same as plain values for YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from otcxr.config import digest, flatten, read_settings, to_plain
from otcxr.data.dataset import DataConfig
from otcxr.data.views import ViewsConfig
from otcxr.errors import ConfigError, did_you_mean
from otcxr.methods import METHODS

__all__ = [
    "FREE",
    "EncoderConfig",
    "PretrainConfig",
    "TrainConfig",
    "config_from_plain",
    "config_to_plain",
    "identity",
]

# Settings that may change between a run and its continuation. The images themselves are compared by a digest, so a
# folder may have moved; another accelerator computes the same up to rounding.
FREE = {"out", "resume", "data.source", "data.workers", "data.cache_gb", "train.accelerator", "train.log_every"}


@dataclass(frozen=True)
class EncoderConfig:
    """The network that is trained.

    Attributes:
        name: resnet18, resnet34 or resnet50.
        width: Channels of the stem; 64 is the published network, 16 suits a CPU.
        stride: Pixels per position of the last map, 16 or 32; null chooses 16 for views up to 128 px, else 32.
        padding: "replicate" or "zeros" (as published) beyond the border. Zeros tell a position where it is in the view,
            and dense alignment is then solved by pairing equal positions, whatever they show.
    """

    name: str = "resnet18"
    width: int = 64
    stride: int | None = None
    padding: str = "replicate"


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained: AdamW, linear warm-up, half a cosine to 0, clipped gradients.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images a step.
        learning_rate: Peak of the schedule.
        weight_decay: Of weights; biases and norms are not decayed.
        warmup: Share of all steps in which the rate rises.
        clip: Largest norm of the gradient.
        precision: Of Fabric: 32-true or bf16-mixed.
        accelerator: auto, cpu or cuda.
        log_every: Steps between two lines of metrics.jsonl.
        health_every: Steps between two looks at the health of the run.
        probes: Radiographs whose pair of views is stored with masses, cost and plan.
    """

    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    precision: str = "32-true"
    accelerator: str = "auto"
    log_every: int = 10
    health_every: int = 50
    probes: int = 8

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every", "health_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, received {getattr(self, name)}")
        if self.batch_size < 2:
            raise ConfigError("train.batch_size must be at least 2: variance and contrast need another image")
        if self.learning_rate <= 0 or self.clip <= 0 or not 0 <= self.warmup < 1:
            raise ConfigError("train.learning_rate and train.clip must be > 0 and train.warmup in [0, 1), received "
                              f"{self.learning_rate}, {self.clip}, {self.warmup}")  # fmt: skip
        if self.accelerator not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"train.accelerator must be auto, cpu or cuda, received '{self.accelerator}'")
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(f"train.precision must be 32-true or bf16-mixed, received '{self.precision}'")
        if self.weight_decay < 0 or self.probes < 0:
            raise ConfigError(f"train.weight_decay and train.probes must be >= 0, received {self.weight_decay} and "
                              f"{self.probes}")  # fmt: skip


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a pre-training run.

    Attributes:
        data: Where radiographs come from.
        method: Name in the table of methods.
        settings: The method's settings; None takes those of the table.
        views: How views are drawn.
        encoder: The network.
        train: The training.
        seed: One seed for weights, order and views.
        out: Folder of the run; empty: runs/METHOD.
        resume: Go on from the last checkpoint in ``out``; starts from the beginning where there is none.
    """

    data: DataConfig
    method: str = "otcxr"
    settings: Any = None
    views: ViewsConfig = field(default_factory=ViewsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    out: str = ""
    resume: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"unknown method '{self.method}'{did_you_mean(self.method, METHODS)}")
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, received {self.seed}")
        known = METHODS[self.method].settings
        if self.settings is None:
            object.__setattr__(self, "settings", known)
        elif not isinstance(self.settings, type(known)):
            raise ConfigError(f"method '{self.method}' needs settings of type {type(known).__name__}, "
                              f"received {type(self.settings).__name__}")  # fmt: skip
        if self.encoder.stride is None:
            stride = 16 if self.views.size <= 128 else 32
            object.__setattr__(self, "encoder", replace(self.encoder, stride=stride))
        if not self.out:
            object.__setattr__(self, "out", f"runs/{self.method}")


def config_to_plain(config: PretrainConfig) -> dict[str, Any]:
    """The settings as ``config.yaml`` holds them; ``config_from_plain`` is the inverse."""
    plain: dict[str, Any] = to_plain(config)
    return {
        "data": plain["data"],
        "method": {"name": plain["method"], **plain["settings"]},
        **{name: plain[name] for name in ("views", "encoder", "train", "seed", "out", "resume")},
    }


def config_from_plain(plain: Mapping[str, Any]) -> PretrainConfig:
    """Build the settings from ``config.yaml`` or from parsed arguments.

    Raises: ConfigError: an unknown name or an impossible value.
    """
    method = dict(plain.get("method", {}))
    name = str(method.pop("name", "otcxr"))
    if name not in METHODS:
        raise ConfigError(f"unknown method '{name}'{did_you_mean(name, METHODS)}")
    known = METHODS[name].settings
    return PretrainConfig(
        data=read_settings(DataConfig, plain["data"]),
        method=name,
        settings=read_settings(type(known), {**to_plain(known), **method}),
        views=read_settings(ViewsConfig, plain.get("views", {})),
        encoder=read_settings(EncoderConfig, plain.get("encoder", {})),
        train=read_settings(TrainConfig, plain.get("train", {})),
        seed=int(plain.get("seed", 0)),
        out=str(plain.get("out", "")),
        resume=bool(plain.get("resume", False)),
    )


def identity(plain: Mapping[str, Any]) -> str:
    """Digest of the settings that decide the numbers."""
    return digest({k: v for k, v in flatten(plain).items() if k not in FREE})
