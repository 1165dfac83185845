"""Every operator in plain PyTorch: its definition, and the backend where no compiled kernel serves."""

from afm_kernels.reference.apgd_step import apgd_step
from afm_kernels.reference.conv3x3 import conv3x3_forward, conv3x3_input_grad
from afm_kernels.reference.distillation import (
    distillation_backward,
    distillation_forward,
    distillation_forward_grad,
)
from afm_kernels.reference.dkl import dkl_backward, dkl_forward, dkl_forward_grad
from afm_kernels.reference.linear_kl import linear_kl_rows, linear_kl_rows_by
from afm_kernels.reference.pgd_step import pgd_start, pgd_step, pgd_step_out
from afm_kernels.reference.scale_shift_relu import (
    scale_shift_relu,
    scale_shift_relu_backward,
    scale_shift_relu_backward_vectors,
    scale_shift_relu_forward,
)
from afm_kernels.reference.small_conv import small_conv_forward, small_conv_input_grad
from afm_kernels.reference.softmax_kl import (
    softmax_kl_backward,
    softmax_kl_forward,
    softmax_kl_forward_backward,
    softmax_kl_forward_grad,
    softmax_kl_grad,
    softmax_kl_grad_out,
)
from afm_kernels.reference.softmax_kl_direction import softmax_kl_direction
from afm_kernels.reference.square_step import square_step
from afm_kernels.reference.topk_kl import (
    topk_kl_backward,
    topk_kl_forward,
    topk_kl_forward_grad,
    topk_kl_forward_grad_out,
)

__all__ = [
    "apgd_step",
    "conv3x3_forward",
    "conv3x3_input_grad",
    "distillation_backward",
    "distillation_forward",
    "distillation_forward_grad",
    "dkl_backward",
    "dkl_forward",
    "dkl_forward_grad",
    "linear_kl_rows",
    "linear_kl_rows_by",
    "pgd_start",
    "pgd_step",
    "pgd_step_out",
    "scale_shift_relu",
    "scale_shift_relu_backward",
    "scale_shift_relu_backward_vectors",
    "scale_shift_relu_forward",
    "small_conv_forward",
    "small_conv_input_grad",
    "softmax_kl_backward",
    "softmax_kl_direction",
    "softmax_kl_forward",
    "softmax_kl_forward_backward",
    "softmax_kl_forward_grad",
    "softmax_kl_grad",
    "softmax_kl_grad_out",
    "square_step",
    "topk_kl_backward",
    "topk_kl_forward",
    "topk_kl_forward_grad",
    "topk_kl_forward_grad_out",
]
