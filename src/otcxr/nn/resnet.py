"""ResNet-18/34/50 with torchvision's parameter names, a stem for grey images, every map out.

Torchvision's weights load once their stem is summed to one channel and ``fc`` is left out; ours load there likewise.
Source: He et al., CVPR 2016, arXiv:1512.03385, with the stride of the bottleneck on its 3x3 convolution (v1.5).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from otcxr.nn.encoder import Architecture, Encoder

__all__ = ["ResNet"]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: str = "zeros") -> nn.Conv2d:
    mode: Any = padding
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False, padding_mode=mode)


class _StridedPointwise(nn.Conv2d):
    """A 1x1 convolution of every ``stride``-th position, the positions taken first.

    oneDNN's gradient of a strided 1x1 convolution, channels last, writes beyond its workspace where there are fewer
    channels than lanes, 8 or 16: crashes, hangs or wrong gradients (uxlfoundation/oneDNN issue 6035, seen with 3.12).
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return functional.conv2d(x[..., ::rows, ::columns], self.weight)


_LANES = 16  # from this many channels on the gradient of a strided 1x1 convolution is right


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    if stride > 1 and inputs < _LANES:
        return nn.Sequential(_StridedPointwise(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, padding: str) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride, padding)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = _conv(width, width, 3, 1, padding)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, four times as many channels out, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, padding: str) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride, padding)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


_LAYERS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNet(Encoder):
    """Residual network; maps after the stem (stride 2) and after each of the four stages."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        block, layers = _LAYERS[architecture.name]
        width, last = architecture.width, 1 if architecture.stride == 16 else 2
        self.architecture = architecture
        self.conv1 = _conv(architecture.in_channels, width, 7, 2, architecture.padding)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = _stage(block, width, width, layers[0], 1, architecture.padding)
        self.layer2 = _stage(block, width * block.expansion, 2 * width, layers[1], 2, architecture.padding)
        self.layer3 = _stage(block, 2 * width * block.expansion, 4 * width, layers[2], 2, architecture.padding)
        self.layer4 = _stage(block, 4 * width * block.expansion, 8 * width, layers[3], last, architecture.padding)
        self.channels = (width, *(width * 2**i * block.expansion for i in range(4)))
        self.strides = (2, 4, 8, 16, architecture.stride)
        # strided convolutions with symmetric padding look at pixel 0 first, whose centre is half a pixel in
        self.first_centre = 0.5 / architecture.stride
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        stem = self.relu(self.bn1(self.conv1((images - self.mean) / self.std)))
        maps = [stem]
        x = self.maxpool(stem)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return tuple(maps)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, count: int, stride: int, padding: str
) -> nn.Sequential:
    later = [block(width * block.expansion, width, 1, padding) for _ in range(count - 1)]
    return nn.Sequential(block(inputs, width, stride, padding), *later)
