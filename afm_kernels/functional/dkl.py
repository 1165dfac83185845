"""The decoupled KL loss (DKL, IKL, GKL) without its (B, C, C) tensors.

Note [Hard rows of dkl]
~~~~~~~~~~~~~~~~~~~~~~~
Weights are the teacher's own (0 where the teacher is -inf) unless ``class_weight`` is given.

| row                                   | own weights                        | ``class_weight`` w            |
|---------------------------------------|------------------------------------|-------------------------------|
| class -inf on both sides              | contributes 0, gradients 0 there   | the same                      |
| teacher -inf, student finite          | contributes 0; student α q/T there | +inf where w > 0 (β > 0)      |
| student -inf where the teacher is not | +inf, gradients NaN in that row    | the same (α = 0: where w > 0) |
| NaN or +inf logit, or all -inf        | NaN, gradients NaN in that row     | the same                      |

A term of factor 0 (α or β) contributes exactly 0. A logit gap of 10⁴ gives 10⁸ in the squared term, as it
should.
"""

from __future__ import annotations

from torch import Tensor

from afm_kernels.functional.checks import (
    check_broadcasts,
    check_flag,
    check_logits,
    check_not_negative,
    check_positive,
    check_recompute,
    check_row_weight,
    constant_like_rows,
)
from afm_kernels.functional.loss import fused_loss
from afm_kernels.functional.sharded import is_sharded, row_shards, sharded_loss


def dkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    class_weight: Tensor | None = None,
    symmetric: bool = True,
    reduction: str = "batchmean",
    row_weight: Tensor | None = None,
    dim: int = -1,
    recompute: bool | None = None,
) -> Tensor:
    """The decoupled KL loss: α cross-entropy with the teacher's softmax, plus β times a weighted squared difference.

    A row is worth α CE(softmax(t/T), softmax(s/T)) + β/4 Σ_jk w_j w_k ((t_j - t_k) - (s_j - s_k))². The
    teacher's probabilities of the first term and the weights w carry no gradient. Published code builds the
    pairwise differences as (B, C, C) tensors; since the pair weight factors, the sum over pairs equals, with
    d = t - s, W = Σ w and μ = Σ w d / W, the O(C) form 2 W Σ_j w_j (d_j - μ)², which is what is computed:

    >>> import torch
    >>> from afm_kernels import dkl_loss
    >>> _ = torch.manual_seed(0)
    >>> student, teacher = torch.randn(2, 8, 10, dtype=torch.float64)
    >>> def pairs(x): return x[:, :, None] - x[:, None, :]
    >>> w = teacher.softmax(1)
    >>> published = 0.25 * (w[:, :, None] * w[:, None, :] * (pairs(teacher) - pairs(student)) ** 2).sum() / 8
    >>> torch.allclose(dkl_loss(student, teacher, alpha=0.0), published)
    True

    Args:
        student_logits, teacher_logits, row_weight, dim, recompute: as ``softmax_kl_div``. For adversarial
            training the teacher is the network on clean inputs and the student the same network on
            adversarial ones.
        alpha: the factor of the cross-entropy, at least 0.
        beta: the factor of the squared difference, at least 0.
        temperature: T of the cross-entropy; the squared difference has none.
        weight_temperature: the weights are w = softmax(teacher / weight_temperature).
        class_weight: the weights instead, finite and at least 0; for GKL, a prior of each row's class. One for
            each class, (C,), whatever ``dim`` is, or what broadcasts to the logits as they come. Constant.
        symmetric: whether the squared difference moves the student too (IKL, GKL). False is DKL, whose
            gradients for α = β = 1 are those of KL on both sides.
        reduction: "none", "sum", "mean" (divides by the number of elements) or "batchmean" (by the number of
            rows).

    Returns:
        The loss, as ``softmax_kl_div`` returns it. Extreme rows are tabled in Note [Hard rows of dkl] in
        afm_kernels/functional/dkl.py.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Source: Cui et al., "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024, and "Generalized
    Kullback-Leibler Divergence Loss", 2025.
    """
    if is_sharded(student_logits, teacher_logits):
        if (
            class_weight is not None and class_weight.dim() > 1
        ):  # else one for each class, whole on every process
            shards = row_shards(student_logits, teacher_logits, dim)
            shape = student_logits.shape
            class_weight = shards.local("class_weight", class_weight, shape, shards.placements)
        return sharded_loss(
            dkl_loss,
            student_logits,
            teacher_logits,
            dim,
            reduction,
            {"row_weight": row_weight},
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            weight_temperature=weight_temperature,
            class_weight=class_weight,
            symmetric=symmetric,
            recompute=recompute,
        )
    logits = check_logits(student_logits, teacher_logits, dim)
    temperature = check_positive("temperature", temperature)
    weight_temperature = check_positive("weight_temperature", weight_temperature)
    alpha = check_not_negative("alpha", alpha)
    beta = check_not_negative("beta", beta)
    if class_weight is not None:
        if dim != -1 and isinstance(class_weight, Tensor) and class_weight.dim() > 1:
            check_broadcasts("class_weight", class_weight, student_logits.shape)
            missing = student_logits.dim() - class_weight.dim()
            class_weight = class_weight[(None,) * missing].movedim(dim, -1)
        class_weight = constant_like_rows("class_weight", class_weight, logits, logits.student.shape)
    if row_weight is not None:
        row_weight = check_row_weight(row_weight, logits)
    if recompute is not None:
        check_recompute(recompute)
    params = (temperature, weight_temperature, alpha, beta)
    grad_params = (check_flag("symmetric", symmetric),)
    return fused_loss(
        "dkl", logits, (class_weight, row_weight), params, grad_params, reduction, 1.0, recompute
    )
