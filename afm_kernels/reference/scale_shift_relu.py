"""relu(x * scale[c] + shift[c] + residual) in plain PyTorch: the definition of the operators.

Channels are dimension 1. A batch norm in eval mode is scale = weight / sqrt(var + eps), shift = bias - mean * scale.

Computed in float64 if a tensor is float64, else float32, and rounded once to the dtype of ``x``. A NaN stays NaN,
and passes gradients on, as in ``torch.relu``. The backward needs no input but ``scale``: the output says where ReLU
let through.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    exact = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if exact else torch.float32


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.ndim - 2))


def scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    """The formula, differentiable by PyTorch and open to every torch.func transform."""
    dtype = _compute_dtype(x, scale, shift, residual)
    total = x.to(dtype) * _per_channel(scale.to(dtype), x) + _per_channel(shift.to(dtype), x)
    if residual is not None:
        total = total + residual
    return total.relu().to(x.dtype)


def scale_shift_relu_forward(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    return torch.empty_like(x).copy_(scale_shift_relu(x, scale, shift, residual))


def scale_shift_relu_backward(
    grad_output: Tensor, output: Tensor, scale: Tensor, wrt_x: bool, wrt_residual: bool
) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(grad_output, output, scale)
    passed = torch.where(output <= 0, 0, grad_output.to(dtype))
    grad_x, grad_residual = output.new_empty(0), output.new_empty(0)
    if wrt_x:
        grad_x = torch.empty_like(output).copy_(passed * _per_channel(scale.to(dtype), output))
    if wrt_residual:
        grad_residual = torch.empty_like(output).copy_(passed)
    return grad_x, grad_residual


def scale_shift_relu_backward_vectors(
    grad_output: Tensor, output: Tensor, x: Tensor | None, scale_dtype: torch.dtype, shift_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """The gradients by ``scale`` (None without ``x``) and ``shift``, summed over all but the channels."""
    dtype = _compute_dtype(grad_output, output)
    others = [d for d in range(output.ndim) if d != 1]
    passed = torch.where(output <= 0, 0, grad_output.to(dtype))
    grad_scale = None if x is None else (passed * x).sum(others).to(scale_dtype)
    return grad_scale, passed.sum(others).to(shift_dtype)
