"""The direction of KL's gradients: its Triton kernel and launcher.

The mathematics is Note [Direction of a row] in ``reference/softmax_kl_direction.py``, and the names are those of the
note. Each reduction needs the one before it: the maxima, the student's
logit of the teacher's largest class, the largest logits of the classes that differ, the sums, the
largest entry, the entries. So a row is passed over six times, in blocks of half ``Limits.on_chip_more`` classes:
read from memory once, and after that from the caches as long as they hold the rows in flight. One program has several
short rows, or one of any length.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from afm_kernels.schemas import arguments_of
from afm_kernels.triton import launch
from afm_kernels.triton.dkl import load_block
from afm_kernels.triton.row_math import (
    INF,
    KL,
    LOG2E,
    NEAR,
    expm1_minus_identity,
    log1p_row,
    scalar,
    stored_as,
)
from afm_kernels.triton.row_memory import kernel, row_start
from afm_kernels.triton.softmax_kl import Problem, outputs, returned

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def two_sum(x, y):
    """x - y, and what rounding took from it."""
    rounded = x - y
    of_x = rounded + y
    return rounded, (x - of_x) - (y - (of_x - rounded))


@triton.jit
def apart(x, y, top_x, top_y):
    """(x - top_x) - (y - top_y), rounded as if once."""
    left, left_rest = two_sum(x, top_x)
    right, right_rest = two_sum(y, top_y)
    whole, rest = two_sum(left, right)
    return whole + (rest + (left_rest - right_rest))


@triton.jit
def expm1_near(x):
    """exp(x) - 1 for |x| < 1/2."""
    return x + expm1_minus_identity(x)


@triton.jit
def power_of(x):
    """The power with x = m 2^power, 1/2 <= m < 1, kept where 2^-power is a normal number."""
    if x.dtype == tl.float64:
        power = ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022
        power = tl.minimum(power, 1022)
        return power, ((1023 - power) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
        power = tl.minimum(power, 126)
        return power, ((127 - power) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_logits(at_s, at_t, start, in_rows, bound, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """A block of both sides' logits over 4, so that no difference of them overflows."""
    s, mask = load_block(at_s, start, in_rows, bound, -INF, ACC, BLOCK)
    t, _ = load_block(at_t, start, in_rows, bound, -INF, ACC, BLOCK)
    return s * 0.25, t * 0.25, mask


@triton.jit
def class_terms(
    s, t, top_s, top_t, far_s, far_t, lift_s, lift_t, unit, WANT_STUDENT: tl.constexpr, WITH_TERMS: tl.constexpr
):  # fmt: skip
    """δ, where it is not 0, and with WITH_TERMS the exponentials: over exp(R) for the classes that differ."""
    delta = apart(s, t, top_s, top_t) * unit
    if WANT_STUDENT:
        delta = tl.where(t == -INF, tl.where(s == -INF, 0.0, INF), delta)
    else:
        delta = tl.where(t == -INF, 0.0, delta)
    differs = delta != 0.0
    if not WITH_TERMS:
        return delta, differs, delta, delta
    to_log2 = unit * LOG2E
    e_t = tl.exp2(tl.where(differs, (t - far_t) * to_log2 + lift_t, (t - top_t) * to_log2))
    e_t = tl.where(t == -INF, 0.0, e_t)
    e_s = tl.where(differs, tl.exp2((s - far_s) * to_log2 + lift_s), 0.0)
    return delta, differs, e_s, e_t


@triton.jit
def entries(delta, delta_t, differs, e_s, e_t, inv_zs, inv_zt, gap, slope, log_ratio, mean):
    """The gradients of a block's classes over exp(R)."""
    p = e_t * inv_zt
    y = delta - log_ratio
    moved_s = tl.where(tl.abs(y) < NEAR, p * expm1_near(y), e_s * inv_zs - p)
    to_s = tl.where(differs, moved_s, -p * (gap * inv_zs))
    to_t = tl.where(p > 0.0, -p * (delta_t - tl.where(differs, mean, slope * inv_zt)), 0.0)
    return to_s, to_t


