"""KL from a teacher of whom k classes and their tail are known, in plain PyTorch: the definition of every kernel.

Note [K classes and a tail]
~~~~~~~~~~~~~~~~~~~~~~~~~~~
S are the kept classes, p_j their probabilities, P = Σ_S p, 1 - P the tail's; q = softmax(s/T) over all, Q = Σ_S q.
Every mode is ``row_divergence`` of a few classes whose "logits" are logarithms of masses, up to a constant of the side:

    mode         classes   teacher             student                value              gradient by s_j T
    tail         S, tail   log p, log(1 - P)   s/T, lse of the rest   KL                 S: q - p, else q (P-Q)/(1-Q)
    renormalise  S, tail   log p, -inf         s/T, lse of the rest   KL(p/P ‖ q)        S: q - p/P, else q
    both         S         log p               s/T                    KL(p/P ‖ q/Q)      S: q/Q - p/P, else 0
    truncate     S, tail   as renormalise                             P (KL + log P)     P times renormalise's

So the table of hard rows is softmax_kl's, of these classes; masses are normalised, whatever their storage rounded, and
a KL of theirs is at least 0; and all that is known of small KLs and certain rows serves here. The rest's lse is a sum
over the classes *not* kept, and their gradient is its softmax times the tail's.

The few classes are taken in float64, where they cost nothing: log-probabilities and logits do not share their rounding,
as two sides' logits do, and a difference of theirs would keep the digits of the larger number.

A row that keeps no class is 0 in ``truncate``, a sum over nothing, and in ``tail``, whose only class is the tail;
without one there is nothing to compare with, and it is NaN, as in the other modes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afm_kernels.reference.rows import finish_grad, loss_operators, reduce_rows
from afm_kernels.reference.softmax_kl import KL, row_divergence
from afm_kernels.schemas import accumulation_dtype, arguments_of

TAIL, RENORMALISE, BOTH, TRUNCATE = range(4)  # indices into ops.TOPK_MODES


def row_topk_kl(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    log_tail: Tensor | None,
    temperature: float,
    mode: int,
) -> tuple[Tensor, Tensor]:
    """The value of each row (..., 1), and its gradient by the student's logits."""
    num_classes = student.shape[-1]
    dtype = accumulation_dtype(student, log_probs)
    s = student.to(dtype)
    padding = indices < 0
    at = indices.long().clamp(0, num_classes - 1)
    is_kept = torch.zeros_like(s).scatter_add(-1, at, (~padding).to(dtype)) != 0

    kept = s.gather(-1, at).masked_fill(padding, -torch.inf)
    rest = s.masked_fill(is_kept, -torch.inf)
    looked_at = kept if mode == BOTH else s
    top = looked_at.detach().amax(-1, keepdim=True) if looked_at.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    student_classes = (kept.double() - top.double()) / temperature
    teacher_classes = log_probs.double().masked_fill(padding, -torch.inf)
    if mode != BOTH:
        rest = (rest - top) / temperature
        log_rest = torch.logsumexp(rest, -1, keepdim=True)
        nothing = torch.full_like(log_rest, -torch.inf)
        teacher_tail = nothing if log_tail is None or mode != TAIL else log_tail.unsqueeze(-1)
        student_classes = torch.cat((student_classes, log_rest.double()), -1)
        teacher_classes = torch.cat((teacher_classes, teacher_tail.double()), -1)

    if student_classes.shape[-1] == 0:
        value, by_class = s.new_full((*s.shape[:-1], 1), torch.nan), student_classes
    else:
        value, by_class, _ = row_divergence(student_classes, teacher_classes, 1.0, KL, 0.5)
    if mode == TRUNCATE:
        mass = teacher_classes.exp().sum(-1, keepdim=True)
        log_mass = torch.where(mass == 0, 0, teacher_classes.logsumexp(-1, keepdim=True))
        nothing = (
            student_classes.detach().amax(-1, keepdim=True) * 0
        )  # NaN where the student is no distribution
        value = torch.where(mass == 0, nothing, mass * (value + log_mass))
        by_class = torch.where(mass == 0, nothing, mass * by_class)

    outside = ((indices < -1) | (indices >= num_classes)).any(-1, keepdim=True)
    value = value.masked_fill(outside, torch.nan).to(dtype)
    by_class = by_class.masked_fill(outside, torch.nan).to(dtype) / temperature
    grad = torch.zeros_like(s)
    if mode != BOTH:
        shares = torch.where(log_rest == -torch.inf, grad, torch.exp(rest - log_rest))
        grad = by_class[..., -1:] * shares
        by_class = by_class[..., :-1]
    grad = grad.scatter_add(-1, at, by_class.masked_fill(padding, 0))
    return value, grad.masked_fill(~value.isfinite(), torch.nan)


def _rows(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    value, to_student = row_topk_kl(
        call.student, call.teacher, call.indices, call.log_tail, call.temperature, call.mode
    )
    return value, to_student, call.teacher  # the last is not asked for


topk_kl_forward, topk_kl_backward, topk_kl_forward_grad = loss_operators("topk_kl", _rows)

_ForwardGradOut = arguments_of("topk_kl_forward_grad_out")


def topk_kl_forward_grad_out(*args: Any) -> Tensor:
    call = _ForwardGradOut(*args)
    value, to_student, _ = _rows(call)
    call.grad_student.copy_(finish_grad(to_student, call.student, call.row_weight, call.scale, None, True))
    return reduce_rows(value, call.row_weight, call.reduction, call.scale)
