"""From checked arguments to a loss: its reduction, its backend, and autograd where somebody differentiates.

The four reductions stand on operators that know two: row values, and their sum, times a scale.

Note [Means in a graph]
~~~~~~~~~~~~~~~~~~~~~~~
Eager calls fold the divisor of a mean into the operator's ``scale``. A compiled or exported graph holds the batch size
as a symbol, which a float argument of an operator would pin to one value (a recompilation for each, and no export at
all): there a mean is a sum, divided outside of the operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afm_kernels import ops
from afm_kernels.autograd.fused import (
    LOSS_OPS,
    Call,
    FusedLoss,
    is_watched,
    prefers_recompute,
    transformed_loss,
)
from afm_kernels.functional.checks import Logits, check_choice

_REDUCTIONS = ("none", "sum", "mean", "batchmean")


def fused_loss(
    stem: str,
    logits: Logits,
    tensors: tuple[Tensor | None, ...],
    params: tuple[Any, ...],
    grad_params: tuple[Any, ...],
    reduction: str,
    factor: float,
    recompute: bool | None,
) -> Tensor:
    """A loss of checked arguments, times ``factor``. The others are in the order of its operators."""
    student, teacher, rows, num_classes = logits
    if rows == 0:
        return _loss_of_no_rows(reduction, logits)
    reduction_index = 1
    if reduction == "batchmean" or reduction == "mean":
        divisor = rows if reduction == "batchmean" else rows * num_classes
        if torch.compiler.is_compiling():  # See Note [Means in a graph].
            total = fused_loss(stem, logits, tensors, params, grad_params, "sum", factor, recompute)
            return total / divisor
        factor = factor / divisor
    elif reduction != "sum":
        check_choice("reduction", reduction, _REDUCTIONS)
        reduction_index = 0

    device_type = student.device.type
    backend = ops.backend_for(LOSS_OPS[stem].forward, device_type)
    if torch._C._are_functorch_transforms_active():
        call = Call(stem, device_type, backend, params, grad_params, reduction_index, factor)
        return transformed_loss(call, student, teacher, *tensors)
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        if recompute is None:
            recompute = prefers_recompute(stem, student, teacher, backend)
            watched = recompute and is_watched(stem, reduction_index, backend)
        else:
            watched = False
        call = Call(
            stem, device_type, backend, params, grad_params, reduction_index, factor, recompute, watched
        )
        return FusedLoss.apply(call, student, teacher, *tensors)
    loss, _ = ops.kernel(LOSS_OPS[stem].forward, device_type, backend)(
        student, teacher, *tensors, *params, reduction_index, factor
    )
    return loss


def _loss_of_no_rows(reduction: str, logits: Logits) -> Tensor:
    """What a loss is where there are no rows: none keeps its shape, sum is 0, mean and batchmean are NaN.

    It hangs on both logits, so that a backward gives them their empty gradients.
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    dtype = ops.accumulation_dtype(logits.student, logits.teacher)
    nothing = logits.student.sum(-1, dtype=dtype) + logits.teacher.sum(-1, dtype=dtype)
    if reduction == "none":
        return nothing
    return nothing.sum() if reduction == "sum" else nothing.sum() * torch.nan
