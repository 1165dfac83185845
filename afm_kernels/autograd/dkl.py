"""The autograd Function of ``dkl_loss``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afm_kernels.autograd.fused import fused_backward, fused_forward


class DKLFunction(torch.autograd.Function):
    """The decoupled KL loss. Arguments as ``dkl_forward_grad`` has them."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        class_weight: Tensor | None,
        row_weight: Tensor | None,
        temperature: float,
        weight_temperature: float,
        alpha: float,
        beta: float,
        symmetric: bool,
        reduction: int,
        scale: float,
        recompute: bool,
        backend: str | None = None,
    ) -> Tensor:
        return fused_forward(
            ctx,
            "dkl",
            student,
            teacher,
            (class_weight, row_weight),
            (temperature, weight_temperature, alpha, beta),
            (symmetric,),
            reduction,
            scale,
            recompute,
            backend,
        )

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *fused_backward(ctx, grad_loss), *(None,) * 11
