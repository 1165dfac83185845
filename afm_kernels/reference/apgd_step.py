"""What happens in Auto-PGD between a pullback and the next forward, in plain PyTorch: the definition of the operator.

Note [APGD step]
~~~~~~~~~~~~~~~~
Croce and Hein (2020), as their published code runs it. ``x_adv`` has just been evaluated: ``grad``, ``loss`` and
``misclassified`` are its own. For each image by itself:

1. ``first``, the start: it is the best point, with its loss and gradient, and ``x_hit``.
   Later: ``improvements`` counts loss > loss_previous, which becomes loss; a loss above loss_best makes the point and
   its gradient the best ones. The first previous loss is set by the state's maker: below any loss, or what the
   published code has there (the start's own loss is in no window).
2. A misclassified point is copied to ``x_hit``, and ``hit`` is set for good.
3. ``window`` > 0, a checkpoint after so many points: the image *goes back* where improvements <= decrease * window, or
   where it did not at the last checkpoint and loss_best has not risen since. Then its step is halved, and the best
   point and its gradient take the place of x_adv and grad. ``reduced`` and loss_checked remember it for the next
   checkpoint, and improvements start at 0.
4. The step, with a = 1 at the first point and 1 - momentum later, and P the projection below:

       moved = P(x_adv + step_size * direction(grad))
       next = P(x_adv + a * (moved - x_adv) + (1 - a) * (x_adv - x_old))

   P(z) of linf clamps to [x - eps, x + eps], of l2 takes d = z - x to x + d * min(eps, ‖d‖) / (‖d‖ + 1e-12); both then
   clamp to [clip_min, clip_max], where there are such. direction(grad) is its sign, or grad / ‖grad‖.

``next`` is written to the buffer of x_old; x_adv keeps the point that was left, so that the two change names from step
to step and no image is copied for it. (Where an image goes back, that is the best point, as published.)

* Computed in float64 if a tensor is float64, else float32, and rounded once. The lengths of l2 are as exact as sums in
  float64 make them: squares neither overflow nor vanish. (Here all of l2 is computed in float64.)
* An element (linf) or a gradient (l2) that is zero, or has no direction for a NaN or infinity in it, moves nothing: the
  momentum alone does. (An infinite element has a sign.) So every point stays in the ball, and a point that was hit is
  never lost to a gradient that broke down.
* Comparisons with a NaN are false.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afm_kernels.reference.pgd_step import L2, LINF

# Rows of a state's numbers and counts.
LOSS_BEST, LOSS_PREVIOUS, LOSS_CHECKED, STEP_SIZE = range(4)
IMPROVEMENTS, REDUCED, HIT = range(3)

_NOTHING = 1e-12  # added to lengths, as published


def _by_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.ndim - 1))


def _lengths(images: Tensor) -> Tensor:
    return _by_image(images.flatten(1).square().sum(1).sqrt(), images)


def _direction(grad: Tensor, norm: int) -> Tensor:
    if norm == LINF:
        return grad.nan_to_num(0.0, torch.inf, -torch.inf).sign()
    largest = _by_image(grad.flatten(1).abs().amax(1), grad)
    has_one = (largest > 0) & (largest < torch.inf)
    scaled = torch.where(has_one, grad / torch.where(has_one, largest, 1), 0)
    length = _lengths(scaled)
    return scaled / torch.where(has_one, length, 1)


def _project(
    moved: Tensor, x: Tensor, eps: float, norm: int, clip_min: float | None, clip_max: float | None
) -> Tensor:
    if norm == L2:
        delta = moved - x
        length = _lengths(delta)
        moved = x + delta * (length.clamp(max=eps) / (length + _NOTHING))
    else:
        moved = torch.minimum(torch.maximum(moved, x - eps), x + eps)
    return moved if clip_min is None and clip_max is None else moved.clamp(clip_min, clip_max)


def apgd_step(
    x_adv: Tensor,
    x_old: Tensor,
    x_best: Tensor,
    grad_best: Tensor,
    x_hit: Tensor,
    numbers: Tensor,
    counts: Tensor,
    grad: Tensor,
    x: Tensor,
    loss: Tensor,
    misclassified: Tensor,
    eps: float,
    norm: int,
    clip_min: float | None,
    clip_max: float | None,
    momentum: float,
    decrease: float,
    window: int,
    first: bool,
) -> None:
    if x.numel() == 0:
        return
    with torch.no_grad():
        loss = loss.to(numbers.dtype)
        if first:
            better = torch.ones_like(misclassified)
            x_hit.copy_(x_adv)
        else:
            better = loss > numbers[LOSS_BEST]
            counts[IMPROVEMENTS] += loss > numbers[LOSS_PREVIOUS]
            numbers[LOSS_PREVIOUS] = loss
        numbers[LOSS_BEST] = torch.where(better, loss, numbers[LOSS_BEST])
        if first:
            numbers[LOSS_CHECKED] = loss
        x_best.copy_(torch.where(_by_image(better, x), x_adv, x_best))
        grad_best.copy_(torch.where(_by_image(better, x), grad, grad_best))
        x_hit.copy_(torch.where(_by_image(misclassified, x), x_adv, x_hit))
        counts[HIT] |= misclassified.to(counts.dtype)
        if window > 0:
            is_stuck = (counts[REDUCED] == 0) & (numbers[LOSS_CHECKED] >= numbers[LOSS_BEST])
            back = (counts[IMPROVEMENTS] <= decrease * window) | is_stuck
            counts[REDUCED] = back.to(counts.dtype)
            counts[IMPROVEMENTS] = 0
            numbers[LOSS_CHECKED] = numbers[LOSS_BEST]
            numbers[STEP_SIZE] = torch.where(back, numbers[STEP_SIZE] / 2, numbers[STEP_SIZE])
            x_adv.copy_(torch.where(_by_image(back, x), x_best, x_adv))
            grad = torch.where(_by_image(back, x), grad_best, grad)
        exact = norm == L2 or torch.float64 in (x.dtype, grad.dtype)
        dtype = torch.float64 if exact else torch.float32
        at, centre = x_adv.to(dtype), x.to(dtype)
        step = _by_image(numbers[STEP_SIZE], x).to(dtype) * _direction(grad.to(dtype), norm)
        moved = _project(at + step, centre, eps, norm, clip_min, clip_max)
        carried = 0.0 if first else momentum
        mixed = at + (moved - at) * (1 - carried) + (at - x_old.to(dtype)) * carried
        x_old.copy_(_project(mixed, centre, eps, norm, clip_min, clip_max))
