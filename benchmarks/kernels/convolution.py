"""Cases of conv3x3, the Winograd convolution of prepared networks on CPUs, at the four stages of a CIFAR ResNet-18.

Modes: "forward" (convolution, bias, ReLU) and "input_grad" (the gradient by the input alone, through the ReLU, as an
attack needs it). Peers: F.conv2d and F.relu on channels-last images, the backward that autograd would call, and
torch.compile of both.

The fewest multiplications are those of F(4x4, 3x3), a quarter of the definition's: the limit "matmul" is their time at
the rate of a square matrix product. The fewest bytes: image and weight read, image written; "input_grad" reads the
output too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from afm_kernels import ops
from benchmarks.kernels.case import Built, Call, Case
from benchmarks.kernels.losses import compiled

STAGES = ((32, 64, 32, 32), (32, 128, 16, 16), (32, 256, 8, 8), (32, 512, 4, 4))


def eager_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, padding=1))


def eager_input_grad(grad: Tensor, x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
    """What autograd runs for ``eager_forward`` where nobody asks for the weight's gradient."""
    gated = torch.ops.aten.threshold_backward(grad, output, 0)
    ones, mask = [1, 1], [True, False, False]
    return torch.ops.aten.convolution_backward(
        gated, x, weight, None, ones, ones, ones, False, [0, 0], 1, mask
    )[0]


def conv3x3(sizes: tuple[int, int, int, int], mode: str, device: str) -> Built:
    generator = torch.Generator().manual_seed(0)
    channels = sizes[1]
    x, grad = (
        torch.randn(sizes, generator=generator).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight = torch.randn(channels, channels, 3, 3, generator=generator) / math.sqrt(9 * channels)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(channels, generator=generator)
    output = eager_forward(x, weight, bias)
    if mode == "forward":
        dense_out = torch.empty(3, 3, channels, channels).permute(3, 2, 0, 1).copy_(weight)
        ours: Call = partial(ops.kernel("conv3x3_forward", "cpu", "cpp"), x, dense_out, bias, None, True)
        function, arguments = eager_forward, (x, weight, bias)
    else:
        ours = partial(ops.kernel("conv3x3_input_grad", "cpu", "cpp"), grad, output, weight, None, None)
        function, arguments = eager_input_grad, (grad, x, output, weight)
    return Built(
        candidates={
            "ours": ours,
            "eager": partial(function, *arguments),
            "compile": partial(compiled(function), *arguments),
        },
        outputs=("y",) if mode == "forward" else ("grad_x",),
        truth=(function(*(t.double() for t in arguments)),),
        bytes=((2 if mode == "forward" else 3) * x.numel() + weight.numel()) * 4,
        products=x.numel() * channels * 9 // 4,
    )


def cases() -> Iterator[Case]:
    """Every stage in both modes; `make bench` takes one."""
    for sizes, mode in product(STAGES, ("forward", "input_grad")):
        label = "x".join(map(str, sizes)) + "-cl"
        standard = sizes[1] == 128
        yield Case(
            "conv3x3",
            mode,
            label,
            "float32",
            "adversarial",
            partial(conv3x3, sizes, mode),
            standard=standard,
            elements=8 * math.prod(sizes),
        )
