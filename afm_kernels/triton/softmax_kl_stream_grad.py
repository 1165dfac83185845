"""The gradients of long rows from their scalars, which ``softmax_kl_stream`` and ``softmax_kl_js`` make."""

import triton.language as tl

from afm_kernels.triton.row_math import (
    INF,
    mixed_gradients,
    row_gradients,
    scalar,
    stored_as,
)
from afm_kernels.triton.row_memory import (
    aligned_rows,
    kernel,
    load_stats,
    row_factor,
    row_start,
)


@kernel
def stream_grad_kernel(
    g_student,
    g_teacher,
    g_weight,
    g_labels,
    g_grad_loss,
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
    splits: tl.int64,
    temperature: tl.float64,
    inv_temperature: tl.float64,
    scale: tl.float64,
    beta: tl.float64,
    alpha: tl.float64,
    smoothing: tl.float64,
    DIVERGENCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    GRAD_LOSS: tl.constexpr,
    PHASE: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """BLOCK classes of one row: their gradients, from the row's scalars. ``splits`` programs a row."""
    inv_t = scalar(inv_temperature, ACC)
    row = tl.program_id(0).to(tl.int64) // splits
    tile = (tl.program_id(0).to(tl.int64) % splits).to(tl.int32)
    g_s, g_t, lead = aligned_rows(
        g_student, g_teacher, row, rows_inner, s_outer, s_inner, t_outer, t_inner, PHASE, TWO_LEVELS, VECTOR
    )
    end = lead + classes.to(tl.int32)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    max_s, rz_s, max_t, rz_t, centre, tail, slope_p, slope_q, base_p, base_q = load_stats(g_stats, row, None)
    factor, masked = row_factor(g_weight, g_grad_loss, row, row < rows, scalar(scale, ACC), ACC, GRAD_LOSS)
    label = row
    if HAS_LABELS:
        label = tl.load(g_labels + row)
    whole = (tile * BLOCK >= lead) & (tile * BLOCK + BLOCK <= end)
    if whole:
        s = tl.load(g_s + columns).to(ACC)
        t = tl.load(g_t + columns).to(ACC)
        inside = columns == columns
    else:
        inside = (columns >= lead) & (columns < end)
        s = tl.load(g_s + columns, mask=inside, other=-INF).to(ACC)
        t = tl.load(g_t + columns, mask=inside, other=-INF).to(ACC)
    grad_s, grad_t = row_gradients(
        s, t, max_s, rz_s, max_t, rz_t, centre, tail, slope_p, slope_q, base_p, base_q, inv_t, scalar(beta, ACC),
        DIVERGENCE,
    )  # fmt: skip
    if HAS_LABELS:
        grad_s, grad_t = mixed_gradients(
            s,
            columns - lead == label,
            inside,
            label == ignore_index,
            scalar(classes, ACC),
            max_s,
            tl.where(rz_s == rz_s, slope_q, INF - INF),
            base_p,
            grad_s,
            grad_t,
            scalar(alpha, ACC),
            scalar(temperature, ACC),
            scalar(smoothing, ACC),
        )
    grad_s = tl.where(masked, 0.0, grad_s * (factor * inv_t))
    grad_t = tl.where(masked, 0.0, grad_t * (factor * inv_t))
    if g_grad_student is not None:
        start = row_start(row, rows_inner, gs_outer, gs_inner, 1, TWO_LEVELS)
        if PHASE:
            start = start // VECTOR * VECTOR
        g_out = g_grad_student + start
        if whole:
            tl.store(g_out + columns, stored_as(grad_s, g_grad_student.dtype.element_ty))
        else:
            tl.store(g_out + columns, stored_as(grad_s, g_grad_student.dtype.element_ty), mask=inside)
    if g_grad_teacher is not None:
        start = row_start(row, rows_inner, gt_outer, gt_inner, 1, TWO_LEVELS)
        if PHASE:
            start = start // VECTOR * VECTOR
        g_out = g_grad_teacher + start
        if whole:
            tl.store(g_out + columns, stored_as(grad_t, g_grad_teacher.dtype.element_ty))
        else:
            tl.store(g_out + columns, stored_as(grad_t, g_grad_teacher.dtype.element_ty), mask=inside)
