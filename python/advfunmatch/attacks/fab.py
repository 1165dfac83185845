"""Fast Adaptive Boundary attack (Croce and Hein, 2020): FAB and FAB-T, as AutoAttack's published code runs them.

Note [FAB]
~~~~~~~~~~
It looks for the nearest misclassified point, whatever the radius, and an image counts as broken if that is in the ball.
A step takes the boundary to another class for a plane: with f = z_class − z_y and its gradient w at the point x,

    d  = the shortest way from x to {f + w·(. − x) = 0} within the valid range, d0 that from the image x0
    x' = (1 − α)·(x + η·d) + α·(x0 + η·d0),   α = min(|d| / (|d| + |d0|), α_max)

and where x' is misclassified it is kept if it is the nearest so far, and drawn back to x0 + β·(x' − x0). FAB aims at
the class whose plane is nearest; FAB-T, run by run, at those of the second to tenth highest clean logit. Of the
published code (2023-01-09): α_max = 0.1, η = 1.05, β = 0.9; the first restart begins at the image itself, others within
half the radius; images that are in the ball already go on to the last step, and take no part in later restarts and
targets.

What differs is where time goes. The label of x' and the next gradient are of one point unless x' was misclassified.
Images end up going to and fro, so one that was misclassified last time and not the time before is taken not to be now:
it is shown once, with its gradient, and again only where that was wrong. (Of a wrn-16-2's it is wrong for one in eight;
a step that follows one without success nearly always has it.) The planes are met without a sort, see `crossing`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import arguments
from .draws import FAB as STREAM
from .draws import FAB_T as STREAM_T
from .draws import Draws
from .searched import Searched
from .target import Target, in_format_of

__all__ = ["FAB", "crossing"]

ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9
_NO_WEIGHT = 1e-8  # pixels of smaller gradients stay as they are in "l2", as published
_SHORTEST = 1e-8


def crossing(weight: Tensor, reach: Tensor, wanted: Tensor) -> Tensor:
    """How far to go, λ, for ``Σ weight·min(λ, reach)`` to be ``wanted``; infinite where all of it is not enough.

    The sum is concave in λ, so that Newton's steps from 0 never pass the solution, and each but the last leaves a
    pixel behind that has reached its end: they end, after about five.

    Args:
        weight, reach: (N, ...), none below 0.
        wanted: (N, 1, ...), none below 0.

    >>> crossing(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.0]]), torch.tensor([[2.0]]))
    tensor([[0.7500]])
    """
    dims = tuple(range(1, weight.dim()))
    whole = weight * reach
    found = torch.zeros_like(wanted)
    while True:
        going = reach > found
        left = wanted - torch.where(going, 0, whole).sum(dims, keepdim=True)
        slope = torch.where(going, weight, 0).sum(dims, keepdim=True)
        further = torch.where(slope > 0, left / slope, torch.inf).where(wanted > 0, 0)
        if not bool((further > found).any()):
            return found
        found = torch.maximum(found, further)


class FAB:
    """FAB on a network.

    Args:
        norm: "linf" or "l2".
        eps: radius of the ball in units of the images, positive and finite.
        targeted: one class after the other (FAB-T), or the nearest boundary of all, whose gradients take C − 1
            backwards a step.
        steps: of each run.
        restarts: runs, of each target; all but the first from random starts.
        targets: of the targeted: how many classes; fewer where there are not so many others.

    Raises:
        ValueError, TypeError: an argument outside what is listed here.

    Example:
        >>> from advfunmatch.attacks.draws import Draws, image_keys
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(4, 3, 2, 2)
        >>> x_adv = FAB("linf", eps=0.1, targeted=True)(Searched(net), x, net(x).argmax(1), Draws(0, image_keys(x)))
        >>> bool(((x_adv - x).abs() <= 0.1 + 1e-6).all())
        True
    """

    def __init__(
        self,
        norm: str = "linf",
        eps: float = 8 / 255,
        targeted: bool = False,
        steps: int = 100,
        restarts: int = 1,
        targets: int = 9,
    ) -> None:
        arguments.check_choice("norm", norm, arguments.NORMS)
        arguments.check_positive("eps", eps)
        arguments.check_counts(steps=(steps, 1), restarts=(restarts, 1), targets=(targets, 1))
        self.norm, self.eps, self.targeted = norm, float(eps), bool(targeted)
        self.steps, self.restarts, self.targets = int(steps), int(restarts), int(targets)

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
            x: (N, ...), floating point, in [0, 1].
            y: (N,) labels, integers.
            draws: the random numbers of these images.
            progress: called with the number of images that are done with, which add up to N.

        Returns:
            x_adv: the nearest misclassified point of each image, where that is in the ball, else the image itself.
            Shape, dtype and memory format of x.
        """
        arguments.check_images(x, (0.0, 1.0))
        y = arguments.checked_labels(y, x)
        x_adv = Target(searched.network, None).in_its_format(x.detach()).clone()
        clean = x_adv.clone()
        logits = searched.logits(clean)
        ranked = logits.argsort(1, descending=True)
        left = (ranked[:, 0] == y).nonzero().squeeze(1)
        if progress is not None:
            progress(len(x) - len(left))
        for target in range(min(self.targets, logits.shape[1] - 1) if self.targeted else 1):
            for restart in range(self.restarts):
                if len(left) == 0:
                    break
                stream = (STREAM_T if self.targeted else STREAM) + target
                start = self._start(clean[left], draws.rows(left), stream, restart)
                aims = ranked[left, 1 + target] if self.targeted else None
                points, distance = self._run(searched, start, clean[left], y[left], aims)
                hit = distance <= self.eps
                x_adv[left[hit]] = points[hit]
                left = left[~hit]
                if progress is not None:
                    progress(int(hit.sum()))
        if progress is not None:
            progress(len(left))
        return in_format_of(x_adv, x)

    def _start(self, x: Tensor, draws: Draws, stream: int, restart: int) -> Tensor:
        """The images, but for restarts: random points at half the radius, clipped."""
        if restart == 0:
            return x
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.norm == "linf":
            noise = 2 * draws.uniform(stream, restart, x.shape[1:], dtype) - 1
        else:
            noise = draws.normal(stream, restart, x.shape[1:], dtype)
        start = (x + self.eps / 2 * (noise / self.length(noise))).clamp(0, 1)
        return torch.empty_like(x).copy_(start)

    def _run(
        self, searched: Searched, start: Tensor, x: Tensor, y: Tensor, aims: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The nearest misclassified point of each image, and how far it is: infinite where there was none."""
        walk = _Walk(self, searched, x, y, aims)
        walk.begin(start)
        for step in range(1, self.steps + 1):
            way, way_of_image = self._ways(walk.point, x, walk.difference, walk.gradient)
            long, long_of_image = (self.length(each).clamp(min=_SHORTEST) for each in (way, way_of_image))
            alpha = (long / (long + long_of_image)).clamp(max=ALPHA_MAX)
            point = (walk.point + ETA * way) * (1 - alpha) + (x + ETA * way_of_image) * alpha
            (walk.arrive if step < self.steps else walk.end)(point.clamp(0, 1))
        return walk.nearest, walk.distance

    def _ways(self, point: Tensor, x: Tensor, difference: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The shortest ways to the plane from the points and from the images, in the valid range."""
        dims = tuple(range(1, x.dim()))
        from_image = difference + (gradient * (x - point)).sum(dims, keepdim=True)
        return tuple(  # type: ignore[return-value]
            self._to_plane(start, height, gradient)
            for start, height in ((point, difference), (x, from_image))
        )

    def _to_plane(self, start: Tensor, height: Tensor, gradient: Tensor) -> Tensor:
        """Where ``height`` is the plane's function at ``start``: down the gradient if that is positive, else up."""
        down = (gradient > 0) == (height >= 0)
        room = torch.where(down, start, 1 - start)
        size = gradient.abs()
        if self.norm == "linf":
            room = torch.where(gradient == 0, 0, room)
            step = torch.minimum(room, crossing(size, room, height.abs()))
        else:
            moved = size > _NO_WEIGHT
            reach = torch.where(moved, room / size, 0)
            step = size * torch.minimum(reach, crossing(size.square(), reach, height.abs()))
        return torch.where(down, -step, step)

    def length(self, change: Tensor) -> Tensor:
        """(N, 1, ...): in the norm."""
        dims = tuple(range(1, change.dim()))
        if self.norm == "linf":
            return change.abs().amax(dims, keepdim=True)
        return change.square().sum(dims, keepdim=True).sqrt()

    def dual_length(self, gradient: Tensor) -> Tensor:
        """(N, 1, ...): by how much a step of length 1 can change what the gradient is of."""
        dims = tuple(range(1, gradient.dim()))
        return gradient.abs().sum(dims, keepdim=True) if self.norm == "linf" else self.length(gradient)


class _Walk:
    """The points of some images, the planes there, and the nearest misclassified points so far.

    Attributes:
        point, gradient: (N, ...), and ``difference``, (N, 1, ...), the plane's function at the point.
        nearest, distance: (N, ...) and (N,), infinite where no point was misclassified.
    """

    point: Tensor
    gradient: Tensor
    difference: Tensor

    def __init__(self, attack: FAB, searched: Searched, x: Tensor, y: Tensor, aims: Tensor | None) -> None:
        self.attack, self.searched, self.x, self.y, self.aims = attack, searched, x, y, aims
        self.nearest = x.clone()
        self.distance = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        # Whether the last point was misclassified, and whether the next one is likely to be.
        self.wrong = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.likely = torch.ones_like(self.wrong)

    def begin(self, start: Tensor) -> None:
        """The planes at the start, whatever it is taken for."""
        logits, pullback = self.searched.vjp(start)
        self.point = start
        self.difference, self.gradient = self._planes(logits, pullback, self.y, self.aims)

    def arrive(self, point: Tensor) -> None:
        """Go to other points: what is misclassified is kept and drawn back. Then the planes there."""
        likely, before, self.wrong = self.likely, self.wrong, torch.zeros_like(self.wrong)
        rows = likely.nonzero().squeeze(1)
        if len(rows):
            self.wrong[rows] = self.searched.logits(point[rows]).argmax(1) != self.y[rows]
            point = self._kept(point, self.wrong)
        logits, pullback = self.searched.vjp(point)
        self.difference, self.gradient = self._planes(logits, pullback, self.y, self.aims)
        found = (logits.argmax(1) != self.y) & ~likely
        self.wrong |= found
        self.likely = before | ~self.wrong
        self.point = self._kept(point, found)
        rows = found.nonzero().squeeze(1)
        if len(rows):
            logits, pullback = self.searched.vjp(self.point[rows])
            aims = None if self.aims is None else self.aims[rows]
            self.difference[rows], self.gradient[rows] = self._planes(logits, pullback, self.y[rows], aims)

    def end(self, point: Tensor) -> None:
        """Go to the last points."""
        self._kept(point, self.searched.logits(point).argmax(1) != self.y)

    def _kept(self, point: Tensor, wrong: Tensor) -> Tensor:
        """The points, of which the misclassified are kept if they are the nearest, and drawn back."""
        length = self.attack.length(point - self.x)
        nearer = wrong & (length.flatten() < self.distance)
        self.distance = torch.where(nearer, length.flatten(), self.distance)
        self.nearest = torch.where(nearer.view_as(length), point, self.nearest)
        return torch.where(wrong.view_as(length), self.x + BETA * (point - self.x), point)

    def _planes(
        self, logits: Tensor, pullback: Callable[[Tensor], Tensor], y: Tensor, aims: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Difference (N, 1, ...) and gradient (N, ...) of the plane to the class aimed at, else of the nearest."""
        if aims is not None:
            return self._plane(logits, pullback, y, aims)
        found: tuple[Tensor, Tensor] | None = None
        for other in range(logits.shape[1] - 1):
            each = self._plane(logits, pullback, y, other + (other >= y).long())
            distance = each[0].abs() / (1e-12 + self.attack.dual_length(each[1]))
            if found is None:
                found, nearest = each, distance
            else:
                nearer = distance < nearest
                nearest = torch.where(nearer, distance, nearest)
                found = torch.where(nearer, each[0], found[0]), torch.where(nearer, each[1], found[1])
        assert found is not None  # a network has two classes or more
        return found

    def _plane(
        self, logits: Tensor, pullback: Callable[[Tensor], Tensor], y: Tensor, other: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, other = y[:, None], other[:, None]
        direction = torch.zeros_like(logits).scatter_(1, y, -1.0).scatter_(1, other, 1.0)
        difference = logits.gather(1, other) - logits.gather(1, y)
        return difference.to(self.x).view(-1, *[1] * (self.x.dim() - 1)), pullback(direction)
