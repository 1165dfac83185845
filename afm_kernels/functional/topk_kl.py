"""KL from a teacher of whom the k likeliest classes were kept.

Note [Hard rows of topk_kl]
~~~~~~~~~~~~~~~~~~~~~~~~~~~
| row                                                  | loss                         | gradient            |
|------------------------------------------------------|------------------------------|---------------------|
| kept class, -inf on both sides                       | the class contributes 0      | 0 there             |
| kept class, teacher -inf, student finite             | the class contributes 0      | q (truncate: P q)   |
| kept class, student -inf, teacher not                | +inf                         | NaN in that row     |
| class that is not kept, student -inf                 | it is no part of the tail    | 0 there             |
| all that are not kept -inf, log_tail not (tail mode) | +inf                         | NaN in that row     |
| log_tail -inf (tail mode)                            | as ``renormalise``           | the same            |
| NaN or +inf logit, or all of them -inf               | NaN ("both": of kept ones)   | NaN in that row     |
| NaN or +inf log-probability or log_tail              | NaN                          | NaN in that row     |
| nothing kept, ids all -1                             | tail: 0, if there is one; truncate: 0; else NaN | 0; NaN |
| id outside of the classes, on a device               | NaN                          | NaN in that row     |
| row_weight 0                                         | 0, whatever the row holds    | 0                   |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from afm_kernels import ops
from afm_kernels.autograd.fused import refuse_forward_mode
from afm_kernels.functional.checks import (
    Logits,
    check_floating,
    check_integer,
    check_positive,
    check_row_weight,
)
from afm_kernels.functional.loss import fused_loss
from afm_kernels.functional.topk import TopK


def topk_kl_div(
    student_logits: Tensor,
    teacher: TopK,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    row_weight: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """KL(teacher ‖ student) where of the teacher k classes are known: their log-probabilities, and the others' mass.

    With S the kept classes, p the teacher's probabilities, P = Σ_S p, q = softmax(student_logits / T) and Q = Σ_S q,
    a row is worth, by the teacher's ``mode``,

        "tail"         Σ_S p log(p/q) + (1-P) log((1-P)/(1-Q)), at least 0 and at most the KL over all classes
        "renormalise"  KL(p/P ‖ q)
        "both"         KL(p/P ‖ q/Q)
        "truncate"     Σ_S p log(p/q), which may be negative

    In the first three, masses are divided by their sum first, so that what was lost in storing them (of bfloat16
    log-probabilities, a hundredth of each) leaves the loss a divergence. 1-Q is summed over the classes that are not
    kept.

    Args:
        student_logits: any shape and strides, floating point.
        teacher: a ``TopK`` whose rows have the shape of the student's, on the same device. Constant.
        temperature: T, which must be the one that ``teacher`` was taken at.
        reduction: "none", "sum", "mean" (divides by the number of student logits) or "batchmean" (by the number of
        rows).
        row_weight: a factor for each row, what broadcasts to the rows' shape. A row of weight 0 contributes exactly 0
            whatever it holds. Constant.
        dim: the class dimension of ``student_logits``; in ``teacher`` k comes last, whatever ``dim`` is.

    Returns:
        The loss, in float32 (float64 if either side is). Extreme rows are tabled in Note [Hard rows of topk_kl] in
        afm_kernels/functional/topk_kl.py.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Source: the tail class is the K+1 bucket of verl's ``forward_kl_topk_tail`` and TRL's ``add_tail``.

    >>> import torch
    >>> from afm_kernels import TopK, topk_kl_div
    >>> student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)
    >>> loss = topk_kl_div(student, TopK.from_logits(teacher, 5))
    >>> loss.backward()
    >>> bool(loss <= torch.nn.functional.kl_div(
    ...     student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"))
    True
    """
    logits = check_topk(student_logits, teacher, dim)
    temperature = check_captured("temperature", temperature, teacher)
    if row_weight is not None:
        row_weight = check_row_weight(row_weight, logits)
    params = (temperature, ops.TOPK_MODES.index(teacher.mode))
    indices, log_tail = stored(teacher, ops.accumulation_dtype(logits.student, logits.teacher))
    return fused_loss("topk_kl", logits, (indices, log_tail, row_weight), params, (), reduction, 1.0, None)


def stored(teacher: TopK, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Ids and tail as the operators take them. See Note [Operator contract] in ops.py."""
    tail = teacher.log_tail if teacher.mode == "tail" else None
    return teacher.indices.contiguous(), None if tail is None else tail.to(dtype).contiguous()


def check_captured(name: str, temperature: float, teacher: TopK) -> float:
    """The temperature, which must be the teacher's."""
    temperature = check_positive(name, temperature)
    if temperature != teacher.temperature:
        raise ValueError(
            f"{name} is {temperature}, but the teacher's log-probabilities were taken at temperature="
            f"{teacher.temperature}; others cannot be had of them: pass that one, or store the teacher at {temperature}"
        )
    return temperature


def check_topk(student_logits: Tensor, teacher: TopK, dim: int) -> Logits:
    """The student's logits with their class dimension last, and the teacher's log-probabilities."""
    if not isinstance(teacher, TopK):
        raise TypeError(f"teacher is a {type(teacher).__name__}; a TopK is expected")
    check_floating("student_logits", student_logits)
    if (
        forward_ad._current_level >= 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad.unpack_dual(student_logits).tangent is not None
    ):
        refuse_forward_mode()
    shape = student_logits.shape
    dim = check_integer("dim", dim)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim is {dim}, but student_logits has shape {tuple(shape)}")
    if dim not in (-1, len(shape) - 1):
        student_logits = student_logits.movedim(dim, -1)
    rows, num_classes = student_logits.shape[:-1], student_logits.shape[-1]
    if num_classes == 0:
        raise ValueError(
            f"the class dimension of student_logits is empty, of shape {tuple(shape)}; it needs a class"
        )
    if teacher.num_classes is not None and teacher.num_classes != num_classes:
        raise ValueError(
            f"teacher has {teacher.num_classes} classes and student_logits {num_classes}; they must be equal"
        )
    if teacher.rows != rows:
        raise ValueError(
            f"teacher has rows of shape {tuple(teacher.rows)} and student_logits {tuple(rows)}; they must be equal"
        )
    if teacher.indices.device != student_logits.device:
        raise ValueError(
            f"teacher is on {teacher.indices.device} and student_logits on {student_logits.device}; "
            "they must be on one device"
        )
    teacher.check_ids(num_classes)
    return Logits(
        student_logits, teacher.log_probs.contiguous(), student_logits.numel() // num_classes, num_classes
    )
