"""The losses as torch.nn modules."""

from __future__ import annotations

from torch import Tensor, nn

from afm_kernels.functional import distillation_loss, dkl_loss, softmax_kl_div


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
