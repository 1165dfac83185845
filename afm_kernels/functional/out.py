"""``out=``: which tensors may be written, and how an operator writes them.

Note [Tensors to write]
~~~~~~~~~~~~~~~~~~~~~~~
A tensor to write has each element once, and lies apart from whatever else the call reads or writes. The compiled CPU
operators see to that, and that shapes and dtypes fit, in a fraction of the time that Python takes, and raise; then,
and before anything else runs, Python's ``check`` says which argument it is and what is allowed. Address ranges decide:
views that interleave in one buffer count as overlapping though they share no element, since telling them apart takes a
search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from afm_kernels import ops


def check_not_recorded(name: str, out: Tensor) -> None:
    """As PyTorch's own ``out=``: what requires a gradient is written under ``torch.no_grad`` only."""
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient; pass a tensor that does not")


def check_memory(written: dict[str, Tensor], read: dict[str, Tensor], or_same: bool = False) -> None:
    """See Note [Tensors to write]; with ``or_same`` a written tensor may be one of those that are read."""
    if torch.compiler.is_compiling():  # a traced tensor has no address; the compiler keeps overlaps apart
        return
    tensors = [*written.items(), *read.items()]
    for i, (name, out) in enumerate(written.items(), start=1):
        if out.is_neg():
            raise ValueError(
                f"{name} is a view whose negation is pending (torch.is_neg); it cannot be written"
            )
        if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
            raise ValueError(
                f"{name} is expanded, with strides {out.stride()}: elements that are written share memory"
            )
        for other_name, other in tensors[i:]:
            if not _spans_overlap(out, other):
                continue
            if not or_same:
                raise ValueError(f"{name} and {other_name} overlap in memory; they must be apart")
            if not _same_elements(out, other):
                raise ValueError(
                    f"{name} overlaps {other_name} in memory; it must be {other_name} itself, or apart from it"
                )


def write(
    op: str, device_type: str, arguments: tuple[Any, ...], outs: Sequence[Tensor], check: Callable[[], None]
) -> None:
    """Runs an operator that writes ``outs``, outside of any graph. ``check`` raises where they are not fit to write."""
    backend = ops.backend_for(op, device_type)
    compiling = torch.compiler.is_compiling()
    if backend != "cpp" or compiling:
        check()
    recording = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # as torch.no_grad, which costs as much as all the checks together
    try:
        ops.kernel(op, device_type, backend)(*arguments)
    except RuntimeError:
        check()
        raise
    finally:
        torch._C._set_grad_enabled(recording)
    if not compiling:  # a compiled graph knows what is written from the operator's schema
        increment_version(outs)  # so that a graph that saved one of them refuses its backward


def _same_elements(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype


def _spans_overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or a.is_meta or b.is_meta:  # of shapes alone, without memory
        return False
    return a.data_ptr() < _end(b) and b.data_ptr() < _end(a)


def _end(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()
