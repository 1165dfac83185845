"""The direction of KL's gradients, in plain PyTorch and float64: the definition that every kernel is compared with.

With s' = s/T, t' = t/T, q = softmax(s') and p = softmax(t'), the gradients of KL(p‖q) by s' and t' are q - p and
p·(log p - log q - KL). Where both sides are certain of one class they are products of numbers as small as exp(-10⁶):
whatever evaluates them underflows, although only what they are relative to each other means anything to an attack.

Note [Direction of a row]
~~~~~~~~~~~~~~~~~~~~~~~~~
With the maxima taken off, a = s' - max s' and b = t' - max t', let δ = a - b: the logits' difference, but for a
constant. The classes fall into those that *stay*, δ = 0, where exp(a) = exp(b), and those that *differ*. With
Z_s = Σ exp a, Z_t = Σ exp b, both between 1 and C, and sums over the classes that differ,

    G = Σ (exp a - exp b)    H = Σ exp(b) δ    c = log(Z_s/Z_t) = log1p(G/Z_t)    r = E_p[δ] = H/Z_t    y = δ - c

    differing   q - p = exp(a)/Z_s - exp(b)/Z_t = exp(b)/Z_t expm1(y)      p (log p - log q - KL) = -exp(b)/Z_t (δ - r)
    staying     q - p = -exp(b) G/(Z_s Z_t)                                p (log p - log q - KL) = exp(b) H/Z_t²

Every term is a multiple of exp(a) or exp(b) of a class that differs, or of a sum of those. So with R, the largest of
those exponents, taken off all of them, the gradients come out divided by exp(R) and nothing underflows that would
count; only c and r need exp(R) itself, as what they are subtracted from does not vanish. What certainty shares, the
class that both are certain of, stays, and is minus the sum of the rest by these very formulas.

Where they are certain of different classes, R is 0 and the student's gradient has no small numbers. The teacher's may:
its δ counts from its own largest class on, so that the δ - r of that class is small because its terms are. Where the
teacher's gradient is wanted alone, that is the only δ.

δ, and the distances of the exponents to R, are differences of four logits that may agree in all but their last digits:
``apart`` rounds them once. Logits are divided by 4 first, so that no difference of theirs overflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afm_kernels.schemas import accumulation_dtype

# q - p is p expm1(y) below this, where exp(a)/Z_s - exp(b)/Z_t would cancel.
_NEAR = 0.5


def _difference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x - y, and what rounding took from it (Knuth's two-sum)."""
    rounded = x - y
    of_x = rounded + y
    return rounded, (x - of_x) + (y - (of_x - rounded)).neg()


def apart(x: Tensor, y: Tensor, top_x: Tensor, top_y: Tensor) -> Tensor:
    """(x - top_x) - (y - top_y), rounded as if once; NaN where an infinity is subtracted."""
    left, left_rest = _difference(x, top_x)
    right, right_rest = _difference(y, top_y)
    whole, rest = _difference(left, right)
    return whole + (rest + (left_rest - right_rest))


def softmax_kl_direction(
    student: Tensor, teacher: Tensor, temperature: float, wrt_student: bool, wrt_teacher: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(student, teacher)
    s, t = student.double() / 4, teacher.double() / 4
    unit = 4 / temperature
    top_s, top_t = s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
    no_s, no_t = s == -torch.inf, t == -torch.inf
    lost = ~(top_s.isfinite() & top_t.isfinite()) | (s.isnan() | t.isnan() | (no_s & ~no_t)).any(-1, True)

    peak_s = s.masked_fill(t != top_t, -torch.inf).amax(-1, keepdim=True)
    if not wrt_student:
        top_s = peak_s

    b = (t - top_t) * unit
    delta = (apart(s, t, top_s, top_t) * unit).masked_fill(no_t, torch.inf).masked_fill(no_s & no_t, 0)
    differs = delta != 0
    if not wrt_student:  # then a class without probability has no part in the row
        differs = differs & ~no_t
    far_s = s.masked_fill(~differs, -torch.inf).amax(-1, keepdim=True)
    far_t = t.masked_fill(~differs, -torch.inf).amax(-1, keepdim=True)
    # How much closer to its maximum the student has its largest class of those than the teacher.
    ahead = (apart(far_s, far_t, top_s, top_t) * unit).masked_fill(far_t == -torch.inf, torch.inf)
    if not wrt_student:
        ahead = torch.full_like(ahead, -torch.inf)
    exponent = torch.where(ahead > 0, far_s - top_s, far_t - top_t) * unit  # R

    none = torch.zeros_like(s)
    e_s = torch.where(differs, torch.exp((s - far_s) * unit + ahead.clamp(max=0)), none)
    e_t = torch.where(differs & ~no_t, torch.exp((t - far_t) * unit + (-ahead).clamp(max=0)), none)
    staying = torch.where(differs | no_t, none, torch.exp(b))
    unscaled = torch.exp(exponent)
    z = staying.sum(-1, keepdim=True)
    z_s, z_t = z + unscaled * e_s.sum(-1, keepdim=True), z + unscaled * e_t.sum(-1, keepdim=True)
    delta_t = (apart(s, t, peak_s, top_t) * unit).masked_fill(no_t, 0)
    near = delta.abs() < _NEAR
    gap = torch.where(near, e_t * torch.expm1(delta.where(near, none)), e_s - e_t).sum(-1, keepdim=True)
    slope = (torch.where(differs, e_t, staying) * delta_t).sum(-1, keepdim=True)

    excess = unscaled * gap / z_t
    near = excess.abs() < _NEAR
    y = delta - torch.where(near, torch.log1p(excess.where(near, 0)), torch.log(z_s / z_t))
    near = y.abs() < _NEAR
    to_student = torch.where(near, e_t / z_t * torch.expm1(y.where(near, none)), e_s / z_s - e_t / z_t)
    to_student = torch.where(differs, to_student, -staying * gap / (z_s * z_t))
    mean = torch.where(differs, unscaled, 1) * slope / z_t
    to_teacher = -torch.where(differs, e_t, staying) / z_t * (delta_t - mean)

    wanted = ([to_student] if wrt_student else []) + ([to_teacher] if wrt_teacher else [])
    largest = torch.stack([side.abs().amax(-1, keepdim=True) for side in wanted]).amax(0)
    doublings = torch.frexp(largest).exponent  # largest = m 2^doublings with 1/2 <= m < 1
    log_scale = exponent + doublings.double() * math.log(2) - math.log(temperature)
    log_scale = log_scale.masked_fill(largest == 0, -torch.inf).masked_fill(lost, torch.nan)

    def finish(grad: Tensor, logits: Tensor, is_wanted: bool) -> Tensor:
        if not is_wanted:
            return logits.new_empty(0)
        # In two halves: one factor alone may leave the range.
        half = doublings // 2
        grad = torch.ldexp(torch.ldexp(grad, -half), half - doublings)
        grad = grad.masked_fill(largest == 0, 0).masked_fill(lost, torch.nan)
        return torch.empty_like(logits).copy_(grad)

    return (
        finish(to_student, student, wrt_student),
        finish(to_teacher, teacher, wrt_teacher),
        log_scale.squeeze(-1).to(dtype),
    )
