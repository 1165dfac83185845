"""From an objective's logit gradients to the images' gradients, whatever the unit of the logits and the dtype.

Note [Gradient scales]
~~~~~~~~~~~~~~~~~~~~~~
A step uses only the direction of an image's gradient, so each image's logit gradients may be multiplied by any power
of two before they enter the networks' backward, which is linear in them: no digit changes while nothing overflows or
vanishes in there. An objective's rows are brought to a largest entry of about 1 first. float32 and bfloat16 then have
120 powers of two left in both directions. float16 has 15 and 24, and weights in the thousands, or thousandths, use
them up: there a row is also divided by the spread of its logits, so that the backward sees numbers of the size that
the same network in the unit of 1 would have.

What that guess does not catch, the steps do: the factor of an image whose gradient came out infinite or NaN is
lowered for the next step and the image stays where it is meanwhile; where the gradient is so small that digits are
missing, or zero, it is raised. Nothing is read from a device; on CPUs, where there is none to wait for, two looks say
whether a step is the usual one, in which every row is near 1 as it came and every gradient has its digits, and then
nothing of this is computed. An image whose gradient was never finite in any step
becomes NaN in the last one: what has broken down must not pass for a network that resists. One whose gradient was
zero in every step has not been attacked at all, and is counted.

Where the images share their batch's statistics an image's gradient is made of every row's, and rows have to keep their
weights: they are multiplied by what the objective divided them by, relative to the largest, and all get one factor. So
do the rows of one image where its logits are dense (Note [Rows] in ``target``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .looks import all_within
from .target import Forward, without_ignored

Pullback = Callable[[Tensor], Tensor]


class _Range(NamedTuple):
    """How the factors of a dtype move."""

    low: float  # a smaller largest entry of an image's gradient has lost digits, or may have
    up: float
    down: float
    most: float  # and least, 1 / most: where a factor ends


_NARROW = _Range(low=2.0**-10, up=2.0**5, down=2.0**-8, most=2.0**15)
_WIDE = _Range(low=2.0**-80, up=2.0**40, down=2.0**-40, most=2.0**80)
# Rows of such a size are as good as rows brought to 1.
_NEAR_ONE = 0.25, 4.0


class ScaledBackward:
    """The images' gradients of one run of an attack. See Note [Gradient scales].

    Args:
        x: the images.
        objective: whose gradients these are.
        shared: whether an image's gradient depends on the other images' rows.
    """

    def __init__(self, x: Tensor, objective: Any, shared: bool = False) -> None:
        self.objective, self.shared = objective, shared
        self.factor = torch.ones(len(x), dtype=torch.float64, device=x.device)
        self.applied = self.factor  # what the last gradient is too large by
        self.moved = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # some gradient gave a direction
        self._all_factors_are_one = True

    def rows(self, kept: Tensor) -> None:
        """Goes on with some of the images."""
        self.factor, self.moved = self.factor[kept], self.moved[kept]

    def __call__(self, forward: Forward, labels: Tensor | None, is_last: bool = True) -> Tensor:
        """The gradient at the leaf, by image up to a positive factor.

        Autograd runs each network's part on its forward's stream.
        """
        images, rows, counted = len(forward.leaf), len(forward.student), None
        is_dense = rows != images
        if is_dense:
            counted, labels = without_ignored(labels)
        known = *forward.known(), labels
        outputs, grads, pullbacks = _moving_sides(forward, self.objective(*known))
        if counted is not None:
            grads = [g.masked_fill(~counted.unsqueeze(1), 0) for g in grads]
        is_narrow = forward.leaf.dtype == torch.float16 or any(z.dtype == torch.float16 for z in outputs)
        limits = _NARROW if is_narrow else _WIDE
        size = _sizes(outputs, grads, is_narrow)
        weight: Tensor | None = None
        if self.shared or is_dense:
            groups = 1 if self.shared else images
            weight = _weights(self.objective, known, size, counted, groups)
            size = (
                (size * weight).view(groups, -1).amax(1, keepdim=True).expand(-1, images // groups).flatten()
            )
        is_usual = weight is None and not is_narrow and self._all_factors_are_one
        if is_usual and all_within(size, *_NEAR_ONE):
            self.applied = self.factor
            grads = [g.to(z.dtype) for z, g in zip(outputs, grads, strict=True)]
        else:
            size = size.double()
            mantissa, _ = torch.frexp(size)
            # mantissa / size is the power of two that brings the size between 1/2 and 1, exactly.
            unit = torch.where((size > 0) & (size < torch.inf), mantissa / size, 1)
            self.applied = unit * self.factor
            by_row = self.applied
            if weight is not None:
                by_row = by_row.repeat_interleave(rows // images) * weight
            grads = [(g * by_row.unsqueeze(1)).to(z.dtype) for z, g in zip(outputs, grads, strict=True)]
        gradient = _pulled_back(forward.leaf, outputs, grads, pullbacks)
        # vector_norm takes three times as long on a CPU.
        largest = gradient.abs().flatten(1).amax(1)
        if all_within(largest, limits.low, torch.finfo(largest.dtype).max):
            self.moved = torch.ones_like(self.moved)
            return gradient
        self._all_factors_are_one = False
        finite = largest.isfinite()
        self.moved = self.moved | (finite & (largest > 0))
        is_small = (largest < limits.low) & (size > 0)
        change = torch.where(finite, torch.where(is_small, limits.up, 1.0), limits.down)
        if self.shared:
            change = change.amin(0, keepdim=True)
        self.factor = (self.factor * change).clamp(1 / limits.most, limits.most)
        stays = ~finite & self.moved if is_last else ~finite
        return gradient.masked_fill(stays.view(-1, *[1] * (gradient.dim() - 1)), 0)


def _pulled_back(
    leaf: Tensor, outputs: list[Tensor], grads: list[Tensor], pullbacks: list[Pullback | None]
) -> Tensor:
    """The gradient by the leaf of all outputs together, by pullback where there is one and by their graph elsewhere."""
    parts = [pull(g) for g, pull in zip(grads, pullbacks, strict=True) if pull is not None]
    with_graph = [i for i, pull in enumerate(pullbacks) if pull is None]
    if with_graph:
        chosen = [outputs[i] for i in with_graph], leaf, [grads[i] for i in with_graph]
        (part,) = torch.autograd.grad(*chosen, allow_unused=True)
        if part is None and not parts:
            raise ValueError(
                "no logits that the objective gave a gradient for depend on x_adv differentiably"
            )
        parts += [] if part is None else [part]
    return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def _weights(
    objective: Any, known: tuple[Any, ...], size: Tensor, counted: Tensor | None, groups: int
) -> Tensor:
    """What rows that share a gradient count, relative to the one of their group that counts most."""
    if not hasattr(objective, "log_scale"):
        return torch.ones_like(size)
    log_scale = objective.log_scale(*known).double()
    if counted is not None:
        log_scale = log_scale.masked_fill(~counted, -torch.inf)
    log_scale = log_scale.view(groups, -1)
    most = log_scale.amax(1, keepdim=True)
    return torch.where(most > -torch.inf, torch.exp(log_scale - most), 1).flatten()


def _sizes(outputs: list[Tensor], grads: list[Tensor], of_images: bool) -> Tensor:
    """The largest entry of each row's gradients, of both sides; with ``of_images`` times the spread of its logits."""
    if not of_images and len({g.dtype for g in grads}) == 1:  # the usual case, in fewer operations
        largest = grads[0].abs() if len(grads) == 1 else torch.maximum(grads[0].abs(), grads[1].abs())
        return largest.amax(1)
    sizes = []
    for z, g in zip(outputs, grads, strict=True):
        size = g.abs().amax(1).double()
        if of_images:
            top = z.detach().amax(1, keepdim=True)
            low = torch.where(z.detach().isfinite(), z.detach(), top).amin(1, keepdim=True)
            spread = (top.double() - low.double()).squeeze(1)
            size = size * torch.where(spread > 0, spread, 1)
        sizes.append(size)
    return sizes[0] if len(sizes) == 1 else torch.maximum(*sizes)


