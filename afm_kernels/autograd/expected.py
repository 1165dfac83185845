"""The upstream gradient that a loss is likely to meet: the one that the losses before it met.

Note [Expected gradients]
~~~~~~~~~~~~~~~~~~~~~~~~~
Where rows are long, memory is what costs. Recomputing moves six tensors of the logits' size: both sides read in the
forward, read again and both gradients written in the backward; five where one gradient is wanted. Gradients made in the
forward move four, or three, but what the loss is multiplied with afterwards is not known then, and scaling them takes
four more, or two. float16 has to know it: scaled afterwards, a gradient has underflowed already.

It is nearly always known, though: a training run multiplies its loss with the same weight, loss scale or share of an
accumulated batch at every step, or with nothing. So once the last ``STREAK`` losses over as many classes met one and
the same upstream gradient, ``recompute=None`` makes the gradients for it in the forward. The backward compares, which
waits for nobody on a CPU. If something else came, it recomputes, as it does where nothing is expected, and the next
``STREAK`` losses recompute too.

What was expected shows in time and memory only: the operator that makes gradients for an expected upstream gradient
gives the bits that the recomputing backward gives for it.

Where somebody else looks after saved tensors (torch.autograd.graph.saved_tensors_hooks) none of this happens:
torch.utils.checkpoint runs a forward again in the backward, other losses later, and has to find the same tensors saved.
"""

from __future__ import annotations

STREAK = 4
"""How many equal upstream gradients in a row make the next one expected. A wrong guess moves ten tensors in place of
six, a right one four."""

_met: dict[
    int, tuple[float, int]
] = {}  # number of classes -> the last upstream gradient, and how often in a row


def expected_gradient(num_classes: int) -> float | None:
    """What the next loss over so many classes is expected to meet; None where nothing is."""
    value, times = _met.get(num_classes, (0.0, 0))
    return value if times >= STREAK else None


def meet_gradient(num_classes: int, value: float) -> None:
    """To be told of each upstream gradient of a loss that asked what to expect."""
    last, times = _met.get(num_classes, (value, 0))
    _met[num_classes] = value, times + 1 if value == last else 1


def forget_gradients() -> None:
    """Back to no expectations, as in a new process."""
    _met.clear()
