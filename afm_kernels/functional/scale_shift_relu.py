"""A batch norm in eval mode, the addition after it, and ReLU, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from afm_kernels import ops, reference
from afm_kernels.autograd.scale_shift_relu import ScaleShiftReLUFunction
from afm_kernels.functional.checks import check_floating, check_like


def scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(x * scale[c] + shift[c] + residual), with gradients.

    A batch norm in eval mode is ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - running_mean *
    scale``.

    Args:
        x: (N, C, ...), floating point, any memory format.
        scale, shift: (C,), floating point; their dtypes may differ from that of ``x``.
        residual: added before ReLU; shape and device of ``x``. With another dtype than ``x``, both are promoted
            to one dtype, as an addition does.

    Returns:
        A tensor with the shape, dtype and dense memory format of ``x``, computed in float32 (float64 if a
        tensor is) and rounded once. A NaN stays NaN, as in ``torch.relu``. Gradients flow to ``x`` and
        ``residual`` in one more pass; those by ``scale`` and ``shift``, second derivatives, forward mode and
        the transforms of torch.func are served by plain PyTorch.

    Raises:
        ValueError, TypeError: an argument is not as above.

    >>> import torch
    >>> from afm_kernels import scale_shift_relu
    >>> x = torch.tensor([[[1.0, -1.0], [2.0, 0.5]]])
    >>> scale_shift_relu(x, torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])).tolist()
    [[[2.5, 0.0], [0.0, 0.5]]]
    """
    check_floating("x", x)
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; channels are dimension 1, so it needs two dimensions"
        )
    for name, vector in (("scale", scale), ("shift", shift)):
        check_floating(name, vector)
        if vector.shape != x.shape[1:2]:
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}; allowed for x of shape {tuple(x.shape)}: ({x.shape[1]},)"
            )
        if vector.device != x.device:
            raise ValueError(f"{name} is on {vector.device} and x on {x.device}; they must be on one device")
    if residual is not None:
        check_like("residual", residual, "x", x)
        if residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)

    # Plain PyTorch under any torch.func transform and in forward mode, compiled or not.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return reference.scale_shift_relu(x, scale, shift, residual)
    backend = ops.backend_for("scale_shift_relu_forward", x.device.type)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or scale.requires_grad
        or shift.requires_grad
        or (residual is not None and residual.requires_grad)
    ):
        return ScaleShiftReLUFunction.apply(x, scale, shift, residual, backend)
    kernel = ops.kernel("scale_shift_relu_forward", x.device.type, backend)
    return kernel(_detached(x), _detached(scale), _detached(shift), _detached(residual))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor
