"""One projected gradient step, and the start of an attack.

Note [PGD step] in ``afm_kernels/reference/pgd_step.py`` is the definition:

    linf    moved = x_adv + step_size · sign(grad)         clamped to [x - eps, x + eps]
    l2      moved = x_adv + step_size · grad / ‖grad‖      where ‖d‖ > eps, d = moved - x:  x + d · eps / ‖d‖

then clamped to [clip_min, clip_max]. Bytes for N elements of e bytes: linf reads three tensors and writes one, 4Ne.
l2 has two norms to take before it can write: three sweeps over a sample, by one program, and so 4Ne from memory where
a sample stays in the cache (the usual image does: 3·224² float32 values are 0.6 MB) and up to 8Ne where it does not.
It is computed in float64, as the definition says: a dozen operations an element, which hides behind the memory on a
data-centre GPU.

Elements are taken in the order they have in memory, so any dense layout runs at full width; tensors whose layouts
differ are first brought to that of the output. Tensors, sizes, steps and bounds are run-time values; dtypes, the norm
and the presence of a bound are compiled in. ``g_`` marks pointers into global memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from afm_kernels.schemas import accumulation_dtype, arguments_of
from afm_kernels.triton import launch
from afm_kernels.triton.row_math import scalar, stored_as

L2 = 1  # index into ops.NORMS
# Elements of a linf program: 4 warps of 8, one 128-bit access a tensor for 16-bit types, two for 32.
_BLOCK = 1024
# Elements of a sweep of an l2 program: 8 warps of 8. Larger samples loop; a CIFAR image takes two sweeps of three.
_SWEEP = 2048

_INTEGERS = ["count", "size"]


@triton.jit
def _clip(x, clip_min, clip_max, HAS_MIN: tl.constexpr, HAS_MAX: tl.constexpr):
    """``torch.clamp``, NaN kept."""
    if HAS_MIN:
        x = tl.where(x < clip_min, clip_min, x)
    if HAS_MAX:
        x = tl.where(x > clip_max, clip_max, x)
    return x


@triton.jit
def _linf_project(moved, x, eps):
    """moved within eps of x; NaN where either is."""
    low = x - eps
    high = x + eps
    return tl.where(moved < low, low, tl.where(moved > high, high, tl.where(x == x, moved, x)))


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_INTEGERS)
def _linf_kernel(
    g_x_adv,  # START: the noise
    g_grad,
    g_x,
    g_out,
    count: tl.int64,
    step_size: tl.float64,  # START: the noise's scale
    eps: tl.float64,
    clip_min: tl.float64,
    clip_max: tl.float64,
    START: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    step = scalar(step_size, ACC)
    radius = scalar(eps, ACC)
    low = scalar(clip_min, ACC)
    high = scalar(clip_max, ACC)
    # Two bodies, so that whole blocks carry no mask and keep 128-bit accesses whatever the count.
    if first + BLOCK <= count:
        x = tl.load(g_x + first + lanes).to(ACC)
        x_adv = tl.load(g_x_adv + first + lanes).to(ACC)
        if START:
            moved = x + step * x_adv
        else:
            grad = tl.load(g_grad + first + lanes).to(ACC)
            sign = tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, grad))
            moved = x_adv + step * sign
        out = _clip(_linf_project(moved, x, radius), low, high, HAS_MIN, HAS_MAX)
        tl.store(g_out + first + lanes, stored_as(out, g_out.dtype.element_ty))
    else:
        mask = first + lanes < count
        x = tl.load(g_x + first + lanes, mask=mask).to(ACC)
        x_adv = tl.load(g_x_adv + first + lanes, mask=mask).to(ACC)
        if START:
            moved = x + step * x_adv
        else:
            grad = tl.load(g_grad + first + lanes, mask=mask).to(ACC)
            sign = tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, grad))
            moved = x_adv + step * sign
        out = _clip(_linf_project(moved, x, radius), low, high, HAS_MIN, HAS_MAX)
        tl.store(g_out + first + lanes, stored_as(out, g_out.dtype.element_ty), mask=mask)


@triton.jit
def _l2_gradient(g_grad, at, mask, unit):
    """Part of a gradient in float64, in which no square of a narrower type overflows or vanishes; float64 itself
    is taken in units of the sample's largest."""
    grad = tl.load(g_grad + at, mask=mask, other=0.0)
    if g_grad.dtype.element_ty == tl.float64:
        grad = grad / unit
    return grad.to(tl.float64)


@triton.jit
def _l2_moved(g_x_adv, g_grad, g_x, at, mask, step, unit, per_length, START: tl.constexpr):
    """x and the moved point of part of a sample, in float64; 0 and 0 outside it."""
    x = tl.load(g_x + at, mask=mask, other=0.0).to(tl.float64)
    x_adv = tl.load(g_x_adv + at, mask=mask, other=0.0).to(tl.float64)
    if START:
        return x, x + step * x_adv
    else:
        return x, x_adv + step * (_l2_gradient(g_grad, at, mask, unit) * per_length)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_INTEGERS)
