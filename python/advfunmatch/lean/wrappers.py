"""The network inside what others wrap around it: DDP, DataParallel, averages of weights, torch.compile."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["unwrap", "wrapped_network"]

_WRAPPERS = (
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
)


def wrapped_network(model: nn.Module, compiled: bool = False) -> nn.Module | None:
    """What the module wraps, if it is a wrapper; torch.compile's counts as one with ``compiled``."""
    if isinstance(model, _WRAPPERS):
        inner: nn.Module = model.module
        return inner
    original = getattr(model, "_orig_mod", None) if compiled else None
    return original if isinstance(original, nn.Module) else None


def unwrap(model: nn.Module, compiled: bool = False) -> nn.Module:
    """The network inside DDP, DataParallel or ``torch.optim.swa_utils.AveragedModel``; and, with ``compiled``, inside
    torch.compile's wrapper.

    A DDP forward prepares a gradient exchange that an input gradient never completes, so attacks go around it.
    """
    while (inner := wrapped_network(model, compiled)) is not None:
        model = inner
    return model
