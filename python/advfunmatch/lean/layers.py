"""The layers that stand for several of a network's own in its prepared copy. See Note [Folding] in ``prepared``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_kernels import ops, scale_shift_relu

__all__ = [
    "AdaptivePool",
    "BatchNormSource",
    "FoldedConv",
    "ScaleShift",
    "ScaleShiftReLU",
    "being_exported",
    "layout_of",
    "symmetric_padding",
]

# Up to these numbers of weights and of pixels ``small_conv`` beat oneDNN with two threads and AVX-512, forward and
# gradient: at 16 -> 32, 32 -> 64 and 48 -> 96 channels, stride 2, at 4x4 to 32x32 pixels. At 64 -> 128 they are level.
SMALL_WEIGHT, SMALL_IMAGE = 9 * 64 * 96, 32 * 32


def being_exported() -> bool:
    """Whether the network is being written down for others (torch.export, ONNX, torch.jit.trace), which know PyTorch's
    operators alone."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


class FoldedConv(nn.Module):
    """A convolution with the BatchNorm after it in its weights, an optional residual added, and an optional ReLU."""

    weight: Tensor
    bias: Tensor
    ones: Tensor
    shift: Tensor
    weight_dense_out: Tensor | None

    def __init__(
        self,
        conv: nn.Conv2d,
        live: nn.Conv2d,
        bn: BatchNormSource | None,
        relu: bool,
        more_padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.relu = relu
        self.stride, self.dilation = conv.stride, conv.dilation
        self.padding = tuple(p + more for p, more in zip(symmetric_padding(conv), more_padding, strict=True))
        self.groups = conv.groups
        self._live = (live,)
        self._bn = bn
        weight = conv.weight.detach()
        self.register_buffer("weight", torch.empty_like(weight))
        self.register_buffer("bias", weight.new_zeros(conv.out_channels))
        # For scale_shift_relu behind the convolution; these stay float32 in a network of lower precision.
        self.register_buffer("ones", _at_least_float32(weight.new_ones(conv.out_channels)))
        self.register_buffer("shift", _at_least_float32(weight.new_zeros(conv.out_channels)))
        self.register_buffer("weight_dense_out", None)
        self._winograd = self._small = False

    def prepare_kernels(self) -> None:
        """Keep the weight in a second layout for ``conv3x3`` and ``small_conv``, where those can serve this layer."""
        out_channels, in_channels, *taps = self.weight.shape
        plain = self.groups == 1 and tuple(self.dilation) == (1, 1)
        even = self.stride[0] == self.stride[1] and self.padding[0] == self.padding[1]
        if not (plain and even and self.weight.dtype == torch.float32 and self.weight.device.type == "cpu"):
            return
        geometry = (tuple(taps), self.stride[0], self.padding[0])
        self._winograd = geometry == ((3, 3), 1, 1) and in_channels % 16 == 0 == out_channels % 16
        self._small = (
            (in_channels <= 4 or in_channels >= 8)
            and out_channels >= 8
            and taps[0] * taps[1] <= 49
            and self.weight.numel() <= SMALL_WEIGHT
        )
        if self._winograd or self._small:
            taps_first = self.weight.new_empty(*taps, in_channels, out_channels)
            self.weight_dense_out = taps_first.permute(3, 2, 0, 1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if being_exported():
            return self._with_pytorchs_operators(x, residual)
        kernel = self.kernel_for(x, residual)
        if kernel is not None:
            return _Convolution.apply(x, residual, self, kernel, self.weight)
        if not (self.relu or residual is not None):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.relu and (x.device.type == "cuda" or residual is not None):
            # One pass over the convolution's output, where bias, addition and ReLU would be three.
            out = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
            if residual is None or residual.shape == out.shape:
                return scale_shift_relu(out, self.ones, self.shift, residual)
            return F.relu(out + self.bias.view(-1, 1, 1) + residual)
        return self._with_pytorchs_operators(x, residual)

    def kernel_for(self, x: Tensor, residual: Tensor | None) -> str | None:
        """What computes this layer and its input gradient in one call each: "conv3x3", "small_conv", "onednn", or None,
        PyTorch's operators."""
        if (
            torch.compiler.is_compiling()  # inductor fuses the plain form itself
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or not (residual is None or self._same_shape(x, residual))
        ):
            return None
        if self.weight_dense_out is not None:
            # From 8 tiles of 4x4 pixels up it was the faster one for 16 to 512 channels and every size from 4x4 to
            # 56x56; below, reading the weights is all there is to do.
            tiles = x.shape[0] * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
            if self._winograd and tiles >= 8 and ops.served_by("conv3x3_forward", "cpu") == "cpp":
                return "conv3x3"
            small = self._small and x.shape[2] * x.shape[3] <= SMALL_IMAGE
            if small and ops.served_by("small_conv_forward", "cpu") == "cpp":
                return "small_conv"
        onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
        return "onednn" if onednn else None

    def compute(self, kernel: str, x: Tensor, residual: Tensor | None) -> Tensor:
        """The layer by that kernel, without a graph."""
        if kernel == "onednn":
            geometry = self.padding, self.stride, self.dilation, self.groups
            post = "relu" if self.relu else None
            if residual is None:
                return torch.ops.mkldnn._convolution_pointwise(
                    x, self.weight, self.bias, *geometry, post or "none", [], ""
                )
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, residual, self.weight, self.bias, *geometry, "add", None, post, [], None
            )
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        given = x, self.weight_dense_out, self.bias, residual, self.relu
        if kernel == "conv3x3":
            return ops.kernel("conv3x3_forward", "cpu", "cpp")(*given)
        return ops.kernel("small_conv_forward", "cpu", "cpp")(*given, self.stride[0], self.padding[0])

    def input_grad(
        self,
        kernel: str | None,
        grad: Tensor,
        x: Tensor,
        gate: Tensor | None = None,
        added: Tensor | None = None,
        x_gates: bool = False,
    ) -> Tensor:
        """The gradient by x of this layer without its ReLU.

        Args:
            kernel: what ``kernel_for`` says.
            grad: by the layer's output, channels-last.
            x: the layer's input.
            gate: the layer's output, where its ReLU has not been applied to ``grad``.
            added: another gradient by x, to be added.
            x_gates: whether x came out of a ReLU, whose gate is then applied to the sum.
        """
        if kernel == "conv3x3":
            given = grad, gate, self.weight, added, x if x_gates else None
            return ops.kernel("conv3x3_input_grad", "cpu", "cpp")(*given)
        if gate is not None:
            grad = torch.ops.aten.threshold_backward(grad, gate, 0)
        if kernel == "small_conv":
            thin = self.weight.shape[1] <= 4
            return ops.kernel("small_conv_input_grad", "cpu", "cpp")(
                grad,
                self.weight_dense_out if thin else self.weight,
                added,
                x if x_gates else None,
                *x.shape[2:],
                self.stride[0],
                self.padding[0],
            )
        geometry = self.stride, self.padding, self.dilation, False, [0, 0], self.groups
        grad_x = torch.ops.aten.convolution_backward(
            grad, x, self.weight, None, *geometry, [True, False, False]
        )[0]
        if added is not None:
            grad_x.add_(added)
        return torch.ops.aten.threshold_backward(grad_x, x, 0) if x_gates else grad_x

    def _with_pytorchs_operators(self, x: Tensor, residual: Tensor | None) -> Tensor:
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            out = out + residual
        return F.relu(out) if self.relu else out

    def _same_shape(self, x: Tensor, residual: Tensor) -> bool:
        """Whether the residual has the convolution's shape; anything else must broadcast, which oneDNN does not."""
        sizes = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                x.shape[2:], self.padding, self.dilation, self.weight.shape[2:], self.stride, strict=True
            )
        )
        return residual.shape == (x.shape[0], self.weight.shape[0], *sizes) and residual.dtype == x.dtype

    def refresh_(self) -> None:
        self._refresh_folded()
        if self.weight_dense_out is not None:
            self.weight_dense_out.copy_(self.weight)

    def _refresh_folded(self) -> None:
        conv = self._live[0]
        if self._bn is None:
            self.weight.copy_(conv.weight)
            if conv.bias is not None:
                self.bias.copy_(conv.bias)
                self.shift.copy_(conv.bias)
            return
        scale, shift = self._bn.scale_shift()
        if conv.bias is not None:
            shift = shift + conv.bias * scale
        self.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
        self.bias.copy_(shift)
        self.shift.copy_(shift)


