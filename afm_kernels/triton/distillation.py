"""The distillation loss (1 - α) CE(student, label) + α T² KL(teacher ‖ student) in one pass over the row.

The kernels are those of ``softmax_kl`` with ``HAS_LABELS``, which adds to a row, at temperature 1 and with PyTorch's
label smoothing ε,

    CE = -(1 - ε) log q_y - ε/C Σ log q        ∂CE/∂s = q - (1 - ε) e_y - ε/C

and so one more exponential and two more sums; the label's logit is one more load. Bytes moved are those of KL.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from afm_kernels.triton.softmax_kl import KL, Mixture, Problem, loss_operators


def _problem(call: Any, *grads: Tensor | None) -> Problem:
    mixture = Mixture(call.labels, call.alpha, call.label_smoothing, call.ignore_index)
    return Problem(
        call.student,
        call.teacher,
        call.row_weight,
        call.temperature,
        KL.value,
        0.5,
        call.scale,
        mixture,
        *grads,
    )


distillation_forward, distillation_backward, distillation_forward_grad = loss_operators(
    "distillation", _problem
)
