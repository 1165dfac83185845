"""Wide ResNets `wrn-<depth>-<widen>` (Zagoruyko and Komodakis, 2016), with the parameter names TRADES made usual.

The depth is counted in two ways: 6·n + 4 layers for n blocks in each of three stages, as the paper does, or 6·n + 2, as
Madry's and the code of FAT, GAIRAT and IAD do; theirs of depth 32 is everybody's 34.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .initialise import initialise

Activation = Callable[[], nn.Module]
BlockMaker = Callable[[int, int, int], nn.Module]


class WideBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.relu1 = activation()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = activation()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.convShortcut: nn.Module | None = None
        if in_planes != planes:
            self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.conv2(self.relu2(self.bn2(self.conv1(out))))
        return out + shortcut


class WideStage(nn.Module):
    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int, block: BlockMaker) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                block(planes if index else in_planes, planes, 1 if index else stride)
                for index in range(blocks)
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`. WRN-34-10 has 46.2 million parameters.

    `block` makes one from its input's channels, its own and its stride; what `preprocess` makes sees the images first.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int,
        in_channels: int,
        *,
        activation: Activation = nn.ReLU,
        block: BlockMaker | None = None,
        head: Callable[[int, int], nn.Module] = nn.Linear,
        preprocess: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        blocks = blocks_of(depth, widen)
        block = block or partial(WideBlock, activation=activation)
        planes = [16, 16 * widen, 32 * widen, 64 * widen]
        self.preprocess = preprocess() if preprocess else None
        self.conv1 = nn.Conv2d(in_channels, planes[0], 3, 1, 1, bias=False)
        self.block1 = WideStage(blocks, planes[0], planes[1], 1, block)
        self.block2 = WideStage(blocks, planes[1], planes[2], 2, block)
        self.block3 = WideStage(blocks, planes[2], planes[3], 2, block)
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.relu = activation()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = head(planes[3], num_classes)
        initialise(self, zero_biases=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.preprocess is not None:
            x = self.preprocess(x)
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.avgpool(self.relu(self.bn1(out))).flatten(1))


def blocks_of(depth: int, widen: int) -> int:
    """The number of blocks in a stage, from a depth in either counting; InputError for what neither gives."""
    if depth < 8 or depth % 6 not in (2, 4) or widen < 1:
        raise InputError(
            f"model is 'wrn-{depth}-{widen}', but the depth must be 6·n + 4 (10, 16, 22, 28, 34, 40, ...), or "
            "6·n + 2 as Madry counts, and the widening factor at least 1"
        )
    return (depth - 2) // 6


def wide_resnet(num_classes: int, in_channels: int, depth: int, widen: int, **options: Any) -> WideResNet:
    """As in TRADES; `options` are WideResNet's."""
    return WideResNet(depth, widen, num_classes, in_channels, **options)