class ScaleShift(nn.Module):
    """An eval-mode BatchNorm that neither a convolution nor a ReLU could take, as one addcmul.

    With the SiLU behind it, forward and backward, it takes this share of the time of PyTorch's BatchNorm with the same,
    in two runs: 0.79 at 16 x 16 x 16 x 16, 0.75 and 0.78 at 64 x 64 x 32 x 32, 1.01 and 0.90 at 64 x 160 x 32 x 32,
    0.83 and 0.86 at 64 x 640 x 8 x 8 (float32, channels-last, one thread, AVX-512; medians of interleaved calls).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, bn: BatchNormSource) -> None:
        super().__init__()
        self._bn = bn
        scale, shift = bn.scale_shift()
        self.register_buffer("scale", torch.empty_like(scale))
        self.register_buffer("shift", torch.empty_like(shift))

    def forward(self, x: Tensor) -> Tensor:
        per_channel = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.shift.view(per_channel), x, self.scale.view(per_channel)).to(x.dtype)

    def refresh_(self) -> None:
        scale, shift = self._bn.scale_shift()
        self.scale.copy_(scale)
        self.shift.copy_(shift)


class ScaleShiftReLU(ScaleShift):
    """An eval-mode BatchNorm that no convolution could take, an optional residual added, and the ReLU after it."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if being_exported() or (residual is not None and residual.shape != x.shape):
            out = super().forward(x)
            return F.relu(out if residual is None else out + residual)
        return scale_shift_relu(x, self.scale, self.shift, residual)


