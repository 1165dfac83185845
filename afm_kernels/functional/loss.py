"""From checked arguments to a loss: its reduction, its backend, and autograd where somebody differentiates.

The four reductions stand on operators that know two: row values, and their sum, times a scale.

Note [Means in a graph]
~~~~~~~~~~~~~~~~~~~~~~~
Eager calls fold the divisor of a mean into the operator's ``scale``. A compiled or exported graph holds the batch size
as a symbol, which a float argument of an operator would pin to one value (a recompilation for each, and no export at
all): there a mean is a sum, divided outside of the operator.

Note [Calls like one before]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Small batches live on overhead, and after any batch that fills the caches Python's and PyTorch's code is in main memory.
Checks and bookkeeping were a third of a loss with both gradients at 128 x 10, and a quarter at 512 x 1000 where calls
of others come between. So options that were found good once are looked up by their values, and the tensors are left to
the compiled operator, which looks at them anyway. Where it refuses, or anything else is not as expected, ``quick_loss``
and ``quick_gradients`` return None, and the checks of the long way say what is wrong, if something is. That saves a
sixth and a seventh of these calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from afm_kernels import ops
from afm_kernels.autograd.fused import (
    LOSS_OPS,
    RECOMPUTE_FROM,
    Call,
    FusedLoss,
    QuickLoss,
    QuickRecompute,
    is_watched,
    prefers_recompute,
    transformed_loss,
)
from afm_kernels.functional.checks import Logits, check_choice

_REDUCTIONS = ("none", "sum", "mean", "batchmean")

REFUSALS = (RuntimeError, TypeError, AttributeError, IndexError, ZeroDivisionError)
"""What a call without checks may meet: an operator that refuses, something that is no tensor, or one without rows."""

_QUICK = "cpp" in ops.TABLE["softmax_kl_forward_grad", "cpu"]
_LONG = RECOMPUTE_FROM["cpp"]["softmax_kl"]
_MOST_REMEMBERED = 1024  # a temperature may be a schedule

_good: dict[tuple[Any, ...], Any] = {}


def remember(options: tuple[Any, ...], meaning: Any) -> None:
    """To be told of options that turned out good, and what the quick way needs to know of them."""
    if len(_good) >= _MOST_REMEMBERED:
        _good.clear()
    _good[options] = meaning


def _is_plain(student: Tensor, teacher: Tensor) -> bool:
    """Whether the compiled CPU operators serve an eager call, and no transform is about."""
    return (
        _QUICK
        and student.is_cpu
        and teacher.is_cpu
        and ops.selection.name == "auto"
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def quick_loss(
    options: tuple[Any, ...], student: Tensor, teacher: Tensor, recompute: bool | None
) -> Tensor | None:
    """softmax_kl of options that were good before; None where it takes the long way. Not for compiled calls."""
    try:
        params, reduction, factor = _good[options]
        if not _is_plain(student, teacher):
            return None
        num_classes = student.shape[-1]
        rows = student.numel() // num_classes
        if reduction == "batchmean":
            factor /= rows
        elif reduction == "mean":
            factor /= rows * num_classes
        elif reduction == "none" or rows == 0:
            return None
        if not (torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)):
            forward = ops.kernel("softmax_kl_forward", "cpu", "cpp")
            return forward(student, teacher, None, *params, 1, factor)[0]
        if student.is_inference() or teacher.is_inference():
            return None
        half = torch.float16
        watched = False
        if recompute is None:
            if num_classes < _LONG and student.dtype is not half and teacher.dtype is not half:
                recompute = False
            else:
                watched = is_watched("softmax_kl", student, teacher, 1, "cpp")
                recompute = watched or prefers_recompute("softmax_kl", student, teacher, "cpp")
        call = Call("softmax_kl", "cpu", "cpp", params, (), 1, factor, recompute, watched)
        function = FusedLoss if watched else QuickRecompute if recompute else QuickLoss
        return function.apply(student, teacher, call, None)
    except (KeyError, *REFUSALS):
        return None


def quick_gradients(
    options: tuple[Any, ...], student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor] | None:
    """As ``quick_loss``, for both gradients of the summed loss."""
    try:
        params = _good[options]
        if not _is_plain(student, teacher) or student.numel() == 0:
            return None
        recording = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # as torch.no_grad, which costs as much as all the checks together
        try:
            return ops.kernel("softmax_kl_grad", "cpu", "cpp")(
                student, teacher, None, *params, 1.0, True, True
            )
        finally:
            torch._C._set_grad_enabled(recording)
    except (KeyError, *REFUSALS):
        return None


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
        watched = False
        if recompute is None:
            watched = is_watched(stem, student, teacher, reduction_index, backend)
            recompute = watched or prefers_recompute(stem, student, teacher, backend)
        call = Call(
            stem, device_type, backend, params, grad_params, reduction_index, factor, recompute, watched
        )
        return FusedLoss.apply(student, teacher, call, *tensors)
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
