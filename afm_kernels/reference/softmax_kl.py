"""Divergences between two softmaxes, in plain PyTorch: the definition that every kernel is compared with.

With s' = s/T, t' = t/T, q = softmax(s') (student), p = softmax(t') (teacher), δ = log q - log p, a row is worth

    kl           Σ p (log p - log q)           ∂/∂s = (q - p)/T              ∂/∂t = -p (δ + KL)/T
    reverse_kl   Σ q (log q - log p)           the same with student and teacher exchanged
    jeffreys     kl + reverse_kl
    js           β KL(p‖m) + γ KL(q‖m)         ∂/∂s = γ q (b - E_q[b])/T     ∂/∂t = β p (a - E_p[a])/T
                 m = β p + γ q, γ = 1 - β      b = log q - log m             a = log p - log m

Note [Centred form]
~~~~~~~~~~~~~~~~~~~
Σ p (log p - log q) cancels when q is close to p. With d = s' - t', μ = E_p[d], x = d - μ, r = E_p[x] (0 but for
rounding) and L = log E_p[exp x] = log1p(E_p[expm1(x) - x] + r),

    KL = L - r,    δ = x - L,    q - p = p expm1(δ),    -p (δ + KL) = -p (x - r)

lose nothing where the divergence is small; a row with KL >= 1 takes the direct form, which is exact there.
Classes that the teacher excludes (-inf) or that are far off, |x| > 8, are taken out of both expectations: they
hold masses P and Q of p and q, and L = log1p(E'[expm1(x) - x] + r' - P) - log1p(-Q), E' and r' over the others.

Note [Jensen-Shannon]
~~~~~~~~~~~~~~~~~~~~~
JS in the same spirit, with e = expm1(-δ), v = β e and ψ(y) = (1 + y) log1p(y) - y, which is y²/2 to first order:

    log m - log q = log1p(v),    log m - log p = log1p(v) + δ,    JS = Σ q (β ψ(e) - ψ(v))

The first-order terms, Σ q e = 0, are gone before they can cancel, and what is of the size of β is never the difference
of numbers that are not. That holds for β <= 1/2; beyond, student and teacher change places, and 1 - β is β.

Note [Certain rows]
~~~~~~~~~~~~~~~~~~~
Where a side has nearly all its mass on one class, the gradient that reaches it is small in all classes, and the peak's
own entry is a difference of numbers near 1 or near the divergence: noise, as large as all the rest. But a row's
gradient sums to zero, and the other entries are products with small probabilities, hence accurate: the peak's is minus
their sum. It is taken so wherever the peak has more than half of the mass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afm_kernels.reference.rows import finish_grad, finish_grads, loss_operators, reduce_rows
from afm_kernels.schemas import accumulation_dtype, arguments_of

KL, REVERSE_KL, JEFFREYS, JS = range(4)  # indices into ops.DIVERGENCES

# exp(x) - 1 - x is taken by its series below this, where the closed form cancels.
_SERIES_BELOW = 0.5
# Classes with |x| beyond this enter L through their mass in q, p eˣ = q e^L, which cannot overflow. Not all are
# beyond in a row with KL < 1: with E_p[x] = 0 that would take E_p[eˣ] > e.
_REACH = 8.0


def _expm1_minus_identity(x: Tensor) -> Tensor:
    """exp(x) - 1 - x; small x by Horner's rule, whose 15 terms reach float64's last digit at 1/2."""
    small = x.abs() < _SERIES_BELOW
    y = x.where(small, 0)
    series = torch.zeros_like(y)
    for n in range(16, 2, -1):
        series = (series + 1) * y / n
    return torch.where(small, (series + 1) * y * y / 2, torch.expm1(x) - x)


def _psi(y: Tensor) -> Tensor:
    """(1 + y) log1p(y) - y for |y| < 0.65, with no cancellation: y = expm1(u) gives exp(u) u - expm1(u)."""
    u = torch.log1p(y)
    # exp(u) u - expm1(u) = u expm1(u) - (expm1(u) - u) = u y - (expm1(u) - u): half of it is left, always.
    return u * y - _expm1_minus_identity(u)


def softmax_of(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax, and its logarithm, of rows whose largest entry is 0.

    PyTorch's softmax adds up a long row in as many lanes as the processor has, and its probabilities miss 1 by what
    those sums round; ``sum`` adds in pairs. And not exp(log_q): that carries the rounding of log_q, which grows with
    its size.
    """
    exponentials = scaled.exp()
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / total, scaled - total.log()


