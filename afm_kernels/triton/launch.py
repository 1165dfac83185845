"""What every launcher needs: how rows lie in memory, how wide an access may be, the device guard, and the limits.

Note [Launch cost]
~~~~~~~~~~~~~~~~~~
A Triton launch costs a walk over its arguments in Python, several times the CUDA launch itself, whatever the kernel
does; a CUDA graph pays it once, at capture. What is ours is kept to a few comparisons for contiguous logits: nothing
is autotuned, and every configuration follows from C and the dtypes by the arithmetic below.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor


@dataclasses.dataclass
class Limits:
    """Block sizes and the thresholds between kernels. Tests lower them, so that small inputs take every path."""

    # Widest row that stays in registers, and the widest where more is kept of it (JS, distillation): at 8192 classes
    # 512 lanes hold 16 logits of each side. ``resources`` shows these to compile without spills for every target,
    # and the next power of two not to.
    on_chip: int = 8192
    on_chip_more: int = 4096
    # Elements of a tile of several short rows: 128 rows of 10 classes are one program, and so is their sum.
    tile: int = 2048
    # Lanes of a streaming program, and the bytes that each reads of a side at a time: one 128-bit access.
    lanes: int = 256
    lane_bytes: int = 16
    # Classes a gradient program of a long row.
    grad_block: int = 4096
    # Programs a multiprocessor needs to hide the memory's latency when few long rows are split.
    programs_per_multiprocessor: int = 4


LIMITS = Limits()


@contextlib.contextmanager
def override_limits(**changes: int) -> Iterator[None]:
    """Other ``Limits`` for a while, for tests."""
    before = dataclasses.asdict(LIMITS)
    try:
        for name, value in changes.items():
            setattr(LIMITS, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(LIMITS, name, value)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter has one."""
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def warps(lanes: int) -> int:
    """``num_warps`` for so many lanes: a warp has 32 of them, on AMD's data-centre GPUs 64."""
    return max(1, lanes // (64 if torch.version.hip else 32))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device current: Triton launches on the current one, on its current stream."""
    if tensor.device.type == "cpu" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The accumulation dtype as Triton calls it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


class Rows(NamedTuple):
    """How the rows of several tensors of one shape lie in memory: row i of tensor k starts at element
    (i // inner) * outer_strides[k] + (i % inner) * inner_strides[k]."""

    num_rows: int
    classes: int
    inner: int  # rows of the inner level; 1 where one level says it all
    outer_strides: tuple[int, ...]
    inner_strides: tuple[int, ...]

    @property
    def two_levels(self) -> bool:
        return self.inner > 1


def describe_rows(tensors: Sequence[Tensor]) -> Rows | None:
    """The rows of ``tensors`` (one shape, classes last) in place, or None where that takes a copy.

    In place means a class stride of 1 and leading dimensions that collapse to two levels or fewer for all of them
    at once: any batch of (N, H, W, C), a transposed pair of dimensions, logits[:, :-1, :], an expanded tensor.
    """
    shape = tensors[0].shape
    classes = shape[-1]
    count = 1
    for size in shape[:-1]:
        count *= size
    if all(t.is_contiguous() for t in tensors):
        return Rows(count, classes, 1, (classes,) * len(tensors), (0,) * len(tensors))
    if classes > 1 and any(t.stride(-1) != 1 for t in tensors):
        return None
    levels: list[tuple[int, tuple[int, ...]]] = []  # outermost first: size, stride in every tensor
    for dim, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        strides = tuple(t.stride(dim) for t in tensors)
        if levels and all(above == size * below for above, below in zip(levels[-1][1], strides, strict=True)):
            levels[-1] = (levels[-1][0] * size, strides)
        else:
            levels.append((size, strides))
    zeros = (0,) * len(tensors)
    if not levels:
        return Rows(count, classes, 1, zeros, zeros)
    if len(levels) == 1:
        return Rows(count, classes, 1, levels[0][1], zeros)
    if len(levels) == 2:
        return Rows(count, classes, levels[1][0], levels[0][1], levels[1][1])
    return None


def vector_elements(*tensors: Tensor) -> int:
    """Elements of a 128-bit access to the narrowest of the dtypes."""
    return LIMITS.lane_bytes // min(t.element_size() for t in tensors)


def row_alignment(rows: Rows, tensors: Sequence[Tensor]) -> int:
    """The elements, a power of two of at most 16 bytes, that C and the start of every row are multiples of."""
    bits = vector_elements(*tensors) | rows.classes
    for stride in rows.outer_strides + rows.inner_strides:
        bits |= stride
    for tensor in tensors:
        if tensor.data_ptr() % 16:
            bits |= tensor.data_ptr() // tensor.element_size()
    return bits & -bits


def equal_phase(rows: Rows, tensors: Sequence[Tensor]) -> bool:
    """Whether row i of all tensors is equally far from a 16-byte boundary, for every i."""
    if any(t.data_ptr() % 16 for t in tensors):
        return False
    vector = vector_elements(*tensors)
    outer, inner = rows.outer_strides, rows.inner_strides
    return all((s - outer[0]) % vector == 0 for s in outer) and all(
        (s - inner[0]) % vector == 0 for s in inner
    )


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
