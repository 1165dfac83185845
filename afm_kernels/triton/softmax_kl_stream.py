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
    log1p_any,
    mixed_value,
    row_offsets,
    row_scalars,
    scalar,
)
from afm_kernels.triton.row_memory import (
    PARTS,
    STATS,
    aligned_rows,
    kernel,
    lane_columns,
    load_pair,
    row_factor,
    row_start,
    store_stats,
    tile_columns,
    tiles_of_part,
)


@triton.jit
def _lane_step(
    g_s, g_t, tile, lead, end,
    max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
    offset_s, offset_t, center, base, inv_t,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr,
    EDGE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Takes a tile, VECTOR neighbouring logits a lane, into every lane's maximum and sums. No lane waits."""
    columns = tile_columns(tile, LANES, VECTOR)
    s, t = load_pair(g_s, g_t, columns, lead, end, EDGE, ACC)
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
            inside = (columns >= lead) & (columns < end)
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
def _lane_without_peak(
    g_s, g_t, lane, begin, finish, lead, end, top_s, top_t, offset_s, offset_t, center, inv_t,
    STUDENTS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One lane's sums again, without the class of the largest logit of a side: of e_t, e_s, e_t x and e_s x; and that
    class's x and s. See Note [Certain rows].

    It is not what takes time, and goes one class a lane at a time, so that it needs no more registers than the pass.
    """
    zero = tl.zeros([LANES], ACC)
    z_t, z_s, sum_x, sum_qx, peak_x, peak_s = zero, zero, zero, zero, zero - INF, zero - INF
    for index in range(0, (finish - begin + LANES - 1) // LANES * VECTOR):
        columns, is_there = lane_columns(index, lane, begin, finish, LANES, VECTOR)
        s, t = load_pair(g_s, g_t, tl.where(is_there, columns, end), lead, end, True, ACC)
        if STUDENTS:
            is_peak = s == top_s
        else:
            is_peak = t == top_t
        x = clamp_far(((s - offset_s) - (t - offset_t)) * inv_t - center)
        e_t = tl.where(is_peak, 0.0, tl.exp((t - top_t) * inv_t))
        e_s = tl.where(is_peak, 0.0, tl.exp((s - top_s) * inv_t))
        z_t += e_t
        z_s += e_s
        sum_x += e_t * x
        sum_qx += e_s * x
        peak_x = tl.maximum(peak_x, tl.where(is_peak, x, -INF))
        peak_s = tl.maximum(peak_s, tl.where(is_peak, s, -INF))
    return (
        tl.sum(z_t, axis=0), tl.sum(z_s, axis=0), tl.sum(sum_x, axis=0), tl.sum(sum_qx, axis=0),
        tl.max(peak_x, axis=0), tl.max(peak_s, axis=0),
    )  # fmt: skip


@triton.jit
def _rest_of_row(
    max_s, z_s, max_t, z_t, sum_x, sum_qx, top_s, top_t, inv_t, winner,
    own_t, own_s, own_x, own_qx, peak_x, MANY: tl.constexpr,
):  # fmt: skip
    """A row's sums without its peak, from those of its lanes or parts: the ``winner``'s own ones without it are given.

    Returned are those of e_t and e_s, and of e_t (x - peak_x) and e_s (x - peak_x).
    """
    other = tl.arange(0, MANY) != winner
    keep_s = tl.where(other, tl.exp((max_s - top_s) * inv_t), 0.0)
    keep_t = tl.where(other, tl.exp((max_t - top_t) * inv_t), 0.0)
    rest_t = own_t + tl.sum(z_t * keep_t, axis=0)
    rest_s = own_s + tl.sum(z_s * keep_s, axis=0)
    rest_x = (own_x - peak_x * own_t) + tl.sum((sum_x - peak_x * z_t) * keep_t, axis=0)
    rest_qx = (own_qx - peak_x * own_s) + tl.sum((sum_qx - peak_x * z_s) * keep_s, axis=0)
    return rest_t, rest_s, rest_x, rest_qx


@triton.jit
def _finish_row(
    g_weight, g_labels, g_loss, g_stats, g_row, row, rows, classes,
    max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
    rest_t, rest_s, rest_x, rest_qx, peak_x, peak_s, own_rest, own_x, lane, own_lane,
    offset_s, offset_t, center, base, inv_t, ignore_index, temperature, scale, alpha, smoothing,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The loss and the scalars of a row from its sums."""
    certain = (z_t < 2.0) & (tl.abs(peak_x) < FAR)
    z_s = tl.where(max_s == -INF, INF - INF, z_s)
    z_t = tl.where(max_t == -INF, INF - INF, z_t)
    apart = (max_s - offset_s) - (max_t - offset_t)
    exponent = apart * (inv_t * LOG2E) - center * LOG2E
    far = far_s * tl.exp2(tl.minimum(exponent, MAX_EXPONENT))
    r = sum_x / z_t
    centre, tail, slope_p, kl = row_scalars(
        z_s, z_t, apart, center, r, (sum_a + far) / z_t, lowest, certain, inv_t
    )
    slope_q = kl
    if DIVERGENCE == JEFFREYS:
        far = far_t * tl.exp2(tl.minimum(-exponent, MAX_EXPONENT))
        r = -sum_qx / z_s
        a = (sum_qa + far) / z_s
        _, _, _, reverse = row_scalars(z_t, z_s, -apart, -center, r, a, -highest, r != r, inv_t)
        slope_q = reverse + tail
    # To the heaviest class as centre. tail is then -u there: of two sums without that class, or of what it was.
    below = (peak_s - max_s) * inv_t  # 0 where it is the student's heaviest class too
    at_peak = tl.where(below == 0.0, log1p_any(rest_s), tl.log(z_s) - below) - log1p_any(rest_t)
    at_peak = tl.where(rest_t < tl.abs(peak_x), at_peak, tail - peak_x)
    centre = tl.where(certain, center + peak_x, centre)
    tail = tl.where(certain, at_peak, tail)
    slope_p = tl.where(certain, rest_x / z_t, slope_p)
    slope_q = tl.where(certain, rest_qx / z_s, slope_q)
    value = kl
    base_p = kl
    base_q = kl
    if DIVERGENCE == JEFFREYS:
        value = kl + reverse
    if HAS_LABELS:
        label = tl.load(g_labels + row)
        known = (label >= 0) & (label < classes)
        label_logit = tl.load(g_row + label, mask=known, other=INF - INF).to(ACC)
        below = sum_s / scalar(classes, ACC) + (base - max_s)
        hard = cross_entropy(max_s, z_1, below, label_logit, label, ignore_index, scalar(smoothing, ACC))
        value = mixed_value(kl, hard, scalar(alpha, ACC), scalar(temperature, ACC))
        slope_q = 1.0 / z_1
        missing = 1.0 - tl.exp(label_logit - max_s) * slope_q
        base_p = tl.where((label_logit == max_s) & (z_1 < 2.0), own_rest * slope_q, missing)
    # From the offsets of this pass to those that a gradient finds again in the row's maxima.
    row_offset_s, row_offset_t = row_offsets(max_s, max_t)
    shift = ((offset_s - row_offset_s) - (offset_t - row_offset_t)) * inv_t
    in_rows = row < rows
    if DIVERGENCE == JS:
        value = tl.abs(
            centre + tail
        )  # finite where the row has its two distributions: JS has no infinite rows
        # For the second pass: the mass of the classes but the heaviest, u of that, and its lane, on each side.
        tl.store(g_stats + row * STATS + 10, lane.to(ACC))
        tl.store(g_stats + row * STATS + 11, own_lane.to(ACC))
        slope_p = tl.where(z_t < 2.0, rest_t / z_t, 0.0)
        slope_q = tl.where(z_s < 2.0, own_rest / z_s, 0.0)
        base_p = tl.where(certain, -tail, clamp_far((peak_x + center - centre) - tail))
        base_q = clamp_far((own_x + center - centre) - tail)
    # The heaviest class's d as a gradient computes it, bit by bit.
    at_peak = clamp_far(((peak_s - row_offset_s) - (max_t - row_offset_t)) * inv_t)
    centre = tl.where(certain, at_peak, centre + shift)
    if g_loss is not None:
        factor, masked = row_factor(g_weight, None, row, in_rows, scalar(scale, ACC), ACC, 0)
        tl.store(g_loss + row, tl.where(masked, 0.0, value * factor))
    store_stats(
        g_stats, row, in_rows, max_s, z_s, max_t, z_t, centre, tail, slope_p, slope_q, base_p, base_q, value
    )


@triton.jit
def _row_constants(g_s, g_t, tile, inv_t, LANES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """offsets, centre and base of a row, from one tile of it: near its own, and the same for all its parts.

    The centre is the tile's mean of d under p: the nearer it is to the row's, the less cancels in the end; it
    takes a tile that is not typical of the row by 30 to lose 1e-2 of a KL below 1.
    """
    columns = tile_columns(tile, LANES, VECTOR)
    s, t = load_pair(g_s, g_t, columns, 0, 0, False, ACC)
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
        part = 0
    g_s, g_t, lead = aligned_rows(
        g_student, g_teacher, row, rows_inner, s_outer, s_inner, t_outer, t_inner, PHASE, TWO_LEVELS, VECTOR
    )
    end, body_begin, body_end, tiles, begin, finish = tiles_of_part(
        lead, classes, part, tiles_per_split, SPLIT, LANES, VECTOR
    )
    offset_s, offset_t, center, base = _row_constants(g_s, g_t, body_begin, inv_t, LANES, VECTOR, ACC)

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
    lanes_max_s, lanes_z_s, lanes_max_t, lanes_z_t, lanes_x, lanes_qx, lanes_z_1 = (
        max_s, z_s, max_t, z_t, sum_x, sum_qx, z_1
    )  # fmt: skip
    max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s = _merge(
        max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s, inv_t
    )
    # Of rows, or parts of them, that are certain: the sums without the teacher's heaviest class, and without the
    # student's own. See Note [Certain rows].
    rest_t, rest_s, rest_x, rest_qx = z_t - 1.0, z_s - 1.0, sum_x, sum_qx
    peak_x, peak_s, own_rest, own_x = sum_x * 0.0, max_s, z_s - 1.0, sum_x * 0.0
    lane = tl.argmax(lanes_max_t, axis=0).to(tl.int32)
    own_lane = lane
    if z_t < 2.0:
        own_t, own_s, lane_x, own_qx, peak_x, peak_s = _lane_without_peak(
            g_s, g_t, lane, begin, finish, lead, end, max_s, max_t, offset_s, offset_t, center, inv_t,
            False, LANES, VECTOR, ACC,
        )  # fmt: skip
        rest_t, rest_s, rest_x, rest_qx = _rest_of_row(
            lanes_max_s, lanes_z_s, lanes_max_t, lanes_z_t, lanes_x, lanes_qx, max_s, max_t, inv_t,
            lane, own_t, own_s, lane_x, own_qx, peak_x, LANES,
        )  # fmt: skip
    if DIVERGENCE == JS or HAS_LABELS:
        own_inv_t = inv_t
        lanes_own, own_z = lanes_z_s, z_s
        if HAS_LABELS:  # the cross-entropy has no temperature
            own_inv_t = scalar(1.0, ACC)
            lanes_own, own_z = lanes_z_1, z_1
        own_lane = tl.argmax(lanes_max_s, axis=0).to(tl.int32)
        if own_z < 2.0:
            _, own_s, _, _, own_x, _ = _lane_without_peak(
                g_s, g_t, own_lane, begin, finish, lead, end, max_s, max_t, offset_s, offset_t, center, own_inv_t,
                True, LANES, VECTOR, ACC,
            )  # fmt: skip
            keep = tl.exp((lanes_max_s - max_s) * own_inv_t)
            own_rest = own_s + tl.sum(
                tl.where(tl.arange(0, LANES) == own_lane, 0.0, lanes_own * keep), axis=0
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
        tl.store(at + 15, rest_t)
        tl.store(at + 16, rest_s)
        tl.store(at + 17, rest_x)
        tl.store(at + 18, peak_x)
        tl.store(at + 19, peak_s)
        if DIVERGENCE == JEFFREYS:
            tl.store(at + 10, highest)
            tl.store(at + 11, sum_qx)
            tl.store(at + 12, sum_qa)
            tl.store(at + 13, far_t)
            tl.store(at + 20, rest_qx)
        if HAS_LABELS:
            tl.store(at + 10, z_1)
            tl.store(at + 11, sum_s)
            tl.store(at + 12, base)
        if DIVERGENCE == JS or HAS_LABELS:
            tl.store(at + 21, own_rest)
            tl.store(at + 22, own_x)
            tl.store(at + 23, lane.to(ACC))
            tl.store(at + 24, own_lane.to(ACC))
    else:
        g_row = g_s + lead
        _finish_row(
            g_weight, g_labels, g_loss, g_stats, g_row, row, rows, classes,
            max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
            rest_t, rest_s, rest_x, rest_qx, peak_x, peak_s, own_rest, own_x, lane, own_lane,
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
    parts_max_s, parts_z_s, parts_max_t, parts_z_t, parts_x, parts_qx, parts_z_1 = (
        max_s, z_s, max_t, z_t, sum_x, sum_qx, z_1
    )  # fmt: skip
    max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s = _merge(
        max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s, inv_t
    )
    # The sums without the heaviest class: the part that has it left it out already.
    winner = tl.argmax(parts_max_t, axis=0).to(tl.int32)
    peak = first + winner * PARTS
    peak_x = tl.load(peak + 18)
    peak_s = tl.load(peak + 19)
    own_t = tl.load(peak + 15)
    keep = tl.exp((tl.load(peak + 0) - max_s) * inv_t)
    own_s = tl.load(peak + 16) * keep
    own_qx = own_s
    if DIVERGENCE == JEFFREYS:
        own_qx = tl.load(peak + 20) * keep
    rest_t, rest_s, rest_x, rest_qx = _rest_of_row(
        parts_max_s, parts_z_s, parts_max_t, parts_z_t, parts_x, parts_qx, max_s, max_t, inv_t,
        winner, own_t, own_s, tl.load(peak + 17) + peak_x * own_t, own_qx + peak_x * own_s, peak_x, SPLITS,
    )  # fmt: skip
    own_rest, own_x, lane, own_lane = rest_s, rest_x, winner, winner
    if DIVERGENCE == JS or HAS_LABELS:
        lane = tl.load(peak + 23)
        winner = tl.argmax(parts_max_s, axis=0).to(tl.int32)
        peak = first + winner * PARTS
        own_x = tl.load(peak + 22)
        own_lane = tl.load(peak + 24)
        keep = tl.where(part == winner, 0.0, tl.exp((parts_max_s - max_s) * inv_t))
        others = parts_z_s
        if HAS_LABELS:
            keep = tl.where(part == winner, 0.0, tl.exp(parts_max_s - max_s))
            others = parts_z_1
        own_rest = tl.load(peak + 21) + tl.sum(others * keep, axis=0)
    g_row = g_student + row_start(row, rows_inner, s_outer, s_inner, 1, TWO_LEVELS)
    _finish_row(
        g_weight, g_labels, g_loss, g_stats, g_row, row, rows, classes,
        max_s, z_s, max_t, z_t, sum_x, sum_a, far_s, lowest, highest, sum_qx, sum_qa, far_t, z_1, sum_s,
        rest_t, rest_s, rest_x, rest_qx, peak_x, peak_s, own_rest, own_x, lane, own_lane,
        offset_s, offset_t, center, base, inv_t, ignore_index, temperature, scale, alpha, smoothing,
        DIVERGENCE, HAS_LABELS, ACC,
    )  # fmt: skip


@kernel
def sum_kernel(g_values, g_loss, count: tl.int64, BLOCK: tl.constexpr):
    """The sum of ``count`` values, in one program and hence in one order."""
    total = tl.zeros([BLOCK], g_loss.dtype.element_ty)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(g_values + at, mask=at < count, other=0.0)
    tl.store(g_loss, tl.sum(total, axis=0))
