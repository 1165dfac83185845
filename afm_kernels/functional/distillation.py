"""Cross-entropy with labels and KL with a teacher, in one pass over the row.

Note [Hard rows of distillation]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
CE is the cross-entropy with labels, KL as in Note [Hard rows] (afm_kernels/functional/softmax_kl.py).

| row                                              | loss                        | gradients                           |
|--------------------------------------------------|-----------------------------|-------------------------------------|
| class -inf on both sides, not the label, ε = 0   | that class contributes 0    | 0 there                             |
| teacher -inf, student finite                     | KL: contributes 0; CE usual | student: of CE + α T q; teacher 0 |
| student -inf at the label (α < 1)                | +inf                        | NaN in that row, both sides         |
| student -inf anywhere, ε > 0 (α < 1)             | +inf                        | NaN in that row, both sides         |
| student -inf where p > 0 (α > 0)                 | +inf                        | NaN in that row, both sides         |
| student NaN or +inf or all -inf                  | NaN                         | NaN in that row                     |
| teacher NaN or +inf or all -inf (α > 0)          | NaN                         | NaN in that row                     |
| label is ``ignore_index``                        | the CE contributes 0        | of KL alone                         |
| label is no class                                | NaN (ValueError on the CPU) | NaN in that row                     |

With α = 0 the teacher is not looked at, and its gradient is 0; with α = 1 the labels are not. A row that is
ignored still has its KL, and with it the student's NaN.
"""

from __future__ import annotations

from torch import Tensor

from afm_kernels.functional.checks import (
    check_between,
    check_integer,
    check_labels,
    check_logits,
    check_positive,
    check_recompute,
    check_row_weight,
)
from afm_kernels.functional.loss import fused_loss
from afm_kernels.functional.sharded import is_sharded, sharded_loss


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    row_weight: Tensor | None = None,
    dim: int = -1,
    recompute: bool | None = None,
) -> Tensor:
    """(1 - α) CE(student, labels) + α T² KL(softmax(teacher / T) ‖ softmax(student / T)), in one pass over the row.

    Args:
        student_logits, teacher_logits, temperature, row_weight, dim, recompute: as ``softmax_kl_div``.
        labels: integers, of the shape of the rows.
        alpha: the share of the divergence, from 0 to 1.
        label_smoothing: ε of the cross-entropy, from 0 to 1, as ``F.cross_entropy`` has it.
        ignore_index: a row with this label has no cross-entropy. It still has its divergence, and still
            counts in the divisor of a mean (``F.cross_entropy`` leaves it out there).
        reduction: "none", "sum", "mean" (divides by the number of elements) or "batchmean" (by the number of
            rows).

    Returns:
        The loss, as ``softmax_kl_div`` returns it. Extreme rows are tabled in Note [Hard rows of
        distillation] in afm_kernels/functional/distillation.py.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.

    >>> import torch
    >>> from afm_kernels import distillation_loss
    >>> student = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    >>> teacher = torch.tensor([[1.0, 2.0, 3.0]])
    >>> loss = distillation_loss(student, teacher, torch.tensor([2]), alpha=0.5, temperature=4.0)
    >>> round(loss.item(), 4)  # the teacher agrees: half the cross-entropy is left
    0.2038
    """
    if is_sharded(student_logits, teacher_logits):
        return sharded_loss(
            distillation_loss,
            student_logits,
            teacher_logits,
            dim,
            reduction,
            {"labels": labels, "row_weight": row_weight},
            alpha=alpha,
            temperature=temperature,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            recompute=recompute,
        )
    logits = check_logits(student_logits, teacher_logits, dim)
    temperature = check_positive("temperature", temperature)
    alpha = check_between("alpha", alpha, 0, 1)
    label_smoothing = check_between("label_smoothing", label_smoothing, 0, 1)
    ignore_index = check_integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}; an int64 is expected")
    labels = check_labels(labels, logits, ignore_index, are_looked_at=alpha != 1)
    if row_weight is not None:
        row_weight = check_row_weight(row_weight, logits)
    if recompute is not None:
        check_recompute(recompute)
    params = (temperature, alpha, label_smoothing, ignore_index)
    return fused_loss("distillation", logits, (labels, row_weight), params, (), reduction, 1.0, recompute)