class Rows(NamedTuple):
    """What the divergences and gradients of a batch of rows are made of."""

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor
    delta: Tensor  # log q - log p; 0 where the class is excluded (-inf) on both sides
    kl: Tensor  # (..., 1), KL(p‖q); +inf where the student excludes a class that the teacher has
    slope: Tensor  # δ + KL, without the rounding of their sum
    student_excluded: Tensor
    teacher_excluded: Tensor


def rows_of(student: Tensor, teacher: Tensor, temperature: float) -> Rows:
    """The ``Rows`` of two batches of logits, class dimension last. See Note [Centred form]."""
    dtype = accumulation_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    with torch.no_grad():
        top_s, top_t = student.amax(-1, keepdim=True), teacher.amax(-1, keepdim=True)
    # The maximum comes off first: divided by a temperature below 1, logits might leave the range. One that does so
    # all the same, put that low to mask a class, excludes it like -inf.
    scaled_s, scaled_t = (student - top_s) / temperature, (teacher - top_t) / temperature
    student_excluded, teacher_excluded = scaled_s == -torch.inf, scaled_t == -torch.inf
    q, log_q = softmax_of(scaled_s)
    p, log_p = softmax_of(scaled_t)

    # Direct form. A row that is no distribution is NaN in all its classes; NaN + inf is NaN.
    delta = (log_q - log_p).masked_fill(student_excluded & teacher_excluded, 0)
    infinite = (student_excluded & ~teacher_excluded).any(-1, keepdim=True)
    kl = (p * -delta).masked_fill(student_excluded | teacher_excluded, 0).sum(-1, keepdim=True)
    kl = torch.where(infinite, kl + torch.inf, kl) + 0 * (
        log_p.detach().amax(-1, keepdim=True) + log_q.detach().amax(-1, keepdim=True)
    )
    centred = kl < 1

    # Centred form. Equal offsets cancel exactly in s - t; unequal ones are better taken off first.
    apart = (top_s - top_t).abs() > 8
    top_s, top_t = top_s.where(apart, 0), top_t.where(apart, 0)
    d = ((student - top_s) - (teacher - top_t)).masked_fill(
        student_excluded | teacher_excluded, 0
    ) / temperature
    x = (d - (p * d).sum(-1, keepdim=True)).masked_fill(teacher_excluded, 0)
    rest = (p * x).sum(-1, keepdim=True)
    reached = (x.abs() < _REACH) & ~teacher_excluded
    bulge = (p * _expm1_minus_identity(x.where(reached, 0))).sum(-1, keepdim=True)
    rest_reached, p_beyond, q_beyond = (
        term.sum(-1, keepdim=True)
        for term in ((p * x).where(reached, 0), p.where(~reached, 0), q.where(~reached, 0))
    )
    log_mean_exp = torch.log1p((bulge + (rest_reached - p_beyond)).where(centred, 0)) - torch.log1p(
        -q_beyond.where(centred, 0)
    )
    delta = (x - log_mean_exp).where(centred & ~teacher_excluded, delta)
    direct_slope = delta.masked_fill(student_excluded | teacher_excluded, 0) + kl
    # less what rounding left of its mean, which is 0
    direct_slope = direct_slope - (p * direct_slope).sum(-1, keepdim=True)
    slope = (x - rest).where(centred, direct_slope)
    kl = (log_mean_exp - rest).where(centred, kl)
    return Rows(p, q, log_p, log_q, delta, kl, slope, student_excluded, teacher_excluded)