def _l2_kernel(
    g_x_adv,
    g_grad,
    g_x,
    g_out,
    size: tl.int64,  # elements of a sample, in units of ALIGN
    step_size: tl.float64,
    eps: tl.float64,
    clip_min: tl.float64,
    clip_max: tl.float64,
    START: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sample. No element is read again after it is written, so ``out`` may be ``x_adv``."""
    size = size * ALIGN
    start = tl.program_id(0).to(tl.int64) * size
    lanes = tl.arange(0, BLOCK)
    step = scalar(step_size, tl.float64)
    radius = scalar(eps, tl.float64)

    unit = scalar(1.0, tl.float64)
    per_length = scalar(1.0, tl.float64)
    if not START:
        if g_grad.dtype.element_ty == tl.float64:
            largest = tl.zeros([BLOCK], tl.float64)
            for first in range(0, size, BLOCK):
                grad = tl.load(g_grad + start + first + lanes, mask=first + lanes < size, other=0.0)
                largest = tl.maximum(largest, tl.abs(grad))
            top = tl.max(largest, axis=0)
            unit = tl.where(top == 0, 1.0, top)
        squares = tl.zeros([BLOCK], tl.float64)
        for first in range(0, size, BLOCK):
            grad = _l2_gradient(g_grad, start + first + lanes, first + lanes < size, unit)
            squares += grad * grad
        length = tl.sqrt(tl.sum(squares, axis=0))
        # an infinite length has no direction: inf · 0 is the NaN that says so
        per_length = tl.where(length == 0, 0.0, 1.0 / length)

    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, size, BLOCK):
        at = start + first + lanes
        x, moved = _l2_moved(g_x_adv, g_grad, g_x, at, first + lanes < size, step, unit, per_length, START)
        squares += (moved - x) * (moved - x)
    distance = tl.sqrt(tl.sum(squares, axis=0))
    shrink = radius / distance

    for first in range(0, size, BLOCK):
        at = start + first + lanes
        mask = first + lanes < size
        x, moved = _l2_moved(g_x_adv, g_grad, g_x, at, mask, step, unit, per_length, START)
        out = tl.where(distance <= radius, moved, x + (moved - x) * shrink)
        out = _clip(out, scalar(clip_min, tl.float64), scalar(clip_max, tl.float64), HAS_MIN, HAS_MAX)
        tl.store(g_out + at, stored_as(out, g_out.dtype.element_ty), mask=mask)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """``tensor``, or a copy of it, with the strides of ``model``."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_strided(model.shape, model.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
        tensor
    )


def _launch(
    x_adv: Tensor,
    grad: Tensor | None,
    x: Tensor,
    step_size: float,
    eps: float,
    norm: int,
    clip_min: float | None,
    clip_max: float | None,
    out: Tensor,
) -> None:
    """Brings all tensors to one memory layout, out's where it will do, and launches; ``grad`` None is a start."""
    if x.numel() == 0:
        return
    model = out
    samples = x.shape[0] if x.ndim else 1
    sample_size = x.numel() // samples
    outermost_batch = samples == 1 or model.stride(0) == sample_size
    if not _dense(model) or (norm == L2 and not outermost_batch):
        model = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    x_adv, x = _like(x_adv, model), _like(x, model)
    grad = None if grad is None else _like(grad, model)
    tensors = [t for t in (x_adv, grad, x, model) if t is not None]
    bounds = (
        step_size,
        eps,
        0.0 if clip_min is None else clip_min,
        0.0 if clip_max is None else clip_max,
        grad is None,
        clip_min is not None,
        clip_max is not None,
    )
    with launch.on_device(x):
        if norm == L2:
            align = sample_size | launch.vector_elements(*tensors)
            align &= -align
            _l2_kernel[(samples,)](
                x_adv,
                grad,
                x,
                model,
                sample_size // align,
                *bounds,
                ALIGN=align,
                BLOCK=_SWEEP,
                num_warps=launch.warps(256),
            )
        else:
            dtype = launch.triton_dtype(accumulation_dtype(*tensors))
            _linf_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
                x_adv,
                grad,
                x,
                model,
                x.numel(),
                *bounds,
                ACC=dtype,
                BLOCK=_BLOCK,
                num_warps=launch.warps(128),
            )
    if model is not out:
        out.copy_(model)


_Step = arguments_of("pgd_step")
_StepOut = arguments_of("pgd_step_out")
_Start = arguments_of("pgd_start")


def pgd_step(*args: Any) -> Tensor:
    call = _Step(*args)
    out = torch.empty_like(call.x_adv)
    _launch(*(*call, out))
    return out


def pgd_step_out(*args: Any) -> None:
    _launch(*_StepOut(*args))


def pgd_start(*args: Any) -> Tensor:
    call = _Start(*args)
    out = torch.empty_like(call.x)
    _launch(*(call.noise, None, call.x, *call[2:], out))
    return out
