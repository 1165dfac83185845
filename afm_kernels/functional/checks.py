"""The checks at the public boundary: each raises one sentence naming the argument, what it was and what is allowed."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from afm_kernels.autograd.fused import refuse_forward_mode

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
REDUCTIONS = ("none", "sum", "mean", "batchmean")
NUMBERS = (int, float, torch.SymFloat, torch.SymInt)  # Sym: what torch.compile makes of a varying number
_INFINITY = float("inf")


class Logits(NamedTuple):
    """Checked logits, class dimension last, and what the reductions need of them."""

    student: Tensor
    teacher: Tensor
    rows: int
    num_classes: int


def check_logits(student_logits: Tensor, teacher_logits: Tensor, dim: int) -> Logits:
    """Two batches of logits with their class dimension moved last, without a copy."""
    if not isinstance(student_logits, Tensor) or not isinstance(teacher_logits, Tensor):
        name, got = (
            ("teacher_logits", teacher_logits)
            if isinstance(student_logits, Tensor)
            else ("student_logits", student_logits)
        )
        raise TypeError(f"{name} is {_described(got)}; a floating-point tensor is expected")
    if student_logits.is_nested or teacher_logits.is_nested:
        check_dense("student_logits", student_logits)
        check_dense("teacher_logits", teacher_logits)
    shape = student_logits.shape
    if shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher_logits.shape)} and student_logits {tuple(shape)}; "
            "they must be equal"
        )
    if student_logits.dtype not in DTYPES or teacher_logits.dtype not in DTYPES:
        name, got_dtype = (
            ("teacher_logits", teacher_logits.dtype)
            if student_logits.dtype in DTYPES
            else ("student_logits", student_logits.dtype)
        )
        raise TypeError(f"{name} has dtype {got_dtype}; allowed: float16, bfloat16, float32, float64")
    if student_logits.layout is not torch.strided or teacher_logits.layout is not torch.strided:
        check_dense("student_logits", student_logits)
        check_dense("teacher_logits", teacher_logits)
    if student_logits.device != teacher_logits.device:
        raise ValueError(
            f"teacher_logits is on {teacher_logits.device} and student_logits on {student_logits.device}; "
            "they must be on one device"
        )
    if (
        forward_ad._current_level >= 0
        and not torch._C._are_functorch_transforms_active()
        and any(forward_ad.unpack_dual(side).tangent is not None for side in (student_logits, teacher_logits))
    ):
        refuse_forward_mode()
    last = len(shape) - 1
    if type(dim) is not int:
        dim = check_integer("dim", dim)
    if dim != -1 and dim != last:
        if not -last - 1 <= dim <= last:
            raise ValueError(
                f"dim is {dim}; allowed: {-last - 1} to {last} for logits of shape {tuple(shape)}"
                if last >= 0
                else f"dim is {dim}, but logits of shape () have no class dimension"
            )
        student_logits, teacher_logits = student_logits.movedim(dim, -1), teacher_logits.movedim(dim, -1)
        shape = student_logits.shape
    if last < 0:
        raise ValueError("student_logits has shape (), which has no class dimension")
    num_classes = shape[-1]
    if num_classes == 0:
        raise ValueError(
            f"the class dimension of student_logits is empty, of shape {tuple(shape)}; it needs a class"
        )
    return Logits(student_logits, teacher_logits, student_logits.numel() // num_classes, num_classes)


def check_row_weight(row_weight: Tensor | None, logits: Logits) -> Tensor | None:
    """``row_weight`` as the operators take it: the rows' shape, accumulation dtype, contiguous."""
    return (
        None
        if row_weight is None
        else constant_like_rows("row_weight", row_weight, logits, logits.student.shape[:-1])
    )


def check_labels(labels: Tensor, logits: Logits, ignore_index: int, are_looked_at: bool) -> Tensor:
    """Labels of the rows as the operators take them: int64, contiguous."""
    student = logits.student
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}; an integer tensor is expected")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; an integer tensor is expected")
    check_dense("labels", labels)
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected that of the rows, {tuple(student.shape[:-1])}"
        )
    if labels.device != student.device:
        raise ValueError(
            f"labels is on {labels.device} and the logits on {student.device}; they must be on one device"
        )
    labels = labels.long().contiguous()
    # Elsewhere the answer would have to be waited for; there, such a row is NaN.
    if (
        are_looked_at
        and labels.device.type == "cpu"
        and labels.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and type(labels) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0  # nobody traces, or wants shapes alone
    ):
        lowest, highest = labels.aminmax()
        if lowest.item() < 0 or highest.item() >= logits.num_classes:  # mostly ignore_index, if anything
            strange = ((labels < 0) | (labels >= logits.num_classes)) & (labels != ignore_index)
            if strange.any():
                raise ValueError(
                    f"labels holds {labels[strange][0].item()}; allowed: 0 to {logits.num_classes - 1}, and "
                    f"ignore_index={ignore_index}"
                )
    return labels


