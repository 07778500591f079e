"""Weights of other tools in our networks: a ResNet of torchvision, made for three colours, on grey images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from otcxr.errors import CheckpointError
from otcxr.nn.encoder import Encoder, build_encoder, load_state

__all__ = ["from_torchvision", "read_weights"]

# what torchvision's ImageNet weights expect of red, green and blue in [0, 1]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` file, or from a ``.pth`` one without running anything in it.

    Raises: CheckpointError: it is missing, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there are no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise several types for a damaged file
        raise CheckpointError(f"{path} holds no readable weights: {str(error).splitlines()[0]}") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds no plain table of tensors; save model.state_dict()")
    return dict(state)


def from_torchvision(state: Mapping[str, Tensor], name: str, *, stride: int = 32) -> Encoder:
    """Build an encoder of the published width from torchvision's weights, for one-channel images.

    A grey image is three equal colours, each standardised by a mean m_c and deviation s_c of its own. With the
    encoder's own input u = (x - 0.5) / 0.25 the first convolution becomes

        sum_c W_c * (x - m_c) / s_c = (sum_c 0.25 / s_c W_c) * u + sum_c (0.5 - m_c) / s_c sum(W_c)

    whose second part is a number for each output channel; it goes into the mean of the norm behind. Equal to the
    original away from the border (torchvision's pads with zeros after it has standardised).

    Args:
        state: torchvision's state dict; ``fc`` is left out.
        name: Of the network, such as "resnet18".
        stride: As in ``build_encoder``.
    Raises: CheckpointError: names or shapes do not fit.
    """
    encoder = build_encoder(name, stride=stride, seed=0)
    weights = {k: v.clone() for k, v in state.items() if not k.startswith("fc.")}
    stem = weights.get("conv1.weight")
    if stem is None or stem.ndim != 4 or stem.shape[1] != 3 or "bn1.running_mean" not in weights:
        shape = None if stem is None else tuple(stem.shape)
        raise CheckpointError(f"expected torchvision's weights of {name} with a stem (64, 3, 7, 7), found {shape}")
    mean, std = (torch.tensor(values, dtype=stem.dtype).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    weights["bn1.running_mean"] -= (stem * (encoder.mean - mean) / std).sum((1, 2, 3))
    weights["conv1.weight"] = (stem * encoder.std / std).sum(1, keepdim=True)
    load_state(encoder, weights, f"torchvision's {name}")
    return encoder.eval()
