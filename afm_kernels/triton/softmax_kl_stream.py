"""Long rows, one (or a part of one) a program: softmax_kl and distillation in one streaming pass, and their gradients.

Every lane keeps its own maximum and sums, so that the loop over the row has no barrier; lanes, and the parts of a
split row, meet once at the end, in a fixed order. See ``softmax_kl.py`` for where each kernel serves, ``row_math.py``
for the mathematics.
"""

import triton
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
    js_terms,
    mixed_gradients,
    mixed_value,
    row_gradients,
    row_offsets,
    row_scalars,
    scalar,
    stored_as,
)
from afm_kernels.triton.row_memory import STATS, aligned_rows, kernel, row_factor, row_start, store_stats

PARTS = tl.constexpr(16)  # columns of a part of a row, of which 3 to 15 are in use


@triton.jit
def _lane_step(
    g_s, g_t, tile, lead, end,
    max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
    offset_s, offset_t, center, base, inv_t,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr,
    EDGE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Takes a tile, VECTOR neighbouring logits a lane, into every lane's maximum and sums. No lane waits.

    The row is columns ``lead`` to ``end`` of its first aligned 16 bytes on; only EDGE tiles check that.
    """
    columns = tile * (LANES * VECTOR) + (
        tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    )
    if EDGE:
        inside = (columns >= lead) & (columns < end)
        s = tl.load(g_s + columns, mask=inside, other=-INF).to(ACC)
        t = tl.load(g_t + columns, mask=inside, other=-INF).to(ACC)
    else:
        s = tl.load(g_s + columns).to(ACC)
        t = tl.load(g_t + columns).to(ACC)
    new_s = tl.maximum(max_s, tl.max(s, axis=1))
    new_t = tl.maximum(max_t, tl.max(t, axis=1))
    # -inf - -inf would be NaN; a lane that has seen excluded classes alone has sums of 0
    safe_s = tl.where(new_s == -INF, 0.0, new_s)
    safe_t = tl.where(new_t == -INF, 0.0, new_t)
    keep_s = tl.exp2((max_s - safe_s) * (inv_t * LOG2E))
    keep_t = tl.exp2((max_t - safe_t) * (inv_t * LOG2E))
    e_s = tl.exp2((s - safe_s[:, None]) * (inv_t * LOG2E))
    e_t = tl.exp2((t - safe_t[:, None]) * (inv_t * LOG2E))
    gap = (s - offset_s) - (t - offset_t)
    x = clamp_far(gap * inv_t - center)
    near = tl.abs(x) < NEAR
    ex = e_t * x
    z_s = z_s * keep_s + tl.sum(e_s, axis=1)
    z_t = z_t * keep_t + tl.sum(e_t, axis=1)
    sum_x = sum_x * keep_t + tl.sum(ex, axis=1)
    sum_a = sum_a * keep_t + tl.sum(tl.where(near, e_t * expm1_minus_identity(x), -(e_t + ex)), axis=1)
    far_s = far_s * keep_s + tl.sum(tl.where(near, 0.0, e_s), axis=1)
    lowest = tl.minimum(lowest, tl.min(gap, axis=1))
    if DIVERGENCE == JEFFREYS:
        highest = tl.maximum(highest, tl.max(gap, axis=1))
        qx = e_s * x
        sum_qx = sum_qx * keep_s + tl.sum(qx, axis=1)
        sum_qa = sum_qa * keep_s + tl.sum(tl.where(near, e_s * expm1_minus_identity(-x), qx - e_s), axis=1)
        far_t = far_t * keep_t + tl.sum(tl.where(near, 0.0, e_t), axis=1)
    if HAS_LABELS:
        z_1 = z_1 * tl.exp2((max_s - safe_s) * LOG2E) + tl.sum(tl.exp2((s - safe_s[:, None]) * LOG2E), axis=1)
        if EDGE:
            sum_s = sum_s + tl.sum(tl.where(inside, s - base, 0.0), axis=1)
        else:
            sum_s = sum_s + tl.sum(s - base, axis=1)
    return (
        new_s, z_s, new_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s
    )  # fmt: skip


@triton.jit
def _merge(
    max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
    inv_t,
):  # fmt: skip
    """Joins vectors of maxima and sums, of lanes or of parts of a row, to those of the whole."""
    top_s = tl.max(max_s, axis=0)
    top_t = tl.max(max_t, axis=0)
    below_s = max_s - tl.where(top_s == -INF, 0.0, top_s)
    keep_s = tl.exp2(below_s * (inv_t * LOG2E))
    keep_t = tl.exp2((max_t - tl.where(top_t == -INF, 0.0, top_t)) * (inv_t * LOG2E))
    return (
        top_s,
        tl.sum(z_s * keep_s, axis=0),
        top_t,
        tl.sum(z_t * keep_t, axis=0),
        tl.sum(sum_x * keep_t, axis=0),
        tl.sum(sum_a * keep_t, axis=0),
        tl.sum(far_s * keep_s, axis=0),
        tl.min(lowest, axis=0),
        tl.max(highest, axis=0),
        tl.sum(sum_qx * keep_s, axis=0),
        tl.sum(sum_qa * keep_s, axis=0),
        tl.sum(far_t * keep_t, axis=0),
        tl.sum(z_1 * tl.exp2(below_s * LOG2E), axis=0),
        tl.sum(sum_s, axis=0),
    )


@triton.jit
def _finish_row(
    g_weight, g_labels, g_loss, g_stats, g_row, row, rows, classes,
    max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
    offset_s, offset_t, center, base, inv_t, ignore_index, temperature, scale, alpha, smoothing,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The loss and the scalars of a row from its sums."""
    z_s = tl.where(max_s == -INF, INF - INF, z_s)
    z_t = tl.where(max_t == -INF, INF - INF, z_t)
    apart = (max_s - offset_s) - (max_t - offset_t)
    exponent = apart * (inv_t * LOG2E) - center * LOG2E
    far = far_s * tl.exp2(tl.minimum(exponent, MAX_EXPONENT))
    r = sum_x / z_t
    centre, tail, kl = row_scalars(z_s, z_t, apart, center, r, (sum_a + far) / z_t, lowest, inv_t)
    value = kl
    slope_p = kl
    slope_q = kl
    if DIVERGENCE == JEFFREYS:
        far = far_t * tl.exp2(tl.minimum(-exponent, MAX_EXPONENT))
        r = -sum_qx / z_s
        a = (sum_qa + far) / z_s
        _, _, slope_q = row_scalars(z_t, z_s, -apart, -center, r, a, -highest, inv_t)
        value = kl + slope_q
    if HAS_LABELS:
        label = tl.load(g_labels + row)
        known = (label >= 0) & (label < classes)
        label_logit = tl.load(g_row + label, mask=known, other=INF - INF).to(ACC)
        below = sum_s / scalar(classes, ACC) + (base - max_s)
        hard = cross_entropy(max_s, z_1, below, label_logit, label, ignore_index, scalar(smoothing, ACC))
        value = mixed_value(kl, hard, scalar(alpha, ACC), scalar(temperature, ACC))
        slope_q = 1.0 / z_1
    # From the offsets of this pass to those that a gradient finds again in the row's maxima.
    row_offset_s, row_offset_t = row_offsets(max_s, max_t)
    centre = centre + ((offset_s - row_offset_s) - (offset_t - row_offset_t)) * inv_t
    in_rows = row < rows
    if DIVERGENCE == JS:
        value = tl.abs(centre)  # finite where the row has its two distributions: JS has no infinite rows
    if g_loss is not None:
        factor, masked = row_factor(g_weight, None, row, in_rows, scalar(scale, ACC), ACC, 0)
        tl.store(g_loss + row, tl.where(masked, 0.0, value * factor))
    store_stats(g_stats, row, in_rows, max_s, z_s, max_t, z_t, centre, tail, slope_p, slope_q, value)


@triton.jit
def _row_constants(g_s, g_t, tile, inv_t, LANES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """offsets, centre and base of a row, from one tile of it: near its own, and the same for all its parts.

    The centre is the tile's mean of d under p: the nearer it is to the row's, the less cancels in the end; it
    takes a tile that is not typical of the row by 30 to lose 1e-2 of a KL below 1.
    """
    columns = tile * (LANES * VECTOR) + (
        tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    )
    s = tl.load(g_s + columns).to(ACC)
    t = tl.load(g_t + columns).to(ACC)
    max_s = tl.max(tl.max(s, axis=1), axis=0)
    max_t = tl.max(tl.max(t, axis=1), axis=0)
    offset_s, offset_t = row_offsets(max_s, max_t)
    e_t = tl.exp2((t - max_t) * (inv_t * LOG2E))
    d = clamp_far(((s - offset_s) - (t - offset_t)) * inv_t)
    centre = tl.sum(tl.sum(e_t * d, axis=1), axis=0) / tl.sum(tl.sum(e_t, axis=1), axis=0)
    # NaN where the tile has no finite logit: any constant serves such a row
    centre = tl.where(tl.abs(centre) < FAR, centre, 0.0)
    base = tl.where(tl.abs(max_s) < INF, max_s, 0.0)
    return offset_s, offset_t, centre, base


@kernel
def stream_kernel(
    g_student,
    g_teacher,
    g_weight,
    g_labels,
    g_loss,
    g_stats,
    g_parts,
    rows: tl.int64,
    classes: tl.int64,
    rows_inner: tl.int64,
    s_outer: tl.int64,
    s_inner: tl.int64,
    t_outer: tl.int64,
    t_inner: tl.int64,
    ignore_index: tl.int64,
    splits: tl.int64,
    tiles_per_split: tl.int64,
    temperature: tl.float64,
    inv_temperature: tl.float64,
    scale: tl.float64,
    alpha: tl.float64,
    smoothing: tl.float64,
    DIVERGENCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    SPLIT: tl.constexpr,
    PHASE: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    inv_t = scalar(inv_temperature, ACC)
    if SPLIT:
        row = tl.program_id(0).to(tl.int64) // splits
        part = (tl.program_id(0).to(tl.int64) % splits).to(tl.int32)
    else:
        row = tl.program_id(0).to(tl.int64)
    g_s, g_t, lead = aligned_rows(
        g_student, g_teacher, row, rows_inner, s_outer, s_inner, t_outer, t_inner, PHASE, TWO_LEVELS, VECTOR
    )
    end = lead + classes.to(tl.int32)
    # Tiles body_begin to body_end are whole; at most one before them and one after them is not.
    body_begin = (lead + (LANES * VECTOR - 1)) // (LANES * VECTOR)
    body_end = end // (LANES * VECTOR)
    tiles = (end + (LANES * VECTOR - 1)) // (LANES * VECTOR)
    offset_s, offset_t, center, base = _row_constants(g_s, g_t, body_begin, inv_t, LANES, VECTOR, ACC)

    begin = 0
    finish = tiles
    if SPLIT:
        begin = part * tiles_per_split.to(tl.int32)
        finish = tl.minimum(begin + tiles_per_split.to(tl.int32), tiles)
    zero = tl.zeros([LANES], ACC)
    max_s, max_t, lowest, highest = zero - INF, zero - INF, zero + INF, zero - INF
    z_s, z_t, sum_x, sum_a, far_s, sum_qx, sum_qa = zero, zero, zero, zero, zero, zero, zero
    far_t, z_1, sum_s = zero, zero, zero
    for tile in range(tl.maximum(begin, body_begin), tl.minimum(finish, body_end)):
        max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s = _lane_step(
            g_s, g_t, tile, lead, end,
            max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
            offset_s, offset_t, center, base, inv_t, DIVERGENCE, HAS_LABELS, False, LANES, VECTOR, ACC,
        )  # fmt: skip
    for edge in range(2):
        tile = edge * (tiles - 1)
        if (tile >= begin) & (tile < finish) & ((tile < body_begin) | (tile >= body_end)):
            max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s = _lane_step(  # noqa: E501
                g_s, g_t, tile, lead, end,
                max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
                offset_s, offset_t, center, base, inv_t, DIVERGENCE, HAS_LABELS, True, LANES, VECTOR, ACC,
            )  # fmt: skip
    max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s = _merge(
        max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s, inv_t
    )
    if SPLIT:
        at = g_parts + tl.program_id(0).to(tl.int64) * PARTS
        tl.store(at + 0, max_s)
        tl.store(at + 1, z_s)
        tl.store(at + 2, max_t)
        tl.store(at + 3, z_t)
        tl.store(at + 4, sum_x)
        tl.store(at + 5, sum_a)
        tl.store(at + 6, far_s)
        tl.store(at + 7, lowest)
        tl.store(at + 8, offset_s)
        tl.store(at + 9, center)
        tl.store(at + 14, offset_t)
        if DIVERGENCE == JEFFREYS:
            tl.store(at + 10, highest)
            tl.store(at + 11, sum_qx)
            tl.store(at + 12, sum_qa)
            tl.store(at + 13, far_t)
        if HAS_LABELS:
            tl.store(at + 10, z_1)
            tl.store(at + 11, sum_s)
            tl.store(at + 12, base)
    else:
        g_row = g_s + lead
        _finish_row(
            g_weight, g_labels, g_loss, g_stats, g_row, row, rows, classes,
            max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
            offset_s, offset_t, center, base, inv_t, ignore_index, temperature, scale, alpha, smoothing,
            DIVERGENCE, HAS_LABELS, ACC,
        )  # fmt: skip


@kernel
def combine_kernel(
    g_student,
    g_weight,
    g_labels,
    g_loss,
    g_stats,
    g_parts,
    rows: tl.int64,
    classes: tl.int64,
    rows_inner: tl.int64,
    s_outer: tl.int64,
    s_inner: tl.int64,
    ignore_index: tl.int64,
    splits: tl.int64,
    temperature: tl.float64,
    inv_temperature: tl.float64,
    scale: tl.float64,
    alpha: tl.float64,
    smoothing: tl.float64,
    DIVERGENCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts of one row to its loss and scalars."""
    inv_t = scalar(inv_temperature, ACC)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    mask = part < splits
    first = g_parts + row * splits * PARTS
    at = first + part * PARTS
    max_s = tl.load(at + 0, mask=mask, other=-INF)
    z_s = tl.load(at + 1, mask=mask, other=0.0)
    max_t = tl.load(at + 2, mask=mask, other=-INF)
    z_t = tl.load(at + 3, mask=mask, other=0.0)
    sum_x = tl.load(at + 4, mask=mask, other=0.0)
    sum_a = tl.load(at + 5, mask=mask, other=0.0)
    far_s = tl.load(at + 6, mask=mask, other=0.0)
    lowest = tl.load(at + 7, mask=mask, other=INF)
    offset_s = tl.load(first + 8)
    center = tl.load(first + 9)
    offset_t = tl.load(first + 14)
    base = center
    highest, sum_qx, sum_qa, far_t, z_1, sum_s = lowest, z_s, z_s, z_s, z_s, z_s
    if DIVERGENCE == JEFFREYS:
        highest = tl.load(at + 10, mask=mask, other=-INF)
        sum_qx = tl.load(at + 11, mask=mask, other=0.0)
        sum_qa = tl.load(at + 12, mask=mask, other=0.0)
        far_t = tl.load(at + 13, mask=mask, other=0.0)
    if HAS_LABELS:
        z_1 = tl.load(at + 10, mask=mask, other=0.0)
        sum_s = tl.load(at + 11, mask=mask, other=0.0)
        base = tl.load(first + 12)
    max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s = _merge(
        max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s, inv_t
    )
    g_row = g_student + row_start(row, rows_inner, s_outer, s_inner, 1, TWO_LEVELS)
    _finish_row(
        g_weight, g_labels, g_loss, g_stats, g_row, row, rows, classes,
        max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
        offset_s, offset_t, center, base, inv_t, ignore_index, temperature, scale, alpha, smoothing,
        DIVERGENCE, HAS_LABELS, ACC,
    )  # fmt: skip


@triton.jit
def _js_step(
    g_s, g_t, tile, lead, end, max_s, rz_s, max_t, rz_t, centre, tail, inv_t, beta,
    value, sum_p, sum_q, EDGE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Takes a tile into every lane's sums of JS."""
    columns = tile * (LANES * VECTOR) + (
        tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    )
    if EDGE:
        inside = (columns >= lead) & (columns < end)
        s = tl.load(g_s + columns, mask=inside, other=-INF).to(ACC)
        t = tl.load(g_t + columns, mask=inside, other=-INF).to(ACC)
    else:
        s = tl.load(g_s + columns).to(ACC)
        t = tl.load(g_t + columns).to(ACC)
    p = tl.exp2((t - max_t) * (inv_t * LOG2E)) * rz_t
    q = tl.exp2((s - max_s) * (inv_t * LOG2E)) * rz_s
    offset_s, offset_t = row_offsets(max_s, max_t)
    u = (clamp_far(((s - offset_s) - (t - offset_t)) * inv_t) - centre) - tail
    terms, p_m, q_m = js_terms(p, q, u, beta)
    return value + tl.sum(terms, axis=1), sum_p + tl.sum(p_m, axis=1), sum_q + tl.sum(q_m, axis=1)


@kernel
def js_stream_kernel(
    g_student,
    g_teacher,
    g_stats,
    g_parts,
    rows: tl.int64,
    classes: tl.int64,
    rows_inner: tl.int64,
    s_outer: tl.int64,
    s_inner: tl.int64,
    t_outer: tl.int64,
    t_inner: tl.int64,
    splits: tl.int64,
    tiles_per_split: tl.int64,
    inv_temperature: tl.float64,
    beta: tl.float64,
    PHASE: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Second pass of JS over a part of a row: its sums, given the normalisers."""
    inv_t = scalar(inv_temperature, ACC)
    mix = scalar(beta, ACC)
    row = tl.program_id(0).to(tl.int64) // splits
    part = (tl.program_id(0).to(tl.int64) % splits).to(tl.int32)
    g_s, g_t, lead = aligned_rows(
        g_student, g_teacher, row, rows_inner, s_outer, s_inner, t_outer, t_inner, PHASE, TWO_LEVELS, VECTOR
    )
    end = lead + classes.to(tl.int32)
    body_begin = (lead + (LANES * VECTOR - 1)) // (LANES * VECTOR)
    body_end = end // (LANES * VECTOR)
    tiles = (end + (LANES * VECTOR - 1)) // (LANES * VECTOR)
    begin = part * tiles_per_split.to(tl.int32)
    finish = tl.minimum(begin + tiles_per_split.to(tl.int32), tiles)
    at = g_stats + row * STATS
    max_s = tl.load(at + 0)
    rz_s = tl.load(at + 1)
    max_t = tl.load(at + 2)
    rz_t = tl.load(at + 3)
    centre = tl.load(at + 4)
    tail = tl.load(at + 5)
    zero = tl.zeros([LANES], ACC)
    value, sum_p, sum_q = zero, zero, zero
    for tile in range(tl.maximum(begin, body_begin), tl.minimum(finish, body_end)):
        value, sum_p, sum_q = _js_step(
            g_s, g_t, tile, lead, end, max_s, rz_s, max_t, rz_t, centre, tail, inv_t, mix,
            value, sum_p, sum_q, False, LANES, VECTOR, ACC,
        )  # fmt: skip
    for edge in range(2):
        tile = edge * (tiles - 1)
        if (tile >= begin) & (tile < finish) & ((tile < body_begin) | (tile >= body_end)):
            value, sum_p, sum_q = _js_step(
                g_s, g_t, tile, lead, end, max_s, rz_s, max_t, rz_t, centre, tail, inv_t, mix,
                value, sum_p, sum_q, True, LANES, VECTOR, ACC,
            )  # fmt: skip
    at = g_parts + tl.program_id(0).to(tl.int64) * PARTS
    tl.store(at + 0, tl.sum(value, axis=0))
    tl.store(at + 1, tl.sum(sum_p, axis=0))
    tl.store(at + 2, tl.sum(sum_q, axis=0))


@kernel
def js_combine_kernel(
    g_weight,
    g_loss,
    g_stats,
    g_parts,
    rows: tl.int64,
    splits: tl.int64,
    scale: tl.float64,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts of one row's JS to its loss and slopes."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    mask = part < splits
    at = g_parts + (row * splits + part) * PARTS
    value = tl.sum(tl.load(at + 0, mask=mask, other=0.0), axis=0)
    value = tl.where(value < 0.0, 0.0, value)
    tl.store(g_stats + row * STATS + 6, tl.sum(tl.load(at + 1, mask=mask, other=0.0), axis=0))
    tl.store(g_stats + row * STATS + 7, tl.sum(tl.load(at + 2, mask=mask, other=0.0), axis=0))
    if g_loss is not None:
        factor, masked = row_factor(g_weight, None, row, row < rows, scalar(scale, ACC), ACC, 0)
        tl.store(g_loss + row, tl.where(masked, 0.0, value * factor))


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
    at = g_stats + row * STATS
    max_s = tl.load(at + 0)
    rz_s = tl.load(at + 1)
    max_t = tl.load(at + 2)
    rz_t = tl.load(at + 3)
    centre = tl.load(at + 4)
    tail = tl.load(at + 5)
    slope_p = tl.load(at + 6)
    slope_q = tl.load(at + 7)
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
        s, t, max_s, rz_s, max_t, rz_t, centre, tail, slope_p, slope_q, inv_t, scalar(beta, ACC), DIVERGENCE
    )
    if HAS_LABELS:
        grad_s, grad_t = mixed_gradients(
            s,
            columns - lead == label,
            inside,
            label == ignore_index,
            scalar(classes, ACC),
            max_s,
            tl.where(rz_s == rz_s, slope_q, INF - INF),
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


@kernel
def sum_kernel(g_values, g_loss, count: tl.int64, BLOCK: tl.constexpr):
    """The sum of ``count`` values, in one program and hence in one order."""
    total = tl.zeros([BLOCK], g_loss.dtype.element_ty)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(g_values + at, mask=at < count, other=0.0)
    tl.store(g_loss, tl.sum(total, axis=0))
