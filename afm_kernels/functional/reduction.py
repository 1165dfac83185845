"""The four reductions, on top of operators that know two: row values, and their sum, times a scale."""

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
