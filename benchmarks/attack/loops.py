"""The attacks of AdaAD, RSLAD and TRADES, written as their official code runs them: what the engine is compared with.

Facts kept from those codes: which forward runs when, that parameters require gradients, PyTorch's own losses, the
three-line update. ``with_autocast`` is the same loop with what PyTorch offers to speed it up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loop = Callable[..., Tensor]


def adaad(
    student: nn.Module, teacher: nn.Module, x: Tensor, eps: float, step_size: float, steps: int
) -> Tensor:
    """KL with both networks at x_adv and a gradient through both."""
    x_adv = x.detach() + 0.001 * torch.randn(x.shape, device=x.device)
    for _ in range(steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            loss = nn.KLDivLoss(reduction="none")(
                F.log_softmax(student(x_adv), dim=1), F.softmax(teacher(x_adv), dim=1)
            ).sum()
        gradient = torch.autograd.grad(loss, [x_adv])[0]
        x_adv = _update(x_adv, gradient, x, eps, step_size)
    return x_adv


def rslad(
    student: nn.Module, teacher: nn.Module, x: Tensor, eps: float, step_size: float, steps: int
) -> Tensor:
    """KL to the teacher's logits at the clean images, their softmax taken anew at every step."""
    with torch.no_grad():
        teacher_logits = teacher(x)
    x_adv = x.detach() + 0.001 * torch.randn(x.shape, device=x.device)
    for _ in range(steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            loss = nn.KLDivLoss(reduction="none")(
                F.log_softmax(student(x_adv), dim=1), F.softmax(teacher_logits, dim=1)
            ).sum()
        gradient = torch.autograd.grad(loss, [x_adv])[0]
        x_adv = _update(x_adv, gradient, x, eps, step_size)
    return x_adv


def trades(student: nn.Module, teacher: Any, x: Tensor, eps: float, step_size: float, steps: int) -> Tensor:
    """KL to the student's own clean output, which is evaluated again, with a graph, at every step."""
    x_adv = x.detach() + 0.001 * torch.randn(x.shape, device=x.device)
    for _ in range(steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            loss = nn.KLDivLoss(reduction="sum")(
                F.log_softmax(student(x_adv), dim=1), F.softmax(student(x), dim=1)
            )
        gradient = torch.autograd.grad(loss, [x_adv])[0]
        x_adv = _update(x_adv, gradient, x, eps, step_size)
    return x_adv


def _update(x_adv: Tensor, gradient: Tensor, x: Tensor, eps: float, step_size: float) -> Tensor:
    x_adv = x_adv.detach() + step_size * torch.sign(gradient.detach())
    x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
    return torch.clamp(x_adv, 0.0, 1.0)


def with_autocast(loop: Loop, dtype: torch.dtype = torch.bfloat16) -> Loop:
    """The loop under autocast; the networks and images in channels_last are the caller's part."""

    def run(student: nn.Module, teacher: Any, x: Tensor, *settings: Any) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return loop(student, teacher, x, *settings)

    return run


LOOPS: dict[str, tuple[Loop, str]] = {
    "adaad": (adaad, "mismatch"),
    "rslad": (rslad, "fixed_teacher"),
    "trades": (trades, "fixed_teacher"),
}
"""name -> the loop, and the engine's objective that does the same."""
