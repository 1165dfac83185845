"""What an attack looks at: a network whose forwards and backwards are counted."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..lean import vjp
from ..models import logits_in

__all__ = ["Searched"]


class Searched:
    """A network, best a prepared one, as the attacks of AutoAttack see it.

    Args:
        network: in eval mode; of images to logits, or to an object with ``.logits``.
        told: called after each pass with its number of images.

    Logits are float32, or float64 where the network's are: an attack decides on them, and those of bfloat16 have ties.

    Attributes:
        forwards, backwards: images that went through.
        seconds: within the network's calls; of a GPU, until they are under way.
    """

    def __init__(self, network: nn.Module, told: Callable[[int], None] | None = None) -> None:
        self.network, self.told = network, told
        self.forwards = self.backwards = 0
        self.seconds = 0.0

    def logits(self, x: Tensor) -> Tensor:
        """(N, C) of images (N, ...), without a graph."""
        started = time.perf_counter()
        with torch.no_grad():
            z = _widened(logits_in(self.network(x)))
        self._count(started, forwards=len(x))
        return z

    def vjp(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits (N, C), and what takes their gradient to that of the images, as often as is wished until the next
        call."""
        started = time.perf_counter()
        z, pullback = vjp(self.network, x)
        self._count(started, forwards=len(x))

        def counted(grad_logits: Tensor) -> Tensor:
            started = time.perf_counter()
            grad = pullback(grad_logits.to(z.dtype))
            self._count(started, backwards=len(x))
            return grad

        return _widened(z), counted

    def _count(self, started: float, forwards: int = 0, backwards: int = 0) -> None:
        self.seconds += time.perf_counter() - started
        self.forwards += forwards
        self.backwards += backwards
        if self.told:
            self.told(forwards + backwards)


def _widened(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
