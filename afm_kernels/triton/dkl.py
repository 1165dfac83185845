"""The decoupled KL loss in O(C) a row: its Triton kernel and launchers.

The mathematics is at the head of ``reference/dkl.py``; with the row's weights w, W = Σ w and d = t - s,

    μ = Σ w d / W        value = α CE(p, q) + β/2 W Σ w (d - μ)²        ∂/∂t = β W w (d - μ)

Each sum needs the one before it: the maxima, the normalisers with μ, the squares, the gradients. So a row is passed
over four times, in blocks of ``Limits.on_chip_more`` classes: read from memory once, and after that from the caches as
long as they hold the rows in flight. A backward sums again: it has to read the logits anyway. One program has several
short rows, or one of any length.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from afm_kernels.triton import launch
from afm_kernels.triton.row_math import INF, KL, row_offsets, scalar, stored_as
from afm_kernels.triton.row_memory import STATS, kernel, row_factor, row_start
from afm_kernels.triton.softmax_kl import Problem, grad_loss_kind, loss_operators

MISSING = tl.constexpr(1 << 30)
ONE_SIDED = tl.constexpr(1 << 29)


@triton.jit
def load_block(at, start, in_rows, bound, other, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Classes [start, start + BLOCK) of the rows at ``at``, and which of them there are."""
    columns = (start + tl.arange(0, BLOCK)).to(tl.int32)
    mask = in_rows[:, None] & (columns < bound)[None, :]
    return tl.load(at[:, None] + columns[None, :], mask=mask, other=other).to(ACC), mask


