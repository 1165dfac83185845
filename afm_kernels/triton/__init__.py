"""Triton kernels: the operators where no CUDA compiler was at hand, and on AMD.

This package imports no triton: ``ops`` registers what ``SERVES`` names, and imports a module at its first launch.
"""

ROW_STATS = 12  # columns of row_stats. See Note [Row scalars] in row_math.py

SERVES = {
    "softmax_kl_forward": "softmax_kl",
    "softmax_kl_backward": "softmax_kl",
    "softmax_kl_forward_grad": "softmax_kl",
    "softmax_kl_grad": "softmax_kl",
    "softmax_kl_grad_out": "softmax_kl",
    "softmax_kl_direction": "softmax_kl_direction",
    "distillation_forward": "distillation",
    "distillation_backward": "distillation",
    "distillation_forward_grad": "distillation",
    "dkl_forward": "dkl",
    "dkl_backward": "dkl",
    "dkl_forward_grad": "dkl",
    "pgd_step": "pgd_step",
    "pgd_step_out": "pgd_step",
    "pgd_start": "pgd_step",
    "apgd_step": "apgd_step",
    "scale_shift_relu_forward": "scale_shift_relu",
    "scale_shift_relu_backward": "scale_shift_relu",
}
