"""The initial weights of the residual networks."""

from __future__ import annotations

from torch import nn


def initialise(network: nn.Module, zero_biases: bool = False) -> None:
    """He et al. (2015) by fan-out for convolutions; biases of linear layers zero, or as PyTorch draws them."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and zero_biases and module.bias is not None:
            nn.init.zeros_(module.bias)
