"""The distillation loss (1 - α) CE(student, label) + α T² KL(teacher ‖ student) in one pass over the row.

The kernels are those of ``softmax_kl`` with ``HAS_LABELS``, which adds to a row, at temperature 1 and with PyTorch's
label smoothing ε,

    CE = -(1 - ε) log q_y - ε/C Σ log q        ∂CE/∂s = q - (1 - ε) e_y - ε/C

and so one more exponential and two more sums; the label's logit is one more load. Bytes moved are those of KL.
"""

from __future__ import annotations

from torch import Tensor

from afm_kernels.triton.softmax_kl import KL, Mixture, Problem, outputs, returned


def _problem(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    row_weight: Tensor | None,
    mix: tuple[float, float, float, int],
    scale: float,
    grads: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Problem:
    temperature, alpha, label_smoothing, ignore_index = mix
    mixture = Mixture(labels, alpha, label_smoothing, ignore_index)
    return Problem(student, teacher, row_weight, temperature, KL.value, 0.5, scale, mixture, *grads)


def distillation_forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    row_weight: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    mix = (temperature, alpha, label_smoothing, ignore_index)
    return _problem(student, teacher, labels, row_weight, mix, scale).forward(student.shape[:-1], reduction)


def distillation_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    row_weight: Tensor | None,
    row_stats: Tensor,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    ignore_index: int,
    scale: float,
    wrt_student: bool,
    wrt_teacher: bool,
) -> tuple[Tensor, Tensor]:
    grads = outputs(student, teacher, wrt_student, wrt_teacher)
    mix = (temperature, alpha, label_smoothing, ignore_index)
    _problem(student, teacher, labels, row_weight, mix, scale, grads).backward(row_stats, grad_loss)
    return returned(grads[0], student), returned(grads[1], teacher)


def distillation_forward_grad(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    row_weight: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    scale: float,
    wrt_student: bool,
    wrt_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = outputs(student, teacher, wrt_student, wrt_teacher)
    mix = (temperature, alpha, label_smoothing, ignore_index)
    problem = _problem(student, teacher, labels, row_weight, mix, scale, grads)
    loss = problem.forward_grad(student.shape[:-1], reduction)
    return loss, returned(grads[0], student), returned(grads[1], teacher)
