"""3x3 convolution, stride 1, padding 1, in plain PyTorch: the definition of the operators.

Only what an attack needs: the forward with bias, residual and ReLU in one, and the gradient by the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv3x3_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    out = F.conv2d(x, weight, bias, padding=1)
    if residual is not None:
        out = out + residual
    return (out.relu() if relu else out).contiguous(memory_format=torch.channels_last)


def conv3x3_input_grad(
    grad_output: Tensor, output: Tensor | None, weight: Tensor, added: Tensor | None, input: Tensor | None
) -> Tensor:
    if output is not None:
        grad_output = torch.where(output <= 0, 0, grad_output)
    grad = F.conv_transpose2d(grad_output, weight, padding=1)
    if added is not None:
        grad = grad + added
    if input is not None:
        grad = torch.where(input <= 0, 0, grad)
    return grad.contiguous(memory_format=torch.channels_last)
