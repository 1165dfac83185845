"""Small convolutional networks: the project's, for CPUs and small images, and TRADES', for MNIST."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from ..errors import InputError


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


class TradesCNN(nn.Module):
    """Four convolutions and three linear layers, for images of 28×28 pixels alone (Zhang et al., 2019).

    Parameter names are yaodongyu/TRADES's.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, 32, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 32, 3),
                relu2=nn.ReLU(),
                maxpool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(32, 64, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(64, 64, 3),
                relu4=nn.ReLU(),
                maxpool2=nn.MaxPool2d(2),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(64 * 4 * 4, 200),
                relu1=nn.ReLU(),
                drop=nn.Dropout(0.5),
                fc2=nn.Linear(200, 200),
                relu2=nn.ReLU(),
                fc3=nn.Linear(200, num_classes),
            )
        )
        for module in self.feature_extractor:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature_extractor(x).flatten(1))


def small_cnn(num_classes: int, in_channels: int, width: int = 16) -> SmallCNN:
    """The project's, `width` channels in its first layer."""
    if width < 1:
        raise InputError(f"model is 'small_cnn-{width}', but its width must be at least 1")
    return SmallCNN(num_classes, in_channels, width)
