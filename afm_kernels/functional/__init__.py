"""What users call: checks, reductions, documentation."""

from afm_kernels.functional.distillation import distillation_loss
from afm_kernels.functional.dkl import dkl_loss
from afm_kernels.functional.softmax_kl import softmax_kl_div, softmax_kl_div_grad

__all__ = ["distillation_loss", "dkl_loss", "softmax_kl_div", "softmax_kl_div_grad"]
