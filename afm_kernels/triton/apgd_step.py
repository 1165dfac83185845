"""Auto-PGD's step.

Note [APGD step] in ``afm_kernels/reference/apgd_step.py`` is the definition. A program has an image: it decides from
the image's few numbers what happens, copies what is to be kept, and moves. Bytes for an image of N elements of e bytes
that is neither the best point nor a hit: linf reads four tensors and writes one, 5Ne. l2 has two lengths to take before
it can write, three sweeps over the image, of which the later ones come from the cache; it is computed in float64, as
the definition says.

Tensors lie in one dense order, one image behind the other, as the caller has seen to. ``g_`` marks pointers into global
memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from afm_kernels.schemas import accumulation_dtype, arguments_of
from afm_kernels.triton import launch
from afm_kernels.triton.pgd_step import L2, _clip, _linf_project
from afm_kernels.triton.row_math import scalar, stored_as

# Elements of a sweep of a program: 8 warps of 8 (linf: 4 warps of 8). Larger images loop.
_SWEEP = {True: 2048, False: 1024}

_INTEGERS = ["images", "size", "window"]


@triton.jit
def _decide(
    g_numbers,
    g_counts,
    g_loss,
    g_misclassified,
    images,
    window,
    decrease,
    FIRST: tl.constexpr,
):
    """Books the point of this program's image: whether it is the best one, a hit, gives way to the best one; and the
    step size."""
    image = tl.program_id(0).to(tl.int64)
    loss = tl.load(g_loss + image)
    wrong = tl.load(g_misclassified + image) != 0
    best = tl.load(g_numbers + image)
    previous = tl.load(g_numbers + images + image)
    checked = tl.load(g_numbers + 2 * images + image)
    step = tl.load(g_numbers + 3 * images + image)
    improvements = tl.load(g_counts + image)
    reduced = tl.load(g_counts + images + image)
    hit = tl.load(g_counts + 2 * images + image)
    tl.debug_barrier()  # no warp writes what another has not read yet
    if FIRST:
        better = loss == loss
        better = better | (loss != loss)
        previous_now = previous
        checked = loss
    else:
        better = loss > best
        improvements += (loss > previous).to(tl.int32)
        previous_now = loss
    best = tl.where(better, loss, best)
    stuck = (reduced == 0) & (checked >= best)
    reduces = (window > 0) & ((improvements.to(tl.float64) <= decrease * window.to(tl.float64)) | stuck)
    step = tl.where(reduces, step / 2, step)
    if window > 0:
        reduced = reduces.to(tl.int32)
        improvements = improvements * 0
        checked = best
    tl.store(g_numbers + image, best)
    tl.store(g_numbers + images + image, previous_now)
    tl.store(g_numbers + 2 * images + image, checked)
    tl.store(g_numbers + 3 * images + image, step)
    tl.store(g_counts + image, improvements)
    tl.store(g_counts + images + image, reduced)
    tl.store(g_counts + 2 * images + image, hit | wrong.to(tl.int32))
    return better, wrong, reduces & (better == 0), step


@triton.jit
def _keep(g_x_adv, g_x_best, g_grad_best, g_x_hit, g_grad, at, mask, better, hit, back, FIRST: tl.constexpr):
    """The copies that are due of part of an image; the point that is left there, and its gradient."""
    point = tl.load(g_x_adv + at, mask=mask, other=0.0)
    grad = tl.load(g_grad + at, mask=mask, other=0.0)
    if FIRST:
        tl.store(g_x_best + at, point, mask=mask)
        tl.store(g_grad_best + at, grad, mask=mask)
        tl.store(g_x_hit + at, point, mask=mask)
    else:
        if better:
            tl.store(g_x_best + at, point, mask=mask)
            tl.store(g_grad_best + at, grad, mask=mask)
        if hit:
            tl.store(g_x_hit + at, point, mask=mask)
    if back:
        point = tl.load(g_x_best + at, mask=mask, other=0.0)
        grad = tl.load(g_grad_best + at, mask=mask, other=0.0)
        tl.store(g_x_adv + at, point, mask=mask)
    return point, grad


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_INTEGERS)
def _linf_kernel(
    g_x_adv,
    g_x_old,
    g_x_best,
    g_grad_best,
    g_x_hit,
    g_numbers,
    g_counts,
    g_grad,
    g_x,
    g_loss,
    g_misclassified,
    images: tl.int64,
    size: tl.int64,  # elements of an image, in units of ALIGN
    window: tl.int64,
    eps: tl.float64,
    clip_min: tl.float64,
    clip_max: tl.float64,
    carried: tl.float64,
    decrease: tl.float64,
    FIRST: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    better, hit, back, step = _decide(
        g_numbers, g_counts, g_loss, g_misclassified, images, window, decrease, FIRST
    )
    size = size * ALIGN
    start = tl.program_id(0).to(tl.int64) * size
    lanes = tl.arange(0, BLOCK)
    step = step.to(ACC)
    radius = scalar(eps, ACC)
    low, high = scalar(clip_min, ACC), scalar(clip_max, ACC)
    share = scalar(carried, ACC)
    for first in range(0, size, BLOCK):
        at = start + first + lanes
        mask = first + lanes < size
        point, grad = _keep(
            g_x_adv, g_x_best, g_grad_best, g_x_hit, g_grad, at, mask, better, hit, back, FIRST
        )
        point = point.to(ACC)
        x = tl.load(g_x + at, mask=mask, other=0.0).to(ACC)
        old = tl.load(g_x_old + at, mask=mask, other=0.0).to(ACC)
        sign = tl.where(grad > 0, step, tl.where(grad < 0, -step, step * 0))
        moved = _clip(_linf_project(point + sign, x, radius), low, high, HAS_MIN, HAS_MAX)
        mixed = point + (moved - point) * (1 - share) + (point - old) * share
        out = _clip(_linf_project(mixed, x, radius), low, high, HAS_MIN, HAS_MAX)
        tl.store(g_x_old + at, stored_as(out, g_x_old.dtype.element_ty), mask=mask)


@triton.jit
def _largest(g_grad, start, size, BLOCK: tl.constexpr):
    """The largest |gradient| of an image, NaN if one is."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float64)
    broken = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        grad = tl.load(g_grad + start + first + lanes, mask=first + lanes < size, other=0.0).to(tl.float64)
        largest = tl.maximum(largest, tl.abs(grad))
        broken |= (grad != grad).to(tl.int32)
    return tl.where(tl.max(broken, axis=0) > 0, float("nan"), tl.max(largest, axis=0))


