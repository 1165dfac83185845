"""What happens in Square Attack between a forward and the next one, in plain PyTorch: the definition of the operator.

Note [Square step]
~~~~~~~~~~~~~~~~~~
Andriushchenko et al. (2020), "linf". ``x_adv`` has just been evaluated and equals ``x_best`` but for one square of each
image: ``last_side`` pixels wide and high, its top and left in ``last_corners``. For each image by itself:

1. The margin is z_label - max of the others, in float64 (infinite where there is one class).
2. Where it is below ``margin``, and that is above 0, the square is kept: it is copied to x_best, and the margin is
   stored. Elsewhere it is copied back from x_best. (Comparisons with a NaN are false.)
3. In the square of ``side`` at ``corners``, x_adv takes the values of ``high`` in channels where ``is_high``, else of
   ``low``: the edges of the ball. A side of 0 is no square.

Nothing is computed but margins, so that the points are right to the bit in every dtype; and nothing outside of the two
squares is touched, so that a step costs what they hold and not what the images do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def square_step(
    x_adv: Tensor,
    x_best: Tensor,
    margin: Tensor,
    logits: Tensor,
    labels: Tensor,
    high: Tensor,
    low: Tensor,
    last_corners: Tensor,
    corners: Tensor,
    is_high: Tensor,
    last_side: int,
    side: int,
) -> None:
    if x_adv.numel() == 0:
        return
    with torch.no_grad():
        z, label = logits.double(), labels[:, None]
        found = z.gather(1, label).squeeze(1) - z.scatter(1, label, -torch.inf).amax(1)
        better = (found < margin) & (margin > 0)
        margin.copy_(torch.where(better, found, margin))
        last = _inside(last_corners, last_side, x_adv)
        best = torch.where(last & better.view(-1, 1, 1, 1), x_adv, x_best)
        x_best.copy_(best)
        edge = torch.where(is_high[:, :, None, None], high, low)
        x_adv.copy_(torch.where(_inside(corners, side, x_adv), edge, torch.where(last, best, x_adv)))


def _inside(corners: Tensor, side: int, images: Tensor) -> Tensor:
    """(N, 1, H, W) flags."""
    rows, columns = (
        (along := torch.arange(size, device=images.device) - first[:, None]).ge(0) & (along < side)
        for size, first in zip(images.shape[2:], corners.unbind(1), strict=True)
    )
    return rows[:, None, :, None] & columns[:, None, None, :]
