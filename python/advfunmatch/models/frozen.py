"""Networks while they are measured: in eval mode, without parameter gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["frozen"]


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
