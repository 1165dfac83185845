"""PreActResNets (He et al., 2016, "Identity mappings"), in the forms of the adversarial-training literature.

They differ in what no state dict shows: whether a block's shortcut takes the block's input or what its first BatchNorm
and ReLU made of it, and the activation; and in whether a last BatchNorm stands before the pooling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .initialise import initialise

WIDTH = 64  # channels of the first stage; each of the others has twice as many as the one before
Activation = Callable[[], nn.Module]


class PreActBlock(nn.Module):
    """BN, activation, convolution, twice; `raw_shortcut` lets the shortcut's convolution take the input itself."""

    def __init__(
        self, in_planes: int, planes: int, stride: int, activation: Activation, raw_shortcut: bool
    ) -> None:
        super().__init__()
        self.raw_shortcut = raw_shortcut
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.relu1 = activation()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = activation()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self.raw_shortcut else out)
        out = self.conv2(self.relu2(self.bn2(self.conv1(out))))
        return out + shortcut


class PreActResNet(nn.Module):
    """A pre-activation residual network with the CIFAR stem; `depths` is the number of blocks in each stage."""

    def __init__(
        self,
        depths: tuple[int, ...],
        num_classes: int,
        in_channels: int,
        *,
        activation: Activation = nn.ReLU,
        raw_shortcut: bool = False,
        last_norm: bool = True,
        head: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, WIDTH, 3, 1, 1, bias=False)
        in_planes = WIDTH
        stages = []
        for stage, depth in enumerate(depths):
            planes = WIDTH * 2**stage
            blocks = nn.Sequential()
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(PreActBlock(in_planes, planes, stride, activation, raw_shortcut))
                in_planes = planes
            stages.append(blocks)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn: nn.Module = nn.BatchNorm2d(in_planes) if last_norm else nn.Identity()
        self.relu = activation() if last_norm else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = head(in_planes, num_classes)
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(self.avgpool(self.relu(self.bn(out))).flatten(1))


DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def preactresnet(num_classes: int, in_channels: int, depth: int, **options: Any) -> PreActResNet:
    """PreActResNet-18, 11.2 million parameters, or 34; `options` are PreActResNet's."""
    return PreActResNet(DEPTHS[depth], num_classes, in_channels, **options)
