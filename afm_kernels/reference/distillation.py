"""The distillation loss in plain PyTorch: (1 - α) CE(student, label) + α T² KL(teacher ‖ student), row by row.

The cross-entropy is at temperature 1, with PyTorch's label smoothing ε: -(1 - ε) log q_y - ε/C Σ_c log q_c.
Its gradient is (1 - α) (q - (1 - ε) e_y - ε/C). The divergence is that of ``reference.softmax_kl``.

A row whose label is ``ignore_index`` has no cross-entropy. A student class at -inf makes the cross-entropy,
hence the row, +inf if it is the label's or if ε > 0, and the row's gradients NaN. A label that is no class
makes the row NaN. A term of factor 0 is not looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afm_kernels.reference.rows import loss_operators
from afm_kernels.reference.softmax_kl import KL, balanced, row_divergence, softmax_of
from afm_kernels.schemas import accumulation_dtype


def row_cross_entropy(
    student: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row (..., 1), and its gradient by the student's logits."""
    student = student.to(dtype)
    q, log_q = softmax_of(student - student.detach().amax(-1, keepdim=True))
    labels = labels.unsqueeze(-1)
    ignored = labels == ignore_index
    is_label = torch.arange(log_q.shape[-1], device=labels.device) == labels
    no_class = ~ignored & ~is_label.any(-1, keepdim=True)
    value = -log_q.masked_fill(~is_label, 0).sum(-1, keepdim=True).masked_fill(no_class, torch.nan)
    smooth = 0.0
    if label_smoothing != 0:
        smooth = label_smoothing / log_q.shape[-1]
        value = (
            (1 - label_smoothing) * value if label_smoothing != 1 else 0 * value.masked_fill(value.isinf(), 0)
        )
        value = value - smooth * log_q.sum(-1, keepdim=True)
    grad = balanced(q - (1 - label_smoothing) * is_label.to(dtype) - smooth, q)
    grad = grad.masked_fill(~value.isfinite(), torch.nan)
    return value.masked_fill(ignored, 0), grad.masked_fill(ignored, 0)


def row_distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row (..., 1), and its gradients by the student's and the teacher's logits."""
    dtype = accumulation_dtype(student, teacher)
    value = torch.zeros((*student.shape[:-1], 1), dtype=dtype, device=student.device)
    to_student, to_teacher = torch.zeros_like(student, dtype=dtype), torch.zeros_like(teacher, dtype=dtype)
    if alpha != 1:
        hard, hard_grad = row_cross_entropy(student, labels, label_smoothing, ignore_index, dtype)
        value, to_student = value + (1 - alpha) * hard, to_student + (1 - alpha) * hard_grad
    if alpha != 0:
        factor = alpha * temperature * temperature
        soft, soft_to_student, soft_to_teacher = row_divergence(student, teacher, temperature, KL, 0.5)
        value = value + factor * soft
        to_student, to_teacher = to_student + factor * soft_to_student, to_teacher + factor * soft_to_teacher
        # The two terms are one row: a loss that is not finite has no gradient on either side.
        to_teacher = to_teacher.masked_fill(~value.isfinite(), torch.nan)
    return value, to_student.masked_fill(~value.isfinite(), torch.nan), to_teacher


def _rows(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    return row_distillation(
        call.student,
        call.teacher,
        call.labels,
        call.temperature,
        call.alpha,
        call.label_smoothing,
        call.ignore_index,
    )


distillation_forward, distillation_backward, distillation_forward_grad = loss_operators("distillation", _rows)
