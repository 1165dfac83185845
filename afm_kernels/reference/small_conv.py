"""Convolution of small images with few channels in plain PyTorch: the definition of the operators.

Only what an attack needs: the forward with bias, residual and ReLU in one; the gradient by the input, another gradient
added to it, and the gate of the ReLU that made the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input


def small_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
) -> Tensor:
    out = F.conv2d(x, weight, bias, stride, padding)
    if residual is not None:
        out = out + residual
    return (out.relu() if relu else out).contiguous(memory_format=torch.channels_last)


def small_conv_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    added: Tensor | None,
    input: Tensor | None,
    height: int,
    width: int,
    stride: int,
    padding: int,
) -> Tensor:
    shape = (len(grad_output), weight.shape[1], height, width)
    grad = conv2d_input(shape, weight, grad_output, stride, padding)
    if added is not None:
        grad = grad + added
    if input is not None:
        grad = torch.where(input <= 0, 0, grad)
    return grad.contiguous(memory_format=torch.channels_last)
