"""What users call: checks, reductions, documentation."""

from afm_kernels.functional.apgd_step import APGDState, apgd_step
from afm_kernels.functional.distillation import distillation_loss
from afm_kernels.functional.dkl import dkl_loss
from afm_kernels.functional.linear_kl import Projection, linear_kl_chunk_rows, linear_kl_div
from afm_kernels.functional.pgd_step import pgd_start, pgd_step
from afm_kernels.functional.scale_shift_relu import scale_shift_relu
from afm_kernels.functional.softmax_kl import softmax_kl_div, softmax_kl_div_grad
from afm_kernels.functional.softmax_kl_direction import softmax_kl_direction
from afm_kernels.functional.square_step import SquareState, square_step
from afm_kernels.functional.topk import TopK
from afm_kernels.functional.topk_files import load_topk, save_topk
from afm_kernels.functional.topk_kl import topk_kl_div

__all__ = [
    "APGDState",
    "Projection",
    "SquareState",
    "TopK",
    "apgd_step",
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
]
