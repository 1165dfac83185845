"""The operators' signatures, written once: what PyTorch registers, and what backends call their arguments.

What the arguments mean is Note [Operator contract] in ops.py.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor

_KL = "Tensor student, Tensor teacher, Tensor? row_weight, "
_DISTILLATION = "Tensor student, Tensor teacher, Tensor labels, Tensor? row_weight, "
_MIX = "float temperature, float alpha, float label_smoothing, int ignore_index, "
_DKL = "Tensor student, Tensor teacher, Tensor? class_weight, Tensor? row_weight, "
_DKL_MIX = "float temperature, float weight_temperature, float alpha, float beta, "
_TOPK = "Tensor student, Tensor teacher, Tensor indices, Tensor? log_tail, Tensor? row_weight, "
_WRT = "bool wrt_student, bool wrt_teacher"
_CLIP = "float? clip_min, float? clip_max"

#: name -> signature
SCHEMAS = {
    # divergences between softmax(student / T) and softmax(teacher / T)
    "softmax_kl_forward": f"({_KL}float temperature, int divergence, float beta, int reduction, float scale)"
    " -> (Tensor loss, Tensor row_stats)",
    "softmax_kl_backward": "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? row_weight, Tensor row_stats, "
    f"float temperature, int divergence, float beta, float scale, {_WRT})"
    " -> (Tensor grad_student, Tensor grad_teacher)",
    "softmax_kl_forward_grad": f"({_KL}float temperature, int divergence, float beta, int reduction, float scale, "
    f"{_WRT}) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    "softmax_kl_forward_backward": f"({_KL}float temperature, int divergence, float beta, float scale, "
    f"float grad_loss, {_WRT}) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    "softmax_kl_grad": f"({_KL}float temperature, int divergence, float beta, float scale, {_WRT})"
    " -> (Tensor grad_student, Tensor grad_teacher)",
    "softmax_kl_grad_out": f"({_KL}float temperature, int divergence, float beta, float scale, "
    "Tensor(a!)? grad_student, Tensor(b!)? grad_teacher) -> ()",
    # KL's gradients, each row divided by exp(log_scale)
    "softmax_kl_direction": f"(Tensor student, Tensor teacher, float temperature, {_WRT})"
    " -> (Tensor grad_student, Tensor grad_teacher, Tensor log_scale)",
    # (1 - alpha) * cross_entropy(student, labels) + alpha * T^2 * KL(teacher || student)
    "distillation_forward": f"({_DISTILLATION}{_MIX}int reduction, float scale) -> (Tensor loss, Tensor row_stats)",
    "distillation_backward": "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor labels, Tensor? row_weight, "
    f"Tensor row_stats, {_MIX}float scale, {_WRT}) -> (Tensor grad_student, Tensor grad_teacher)",
    "distillation_forward_grad": f"({_DISTILLATION}{_MIX}int reduction, float scale, {_WRT})"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    # row values of divergence_weight * divergence + label_weight * cross_entropy; logits become their gradients
    "linear_kl_rows": "(Tensor(a!) student, Tensor(b!) teacher, Tensor? labels, Tensor? row_weight, float temperature, "
    "int divergence, float beta, float divergence_weight, float label_weight, float label_smoothing, "
    f"int ignore_index, float scale, {_WRT}) -> Tensor",
    # alpha * cross_entropy(softmax(teacher / T), student / T) + beta * 1/4 sum_jk w_j w_k ((t_j - t_k) - (s_j
    # - s_k))^2
    "dkl_forward": f"({_DKL}{_DKL_MIX}int reduction, float scale) -> (Tensor loss, Tensor row_stats)",
    "dkl_backward": "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? class_weight, Tensor? row_weight, "
    f"Tensor row_stats, {_DKL_MIX}bool symmetric, float scale, {_WRT}) -> (Tensor grad_student, Tensor grad_teacher)",
    "dkl_forward_grad": f"({_DKL}{_DKL_MIX}bool symmetric, int reduction, float scale, {_WRT})"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    # KL of a teacher of whom k classes are known, and their tail
    "topk_kl_forward": f"({_TOPK}float temperature, int mode, int reduction, float scale)"
    " -> (Tensor loss, Tensor row_stats)",
    "topk_kl_backward": f"(Tensor grad_loss, {_TOPK}Tensor row_stats, float temperature, int mode, float scale, {_WRT})"
    " -> (Tensor grad_student, Tensor grad_teacher)",
    "topk_kl_forward_grad": f"({_TOPK}float temperature, int mode, int reduction, float scale, {_WRT})"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    "topk_kl_forward_grad_out": f"({_TOPK}float temperature, int mode, int reduction, float scale, "
    "Tensor(a!) grad_student) -> Tensor loss",
    # attack: one projected step, and the start
    "pgd_step": f"(Tensor x_adv, Tensor grad, Tensor x, float step_size, float eps, int norm, {_CLIP}) -> Tensor",
    "pgd_step_out": "(Tensor x_adv, Tensor grad, Tensor x, float step_size, float eps, int norm, "
    f"{_CLIP}, Tensor(a!) out) -> ()",
    "pgd_start": f"(Tensor x, Tensor noise, float noise_scale, float eps, int norm, {_CLIP}) -> Tensor",
    "apgd_step": "(Tensor(a!) x_adv, Tensor(b!) x_old, Tensor(c!) x_best, Tensor(d!) grad_best, Tensor(e!) x_hit, "
    "Tensor(f!) numbers, Tensor(g!) counts, Tensor grad, Tensor x, Tensor loss, Tensor misclassified, float eps, "
    f"int norm, {_CLIP}, float momentum, float decrease, int window, bool first) -> ()",
    "square_step": "(Tensor(a!) x_adv, Tensor(b!) x_best, Tensor(c!) margin, Tensor logits, Tensor labels, "
    "Tensor high, Tensor low, Tensor last_corners, Tensor corners, Tensor is_high, int last_side, int side) -> ()",
    # relu(x * scale[c] + shift[c] + residual), channels in dim 1
    "scale_shift_relu_forward": "(Tensor x, Tensor scale, Tensor shift, Tensor? residual) -> Tensor",
    "scale_shift_relu_backward": "(Tensor grad_output, Tensor output, Tensor scale, bool wrt_x, bool wrt_residual)"
    " -> (Tensor grad_x, Tensor grad_residual)",
    # relu(conv2d(x, weight, bias, padding=1) + residual), 3x3, and its gradient by x
    "conv3x3_forward": "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu) -> Tensor",
    "conv3x3_input_grad": "(Tensor grad_output, Tensor? output, Tensor weight, Tensor? added, Tensor? input) -> Tensor",
    # relu(conv2d(x, weight, bias, stride, padding) + residual) of small images, and its gradient by x
    "small_conv_forward": "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu, int stride, "
    "int padding) -> Tensor",
    "small_conv_input_grad": "(Tensor grad_output, Tensor weight, Tensor? added, Tensor? input, int height, int width, "
    "int stride, int padding) -> Tensor",
    # the instruction set that serves the CPU ops: "portable", "avx2", "avx512"
    "cpu_capability": "() -> str",
}


def arguments_of(op: str) -> Any:
    """A named tuple of an operator's arguments: ``arguments_of(op)(*args).student``."""
    arguments = SCHEMAS[op][1 : SCHEMAS[op].index(") ->")]
    return namedtuple("Arguments", [argument.split()[-1] for argument in arguments.split(", ")])


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of ``tensors`` is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
