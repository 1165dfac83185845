"""The torch.autograd.Function classes: which gradients, when, and by which operator."""

from afm_kernels.autograd.fused import FusedLoss
from afm_kernels.autograd.scale_shift_relu import ScaleShiftReLUFunction
from afm_kernels.autograd.softmax_kl import SoftmaxKLDivFunction

__all__ = ["FusedLoss", "ScaleShiftReLUFunction", "SoftmaxKLDivFunction"]
