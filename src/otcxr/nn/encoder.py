"""The encoder: what pre-training leaves behind. Images in, every map out, no trace of the method."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from otcxr.errors import CheckpointError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ENCODERS",
    "Architecture",
    "Encoder",
    "build_encoder",
    "describe",
    "encoder_digest",
    "initial_weights",
    "load_encoder",
    "load_state",
    "pool",
]


class Architecture(NamedTuple):
    """What is needed to build an encoder again: the arguments of ``build_encoder``."""

    name: str
    in_channels: int
    width: int
    stride: int
    padding: str = "zeros"


class Encoder(nn.Module, ABC):
    """A network from images to feature maps.

    Attributes:
        architecture: The arguments that built it.
        channels: Channels of each map, fine to coarse.
        strides: Pixels of the image per position of each map, fine to coarse.
        first_centre: Where the last map's first position looks, in cells of that map: 0.5 is the middle of its cell.
        mean, std: Pixel statistics with which ``forward`` standardises images in [0, 1].
    """

    architecture: Architecture
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: float = 0.5
    std: float = 0.25
    first_centre: float = 0.5

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return all maps of images (B, C, H, W) in [0, 1]: (B, channels[i], H / strides[i], W / strides[i])."""


def pool(maps: tuple[Tensor, ...]) -> Tensor:
    """Global average of the coarsest map: (B, C)."""
    return maps[-1].mean((-2, -1))


def _resnet(architecture: Architecture) -> Encoder:
    from otcxr.nn.resnet import ResNet

    return ResNet(architecture)


ENCODERS: dict[str, Callable[[Architecture], Encoder]] = {
    "resnet18": _resnet,
    "resnet34": _resnet,
    "resnet50": _resnet,
}


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Inside, modules that are built get the weights of ``seed``; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed every GPU
        yield


def build_encoder(
    name: str,
    *,
    in_channels: int = 1,
    width: int = 64,
    stride: int = 32,
    padding: str = "zeros",
    seed: int | None = None,
) -> Encoder:
    """Build an encoder with random weights.

    Args:
        name: A key of ``ENCODERS``.
        in_channels: Channels of the images; radiographs have one.
        width: Channels of the stem; 64 is the published network, 16 suits studies on a CPU.
        stride: Pixels per position of the last map, 16 or 32. 16 keeps the resolution of the last stage: the same
            parameters, a finer map.
        padding: What convolutions see beyond the border: "zeros", as published, or "replicate", the nearest pixel.
            Zeros tell every position how far from the border it is; "replicate" does so much less.
        seed: Fixes the initial weights without touching the global random state; None draws from the global state.
    Raises: ConfigError: unknown name or padding, or a width or stride that cannot be built.
    """
    if name not in ENCODERS:
        raise ConfigError(f"unknown encoder '{name}'{did_you_mean(name, ENCODERS)}")
    if stride not in (16, 32):
        raise ConfigError(f"encoder.stride must be 16 or 32, received {stride}")
    if width < 4 or in_channels < 1:
        raise ConfigError(f"encoder.width must be >= 4 and in_channels >= 1, received {width} and {in_channels}")
    if padding not in ("zeros", "replicate"):
        raise ConfigError(f"encoder.padding must be zeros or replicate, received '{padding}'")
    architecture = Architecture(name, in_channels, width, stride, padding)
    if seed is None:
        return ENCODERS[name](architecture)
    with initial_weights(seed):
        return ENCODERS[name](architecture)


def encoder_digest(encoder: Encoder) -> str:
    """First 16 hexadecimal digits of the SHA-256 of all weights and statistics: which encoder a number belongs to."""
    total = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def describe(encoder: Encoder) -> dict[str, Any]:
    """The facts about an encoder that ``encoder.json`` holds and ``load_encoder`` reads."""
    return {
        "architecture": encoder.architecture._asdict(),
        "channels": list(encoder.channels),
        "strides": list(encoder.strides),
        "digest": encoder_digest(encoder),
        "mean": encoder.mean,
        "std": encoder.std,
        "input": "images (B, C, H, W) float in [0, 1], bone bright; standardised inside by mean and std",
    }


def load_encoder(path: str | Path) -> Encoder:
    """Load a plain encoder from a run folder or from its ``encoder.safetensors`` (``encoder.json`` lies beside it).

    Returns: The encoder in evaluation mode, on the CPU.
    Raises: CheckpointError: a file is missing, or weights and description do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    weights = path / "encoder.safetensors" if path.is_dir() else path
    description = weights.with_suffix(".json")
    for file in (weights, description):
        if not file.is_file():
            raise CheckpointError(
                f"{file.name} is missing in {file.parent}; expected a run folder that finished at least one epoch"
            )
    try:
        facts = json.loads(description.read_text())
        encoder = build_encoder(**facts["architecture"])
        state = load_file(weights)
    except (ValueError, KeyError, TypeError, ConfigError, SafetensorError) as error:
        raise CheckpointError(
            f"{weights} cannot be read: {error}; it may be cut short, export the run again"
        ) from error
    load_state(encoder, state, str(weights))
    return encoder.eval()


def load_state(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load weights strictly; a misfit names the first difference instead of printing hundreds.

    Raises: CheckpointError: names or shapes differ.
    """
    own = module.state_dict()
    for name, value in own.items():
        if name not in state:
            raise CheckpointError(f"{where} lacks '{name}': it belongs to another architecture; set encoder.* as saved")
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"{where}: '{name}' has shape {tuple(state[name].shape)}, this network needs {tuple(value.shape)}; "
                "set encoder.name, encoder.width and method.* as saved"
            )
    for name in state:
        if name not in own:
            raise CheckpointError(f"{where} has '{name}', which this network lacks; set encoder.* and method as saved")
    module.load_state_dict(dict(state))
