"""From a loss's rows to its operators: weights, reductions, and gradients as their logits lie in memory.

The operators take their arguments by position, in the order of ``schemas.SCHEMAS``, whose names they go by here. Row
statistics are not used: a backward recomputes what it needs, so that it is differentiable in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from afm_kernels.schemas import arguments_of

ROW_STATS = 8  # columns of row_stats, room for the row scalars of every backend but Triton's


def reduce_rows(value: Tensor, row_weight: Tensor | None, reduction: int, scale: float) -> Tensor:
    """Row values (..., 1) to the loss of an operator: weighted, scaled, and summed where ``reduction`` is 1."""
    value = value.squeeze(-1)
    if row_weight is not None:
        value = (value * row_weight).masked_fill(row_weight == 0, 0)
    return (value if reduction == 0 else value.sum()) * scale


def finish_grad(
    grad: Tensor,
    logits: Tensor,
    row_weight: Tensor | None,
    scale: float,
    grad_loss: Tensor | None,
    wanted: bool,
) -> Tensor:
    """A gradient of row values to that of the loss: weighted, scaled, and with the dtype and strides of ``logits``."""
    if not wanted:
        return logits.new_empty(0)
    grad = grad * scale
    if grad_loss is not None:
        grad = grad * grad_loss.unsqueeze(-1)
    if row_weight is not None:
        weight = row_weight.unsqueeze(-1)
        grad = (grad * weight).masked_fill(weight == 0, 0)
    grad = grad.to(logits.dtype)
    if torch._C._are_functorch_transforms_active():  # a transformed tensor has no strides to speak of
        return grad
    like = torch.empty_like(logits)
    return grad if grad.stride() == like.stride() else like.copy_(grad)


def no_row_stats(value: Tensor) -> Tensor:
    """The row statistics of a backend that keeps none: the shape the contract asks for, filled with zeros."""
    return value.new_zeros((value.numel(), ROW_STATS))


def finish_grads(
    grads: Sequence[Tensor], call: Any, grad_loss: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``finish_grad`` of both sides' gradients, those that ``call`` wants."""
    to_student, to_teacher = grads
    return (
        finish_grad(to_student, call.student, call.row_weight, call.scale, grad_loss, call.wrt_student),
        finish_grad(to_teacher, call.teacher, call.row_weight, call.scale, grad_loss, call.wrt_teacher),
    )


def loss_operators(stem: str, rows: Callable[[Any], tuple[Tensor, Tensor, Tensor]]) -> tuple[Any, Any, Any]:
    """The operators forward, backward and forward_grad of the loss ``stem``.

    ``rows`` makes of a call the value of each row (..., 1) and its gradients by the student's and the teacher's logits.
    """
    forward_arguments, backward_arguments, forward_grad_arguments = (
        arguments_of(f"{stem}_{kind}") for kind in ("forward", "backward", "forward_grad")
    )

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        call = forward_arguments(*args)
        value, _, _ = rows(call)
        return reduce_rows(value, call.row_weight, call.reduction, call.scale), no_row_stats(value)

    def backward(*args: Any) -> tuple[Tensor, Tensor]:
        call = backward_arguments(*args)
        _, *grads = rows(call)
        return finish_grads(grads, call, call.grad_loss)

    def forward_grad(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = forward_grad_arguments(*args)
        value, *grads = rows(call)
        return reduce_rows(value, call.row_weight, call.reduction, call.scale), *finish_grads(grads, call)

    return forward, backward, forward_grad
