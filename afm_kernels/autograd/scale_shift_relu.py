"""The autograd Function of ``scale_shift_relu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afm_kernels import ops, reference


class ScaleShiftReLUFunction(torch.autograd.Function):
    """``scale_shift_relu`` without checks: ``apply(x, scale, shift, residual, backend)``.

    It keeps the output and ``scale``; ``x`` only where ``scale`` wants a gradient. A backward that is itself recorded
    runs the reference's plain PyTorch: see Note [Second derivatives] in fused.py.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, backend: str
    ) -> Tensor:
        output = ops.kernel("scale_shift_relu_forward", x.device.type, backend)(x, scale, shift, residual)
        ctx.save_for_backward(output, scale, x if ctx.needs_input_grad[1] else None)
        ctx.backend = backend
        ctx.shift_dtype = shift.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        output, scale, x = ctx.saved_tensors
        wrt_x, wrt_scale, wrt_shift, wrt_residual, _ = ctx.needs_input_grad
        grad_x = grad_residual = None
        if wrt_x or wrt_residual:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                backward = reference.scale_shift_relu_backward
            else:
                backward = ops.kernel("scale_shift_relu_backward", output.device.type, ctx.backend)
            grad_x, grad_residual = backward(grad_output, output, scale, wrt_x, wrt_residual)
        grad_scale = grad_shift = None
        if wrt_scale or wrt_shift:
            grad_scale, grad_shift = reference.scale_shift_relu_backward_vectors(
                grad_output, output, x, scale.dtype, ctx.shift_dtype
            )
        return (
            grad_x if wrt_x else None,
            grad_scale if wrt_scale else None,
            grad_shift if wrt_shift else None,
            grad_residual if wrt_residual else None,
            None,
        )
