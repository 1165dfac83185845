"""What is asked of networks that are measured: logits, on all of the data and a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import ImageDataset, as_float
from ..models import logits_in


class LogitsOnly(nn.Module):
    """A network that returns an object with logits, as one that returns these: what every attack takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        return logits_in(self.network(x))


@torch.no_grad()
def returning_logits(network: nn.Module, data: ImageDataset) -> nn.Module:
    """The network itself where it returns a tensor for the data's images, and `LogitsOnly` of it otherwise."""
    return network if isinstance(network(as_float(data.images[:2])), Tensor) else LogitsOnly(network)


@torch.no_grad()
def logits_on(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """(N, C) of images (N, ...)."""
    return torch.cat([model(x) for x in images.split(batch_size)])


def device_of(model: nn.Module, data: ImageDataset) -> torch.device:
    """Where the network is, or the data where it has no parameters."""
    return next((parameter.device for parameter in model.parameters()), data.images.device)


def percent(flags: Tensor) -> float:
    """Share of flags that are set."""
    return round(100 * float(flags.double().mean()), 2)
