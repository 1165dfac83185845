"""The attacks of Carlini and Wagner (2017, "Towards Evaluating the Robustness of Neural Networks"): the nearest
adversarial image by Adam, in l2 and in linf.

Note [Carlini and Wagner]
~~~~~~~~~~~~~~~~~~~~~~~~~
An image is x(w) = low + (high − low)(tanh w + 1)/2, which no w takes out of its range, and f(x) = max(0, z_y −
max_{j≠y} z_j + κ) is zero once the label has lost by κ.

* l2 minimises ‖x(w) − x‖² + c·f(x(w)), from w of the clean image, for one c after another: ten times as large until
  one succeeds, then between the largest that failed and the smallest that did not. The nearest success is kept.
* linf minimises c·f(x(w)) + Σ max(0, |x(w) − x| − τ), τ = 1 at first. Once that is next to zero and the image
  adversarial, τ becomes 0.9 times the largest change, and all begins again from that image; where it is not in so many
  steps, c is doubled. It ends where τ is below a grey level, 1/256, or c above its limit.

Steps, settings and defaults are those of the authors' own code (github.com/carlini/nn_robust_attacks, l2_attack.py and
li_attack.py, untargeted), with two differences: every image is judged by its own loss, where that code gives up on a
whole batch by the batch's (so that a result does not depend on what else is in the batch); and it tells the images
that have succeeded with κ > 0 by a margin of κ, where that code's untargeted form is off by the sign of κ. Distances,
τ and the range of steps are in the unit of the images; that code's range of 1 is the default's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..lean import vjp
from .nearest import Nearest, Progress, Search, check_settings, is_wrong

__all__ = ["carlini_wagner", "carlini_wagner_linf"]

_INSIDE = 0.999999  # by which images are shrunk, so that black and white have a finite w
_NO_UPPER = 1e10  # an upper bound of c that stands for none
_SMALL = 1e-4  # share of c below which the loss of the linf form counts as zero


def carlini_wagner(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    confidence: float = 0.0,
    learning_rate: float = 0.01,
    search_steps: int = 9,
    steps: int = 10_000,
    initial_const: float = 1e-3,
    abort_early: bool = True,
    clip: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> Nearest:
    """The nearest adversarial image in l2 that Carlini and Wagner's attack finds; see Note [Carlini and Wagner].

    Args:
        network: maps images to logits (N, C), C at least 2; in eval mode.
        x: (N, ...) images within ``clip``.
        y: (N,) integer labels.
        confidence: κ, by which another class must beat the label, in the unit of the logits.
        learning_rate: Adam's, in the unit of w.
        search_steps: how many c are tried.
        steps: of Adam for each c, at most.
        initial_const: the first c.
        abort_early: leave an image alone, for this c, where its loss has not fallen in a tenth of the steps.
        clip: lowest and highest value of an image.
        progress: called with the number of images done.

    Raises:
        TypeError, ValueError: an argument that cannot be.

    Example:
        >>> network = torch.nn.Linear(2, 2).eval()
        >>> found = carlini_wagner(network, torch.rand(4, 2), torch.zeros(4, dtype=torch.long), steps=200)
        >>> found.distances.shape
        torch.Size([4])
    """
    check_settings(
        learning_rate=(learning_rate, 0, False),
        initial_const=(initial_const, 0, False),
        steps=(steps, 1, True),
        search_steps=(search_steps, 1, True),
    )
    if not 0 <= confidence < float("inf"):
        raise ValueError(f"confidence must be 0 or more, and finite, got {confidence}")
    search = Search(network, x, y, "l2", clip)
    tanh = _Tanh(search)
    rows = search.wanted
    const = torch.full((len(rows),), initial_const, dtype=search.dtype, device=x.device)
    lower, upper = torch.zeros_like(const), torch.full_like(const, _NO_UPPER)
    for index in range(search_steps):
        if search_steps >= 10 and index == search_steps - 1:
            const = upper  # the smallest that succeeded, once more
        succeeded = torch.zeros_like(rows, dtype=torch.bool)
        part = (index, search_steps, progress)
        _minimise(search, tanh, const, succeeded, confidence, learning_rate, steps, abort_early, part)
        upper = torch.where(succeeded, torch.minimum(upper, const), upper)
        lower = torch.where(succeeded, lower, torch.maximum(lower, const))
        known = upper < _NO_UPPER / 10
        const = torch.where(known, (lower + upper) / 2, torch.where(succeeded, const, 10 * const))
    return search.result()


def _minimise(
    search: Search,
    tanh: _Tanh,
    const: Tensor,
    succeeded: Tensor,
    confidence: float,
    learning_rate: float,
    steps: int,
    abort_early: bool,
    part: tuple[int, int, Progress | None],
) -> None:
    """Adam with one c for each wanted image; sets the flags of those that succeed."""
    place = torch.arange(len(search.wanted), device=const.device)  # among the wanted, of each that goes on
    w, clean = tanh.variable(search.x[search.wanted]), tanh.shrunk(search.x[search.wanted])
    adam = _Adam(w, learning_rate)
    before = torch.full_like(const, 1e6)
    tenth = max(1, steps // 10)
    for step in range(steps):
        if not len(place):
            break
        rows = search.wanted[place]
        images, slope = tanh.image(w)
        logits, pullback = vjp(search.prepared, images.to(search.x.dtype))
        f, grad_logits = _margin(logits.to(search.dtype), search.y[rows], confidence)
        change = images - clean
        leaves = torch.zeros_like(f, dtype=torch.bool)
        if abort_early and step % tenth == 0:
            loss = const[place] * f + change.square().flatten(1).sum(1)
            leaves = ~(loss <= 0.9999 * before)
            before = loss
        won = is_wrong(logits.to(search.dtype), search.y[rows], confidence) & ~leaves
        succeeded[place] |= won
        search.offer(rows, images.to(search.x.dtype), won)
        gradient = pullback(grad_logits * const[place, None]).to(search.dtype)
        search.saw(rows, gradient)
        w = w - adam.step((gradient + 2 * change) * slope)
        if step % tenth == 0:
            _tell(part, step / steps, len(search.x))
            if bool(leaves.any()):
                stays = ~leaves
                place, w, clean, before = place[stays], w[stays], clean[stays], before[stays]
                adam.rows(stays)
    _tell(part, 1.0, len(search.x))


def carlini_wagner_linf(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    learning_rate: float = 5e-3,
    steps: int = 1000,
    initial_const: float = 1e-5,
    largest_const: float = 20.0,
    const_factor: float = 2.0,
    decrease_factor: float = 0.9,
    clip: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> Nearest:
    """The nearest adversarial image in linf that Carlini and Wagner's attack finds; see Note [Carlini and Wagner].

    Args:
        network, x, y, learning_rate, initial_const, clip, progress: as for `carlini_wagner`.
        steps: of Adam for each c and τ, at most.
        largest_const: c ends below it.
        const_factor: by which c grows, above 1.
        decrease_factor: by which τ shrinks, below 1.

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """
    check_settings(
        learning_rate=(learning_rate, 0, False),
        initial_const=(initial_const, 0, False),
        largest_const=(largest_const, 0, False),
        const_factor=(const_factor, 1, False),
        decrease_factor=(decrease_factor, 0, False),
        steps=(steps, 1, True),
    )
    if decrease_factor >= 1:
        raise ValueError(f"decrease_factor must be below 1, got {decrease_factor}")
    search = Search(network, x, y, "linf", clip)
    tanh = _Tanh(search)
    rows = search.wanted if initial_const < largest_const else search.wanted[:0]
    w, clean = tanh.variable(search.x[rows]), tanh.shrunk(search.x[rows])
    adam = _Adam(w, learning_rate)
    tau = torch.ones(len(rows), dtype=search.dtype, device=x.device) * (search.high - search.low)
    smallest_tau = (search.high - search.low) / 256
    const = torch.full_like(tau, initial_const)
    step = torch.zeros_like(rows)
    small = torch.zeros_like(rows, dtype=torch.bool)  # the loss of the step before was
    while len(rows):
        images, slope = tanh.image(w)
        logits, pullback = vjp(search.prepared, images.to(search.x.dtype))
        logits = logits.to(search.dtype)
        won = small & is_wrong(logits, search.y[rows])
        search.offer(rows, images.to(search.x.dtype), won)
        ended = ~won & (step == steps)
        const = torch.where(ended, const_factor * const, const)
        step = torch.where(ended, 0, step) + 1
        f, grad_logits = _margin(logits, search.y[rows], 0.0)
        change = images - clean
        over = (change.abs() - _each(tau, change)).clamp_min(0)
        small = const * f + over.flatten(1).sum(1) < _SMALL * const
        gradient = pullback(grad_logits * const[:, None]).to(search.dtype)
        search.saw(rows, gradient)
        w = w - adam.step((gradient + change.sign() * (over > 0)) * slope)
        leaves = ended & (const >= largest_const)
        if bool(won.any()):
            reached = search.distance(rows, images).to(tau.dtype)
            tau = torch.where(won, decrease_factor * torch.minimum(tau, reached), tau)
            w = torch.where(_each(won, w), tanh.variable(images), w)
            adam.restart(won)
            step, small = step.masked_fill(won, 0), small & ~won
            leaves |= won & (tau <= smallest_tau)
        if bool(leaves.any()):
            stays = ~leaves
            rows, w, clean, tau, const = rows[stays], w[stays], clean[stays], tau[stays], const[stays]
            step, small = step[stays], small[stays]
            adam.rows(stays)
            if progress is not None:
                progress(len(x) - len(rows))
    return search.result()


class _Tanh:
    """Images as tanh of a variable."""

    def __init__(self, search: Search) -> None:
        self.low, self.span, self.dtype = search.low, search.high - search.low, search.dtype

    def variable(self, images: Tensor) -> Tensor:
        """w of images."""
        unit = 2 * (images.to(self.dtype) - self.low) / self.span - 1
        return (_INSIDE * unit.clamp(-1, 1)).atanh()

    def shrunk(self, images: Tensor) -> Tensor:
        """Images as their w has them."""
        return self.image(self.variable(images))[0]

    def image(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Images of w, and their derivative by it."""
        unit = w.tanh()
        return (unit + 1) * (self.span / 2) + self.low, (1 - unit.square()) * (self.span / 2)


