"""The autograd Function of ``distillation_loss``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afm_kernels.autograd.fused import fused_backward, fused_forward


class DistillationFunction(torch.autograd.Function):
    """(1 - α) CE(student, labels) + α T² KL(teacher ‖ student). Arguments as ``distillation_forward`` has them."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        row_weight: Tensor | None,
        temperature: float,
        alpha: float,
        label_smoothing: float,
        ignore_index: int,
        reduction: int,
        scale: float,
        recompute: bool,
        backend: str | None = None,
    ) -> Tensor:
        return fused_forward(
            ctx,
            "distillation",
            student,
            teacher,
            (labels, row_weight),
            (temperature, alpha, label_smoothing, ignore_index),
            (),
            reduction,
            scale,
            recompute,
            backend,
        )

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *fused_backward(ctx, grad_loss), *(None,) * 10
