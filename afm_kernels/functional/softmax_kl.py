"""Divergences between softmax(student / T) and softmax(teacher / T), straight from logits.

Note [Hard rows]
~~~~~~~~~~~~~~~~
What every backend returns where logits are extreme; q is the student's softmax, p the teacher's, γ = 1 - β. NaN
gradients fill their row on both sides and leave other rows alone.

| row                            | kl              | reverse_kl      | jeffreys | js                              |
|--------------------------------|-----------------|-----------------|----------|---------------------------------|
| class -inf on both sides       | adds 0          | adds 0          | adds 0   | adds 0                          |
|   its gradients                | 0, 0            | 0, 0            | 0, 0     | 0, 0                            |
| class -inf in the teacher only | adds 0          | +inf            | +inf     | adds γ q log(1/γ)               |
|   its gradients: student       | q/T             | NaN row         | NaN row  | γ q (log(1/γ) - KL(q‖m))/T      |
|   its gradients: teacher       | 0               | NaN row         | NaN row  | 0                               |
| class -inf in the student only | +inf            | adds 0          | +inf     | adds β p log(1/β)               |
|   its gradients: student       | NaN row         | 0               | NaN row  | 0                               |
|   its gradients: teacher       | NaN row         | p/T             | NaN row  | β p (log(1/β) - KL(p‖m))/T      |
| NaN or +inf, or all -inf       | NaN             | NaN             | NaN      | NaN                             |
| a probability underflows to 0  | finite, exact   | finite, exact   | finite   | finite; at most log 2 for β = ½ |

A class counts as present where its logit is above -inf, however small its probability; one so far below its row's
largest that the distance, divided by T, leaves the range of the loss's dtype may count as -inf. So a mask may be
-inf or the dtype's smallest number. A row may be inf where the divergence comes within a factor of the number of
classes of the dtype's largest number, and NaN where the largest logits of its two sides are as far apart as that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from afm_kernels import ops
from afm_kernels.autograd.fused import refuse_forward_mode
from afm_kernels.functional.checks import (
    check_between,
    check_choice,
    check_flag,
    check_logits,
    check_positive,
    check_recompute,
    check_row_weight,
)
from afm_kernels.functional.loss import fused_loss, quick_gradients, quick_loss, remember
from afm_kernels.functional.out import check_memory, check_not_recorded, write
from afm_kernels.functional.sharded import is_sharded, sharded_gradients, sharded_loss

SIDES = ("student", "teacher")


def softmax_kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    row_weight: Tensor | None = None,
    dim: int = -1,
    scale_by_t2: bool = False,
    recompute: bool | None = None,
    divergence: str = "kl",
    beta: float = 0.5,
) -> Tensor:
    """KL(softmax(teacher / T) ‖ softmax(student / T)), or a relative of it, with gradients on both sides.

    Args:
        student_logits: any shape and strides, floating point. A DTensor may be sharded over its rows.
        teacher_logits: the same shape and device; its dtype may differ. A DTensor where the student's is one,
            placed alike; what else has a value for each row then is one, too.
        temperature: T, positive.
        reduction: "none" (a value for each row), "sum", "mean" (divides by the number of elements, as
            ``F.kl_div``) or "batchmean" (divides by the number of rows: the product of all dimensions but the
            class one). Without rows, none keeps its shape, sum is 0, mean and batchmean are NaN.
        row_weight: multiplies the rows; broadcasts to their shape. It never changes the divisor. A row of
            weight 0 contributes exactly 0 to loss and gradients, whatever it holds.
        dim: the class dimension. Channels-last (N, C, H, W) logits with ``dim=1`` are not copied.
        scale_by_t2: multiply by T², which keeps gradients comparable across temperatures (Hinton et al.,
            2015).
        recompute: True saves O(rows) for the backward and recomputes there; False makes the gradients in the
            forward, and scales them where the loss is multiplied afterwards; None takes what was measured
            faster, all in all, for the backend and the number of classes. Of vocabularies on CPUs it makes them
            in the forward once it has seen what the losses are multiplied with, see Note [Expected gradients]
            in afm_kernels/autograd/expected.py.
        divergence: "kl"; "reverse_kl", KL(student ‖ teacher); "jeffreys", their sum; or "js", Jensen-Shannon,
            β KL(p‖m) + (1 - β) KL(q‖m) with m = β p + (1 - β) q, teacher p and student q.
        beta: β of "js", between 0 and 1.

    Returns:
        The loss in float32 (float64 if either side is), zero-dimensional, or the rows' shape for "none".
        Gradients have the dtype, shape and dense strides of their logits. The values of extreme rows are
        tabled in Note [Hard rows] in afm_kernels/functional/softmax_kl.py. Of DTensors it is a DTensor: row values
        placed as the rows, or the loss over all of them, replicated.

    Raises:
        ValueError, TypeError: an argument is not as above.

    >>> import torch
    >>> from afm_kernels import softmax_kl_div
    >>> student = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    >>> teacher = torch.tensor([[3.0, 2.0, 1.0]], requires_grad=True)
    >>> loss = softmax_kl_div(student, teacher)
    >>> loss.backward()
    >>> round(loss.item(), 4), student.grad.allclose(torch.tensor([[-0.5752, 0.0, 0.5752]]), atol=1e-4)
    (1.1504, True)
    """
    if (type(student_logits) is not Tensor or type(teacher_logits) is not Tensor) and is_sharded(
        student_logits, teacher_logits
    ):
        return sharded_loss(
            softmax_kl_div,
            student_logits,
            teacher_logits,
            dim,
            reduction,
            {"row_weight": row_weight},
            temperature=temperature,
            scale_by_t2=scale_by_t2,
            recompute=recompute,
            divergence=divergence,
            beta=beta,
        )
    # See Note [Calls like one before] in loss.py.
    may_be_quick = (
        row_weight is None
        and dim == -1
        and (recompute is None or recompute is True or recompute is False)
        and (scale_by_t2 is False or scale_by_t2 is True)
        and not torch.compiler.is_compiling()
    )
    if may_be_quick:
        # With the types: a Decimal is equal to a float, and no number here.
        options = (temperature, type(temperature), reduction, scale_by_t2, divergence, beta, type(beta))
        loss = quick_loss(options, student_logits, teacher_logits, recompute)
        if loss is not None:
            return loss
    logits = check_logits(student_logits, teacher_logits, dim)
    temperature = check_positive("temperature", temperature)
    kind = 0 if divergence == "kl" else check_choice("divergence", divergence, ops.DIVERGENCES)
    beta = check_between("beta", beta, 0, 1, open_ends=True)
    beta = beta if kind == 3 else 0.5
    if row_weight is not None:
        row_weight = check_row_weight(row_weight, logits)
    if recompute is not None:
        check_recompute(recompute)
    factor = temperature * temperature if check_flag("scale_by_t2", scale_by_t2) else 1.0
    params = (temperature, kind, beta)
    loss = fused_loss("softmax_kl", logits, (row_weight,), params, (), reduction, factor, recompute)
    if may_be_quick:
        remember(options, (params, reduction, factor))
    return loss


def softmax_kl_div_grad(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    dim: int = -1,
    wrt: Sequence[str] = SIDES,
    out: Sequence[Tensor] | None = None,
    divergence: str = "kl",
    beta: float = 0.5,
) -> tuple[Tensor, ...]:
    """The gradients of the *summed* divergence by the logits, with no loss, no graph and no autograd engine.

    This is what an attack needs at each step: hand the result to
    ``torch.autograd.grad(..., grad_outputs=...)``.

    Args:
        student_logits, teacher_logits, temperature, row_weight, dim, divergence, beta: as ``softmax_kl_div``.
        wrt: the sides to differentiate by, "student" and "teacher", in the order of the result.
        out: one tensor for each side of ``wrt``, of its logits' shape, dtype and device, written in place of
            new ones. They overlap neither the logits nor each other in memory; views that interleave in one
            buffer count as overlapping.

    Returns:
        A tuple of gradients, one for each side of ``wrt``, with the dtype, shape and dense strides of the
        logits.

    Raises:
        ValueError, TypeError: an argument is not as above.

    >>> import torch
    >>> from afm_kernels import softmax_kl_div_grad
    >>> to_student, to_teacher = softmax_kl_div_grad(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    >>> to_student.allclose(torch.tensor([[0.2311, -0.2311]]), atol=1e-4)
    True
    """
    if (type(student_logits) is not Tensor or type(teacher_logits) is not Tensor) and is_sharded(
        student_logits, teacher_logits
    ):
        return sharded_gradients(
            softmax_kl_div_grad,
            student_logits,
            teacher_logits,
            dim,
            row_weight,
            out,
            temperature=temperature,
            wrt=wrt,
            divergence=divergence,
            beta=beta,
        )
    # See Note [Calls like one before] in loss.py.
    may_be_quick = (
        row_weight is None
        and out is None
        and wrt is SIDES
        and dim == -1
        and not torch.compiler.is_compiling()
    )
    if may_be_quick:
        options = ("grad", temperature, type(temperature), divergence, beta, type(beta))
        gradients = quick_gradients(options, student_logits, teacher_logits)
        if gradients is not None:
            return gradients
    logits = check_logits(student_logits, teacher_logits, dim)
    temperature = check_positive("temperature", temperature)
    kind = 0 if divergence == "kl" else check_choice("divergence", divergence, ops.DIVERGENCES)
    beta = check_between("beta", beta, 0, 1, open_ends=True)
    beta = beta if kind == 3 else 0.5
    if row_weight is not None:
        row_weight = check_row_weight(row_weight, logits)
    wrt_student, wrt_teacher = (True, True) if wrt is SIDES else sides_of(wrt)
    if forward_ad._current_level >= 0 and torch._C._are_functorch_transforms_active():
        refuse_forward_mode()  # no Function below that would
    student, teacher = logits.student, logits.teacher
    device_type = student.device.type
    if out is not None:

        def check() -> None:
            _check_out(wrt, out, student_logits, teacher_logits)

        if not _are_writable(out, len(wrt), student.device):
            check()
        to_student, to_teacher = out if wrt is SIDES else _by_side(wrt, out)
        if dim != -1:
            to_student = to_student if to_student is None else to_student.movedim(dim, -1)
            to_teacher = to_teacher if to_teacher is None else to_teacher.movedim(dim, -1)
        arguments = (student, teacher, row_weight, temperature, kind, beta, 1.0, to_student, to_teacher)
        write("softmax_kl_grad_out", device_type, arguments, out, check)
        return tuple(out)
    recording = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # as torch.no_grad, which costs as much as all the checks together
    try:
        to_student, to_teacher = ops.kernel("softmax_kl_grad", device_type)(
            student, teacher, row_weight, temperature, kind, beta, 1.0, wrt_student, wrt_teacher
        )
        if dim != -1:
            to_student = to_student.movedim(-1, dim) if wrt_student else to_student
            to_teacher = to_teacher.movedim(-1, dim) if wrt_teacher else to_teacher
    finally:
        torch._C._set_grad_enabled(recording)
    if may_be_quick:
        remember(options, (temperature, kind, beta))
    if wrt_student and wrt_teacher:
        return (to_student, to_teacher) if wrt[0] == "student" else (to_teacher, to_student)
    return (to_student,) if wrt_student else (to_teacher,)


def sides_of(wrt: Sequence[str]) -> tuple[bool, bool]:
    sides = tuple(wrt) if isinstance(wrt, (tuple, list)) else ()
    if not sides or any(side not in SIDES for side in sides) or len(set(sides)) != len(sides):
        raise ValueError(
            f"wrt is {wrt!r}; allowed: ('student', 'teacher'), ('student',), ('teacher',) or reversed"
        )
    return "student" in sides, "teacher" in sides


def _by_side(wrt: Sequence[str], out: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    sides = dict(zip(wrt, out, strict=True))
    return sides.get("student"), sides.get("teacher")


def _are_writable(out: Sequence[Tensor], count: int, device: torch.device) -> bool:
    """What an operator cannot see of its outputs. The rest: Note [Tensors to write] in out.py."""
    if not isinstance(out, (tuple, list)) or len(out) != count:
        return False
    for tensor in out:
        if not isinstance(tensor, Tensor) or tensor.device != device or tensor.requires_grad:
            return False
    return True


def _check_out(
    wrt: Sequence[str], out: Sequence[Tensor], student_logits: Tensor, teacher_logits: Tensor
) -> None:
    if not isinstance(out, (tuple, list)) or len(out) != len(wrt):
        raise ValueError(f"out must hold one tensor for each side of wrt={tuple(wrt)!r}, in a tuple or list")
    logits = {"student": student_logits, "teacher": teacher_logits}
    for side, tensor in zip(wrt, out, strict=True):
        like = logits[side]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"out for {side!r} is a {type(tensor).__name__}; a tensor is expected")
        if (tensor.shape, tensor.dtype, tensor.device) != (like.shape, like.dtype, like.device):
            raise ValueError(
                f"out for {side!r} is {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}; expected "
                f"{tuple(like.shape)}, {like.dtype} on {like.device}"
            )
        check_not_recorded(f"out for {side!r}", tensor)
    check_memory(
        {f"out for {side!r}": tensor for side, tensor in zip(wrt, out, strict=True)},
        {f"{side}_logits": tensor for side, tensor in logits.items()},
    )
