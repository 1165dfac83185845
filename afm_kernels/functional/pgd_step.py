"""One projected gradient step of an l_p attack, and its start. The formulas: Note [PGD step] in the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from afm_kernels import ops
from afm_kernels.functional.checks import (
    check_choice,
    check_floating,
    check_like,
    check_positive,
    check_real,
)
from afm_kernels.functional.out import check_memory, check_not_recorded, write

Clip = tuple[float | None, float | None] | None

INITS = ("gaussian", "uniform", "zero")
GAUSSIAN_SCALE = 0.001  # of the field's usual start: TRADES and its successors


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    step_size: float,
    eps: float,
    norm: str = "linf",
    clip: Clip = (0.0, 1.0),
    out: Tensor | None = None,
) -> Tensor:
    """Move ``x_adv`` up the gradient by ``step_size``, back into the ball of radius ``eps`` around ``x``, and clip.

    Args:
        x_adv: the current adversarial example, (N, ...), floating point, any memory format.
        grad: the gradient of what is to grow by ``x_adv``; same shape and device, any floating-point dtype. A
            gradient of 0 does not move a pixel ("linf") or sample ("l2"). A NaN makes that pixel ("linf") or
            sample ("l2") NaN: a broken gradient must not pass for a robust model.
        x: the clean example; shape, dtype and device of ``x_adv``.
        step_size: length of the step in units of ``x``, positive and finite.
        eps: radius of the ball in units of ``x``, positive and finite.
        norm: "linf" (the sign of the gradient, element by element) or "l2" (its direction; lengths over all
            dimensions but the first).
        clip: the range of valid values (min, max), either of which may be None, or None for no clipping.
            Clipping comes last: it keeps a step inside the ball wherever ``x`` itself is in the range.
        out: written and returned instead of a new tensor: shape, dtype and device of ``x_adv``, any strides. It
            may be ``x_adv`` itself; other tensors it does not overlap in memory. One that requires a gradient is
            written under ``torch.no_grad`` only, as PyTorch has it.

    Returns:
        The next ``x_adv``, with its dtype and dense memory format; never part of a graph. It lies in the
        ball and the clip range up to one rounding of each element.

    Raises:
        ValueError, TypeError: an argument is not as above.

    >>> import torch
    >>> from afm_kernels import pgd_step
    >>> x = torch.tensor([[0.5, 0.5, 0.0]])
    >>> pgd_step(x, torch.tensor([[2.0, -1.0, -3.0]]), x, step_size=0.25, eps=0.125).tolist()
    [[0.625, 0.375, 0.0]]
    """
    check_floating("x_adv", x_adv)
    check_like("grad", grad, "x_adv", x_adv)
    check_like("x", x, "x_adv", x_adv, same_dtype=True)
    if out is not None:
        check_like("out", out, "x_adv", x_adv, same_dtype=True)
        check_not_recorded("out", out)
    step_size = check_positive("step_size", step_size)
    eps = check_positive("eps", eps)
    norm_index = check_norm(norm, x)
    clip_min, clip_max = check_clip(clip)
    # Detached: there is no gradient of a step, and autograd must not think it lost one.
    x_adv, grad, x = _detached(x_adv), _detached(grad), _detached(x)
    device_type = x.device.type
    arguments = (x_adv, grad, x, step_size, eps, norm_index, clip_min, clip_max)
    if out is None:
        return ops.kernel("pgd_step", device_type)(*arguments)

    def check() -> None:
        check_memory({"out": out}, {"x_adv": x_adv, "grad": grad, "x": x}, or_same=True)

    write("pgd_step_out", device_type, (*arguments, out), (out,), check)
    return out


def pgd_start(
    x: Tensor,
    *,
    eps: float,
    init: str = "gaussian",
    norm: str = "linf",
    clip: Clip = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """A point of the ball of radius ``eps`` around ``x``, where an attack starts.

    Args:
        x: the clean example, (N, ...), floating point, any memory format.
        eps: radius of the ball in units of ``x``, positive and finite.
        init: "gaussian" (0.001 N(0, 1), projected into the ball), "uniform" (in the ball of ``norm``), or
            "zero" (``x`` itself).
        norm: "linf" or "l2".
        clip: as in ``pgd_step``.
        generator: of the noise, on the device of ``x``; the default generator if None.

    Returns:
        A new tensor with the shape, dtype and dense memory format of ``x``; never part of a graph.

    Raises:
        ValueError, TypeError: an argument is not as above.

    >>> import torch
    >>> from afm_kernels import pgd_start
    >>> x = torch.full((1, 3), 0.5)
    >>> start = pgd_start(x, eps=0.1, init="uniform", generator=torch.Generator().manual_seed(0))
    >>> bool(((start - x).abs() <= 0.1).all()), bool((start == x).any())
    (True, False)
    """
    check_floating("x", x)
    eps = check_positive("eps", eps)
    kind = INITS[check_choice("init", init, INITS)]
    norm_index = check_norm(norm, x)
    clip_min, clip_max = check_clip(clip)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; a torch.Generator or None is expected")
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(
            f"generator is on {generator.device} and x on {x.device}; they must be on one device"
        )
    x = _detached(x)
    if kind == "zero":
        return x.clone() if clip_min is None and clip_max is None else x.clamp(clip_min, clip_max)
    # Noise of low precision would sit on a coarse grid.
    noise = torch.empty_like(x, dtype=x.dtype if x.dtype == torch.float64 else torch.float32)
    if kind == "gaussian":
        scale = GAUSSIAN_SCALE
        noise.normal_(generator=generator)
    elif norm == "linf":
        scale = eps
        noise.uniform_(-1, 1, generator=generator)
    else:
        scale = eps
        noise = _uniform_in_l2_ball(noise, generator)
    kernel = ops.kernel("pgd_start", x.device.type)
    return kernel(x, noise, scale, eps, norm_index, clip_min, clip_max)


def _uniform_in_l2_ball(noise: Tensor, generator: torch.Generator | None) -> Tensor:
    """A Gaussian has no preferred direction, and radius u^(1/d) fills d dimensions evenly (Muller, 1959)."""
    noise.normal_(generator=generator)
    if noise.numel() == 0:
        return noise
    samples = noise.shape[0]
    dimensions = noise.numel() // samples
    radius = noise.new_empty(samples).uniform_(0, 1, generator=generator) ** (1 / dimensions)
    length = torch.linalg.vector_norm(noise, dim=tuple(range(1, noise.ndim)) or None, keepdim=noise.ndim > 1)
    if noise.ndim == 1:  # each element is a sample of its own
        length = noise.abs()
    return noise * (radius.view(-1, *[1] * (noise.ndim - 1)) / length)


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def check_norm(norm: str, x: Tensor) -> int:
    index = check_choice("norm", norm, ops.NORMS)
    if x.ndim == 0 and norm == "l2":
        raise ValueError('x has shape (), but norm="l2" needs samples: a first dimension')
    return index


def check_clip(clip: Clip) -> tuple[float | None, float | None]:
    if clip is None:
        return None, None
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip is {clip!r}; a pair (min, max) or None is expected")
    clip_min, clip_max = _check_bound(clip[0]), _check_bound(clip[1])
    if clip_min != clip_min or clip_max != clip_max:
        raise ValueError(f"clip is {clip!r}; its bounds must not be NaN")
    if clip_min is not None and clip_max is not None and clip_min > clip_max:
        raise ValueError(f"clip is {clip!r}; its minimum must not exceed its maximum")
    return clip_min, clip_max


def _check_bound(bound: float | None) -> float | None:
    return None if bound is None else check_real("a bound of clip", bound, "a number or None") * 1.0
