"""The losses of Auto-PGD as maps from logits to a value and a direction for each image.

Note [Directions of APGD]
~~~~~~~~~~~~~~~~~~~~~~~~~
A step uses a gradient's direction only, and the attack compares losses of one image with each other. So for each image
the gradient by the logits may be divided by any positive number (its logarithm is given, for where several gradients
are added), and the loss may be any increasing function of the published one:

* "ce": log(1 + e^m) is the cross-entropy, m = logsumexp of the other logits - z_y. m orders points as it does, and goes
  on to where the cross-entropy is 0 in float32 or its gradient p - onehot vanishes: the logits' unit does not matter.
* "dlr": -(z_y - max of the others) / (z_1 - z_3 + 1e-12), with z_1 >= z_2 >= ... the sorted logits. Its gradient is
  divided by one over the denominator.
* "dlr_targeted": -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2 + 1e-12), likewise.

Where there are too few classes the denominator takes the lowest of those that there are: z_1 - (z_2 + z_3) / 2 for a
targeted one with 3. With 2 both ratios are constant, and their numerators are taken: the margin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LOGIT_LOSSES", "LogitLoss", "LossAt"]

_NOTHING = 1e-12


class LossAt(NamedTuple):
    """A loss at some logits (N, C); all float32 or float64.

    Attributes:
        value: (N,).
        direction: (N, C) the gradient by the logits divided by exp(log_scale).
        log_scale: (N,).
    """

    value: Tensor
    direction: Tensor
    log_scale: Tensor


LogitLoss = Callable[[Tensor, Tensor, Tensor | None], LossAt]


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None) -> LossAt:
    column = labels[:, None]
    others = logits.scatter(1, column, -torch.inf)
    total = others.logsumexp(1, keepdim=True)
    value = (total - logits.gather(1, column)).squeeze(1)
    alone = total == -torch.inf  # the label has all there is, and no gradient
    direction = torch.where(alone, 0, (others - total).exp()).scatter(1, column, alone.to(logits.dtype) - 1)
    return LossAt(value, direction, F.logsigmoid(value))


def dlr(logits: Tensor, labels: Tensor, targets: Tensor | None) -> LossAt:
    ranked = logits.topk(min(3, logits.shape[1]), dim=1).indices
    other = torch.where(ranked[:, :1] == labels[:, None], ranked[:, 1:2], ranked[:, :1])
    return _ratio(logits, labels[:, None], other, ranked[:, :1], ranked[:, -1:])


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor | None) -> LossAt:
    assert targets is not None  # whoever asks for this loss has them
    ranked = logits.topk(min(4, logits.shape[1]), dim=1).indices
    return _ratio(logits, labels[:, None], targets[:, None], ranked[:, :1], ranked[:, -2:])


def _ratio(logits: Tensor, own: Tensor, other: Tensor, highest: Tensor, low: Tensor) -> LossAt:
    """-(own logit - other logit) / (highest - mean of the low ones), all given by their columns."""
    gap = logits.gather(1, own) - logits.gather(1, other)
    one = torch.ones_like(gap)
    if logits.shape[1] == 2:
        direction = torch.zeros_like(logits).scatter(1, own, -one).scatter(1, other, one)
        return LossAt(-gap.squeeze(1), direction, torch.zeros_like(gap).squeeze(1))
    denominator = (logits.gather(1, highest) - logits.gather(1, low)).mean(1, keepdim=True) + _NOTHING
    ratio = gap / denominator
    size = ratio.abs().clamp(min=1)
    part = ratio / size
    places = torch.cat((own, other, highest, low), 1)
    parts = torch.cat((-1 / size, 1 / size, part, (-part / low.shape[1]).expand_as(low)), 1)
    direction = torch.zeros_like(logits).scatter_add(1, places, parts)
    return LossAt(-ratio.squeeze(1), direction, (size / denominator).log().squeeze(1))


#: name -> (the loss, what the first one is compared with). Published: 0, which a cross-entropy is always above.
LOGIT_LOSSES: dict[str, tuple[LogitLoss, float]] = {
    "ce": (cross_entropy, -torch.inf),
    "dlr": (dlr, 0.0),
    "dlr_targeted": (dlr_targeted, 0.0),
}
