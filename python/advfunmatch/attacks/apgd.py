"""Auto-PGD (Croce and Hein, 2020): APGD-CE, APGD-DLR and APGD-T, as AutoAttack's published code runs them.

Note [APGD]
~~~~~~~~~~~
The algorithm, with what is peculiar in the published code (2023-01-09), is Note [APGD step] of ``afm_kernels``, which
does everything between a pullback and the next forward; the losses are Note [Directions of APGD]. Here is the rest: the
starts, the checkpoints' places, targets and restarts.

* A checkpoint comes after 22 % of the steps, and then after windows that are each 3 % shorter, down to 6 %: for 100
  steps at 22, 41, 57, 70, 80, 87, 93, 99.
* What is returned is the *last* misclassified point, though the first one decides. So no image may stop early without
  changing the returned point; ``stop_at_hit`` does that, and returns the first. Which images are broken is the same.
* The last point's gradient, which the published code takes too, has no use and is left out.
* Targets are the classes of the second to tenth highest *clean* logit; a targeted run succeeds on any wrong class.
  Broken images take no part in later restarts and targets.
* In an image's random start ``stream`` counts targets, and ``draw`` restarts.
* With ``eot`` several gradients are averaged, of the last of which the loss and the logits count. Each is weighed by
  what its direction was divided by.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from afm_kernels import APGDState, apgd_step

from . import arguments
from .draws import APGD_CE, APGD_DLR, APGD_T, Draws
from .logit_losses import LOGIT_LOSSES
from .searched import Searched
from .target import Target, in_format_of

__all__ = ["APGD", "checkpoints"]

_STREAMS = {"ce": APGD_CE, "dlr": APGD_DLR, "dlr_targeted": APGD_T}
_NOTHING = 1e-12  # added to lengths, as published
# Taking broken images out copies all that is known of the others; from this share of the batch on it pays.
_WORTH_PACKING = 1 / 16


def checkpoints(steps: int) -> dict[int, int]:
    """After how many steps there is a checkpoint, and how many steps its window has.

    >>> list(checkpoints(100))
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    window, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    windows, at = {}, window
    while at <= steps:
        windows[at] = window
        window = max(window - shorter, least)
        at += window
    return windows


