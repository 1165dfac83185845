"""Fused, numerically safe distillation losses and attack steps, with gradients for student and teacher.

    from afm_kernels import softmax_kl_div
    loss = softmax_kl_div(student_logits, teacher_logits, temperature=4.0, scale_by_t2=True)

``python -m afm_kernels`` says what was built and which backend serves what.
"""

from afm_kernels.autograd import SoftmaxKLDivFunction
from afm_kernels.functional import (
    APGDState,
    Projection,
    SquareState,
    TopK,
    apgd_step,
    distillation_loss,
    dkl_loss,
    linear_kl_chunk_rows,
    linear_kl_div,
    load_topk,
    pgd_start,
    pgd_step,
    save_topk,
    scale_shift_relu,
    softmax_kl_direction,
    softmax_kl_div,
    softmax_kl_div_grad,
    square_step,
    topk_kl_div,
)
from afm_kernels.modules import DistillationLoss, DKLLoss, LinearKLDivLoss, SoftmaxKLDivLoss
from afm_kernels.ops import backend_info, use_backend
from afm_kernels.version import __version__

__all__ = [
    "APGDState",
    "DKLLoss",
    "DistillationLoss",
    "LinearKLDivLoss",
    "Projection",
    "SoftmaxKLDivFunction",
    "SoftmaxKLDivLoss",
    "SquareState",
    "TopK",
    "__version__",
    "apgd_step",
    "backend_info",
    "distillation_loss",
    "dkl_loss",
    "linear_kl_chunk_rows",
    "linear_kl_div",
    "load_topk",
    "pgd_start",
    "pgd_step",
    "save_topk",
    "scale_shift_relu",
    "softmax_kl_direction",
    "softmax_kl_div",
    "softmax_kl_div_grad",
    "square_step",
    "topk_kl_div",
    "use_backend",
]
