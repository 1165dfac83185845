"""Every operator in plain PyTorch: its definition, and the backend where no compiled kernel serves."""

from afm_kernels.reference.distillation import (
    distillation_backward,
    distillation_forward,
    distillation_forward_grad,
)
from afm_kernels.reference.dkl import dkl_backward, dkl_forward, dkl_forward_grad
from afm_kernels.reference.softmax_kl import (
    softmax_kl_backward,
    softmax_kl_forward,
    softmax_kl_forward_grad,
    softmax_kl_grad,
    softmax_kl_grad_out,
)

__all__ = [
    "distillation_backward",
    "distillation_forward",
    "distillation_forward_grad",
    "dkl_backward",
    "dkl_forward",
    "dkl_forward_grad",
    "softmax_kl_backward",
    "softmax_kl_forward",
    "softmax_kl_forward_grad",
    "softmax_kl_grad",
    "softmax_kl_grad_out",
]
