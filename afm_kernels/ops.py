"""The operators: their schemas, and the table of which backend serves what.

Two namespaces carry the same schemas. ``afm_kernels`` holds the compiled kernels: the CPU module implements
its CPU key and the CUDA module its CUDA key. ``afm_kernels_triton`` holds the Triton kernels, on the CUDA key,
and on the CPU key under Triton's interpreter. The reference backend is plain PyTorch and needs no operator.

Note [Operator contract]
~~~~~~~~~~~~~~~~~~~~~~~~
What every backend may assume, because ``functional`` has checked it, and must deliver:

* ``student``, ``teacher``: (..., C) with the class dimension last and C >= 1, equal shapes, one device, each of
  float16, bfloat16, float32 or float64, not necessarily the same. Any strides: a backend runs on rows in place where
  the class stride is 1, whatever the other strides are, and copies otherwise. The *accumulation dtype* is
  float64 if either is float64, else float32.
* ``row_weight``: accumulation dtype, contiguous, the shape of the rows. A row of weight 0 contributes exactly 0 to
  loss and gradients whatever it holds.
* ``labels``: int64, contiguous, the shape of the rows. A row whose label is ``ignore_index`` has no cross-entropy term.
* ``reduction``: an index into ``REDUCTIONS``. 0 returns the rows' values (accumulation dtype, contiguous); 1 their
  sum (zero-dimensional). Both are multiplied by ``row_weight`` and ``scale``; mean, batchmean and T² are folded
  into ``scale`` by the caller.
* ``divergence``: an index into ``DIVERGENCES``. ``beta`` is the weight of JS and ignored by the others.
* ``grad_loss``: accumulation dtype; zero-dimensional, or the shape of the rows and contiguous.
* ``row_stats``: (rows, ROW_STATS), accumulation dtype. What is in it is the backend's own business: a backward is
  always served by the backend of its forward.
* Gradients are those of the loss as defined above (row_weight and scale included), times ``grad_loss`` in a backward.
  They have their logits' dtype, shape and, where those are dense and non-overlapping, strides (``torch.empty_like``).
  A gradient that was not asked for (``wrt_student``, ``wrt_teacher``) is an empty tensor of shape (0,).
* Nothing is written but the outputs, nothing synchronises with the device, the current stream is used.
"""

from __future__ import annotations

import torch

DIVERGENCES = ("kl", "reverse_kl", "jeffreys", "js")
REDUCTIONS = ("none", "sum")
NORMS = ("linf", "l2")
ROW_STATS = 8  # columns of row_stats, room for every backend's row scalars

_KL = "Tensor student, Tensor teacher, Tensor? row_weight, "
_DISTILLATION = "Tensor student, Tensor teacher, Tensor labels, Tensor? row_weight, "
_MIX = "float temperature, float alpha, float label_smoothing, int ignore_index, "
_WRT = "bool wrt_student, bool wrt_teacher"
_CLIP = "float? clip_min, float? clip_max"

# name -> signature, the same in both namespaces. See Note [Operator contract].
SCHEMAS = {
    # divergences between softmax(student / T) and softmax(teacher / T)
    "softmax_kl_forward": f"({_KL}float temperature, int divergence, float beta, int reduction, float scale)"
    " -> (Tensor loss, Tensor row_stats)",
    "softmax_kl_backward": "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? row_weight, Tensor row_stats, "
    f"float temperature, int divergence, float beta, float scale, {_WRT})"
    " -> (Tensor grad_student, Tensor grad_teacher)",
    "softmax_kl_forward_grad": f"({_KL}float temperature, int divergence, float beta, int reduction, float scale, "
    f"{_WRT}) -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    "softmax_kl_grad": f"({_KL}float temperature, int divergence, float beta, float scale, {_WRT})"
    " -> (Tensor grad_student, Tensor grad_teacher)",
    "softmax_kl_grad_out": f"({_KL}float temperature, int divergence, float beta, float scale, "
    "Tensor(a!)? grad_student, Tensor(b!)? grad_teacher) -> ()",
    # (1 - alpha) * cross_entropy(student, labels) + alpha * T^2 * KL(teacher || student)
    "distillation_forward": f"({_DISTILLATION}{_MIX}int reduction, float scale) -> (Tensor loss, Tensor row_stats)",
    "distillation_backward": "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor labels, Tensor? row_weight, "
    f"Tensor row_stats, {_MIX}float scale, {_WRT}) -> (Tensor grad_student, Tensor grad_teacher)",
    "distillation_forward_grad": f"({_DISTILLATION}{_MIX}int reduction, float scale, {_WRT})"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    # attack: one projected step, and the start
    "pgd_step": f"(Tensor x_adv, Tensor grad, Tensor x, float step_size, float eps, int norm, {_CLIP}) -> Tensor",
    "pgd_step_out": "(Tensor x_adv, Tensor grad, Tensor x, float step_size, float eps, int norm, "
    f"{_CLIP}, Tensor(a!) out) -> ()",
    "pgd_start": f"(Tensor x, Tensor noise, float noise_scale, float eps, int norm, {_CLIP}) -> Tensor",
    # relu(x * scale[c] + shift[c] + residual), channels in dim 1
    "scale_shift_relu_forward": "(Tensor x, Tensor scale, Tensor shift, Tensor? residual) -> Tensor",
    "scale_shift_relu_backward": "(Tensor grad_output, Tensor output, Tensor scale, bool wrt_x, bool wrt_residual)"
    " -> (Tensor grad_x, Tensor grad_residual)",
}
