"""The one table of tolerances, and the assertions that use it.

Truth is float64. An implementation passes where its error is no larger than that of PyTorch's own log-space form in
the same dtype, plus what the table allows for rounding the result. So a tolerance never hides an error that PyTorch
does not make, and hard rows, where PyTorch gives NaN, have to be right by the table alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """``relative`` to the value, or to the largest value of its row where that is larger; ``absolute`` in addition."""

    relative: float
    absolute: float


#: Losses are float32, or float64, whatever the logits: the dtype here is the loss's.
LOSS = {
    # Sums of up to 4099 terms in chunks of a vector: a few ulp (1.2e-7) times the square root of the number of chunks.
    torch.float32: Tolerance(3e-6, 1e-9),
    # The truth's own rounding, with sums as above.
    torch.float64: Tolerance(1e-12, 1e-15),
}

#: Gradients have the dtype of their logits: one rounding of the exact gradient, half an ulp, and half as much again.
GRADIENT = {
    # 25 ulp: p and q carry the rounding of exp's argument, which grows with the logits (saturated rows: 100 · 2⁻²⁴).
    torch.float32: Tolerance(3e-6, 1e-12),
    torch.float64: Tolerance(1e-12, 1e-18),
    torch.bfloat16: Tolerance(0.75 * 2**-7, 1e-12),
    # Subnormal halves are 6e-8 apart.
    torch.float16: Tolerance(0.75 * 2**-10, 6e-8),
}

# PyTorch's error counts by the row's largest, and twice: two errors of one size differ by chance.
PEER = 2.0

# Two roundings of a gradient where it is made in the forward and scaled in the backward.
TWO_ROUNDINGS = 2.0


def same_specials(actual: Tensor, truth: Tensor) -> bool:
    """Whether NaN and infinities are where they belong."""
    actual, truth = actual.double().cpu(), truth.double().cpu()
    return bool(
        torch.equal(actual.isnan(), truth.isnan())
        and torch.equal(actual == torch.inf, truth == torch.inf)
        and torch.equal(actual == -torch.inf, truth == -torch.inf)
    )


def excess(
    actual: Tensor,
    truth: Tensor,
    eager: Tensor | None,
    tolerance: Tolerance,
    factor: float = 1.0,
    terms: Tensor | None = None,
) -> float:
    """The largest error in units of what is allowed: at most 1 passes.

    The scale of an entry is the largest magnitude in its row (last dimension): where a softmax is saturated, a tiny
    gradient is the difference of two roundings of a large one. ``terms``, one a row, says how large the numbers were
    whose difference a gradient is: an eighth of it counts as scale (6 roundings of float32).
    """
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    if actual.numel() == 0:
        return 0.0
    finite = truth.isfinite()
    scale = truth.abs().masked_fill(~finite, 0)
    if truth.dim() > 0:
        scale = scale.amax(-1, keepdim=True).expand_as(truth)
    if terms is not None:
        scale = scale.maximum(terms.double().cpu().unsqueeze(-1) / 8)
    allowed = factor * (tolerance.relative * scale + tolerance.absolute)
    if eager is not None:
        eager = eager.detach().double().cpu()
        error = (eager - truth).abs()
        error = error.masked_fill(~(error.isfinite() & finite), 0)
        allowed = allowed + PEER * (error.amax(-1, keepdim=True) if truth.dim() else error)
    return float(((actual - truth).abs() / allowed).masked_fill(~finite, 0).max())


def assert_loss(
    actual: Tensor, truth: Tensor, eager: Tensor | None = None, terms: Tensor | None = None
) -> None:
    """Row losses, one a row. ``terms`` as in ``excess``."""
    assert same_specials(actual, truth), f"specials differ: {actual} for {truth}"
    # A row's own magnitude is its scale: each is a row of one value.
    worst = excess(
        actual.unsqueeze(-1),
        truth.unsqueeze(-1),
        None if eager is None else eager.unsqueeze(-1),
        LOSS[actual.dtype],
        terms=terms,
    )
    assert worst <= 1, f"{worst:.2f} times the allowed error"


def assert_gradient(
    actual: Tensor,
    truth: Tensor,
    eager: Tensor | None = None,
    factor: float = 1.0,
    terms: Tensor | None = None,
) -> None:
    """A gradient, class dimension last. ``terms`` as in ``excess``; ``truth.gradient_terms`` computes them."""
    assert same_specials(actual, truth), "specials differ"
    worst = excess(actual, truth, eager, GRADIENT[actual.dtype], factor, terms)
    assert worst <= 1, f"{worst:.2f} times the allowed error"


def relative_l2(actual: Tensor, truth: Tensor) -> float:
    """‖actual - truth‖ / ‖truth‖, in float64."""
    actual, truth = actual.double(), truth.double()
    return float((actual - truth).norm() / truth.norm())
