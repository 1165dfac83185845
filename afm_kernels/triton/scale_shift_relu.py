"""relu(x · scale[c] + shift[c] + residual) and its backward; channels are dimension 1.

Both memory formats are a matrix of contiguous rows. In channels-last (N, H, W, C) a row is a pixel and its columns are
the channels, so scale and shift are loaded once for all rows of a tile. In contiguous (N, C, H, W) a row is one plane
and has one channel. No element needs a division to find its channel. Bytes for N elements of e bytes, the least there
can be: forward 2Ne (3Ne with a residual), backward 2Ne read and Ne written for each gradient.

The backward needs the output's sign and ``scale`` only. A NaN stays NaN and lets gradients through, as in
``torch.relu``. Sizes are run-time values; compiled in are dtypes, the memory format, what is wanted, and the power of
two of a row's length up to 512. Rows whose length is not a multiple of 16 bytes (7 × 7 planes) take narrower accesses.
``g_`` marks pointers into global memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from afm_kernels.schemas import accumulation_dtype
from afm_kernels.triton import launch
from afm_kernels.triton.row_math import stored_as

# Elements of a tile: 4 warps of 16.
_TILE = 2048
_MAX_COLUMNS = 512

_INTEGERS = ["rows", "columns", "channels"]


@triton.jit
def _tile_of(
    rows,
    columns,
    channels,
    BY_COLUMN: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Offsets and mask of this program's tile; channel and mask of its scale and shift, shaped to broadcast."""
    columns = columns * ALIGN
    blocks = (columns + (BLOCK - 1)) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    # as a multiple of ALIGN the bound lets one predicate serve a whole vector
    in_columns = column < columns.to(tl.int32)
    in_rows = row < rows
    at = row[:, None] * columns + column[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    if BY_COLUMN:
        return at, mask, column[None, :], in_columns[None, :]
    else:
        return at, mask, (row % channels)[:, None], in_rows[:, None]


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=[*_INTEGERS, "g_scale", "g_shift"])
def _forward_kernel(
    g_x,
    g_scale,
    g_shift,
    g_residual,
    g_out,
    rows: tl.int64,
    columns: tl.int64,  # in units of ALIGN
    channels: tl.int64,
    BY_COLUMN: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, mask, channel, in_channels = _tile_of(rows, columns, channels, BY_COLUMN, ALIGN, ROWS, BLOCK)
    scale = tl.load(g_scale + channel, mask=in_channels, other=0.0).to(ACC)
    shift = tl.load(g_shift + channel, mask=in_channels, other=0.0).to(ACC)
    total = tl.load(g_x + at, mask=mask, other=0.0).to(ACC) * scale + shift
    if g_residual is not None:
        total += tl.load(g_residual + at, mask=mask, other=0.0).to(ACC)
    tl.store(g_out + at, stored_as(tl.where(total < 0, 0.0, total), g_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=[*_INTEGERS, "g_scale"])
def _backward_kernel(
    g_grad_output,
    g_output,
    g_scale,
    g_grad_x,
    g_grad_residual,
    rows: tl.int64,
    columns: tl.int64,  # in units of ALIGN
    channels: tl.int64,
    BY_COLUMN: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, mask, channel, in_channels = _tile_of(rows, columns, channels, BY_COLUMN, ALIGN, ROWS, BLOCK)
    grad = tl.load(g_grad_output + at, mask=mask, other=0.0).to(ACC)
    output = tl.load(g_output + at, mask=mask, other=0.0).to(ACC)
    passed = tl.where(output <= 0, 0.0, grad)
    if g_grad_x is not None:
        scale = tl.load(g_scale + channel, mask=in_channels, other=0.0).to(ACC)
        tl.store(g_grad_x + at, stored_as(passed * scale, g_grad_x.dtype.element_ty), mask=mask)
    if g_grad_residual is not None:
        tl.store(g_grad_residual + at, stored_as(passed, g_grad_residual.dtype.element_ty), mask=mask)


def _by_column(x: Tensor) -> bool | None:
    """Whether channels are the columns (channels-last memory), the rows (contiguous), or None: neither."""
    if x.is_contiguous():
        return x.ndim == 2  # (N, C): a row of channels
    last = x.movedim(1, -1)
    return True if last.is_contiguous() else None


class _Matrix:
    """A tensor's memory as rows and columns, and the configuration that follows from it."""

    def __init__(self, model: Tensor, by_column: bool, *others: Tensor | None) -> None:
        self.by_column = by_column
        self.channels = model.shape[1]
        self.columns = self.channels if by_column else model[0, 0].numel()
        self.rows = model.numel() // self.columns
        tensors = [t for t in (model, *others) if t is not None]
        align = self.columns | launch.vector_elements(*tensors)
        self.align = align & -align
        self.block = min(max(16, launch.next_power_of_2(self.columns)), _MAX_COLUMNS)
        self.tile_rows = _TILE // self.block
        self.grid = (triton.cdiv(self.rows, self.tile_rows) * triton.cdiv(self.columns, self.block),)

    def sizes(self) -> tuple[int, int, int]:
        return self.rows, self.columns // self.align, self.channels

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        return {
            "BY_COLUMN": self.by_column,
            "ALIGN": self.align,
            "ACC": launch.triton_dtype(dtype),
            "ROWS": self.tile_rows,
            "BLOCK": self.block,
            "num_warps": launch.warps(128),
        }


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """``tensor``, or a copy of it, with the strides of ``model``."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_strided(model.shape, model.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
        tensor
    )


def scale_shift_relu_forward(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    by_column = _by_column(x)
    if by_column is None:
        x, by_column = x.contiguous(), x.ndim == 2
    model = out if out.stride() == x.stride() else torch.empty_like(x)
    residual = None if residual is None else _like(residual, x)
    matrix = _Matrix(x, by_column, residual)
    dtype = accumulation_dtype(*(t for t in (x, scale, shift, residual) if t is not None))
    with launch.on_device(x):
        _forward_kernel[matrix.grid](
            x,
            scale.contiguous(),
            shift.contiguous(),
            residual,
            model,
            *matrix.sizes(),
            **matrix.constants(dtype),
        )
    return out if model is out else out.copy_(model)


def scale_shift_relu_backward(
    grad_output: Tensor, output: Tensor, scale: Tensor, wrt_x: bool, wrt_residual: bool
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(output) if wrt_x else output.new_empty(0)
    grad_residual = torch.empty_like(output) if wrt_residual else output.new_empty(0)
    if output.numel() == 0 or not (wrt_x or wrt_residual):
        return grad_x, grad_residual
    by_column = _by_column(output)
    if by_column is None:
        output, by_column = output.contiguous(), output.ndim == 2
    grad_output = _like(grad_output, output)
    to_x = None if not wrt_x else grad_x if grad_x.stride() == output.stride() else torch.empty_like(output)
    to_residual = (
        None
        if not wrt_residual
        else grad_residual
        if grad_residual.stride() == output.stride()
        else torch.empty_like(output)
    )
    matrix = _Matrix(output, by_column, grad_output)
    dtype = accumulation_dtype(grad_output, output, scale)
    with launch.on_device(output):
        _backward_kernel[matrix.grid](
            grad_output,
            output,
            scale.contiguous(),
            to_x,
            to_residual,
            *matrix.sizes(),
            **matrix.constants(dtype),
        )
    if to_x is not None and to_x is not grad_x:
        grad_x.copy_(to_x)
    if to_residual is not None and to_residual is not grad_residual:
        grad_residual.copy_(to_residual)
    return grad_x, grad_residual