def _moving_sides(
    forward: Forward, gradients: Any
) -> tuple[list[Tensor], list[Tensor], list[Pullback | None]]:
    """The logits that have a gradient, their gradients, and their pullbacks."""
    sides = gradients if isinstance(gradients, (tuple, list)) else (gradients, None)
    if len(sides) != 2:
        raise ValueError(f"an objective must return one gradient or a pair of them, got {len(sides)}")
    outputs, grads, pullbacks = [], [], []
    for name, z, pull, gradient in (
        ("student", forward.student, forward.pull_student, sides[0]),
        ("teacher", forward.teacher, forward.pull_teacher, sides[1]),
    ):
        if gradient is None:
            continue
        if z is None or not isinstance(gradient, Tensor) or gradient.shape != z.shape:
            got = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            want = (
                "no gradient, there are no such logits"
                if z is None
                else f"a tensor of shape {tuple(z.shape)}"
            )
            raise ValueError(f"the objective's {name} gradient must be {want}, got {got}")
        if pull is None and not z.requires_grad:
            raise ValueError(
                f"the objective gave a gradient for the {name}'s logits, which do not depend on x_adv differentiably"
            )
        outputs.append(z)
        grads.append(gradient)
        pullbacks.append(pull)
    if not outputs:
        raise ValueError("the objective returned no gradient for either side")
    return outputs, grads, pullbacks
