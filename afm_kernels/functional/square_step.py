"""Square Attack's step in "linf", and its state. The rules: Note [Square step] in the reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from afm_kernels.functional.checks import DTYPES, check_floating, check_integer, check_like
from afm_kernels.functional.out import check_memory, write

_INTEGERS = frozenset({torch.int64})
_FLAGS = frozenset({torch.bool})


class SquareState(NamedTuple):
    """What Square Attack knows of N images between two steps. Made by `SquareState.at`.

    Attributes:
        x_adv: (N, C, H, W) the points to evaluate next.
        x_best: the points with the lowest margin so far, from which x_adv differs in one square of each image.
        margin: (N,) float64, the label's logit less the highest other one at x_best; infinite before the start is
            evaluated.
        corners: (N, 2) int64, top and left of the squares.
        side: of the squares, in pixels.

    >>> import torch
    >>> from afm_kernels import SquareState
    >>> SquareState.at(torch.zeros(2, 1, 4, 4)).margin.tolist()
    [inf, inf]
    """

    x_adv: Tensor
    x_best: Tensor
    margin: Tensor
    corners: Tensor
    side: int

    @classmethod
    def at(cls, x_start: Tensor) -> SquareState:
        """The state before anything is evaluated.

        Args:
            x_start: (N, C, H, W), floating point; it is copied.

        Raises:
            ValueError, TypeError: x_start is not as above.
        """
        check_floating("x_start", x_start)
        if x_start.ndim != 4:
            raise ValueError(f"x_start has shape {tuple(x_start.shape)}; images (N, C, H, W) are expected")
        x_adv = x_start.detach().clone()
        margin = torch.full((len(x_adv),), torch.inf, dtype=torch.float64, device=x_adv.device)
        corners = torch.zeros((len(x_adv), 2), dtype=torch.int64, device=x_adv.device)
        return cls(x_adv, x_adv.clone(), margin, corners, 0)

    def rows(self, index: Tensor) -> SquareState:
        """That of some of the images: int64 indices, or flags."""
        chosen = {name: getattr(self, name)[index] for name in self._fields[:4]}
        return self._replace(**chosen)


def square_step(
    state: SquareState,
    logits: Tensor,
    labels: Tensor,
    high: Tensor,
    low: Tensor,
    corners: Tensor,
    is_high: Tensor,
    *,
    side: int,
) -> SquareState:
    """One query of Square Attack (Andriushchenko et al., 2020) in "linf", but for the network: keeps the squares that
    were evaluated where they lower the margin, takes the others back, and changes the next ones.

    Args:
        state: whose ``x_adv`` was evaluated. Its tensors are written, and it is not to be used again.
        logits: (N, classes) at ``state.x_adv``, floating point.
        labels: (N,) int64, classes.
        high, low: the edges of the ball around the clean images; shape and dtype of ``state.x_adv``.
        corners: (N, 2) int64, top and left of the next squares, which lie within the image.
        is_high: (N, C) bool, the edge that a channel of the square takes.
        side: of the squares, from 0 (there is none: after the last query) to the image's smaller side.

    Returns:
        The state whose ``x_adv`` is to be evaluated next. Images whose margin is 0 or less are done with and keep it.

    Raises:
        ValueError, TypeError: an argument is not as above. A label or a corner out of range raises on CPUs, and is not
            looked for on other devices.

    >>> import torch
    >>> from afm_kernels import SquareState, square_step
    >>> x, labels = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    >>> corners, is_high = torch.tensor([[0, 1]]), torch.tensor([[True]])
    >>> state = square_step(
    ...     SquareState.at(x), torch.tensor([[2.0, 1.5]]), labels, x + 0.25, x - 0.25, corners, is_high, side=1
    ... )
    >>> state.margin.tolist(), state.x_adv.flatten().tolist()
    ([0.5], [0.5, 0.75, 0.5, 0.5])
    """
    x_adv = state.x_adv
    check_floating("state.x_adv", x_adv)
    if x_adv.ndim != 4:
        raise ValueError(f"state.x_adv has shape {tuple(x_adv.shape)}; images (N, C, H, W) are expected")
    check_like("state.x_best", state.x_best, "state.x_adv", x_adv, same_dtype=True)
    if state.x_best.stride() != x_adv.stride():
        raise ValueError(
            f"state.x_best has strides {state.x_best.stride()} and state.x_adv {x_adv.stride()}; they must be equal, "
            "as SquareState.at makes them"
        )
    check_like("high", high, "state.x_adv", x_adv, same_dtype=True)
    check_like("low", low, "state.x_adv", x_adv, same_dtype=True)
    _check_numbers(state, logits, labels, corners, is_high)
    for name, value in (("state.side", state.side), ("side", side)):
        if not 0 <= check_integer(name, value) <= min(x_adv.shape[2:]):
            raise ValueError(f"{name} is {value}; allowed: 0 to {min(x_adv.shape[2:])}")
    written = (x_adv, state.x_best, state.margin)
    logits = logits.detach()
    read = (
        (logits if logits.dtype in (torch.float32, torch.float64) else logits.float()).contiguous(),
        labels.contiguous(),
        *(_laid_as(edge.detach(), x_adv) for edge in (high, low)),
        state.corners.contiguous(),
        corners.contiguous(),
        is_high.contiguous(),
    )
    names = ("logits", "labels", "high", "low", "state.corners", "corners", "is_high")
    write(
        "square_step",
        x_adv.device.type,
        (*written, *read, state.side, side),
        written,
        lambda: check_memory(
            dict(zip(("state.x_adv", "state.x_best", "state.margin"), written, strict=True)),
            dict(zip(names, read, strict=True)),
        ),
    )
    return state._replace(corners=read[5], side=side)


def _check_numbers(
    state: SquareState, logits: Tensor, labels: Tensor, corners: Tensor, is_high: Tensor
) -> None:
    images, channels = state.x_adv.shape[:2]
    check_floating("logits", logits)
    if logits.ndim != 2 or len(logits) != images or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; ({images}, classes) is expected")
    expected = {
        "state.margin": (state.margin, (images,), frozenset({torch.float64})),
        "state.corners": (state.corners, (images, 2), _INTEGERS),
        "logits": (logits, tuple(logits.shape), DTYPES),
        "labels": (labels, (images,), _INTEGERS),
        "corners": (corners, (images, 2), _INTEGERS),
        "is_high": (is_high, (images, channels), _FLAGS),
    }
    for name, (value, shape, dtypes) in expected.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; a tensor is expected")
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; {shape} is expected")
        if value.dtype not in dtypes:
            raise TypeError(f"{name} has dtype {value.dtype}; allowed: {', '.join(sorted(map(str, dtypes)))}")
        if value.device != state.x_adv.device:
            raise ValueError(
                f"{name} is on {value.device} and state.x_adv on {state.x_adv.device}; they must be on one device"
            )
    if not state.margin.is_contiguous():
        raise ValueError("state.margin must be contiguous, as SquareState.at makes it")


def _laid_as(images: Tensor, model: Tensor) -> Tensor:
    if images.stride() == model.stride():
        return images
    return torch.empty_like(model).copy_(images)
