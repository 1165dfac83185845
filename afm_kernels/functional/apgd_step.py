"""Auto-PGD's step and its state. The formulas: Note [APGD step] in the reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from afm_kernels.functional.checks import (
    DTYPES,
    check_between,
    check_flag,
    check_floating,
    check_integer,
    check_like,
    check_positive,
    check_real,
)
from afm_kernels.functional.out import check_memory, write
from afm_kernels.functional.pgd_step import Clip, check_clip, check_norm
from afm_kernels.reference.apgd_step import HIT, LOSS_BEST, LOSS_PREVIOUS, STEP_SIZE

_FLAGS = frozenset({torch.bool})


class APGDState(NamedTuple):
    """What Auto-PGD knows of N images between two steps: arrays, one entry an image. Made by `APGDState.at`.

    Attributes:
        x_adv: (N, ...) the points to evaluate next.
        x_old: where they came from.
        x_best, grad_best: the points with the highest loss so far, and the gradients there.
        x_hit: the last point that was misclassified; the start, where none was.
        numbers: (4, N) highest loss, last loss, highest loss at the last checkpoint, step size; float64 if the images
            or their gradients are, else float32.
        counts: (3, N) int32: losses since the last checkpoint that rose, whether that one went back, whether a point
            was misclassified.

    >>> import torch
    >>> from afm_kernels import APGDState
    >>> state = APGDState.at(torch.zeros(2, 3), step_size=0.5)
    >>> state.step_size.tolist(), state.hit.tolist()
    ([0.5, 0.5], [False, False])
    """

    x_adv: Tensor
    x_old: Tensor
    x_best: Tensor
    grad_best: Tensor
    x_hit: Tensor
    numbers: Tensor
    counts: Tensor

    @classmethod
    def at(
        cls,
        x_start: Tensor,
        *,
        step_size: float,
        first_loss_exceeds: float = -float("inf"),
        grad_dtype: torch.dtype | None = None,
    ) -> APGDState:
        """The state before anything is evaluated.

        Args:
            x_start: (N, ...), floating point; it is copied.
            step_size: of the first steps, in units of the images; published: twice the radius of the ball.
            first_loss_exceeds: the loss after the first step counts as an improvement where it is above this: published
                is 0 for whatever loss. The default always counts it.
            grad_dtype: of the gradients that will come; the images' if None.

        Raises:
            ValueError, TypeError: an argument is not as above.
        """
        check_floating("x_start", x_start)
        if x_start.ndim == 0:
            raise ValueError("x_start has shape (), but needs images: a first dimension")
        step_size = check_positive("step_size", step_size)
        x_start = x_start.detach()
        x_adv = x_start.clone() if _lies_by_image(x_start) else x_start.contiguous().clone()
        exact = torch.float64 in (x_adv.dtype, grad_dtype)
        numbers = x_adv.new_zeros((4, len(x_adv)), dtype=torch.float64 if exact else torch.float32)
        numbers[LOSS_PREVIOUS] = check_real("first_loss_exceeds", first_loss_exceeds)
        numbers[STEP_SIZE] = step_size
        counts = x_adv.new_zeros((3, len(x_adv)), dtype=torch.int32)
        grad_best = torch.zeros_like(x_adv, dtype=grad_dtype)
        return cls(x_adv, x_adv.clone(), x_adv.clone(), grad_best, x_adv.clone(), numbers, counts)

    def rows(self, index: Tensor) -> APGDState:
        """That of some of the images: int64 indices, or flags."""
        images = {name: getattr(self, name)[index] for name in self._fields[:5]}
        return self._replace(numbers=self.numbers[:, index], counts=self.counts[:, index], **images)

    @property
    def loss_best(self) -> Tensor:
        return self.numbers[LOSS_BEST]

    @property
    def step_size(self) -> Tensor:
        return self.numbers[STEP_SIZE]

    @property
    def hit(self) -> Tensor:
        """(N,) bool: whether a point was misclassified."""
        return self.counts[HIT] != 0


def apgd_step(
    state: APGDState,
    grad: Tensor,
    x: Tensor,
    loss: Tensor,
    misclassified: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    clip: Clip = (0.0, 1.0),
    momentum: float = 0.25,
    decrease: float = 0.75,
    window: int = 0,
    first: bool = False,
) -> APGDState:
    """One iteration of Auto-PGD (Croce and Hein, 2020), but for the network: books the point that was evaluated, goes
    back to the best one at a checkpoint, and takes the next step.

    Args:
        state: whose ``x_adv`` was evaluated. Its tensors are written, and it is not to be used again.
        grad: the gradient of the loss at ``state.x_adv``, up to a positive factor for each image; its shape, and the
            dtype of ``state.grad_best``. Where it has no direction, the momentum alone moves the image.
        x: the clean images; shape and dtype of ``state.x_adv``.
        loss: (N,) what is to grow, floating point.
        misclassified: (N,) bool.
        eps: radius of the ball in units of ``x``, positive and finite.
        norm: "linf" or "l2".
        clip: as in ``pgd_step``.
        momentum: the share of the last movement in a step, from 0 to 1; published: 0.25.
        decrease: an image goes back at a checkpoint where at most this share of the window's losses rose.
        window: how many points were evaluated since the last checkpoint, where this is one, else 0.
        first: the start was evaluated.

    Returns:
        The state whose ``x_adv`` is to be evaluated next.

    Raises:
        ValueError, TypeError: an argument is not as above.

    >>> import torch
    >>> from afm_kernels import APGDState, apgd_step
    >>> x = torch.tensor([[0.5, 0.5]])
    >>> state = APGDState.at(x, step_size=0.25)
    >>> loss, hit = torch.tensor([1.0]), torch.tensor([False])
    >>> apgd_step(state, torch.tensor([[2.0, -1.0]]), x, loss, hit, eps=0.125, first=True).x_adv.tolist()
    [[0.625, 0.375]]
    """
    x_adv = state.x_adv
    check_floating("state.x_adv", x_adv)
    for name, images in zip(state._fields[1:5], state[1:5], strict=True):
        check_like(f"state.{name}", images, "state.x_adv", x_adv, same_dtype=name != "grad_best")
        if images.stride() != x_adv.stride() or not _lies_by_image(images):
            raise ValueError(
                f"state.{name} has strides {images.stride()} and state.x_adv {x_adv.stride()}; they must be equal and "
                "dense, one image behind the other, as APGDState.at makes them"
            )
    check_like("grad", grad, "state.grad_best", state.grad_best, same_dtype=True)
    check_like("x", x, "state.x_adv", x_adv, same_dtype=True)
    _check_numbers(state, loss, misclassified)
    eps = check_positive("eps", eps)
    norm_index = check_norm(norm, x)
    clip_min, clip_max = check_clip(clip)
    momentum = check_between("momentum", momentum, 0.0, 1.0)
    decrease = check_between("decrease", decrease, 0.0, 1.0)
    if check_integer("window", window) < 0:
        raise ValueError(f"window is {window}; an int of at least 0 is expected")
    check_flag("first", first)
    read = (
        *(_laid_as(images.detach(), x_adv) for images in (grad, x)),
        loss.detach().to(state.numbers.dtype).contiguous(),
        misclassified.contiguous(),
    )
    numbers = (eps, norm_index, clip_min, clip_max, momentum, decrease, window, first)
    write("apgd_step", x.device.type, (*state, *read, *numbers), state, lambda: _check_memory(state, read))
    return state._replace(x_adv=state.x_old, x_old=x_adv)


def _check_numbers(state: APGDState, loss: Tensor, misclassified: Tensor) -> None:
    exact = torch.float64 in (state.x_adv.dtype, state.grad_best.dtype)
    images, dtype = len(state.x_adv), torch.float64 if exact else torch.float32
    expected = {
        "state.numbers": (state.numbers, (4, images), (dtype,)),
        "state.counts": (state.counts, (3, images), (torch.int32,)),
        "loss": (loss, (images,), DTYPES),
        "misclassified": (misclassified, (images,), _FLAGS),
    }
    for name, (value, shape, dtypes) in expected.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; a tensor is expected")
        if value.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; {shape} is expected, as images are {images}"
            )
        if value.dtype not in dtypes:
            raise TypeError(f"{name} has dtype {value.dtype}; allowed: {', '.join(sorted(map(str, dtypes)))}")
        if value.device != state.x_adv.device:
            raise ValueError(
                f"{name} is on {value.device} and state.x_adv on {state.x_adv.device}; they must be on one device"
            )
    for name in ("state.numbers", "state.counts"):
        if not expected[name][0].is_contiguous():
            raise ValueError(f"{name} must be contiguous, as APGDState.at makes it")


def _check_memory(state: APGDState, read: tuple[Tensor, ...]) -> None:
    written = {f"state.{name}": tensor for name, tensor in zip(state._fields, state, strict=True)}
    check_memory(written, dict(zip(("grad", "x", "loss", "misclassified"), read, strict=True)))


def _lies_by_image(images: Tensor) -> bool:
    """Whether the images are dense and lie one behind the other, in whatever order within."""
    expected = 1
    inner = sorted((stride, size) for stride, size in zip(images.stride()[1:], images.shape[1:], strict=True))
    for stride, size in inner:
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return len(images) <= 1 or images.stride(0) == expected


def _laid_as(images: Tensor, model: Tensor) -> Tensor:
    if images.stride() == model.stride():
        return images
    return torch.empty_like(model, dtype=images.dtype).copy_(images)
