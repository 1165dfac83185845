"""Whether a break is one: inside the ball, and wrong for the network itself in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.outputs import logits_in

__all__ = ["Judge", "into_ball"]


def into_ball(x_adv: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """Images moved into the ball around x and into [0, 1], in x's dtype; what is not finite becomes x.

    In linf the bounds are x - eps and x + eps as that dtype rounds them; in l2 no norm, computed in float64, is above
    eps.
    """
    x_adv = torch.where(x_adv.isfinite(), x_adv.to(x), x)
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    x_adv = x_adv.clamp(0, 1)
    for _ in range(4):  # rounding x + change may lengthen the change again, by less each time
        change = x_adv.double() - x.double()
        length = change.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
        x_adv = torch.where(length > eps, (x + change * (eps * (1 - 1e-6) / length)).to(x.dtype), x_adv)
        x_adv = x_adv.clamp(0, 1)
    return x_adv


class Judge(nn.Module):
    """The network itself, in its own dtype and without TF32: what counts is what it says.

    Images (N, C, H, W) are rounded or widened to its dtype; it returns logits (N, C).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        tensors = [*network.parameters(), *network.buffers()]
        self.dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
        self.device = next((tensor.device for tensor in tensors), None)
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        with _full_precision():
            z: Tensor = logits_in(self.network(x.to(self.dtype or x.dtype)))
        return z

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Without a graph."""
        z: Tensor = self(x)
        return z

    def wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """(N,) bool: images of which it does not say that they are of their class y; NaN says nothing."""
        logits = self.logits(x)
        return (logits.argmax(1) != y) | logits.isnan().any(1)


@contextmanager
def _full_precision() -> Iterator[None]:
    backends: Any = torch.backends
    places = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
