"""The four reductions, on top of operators that know two: row values, and their sum, times a scale.

Note [Means in a graph]
~~~~~~~~~~~~~~~~~~~~~~~
Eager calls fold the divisor of a mean into the operator's ``scale``. A compiled or exported graph holds the batch size
as a symbol, which a float argument of an operator would pin to one value (a recompilation for each, and no export at
all): there a mean is a sum, divided outside of the operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afm_kernels.functional.checks import Logits, check_choice
from afm_kernels.ops import accumulation_dtype

_NAMES = ("none", "sum", "mean", "batchmean")


def reduction_and_scale(reduction: str, logits: Logits) -> tuple[int, float]:
    """The operators' ``reduction`` and ``scale`` for one of the four names; there is at least one row."""
    if reduction == "batchmean":
        return 1, 1.0 / logits.rows
    if reduction == "sum":
        return 1, 1.0
    if reduction == "mean":
        return 1, 1.0 / (logits.rows * logits.num_classes)
    check_choice("reduction", reduction, _NAMES)
    return 0, 1.0


def divides_outside(reduction: str) -> bool:
    """Whether this mean is to be taken from the sum. See Note [Means in a graph]."""
    return (reduction == "batchmean" or reduction == "mean") and torch.compiler.is_compiling()


def divisor(reduction: str, logits: Logits) -> int:
    return logits.rows if reduction == "batchmean" else logits.rows * logits.num_classes


def loss_of_no_rows(reduction: str, logits: Logits) -> Tensor:
    """What a loss is where there are no rows: none keeps its shape, sum is 0, mean and batchmean are NaN.

    It hangs on both logits, so that a backward gives them their empty gradients.
    """
    check_choice("reduction", reduction, _NAMES)
    dtype = accumulation_dtype(logits.student, logits.teacher)
    nothing = logits.student.sum(-1, dtype=dtype) + logits.teacher.sum(-1, dtype=dtype)
    if reduction == "none":
        return nothing
    return nothing.sum() if reduction == "sum" else nothing.sum() * torch.nan
