"""The direction of KL's gradients: what an attack follows, whatever the unit of the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from afm_kernels import ops
from afm_kernels.autograd.fused import refuse_forward_mode
from afm_kernels.functional.checks import check_logits, check_positive
from afm_kernels.functional.softmax_kl import SIDES, sides_of


def softmax_kl_direction(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    dim: int = -1,
    wrt: Sequence[str] = SIDES,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of each row's KL(teacher ‖ student) by the logits, divided by a positive factor of the row's own.

    An attack uses only the direction of a gradient, but the gradients of certain networks underflow: with logits a
    thousand units apart they are of the order of exp(-1000). Here they are divided by exp(log_scale) before anything
    is rounded, so that the largest entry of a row is between 1/2 and 1 in every dtype, and the others are relative to
    it. ``softmax_kl_div_grad`` is the same without the division, where nothing underflows. No autograd, no graph.

    Args:
        student_logits: any shape and strides, floating point.
        teacher_logits: the same shape and device; its dtype may differ.
        temperature: T, positive.
        dim: the class dimension. Channels-last (N, C, H, W) logits with ``dim=1`` are not copied.
        wrt: the sides to differentiate by, "student" and "teacher" or one of them.

    Returns:
        ``(grad_student, grad_teacher, log_scale)``. The gradients have the dtype, shape and dense strides of their
        logits; that of a side not in ``wrt`` is None. ``log_scale`` has the rows' shape, in float32 (float64 if either
        side is), and is shared by both sides: gradient = grad * exp(log_scale). To add up several rows of one image,
        weigh them with exp(log_scale - its maximum over them). A row whose gradients are exactly zero (the sides are
        equal but for a constant) has a log_scale of -inf. Rows with -inf, inf or NaN logits are those of
        ``softmax_kl_div``; where its gradients are NaN, so are these and log_scale.

    Raises:
        ValueError, TypeError: an argument is not as above.

    >>> import torch
    >>> from afm_kernels import softmax_kl_direction
    >>> student, teacher = torch.tensor([[900.0, 0.0, 1.0]]), torch.tensor([[800.0, 0.0, 2.0]])
    >>> to_student, to_teacher, log_scale = softmax_kl_direction(student, teacher)
    >>> (to_teacher / to_teacher.abs().max()).allclose(torch.tensor([[-1.0, 0.1182, 0.8818]]), atol=1e-3)
    True
    >>> round(log_scale.item())
    -793
    """
    logits = check_logits(student_logits, teacher_logits, dim)
    temperature = check_positive("temperature", temperature)
    wrt_student, wrt_teacher = (True, True) if wrt is SIDES else sides_of(wrt)
    if forward_ad._current_level >= 0 and torch._C._are_functorch_transforms_active():
        refuse_forward_mode()
    recording = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # as torch.no_grad, which costs as much as all the checks together
    try:
        to_student, to_teacher, log_scale = ops.kernel("softmax_kl_direction", logits.student.device.type)(
            logits.student, logits.teacher, temperature, wrt_student, wrt_teacher
        )
        if dim != -1:
            to_student = to_student.movedim(-1, dim) if wrt_student else to_student
            to_teacher = to_teacher.movedim(-1, dim) if wrt_teacher else to_teacher
    finally:
        torch._C._set_grad_enabled(recording)
    return to_student if wrt_student else None, to_teacher if wrt_teacher else None, log_scale
