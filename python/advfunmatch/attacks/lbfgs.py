"""The attack of Szegedy et al. (2014, "Intriguing properties of neural networks", section 4.1): box-constrained L-BFGS.

For a class t that is not the label it minimises c‖x' − x‖² + CE(z(x'), t) over images x' in their range, and looks for
the largest c whose minimiser is adversarial. The square stands for the paper's c|r|, whose kink at the clean image no
quasi-Newton method gets past; both have the same minimisers, for other c.

The minimiser is SciPy's L-BFGS-B (Byrd, Lu, Nocedal and Zhu 1995), which handles the box exactly, with active sets.
torch.optim.LBFGS knows no box, and one line search for all images of a batch, so that an image's result would depend on
the others. The price is that images are attacked one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..lean import vjp
from .nearest import Nearest, Progress, Search, check_settings, is_wrong

__all__ = ["lbfgs"]


def lbfgs(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "l2",
    targets: int = 1,
    search_steps: int = 9,
    steps: int = 100,
    initial_const: float = 1.0,
    clip: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> Nearest:
    """The nearest adversarial image that box-constrained L-BFGS finds.

    Args:
        network: maps images to logits (N, C), C at least 2; in eval mode.
        x: (N, ...) images within ``clip``.
        y: (N,) integer labels.
        norm: in which the nearest of all images that were looked at is chosen; what is minimised is l2 in either.
        targets: how many classes are aimed at one after another, those with the largest logits of the clean image
            first; at most C − 1 are.
        search_steps: how many c are tried for each target: a tenth or ten times the last until one succeeds and one
            fails, then the geometric mean of these two.
        steps: of L-BFGS for each c, at most.
        initial_const: the first c, per squared unit of the images.
        clip: lowest and highest value of an image.
        progress: called with the number of images done.

    Raises:
        TypeError, ValueError: an argument that cannot be.
        ModuleNotFoundError: SciPy is not installed.

    Example:
        >>> network = torch.nn.Linear(2, 2).eval()
        >>> found = lbfgs(network, torch.rand(4, 2), torch.zeros(4, dtype=torch.long))
        >>> found.distances.shape
        torch.Size([4])
    """
    import scipy.optimize  # noqa: F401, before anything takes its time

    check_settings(
        initial_const=(initial_const, 0, False),
        targets=(targets, 1, True),
        search_steps=(search_steps, 1, True),
        steps=(steps, 1, True),
    )
    search = Search(network, x, y, norm, clip)
    others = search.clean.scatter(1, search.y[:, None], -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )
    count = min(targets, search.clean.shape[1] - 1)
    waiting = set(search.wanted.tolist())
    for row in range(len(x)):
        if row in waiting:
            for target in others[row, :count].tolist():
                _line_search(search, row, target, search_steps, steps, initial_const)
        if progress is not None:
            progress(row + 1)
    return search.result()


def _line_search(
    search: Search, row: int, target: int, search_steps: int, steps: int, initial_const: float
) -> None:
    """For one image and target, towards the largest c that succeeds."""
    const, lower, upper = initial_const, 0.0, math.inf  # the largest that succeeded, the smallest that failed
    for _ in range(search_steps):
        if _minimise(search, row, target, steps, const):
            lower = const
            const = 10 * const if upper == math.inf else math.sqrt(const * upper)
        else:
            upper = const
            const = const / 10 if lower == 0 else math.sqrt(const * lower)


def _minimise(search: Search, row: int, target: int, steps: int, const: float) -> bool:
    """Whether the minimiser of one c is adversarial; offers every image that it looks at."""
    from scipy.optimize import Bounds, minimize

    rows = torch.tensor([row], device=search.x.device)
    x = search.x[rows]
    clean = x.double().flatten().cpu().numpy()
    won = False

    def objective(values):  # type: ignore[no-untyped-def]
        nonlocal won
        image = torch.from_numpy(values).view(x.shape).to(x)
        logits, pullback = vjp(search.prepared, image)
        logits = logits.double()
        wrong = is_wrong(logits, search.y[rows])
        won = bool(wrong)
        if won:
            search.offer(rows, image, wrong)
        log_p = logits.log_softmax(1)
        grad_logits = log_p.exp()
        grad_logits[:, target] -= 1
        gradient = pullback(grad_logits).double()
        search.saw(rows, gradient)
        change = values - clean
        loss = const * (change @ change) - float(log_p[0, target])
        return loss, 2 * const * change + gradient.flatten().cpu().numpy()

    # A change of the loss below its rounding says nothing; SciPy's own bound is float64's, and costs three times the
    # evaluations in float32 (2356 instead of 6760 on six digits) for the same images.
    options = {"maxiter": steps, "ftol": 10 * torch.finfo(search.dtype).eps}
    bounds = Bounds(search.low, search.high)
    found = minimize(objective, clean.copy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    objective(found.x)  # of the last call, which is not always the minimiser
    return won
