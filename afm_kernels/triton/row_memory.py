"""Where a row's data lies: pointers to rows, row weights, row scalars, and what of a kernel's arguments specialises it.

Note [What specialises]
~~~~~~~~~~~~~~~~~~~~~~~
Compiled once for each dtype pair, divergence, set of wanted outputs, layout class (``ALIGN``: the elements, up to 16
bytes of them, that every row start is a multiple of; ``TWO_LEVELS``; ``PHASE``), and, on chip, power of two of C.
Rows, C, strides, temperature, scale and the weights of mixtures are run-time values. All integers are int64 by
annotation and exempt from specialisation: Triton would otherwise compile again for a value of 1, for multiples of 16,
and on passing 2^31. What is lost by the exemption, the divisibility that 128-bit accesses need, comes back through
ALIGN: strides are passed divided by it and multiplied again in the kernel. Only pointers keep Triton's own
specialisation on 16-byte alignment, and of these only the logits and their gradients.

Names: ``g_`` marks pointers into global memory; everything else lives in registers.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from afm_kernels.triton import ROW_STATS
from afm_kernels.triton.row_math import INF

STATS = tl.constexpr(ROW_STATS)
PARTS = tl.constexpr(28)  # columns of a part of a row

# See Note [What specialises].
_INTEGERS = (
    *("rows", "classes", "rows_inner", "ignore_index", "splits", "tiles_per_split", "count"),
    *("s_outer", "s_inner", "t_outer", "t_inner"),
    *("gs_outer", "gs_inner", "gt_outer", "gt_inner"),
)
_LESS_ALIGNED = ("g_weight", "g_labels", "g_grad_loss", "g_loss", "g_stats", "g_parts", "g_values")


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` with the exemptions of Note [What specialises]."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        do_not_specialize=[name for name in _INTEGERS if name in names],
        do_not_specialize_on_alignment=[name for name in _INTEGERS + _LESS_ALIGNED if name in names],
    )(function)


@triton.jit
def row_start(row, rows_inner, outer, inner, ALIGN: tl.constexpr, TWO_LEVELS: tl.constexpr):
    """Offset of a row's first element; strides come in units of ALIGN. 64 bits wide, as ``row`` is."""
    if TWO_LEVELS:
        return (row // rows_inner) * outer * ALIGN + (row % rows_inner) * inner * ALIGN
    else:
        return row * outer * ALIGN


@triton.jit
def aligned_rows(
    g_student, g_teacher, row, rows_inner, s_outer, s_inner, t_outer, t_inner,
    PHASE: tl.constexpr, TWO_LEVELS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Pointers to a student's and a teacher's row, and how many elements before it they point.

    With PHASE all rows of one number start equally far from a 16-byte boundary, so that stepping back to it makes
    every whole tile of the row a run of 128-bit accesses, however odd C is: an aligned body with edges.
    """
    start_s = row_start(row, rows_inner, s_outer, s_inner, 1, TWO_LEVELS)
    start_t = row_start(row, rows_inner, t_outer, t_inner, 1, TWO_LEVELS)
    if PHASE:
        lead = (start_s % VECTOR).to(tl.int32)
        return g_student + start_s // VECTOR * VECTOR, g_teacher + start_t // VECTOR * VECTOR, lead
    else:
        return g_student + start_s, g_teacher + start_t, (start_s * 0).to(tl.int32)


@triton.jit
def row_factor(g_weight, g_grad_loss, row, mask, scale, ACC: tl.constexpr, GRAD_LOSS: tl.constexpr):
    """What a row's loss (GRAD_LOSS 0) or gradient is multiplied by, and where its weight is 0."""
    factor = tl.where(mask, scale, 0.0)
    masked = mask != mask
    if g_weight is not None:
        weight = tl.load(g_weight + row, mask=mask, other=0.0).to(ACC)
        masked = weight == 0
        factor = factor * weight
    if GRAD_LOSS == 1:
        factor = factor * tl.load(g_grad_loss).to(ACC)
    if GRAD_LOSS == 2:
        factor = factor * tl.load(g_grad_loss + row, mask=mask, other=0.0).to(ACC)
    return factor, masked


@triton.jit
def store_stats(
    g_stats, row, mask, max_s, z_s, max_t, z_t, centre, tail, slope_p, slope_q, base_p, base_q, value
):
    """Writes a row's scalars, with NaN normalisers where its loss is not finite. See Note [Row scalars]."""
    poison = tl.where(tl.abs(value) < INF, 1.0, INF - INF)
    at = g_stats + row * STATS
    tl.store(at + 0, max_s, mask=mask)
    tl.store(at + 1, poison / z_s, mask=mask)
    tl.store(at + 2, max_t, mask=mask)
    tl.store(at + 3, poison / z_t, mask=mask)
    tl.store(at + 4, centre, mask=mask)
    tl.store(at + 5, tail, mask=mask)
    tl.store(at + 6, slope_p, mask=mask)
    tl.store(at + 7, slope_q, mask=mask)
    tl.store(at + 8, base_p, mask=mask)
    tl.store(at + 9, base_q, mask=mask)


@triton.jit
def load_stats(g_stats, row, mask):
    """The scalars that ``store_stats`` wrote, in its order."""
    at = g_stats + row * STATS
    return (
        tl.load(at + 0, mask=mask),
        tl.load(at + 1, mask=mask),
        tl.load(at + 2, mask=mask),
        tl.load(at + 3, mask=mask),
        tl.load(at + 4, mask=mask),
        tl.load(at + 5, mask=mask),
        tl.load(at + 6, mask=mask),
        tl.load(at + 7, mask=mask),
        tl.load(at + 8, mask=mask),
        tl.load(at + 9, mask=mask),
    )


@triton.jit
def tile_columns(tile, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a tile: VECTOR neighbouring logits a lane."""
    return tile * (LANES * VECTOR) + (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])


@triton.jit
def lane_columns(index, lane, begin, finish, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """One column of ``lane`` in each of LANES tiles, the ``index``-th such, and which tiles there are."""
    tile = begin + index // VECTOR * LANES + tl.arange(0, LANES)
    return tile * (LANES * VECTOR) + (lane * VECTOR + index % VECTOR), tile < finish


@triton.jit
def load_pair(g_s, g_t, columns, lead, end, EDGE: tl.constexpr, ACC: tl.constexpr):
    """Both sides' logits; the row is columns ``lead`` to ``end``, and only EDGE tiles check that."""
    if EDGE:
        inside = (columns >= lead) & (columns < end)
        s = tl.load(g_s + columns, mask=inside, other=-INF).to(ACC)
        t = tl.load(g_t + columns, mask=inside, other=-INF).to(ACC)
    else:
        s = tl.load(g_s + columns).to(ACC)
        t = tl.load(g_t + columns).to(ACC)
    return s, t


@triton.jit
def tiles_of_part(
    lead, classes, part, tiles_per_split, SPLIT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """The tiles of a row, ``begin`` to ``finish`` of which are a part's; all but the first and the last are whole.

    Returned are the row's end, its whole tiles' begin and end, their number with the edges, and the part's begin and
    finish.
    """
    end = lead + classes.to(tl.int32)
    body_begin = (lead + (LANES * VECTOR - 1)) // (LANES * VECTOR)
    body_end = end // (LANES * VECTOR)
    tiles = (end + (LANES * VECTOR - 1)) // (LANES * VECTOR)
    begin = 0
    finish = tiles
    if SPLIT:
        begin = part * tiles_per_split.to(tl.int32)
        finish = tl.minimum(begin + tiles_per_split.to(tl.int32), tiles)
    return end, body_begin, body_end, tiles, begin, finish
