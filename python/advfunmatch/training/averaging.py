"""Averages of the weights over training: exponential (EMA) at every step, or equal (SWA) at the end of epochs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """A second copy of a network whose weights and batch-norm statistics are averages of the first's.

    Args:
        model: the network that is trained.
        decay: of an exponential average; None averages equally.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay, self.count = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights into the average; the first call copies them."""
        weight = 1.0 if self.count == 0 else 1 / (self.count + 1) if self.decay is None else 1 - self.decay
        self.count += 1
        averaged, live = self.model.state_dict(), model.state_dict()
        for name, value in averaged.items():
            if value.is_floating_point():
                value.lerp_(live[name], weight)
            else:
                value.copy_(live[name])

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs; the weights themselves are in the checkpoint already."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was called."""
        self.count = state["count"]
        self.model.load_state_dict(weights)


@torch.no_grad()
def refresh_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace batch-norm statistics, which an equal average of weights does not share, by those of `batches`."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
    model.train()
    for x in batches:
        model(x)
    model.eval()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
