"""The networks of Gowal et al. (2020) and Rebuffi et al. (2021), which Wang et al. (2023) use too.

Wide and pre-activation ResNets with swish, normalisation inside, and the padding of TensorFlow: where the stride is 2,
a row and a column of zeros at the far end alone. Parameter names are google-deepmind/deepmind-research's.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .initialise import initialise
from .preactresnet import DEPTHS
from .preprocess import Standardize
from .wide_resnet import blocks_of

WIDTH = 64  # channels of the first stage of the pre-activation ResNets
_norm = partial(nn.BatchNorm2d, momentum=0.01)  # as Wang et al. train them


def _conv(in_planes: int, planes: int, stride: int) -> nn.Conv2d:
    """3×3; one of stride 2 is padded by `_pad`."""
    return nn.Conv2d(in_planes, planes, 3, stride, padding=1 if stride == 1 else 0, bias=False)


def _pad(x: Tensor, stride: int) -> Tensor:
    return x if stride == 1 else F.pad(x, (0, 1, 0, 1))


class Block(nn.Module):
    """Of the Wide ResNet: the shortcut is a 1×1 convolution of the first activation."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = _norm(in_planes)
        self.relu_0 = nn.SiLU()
        self.conv_0 = _conv(in_planes, planes, stride)
        self.batchnorm_1 = _norm(planes)
        self.relu_1 = nn.SiLU()
        self.conv_1 = _conv(planes, planes, 1)
        self.shortcut: nn.Module | None = None
        if in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu_0(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv_1(self.relu_1(self.batchnorm_1(self.conv_0(_pad(out, self.stride))))) + shortcut


class BlockGroup(nn.Module):
    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(
                Block(planes if index else in_planes, planes, 1 if index else stride)
                for index in range(blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class SwishWideResNet(nn.Module):
    """WRN-`depth`-`widen` with the statistics of a data set of `STATISTICS`."""

    def __init__(self, depth: int, widen: int, num_classes: int, in_channels: int, data: str) -> None:
        super().__init__()
        blocks = blocks_of(depth, widen)
        planes = [16, 16 * widen, 32 * widen, 64 * widen]
        self.standardize = Standardize(data, in_channels)
        self.init_conv = nn.Conv2d(in_channels, planes[0], 3, 1, 1, bias=False)
        self.layer = nn.Sequential(
            BlockGroup(blocks, planes[0], planes[1], 1),
            BlockGroup(blocks, planes[1], planes[2], 2),
            BlockGroup(blocks, planes[2], planes[3], 2),
        )
        self.batchnorm = _norm(planes[3])
        self.relu = nn.SiLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.logits = nn.Linear(planes[3], num_classes)
        initialise(self, zero_biases=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.init_conv(self.standardize(x)))
        return self.logits(self.avgpool(self.relu(self.batchnorm(out))).flatten(1))


class SwishPreActBlock(nn.Module):
    """The shortcut is a 3×3 convolution of the block's input."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = _norm(in_planes)
        self.relu_0 = nn.SiLU()
        self.conv_2d_1 = _conv(in_planes, planes, stride)
        self.batchnorm_1 = _norm(planes)
        self.relu_1 = nn.SiLU()
        self.conv_2d_2 = _conv(planes, planes, 1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.shortcut = _conv(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu_0(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(_pad(x, self.stride))
        out = self.relu_1(self.batchnorm_1(self.conv_2d_1(_pad(out, self.stride))))
        return self.conv_2d_2(out) + shortcut


class SwishPreActResNet(nn.Module):
    """PreActResNet-18 or 34 with the statistics of a data set of `STATISTICS`."""

    def __init__(self, depth: int, num_classes: int, in_channels: int, data: str) -> None:
        super().__init__()
        self.standardize = Standardize(data, in_channels)
        self.conv_2d = nn.Conv2d(in_channels, WIDTH, 3, 1, 1, bias=False)
        in_planes = WIDTH
        for stage, count in enumerate(DEPTHS[depth]):
            planes = WIDTH * 2**stage
            blocks = nn.Sequential()
            for index in range(count):
                blocks.append(SwishPreActBlock(in_planes, planes, 2 if stage > 0 and index == 0 else 1))
                in_planes = planes
            self.add_module(f"layer_{stage}", blocks)
        self.batchnorm = _norm(in_planes)
        self.relu = nn.SiLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.logits = nn.Linear(in_planes, num_classes)
        initialise(self, zero_biases=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_2d(self.standardize(x))
        for stage in range(4):
            out = self.get_submodule(f"layer_{stage}")(out)
        return self.logits(self.avgpool(self.relu(self.batchnorm(out))).flatten(1))


def swish_wide_resnet(
    num_classes: int, in_channels: int, depth: int, widen: int, *, data: str
) -> SwishWideResNet:
    """WRN-`depth`-`widen` with swish."""
    return SwishWideResNet(depth, widen, num_classes, in_channels, data)


def swish_preactresnet(num_classes: int, in_channels: int, depth: int, *, data: str) -> SwishPreActResNet:
    """PreActResNet-18 or 34 with swish."""
    return SwishPreActResNet(depth, num_classes, in_channels, data)
