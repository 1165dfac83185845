"""The losses as torch.nn modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afm_kernels.functional import (
    Projection,
    TopK,
    distillation_loss,
    dkl_loss,
    linear_kl_div,
    softmax_kl_div,
)


class SoftmaxKLDivLoss(nn.Module):
    """``softmax_kl_div`` as a module.

    Args:
        temperature, reduction, scale_by_t2, dim, recompute, divergence, beta: as ``softmax_kl_div``.

    >>> import torch
    >>> from afm_kernels import SoftmaxKLDivLoss
    >>> loss = SoftmaxKLDivLoss(temperature=4.0, scale_by_t2=True)
    >>> loss(torch.zeros(8, 10), torch.zeros(8, 10)).item()
    0.0
    """

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        scale_by_t2: bool = False,
        *,
        dim: int = -1,
        recompute: bool | None = None,
        divergence: str = "kl",
        beta: float = 0.5,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.scale_by_t2 = scale_by_t2
        self.dim = dim
        self.recompute = recompute
        self.divergence = divergence
        self.beta = beta

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, row_weight: Tensor | None = None
    ) -> Tensor:
        return softmax_kl_div(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            reduction=self.reduction,
            row_weight=row_weight,
            dim=self.dim,
            scale_by_t2=self.scale_by_t2,
            recompute=self.recompute,
            divergence=self.divergence,
            beta=self.beta,
        )

    def extra_repr(self) -> str:
        beta = f", beta={self.beta}" if self.divergence == "js" else ""
        return (
            f"divergence={self.divergence!r}{beta}, temperature={self.temperature}, "
            f"reduction={self.reduction!r}, scale_by_t2={self.scale_by_t2}"
        )


class DistillationLoss(nn.Module):
    """``distillation_loss`` as a module.

    Args:
        alpha, temperature, label_smoothing, ignore_index, reduction, dim: as ``distillation_loss``.

    >>> import torch
    >>> from afm_kernels import DistillationLoss
    >>> loss = DistillationLoss(alpha=0.9, temperature=4.0)
    >>> loss(torch.zeros(8, 10), torch.zeros(8, 10), torch.zeros(8, dtype=torch.long)).shape
    torch.Size([])
    """

    def __init__(
        self,
        alpha: float,
        temperature: float,
        label_smoothing: float = 0.0,
        *,
        ignore_index: int = -100,
        reduction: str = "batchmean",
        dim: int = -1,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.dim = dim

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, row_weight: Tensor | None = None
    ) -> Tensor:
        return distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            alpha=self.alpha,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            row_weight=row_weight,
            dim=self.dim,
        )

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, temperature={self.temperature}, label_smoothing={self.label_smoothing}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


class DKLLoss(nn.Module):
    """``dkl_loss`` as a module.

    Args:
        alpha, beta, temperature, weight_temperature, symmetric, reduction, dim: as ``dkl_loss``.

    >>> import torch
    >>> from afm_kernels import DKLLoss
    >>> DKLLoss(alpha=4.0, beta=20.0)(torch.zeros(8, 10), torch.zeros(8, 10)).shape
    torch.Size([])
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 1.0,
        weight_temperature: float = 1.0,
        *,
        symmetric: bool = True,
        reduction: str = "batchmean",
        dim: int = -1,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.weight_temperature = weight_temperature
        self.symmetric = symmetric
        self.reduction = reduction
        self.dim = dim

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        return dkl_loss(
            student_logits,
            teacher_logits,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            weight_temperature=self.weight_temperature,
            class_weight=class_weight,
            symmetric=self.symmetric,
            reduction=self.reduction,
            row_weight=row_weight,
            dim=self.dim,
        )

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, "
            f"weight_temperature={self.weight_temperature}, symmetric={self.symmetric}, reduction={self.reduction!r}"
        )


class LinearKLDivLoss(nn.Module):
    """``linear_kl_div`` as a module. The weights stay where they are: they come with each call.

    Args:
        alpha, temperature, divergence, beta, reduction, softcap, logit_scale, num_classes, label_smoothing,
            ignore_index, scale_by_t2, chunk_rows, recompute, accumulate_dtype: as ``linear_kl_div``.

    >>> import torch
    >>> from afm_kernels import LinearKLDivLoss, Projection
    >>> loss = LinearKLDivLoss(temperature=2.0)
    >>> loss(torch.zeros(8, 4), torch.zeros(10, 4), Projection(torch.zeros(8, 6), torch.zeros(10, 6))).item()
    0.0
    """

    def __init__(
        self,
        alpha: float = 1.0,
        temperature: float = 1.0,
        divergence: str = "kl",
        reduction: str = "batchmean",
        *,
        beta: float = 0.5,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        scale_by_t2: bool = False,
        chunk_rows: int | None = None,
        recompute: bool | None = None,
        accumulate_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature
        self.divergence = divergence
        self.reduction = reduction
        self.beta = beta
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.scale_by_t2 = scale_by_t2
        self.chunk_rows = chunk_rows
        self.recompute = recompute
        self.accumulate_dtype = accumulate_dtype

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: Projection | Tensor | TopK,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        return linear_kl_div(
            student_hidden,
            student_weight,
            teacher,
            student_bias=student_bias,
            labels=labels,
            alpha=self.alpha,
            temperature=self.temperature,
            divergence=self.divergence,
            beta=self.beta,
            reduction=self.reduction,
            row_weight=row_weight,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            num_classes=self.num_classes,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            scale_by_t2=self.scale_by_t2,
            chunk_rows=self.chunk_rows,
            recompute=self.recompute,
            accumulate_dtype=self.accumulate_dtype,
        )

    def extra_repr(self) -> str:
        beta = f", beta={self.beta}" if self.divergence == "js" else ""
        return (
            f"alpha={self.alpha}, divergence={self.divergence!r}{beta}, temperature={self.temperature}, "
            f"reduction={self.reduction!r}, scale_by_t2={self.scale_by_t2}"
        )
