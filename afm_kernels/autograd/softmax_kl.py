"""The autograd Function of ``softmax_kl_div``, for those who compose Functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afm_kernels import ops
from afm_kernels.autograd.fused import Call, fused_backward, fused_forward


class SoftmaxKLDivFunction(torch.autograd.Function):
    """The divergence of softmax(student / T) from softmax(teacher / T), with gradients on both sides.

    ``softmax_kl_div`` is the same with checks, names for ``divergence`` and ``reduction``, any class
    dimension, and support for torch.func; this is for those who compose Functions.
    ``SoftmaxKLDivFunction.apply`` takes, by position:

    Args:
        student, teacher: logits, (..., C), floating point.
        row_weight: the shape of the rows, contiguous, float32 (float64 with float64 logits), or None.
        temperature: positive.
        divergence: 0 to 3 for "kl", "reverse_kl", "jeffreys", "js".
        beta: the weight of JS.
        reduction: 0 for one value a row, 1 for the sum.
        scale: a factor of the loss.
        recompute: save O(rows) and recompute in the backward, instead of making the gradients in the forward.
        backend: "reference", "cpp", "cuda" or "triton"; None for the one that serves.

    >>> import torch
    >>> from afm_kernels import SoftmaxKLDivFunction
    >>> student = torch.zeros(4, 10, requires_grad=True)
    >>> SoftmaxKLDivFunction.apply(student, torch.randn(4, 10)).backward()
    >>> student.grad.shape
    torch.Size([4, 10])
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        row_weight: Tensor | None = None,
        temperature: float = 1.0,
        divergence: int = 0,
        beta: float = 0.5,
        reduction: int = 1,
        scale: float = 1.0,
        recompute: bool = False,
        backend: str | None = None,
    ) -> Tensor:
        device_type = student.device.type
        if backend is None:
            backend = ops.backend_for("softmax_kl_forward_grad", device_type)
        params = (temperature, divergence, beta)
        call = Call("softmax_kl", device_type, backend, params, (), reduction, scale, recompute)
        return fused_forward(ctx, student, teacher, call, row_weight)

    backward = staticmethod(fused_backward)
