"""Several short rows, or one of medium length, in one tile of registers: softmax_kl and distillation on chip.

One launch makes the loss, the row scalars and both gradients, or any of them; the logits are read once. See
``softmax_kl.py`` for where it serves, ``row_math.py`` for the mathematics.
"""

import triton.language as tl

from afm_kernels.triton.row_math import (
    FAR,
    INF,
    JEFFREYS,
    JS,
    LOG2E,
    MAX_EXPONENT,
    NEAR,
    clamp_far,
    cross_entropy,
    expm1_minus_identity,
    heaviest,
    jeffreys_terms,
    js_logs,
    js_terms,
    mixed_gradients,
    mixed_value,
    row_gradients,
    row_offsets,
    row_scalars,
    scalar,
    stored_as,
)
from afm_kernels.triton.row_memory import kernel, load_stats, row_factor, row_start, store_stats


@kernel
def tile_kernel(
    g_student,
    g_teacher,
    g_weight,
    g_labels,
    g_grad_loss,
    g_loss,
    g_stats,
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
    ignore_index: tl.int64,
    temperature: tl.float64,
    inv_temperature: tl.float64,
    scale: tl.float64,
    beta: tl.float64,
    alpha: tl.float64,
    smoothing: tl.float64,
    DIVERGENCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    FROM_STATS: tl.constexpr,  # the row's scalars are read from g_stats instead of made
    WANT_LOSS: tl.constexpr,  # 0: no, 1: one value a row, 2: one sum a program
    GRAD_LOSS: tl.constexpr,  # 0: none, 1: one number, 2: one a row
    ALIGN: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    ACC: tl.constexpr,  # the accumulation dtype
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inv_t = scalar(inv_temperature, ACC)
    mix = scalar(beta, ACC)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    columns = tl.arange(0, BLOCK)
    # as a multiple of ALIGN the bound lets one predicate serve a whole vector
    in_classes = columns < (classes // ALIGN).to(tl.int32) * ALIGN
    mask = in_rows[:, None] & in_classes[None, :]
    at_s = (
        g_student
        + row_start(row, rows_inner, s_outer, s_inner, ALIGN, TWO_LEVELS)[:, None]
        + columns[None, :]
    )
    at_t = (
        g_teacher
        + row_start(row, rows_inner, t_outer, t_inner, ALIGN, TWO_LEVELS)[:, None]
        + columns[None, :]
    )
    s = tl.load(at_s, mask=mask, other=-INF).to(ACC)
    t = tl.load(at_t, mask=mask, other=-INF).to(ACC)
    if HAS_LABELS:
        label = tl.load(g_labels + row, mask=in_rows, other=0)
        smooth = scalar(smoothing, ACC)

    if FROM_STATS:
        max_s, rz_s, max_t, rz_t, centre, tail, slope_p, slope_q, base_p, base_q = load_stats(
            g_stats, row, in_rows
        )
    else:
        max_s = tl.max(s, axis=1)
        max_t = tl.max(t, axis=1)
        e_s = tl.exp((s - max_s[:, None]) * inv_t)
        e_t = tl.exp((t - max_t[:, None]) * inv_t)
        z_s = tl.sum(e_s, axis=1)
        z_t = tl.sum(e_t, axis=1)
        offset_s, offset_t = row_offsets(max_s, max_t)
        gap = (s - offset_s[:, None]) - (t - offset_t[:, None])
        lowest = tl.min(gap, axis=1)
        if DIVERGENCE == JEFFREYS:
            highest = tl.max(gap, axis=1)
        d = clamp_far(gap * inv_t)
        # The mean of d, or where one class has more than half of p, d there. See Note [Certain rows].
        certain = z_t < 2.0
        heavy = tl.where(certain[:, None] & (e_t < 1.0), 0.0, e_t)
        c = tl.sum(heavy * d, axis=1) / tl.where(certain, 1.0, z_t)
        x = d - c[:, None]
        rest = tl.sum(e_t * x, axis=1) / z_t
        apart = (max_s - offset_s) - (max_t - offset_t)
        exponent = apart * (inv_t * LOG2E) - c * LOG2E
        to_p = tl.exp2(tl.minimum(exponent, MAX_EXPONENT))
        bulge = tl.where(
            tl.abs(x) < NEAR, e_t * expm1_minus_identity(x), e_s * to_p[:, None] - (e_t + e_t * x)
        )
        bulge = tl.sum(bulge, axis=1) / z_t
        centre, tail, slope_p, kl = row_scalars(
            z_s, z_t, apart, c, rest, bulge, lowest, certain & (tl.abs(c) < FAR), inv_t
        )
        value = kl
        slope_q = kl
        base_p = kl
        base_q = kl
        if DIVERGENCE == JEFFREYS:
            x = d - centre[:, None]
            slope_q = tl.sum(e_s * x, axis=1) / z_s
            value = tl.sum(
                jeffreys_terms(e_t * (1.0 / z_t)[:, None], e_s * (1.0 / z_s)[:, None], x - tail[:, None]),
                axis=1,
            )
            value = tl.where((lowest == -INF) | (highest == INF), value + INF, value)
        if DIVERGENCE == JS:
            certain_s = z_s < 2.0
            heavy = tl.where(certain_s[:, None] & (e_s < 1.0), 0.0, e_s)
            c_s = tl.sum(heavy * d, axis=1) / tl.where(certain_s, 1.0, z_s)
            base_p, _ = js_logs((c - centre) - tail, mix)
            _, base_q = js_logs((c_s - centre) - tail, mix)
            p = e_t / z_t[:, None]
            q = e_s / z_s[:, None]
            terms, m_over_p, q_over_m = js_terms(p, q, (d - centre[:, None]) - tail[:, None], mix)
            value = tl.sum(tl.where(mask, terms, 0.0), axis=1)
            value = tl.where(value < 0.0, 0.0, value)
            at_peak = t == heaviest(max_t, 1.0 / z_t)[:, None]
            slope_p = tl.sum(tl.where(at_peak, 0.0, p * (m_over_p - base_p[:, None])), axis=1)
            at_peak = s == heaviest(max_s, 1.0 / z_s)[:, None]
            slope_q = tl.sum(tl.where(at_peak, 0.0, q * (q_over_m - base_q[:, None])), axis=1)
        if HAS_LABELS:
            e_1 = tl.exp(s - max_s[:, None])
            is_label = columns[None, :] == label[:, None]
            others = tl.sum(tl.where(is_label, 0.0, e_1), axis=1)
            below = tl.sum(tl.where(mask, s - max_s[:, None], 0.0), axis=1) / scalar(classes, ACC)
            label_logit = tl.sum(tl.where(is_label & mask, s, 0.0), axis=1)
            known = (label >= 0) & (label < classes)
            z_1 = others + tl.where(known, tl.exp(label_logit - max_s), 0.0)
            label_logit = tl.where(known, label_logit, INF - INF)
            hard = cross_entropy(max_s, z_1, below, label_logit, label, ignore_index, smooth)
            value = mixed_value(kl, hard, scalar(alpha, ACC), scalar(temperature, ACC))
            slope_q = 1.0 / z_1
            base_p = others / z_1
        if WANT_LOSS != 0:
            factor, masked = row_factor(g_weight, g_grad_loss, row, in_rows, scalar(scale, ACC), ACC, 0)
            loss = tl.where(masked, 0.0, value * factor)
            if WANT_LOSS == 1:
                tl.store(g_loss + row, loss, mask=in_rows)
            else:
                tl.store(g_loss + tl.program_id(0), tl.sum(tl.where(in_rows, loss, 0.0), axis=0))
        if g_stats is not None:
            store_stats(
                g_stats, row, in_rows, max_s, z_s, max_t, z_t, centre, tail, slope_p, slope_q, base_p, base_q,
                value,
            )  # fmt: skip
        poison = tl.where(tl.abs(value) < INF, 1.0, INF - INF)
        rz_s = poison / z_s
        rz_t = poison / z_t

    if g_grad_student is not None or g_grad_teacher is not None:
        grad_s, grad_t = row_gradients(
            s,
            t,
            max_s[:, None],
            rz_s[:, None],
            max_t[:, None],
            rz_t[:, None],
            centre[:, None],
            tail[:, None],
            slope_p[:, None],
            slope_q[:, None],
            base_p[:, None],
            base_q[:, None],
            inv_t,
            mix,
            DIVERGENCE,
        )
        if HAS_LABELS:
            grad_s, grad_t = mixed_gradients(
                s,
                columns[None, :] == label[:, None],
                mask,
                (label == ignore_index)[:, None],
                scalar(classes, ACC),
                max_s[:, None],
                tl.where(rz_s == rz_s, slope_q, INF - INF)[:, None],
                base_p[:, None],
                grad_s,
                grad_t,
                scalar(alpha, ACC),
                scalar(temperature, ACC),
                smooth,
            )
        factor, masked = row_factor(g_weight, g_grad_loss, row, in_rows, scalar(scale, ACC), ACC, GRAD_LOSS)
        factor = (factor * inv_t)[:, None]
        masked = masked[:, None]
        if g_grad_student is not None:
            start = row_start(row, rows_inner, gs_outer, gs_inner, ALIGN, TWO_LEVELS)
            grad = stored_as(tl.where(masked, 0.0, grad_s * factor), g_grad_student.dtype.element_ty)
            tl.store(g_grad_student + start[:, None] + columns[None, :], grad, mask=mask)
        if g_grad_teacher is not None:
            start = row_start(row, rows_inner, gt_outer, gt_inner, ALIGN, TWO_LEVELS)
            grad = stored_as(tl.where(masked, 0.0, grad_t * factor), g_grad_teacher.dtype.element_ty)
            tl.store(g_grad_teacher + start[:, None] + columns[None, :], grad, mask=mask)
