"""The second pass of JS over long rows: its sums need the normalisers of the first, that of ``softmax_kl_stream``."""

import triton
import triton.language as tl

from afm_kernels.triton.row_math import (
    clamp_far,
    js_logs,
    js_terms,
    row_offsets,
    scalar,
)
from afm_kernels.triton.row_memory import (
    PARTS,
    STATS,
    aligned_rows,
    kernel,
    lane_columns,
    load_pair,
    load_stats,
    row_factor,
    tile_columns,
    tiles_of_part,
)


@triton.jit
def _js_classes(
    g_s, g_t, columns, lead, end, max_s, rz_s, max_t, rz_t, centre, tail, inv_t, beta,
    EDGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The logits of some classes, their shares of JS, and p·(log m - log p), q·(log q - log m)."""
    s, t = load_pair(g_s, g_t, columns, lead, end, EDGE, ACC)
    p = tl.exp((t - max_t) * inv_t) * rz_t
    q = tl.exp((s - max_s) * inv_t) * rz_s
    offset_s, offset_t = row_offsets(max_s, max_t)
    u = (clamp_far(((s - offset_s) - (t - offset_t)) * inv_t) - centre) - tail
    terms, m_over_p, q_over_m = js_terms(p, q, u, beta)
    return s, t, terms, p * m_over_p, q * q_over_m


@triton.jit
def _js_step(
    g_s, g_t, tile, lead, end, max_s, rz_s, max_t, rz_t, centre, tail, inv_t, beta,
    value, sum_p, sum_q, EDGE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Takes a tile into every lane's sums of JS."""
    _, _, terms, p_m, q_m = _js_classes(
        g_s, g_t, tile_columns(tile, LANES, VECTOR), lead, end, max_s, rz_s, max_t, rz_t, centre, tail, inv_t,
        beta, EDGE, ACC,
    )  # fmt: skip
    return value + tl.sum(terms, axis=1), sum_p + tl.sum(p_m, axis=1), sum_q + tl.sum(q_m, axis=1)


@triton.jit
def _js_without_peak(
    g_s, g_t, lane_t, lane_s, begin, finish, lead, end, max_s, rz_s, max_t, rz_t, centre, tail, inv_t, beta,
    LANES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Two lanes' sums again, that of p·(log m - log p) without p's heaviest class, the other without q's."""
    sum_p, sum_q = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
    for index in range(0, (finish - begin + LANES - 1) // LANES * VECTOR):
        columns, is_there = lane_columns(index, lane_t, begin, finish, LANES, VECTOR)
        _, t, _, p_m, _ = _js_classes(
            g_s, g_t, tl.where(is_there, columns, end), lead, end, max_s, rz_s, max_t, rz_t, centre, tail, inv_t,
            beta, True, ACC,
        )  # fmt: skip
        sum_p += tl.where(t == max_t, 0.0, p_m)
        columns, is_there = lane_columns(index, lane_s, begin, finish, LANES, VECTOR)
        s, _, _, _, q_m = _js_classes(
            g_s, g_t, tl.where(is_there, columns, end), lead, end, max_s, rz_s, max_t, rz_t, centre, tail, inv_t,
            beta, True, ACC,
        )  # fmt: skip
        sum_q += tl.where(s == max_s, 0.0, q_m)
    return tl.sum(sum_p, axis=0), tl.sum(sum_q, axis=0)


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
    end, body_begin, body_end, tiles, begin, finish = tiles_of_part(
        lead, classes, part, tiles_per_split, True, LANES, VECTOR
    )
    max_s, rz_s, max_t, rz_t, centre, tail, _, _, _, _ = load_stats(g_stats, row, None)
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
    total_p, total_q = tl.sum(sum_p, axis=0), tl.sum(sum_q, axis=0)
    if (rz_t > 0.5) | (rz_s > 0.5):  # See Note [Certain rows].
        lane_t = tl.load(g_stats + row * STATS + 10).to(tl.int32)
        lane_s = tl.load(g_stats + row * STATS + 11).to(tl.int32)
        own_p, own_q = _js_without_peak(
            g_s, g_t, lane_t, lane_s, begin, finish, lead, end, max_s, rz_s, max_t, rz_t, centre, tail, inv_t, mix,
            LANES, VECTOR, ACC,
        )  # fmt: skip
        lanes = tl.arange(0, LANES)
        own_p += tl.sum(tl.where(lanes == lane_t, 0.0, sum_p), axis=0)
        own_q += tl.sum(tl.where(lanes == lane_s, 0.0, sum_q), axis=0)
        total_p = tl.where(rz_t > 0.5, own_p, total_p)
        total_q = tl.where(rz_s > 0.5, own_q, total_q)
    at = g_parts + tl.program_id(0).to(tl.int64) * PARTS
    tl.store(at + 0, tl.sum(value, axis=0))
    tl.store(at + 1, total_p)
    tl.store(at + 2, total_q)


@kernel
def js_combine_kernel(
    g_weight,
    g_loss,
    g_stats,
    g_parts,
    rows: tl.int64,
    splits: tl.int64,
    scale: tl.float64,
    beta: tl.float64,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts of one row's JS to its loss, slopes and bases."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    mask = part < splits
    at = g_parts + (row * splits + part) * PARTS
    value = tl.sum(tl.load(at + 0, mask=mask, other=0.0), axis=0)
    value = tl.where(value < 0.0, 0.0, value)
    sum_p = tl.sum(tl.load(at + 1, mask=mask, other=0.0), axis=0)
    sum_q = tl.sum(tl.load(at + 2, mask=mask, other=0.0), axis=0)
    _, rz_s, _, rz_t, _, _, mass_p, mass_q, u_p, u_q = load_stats(g_stats, row, None)
    base_p, _ = js_logs(u_p, scalar(beta, ACC))
    _, base_q = js_logs(u_q, scalar(beta, ACC))
    base_p = tl.where(rz_t > 0.5, base_p, 0.0)
    base_q = tl.where(rz_s > 0.5, base_q, 0.0)
    tl.debug_barrier()  # every lane has read what is written now
    tl.store(g_stats + row * STATS + 6, sum_p - base_p * mass_p)
    tl.store(g_stats + row * STATS + 7, sum_q - base_q * mass_q)
    tl.store(g_stats + row * STATS + 8, base_p)
    tl.store(g_stats + row * STATS + 9, base_q)
    if g_loss is not None:
        factor, masked = row_factor(g_weight, None, row, row < rows, scalar(scale, ACC), ACC, 0)
        tl.store(g_loss + row, tl.where(masked, 0.0, value * factor))
