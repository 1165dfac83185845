"""A look at values that decides what is computed: on CPUs, where no device has to be waited for."""

from __future__ import annotations

from torch import Tensor


def all_within(values: Tensor, low: float, high: float) -> bool:
    """Whether all are; False where there is a NaN, where there are none, and where looking would mean waiting."""
    if waits_for(values) or values.numel() == 0:
        return False
    least, most = values.aminmax()
    return least.item() >= low and most.item() <= high


def waits_for(values: Tensor) -> bool:
    """Whether reading them waits for a device, or breaks the capture of its graph."""
    return values.device.type != "cpu"
