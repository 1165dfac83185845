"""Rows of logits that become their own gradients: what a loss fused with its projection does with a chunk of them.

A row is worth w_d D + w_c CE: a divergence of ``softmax_kl`` at temperature T, and the cross-entropy of
``distillation`` at temperature 1. Every backend has both losses' operators, so this one is written in terms of them:
KL with labels is ``distillation``, (1 - α) CE + α T² KL, times k, with k = w_d / T² + w_c and α = w_d / (T² k).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afm_kernels.reference.distillation import distillation_forward_grad
from afm_kernels.reference.softmax_kl import KL, softmax_kl_forward_grad
from afm_kernels.schemas import arguments_of

_Rows = arguments_of("linear_kl_rows")


def linear_kl_rows_by(
    softmax_kl: Callable[..., Any], distillation: Callable[..., Any]
) -> Callable[..., Tensor]:
    """The operator linear_kl_rows, in terms of a backend's softmax_kl_forward_grad and distillation_forward_grad."""

    def linear_kl_rows(*args: Any) -> Tensor:
        call = _Rows(*args)
        wrt = (call.wrt_student, call.wrt_teacher)
        student, teacher, t2 = call.student, call.teacher, call.temperature * call.temperature
        if call.labels is None:
            values, *grads = softmax_kl(
                student,
                teacher,
                call.row_weight,
                call.temperature,
                call.divergence,
                call.beta,
                0,
                call.scale * call.divergence_weight,
                *wrt,
            )
        else:
            if call.divergence != KL and call.divergence_weight != 0:
                raise RuntimeError("labels go with kl only, or with no divergence")
            factor = call.divergence_weight / t2 + call.label_weight
            values, *grads = distillation(
                student,
                teacher,
                call.labels,
                call.row_weight,
                call.temperature,
                call.divergence_weight / t2 / factor,
                call.label_smoothing,
                call.ignore_index,
                0,
                call.scale * factor,
                *wrt,
            )
        with torch.no_grad():
            for logits, grad, wanted in zip((student, teacher), grads, wrt, strict=True):
                if wanted:
                    logits.copy_(grad)
        return values

    return linear_kl_rows


linear_kl_rows = linear_kl_rows_by(softmax_kl_forward_grad, distillation_forward_grad)
