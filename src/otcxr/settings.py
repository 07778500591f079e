"""Everything that decides a pre-training run, as frozen dataclasses, and the same as plain values for YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from otcxr.config import digest, flatten, read_settings, to_plain
from otcxr.data.dataset import DataConfig
from otcxr.data.views import ViewsConfig
from otcxr.errors import ConfigError
from otcxr.methods import find_method
from otcxr.optim import OPTIMIZERS

__all__ = [
    "FREE",
    "LATER",
    "EncoderConfig",
    "PretrainConfig",
    "TrainConfig",
    "config_from_plain",
    "config_to_plain",
    "identity",
]

# Settings that may change between a run and its continuation. The images themselves are compared by a digest, so a
# folder may have moved; another accelerator, or another number of processes, computes the same up to rounding.
FREE = {
    "out", "resume", "data.source", "data.workers", "data.cache_gb", "train.accelerator", "train.devices",
    "train.nodes", "train.log_every", "train.on_collapse", "train.collapse_patience", "train.checkpoint_minutes",
    "train.keep", "train.online_images", "train.loggers",
}  # fmt: skip

# Settings that came after studies had been committed, at the value that does nothing.
LATER = {"method.target_momentum": 0.0}


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
    """How it is trained: linear warm-up, half a cosine to 0, clipped gradients, on one device or many.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images a step, over all processes and accumulated parts together: the training stays the same
            whatever it runs on.
        accumulate: Parts of a batch that are computed one after the other, for memory. Equal to the whole batch only
            where the loss is a mean over images; BatchNorm, negatives, variance and covariance see one part at a time.
        optimizer: adamw, sgd or lars. Each needs a learning rate of its own order: about 0.001, 0.05 and 0.3.
        learning_rate: Peak of the schedule.
        weight_decay: Of weights; biases and norms are not decayed.
        momentum: Of sgd and lars; 0 is plain gradient descent.
        trust: Of lars: length of a layer's step relative to its weights.
        warmup: Share of all steps in which the rate rises.
        clip: Largest norm of the gradient; null clips nothing.
        precision: 32-true, bf16-mixed (half-precision convolutions; similarities, softmax, transport, variances stay in
            32 bits) or 64-true (for checks).
        accelerator: auto, cpu or cuda.
        devices: GPUs, or processes on a CPU, of this machine. torchrun and SLURM say it themselves.
        nodes: Machines. torchrun and SLURM say it themselves.
        strategy: ddp (every process holds all weights) or fsdp (weights and optimizer are spread over the processes).
        sync_batchnorm: BatchNorm over the batch of all processes instead of each its own.
        log_every: Steps between two lines of metrics.jsonl.
        health_every: Steps between two looks at the health of the run.
        on_collapse: What an unhealthy verdict does: ignore, warn (say it when it changes) or stop.
        collapse_patience: Looks in a row, after the warm-up, that must be unhealthy to stop.
        checkpoint_minutes: Longest time between two checkpoints; there is one at every end of an epoch besides.
        keep: Checkpoints that are kept, newest first: last.ckpt, last-1.ckpt and so on.
        online_images: Labelled images for the probe and the nearest neighbours that watch the training at every end
            of an epoch, and as many to judge them on; 0 watches nothing. They do not touch the training.
        probes: Radiographs whose pair of views is stored with masses, cost and plan.
        loggers: Beside metrics.jsonl: csv, tensorboard, or package.module:function that returns a logger of Fabric.
    """

    epochs: int = 100
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    trust: float = 0.001
    warmup: float = 0.1
    clip: float | None = 1.0
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: str = "ddp"
    sync_batchnorm: bool = True
    log_every: int = 10
    health_every: int = 50
    on_collapse: str = "warn"
    collapse_patience: int = 5
    checkpoint_minutes: float = 15.0
    keep: int = 2
    online_images: int = 512
    probes: int = 8
    loggers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "accumulate", "devices", "nodes", "log_every", "health_every",
                    "collapse_patience", "keep")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, received {getattr(self, name)}")
        if self.batch_size < 2:
            raise ConfigError("train.batch_size must be at least 2: variance and contrast need another image")
        if self.learning_rate <= 0 or (self.clip is not None and self.clip <= 0) or not 0 <= self.warmup < 1:
            raise ConfigError("train.learning_rate and train.clip must be > 0 and train.warmup in [0, 1), received "
                              f"{self.learning_rate}, {self.clip}, {self.warmup}")  # fmt: skip
        if not 0 <= self.momentum < 1 or self.trust <= 0 or self.checkpoint_minutes <= 0:
            raise ConfigError("train.momentum must be in [0, 1), train.trust and checkpoint_minutes > 0, received "
                              f"{self.momentum}, {self.trust}, {self.checkpoint_minutes}")  # fmt: skip
        choices = {
            "accelerator": ("auto", "cpu", "cuda"),
            "optimizer": OPTIMIZERS,
            "on_collapse": ("ignore", "warn", "stop"),
            "precision": ("32-true", "bf16-mixed", "64-true"),
            "strategy": ("ddp", "fsdp"),
        }
        for name, known in choices.items():
            given = getattr(self, name)
            if given not in known:
                raise ConfigError(f"train.{name} must be {', '.join(known[:-1])} or {known[-1]}, received '{given}'")
        if self.strategy == "fsdp" and self.precision == "64-true":
            raise ConfigError("train.strategy fsdp cannot compute with train.precision 64-true; use ddp or 32-true")
        if self.weight_decay < 0 or self.probes < 0 or self.online_images < 0:
            raise ConfigError("train.weight_decay, train.probes and train.online_images must be >= 0, received "
                              f"{self.weight_decay}, {self.probes} and {self.online_images}")  # fmt: skip


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a pre-training run.

    Attributes:
        data: Where radiographs come from.
        method: Name in the table of methods, or package.module:Class of one from outside.
        settings: The method's settings; None takes those of the table.
        views: How views are drawn; None takes the defaults of the method's row.
        encoder: The network.
        train: The training.
        seed: One seed for weights, order and views.
        out: Folder of the run; empty: runs/METHOD.
        resume: Go on from the last checkpoint in ``out``; starts from the beginning where there is none.
    """

    data: DataConfig
    method: str = "otcxr"
    settings: Any = None
    views: ViewsConfig = None  # type: ignore[assignment]  # filled below
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    out: str = ""
    resume: bool = False

    def __post_init__(self) -> None:
        row = find_method(self.method)
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, received {self.seed}")
        known = row.settings
        if self.settings is None:
            object.__setattr__(self, "settings", known)
        elif not isinstance(self.settings, type(known)):
            raise ConfigError(f"method '{self.method}' needs settings of type {type(known).__name__}, "
                              f"received {type(self.settings).__name__}")  # fmt: skip
        if self.views is None:
            object.__setattr__(self, "views", ViewsConfig(**row.views))
        if row.build.needs_clean and not self.views.clean:
            object.__setattr__(self, "views", replace(self.views, clean=True))
        if self.encoder.stride is None:
            stride = 16 if self.views.size <= 128 else 32
            object.__setattr__(self, "encoder", replace(self.encoder, stride=stride))
        if not self.out:
            object.__setattr__(self, "out", f"runs/{self.method.replace(':', '.')}")


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
    row = find_method(name)
    known = row.settings
    return PretrainConfig(
        data=read_settings(DataConfig, plain["data"]),
        method=name,
        settings=read_settings(type(known), {**to_plain(known), **method}),
        views=read_settings(ViewsConfig, {**row.views, **plain.get("views", {})}),
        encoder=read_settings(EncoderConfig, plain.get("encoder", {})),
        train=read_settings(TrainConfig, plain.get("train", {})),
        seed=int(plain.get("seed", 0)),
        out=str(plain.get("out", "")),
        resume=bool(plain.get("resume", False)),
    )


def identity(plain: Mapping[str, Any]) -> str:
    """Digest of the settings that decide the numbers.

    A setting that came when studies were committed already (``LATER``) counts only where it does something, so that
    what was trained before it is known by the digest of then.
    """
    flat = flatten(plain)
    return digest({k: v for k, v in flat.items() if k not in FREE and (k not in LATER or v != LATER[k])})