class AdaptivePool(nn.Module):
    """Adaptive average pooling by the quickest operator that is the same at the size at hand.

    PyTorch's own takes half a millisecond for 128×64×2×2 to 2×2, where nothing is to be done, and as much again for its
    gradient: longer than either convolution before it in ``small_cnn``.
    """

    def __init__(self, output_size: Any) -> None:
        super().__init__()
        pair = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        self.output_size = tuple(pair)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        out_height, out_width = (
            have if want is None else want
            for want, have in zip(self.output_size, (height, width), strict=True)
        )
        if (height, width) == (out_height, out_width):
            return x
        if (out_height, out_width) == (1, 1):
            return x.mean((-2, -1), keepdim=True)
        if height % out_height == 0 and width % out_width == 0:
            return F.avg_pool2d(x, (height // out_height, width // out_width))
        return F.adaptive_avg_pool2d(x, self.output_size)


class _Convolution(torch.autograd.Function):
    """A ``FoldedConv`` by one of its kernels, with the input gradient only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, layer: FoldedConv, kernel: str, weight: Tensor
    ) -> Tensor:
        out = layer.compute(kernel, x, residual)
        # The weight is saved so that a backward after its update is refused.
        ctx.save_for_backward(x, out if layer.relu else None, weight)
        ctx.layer, ctx.kernel = layer, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, _ = ctx.saved_tensors
        wrt_x, wrt_residual = ctx.needs_input_grad[:2]
        # As a copy of its own: an elementwise loop over two layouts takes several times as long.
        grad = grad.contiguous(memory_format=layout_of(x if gate is None else gate))
        if gate is not None and wrt_residual:
            # The residual's gradient is the gated one, so it is made once for both.
            grad, gate = torch.ops.aten.threshold_backward(grad, gate, 0), None
        grad_x = ctx.layer.input_grad(ctx.kernel, grad, x, gate) if wrt_x else None
        return grad_x, grad if wrt_residual else None, None, None, None


def layout_of(image: Tensor) -> torch.memory_format:
    """The memory format of dense images; channels-last where both fit, as with one channel."""
    channels_last = image.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


class BatchNormSource:
    """Where the live values of one BatchNorm are: its module and the names of its four tensors."""

    def __init__(self, places: Sequence[tuple[nn.Module, str] | None], eps: float) -> None:
        self.places = places  # mean, variance, weight, bias
        self.eps = eps

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        mean, variance, weight, bias = (
            None if place is None else _at_least_float32(getattr(*place)) for place in self.places
        )
        assert mean is not None
        assert variance is not None
        scale = torch.rsqrt(variance + self.eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale
        return scale, shift if bias is None else shift + bias


def symmetric_padding(conv: nn.Conv2d) -> Any:
    """The padding as two numbers; None for a "same" padding that is not symmetric."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    return conv.padding


def _at_least_float32(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
