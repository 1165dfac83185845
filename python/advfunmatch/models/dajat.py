"""The networks of DAJAT (Addepalli et al., 2022), which hold every BatchNorm twice.

One set is for images with the usual, weak augmentation ("base"), the other for AutoAugment's ("auto"). Their evaluation
uses the first. Parameter names are val-iisc/DAJAT's.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from .initialise import initialise
from .wide_resnet import WideBlock, WideResNet

WIDTH = 64  # channels of the first stage; each of the others has twice as many as the one before


class TwinBlock(nn.Module):
    """A basic block of a ResNet; the shortcut's convolution and BatchNorm are apart."""

    def __init__(self, in_planes: int, planes: int, stride: int, suffix: str) -> None:
        super().__init__()
        self.suffix = suffix
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1, self.bn1_auto = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2, self.bn2_auto = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.shortcut, self.shortcut_bn, self.shortcut_bn_auto = (nn.Sequential() for _ in range(3))
        if stride != 1 or in_planes != planes:
            self.shortcut.append(nn.Conv2d(in_planes, planes, 1, stride, bias=False))
            self.shortcut_bn.append(nn.BatchNorm2d(planes))
            self.shortcut_bn_auto.append(nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        bn1, bn2, shortcut_bn = (getattr(self, name + self.suffix) for name in ("bn1", "bn2", "shortcut_bn"))
        out = self.relu1(bn1(self.conv1(x)))
        return self.relu2(bn2(self.conv2(out)) + shortcut_bn(self.shortcut(x)))


class TwinResNet(nn.Module):
    """ResNet-18 with both sets; `suffix` "" or "_auto" says which is used."""

    def __init__(self, num_classes: int, in_channels: int, suffix: str) -> None:
        super().__init__()
        self.suffix = suffix
        self.conv1 = nn.Conv2d(in_channels, WIDTH, 3, 1, 1, bias=False)
        self.bn1, self.bn1_auto = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU()
        in_planes = WIDTH
        for stage in range(4):
            planes = WIDTH * 2**stage
            first = TwinBlock(in_planes, planes, 2 if stage else 1, suffix)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, TwinBlock(planes, planes, 1, suffix)))
            in_planes = planes
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(in_planes, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(getattr(self, "bn1" + self.suffix)(self.conv1(x)))
        for stage in range(4):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        return self.linear(self.avgpool(out).flatten(1))


class TwinWideBlock(WideBlock):
    def __init__(self, in_planes: int, planes: int, stride: int, suffix: str) -> None:
        super().__init__(in_planes, planes, stride, nn.ReLU)
        self.suffix = suffix
        self.bn1_auto, self.bn2_auto = nn.BatchNorm2d(in_planes), nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        bn1, bn2 = (getattr(self, name + self.suffix) for name in ("bn1", "bn2"))
        out = self.relu1(bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(self.relu2(bn2(self.conv1(out)))) + shortcut


class TwinWideResNet(WideResNet):
    """WRN-`depth`-`widen` with both sets; `suffix` "" or "_auto" says which is used."""

    def __init__(self, depth: int, widen: int, num_classes: int, in_channels: int, suffix: str) -> None:
        block = partial(TwinWideBlock, suffix=suffix)
        super().__init__(depth, widen, num_classes, in_channels, block=block)
        self.suffix = suffix
        self.bn1_auto = nn.BatchNorm2d(64 * widen)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = self.relu(getattr(self, "bn1" + self.suffix)(out))
        return self.fc(self.avgpool(out).flatten(1))


def dajat_resnet18(num_classes: int, in_channels: int, *, suffix: str) -> TwinResNet:
    """ResNet-18."""
    return TwinResNet(num_classes, in_channels, suffix)


def dajat_wide_resnet(
    num_classes: int, in_channels: int, depth: int, widen: int, *, suffix: str
) -> TwinWideResNet:
    """WRN-`depth`-`widen`."""
    return TwinWideResNet(depth, widen, num_classes, in_channels, suffix)