@kernel
def direction_kernel(
    g_student,
    g_teacher,
    g_grad_student,
    g_grad_teacher,
    g_values,  # log_scale
    rows: tl.int64,
    classes: tl.int64,
    rows_inner: tl.int64,
    s_outer: tl.int64,
    s_inner: tl.int64,
    t_outer: tl.int64,
    t_inner: tl.int64,
    gs_outer: tl.int64,
    gs_inner: tl.int64,
    gt_outer: tl.int64,
    gt_inner: tl.int64,
    inv_temperature: tl.float64,
    ALIGN: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WANT_STUDENT: tl.constexpr = g_grad_student is not None
    inv_t = scalar(inv_temperature, ACC)
    unit = inv_t * 4.0
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    # as a multiple of ALIGN the bound lets one predicate serve a whole vector
    bound = (classes // ALIGN).to(tl.int32) * ALIGN
    at_s = g_student + row_start(row, rows_inner, s_outer, s_inner, ALIGN, TWO_LEVELS)
    at_t = g_teacher + row_start(row, rows_inner, t_outer, t_inner, ALIGN, TWO_LEVELS)

    # Lanes keep their own maxima and sums, which meet after each loop.
    zeros = tl.zeros([ROWS, BLOCK], ACC)
    most_s = zeros - INF
    most_t = zeros - INF
    broken = zeros != 0.0
    for start in range(0, classes, BLOCK):
        s, t, _ = load_logits(at_s, at_t, start, in_rows, bound, ACC, BLOCK)
        most_s = tl.maximum(most_s, s)
        most_t = tl.maximum(most_t, t)
        broken = broken | (s != s) | (t != t) | (s == INF) | (t == INF) | ((s == -INF) & (t > -INF))
    max_s = tl.max(most_s, axis=1)
    max_t = tl.max(most_t, axis=1)
    lost = (tl.max(broken.to(tl.int32), axis=1) != 0) | (max_s == -INF) | (max_t == -INF)
    most_s = zeros - INF
    for start in range(0, classes, BLOCK):
        s, t, _ = load_logits(at_s, at_t, start, in_rows, bound, ACC, BLOCK)
        most_s = tl.maximum(most_s, tl.where(t == max_t[:, None], s, -INF))
    peak_s = tl.max(most_s, axis=1)
    if not WANT_STUDENT:
        max_s = peak_s
    # A row without a gradient is worked on all the same, with maxima that raise no alarm, and becomes NaN in the end.
    max_s = tl.where(lost, 0.0, max_s)
    max_t = tl.where(lost, 0.0, max_t)
    peak_s = tl.where(lost, 0.0, peak_s)
    top_s, top_t, peak = max_s[:, None], max_t[:, None], peak_s[:, None]

    most_s = zeros - INF
    most_t = zeros - INF
    for start in range(0, classes, BLOCK):
        s, t, _ = load_logits(at_s, at_t, start, in_rows, bound, ACC, BLOCK)
        _, differs, _, _ = class_terms(s, t, top_s, top_t, s, t, s, t, unit, WANT_STUDENT, False)
        most_s = tl.maximum(most_s, tl.where(differs, s, -INF))
        most_t = tl.maximum(most_t, tl.where(differs, t, -INF))
    far_s = tl.max(most_s, axis=1)
    far_t = tl.max(most_t, axis=1)
    equal = (far_s == -INF) & (far_t == -INF)
    # How much closer to its maximum the student is than the teacher.
    if WANT_STUDENT:
        ahead = tl.where(far_t == -INF, INF, apart(far_s, far_t, max_s, max_t) * unit)
    else:
        ahead = far_t * 0.0 - INF
    exponent = tl.where(ahead > 0.0, far_s - max_s, far_t - max_t) * unit
    exponent = tl.where(equal | lost, 0.0, exponent)
    unscaled = tl.exp2(exponent * LOG2E)
    lift_s = (tl.minimum(ahead, 0.0) * LOG2E)[:, None]
    lift_t = (tl.minimum(-ahead, 0.0) * LOG2E)[:, None]
    if not WANT_STUDENT:
        lift_t = (far_t * 0.0)[:, None]
    top_far_s, top_far_t = far_s[:, None], far_t[:, None]

    staying = zeros
    sum_s = zeros
    sum_t = zeros
    sum_gap = zeros
    sum_slope = zeros
    for start in range(0, classes, BLOCK):
        s, t, _ = load_logits(at_s, at_t, start, in_rows, bound, ACC, BLOCK)
        delta, differs, e_s, e_t = class_terms(
            s, t, top_s, top_t, top_far_s, top_far_t, lift_s, lift_t, unit, WANT_STUDENT, True
        )
        staying += tl.where(differs, 0.0, e_t)
        sum_s += e_s
        sum_t += tl.where(differs, e_t, 0.0)
        sum_gap += tl.where(differs, tl.where(tl.abs(delta) < NEAR, e_t * expm1_near(delta), e_s - e_t), 0.0)
        sum_slope += tl.where(e_t > 0.0, e_t * (apart(s, t, peak, top_t) * unit), 0.0)
    z = tl.sum(staying, axis=1)
    inv_zs = 1.0 / (z + unscaled * tl.sum(sum_s, axis=1))
    inv_zt = 1.0 / (z + unscaled * tl.sum(sum_t, axis=1))
    gap = tl.sum(sum_gap, axis=1)
    slope = tl.sum(sum_slope, axis=1)
    excess = unscaled * gap * inv_zt
    near = tl.abs(excess) < NEAR
    log_ratio = tl.where(near, log1p_row(tl.where(near, excess, 0.0)), tl.log(inv_zt / inv_zs))
    mean = unscaled * slope * inv_zt

    most = zeros
    for start in range(0, classes, BLOCK):
        s, t, mask = load_logits(at_s, at_t, start, in_rows, bound, ACC, BLOCK)
        delta, differs, e_s, e_t = class_terms(
            s, t, top_s, top_t, top_far_s, top_far_t, lift_s, lift_t, unit, WANT_STUDENT, True
        )
        to_s, to_t = entries(
            delta, apart(s, t, peak, top_t) * unit, differs, e_s, e_t, inv_zs[:, None], inv_zt[:, None],
            gap[:, None], slope[:, None], log_ratio[:, None], mean[:, None],
        )  # fmt: skip
        if WANT_STUDENT:
            most = tl.maximum(most, tl.where(mask, tl.abs(to_s), 0.0))
        if g_grad_teacher is not None:
            most = tl.maximum(most, tl.where(mask, tl.abs(to_t), 0.0))
    largest = tl.max(most, axis=1)
    zero = equal | (largest == 0.0)
    power, factor = power_of(largest)
    log_scale = exponent + (power.to(ACC) * LN2 + tl.log(inv_t))
    log_scale = tl.where(lost, INF - INF, tl.where(zero, -INF, log_scale))
    tl.store(g_values + row, log_scale, mask=in_rows)

    for start in range(0, classes, BLOCK):
        s, t, mask = load_logits(at_s, at_t, start, in_rows, bound, ACC, BLOCK)
        delta, differs, e_s, e_t = class_terms(
            s, t, top_s, top_t, top_far_s, top_far_t, lift_s, lift_t, unit, WANT_STUDENT, True
        )
        to_s, to_t = entries(
            delta, apart(s, t, peak, top_t) * unit, differs, e_s, e_t, inv_zs[:, None], inv_zt[:, None],
            gap[:, None], slope[:, None], log_ratio[:, None], mean[:, None],
        )  # fmt: skip
        columns = (start + tl.arange(0, BLOCK)).to(tl.int32)[None, :]
        if g_grad_student is not None:
            to_s = tl.where(lost[:, None], INF - INF, tl.where(zero[:, None], 0.0, to_s * factor[:, None]))
            at = g_grad_student + row_start(row, rows_inner, gs_outer, gs_inner, ALIGN, TWO_LEVELS)
            tl.store(at[:, None] + columns, stored_as(to_s, g_grad_student.dtype.element_ty), mask=mask)
        if g_grad_teacher is not None:
            to_t = tl.where(lost[:, None], INF - INF, tl.where(zero[:, None], 0.0, to_t * factor[:, None]))
            at = g_grad_teacher + row_start(row, rows_inner, gt_outer, gt_inner, ALIGN, TWO_LEVELS)
            tl.store(at[:, None] + columns, stored_as(to_t, g_grad_teacher.dtype.element_ty), mask=mask)


# The launcher. See Note [Operator contract] in afm_kernels/ops.py.


_Direction = arguments_of("softmax_kl_direction")


def softmax_kl_direction(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _Direction(*args)
    grads = outputs(call)
    problem = Problem(call.student, call.teacher, None, call.temperature, KL.value, 0.5, 1.0, None, *grads)
    rows = problem.rows
    log_scale = problem.new(*call.student.shape[:-1])
    block = min(
        max(16, launch.next_power_of_2(rows.classes)),
        launch.next_power_of_2(launch.LIMITS.on_chip_more) // 2 // problem.double,
    )
    tile_rows = max(1, launch.LIMITS.tile // problem.double**2 // block)
    programs = triton.cdiv(rows.num_rows, tile_rows)
    align = launch.row_alignment(rows, problem.tensors)
    strides = problem.strides(problem.student, problem.teacher, problem.grad_student, problem.grad_teacher)
    with launch.on_device(call.student):
        if programs:
            direction_kernel[(programs,)](
                problem.student,
                problem.teacher,
                problem.grad_student,
                problem.grad_teacher,
                log_scale,
                rows.num_rows,
                rows.classes,
                rows.inner,
                *(stride // align for stride in strides),
                1.0 / call.temperature,
                ALIGN=align,
                TWO_LEVELS=rows.two_levels,
                ACC=problem.acc,
                ROWS=tile_rows,
                BLOCK=block,
                # a lane takes one 128-bit access of each side, or a few in the largest block
                num_warps=launch.warps(min(512, block * tile_rows // problem.vector)),
            )
        problem.finish()
    return *returned(grads, call), log_scale
