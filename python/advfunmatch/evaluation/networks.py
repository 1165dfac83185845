"""Networks while they are measured: in eval mode, frozen, and in parts of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..data import ImageDataset, as_float
from ..models import logits_in


@contextmanager
def frozen(model: nn.Module | None) -> Iterator[None]:
    """In eval mode and without parameter gradients for a while."""
    if model is None:
        yield
        return
    # Module by module, for a network may keep some, such as its batch norms, in eval mode while the rest is trained.
    # What was frozen in TorchScript has no modes any more.
    training = [module for module in model.modules() if getattr(module, "training", False)]
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in training:
        module.training = False
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in moving:
            parameter.requires_grad_(True)


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
