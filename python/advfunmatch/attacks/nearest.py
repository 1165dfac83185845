"""What attacks that look for the nearest adversarial image have in common: what they are given, and what they found."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..lean import PreparedModel, prepare_for_attack
from ..models import logits_in

Progress = Callable[[int], None]

# An image next to the decision boundary of a prepared network may lie on the other side of the network's own, whose
# arithmetic rounds otherwise. It is then pushed on along its change, by these parts of it, until the network agrees.
_PUSHES = (0.0, *(2.0**-power for power in range(20, 6, -1)))
_OUTSIDE = 1e-6  # by which rounding may put an image outside its range


class Nearest(NamedTuple):
    """The nearest adversarial images that were found.

    Attributes:
        images: (N, ...), like the clean images; the clean image itself where none was found, or it is misclassified.
        distances: (N,), float64, from the clean images, in the attack's norm: 0 where these are misclassified, and
            infinite where nothing was found.
        zero_gradients: how many images had a gradient of exactly zero whenever it was asked for.
    """

    images: Tensor
    distances: Tensor
    zero_gradients: int

    def within(self, x: Tensor, eps: float) -> Tensor:
        """The images no further than ``eps`` from the clean ones ``x``, and the clean one in place of each other."""
        return torch.where(_by_image(self.distances <= eps, x), self.images, x)


class Search:
    """One call of such an attack: its networks, its images, and the nearest ones so far.

    Args:
        network: in eval mode. It decides what is adversarial; gradients are those of its prepared copy.
        x: (N, ...) images within ``clip``.
        y: (N,) integer labels.
        norm: of the distances.
        clip: lowest and highest value.

    Raises:
        TypeError, ValueError: one of them is something else.
    """

    def __init__(
        self, network: nn.Module, x: Tensor, y: Tensor, norm: str, clip: tuple[float, float]
    ) -> None:
        self.low, self.high = clip
        _check(network, x, y, norm, clip)
        self.network, self.prepared = network, prepare_for_attack(network)
        if x.dim() == 4 and self.prepared.memory_format == torch.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        self.x, self.y, self.norm = x.detach(), y.long(), norm
        self.dtype = (
            torch.float64 if x.dtype == torch.float64 else torch.float32
        )  # of everything but the images
        self.images = self.x.clone()
        self.moved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        logits = self.judge(self.x)
        if len(logits) and logits.shape[1] < 2:
            raise ValueError(f"network must have 2 classes or more, got {logits.shape[1]}")
        self.clean = logits
        self.distances = torch.where(is_wrong(logits, self.y), 0.0, torch.inf).double()
        self.wanted = self.distances.isinf().nonzero()[:, 0]  # the images that there is something to look for

    @torch.no_grad()
    def judge(self, x: Tensor) -> Tensor:
        """Logits of the network itself, at least float32."""
        if not len(x):
            return torch.zeros(0, 2, dtype=self.dtype, device=x.device)
        return logits_in(self.network(x)).to(self.dtype)

    def offer(self, rows: Tensor, images: Tensor, flags: Tensor) -> None:
        """Keep those of the images of some rows that are flagged, and nearer than what there was."""
        distances = torch.where(flags, self.distance(rows, images), torch.inf)
        nearer = distances < self.distances[rows]
        if bool(nearer.any()):
            self.images[rows[nearer]] = images[nearer].to(self.images.dtype)
            self.distances[rows[nearer]] = distances[nearer]

    def distance(self, rows: Tensor, images: Tensor) -> Tensor:
        """(R,), float64, of images to the clean ones of these rows."""
        change = (images.double() - self.x[rows].double()).flatten(1)
        return torch.linalg.vector_norm(change, torch.inf if self.norm == "linf" else 2, dim=1)

    def saw(self, rows: Tensor, gradient: Tensor) -> None:
        """Note which images have had a gradient."""
        self.moved[rows] |= gradient.flatten(1).ne(0).any(1)

    def result(self) -> Nearest:
        """What was found, as far as the network itself agrees."""
        rows = (self.distances.isfinite() & (self.distances > 0)).nonzero()[:, 0]
        change = self.images.to(self.dtype) - self.x.to(self.dtype)
        for push in _PUSHES:
            if not len(rows):
                break
            images = (self.x[rows] + (1 + push) * change[rows]).to(self.x.dtype).clamp(self.low, self.high)
            images = images if push else self.images[rows]
            agreed = is_wrong(self.judge(images), self.y[rows])
            kept = rows[agreed]
            self.images[kept] = images[agreed]
            self.distances[kept] = self.distance(kept, images[agreed])
            rows = rows[~agreed]
        self.images[rows] = self.x[rows]
        self.distances[rows] = torch.inf
        still = self.wanted[~self.moved[self.wanted]]
        return Nearest(self.images, self.distances, len(still))


def is_wrong(logits: Tensor, y: Tensor, confidence: float = 0.0) -> Tensor:
    """(N,), bool: another class than the label has the largest logit, by more than ``confidence``."""
    if not len(logits):
        return torch.zeros_like(y, dtype=torch.bool)
    raised = logits.scatter_add(1, y[:, None], torch.full_like(y, confidence, dtype=logits.dtype)[:, None])
    return (raised.argmax(1) != y) & logits.isfinite().all(1)


def check_settings(**settings: tuple[float, float, bool]) -> None:
    """Each is its value, the least that it may be, and whether it must be a whole number."""
    for name, (value, least, whole) in settings.items():
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = "a whole number" if whole else "a number"
            raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
        if not (least < value < torch.inf or (whole and value == least)):
            bound = "at least" if whole else "finite and above"
            raise ValueError(f"{name} must be {bound} {least:g}, got {value}")


def _by_image(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (like.dim() - 1))


def _check(network: nn.Module, x: Tensor, y: Tensor, norm: str, clip: tuple[float, float]) -> None:
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    if not isinstance(network, PreparedModel) and network.training:
        raise ValueError("network must be in eval mode, but is in train mode; network.eval() puts it there")
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm must be one of l2, linf, got {norm!r}")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be floating-point images of shape (N, ...), got {got}")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool or y.shape != x.shape[:1]:
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y must be integer labels of shape ({len(x)},), got {got}")
    low, high = clip
    if not low < high:
        raise ValueError(f"clip must be a pair with lowest < highest, got {clip!r}")
    if x.numel():
        lowest, highest = (float(bound) for bound in x.aminmax())
        if not (low - _OUTSIDE <= lowest and highest <= high + _OUTSIDE):
            raise ValueError(
                f"x must lie within clip={clip}, got values from {lowest:.5g} to {highest:.5g}; normalise inside the "
                "network"
            )
