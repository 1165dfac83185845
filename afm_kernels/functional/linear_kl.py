"""Divergences between two models from their hidden states: projection and loss in one, chunk by chunk.

Mathematics and digits: Note [Digits of a projection] in afm_kernels/autograd/linear_chunks.py. Hard rows are those of
Note [Hard rows] in softmax_kl.py, of the logits that the hidden states are projected to.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from afm_kernels import ops
from afm_kernels.autograd.fused import refuse_forward_mode
from afm_kernels.autograd.linear_chunks import Head, Inputs, Plan, chunk_rows_of, loss_dtype
from afm_kernels.autograd.linear_kl import linear_loss
from afm_kernels.functional.checks import (
    REDUCTIONS,
    Logits,
    check_between,
    check_choice,
    check_flag,
    check_floating,
    check_integer,
    check_labels,
    check_positive,
    check_real,
    check_recompute,
    check_row_weight,
)
from afm_kernels.functional.sharded import gathered
from afm_kernels.functional.topk import TopK
from afm_kernels.functional.topk_kl import check_captured, stored


class Projection(NamedTuple):
    """A teacher by its hidden states and what projects them to logits, k (hidden weightᵀ + bias).

    Args:
        hidden: (..., H), floating point; its leading dimensions are those of the student's. H may differ.
        weight: (V, H). May be the student's own: then one gradient is the sum of both.
        bias: (V,), or None.
        softcap: c > 0 of z → c tanh(z / c), or None.
        logit_scale: k, before the softcap.

    >>> import torch
    >>> from afm_kernels import Projection
    >>> teacher = Projection(torch.zeros(8, 6), torch.zeros(10, 6), softcap=30.0)
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Projection | Tensor | TopK,
    *,
    student_bias: Tensor | None = None,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
    divergence: str = "kl",
    beta: float = 0.5,
    reduction: str = "batchmean",
    row_weight: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_classes: int | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    scale_by_t2: bool = False,
    chunk_rows: int | None = None,
    recompute: bool | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``softmax_kl_div`` of student_hidden · student_weightᵀ, without the logits: rows are projected in chunks.

    α D(teacher, student) + (1 - α) CE(student, labels), D at temperature T, the cross-entropy at 1. Beyond inputs and
    returned gradients it takes the memory of one chunk of both sides' logits (and, of 16-bit weights, of their
    gradients in ``accumulate_dtype``). Products have float32 results whatever the inputs' dtype, so that small
    divergences of bfloat16 models keep their digits; autocast changes nothing.

    Args:
        student_hidden: (..., H), floating point.
        student_weight: (V, H), of any floating dtype. A DTensor, as FSDP shards parameters, is gathered once; its
            gradient is the mean over the processes, as FSDP and DDP take it.
        teacher: a ``Projection``; or logits (..., V); or a ``TopK``, with the divergence of ``topk_kl_div``, at its own
            temperature. Gradients reach whatever of it requires them.
        student_bias: (V,), or None.
        labels: integers, of the shape of the rows; needed where ``alpha`` < 1. They share the student's products.
        alpha: the share of the divergence, from 0 to 1. With 0 the teacher is not looked at.
        temperature, divergence, beta, reduction, row_weight, scale_by_t2: as ``softmax_kl_div``; T² multiplies the
            divergence alone. Rows of weight 0 cost no product on CPUs; elsewhere one would have to wait for the device
            to know them.
        softcap, logit_scale: the student's, as ``Projection`` has the teacher's. They come before the temperature.
        num_classes: how many leading classes are shared, where V differs; both sides' other classes are left out.
        label_smoothing, ignore_index: as ``distillation_loss``.
        chunk_rows: rows a chunk; None takes what ``linear_kl_chunk_rows`` says.
        recompute: True projects again in the backward, and holds nothing between; False and None make the gradients
            in the forward, two products a side less. With reduction "none" they are made in the backward always.
        accumulate_dtype: in which weights' gradients are summed over chunks, torch.float32 or torch.float64.

    Returns:
        The loss in float32 (float64 if any input is), zero-dimensional, or the rows' shape for "none".

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: a second derivative, forward mode, vmap, or a torch.func transform inside of torch.compile.

    >>> import torch
    >>> from afm_kernels import Projection, linear_kl_div
    >>> hidden, weight = torch.eye(2, 3, requires_grad=True), torch.eye(5, 3, requires_grad=True)
    >>> loss = linear_kl_div(hidden, weight, Projection(torch.eye(2, 4), torch.eye(5, 4)), reduction="sum")
    >>> loss.backward()
    >>> round(loss.item(), 6), hidden.grad.shape, weight.grad.shape
    (0.0, torch.Size([2, 3]), torch.Size([5, 3]))
    """
    student_weight, tied = gathered(student_weight), student_weight
    student_bias = gathered(student_bias)
    rows = _check_head("student_", student_hidden, student_weight, student_bias)
    student = Head(_check_softcap("softcap", softcap), _check_scale("logit_scale", logit_scale))
    temperature = check_positive("temperature", temperature)
    kind = check_choice("divergence", divergence, ops.DIVERGENCES)
    beta = check_between("beta", beta, 0, 1, open_ends=True)
    alpha = check_between("alpha", alpha, 0, 1)
    label_smoothing = check_between("label_smoothing", label_smoothing, 0, 1)
    ignore_index = check_integer("ignore_index", ignore_index)
    check_choice("reduction", reduction, REDUCTIONS)
    check_recompute(recompute)
    factor = temperature * temperature if check_flag("scale_by_t2", scale_by_t2) else 1.0
    if accumulate_dtype not in (torch.float32, torch.float64):
        raise ValueError(f"accumulate_dtype is {accumulate_dtype}; allowed: torch.float32, torch.float64")
    if chunk_rows is not None and check_integer("chunk_rows", chunk_rows) < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; at least 1, or None, is expected")
    if labels is None and alpha != 1:
        raise ValueError(f"alpha is {alpha} and labels is None: a share of {1 - alpha:g} needs labels")

    hidden_t = weight_t = bias_t = given = None
    head, is_tied = Head(), False
    if isinstance(teacher, Projection):
        is_tied = teacher.weight is tied
        hidden_t = teacher.hidden
        weight_t = student_weight if is_tied else gathered(teacher.weight)
        bias_t = gathered(teacher.bias)
        rows_t = _check_head("teacher.", hidden_t, weight_t, bias_t)
        if rows_t != rows:
            raise ValueError(
                f"teacher.hidden has shape {tuple(hidden_t.shape)} and student_hidden {tuple(student_hidden.shape)}; "
                "all dimensions but the last must be equal"
            )
        head = Head(
            _check_softcap("teacher.softcap", teacher.softcap),
            _check_scale("teacher.logit_scale", teacher.logit_scale),
        )
        teacher_classes, which = weight_t.shape[0], "teacher.weight"
        device = hidden_t.device
    elif isinstance(teacher, Tensor):
        given = teacher
        check_floating("teacher", given)
        if given.dim() == 0 or given.shape[:-1] != rows:
            raise ValueError(
                f"teacher has shape {tuple(given.shape)} and student_hidden {tuple(student_hidden.shape)}; all "
                "dimensions but the last must be equal"
            )
        teacher_classes, which, device = given.shape[-1], "teacher", given.device
    elif isinstance(teacher, TopK):
        if divergence != "kl":
            raise ValueError(f"divergence is {divergence!r}; of a TopK teacher 'kl' is known")
        temperature = check_captured("temperature", temperature, teacher)
        if teacher.rows != rows:
            raise ValueError(
                f"teacher has rows of shape {tuple(teacher.rows)} and student_hidden {tuple(student_hidden.shape)}; "
                "all dimensions but the last must be equal"
            )
        teacher_classes = teacher.num_classes or num_classes or student_weight.shape[0]
        which, device = "teacher", teacher.indices.device
    else:
        raise TypeError(
            f"teacher is a {type(teacher).__name__}; a Projection, a tensor of logits or a TopK is expected"
        )
    if device != student_hidden.device:
        raise ValueError(
            f"{which} is on {device} and student_hidden on {student_hidden.device}; they must be on one device"
        )
    num_classes = _check_classes(num_classes, student_weight.shape[0], teacher_classes, which)
    topk: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(teacher, TopK):
        if num_classes != teacher_classes:  # they are normalised over all of the teacher's
            raise ValueError(
                f"num_classes is {num_classes} and teacher has {teacher_classes}; they must be equal"
            )
        teacher.check_ids(num_classes)
        dtype = ops.accumulation_dtype(student_hidden, student_weight, teacher.log_probs)
        indices, tail = stored(teacher, dtype)
        topk = (
            indices.reshape(-1, teacher.k),
            teacher.log_probs.contiguous().reshape(-1, teacher.k),
            None if tail is None else tail.reshape(-1),
        )

    inputs = Inputs(
        student_hidden.flatten(0, -2) if student_hidden.dim() > 1 else student_hidden.unsqueeze(0),
        student_weight,
        student_bias,
        None if hidden_t is None else hidden_t.reshape(-1, hidden_t.shape[-1]),
        weight_t,
        bias_t,
        None if given is None else given.reshape(-1, given.shape[-1]),
        None,
        None,
        *topk,
    )
    count = inputs.student_hidden.shape[0]
    # Of the logits that never are: what goes with their rows is checked as if they were there.
    shape_only = student_hidden.new_empty(1, dtype=loss_dtype(inputs)).expand(*rows, num_classes)
    logits = Logits(shape_only, shape_only, count, num_classes)
    if labels is not None:
        labels = check_labels(labels, logits, ignore_index, alpha != 1).reshape(-1)
    if row_weight is not None:
        row_weight = check_row_weight(row_weight, logits)
        row_weight = None if row_weight is None else row_weight.reshape(-1)
    if alpha == 0:
        hidden_t = weight_t = bias_t = given = None
    inputs = inputs._replace(
        teacher_hidden=inputs.teacher_hidden if hidden_t is not None else None,
        teacher_weight=weight_t,
        teacher_bias=bias_t,
        teacher_logits=inputs.teacher_logits if given is not None else None,
        labels=labels if alpha != 1 else None,
        row_weight=row_weight,
    )
    if alpha == 0:
        inputs = inputs._replace(topk_indices=None, topk_log_probs=None, topk_log_tail=None)
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs
    ):
        refuse_forward_mode()
    plan = Plan(
        student=student,
        teacher=head,
        temperature=temperature,
        divergence=kind,
        beta=beta if kind == 3 else 0.5,
        divergence_weight=alpha * factor,
        label_weight=1 - alpha,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        scale=1.0,
        num_classes=num_classes,
        chunk_rows=chunk_rows or 0,
        accumulate_dtype=accumulate_dtype,
        backend=ops.backend_for("linear_kl_rows", student_hidden.device.type),
        is_tied=is_tied and weight_t is not None,
    )
    if isinstance(teacher, TopK):
        plan = plan._replace(
            topk_mode=ops.TOPK_MODES.index(teacher.mode),
            topk_backend=ops.backend_for("topk_kl_forward_grad_out", student_hidden.device.type),
        )
    per_row = reduction == "none"
    divisor = {"batchmean": count, "mean": count * num_classes}.get(reduction, 1)
    if count == 0 or torch.compiler.is_compiling():  # See Note [Means in a graph] in loss.py.
        loss = linear_loss(inputs, plan, per_row, recompute is True)
        return loss.reshape(rows) if per_row else loss / divisor if divisor != 1 else loss
    loss = linear_loss(inputs, plan._replace(scale=1.0 / divisor), per_row, recompute is True)
    return loss.reshape(rows) if per_row else loss


def linear_kl_chunk_rows(rows: int, num_classes: int, device: str | torch.device = "cpu") -> int:
    """How many rows ``linear_kl_div`` takes at a time where ``chunk_rows`` is None.

    Args:
        rows: N, without those of weight 0 on CPUs.
        num_classes: V.
        device: where the tensors are.

    >>> from afm_kernels import linear_kl_chunk_rows
    >>> linear_kl_chunk_rows(2048, 32000)
    512
    """
    rows, num_classes = check_integer("rows", rows), check_integer("num_classes", num_classes)
    if rows < 0 or num_classes < 1:
        raise ValueError(f"rows is {rows} and num_classes {num_classes}; at least 0 and 1 are expected")
    return chunk_rows_of(rows, num_classes, torch.device(device).type)


def _check_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.Size:
    """Checks what makes logits, and returns the shape of their rows."""
    check_floating(f"{prefix}hidden", hidden)
    check_floating(f"{prefix}weight", weight)
    if hidden.dim() == 0:
        raise ValueError(f"{prefix}hidden has shape (); (..., H) is expected")
    if hidden.shape[-1] == 0:
        raise ValueError(
            f"{prefix}hidden has shape {tuple(hidden.shape)}; (..., H) with H at least 1 is expected"
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)} and {prefix}hidden {tuple(hidden.shape)}; the weight of "
            f"V classes, (V, {hidden.shape[-1]}), is expected"
        )
    others: list[tuple[str, Any]] = [(f"{prefix}weight", weight)]
    if bias is not None:
        check_floating(f"{prefix}bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{prefix}bias has shape {tuple(bias.shape)} and {prefix}weight {tuple(weight.shape)}; expected: "
                f"({weight.shape[0]},)"
            )
        others.append((f"{prefix}bias", bias))
    for name, tensor in others:
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {prefix}hidden on {hidden.device}; they must be on one device"
            )
    return hidden.shape[:-1]


def _check_softcap(name: str, softcap: float | None) -> float | None:
    return None if softcap is None else check_positive(name, softcap)


def _check_scale(name: str, scale: float) -> float:
    scale = check_real(name, scale) * 1.0
    if not isfinite(scale):
        raise ValueError(f"{name} is {scale}; a finite number is expected")
    return scale


def _check_classes(num_classes: int | None, student: int, teacher: int, which: str) -> int:
    if num_classes is None:
        if student != teacher:
            raise ValueError(
                f"student_weight has {student} classes and {which} {teacher}; pass num_classes, how many leading "
                "classes are shared"
            )
        return student
    num_classes = check_integer("num_classes", num_classes)
    if not 1 <= num_classes <= min(student, teacher):
        raise ValueError(
            f"num_classes is {num_classes}; allowed: 1 to {min(student, teacher)}, for student_weight has {student} "
            f"classes and {which} {teacher}"
        )
    return num_classes