@triton.jit
def class_weights(t, max_t, at_weight, start, in_rows, bound, inv_t, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Unnormalised weights of a block's classes, and which of them count; NaN logits are looked for elsewhere."""
    if at_weight is None:
        return tl.exp((t - max_t[:, None]) * inv_t), t > -INF
    else:
        weight, _ = load_block(at_weight, start, in_rows, bound, 0.0, ACC, BLOCK)
        return weight, weight != 0


@kernel
def dkl_kernel(
    g_student,
    g_teacher,
    g_class_weight,
    g_weight,
    g_grad_loss,
    g_loss,
    g_grad_student,
    g_grad_teacher,
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
    inv_weight_temperature: tl.float64,
    scale: tl.float64,
    alpha: tl.float64,
    beta: tl.float64,
    SYMMETRIC: tl.constexpr,
    WANT_LOSS: tl.constexpr,  # 0: no, 1: one value a row, 2: one sum a program
    GRAD_LOSS: tl.constexpr,  # 0: none, 1: one number, 2: one a row
    ALIGN: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inv_t = scalar(inv_temperature, ACC)
    weight_inv_t = scalar(inv_weight_temperature, ACC)
    soft, squared = scalar(alpha, ACC), scalar(beta, ACC)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    # as a multiple of ALIGN the bound lets one predicate serve a whole vector
    bound = (classes // ALIGN).to(tl.int32) * ALIGN
    at_s = g_student + row_start(row, rows_inner, s_outer, s_inner, ALIGN, TWO_LEVELS)
    at_t = g_teacher + row_start(row, rows_inner, t_outer, t_inner, ALIGN, TWO_LEVELS)
    at_w = None
    if g_class_weight is not None:
        at_w = g_class_weight + row * bound

    # Lanes keep their own maxima and sums, which meet after each loop.
    zeros = tl.zeros([ROWS, BLOCK], ACC)
    top_s = zeros - INF
    top_t = zeros - INF
    # The logits of the class that weighs most, and its weight; of own weights it is the teacher's largest.
    heavy_s, heavy_t, heavy_w = zeros, zeros, zeros
    for start in range(0, classes, BLOCK):
        s, _ = load_block(at_s, start, in_rows, bound, -INF, ACC, BLOCK)
        t, _ = load_block(at_t, start, in_rows, bound, -INF, ACC, BLOCK)
        if g_class_weight is None:
            heavy_s = tl.where(t > top_t, s, heavy_s)
        else:
            weight, _ = load_block(at_w, start, in_rows, bound, 0.0, ACC, BLOCK)
            heavier = (weight > heavy_w) & (s > -INF) & (t > -INF)
            heavy_s = tl.where(heavier, s, heavy_s)
            heavy_t = tl.where(heavier, t, heavy_t)
            heavy_w = tl.where(heavier, weight, heavy_w)
        top_s = tl.maximum(top_s, s)
        top_t = tl.maximum(top_t, t)
    max_s = tl.max(top_s, axis=1)
    max_t = tl.max(top_t, axis=1)
    offset_s, offset_t = row_offsets(max_s, max_t)
    heaviest, heavy_t_row = tl.zeros([ROWS], ACC) + 1.0, max_t
    is_heavy = top_t == max_t[:, None]
    if g_class_weight is not None:
        heaviest = tl.max(heavy_w, axis=1)
        is_heavy = heavy_w == heaviest[:, None]
        heavy_t_row = tl.sum(tl.where(is_heavy, heavy_t, 0.0), axis=1)
    heavy_s_row = tl.sum(tl.where(is_heavy, heavy_s, 0.0), axis=1)
    heavy_d = (heavy_t_row - offset_t) - (heavy_s_row - offset_s)

    # A class that is the largest on both sides is counted apart, and the mean of d taken about d of the class that has
    # more than half of the weight: where a row is certain of a class, what is small is then no difference of what is
    # not. See Note [Certain rows] in row_math.py.
    # NaN in a row that is no distribution, so that its sums are.
    shared_s = tl.where((tl.abs(max_s) < INF) & (tl.abs(max_t) < INF), max_s, INF - INF)
    sum_s = zeros
    sum_t = zeros
    below = zeros  # exp((t - max_t)/T) (s - max_s)
    kept_w = zeros
    linear = zeros
    # How many classes are the largest on both sides; MISSING, that the student excludes a class that the teacher has;
    # ONE_SIDED, that one side alone excludes a class that counts.
    marks = tl.zeros([ROWS, BLOCK], tl.int32)
    for start in range(0, classes, BLOCK):
        s, _ = load_block(at_s, start, in_rows, bound, -INF, ACC, BLOCK)
        t, _ = load_block(at_t, start, in_rows, bound, -INF, ACC, BLOCK)
        in_s, in_t = s > -INF, t > -INF
        e_t = tl.exp((t - max_t[:, None]) * inv_t)
        is_shared = (s == shared_s[:, None]) & (t == max_t[:, None])
        sum_s += tl.where(is_shared, 0.0, tl.exp((s - max_s[:, None]) * inv_t))
        sum_t += tl.where(is_shared, 0.0, e_t)
        marks += is_shared.to(tl.int32)
        below += tl.where(in_s & in_t, e_t * (s - max_s[:, None]), 0.0)
        marks = marks | tl.where(in_t & (s == -INF), MISSING, 0)
        weight, counts = class_weights(t, max_t, at_w, start, in_rows, bound, weight_inv_t, ACC, BLOCK)
        marks = marks | tl.where(counts & ((s == -INF) != (t == -INF)), ONE_SIDED, 0)
        kept = counts & in_s & in_t
        d = (t - offset_t[:, None]) - (s - offset_s[:, None])
        kept_w += tl.where(kept, weight, 0.0)
        linear += tl.where(kept, weight * d, 0.0)
    rest_s = tl.sum(sum_s, axis=1)
    rest_t = tl.sum(sum_t, axis=1)
    both = tl.sum(marks & (ONE_SIDED - 1), axis=1).to(ACC)
    missing = tl.max(marks & MISSING, axis=1) != 0
    one_sided = tl.max(marks & ONE_SIDED, axis=1) != 0
    z_s = rest_s + both
    z_t = rest_t + both
    is_distribution = (z_s == z_s) & (z_t == z_t)  # else a NaN, +inf or nothing but -inf
    total = tl.sum(kept_w, axis=1)
    divisor = tl.where(total == 0, 1.0, total)
    mean = tl.sum(linear, axis=1) / divisor
    mean = tl.where((2.0 * heaviest > total) & (tl.abs(heavy_d) < INF), heavy_d, mean)

    first = zeros  # what is left of the mean
    second = zeros
    for start in range(0, classes, BLOCK):
        s, _ = load_block(at_s, start, in_rows, bound, -INF, ACC, BLOCK)
        t, _ = load_block(at_t, start, in_rows, bound, -INF, ACC, BLOCK)
        weight, counts = class_weights(t, max_t, at_w, start, in_rows, bound, weight_inv_t, ACC, BLOCK)
        off = ((t - offset_t[:, None]) - (s - offset_s[:, None])) - mean[:, None]
        kept = counts & (s > -INF) & (t > -INF)
        first += tl.where(kept, weight * off, 0.0)
        second += tl.where(kept, weight * off * off, 0.0)
    rest = tl.sum(first, axis=1)
    square = tl.sum(second, axis=1)
    rest = rest / divisor
    square = tl.maximum(square - rest * rest * total, 0.0)
    if g_class_weight is None:
        # softmax(t / T_w): what is kept is all of it, or the row is +inf
        square = square / divisor
        normaliser = 1.0 / divisor
    else:
        square = square * total
        normaliser = total
    cross_entropy = tl.log(z_s) - tl.sum(below, axis=1) / z_t * inv_t
    cross_entropy = tl.where(missing, INF, cross_entropy)
    value = tl.where(soft == 0.0, 0.0, soft * cross_entropy)
    spread = tl.where(one_sided, INF, 0.5 * square)
    value = value + tl.where(squared == 0.0, 0.0, squared * spread)
    value = tl.where(is_distribution, value, INF - INF)
    if WANT_LOSS != 0:
        factor, masked = row_factor(g_weight, g_grad_loss, row, in_rows, scalar(scale, ACC), ACC, 0)
        loss = tl.where(masked, 0.0, value * factor)
        if WANT_LOSS == 1:
            tl.store(g_loss + row, loss, mask=in_rows)
        else:
            tl.store(g_loss + tl.program_id(0), tl.sum(tl.where(in_rows, loss, 0.0), axis=0))

    if g_grad_student is not None or g_grad_teacher is not None:
        factor, masked = row_factor(g_weight, g_grad_loss, row, in_rows, scalar(scale, ACC), ACC, GRAD_LOSS)
        factor = tl.where(tl.abs(value) < INF, factor, INF - INF)
        for start in range(0, classes, BLOCK):
            s, mask = load_block(at_s, start, in_rows, bound, -INF, ACC, BLOCK)
            t, _ = load_block(at_t, start, in_rows, bound, -INF, ACC, BLOCK)
            weight, counts = class_weights(t, max_t, at_w, start, in_rows, bound, weight_inv_t, ACC, BLOCK)
            off = (((t - offset_t[:, None]) - (s - offset_s[:, None])) - mean[:, None]) - rest[:, None]
            kept = counts & (s > -INF) & (t > -INF)
            grad = tl.where(kept, weight * normaliser[:, None] * off, 0.0)
            grad = tl.where(squared == 0.0, 0.0, squared * grad)
            columns = (start + tl.arange(0, BLOCK)).to(tl.int32)[None, :]
            if g_grad_student is not None:
                q = tl.exp((s - max_s[:, None]) * inv_t) / z_s[:, None]
                p = tl.exp((t - max_t[:, None]) * inv_t) / z_t[:, None]
                is_shared = (s == max_s[:, None]) & (t == max_t[:, None]) & (both == 1.0)[:, None]
                apart = tl.where(is_shared, (rest_t / z_t - rest_s / z_s)[:, None], q - p)
                grad_s = tl.where(soft == 0.0, 0.0, soft * inv_t * apart)
                if SYMMETRIC:
                    grad_s = grad_s - grad
                grad_s = tl.where(masked[:, None], 0.0, grad_s * factor[:, None])
                at = g_grad_student + row_start(row, rows_inner, gs_outer, gs_inner, ALIGN, TWO_LEVELS)
                grad_s = stored_as(grad_s, g_grad_student.dtype.element_ty)
                tl.store(at[:, None] + columns, grad_s, mask=mask)
            if g_grad_teacher is not None:
                grad_t = tl.where(masked[:, None], 0.0, grad * factor[:, None])
                at = g_grad_teacher + row_start(row, rows_inner, gt_outer, gt_inner, ALIGN, TWO_LEVELS)
                grad_t = stored_as(grad_t, g_grad_teacher.dtype.element_ty)
                tl.store(at[:, None] + columns, grad_t, mask=mask)


# Launchers. See Note [Operator contract] in afm_kernels/ops.py.


class DKLProblem(Problem):
    """A call of dkl: the tensors as ``Problem`` lays them out, and what dkl alone takes."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        class_weight: Tensor | None,
        row_weight: Tensor | None,
        mix: tuple[float, float, float, float],
        scale: float,
        grads: tuple[Tensor | None, ...],
        symmetric: bool,
    ) -> None:
        temperature, self.weight_temperature, self.alpha, self.squared = mix
        super().__init__(student, teacher, row_weight, temperature, KL.value, 0.5, scale, None, *grads)
        self.class_weight, self.symmetric = class_weight, symmetric

    def run(self, reduction: int | None, grad_loss: Tensor | None = None) -> Tensor | None:
        """The loss, unless ``reduction`` is None, and the gradients that there are tensors for."""
        rows = self.rows
        block = min(
            max(16, launch.next_power_of_2(rows.classes)),
            launch.next_power_of_2(launch.LIMITS.on_chip_more) // self.double,
        )
        tile_rows = max(1, launch.LIMITS.tile // self.double**2 // block)
        programs = triton.cdiv(rows.num_rows, tile_rows)
        loss = None if reduction is None else self.new(programs if reduction == 1 else rows.num_rows)
        weights = [] if self.class_weight is None else [self.class_weight]
        align = launch.row_alignment(rows, self.tensors + weights)
        strides = self.strides(self.student, self.teacher, self.grad_student, self.grad_teacher)
        with launch.on_device(self.student):
            if programs:
                dkl_kernel[(programs,)](
                    self.student,
                    self.teacher,
                    self.class_weight,
                    self.row_weight,
                    grad_loss,
                    loss,
                    self.grad_student,
                    self.grad_teacher,
                    rows.num_rows,
                    rows.classes,
                    rows.inner,
                    *(stride // align for stride in strides),
                    1.0 / self.temperature,
                    1.0 / self.weight_temperature,
                    self.scale,
                    self.alpha,
                    self.squared,
                    SYMMETRIC=self.symmetric,
                    WANT_LOSS=0 if reduction is None else reduction + 1,
                    GRAD_LOSS=grad_loss_kind(grad_loss),
                    ALIGN=align,
                    TWO_LEVELS=rows.two_levels,
                    ACC=self.acc,
                    ROWS=tile_rows,
                    BLOCK=block,
                    # four elements of each side a lane, up to eight in the largest block
                    num_warps=launch.warps(min(512, block * tile_rows * self.double // 4)),
                )
            self.finish()
            return self.sum(loss) if reduction == 1 and loss is not None else loss

    def forward(self, shape: torch.Size, reduction: int) -> tuple[Tensor, Tensor]:
        loss = self.forward_grad(shape, reduction)
        # The contract asks for row statistics; no backward looks at them.
        return loss, loss.new_zeros((self.rows.num_rows, STATS.value))

    def backward(self, stats: Tensor, grad_loss: Tensor) -> None:
        self.run(None, grad_loss)

    def forward_grad(self, shape: torch.Size, reduction: int) -> Tensor:
        loss = self.run(reduction)
        assert loss is not None
        return loss.view(shape) if reduction == 0 else loss


def _problem(call: Any, *grads: Tensor | None) -> DKLProblem:
    mix = (call.temperature, call.weight_temperature, call.alpha, call.beta)
    symmetric = getattr(call, "symmetric", True)  # a value is the same either way
    return DKLProblem(
        call.student, call.teacher, call.class_weight, call.row_weight, mix, call.scale, grads, symmetric
    )


dkl_forward, dkl_backward, dkl_forward_grad = loss_operators("dkl", _problem)
