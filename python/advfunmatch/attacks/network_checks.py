"""What AutoAttack asks of a network and of its data, and what it says of networks whose figures would mean little."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError
from .searched import Searched

__all__ = [
    "acts_in_training",
    "check_answers",
    "check_data",
    "check_labels",
    "looks_like_probabilities",
    "zero_gradients_of",
]

CHECKED = 256  # images
ASKED = 3  # times
# The official check's: of logits that are divided by their norm.
SAME = 1e-4
# What computes something else while it is trained.
_MODAL = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU)


def acts_in_training(model: nn.Module) -> bool:
    """Whether a network is in training mode, and has parts for which that matters."""
    return any(module.training for module in model.modules() if isinstance(module, _MODAL))


def check_data(x: Tensor, y: Tensor) -> None:
    """InputError for images that are not in [0, 1], and for labels that are not one integer each."""
    low, high = (float(bound) for bound in x.detach().aminmax()) if x.numel() else (0.0, 0.0)
    if x.dim() != 4:
        raise InputError(f"x must be images (N, C, H, W), got shape {tuple(x.shape)}")
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"x holds values from {low:.4g} to {high:.4g}, but must be images in [0, 1]: normalise inside the network"
        )
    kind = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
    no_integers = (
        not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool
    )
    if no_integers or y.shape != x.shape[:1]:
        raise InputError(f"y must be {len(x)} integers, the true classes of x, got {kind}")


def check_answers(answers: list[Tensor]) -> None:
    """InputError for what are no logits, among them NaN, and for a network that answered the same images differently.

    ``answers``: one or more, which may be random where it is one.
    """
    first = answers[0]
    if not isinstance(first, Tensor) or first.dim() != 2 or first.shape[1] < 2:
        got = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise InputError(f"model must return logits (N, C) of two classes or more, got {got}")
    no_number = int(first.isnan().any(1).sum())
    if no_number:
        raise InputError(
            f"model must return logits, got NaN for {no_number} of {len(first)} images as they are"
        )
    units = [logits.double() / (logits.double().norm(dim=1, keepdim=True) + 1e-10) for logits in answers]
    apart = max((float((units[0] - unit).norm(dim=1).nan_to_num().max()) for unit in units[1:]), default=0.0)
    if apart > SAME:
        raise InputError(
            f"model answers the same images differently each time, by {apart:.2g} of its logits: version='rand' is the "
            "one for networks that answer at random"
        )


def check_labels(y: Tensor, num_classes: int) -> None:
    """InputError for labels that are none of the network's classes."""
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"y holds classes from {low} to {high}, but model returns {num_classes} logits")


def looks_like_probabilities(logits: Tensor) -> bool:
    """Whether all of these are probabilities, which the losses take for logits."""
    sums = logits.double().sum(1)
    return bool((logits >= -1e-5).all() & (logits <= 1 + 1e-5).all() & ((sums - 1).abs() < 1e-3).all())


def zero_gradients_of(searched: Searched, x: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: images whose margin has a gradient of exactly zero, so that gradient attacks see nothing."""
    logits, pullback = searched.vjp(x)
    others = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    direction = torch.zeros_like(logits).scatter_(1, y[:, None], -1.0).scatter_(1, others[:, None], 1.0)
    return (pullback(direction).flatten(1) == 0).all(1)
