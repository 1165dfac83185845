"""What the losses are, in float64 and from their definitions: nothing here is shared with the library.

``truth_*`` return row values and row gradients (by student, by teacher) for logits with the class dimension last;
``eager_*`` is what one writes in PyTorch today, in the logits' own dtype, against whose error ours is measured.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

INF, NAN = float("inf"), float("nan")


def _log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    norm = math.log(math.fsum(math.exp(x - top) for x in row))
    return [(x - top) - norm for x in row]


def _is_distribution(row: list[float]) -> bool:
    return not any(math.isnan(x) or x == INF for x in row) and max(row) > -INF


def brute_force_row(
    student: list[float], teacher: list[float], temperature: float, divergence: str, beta: float = 0.5
) -> tuple[float, list[float], list[float]]:
    """One row, class by class, with exactly rounded sums: (value, gradient by student, gradient by teacher)."""
    lost = [NAN] * len(student)
    if not _is_distribution(student) or not _is_distribution(teacher):
        return NAN, lost, lost
    log_q = _log_softmax([x / temperature for x in student])
    log_p = _log_softmax([x / temperature for x in teacher])
    q, p = [math.exp(x) for x in log_q], [math.exp(x) for x in log_p]
    classes = range(len(q))

    def kl(log_a: list[float], log_b: list[float]) -> float:
        if any(a > -INF and b == -INF for a, b in zip(log_a, log_b, strict=True)):
            return INF
        return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_a, log_b, strict=True) if a > -INF)

    def kl_grads(log_a: list[float], log_b: list[float], value: float) -> tuple[list[float], list[float]]:
        """By the logits of b, the second argument, and by those of a, the first."""
        by_b = [math.exp(log_b[i]) - math.exp(log_a[i]) for i in classes]
        by_a = [
            math.exp(log_a[i]) * (log_a[i] - log_b[i] - value) if log_a[i] > -INF else 0.0 for i in classes
        ]
        return [x / temperature for x in by_b], [x / temperature for x in by_a]

    if divergence == "js":
        gamma = 1 - beta
        log_m = [
            math.log(beta * p[i] + gamma * q[i]) if beta * p[i] + gamma * q[i] > 0 else None for i in classes
        ]
        for i in classes:  # both underflowed: combine in log space
            if log_m[i] is None:
                a, b = log_p[i] + math.log(beta), log_q[i] + math.log(gamma)
                top = max(a, b)
                log_m[i] = top if top == -INF else top + math.log(math.exp(a - top) + math.exp(b - top))
        a = [log_p[i] - log_m[i] if log_p[i] > -INF else 0.0 for i in classes]
        b = [log_q[i] - log_m[i] if log_q[i] > -INF else 0.0 for i in classes]
        teacher_part = math.fsum(p[i] * a[i] for i in classes)
        student_part = math.fsum(q[i] * b[i] for i in classes)
        return (
            beta * teacher_part + gamma * student_part,
            [gamma * q[i] * (b[i] - student_part) / temperature for i in classes],
            [beta * p[i] * (a[i] - teacher_part) / temperature for i in classes],
        )
    value, by_student, by_teacher = 0.0, [0.0] * len(q), [0.0] * len(q)
    if divergence in ("kl", "jeffreys"):
        forward = kl(log_p, log_q)
        if forward == INF:
            return INF, lost, lost
        value += forward
        by_student, by_teacher = kl_grads(log_p, log_q, forward)
    if divergence in ("reverse_kl", "jeffreys"):
        reverse = kl(log_q, log_p)
        if reverse == INF:
            return INF, lost, lost
        value += reverse
        more_by_teacher, more_by_student = kl_grads(log_q, log_p, reverse)
        by_student = [x + y for x, y in zip(by_student, more_by_student, strict=True)]
        by_teacher = [x + y for x, y in zip(by_teacher, more_by_teacher, strict=True)]
    return value, by_student, by_teacher


def truth_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, divergence: str = "kl", beta: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """``brute_force_row`` for all rows at once, on the CPU. ``test_truth.py`` holds the two against each other."""
    student, teacher = student.detach().cpu().double(), teacher.detach().cpu().double()
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    no_q, no_p = log_q == -INF, log_p == -INF
    value = torch.zeros(student.shape[:-1], dtype=torch.float64)
    by_student, by_teacher = torch.zeros_like(student), torch.zeros_like(student)
    if divergence == "js":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        a, b = (log_p - log_m).masked_fill(no_p, 0), (log_q - log_m).masked_fill(no_q, 0)
        teacher_part, student_part = (p * a).sum(-1, keepdim=True), (q * b).sum(-1, keepdim=True)
        value = (beta * teacher_part + (1 - beta) * student_part).squeeze(-1)
        by_student = (1 - beta) * q * (b - student_part) / temperature
        by_teacher = beta * p * (a - teacher_part) / temperature
    if divergence in ("kl", "jeffreys"):
        gap = (log_p - log_q).masked_fill(no_p, 0)
        kl = (p * gap).masked_fill(no_p, 0).masked_fill(no_q & ~no_p, INF).sum(-1, keepdim=True)
        value = value + kl.squeeze(-1)
        by_student, by_teacher = by_student + (q - p) / temperature, by_teacher + p * (gap - kl) / temperature
    if divergence in ("reverse_kl", "jeffreys"):
        gap = (log_q - log_p).masked_fill(no_q, 0)
        kl = (q * gap).masked_fill(no_q, 0).masked_fill(no_p & ~no_q, INF).sum(-1, keepdim=True)
        value = value + kl.squeeze(-1)
        by_student, by_teacher = by_student + q * (gap - kl) / temperature, by_teacher + (p - q) / temperature
    value = value.masked_fill(log_q.isnan().any(-1) | log_p.isnan().any(-1), NAN)
    lost = ~value.isfinite().unsqueeze(-1)
    return value, by_student.masked_fill(lost, NAN), by_teacher.masked_fill(lost, NAN)


def gradient_terms(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """How large the terms of a row are whose differences its gradients are: max (p + q) |log q - log p| / T."""
    student, teacher = student.detach().cpu().double(), teacher.detach().cpu().double()
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    gap = (log_q - log_p).abs()
    gap = gap.masked_fill(gap.isinf(), 1).nan_to_num(0)
    return ((log_q.exp() + log_p.exp()).nan_to_num(0) * gap).amax(-1) / temperature


def eager_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, divergence: str = "kl", beta: float = 0.5
) -> Tensor:
    """Row values of the log-space form that one writes today, in the logits' dtype."""
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if divergence == "kl":
        return kl(log_p, log_q)
    if divergence == "reverse_kl":
        return kl(log_q, log_p)
    if divergence == "jeffreys":
        return kl(log_p, log_q) + kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def eager_with_grads(student: Tensor, teacher: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    """Row values of ``eager_divergence`` and the gradients of their sum."""
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    values = eager_divergence(student, teacher, *args)  # type: ignore[arg-type]
    return values.detach(), *torch.autograd.grad(values.sum(), (student, teacher))


def pairwise_dkl(
    student: Tensor,
    teacher: Tensor,
    alpha: float,
    beta: float,
    class_weight: Tensor | None = None,
    symmetric: bool = True,
    temperature: float = 1.0,
) -> Tensor:
    """The (B, C, C) form of the decoupled KL loss, as its paper defines it (equations 6 and 8): row values."""
    weight = teacher.softmax(-1) if class_weight is None else class_weight
    pair_weight = (weight.unsqueeze(-1) * weight.unsqueeze(-2)).detach()
    other = student if symmetric else student.detach()
    differences = (teacher.unsqueeze(-1) - teacher.unsqueeze(-2)) - (
        other.unsqueeze(-1) - other.unsqueeze(-2)
    )
    squared = (pair_weight * differences**2).sum((-1, -2)) / 4
    soft = (teacher / temperature).softmax(-1).detach()
    return beta * squared - alpha * (soft * (student / temperature).log_softmax(-1)).sum(-1)


# Rows that are certain of a class. Float64's own noise would be all there is of their gradients, too: what is meant to
# be small is never made from what is not.


def _about_its_mean(values: Tensor, weight: Tensor) -> Tensor:
    """values - E_weight[values], by way of the heaviest class, whose own entry is a sum of small products."""
    apart = values - values.gather(-1, weight.argmax(-1, keepdim=True))
    return apart - (weight * apart).sum(-1, keepdim=True)


def _difference(q: Tensor, p: Tensor) -> Tensor:
    """q - p, whose entry at the heaviest class of q is minus the sum of the others."""
    peak = q.argmax(-1, keepdim=True)
    others = (q - p).scatter(-1, peak, 0.0)
    return others.scatter(-1, peak, -others.sum(-1, keepdim=True))


def certain_divergence(
    student: Tensor, teacher: Tensor, temperature: float, divergence: str, beta: float
) -> tuple[Tensor, Tensor]:
    """The gradients of ``truth_divergence``, finite logits; ``test_truth.py`` holds them against 80 digits."""
    s, t = (x.detach().cpu().double() / temperature for x in (student, teacher))
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    q, p, apart = log_q.exp(), log_p.exp(), t - s
    by_student, by_teacher = torch.zeros_like(s), torch.zeros_like(t)
    if divergence == "js":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        by_student = (1 - beta) * q * _about_its_mean(log_q - log_m, q)
        by_teacher = beta * p * _about_its_mean(log_p - log_m, p)
    if divergence in ("kl", "jeffreys"):
        by_student, by_teacher = by_student + _difference(q, p), by_teacher + p * _about_its_mean(apart, p)
    if divergence in ("reverse_kl", "jeffreys"):
        by_student, by_teacher = by_student - q * _about_its_mean(apart, q), by_teacher + _difference(p, q)
    return by_student / temperature, by_teacher / temperature


def certain_distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """The gradients of ``distillation_loss`` without label smoothing, as above."""
    soft_s, soft_t = certain_divergence(student, teacher, temperature, "kl", 0.5)
    target = F.one_hot(labels.cpu(), student.shape[-1]).double()
    hard = _difference(student.detach().cpu().double().softmax(-1), target)
    factor = alpha * temperature**2
    return (1 - alpha) * hard + factor * soft_s, factor * soft_t


def certain_dkl(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """The gradients of ``dkl_loss`` with the teacher's own weights, as above."""
    s, t = student.detach().cpu().double(), teacher.detach().cpu().double()
    q, p = s.softmax(-1), t.softmax(-1)
    squared = beta * p * _about_its_mean(t - s, p)
    return alpha * _difference(q, p) - squared, squared


def certain_value(student: Tensor, teacher: Tensor, temperature: float, divergence: str) -> Tensor:
    """KL or Jeffreys of rows whose sides are certain of the same class: sums over the other classes, about its x."""
    s, t = (x.detach().cpu().double() / temperature for x in (student, teacher))
    peak = t.argmax(-1, keepdim=True)
    y = (s - t) - (s - t).gather(-1, peak)
    weight = (t - t.gather(-1, peak)).exp().scatter(-1, peak, 0.0)  # in units of the peak's
    total = 1 + weight.sum(-1)
    linear, moved = (weight * y).sum(-1) / total, (weight * y.expm1()).sum(-1) / total
    if divergence == "jeffreys":
        return ((weight * y * y.expm1()).sum(-1) / total - moved * linear) / (1 + moved)
    return moved.log1p() - moved + (weight * (y.expm1() - y)).sum(-1) / total
