"""A small convolutional network for CPUs and small images: three convolutions and a linear layer."""

from __future__ import annotations

import torch
from torch import nn


class SmallCNN(nn.Module):
    """conv-BN-ReLU at `width`, 2·`width`, 4·`width` channels, halving the image twice, then one linear layer.

    The last feature map is pooled to 2×2 rather than to a point, which keeps where a stroke is: on 8×8 digits that is
    worth more robust accuracy than twice the width.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 16) -> None:
        super().__init__()
        channels = [in_channels, width, 2 * width, 4 * width]
        self.features = nn.Sequential()
        for layer in range(3):
            stride = 1 if layer == 0 else 2
            self.features.append(nn.Conv2d(channels[layer], channels[layer + 1], 3, stride, 1, bias=False))
            self.features.append(nn.BatchNorm2d(channels[layer + 1]))
            self.features.append(nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(16 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))