def balanced(grad: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``grad`` with the entry of the class that has most of ``weight``. See Note [Certain rows]."""
    share, peak = weight.detach().max(-1, keepdim=True)
    others = grad.scatter(-1, peak, 0)
    return torch.where(share > 0.5, others.scatter(-1, peak, -others.sum(-1, keepdim=True)), grad)


def _kl(rows: Rows, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    small = rows.delta.abs() < _SERIES_BELOW
    to_student = torch.where(small, rows.p * torch.expm1(rows.delta.where(small, 0)), rows.q - rows.p)
    to_teacher = -(rows.p * rows.slope).masked_fill(rows.teacher_excluded, 0)
    return rows.kl, balanced(to_student, rows.q) / temperature, balanced(to_teacher, rows.p) / temperature


def _js(rows: Rows, temperature: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """``beta`` is at most 1/2. See Note [Jensen-Shannon]."""
    p, q, gamma = rows.p, rows.q, 1 - beta
    # Where exp(-δ) overflows, or the student has no such class, all of m is the teacher's.
    reached = rows.delta > 1 - math.log(torch.finfo(p.dtype).max)
    delta = rows.delta.where(reached & ~rows.teacher_excluded, 0)
    e = torch.expm1(-delta).masked_fill(rows.teacher_excluded, -1)
    v = beta * e
    log_m_q = torch.log1p(v)
    log_p_m = -torch.log(beta + gamma * torch.exp(rows.delta.where(rows.delta < 0, 0)))
    teachers = ~reached | (v > 1)  # most of m
    a = log_p_m.where(teachers, -delta - log_m_q).masked_fill(rows.teacher_excluded, 0)
    b = (rows.delta + log_p_m).where(~reached, -log_m_q).masked_fill(rows.student_excluded, 0)
    small = (rows.delta.abs() < _SERIES_BELOW) & ~rows.teacher_excluded
    bend = torch.where(small, q * _psi(e.where(small, 0)), (q - p) - p * delta)
    share = torch.where(teachers, beta * p * a + gamma * q * b, beta * bend - q * _psi(v.where(~teachers, 0)))
    to_student = gamma * q * (b - (q * b).sum(-1, keepdim=True))
    to_teacher = beta * p * (a - (p * a).sum(-1, keepdim=True))
    return (
        share.sum(-1, keepdim=True),
        balanced(to_student, q) / temperature,
        balanced(to_teacher, p) / temperature,
    )


def row_divergence(
    student: Tensor, teacher: Tensor, temperature: float, divergence: int, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of each row (..., 1), and its gradients by the student's and the teacher's logits."""
    if divergence in (KL, JEFFREYS):
        value, to_student, to_teacher = _kl(rows_of(student, teacher, temperature), temperature)
    if divergence in (REVERSE_KL, JEFFREYS):
        reverse, by_teacher, by_student = _kl(rows_of(teacher, student, temperature), temperature)
        if divergence == JEFFREYS:
            value, to_student, to_teacher = value + reverse, to_student + by_student, to_teacher + by_teacher
        else:
            value, to_student, to_teacher = reverse, by_student, by_teacher
    if divergence == JS and beta <= 0.5:
        value, to_student, to_teacher = _js(rows_of(student, teacher, temperature), temperature, beta)
    elif divergence == JS:
        value, to_teacher, to_student = _js(rows_of(teacher, student, temperature), temperature, 1 - beta)
    lost = ~value.isfinite()
    return (
        value.clamp(min=0),
        to_student.masked_fill(lost, torch.nan),
        to_teacher.masked_fill(lost, torch.nan),
    )


def _rows(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    return row_divergence(call.student, call.teacher, call.temperature, call.divergence, call.beta)


softmax_kl_forward, softmax_kl_backward, softmax_kl_forward_grad = loss_operators("softmax_kl", _rows)

_ForwardBackward = arguments_of("softmax_kl_forward_backward")
_Grad = arguments_of("softmax_kl_grad")
_GradOut = arguments_of("softmax_kl_grad_out")


def softmax_kl_forward_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _ForwardBackward(*args)
    value, *grads = _rows(call)
    return reduce_rows(value, call.row_weight, 1, call.scale), *finish_grads(
        grads, call, value.new_tensor(call.grad_loss)
    )


def softmax_kl_grad(*args: Any) -> tuple[Tensor, Tensor]:
    call = _Grad(*args)
    _, *grads = _rows(call)
    return finish_grads(grads, call)


def softmax_kl_grad_out(*args: Any) -> None:
    call = _GradOut(*args)
    _, *grads = _rows(call)
    for out, grad, logits in zip(
        (call.grad_student, call.grad_teacher), grads, (call.student, call.teacher), strict=True
    ):
        if out is not None:
            out.copy_(finish_grad(grad, logits, call.row_weight, call.scale, None, True))
