"""What an attack maximises, as a map from logits to logit gradients.

Note [Objective contract]
~~~~~~~~~~~~~~~~~~~~~~~~~
An objective is called with ``(student_logits, teacher_logits, labels)``, all detached, and returns the gradient of
what the attack *maximises*, summed over the rows: the student's gradient, or the pair (student's, teacher's). A
gradient has the shape and dtype of its logits; None means that side does not move. No loss value, no scalar and no
graph is made, and a built-in objective reads nothing back from the device, so a whole attack can be one CUDA graph.

An attack's step uses only the direction of each image's gradient (its sign, or the gradient divided by its own
norm), so a row of both sides may be divided by any positive number. The built-in objectives return directions: rows
whose largest entry is about 1, made so that nothing underflows first. With logits a thousand units apart a softmax is
1 and 0, and p - onehot or q - p exactly zero, where the direction is as well defined as ever: softmax over the other
classes against the label, and `softmax_kl_direction`. The attack scales the rows of every objective in the same way
(Note [Gradient scales] in ``gradient``), where they are not zero already.

Attributes, all optional on a user's own callable:

* ``teacher``: what the attack evaluates the teacher on. "moving": on x_adv, with its gradient (the default where a
  teacher is given); "detached": on x_adv, its gradient unused; "clean": on x, once; "none": never.
* ``needs_labels``: a missing ``labels`` is refused at the door (default False).
* ``log_scale(student_logits, teacher_logits, labels)``: the logarithm of what each row was divided by; without it
  nothing was. Only looked at where images share a gradient, through their batch's statistics (``bn``), and so their
  rows have to be weighed against each other.
* ``score(student_logits, teacher_logits, labels)``: a value for each row, larger is better, by which restarts keep the
  best; required for restarts.
* ``additive_score``: the same, such that the values of an image's pixels may be summed: used in place of ``score``
  where logits are dense (N, C, ...), of which an objective sees each pixel's as a row.
* ``success(student_logits, teacher_logits, labels)``: a bool for each row; required for early stopping.
* ``keep``: "best" if the iterate with the best score is what the attack is after, rather than the last (default).
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from afm_kernels import softmax_kl_direction, softmax_kl_div

from ..errors import did_you_mean
from .looks import all_within

__all__ = [
    "OBJECTIVES",
    "CrossEntropy",
    "FixedTeacher",
    "Margin",
    "Mismatch",
    "create_objective",
    "divergence_score",
]

LogitGradients = Tensor | tuple[Tensor | None, Tensor | None]
Objective = Callable[[Tensor, Any, Any], LogitGradients]


class Mismatch:
    """KL(teacher ‖ student) with both networks at x_adv: where do they differ most within the ball?

    The inner maximum of AdvFunMatch (arXiv 2305.14700) and of AdaAD (CVPR 2023).

    Args:
        temperature: divides both logits.
        teacher_gradient: differentiate through the teacher too. AdaAD's code does; False is the cheaper variant, which
            still evaluates the teacher at x_adv.
    """

    needs_labels = False
    keep = "best"

    def __init__(self, temperature: float = 1.0, teacher_gradient: bool = True) -> None:
        self.temperature = temperature
        self.teacher = "moving" if teacher_gradient else "detached"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None
    ) -> LogitGradients:
        wrt = ("student", "teacher") if self.teacher == "moving" else ("student",)
        to_student, to_teacher, _ = softmax_kl_direction(
            student_logits, teacher_logits, temperature=self.temperature, wrt=wrt
        )
        assert to_student is not None  # it is always asked for
        return (to_student, to_teacher) if self.teacher == "moving" else to_student

    def log_scale(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        wrt = ("student", "teacher") if self.teacher == "moving" else ("student",)
        return softmax_kl_direction(student_logits, teacher_logits, temperature=self.temperature, wrt=wrt)[2]

    def score(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        return divergence_score(student_logits, teacher_logits, self.temperature)

    def additive_score(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        return _divergence(student_logits, teacher_logits, self.temperature)


class FixedTeacher:
    """KL(teacher(x) ‖ student(x_adv)): the teacher's logits at the clean images are computed once.

    RSLAD's attack; with no teacher it is TRADES's, whose target is the student's own clean output.

    Args:
        temperature: divides both logits.
    """

    teacher = "clean"
    needs_labels = False

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None
    ) -> LogitGradients:
        to_student, _, _ = softmax_kl_direction(
            student_logits, teacher_logits, temperature=self.temperature, wrt=("student",)
        )
        assert to_student is not None  # it is asked for
        return to_student

    def log_scale(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        return softmax_kl_direction(
            student_logits, teacher_logits, temperature=self.temperature, wrt=("student",)
        )[2]

    def score(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        return divergence_score(student_logits, teacher_logits, self.temperature)

    def additive_score(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        return _divergence(student_logits, teacher_logits, self.temperature)


# A KL that is smaller has lost digits, or all of them, in float64.
_LEAST_KL = 1e-290


def divergence_score(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """A float64 value for each row that orders rows as KL(teacher ‖ student) does, where that underflows too.

    It is the KL from 1e-290 on; below, where both sides are as certain of one class, the logarithm of the
    largest entry of its gradient, a negative number, which is the KL's own but for a logarithm of it. Equal sides are
    -inf.
    """
    student, teacher = student_logits.double(), teacher_logits.double()
    kl = _divergence(student, teacher, temperature)
    if all_within(kl, _LEAST_KL, torch.inf):
        return kl
    _, _, log_scale = softmax_kl_direction(student, teacher, temperature=temperature)
    return torch.where(kl < _LEAST_KL, log_scale.clamp(max=0.0), kl)


def _divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    return softmax_kl_div(
        student_logits.double(), teacher_logits.double(), temperature=temperature, reduction="none"
    )


class _Labelled:
    """What cross-entropy and margin share: the labels, and when an image counts as broken."""

    teacher = "none"
    needs_labels = True

    def __init__(self, targeted: bool = False) -> None:
        self.targeted = targeted

    def score(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
        # The margin for both objectives: it is positive exactly where the attack has succeeded, so restarts never
        # trade a broken image for an unbroken one, which the highest cross-entropy could.
        # float64, so that the difference of large logits is not infinite.
        own = student_logits.gather(1, _label_column(student_logits, labels)).squeeze(1).double()
        best_other = _other_logits(student_logits, labels).amax(1).double()
        return own - best_other if self.targeted else best_other - own

    def success(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
        hit = student_logits.argmax(1, keepdim=True) == _label_column(student_logits, labels)
        hit = hit.squeeze(1)
        return hit if self.targeted else ~hit


class CrossEntropy(_Labelled):
    """Cross-entropy to the labels: PGD as in Madry et al. (2018), and ARD's, IAD's and MART's attack.

    Its direction: -1 for the label, and for the others their softmax without it.

    Args:
        targeted: the labels are targets, and the attack lowers their cross-entropy.
    """

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor
    ) -> LogitGradients:
        column = _label_column(student_logits, labels)
        # (1 − p_y)·(softmax over the other classes − onehot) is p − onehot, and the first factor is what underflows.
        wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        others = _other_logits(student_logits, labels)
        alone = (others == -torch.inf).all(1, keepdim=True)  # the label has all there is, and no gradient
        gradient = others.softmax(1, dtype=wide).masked_fill(alone, 0)
        gradient = gradient.scatter(1, column, alone.to(wide) - 1).to(student_logits.dtype)
        return gradient.neg_() if self.targeted else gradient

    def log_scale(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
        # log(1 − p_y)
        others = _other_logits(student_logits, labels).double()
        return others.logsumexp(1) - student_logits.double().logsumexp(1)


class Margin(_Labelled):
    """C&W's margin: the best other logit minus the label's (targeted: the target's minus the best other).

    Args:
        targeted: the labels are targets.
        confidence: an image whose margin has reached this stops moving, as in Carlini and Wagner (2017). The default
            never stops one; RSLAD's and TRADES's evaluation code uses 50, which seldom binds.
    """

    def __init__(self, targeted: bool = False, confidence: float = float("inf")) -> None:
        super().__init__(targeted)
        self.confidence = confidence

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor
    ) -> LogitGradients:
        column = _label_column(student_logits, labels)
        own = student_logits.gather(1, column)
        best_other, other_column = _other_logits(student_logits, labels).max(1, keepdim=True)
        up = own if self.targeted else best_other
        down = best_other if self.targeted else own
        moving = (up - down < self.confidence).to(student_logits.dtype)
        up_column, down_column = (column, other_column) if self.targeted else (other_column, column)
        gradient = torch.zeros_like(student_logits).scatter(1, up_column, moving)
        return gradient.scatter(1, down_column, -moving)


def _label_column(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels as an index into the logits; on a CPU, which checks an index as it is used, a wrong one is named."""
    column = labels[:, None]
    if labels.device.type == "cpu":
        try:
            logits.gather(1, column)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"labels must be in [0, {logits.shape[1]}), the classes of the logits: {error}"
            ) from error
    return column


def _other_logits(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], float("-inf"))


OBJECTIVES: dict[str, type] = {
    "mismatch": Mismatch,
    "fixed_teacher": FixedTeacher,
    "cross_entropy": CrossEntropy,
    "margin": Margin,
}


def create_objective(name: str, *, targeted: bool = False, temperature: float = 1.0) -> Objective:
    """The objective of that name.

    Args:
        name: a key of ``OBJECTIVES``.
        targeted: for ``cross_entropy`` and ``margin``.
        temperature: for ``mismatch`` and ``fixed_teacher``.

    Raises:
        ValueError: an unknown name, or an option that this objective does not have.
    """
    if name not in OBJECTIVES:
        near = did_you_mean(name, OBJECTIVES)
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)} or a callable, got {name!r}{near}"
        )
    labelled = issubclass(OBJECTIVES[name], _Labelled)
    if targeted and not labelled:
        raise ValueError(f"targeted=True needs objective 'cross_entropy' or 'margin', got {name!r}")
    if temperature != 1.0 and labelled:
        raise ValueError(f"temperature needs objective 'mismatch' or 'fixed_teacher', got {name!r}")
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    objective: Objective = OBJECTIVES[name](targeted) if labelled else OBJECTIVES[name](temperature)
    return objective