class _Adam:
    """The steps of Adam (Kingma and Ba 2015, the form that ends section 2), each image's counted from its own start."""

    def __init__(self, like: Tensor, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.count = torch.zeros(len(like), dtype=torch.float64, device=like.device)

    def step(self, gradient: Tensor) -> Tensor:
        """What is to be subtracted."""
        self.count += 1
        self.mean.lerp_(gradient, 1 - 0.9)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        size = self.learning_rate * (1 - 0.999**self.count).sqrt() / (1 - 0.9**self.count)
        return self.mean / self.square.sqrt().add_(1e-8) * _each(size.to(gradient.dtype), gradient)

    def rows(self, kept: Tensor) -> None:
        """Goes on with some of the images."""
        self.mean, self.square, self.count = self.mean[kept], self.square[kept], self.count[kept]

    def restart(self, which: Tensor) -> None:
        """These images begin again."""
        for state in (self.mean, self.square, self.count):
            state.masked_fill_(_each(which, state), 0)


def _margin(logits: Tensor, y: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """f of Note [Carlini and Wagner], (N,), and its gradient by the logits."""
    label = y[:, None]
    other, which = logits.scatter(1, label, -torch.inf).max(1)
    margin = logits.gather(1, label)[:, 0] - other + confidence
    gradient = torch.zeros_like(logits).scatter_(1, label, 1.0).scatter_(1, which[:, None], -1.0)
    return margin.clamp_min(0), gradient * (margin >= 0)[:, None]


def _each(values: Tensor, like: Tensor) -> Tensor:
    """One value for each image, in its shape."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _tell(part: tuple[int, int, Progress | None], share: float, images: int) -> None:
    index, parts, progress = part
    if progress is not None:
        progress(int(images * (index + share) / parts))