def constant_like_rows(name: str, value: Tensor, logits: Logits, shape: torch.Size) -> Tensor:
    """A constant that broadcasts to ``shape``, in accumulation dtype and contiguous."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {_described(value)}; a tensor is expected")
    if value.is_complex():
        raise TypeError(f"{name} has dtype {value.dtype}; a real tensor is expected")
    check_dense(name, value)
    if value.device != logits.student.device:
        raise ValueError(
            f"{name} is on {value.device} and the logits on {logits.student.device}; they must be on one device"
        )
    if value.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, but it is a constant of the loss: pass {name}.detach(), or weight the "
            'rows of reduction="none" yourself'
        )
    if (
        forward_ad._current_level >= 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad.unpack_dual(value).tangent is not None
    ):
        refuse_forward_mode()
    double = logits.student.dtype == torch.float64 or logits.teacher.dtype == torch.float64
    value = value.to(torch.float64 if double else torch.float32)
    if value.shape != shape:
        check_broadcasts(name, value, shape)
        value = value.expand(shape)
    return value.contiguous()


def check_broadcasts(name: str, value: Tensor, shape: torch.Size) -> None:
    if value.dim() > len(shape) or any(
        own not in (1, wanted) for own, wanted in zip(reversed(value.shape), reversed(shape), strict=False)
    ):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, which does not broadcast to {tuple(shape)}")


def check_integer(name: str, value: int) -> int:
    """An integer; NumPy's become Python's, and a bool is none."""
    if isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool):
        return value if isinstance(value, (int, torch.SymInt)) else int(value)
    raise TypeError(f"{name} is {_described(value)}; an int is expected")


def check_real(name: str, value: float, expected: str = "a number") -> float:
    """A number of the kinds the operators take; NumPy's scalars become Python's."""
    if isinstance(value, NUMBERS):
        return value
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{name} is {_described(value)}; {expected} is expected")


def check_positive(name: str, value: float) -> float:
    if not isinstance(value, NUMBERS):
        value = check_real(name, value, "a positive number")
    if not 0 < value < _INFINITY:
        raise ValueError(f"{name} is {value}; a positive, finite number is expected")
    return value * 1.0


def check_not_negative(name: str, value: float) -> float:
    if not isinstance(value, NUMBERS):
        value = check_real(name, value)
    if not 0 <= value < _INFINITY:
        raise ValueError(f"{name} is {value}; a finite number of at least 0 is expected")
    return value * 1.0


def check_between(name: str, value: float, low: float, high: float, open_ends: bool = False) -> float:
    if not isinstance(value, NUMBERS):
        value = check_real(name, value)
    if not ((low < value < high) if open_ends else (low <= value <= high)):
        raise ValueError(
            f"{name} is {value}; allowed: {'between' if open_ends else 'from'} {low:g} {'and' if open_ends else 'to'} "
            f"{high:g}{', both excluded' if open_ends else ''}"
        )
    return value * 1.0


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> int:
    """The index of ``value`` in ``allowed``."""
    try:
        return allowed.index(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}") from None


def check_flag(name: str, value: bool) -> bool:
    """True or False, and nothing that merely counts as one: "no" does, and so does every tensor but a zero."""
    if value is True or value is False:
        return value
    raise TypeError(f"{name} is {_described(value)}; allowed: True, False")


def check_recompute(recompute: bool | None) -> None:
    if recompute is not None and not isinstance(recompute, bool):
        raise TypeError(f"recompute is {_described(recompute)}; allowed: True, False, None")


def check_dense(name: str, value: Tensor) -> None:
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} has layout {layout}; a dense tensor (torch.strided) is expected")


def check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {_described(value)}; a floating-point tensor is expected")
    if type(value) is not Tensor and hasattr(type(value), "device_mesh"):
        raise TypeError(f"{name} is a DTensor; pass this process's part of it, {name}.to_local()")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: float16, bfloat16, float32, float64")
    check_dense(name, value)


def check_like(name: str, value: Tensor, other_name: str, other: Tensor, same_dtype: bool = False) -> None:
    """A floating-point tensor with the shape and device of another."""
    check_floating(name, value)
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and {other_name} {tuple(other.shape)}; they must be equal"
        )
    if value.device != other.device:
        raise ValueError(
            f"{name} is on {value.device} and {other_name} on {other.device}; they must be on one device"
        )
    if same_dtype and value.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {value.dtype} and {other_name} {other.dtype}; they must be equal")


def _described(value: Any) -> str:
    text = repr(value)
    return f"a {type(value).__name__}" + (f" ({text})" if len(text) <= 40 else "")