class APGD:
    """Auto-PGD on a network.

    Args:
        norm: "linf" or "l2".
        eps: radius of the ball in units of the images, positive and finite.
        loss: "ce", "dlr", or "dlr_targeted" (APGD-T).
        steps: of each run.
        restarts: runs from random starts of their own, of each target.
        targets: of "dlr_targeted": how many classes; fewer where there are not so many others.
        clip: the range of valid values, either of which may be None, or None.
        eot: gradients that are averaged at each point, for networks that answer at random.
        stop_at_hit: an image leaves its run when it is first misclassified. The same images are broken, in less time;
            the points are others. Networks must treat each image by itself.

    Raises:
        ValueError, TypeError: an argument outside what is listed here.

    Example:
        >>> from advfunmatch.attacks.draws import Draws, image_keys
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(4, 3, 2, 2)
        >>> attack = APGD("linf", eps=0.1, steps=10)
        >>> x_adv = attack(Searched(net), x, net(x).argmax(1), Draws(0, image_keys(x)))
        >>> bool(((x_adv - x).abs() <= 0.1 + 1e-6).all())
        True
    """

    def __init__(
        self,
        norm: str = "linf",
        eps: float = 8 / 255,
        loss: str = "ce",
        steps: int = 100,
        restarts: int = 1,
        targets: int = 9,
        clip: tuple[float | None, float | None] | None = (0.0, 1.0),
        eot: int = 1,
        *,
        stop_at_hit: bool = False,
    ) -> None:
        arguments.check_choice("norm", norm, arguments.NORMS)
        arguments.check_positive("eps", eps)
        arguments.check_choice("loss", loss, tuple(LOGIT_LOSSES))
        arguments.check_counts(steps=(steps, 1), restarts=(restarts, 1), targets=(targets, 1), eot=(eot, 1))
        self.norm, self.eps, self.loss = norm, float(eps), loss
        self.steps, self.restarts, self.targets, self.eot = int(steps), int(restarts), int(targets), int(eot)
        self.clip = arguments.checked_clip(clip)
        self.stop_at_hit = stop_at_hit
        self._loss_at, self._first_loss_exceeds = LOGIT_LOSSES[loss]

    def __call__(
        self,
        searched: Searched,
        x: Tensor,
        y: Tensor,
        draws: Draws,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Attack the images x, which the network classifies as y.

        Args:
            searched: the network, in eval mode.
            x: (N, ...), floating point, in the clip range.
            y: (N,) labels, integers.
            draws: the random numbers of these images.
            progress: called with the number of images that are done with, which add up to N.

        Returns:
            x_adv: the last misclassified point of each image (with ``stop_at_hit`` the first), or the image itself
            where there was none. Shape, dtype and memory format of x; within the ball and the clip range to one
            rounding.
        """
        arguments.check_images(x, self.clip)
        y = arguments.checked_labels(y, x)
        x_adv = Target(searched.network, None).in_its_format(x.detach()).clone()
        clean, left = x_adv.clone(), torch.arange(len(x), device=x.device)
        ranked = searched.logits(clean).argsort(1, descending=True) if self.loss == "dlr_targeted" else None
        for target in range(1 if ranked is None else min(self.targets, ranked.shape[1] - 1)):
            for restart in range(self.restarts):
                if len(left) == 0:
                    break
                start = self._start(clean[left], draws.rows(left), _STREAMS[self.loss] + target, restart)
                aims = None if ranked is None else ranked[left, 1 + target]
                points, hit = self._run(searched, start, clean[left], y[left], aims)
                x_adv[left[hit]] = points[hit]
                left = left[~hit]
                if progress is not None:
                    progress(len(hit) - len(left))
        if progress is not None:
            progress(len(left))
        return in_format_of(x_adv, x)

    def _start(self, x: Tensor, draws: Draws, stream: int, draw: int) -> Tensor:
        """A random point on the ball's surface, clipped."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.norm == "linf":
            noise = 2 * draws.uniform(stream, draw, x.shape[1:], dtype) - 1
            length = noise.flatten(1).abs().amax(1)
        else:
            noise = draws.normal(stream, draw, x.shape[1:], dtype)
            length = noise.flatten(1).square().sum(1).sqrt()
        start = x + self.eps * (noise / (length.view(-1, *[1] * (x.dim() - 1)) + _NOTHING))
        start = start if self.clip is None else start.clamp(*self.clip)
        return torch.empty_like(x).copy_(start)

    def _run(
        self, searched: Searched, start: Tensor, x: Tensor, y: Tensor, aims: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The points that were misclassified, and the flags of the images that have one."""
        state = APGDState.at(start, step_size=2 * self.eps, first_loss_exceeds=self._first_loss_exceeds)
        points, hit = start.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        left = torch.arange(len(x), device=x.device)
        windows = checkpoints(self.steps)
        for step in range(self.steps):
            grad, loss, misclassified = self._evaluate(searched, state.x_adv, y, aims)
            if self.stop_at_hit:  # whenever an image is taken out, its point is the first one
                misclassified = misclassified & ~state.hit
            state = apgd_step(
                state,
                grad,
                x,
                loss,
                misclassified,
                eps=self.eps,
                norm=self.norm,
                clip=self.clip,
                window=windows.get(step, 0),
                first=step == 0,
            )
            if self.stop_at_hit and (not x.is_cuda or step in windows):
                kept = (~state.hit).nonzero().squeeze(1)
                if len(kept) <= (1 - _WORTH_PACKING) * len(left):
                    points[left], hit[left] = state.x_hit, state.hit
                    left, x, y, state = left[kept], x[kept], y[kept], state.rows(kept)
                    aims = None if aims is None else aims[kept]
                    if len(left) == 0:
                        return points, hit
        misclassified = searched.logits(state.x_adv).argmax(1) != y
        if self.stop_at_hit:
            misclassified = misclassified & ~state.hit
        last = misclassified.view(-1, *[1] * (x.dim() - 1))
        points[left] = torch.where(last, state.x_adv, state.x_hit)
        hit[left] = misclassified | state.hit
        return points, hit

    def _evaluate(
        self, searched: Searched, x_adv: Tensor, y: Tensor, aims: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient at x_adv up to a factor for each image, the loss there, and which are misclassified."""
        total: Tensor | None = None
        for _ in range(self.eot):
            logits, pullback = searched.vjp(x_adv)
            at = self._loss_at(logits, y, aims)
            grad = pullback(at.direction)
            if total is None:
                total, scale = grad, at.log_scale
            else:
                largest = torch.maximum(scale, at.log_scale)
                before, now = ((each - largest).exp() for each in (scale, at.log_scale))
                shape = -1, *[1] * (grad.dim() - 1)
                total = total * before.view(shape) + grad * now.view(shape)
                scale = largest
        assert total is not None  # eot is at least 1
        return total, at.value, logits.argmax(1) != y
