"""Square Attack (Andriushchenko, Croce, Flammarion and Hein, 2020) as AutoAttack's published code runs it.

Note [Square]
~~~~~~~~~~~~~
A random search that asks for logits only: change a square of the best point so far, keep the change if the margin
z_y − max z_other falls. Squares shrink as queries go on. Of the published code (2023-01-09):

* A square's corner never lies in the last row or column that it could (`high` is exclusive there too).
* In "linf" a square's pixels end at an edge of the ball in each channel, whatever they were: added is 2·eps or −2·eps.
  So both edges are made once, and a proposal only chooses between them: `afm_kernels.square_step`.
* In "l2" a square takes what of the ball's radius the image has left, and what a second square loses.
* An image is done when its margin is 0 or less; a tie of two classes counts as found, and is broken or not as the
  network's argmax says.
* Published runs of 5000 queries use half of a schedule made for 10000; ``rescale_schedule`` squeezes it into them.

There a batch shares its squares, and in "linf" their colours; here each image has its own, which depend on it alone.
Images that are not square, or too small for the published start in "l2", have as many tiles as fit.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from afm_kernels import SquareState, square_step

from . import arguments
from .draws import SQUARE, Draws
from .searched import Searched
from .target import Target, in_format_of

__all__ = ["Square", "square_side"]

_NOTHING = 1e-12  # added to lengths, as published
# Queries whose random numbers are drawn together; never other ones, or the numbers would be others.
_DRAWN = 50
# Taking images out copies all that is known of the others; from this share of the batch on it pays.
_WORTH_PACKING = 1 / 16
# After how many queries, of 10000, squares have half the area.
_HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square_side(
    query: int, height: int, width: int, p_init: float = 0.8, queries: int | None = None
) -> float:
    """The side of the square that has its share of the image, before rounding.

    Args:
        query: its number, from 0.
        p_init: the first share.
        queries: of a run that the schedule of 10000 is squeezed into.

    >>> [round(square_side(query, 32, 32)) for query in (0, 11, 51, 201, 501, 1001, 2001, 4001)]
    [29, 20, 14, 10, 7, 5, 4, 3]
    """
    if queries is not None:
        query = int(query / queries * 10000)
    return math.sqrt(p_init / 2 ** bisect.bisect_left(_HALVED, query) * height * width)


class Square:
    """Square Attack on a network.

    Args:
        norm: "linf" or "l2".
        eps: radius of the ball in units of the images, positive and finite.
        queries: forwards of an image after its start, in each restart.
        restarts: runs from random starts of their own.
        p_init: the share of an image that the first squares have.
        clip: the range of valid values, either of which may be None, or None.
        rescale_schedule: squeeze the schedule of 10000 queries into ``queries``.

    Raises:
        ValueError, TypeError: an argument outside what is listed here.

    Example:
        >>> from advfunmatch.attacks.draws import Draws, image_keys
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(4, 3, 2, 2)
        >>> x_adv = Square("linf", eps=0.1, queries=20)(Searched(net), x, net(x).argmax(1), Draws(0, image_keys(x)))
        >>> bool(((x_adv - x).abs() <= 0.1 + 1e-6).all())
        True
    """

    def __init__(
        self,
        norm: str = "linf",
        eps: float = 8 / 255,
        queries: int = 5000,
        restarts: int = 1,
        p_init: float = 0.8,
        clip: tuple[float | None, float | None] | None = (0.0, 1.0),
        *,
        rescale_schedule: bool = False,
    ) -> None:
        arguments.check_choice("norm", norm, arguments.NORMS)
        arguments.check_positive("eps", eps)
        arguments.check_counts(queries=(queries, 1), restarts=(restarts, 1))
        arguments.check_positive("p_init", p_init)
        if p_init > 1:
            raise ValueError(f"p_init must be a share of the image, at most 1, got {p_init}")
        self.norm, self.eps, self.p_init = norm, float(eps), float(p_init)
        self.queries, self.restarts = int(queries), int(restarts)
        self.clip = arguments.checked_clip(clip)
        self.rescale_schedule = rescale_schedule

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
            x: (N, C, H, W), floating point, in the clip range.
            y: (N,) labels, integers.
            draws: the random numbers of these images.
            progress: called with the number of images that are done with, which add up to N.

        Returns:
            x_adv: a misclassified point of each image, or the image itself where none was found. Shape, dtype and
            memory format of x; within the ball and the clip range to one rounding.
        """
        arguments.check_images(x, self.clip)
        if x.dim() != 4:
            raise ValueError(f"x must be images (N, C, H, W), got shape {tuple(x.shape)}")
        y = arguments.checked_labels(y, x)
        x_adv = Target(searched.network, None).in_its_format(x.detach()).clone()
        clean, left = x_adv.clone(), torch.arange(len(x), device=x.device)
        run = self._linf if self.norm == "linf" else self._l2
        for restart in range(self.restarts):
            if len(left) == 0:
                break
            search = _Search(searched, clean[left], y[left])
            run(search, clean[left], draws.rows(left), SQUARE + restart)
            search.finish()
            broken = search.broken
            x_adv[left[broken]] = search.points[broken]
            left = left[~broken]
            if progress is not None:
                progress(int(broken.sum()))
        if progress is not None:
            progress(len(left))
        return in_format_of(x_adv, x)

    def _linf(self, search: _Search, x: Tensor, draws: Draws, stream: int) -> None:
        channels, height, width = x.shape[1:]
        # What is added is ±2·eps, which from anywhere in the ball leads to one of its edges.
        high, low = (self._clipped(x + sign * self.eps) for sign in (1, -1))
        stripes = draws.signs(stream, 0, (channels, 1, width), x.dtype)
        state = SquareState.at(in_format_of(torch.where(stripes > 0, high, low), x))
        search.follow(state)
        for query in range(self.queries):
            at = query % _DRAWN
            if at == 0:
                places, signs = self._drawn(draws, stream, query, 2, channels, x.dtype)
                sides = [self._side(each, height, width) for each in range(query, query + _DRAWN)]
                room = torch.tensor([[height - side, width - side] for side in sides], device=x.device)
                corners = (places * room).long().transpose(0, 1).contiguous()
                is_high = (signs > 0).transpose(0, 1).contiguous()
            logits = search.searched.logits(state.x_adv)
            state = square_step(state, logits, search.y, high, low, corners[at], is_high[at], side=sides[at])
            if (kept := search.packed(at)) is not None:
                if search.is_over:
                    return
                state, high, low, draws = state.rows(kept), high[kept], low[kept], draws.rows(kept)
                corners, is_high = corners[:, kept], is_high[:, kept]
                search.follow(state)
        logits = search.searched.logits(state.x_adv)
        square_step(state, logits, search.y, high, low, corners[at], is_high[at], side=0)

    def _l2(self, search: _Search, x: Tensor, draws: Draws, stream: int) -> None:
        channels, height, width = x.shape[1:]
        search.begin(self._clipped(x + self.eps * _normalized(self._tiles(x, draws, stream))))
        for query in range(self.queries):
            at = query % _DRAWN
            if at == 0:
                places, signs = self._drawn(draws, stream, query, 5, channels, x.dtype)
            if (kept := search.packed(at)) is not None:
                x, draws, places, signs = x[kept], draws.rows(kept), places[kept], signs[kept]
            if search.is_over:
                return
            side = max(round(self._share(query, height, width)), 3)
            side = min(side + 1 - side % 2, height, width)
            first, second = (
                _Window(*_corners(places[:, at, k : k + 2], side, height, width), side, channels)
                for k in (0, 2)
            )
            delta = search.best - x
            spare = (self.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
            old = first.of(delta)
            first.put(delta, 0)
            freed = old.square().sum((2, 3), keepdim=True) + second.of(delta).square().sum(
                (2, 3), keepdim=True
            )
            second.put(delta, 0)
            colour = signs[:, at, :, None, None]
            new = _upright(_bump(side).to(x), places[:, at, 4]) * colour + old / (_length(old) + _NOTHING)
            first.put(delta, new / (_length(new) + _NOTHING) * (spare / channels + freed).sqrt())
            search.offer(self._clipped(x + self.eps * _normalized(delta)))

    def _tiles(self, x: Tensor, draws: Draws, stream: int) -> Tensor:
        """The start of "l2": tiles of both signs."""
        channels, height, width = x.shape[1:]
        side = max(min(height, width) // 5, 1)
        tops, lefts = (range(max(n - 5 * side, 0) // 2, n, side)[: n // side] for n in (height, width))
        tiles = [(top, left) for top in tops for left in lefts]
        places = draws.uniform(stream, 0, (len(tiles),), torch.float64)
        signs = draws.signs(stream, 1, (len(tiles), channels, 1, 1), x.dtype)
        delta = torch.zeros_like(x)
        for tile, (top, left) in enumerate(tiles):
            part = delta[:, :, top : top + side, left : left + side]
            whole = _upright(_bump(side).to(x), places[:, tile]) * signs[:, tile]
            part += whole[:, :, : part.shape[2], : part.shape[3]]
        return delta

    def _drawn(
        self, draws: Draws, stream: int, query: int, places: int, channels: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """What some queries to come will need: (N, queries, places) in [0, 1) and (N, queries, channels) signs."""
        drawn = 2 + 2 * (query // _DRAWN)
        uniform = draws.uniform(stream, drawn, (_DRAWN, places), torch.float64)
        return uniform, draws.signs(stream, drawn + 1, (_DRAWN, channels), dtype)

    def _side(self, query: int, height: int, width: int) -> int:
        return min(max(round(self._share(query, height, width)), 1), height, width)

    def _share(self, query: int, height: int, width: int) -> float:
        return square_side(query, height, width, self.p_init, self.queries if self.rescale_schedule else None)

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(*self.clip)


class _Search:
    """The best point of each image; those that are not done are packed.

    Attributes:
        points, broken: of all images, once `is_over`.
        best, margin: of those that take part.
    """

    def __init__(self, searched: Searched, x: Tensor, y: Tensor) -> None:
        self.searched, self.y, self.points = searched, y, torch.empty_like(x)
        self.left = torch.arange(len(y), device=y.device)
        self.broken = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        self.is_over = False

    def begin(self, start: Tensor) -> None:
        self.best, self.margin = start, self._margin(start)

    def follow(self, state: SquareState) -> None:
        """The best points and margins are those of a state, also when it is written."""
        self.best, self.margin = state.x_best, state.margin

    def offer(self, proposed: Tensor) -> None:
        """Keep what lowers the margin of an image that is not done."""
        margin = self._margin(proposed)
        better = (margin < self.margin) & (self.margin > 0)
        self.margin = torch.where(better, margin, self.margin)
        self.best = torch.where(better.view(-1, 1, 1, 1), proposed, self.best)

    def packed(self, query: int) -> Tensor | None:
        """Which of those that take part still are to; None where nothing is to change."""
        if self.margin.is_cuda and query > 0:
            return None  # to ask is to wait for the device
        kept = (self.margin > 0).nonzero().squeeze(1)
        if len(kept) > 0 and len(kept) > (1 - _WORTH_PACKING) * len(self.left):
            return None
        self._store()
        self.is_over = len(kept) == 0
        self.left, self.y = self.left[kept], self.y[kept]
        self.best, self.margin = self.best[kept], self.margin[kept]
        return kept

    def finish(self) -> None:
        """Store what still takes part."""
        if not self.is_over:
            self._store()

    def _store(self) -> None:
        self.points[self.left] = self.best
        self.broken[self.left] = self.margin < 0
        tied = ((self.margin <= 0) & (self.margin >= 0)).nonzero().squeeze(1)
        if len(tied):
            self.broken[self.left[tied]] = self.searched.logits(self.best[tied]).argmax(1) != self.y[tied]

    def _margin(self, points: Tensor) -> Tensor:
        logits, label = self.searched.logits(points), self.y[:, None]
        return logits.gather(1, label).squeeze(1) - logits.scatter(1, label, -torch.inf).amax(1)


class _Window:
    """A square of each image, at a place of its own."""

    def __init__(self, top: Tensor, left: Tensor, side: int, channels: int) -> None:
        along = torch.arange(side, device=top.device)
        self.index = (
            torch.arange(len(top), device=top.device)[:, None, None, None],
            torch.arange(channels, device=top.device)[:, None, None],
            (top[:, None] + along)[:, None, :, None],
            (left[:, None] + along)[:, None, None, :],
        )

    def of(self, images: Tensor) -> Tensor:
        """(N, C, side, side)."""
        return images[self.index]

    def put(self, images: Tensor, value: Tensor | float) -> None:
        images[self.index] = value


def _corners(places: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Top and left of squares, from (N, 2) in [0, 1)."""
    top, left = (places * torch.tensor([height - side, width - side], device=places.device)).long().unbind(1)
    return top, left


def _upright(bump: Tensor, place: Tensor) -> Tensor:
    """(N, 1, side, side): turned for half of the images."""
    return torch.where((place > 0.5).view(-1, 1, 1, 1), bump.T, bump)


@cache
def _bump(side: int) -> Tensor:
    """(side, side) float64 of length 1: a hill, and a hollow below it."""
    upper = side // 2
    bump = torch.cat([_hill(upper, side), -_hill(side - upper, side)])
    return bump / torch.linalg.vector_norm(bump)


def _hill(height: int, width: int) -> Tensor:
    """Of length 1: 1 + 1/4 + 1/9 + … in the middle, a term less with each ring of pixels around it."""
    tops, lefts = ((torch.arange(n) - n // 2).abs() for n in (height, width))
    rings = torch.maximum(tops[:, None], lefts)
    terms = (1 / torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64)).square()
    hill = terms.flip(0).cumsum(0).flip(0)[rings]
    return hill / torch.linalg.vector_norm(hill)


def _length(window: Tensor) -> Tensor:
    return window.square().sum((2, 3), keepdim=True).sqrt()


def _normalized(delta: Tensor) -> Tensor:
    return delta / (delta.square().sum((1, 2, 3), keepdim=True).sqrt() + _NOTHING)