@triton.jit
def _l2_mixed(
    g_x_adv,
    g_x_old,
    g_grad,
    g_grad_best,
    g_x,
    at,
    mask,
    back,
    unit,
    along,
    shrink,
    low,
    high,
    share,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
):
    """x, and where the two parts of the step lead before the second projection, of part of an image."""
    point = tl.load(g_x_adv + at, mask=mask, other=0.0).to(tl.float64)
    x = tl.load(g_x + at, mask=mask, other=0.0).to(tl.float64)
    old = tl.load(g_x_old + at, mask=mask, other=0.0).to(tl.float64)
    if back:
        grad = tl.load(g_grad_best + at, mask=mask, other=0.0)
    else:
        grad = tl.load(g_grad + at, mask=mask, other=0.0)
    moved = tl.where(along == 0, point, point + along * (grad.to(tl.float64) / unit))
    moved = _clip(x + (moved - x) * shrink, low, high, HAS_MIN, HAS_MAX)
    return x, point + (moved - point) * (1 - share) + (point - old) * share


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_INTEGERS)
def _l2_kernel(
    g_x_adv,
    g_x_old,
    g_x_best,
    g_grad_best,
    g_x_hit,
    g_numbers,
    g_counts,
    g_grad,
    g_x,
    g_loss,
    g_misclassified,
    images: tl.int64,
    size: tl.int64,  # elements of an image, in units of ALIGN
    window: tl.int64,
    eps: tl.float64,
    clip_min: tl.float64,
    clip_max: tl.float64,
    carried: tl.float64,
    decrease: tl.float64,
    FIRST: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    better, hit, back, step = _decide(
        g_numbers, g_counts, g_loss, g_misclassified, images, window, decrease, FIRST
    )
    size = size * ALIGN
    start = tl.program_id(0).to(tl.int64) * size
    lanes = tl.arange(0, BLOCK)
    step = step.to(ACC)
    radius = scalar(eps, ACC)
    low, high = scalar(clip_min, ACC), scalar(clip_max, ACC)
    share = scalar(carried, ACC)

    unit = scalar(1.0, ACC)
    if g_grad.dtype.element_ty == tl.float64:  # others' squares neither overflow nor vanish in float64
        if back:
            unit = _largest(g_grad_best, start, size, BLOCK)
        else:
            unit = _largest(g_grad, start, size, BLOCK)
        unit = tl.where((unit > 0) & (unit < float("inf")), unit, 1.0)
    grad_squares = tl.zeros([BLOCK], ACC)
    products = tl.zeros([BLOCK], ACC)
    squares = tl.zeros([BLOCK], ACC)
    for first in range(0, size, BLOCK):
        at = start + first + lanes
        mask = first + lanes < size
        point, grad = _keep(
            g_x_adv, g_x_best, g_grad_best, g_x_hit, g_grad, at, mask, better, hit, back, FIRST
        )
        distance = point.to(ACC) - tl.load(g_x + at, mask=mask, other=0.0).to(ACC)
        g = grad.to(ACC) / unit
        grad_squares += g * g
        products += g * distance
        squares += distance * distance
    tl.debug_barrier()  # the point may have given way to the best one
    gg = tl.sum(grad_squares, axis=0)
    has_direction = (gg > 0) & (gg < float("inf"))
    length = tl.sqrt(tl.where(has_direction, gg, 1.0))
    along = tl.where(has_direction, step / length, 0.0)
    squared = tl.sum(squares, axis=0)
    forward = 2 * step * (tl.sum(products, axis=0) / length) + step * step
    squared += tl.where(has_direction, forward, 0.0)
    length = tl.sqrt(tl.where(squared < 0, 0.0, squared))
    shrink = tl.where(length < radius, length, radius) / (length + 1e-12)

    squares = tl.zeros([BLOCK], ACC)
    for first in range(0, size, BLOCK):
        at = start + first + lanes
        x, mixed = _l2_mixed(
            g_x_adv,
            g_x_old,
            g_grad,
            g_grad_best,
            g_x,
            at,
            first + lanes < size,
            back,
            unit,
            along,
            shrink,
            low,
            high,
            share,
            HAS_MIN,
            HAS_MAX,
        )
        squares += tl.where(first + lanes < size, (mixed - x) * (mixed - x), 0.0)
    length = tl.sqrt(tl.sum(squares, axis=0))
    last_shrink = tl.where(length < radius, length, radius) / (length + 1e-12)

    for first in range(0, size, BLOCK):
        at = start + first + lanes
        mask = first + lanes < size
        x, mixed = _l2_mixed(
            g_x_adv,
            g_x_old,
            g_grad,
            g_grad_best,
            g_x,
            at,
            mask,
            back,
            unit,
            along,
            shrink,
            low,
            high,
            share,
            HAS_MIN,
            HAS_MAX,
        )
        out = _clip(x + (mixed - x) * last_shrink, low, high, HAS_MIN, HAS_MAX)
        tl.store(g_x_old + at, stored_as(out, g_x_old.dtype.element_ty), mask=mask)


_Arguments = arguments_of("apgd_step")


def apgd_step(*args: Any) -> None:
    call = _Arguments(*args)
    if call.x.numel() == 0:
        return
    images = len(call.x)
    size = call.x.numel() // images
    is_l2 = call.norm == L2
    tensors = (*args[:5], call.grad, call.x)
    align = size | launch.vector_elements(*tensors)
    align &= -align
    acc = torch.float64 if is_l2 else accumulation_dtype(call.x, call.grad)
    kernel = _l2_kernel if is_l2 else _linf_kernel
    with launch.on_device(call.x):
        kernel[(images,)](
            *args[:10],
            call.misclassified.view(torch.uint8),
            images,
            size // align,
            call.window,
            call.eps,
            0.0 if call.clip_min is None else call.clip_min,
            0.0 if call.clip_max is None else call.clip_max,
            0.0 if call.first else call.momentum,
            call.decrease,
            FIRST=call.first,
            HAS_MIN=call.clip_min is not None,
            HAS_MAX=call.clip_max is not None,
            ACC=launch.triton_dtype(acc),
            ALIGN=align,
            BLOCK=_SWEEP[is_l2],
            num_warps=launch.warps(_SWEEP[is_l2] // 8),
        )
