"""What some networks do to their images first, without a trace of it in their state dicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError

# data set -> mean and standard deviation of its channels, as google-deepmind/deepmind-research has them
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class Standardize(nn.Module):
    """(x − mean) / std with a data set's statistics, which are in no state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, data: str, in_channels: int) -> None:
        super().__init__()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in STATISTICS[data])
        if len(mean) != in_channels:
            raise InputError(
                f"the network normalises images of {len(mean)} channels with the statistics of {data}, but "
                f"in_channels is {in_channels}"
            )
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class StandardizeEach(nn.Module):
    """Each image less its own mean, divided by its own standard deviation (at least 1/√n of its n values)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3), keepdim=True)
        std = x.std((1, 2, 3), keepdim=True)
        least = (x.size(1) * x.size(2) * x.size(3)) ** -0.5
        return (x - mean) / std.clamp_min(least)
