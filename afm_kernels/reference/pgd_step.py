"""One projected gradient step, and the start of an attack, in plain PyTorch: the definition of both operators.

Note [PGD step]
~~~~~~~~~~~~~~~
    linf    moved = x_adv + step_size * sign(grad)         clamped to [x - eps, x + eps] element by element
    l2      moved = x_adv + step_size * grad / ‖grad‖      where ‖d‖ > eps, d = moved - x:  x + d * eps / ‖d‖

then clamped to [clip_min, clip_max], where there are such. Norms run over all dimensions but the first. The clamp
comes last: a pixel of x outside the clip range ends on the range, not in the ball.

* Computed in float64 if a tensor is float64, else float32, and rounded once to the dtype of ``x``. The lengths of
  l2 are as exact as sums in float64 make them for such a result: squares neither overflow nor vanish, however small
  the gradient of an attack has become. (Here all of l2 is computed in float64.)
* sign(0) = 0, and a sample whose gradient is all zero is projected but not moved.
* A NaN in the gradient makes the pixel NaN (linf) or, through the norm, its sample (l2): gradients that have
  broken down must not pass for a model that resists. (``torch.sign`` turns a NaN into 0.) A NaN in ``x_adv`` or
  ``x`` likewise.
* An infinite gradient element has a sign, but no direction: in l2 its sample becomes NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

LINF, L2 = range(2)  # indices into ops.NORMS


def _compute_dtype(norm: int, *tensors: Tensor) -> torch.dtype:
    exact = norm == L2 or any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if exact else torch.float32


def _sample_norm(x: Tensor) -> Tensor:
    """The l2 norm over all dimensions but the first, which keep size 1."""
    if x.ndim == 1:
        return x.abs()
    return x.square().sum(tuple(range(1, x.ndim)), keepdim=True).sqrt()


def _direction(grad: Tensor, norm: int) -> Tensor:
    """The step of length 1 along ``grad``; 0 where ``grad`` is, NaN where it has none."""
    if norm == LINF:
        return torch.where(grad.isnan(), grad, grad.sign())
    if grad.numel() == 0:
        return grad
    largest = grad.abs().amax(tuple(range(1, grad.ndim)), keepdim=True) if grad.ndim > 1 else grad.abs()
    scaled = grad / torch.where(largest == 0, 1, largest)
    length = _sample_norm(scaled)
    return scaled / torch.where(length == 0, 1, length)


def _project(
    moved: Tensor, x: Tensor, eps: float, norm: int, clip_min: float | None, clip_max: float | None
) -> Tensor:
    if norm == LINF:
        projected = torch.minimum(torch.maximum(moved, x - eps), x + eps)
    else:
        delta = moved - x
        length = _sample_norm(delta)
        projected = torch.where(length <= eps, moved, x + delta * (eps / length))
    return projected if clip_min is None and clip_max is None else projected.clamp(clip_min, clip_max)


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    norm: int,
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    out = torch.empty_like(x_adv)
    pgd_step_out(x_adv, grad, x, step_size, eps, norm, clip_min, clip_max, out)
    return out


def pgd_step_out(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    norm: int,
    clip_min: float | None,
    clip_max: float | None,
    out: Tensor,
) -> None:
    with torch.no_grad():
        dtype = _compute_dtype(norm, x_adv, grad, x)
        moved = x_adv.to(dtype) + step_size * _direction(grad.to(dtype), norm)
        out.copy_(_project(moved, x.to(dtype), eps, norm, clip_min, clip_max))


def pgd_start(
    x: Tensor,
    noise: Tensor,
    noise_scale: float,
    eps: float,
    norm: int,
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    with torch.no_grad():
        dtype = _compute_dtype(norm, x, noise)
        centre = x.to(dtype)
        started = _project(centre + noise_scale * noise.to(dtype), centre, eps, norm, clip_min, clip_max)
        return torch.empty_like(x).copy_(started)
