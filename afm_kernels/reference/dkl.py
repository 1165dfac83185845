"""The decoupled KL loss (DKL, IKL, GKL) in plain PyTorch, in O(C) a row.

    α CE(softmax(t/T), s/T) + β/4 Σ_jk w_j w_k ((t_j - t_k) - (s_j - s_k))²

with the teacher's probabilities of the first term and the weights w constant. Published code builds the (B,
C, C) tensors. With d = t - s, W = Σ w and μ = Σ w d / W the second term is

    β/2 W Σ w (d - μ)²        ∂/∂t = β W w (d - μ) = -∂/∂s

(½ [W Σ w d² - (Σ w d)²] is the same number, but loses all its digits in float32 when d is small.)

Hard rows: as ``kl`` (reference.softmax_kl). A class of weight 0, or at -inf on both sides, is left out of the
    second
term; a class of positive weight at -inf on one side makes the row +inf and its gradients NaN, unless only the
teacher excludes it and the weights are the teacher's own, which are 0 there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afm_kernels.reference.rows import loss_operators
from afm_kernels.reference.softmax_kl import balanced, softmax_of
from afm_kernels.schemas import accumulation_dtype


def row_dkl(
    student: Tensor,
    teacher: Tensor,
    class_weight: Tensor | None,
    temperature: float,
    weight_temperature: float,
    alpha: float,
    beta: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row (..., 1), and its gradients by the student's and the teacher's logits."""
    dtype = accumulation_dtype(student, teacher)
    s, t = student.to(dtype), teacher.to(dtype)
    student_excluded, teacher_excluded = s == -torch.inf, t == -torch.inf
    # 0, or NaN in a row that is no distribution, even where a mask or class weights hide what spoils it.
    top_s, top_t = s.detach().amax(-1, keepdim=True), t.detach().amax(-1, keepdim=True)
    value = 0 * (top_s + top_t)
    to_student, to_teacher = torch.zeros_like(s), torch.zeros_like(t)
    if alpha != 0:
        q, log_q = softmax_of((s - top_s) / temperature)
        p = softmax_of((t - top_t) / temperature)[0].detach()
        missing = (student_excluded & ~teacher_excluded).any(-1, keepdim=True)
        cross_entropy = -(p * log_q).masked_fill(student_excluded | teacher_excluded, 0).sum(-1, keepdim=True)
        value = value + alpha * torch.where(missing, cross_entropy + torch.inf, cross_entropy)
        to_student = to_student + alpha * balanced(q - p, q) / temperature
    if beta != 0:
        if class_weight is None:
            weight, weightless = softmax_of((t - top_t) / weight_temperature)[0].detach(), teacher_excluded
        else:
            weight, weightless = class_weight, class_weight == 0
        left_out = weightless | (student_excluded & teacher_excluded)
        missing = (~left_out & (student_excluded | teacher_excluded)).any(-1, keepdim=True)
        left_out = left_out | student_excluded | teacher_excluded
        d = (t - s).masked_fill(left_out, 0)
        weight = weight.masked_fill(left_out, 0)
        total = weight.sum(-1, keepdim=True)
        divisor = total.where(total != 0, 1)
        off = (d - (weight * d).sum(-1, keepdim=True) / divisor).masked_fill(left_out, 0)
        off = off - (weight * off).sum(-1, keepdim=True) / divisor  # what rounding left of the mean
        squared = total / 2 * (weight * off * off).sum(-1, keepdim=True)
        value = value + beta * torch.where(missing, squared + torch.inf, squared)
        grad = beta * total * balanced(weight * off, weight / divisor)
        to_teacher = to_teacher + grad
        if symmetric:
            to_student = to_student - grad
    lost = ~value.isfinite()
    return value, to_student.masked_fill(lost, torch.nan), to_teacher.masked_fill(lost, torch.nan)


def _rows(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    return row_dkl(
        call.student,
        call.teacher,
        call.class_weight,
        call.temperature,
        call.weight_temperature,
        call.alpha,
        call.beta,
        getattr(call, "symmetric", True),  # a value is the same either way
    )


dkl_forward, dkl_backward, dkl_forward_grad = loss_operators("dkl", _rows)
