"""The gradient that one step of an attack follows, for those who look at it themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..lean import unwrap
from . import arguments
from .gradient import ScaledBackward
from .objectives import Objective
from .target import Target, rows_of, without_ignored

__all__ = ["input_gradient"]


def input_gradient(
    student: nn.Module,
    teacher: nn.Module | None,
    x_adv: Tensor,
    objective: str | Objective = "mismatch",
    labels: Tensor | None = None,
    teacher_logits: Tensor | None = None,
) -> Tensor:
    """The gradient at x_adv that one step of an attack on this objective follows, networks in the modes they are in.

    Args:
        student, teacher, labels: as ``PGDAttack`` takes them.
        x_adv: images (N, ...), floating point.
        objective: as ``PGDAttack`` takes it.
        teacher_logits: the logits on the clean images, which an objective on those ("fixed_teacher") needs here: the
            clean images themselves are not known.

    Returns:
        A tensor like x_adv. It underflows where a network is certain; the attack's own, which is one up to a positive
        factor, does not.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> net = torch.nn.Linear(3, 2)
        >>> input_gradient(net, None, torch.rand(5, 3), "margin", torch.zeros(5, dtype=torch.int64)).shape
        torch.Size([5, 3])
    """
    objective = arguments.checked_objective(objective, False, 1.0)
    arguments.check_networks(student, teacher)
    student, teacher = unwrap(student), None if teacher is None else unwrap(teacher)
    use = getattr(objective, "teacher", "none" if teacher is None else "moving")
    arguments.check_images(x_adv, None)
    arguments.check_known(objective, use, teacher, x_adv, labels, teacher_logits, None)
    if use == "clean" and teacher_logits is None:
        raise ValueError(
            f"objective {type(objective).__name__} needs teacher_logits on the clean images, got None"
        )
    labels = arguments.as_rows(labels)
    teacher_logits = None if teacher_logits is None else rows_of(teacher_logits)
    target = Target(student, None if use in ("none", "clean") else teacher, labels, teacher_logits)
    with torch.inference_mode(False), torch.enable_grad():
        forward = target.forward(x_adv, use == "moving")
        backward = ScaledBackward(forward.leaf, objective)
        gradient = backward(forward, labels)
        scale = 1 / backward.applied
        if hasattr(objective, "log_scale"):
            counted, classes = without_ignored(labels)
            log_scale = objective.log_scale(*forward.known(), classes).double()
            if counted is not None:
                log_scale = log_scale.masked_fill(~counted, -torch.inf)
            scale = scale * log_scale.view(len(x_adv), -1).amax(1).exp()
        return (gradient * scale.view(-1, *[1] * (gradient.dim() - 1))).to(gradient.dtype)
