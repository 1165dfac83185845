"""The Wide ResNet of Li and Spratling (2023), "Data augmentation alone can improve adversarial training".

It differs from TRADES': the stride is the second convolution's, and the shortcut takes the block's input. Parameter
names are TreeLLi/DA-Alone-Improves-AT's.
"""

from __future__ import annotations

from torch import Tensor, nn

from .initialise import initialise
from .wide_resnet import blocks_of


class LateStrideBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut.append(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu1(self.bn1(x)))
        return self.conv2(self.relu2(self.bn2(out))) + self.shortcut(x)


class LateStrideWideResNet(nn.Module):
    """WRN-`depth`-`widen`."""

    def __init__(self, depth: int, widen: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        in_planes = 16
        for stage in range(3):
            planes = 16 * widen * 2**stage
            blocks = nn.Sequential()
            for index in range(blocks_of(depth, widen)):
                block = LateStrideBlock(in_planes, planes, 2 if stage and not index else 1)
                blocks.add_module(f"block{index}", block)
                in_planes = planes
            self.add_module(f"layer{stage + 1}", blocks)
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc0 = nn.Linear(in_planes, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for stage in range(3):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        return self.fc0(self.avgpool(self.relu(self.bn1(out))).flatten(1))


def idbh_wide_resnet(num_classes: int, in_channels: int, depth: int, widen: int) -> LateStrideWideResNet:
    """WRN-`depth`-`widen`."""
    return LateStrideWideResNet(depth, widen, num_classes, in_channels)
