"""Cases of the attack's image ops: pgd_step, apgd_step and scale_shift_relu.

pgd_step, modes "linf" and "l2": one projected step. Peers: the lines of TRADES' and AdaAD's attacks ("eager"; for l2
the usual flatten, norm, renorm), and torch.compile of them. The fewest bytes: three tensors read, one written.

apgd_step, modes "linf" and "l2": Auto-PGD's iteration at a point that is neither the best one nor misclassified, as
most are. Its momentum is 0, so that a call that is timed again finds what it found. Peers: the lines of the published
code, and torch.compile of them. The fewest bytes: four tensors read, one written.

scale_shift_relu, modes "forward" and "input_grad" (forward, then the gradient by the input), plain and with a
residual: what evaluates BatchNorm and ReLU around a residual block under attack. Peers: F.batch_norm in eval mode,
addition, F.relu; and torch.compile of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import afm_kernels
from benchmarks.kernels.case import DTYPES, Built, Call, Case
from benchmarks.kernels.losses import compiled, with_backends

EPS, STEP_SIZE = 8 / 255, 2 / 255
IMAGES = (
    ("128x3x32x32", (128, 3, 32, 32), "adversarial"),
    ("128x3x64x64", (128, 3, 64, 64), "adversarial"),
    ("32x3x224x224", (32, 3, 224, 224), "imagenet"),
)
ACTIVATIONS = (
    ("16x64x32x32-cl", (16, 64, 32, 32), "adversarial"),
    ("128x160x32x32-cl", (128, 160, 32, 32), "adversarial"),
    ("32x256x56x56-cl", (32, 256, 56, 56), "imagenet"),
)


def eager_linf(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """One step as the code of TRADES and AdaAD writes it."""
    x_adv = x_adv + STEP_SIZE * torch.sign(grad)
    x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS)
    return torch.clamp(x_adv, 0.0, 1.0)


def eager_l2(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """One l2 step as usually written: normalise, move, renormalise."""

    def norm(t: Tensor) -> Tensor:
        return t.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    delta = x_adv + STEP_SIZE * grad / norm(grad).clamp_min(1e-12) - x
    delta = delta * (EPS / norm(delta).clamp_min(1e-12)).clamp_max(1.0)
    return torch.clamp(x + delta, 0.0, 1.0)


def pgd_step(sizes: tuple[int, ...], dtype: str, norm: str, device: str) -> Built:
    generator = torch.Generator().manual_seed(0)

    def random(scale: float = 1.0) -> Tensor:
        return scale * torch.rand(sizes, generator=generator)

    x = random()
    x_adv = x + (random(2 * EPS) - EPS) * (1 if norm == "linf" else 0.05)
    grad = random(1e-3) - 5e-4
    x, x_adv, grad = (t.to(device, DTYPES[dtype]) for t in (x, x_adv, grad))
    eager = eager_linf if norm == "linf" else eager_l2
    out = torch.empty_like(x_adv)
    ours = partial(afm_kernels.pgd_step, x_adv, grad, x, step_size=STEP_SIZE, eps=EPS, norm=norm)
    calls: dict[str, Call] = with_backends(
        {"ours": ours, "ours in place": partial(ours, out=out)}, "pgd_step", device
    )
    calls["eager"] = partial(eager, x_adv, grad, x)
    calls["compile"] = partial(compiled(eager), x_adv, grad, x)
    return Built(
        candidates=calls,
        outputs=("x_adv",),
        truth=(eager(x_adv.double(), grad.double(), x.double()),),
        bytes=4 * x.numel() * x.element_size(),
    )


def eager_apgd(
    state: afm_kernels.APGDState, grad: Tensor, x: Tensor, loss: Tensor, wrong: Tensor, norm: str
) -> Tensor:
    """An iteration as the published code writes it, but for indices of the images that are looked up."""
    columns = (-1, *[1] * (x.ndim - 1))
    better = loss > state.loss_best
    for kept, new, where in (
        (state.x_hit, state.x_adv, wrong),
        (state.x_best, state.x_adv, better),
        (state.grad_best, grad, better),
    ):
        kept.copy_(torch.where(where.view(columns), new, kept))
    x_adv, step_size = state.x_adv, state.step_size.view(columns)

    def project(z: Tensor) -> Tensor:
        if norm == "linf":
            return torch.clamp(torch.min(torch.max(z, x - EPS), x + EPS), 0.0, 1.0)
        length = (z - x).square().flatten(1).sum(-1).sqrt().view(columns)
        return torch.clamp(x + (z - x) / (length + 1e-12) * length.clamp(max=EPS), 0.0, 1.0)

    if norm == "linf":
        moved = project(x_adv + step_size * grad.sign())
    else:
        length = grad.square().flatten(1).sum(-1).sqrt().view(columns)
        moved = project(x_adv + step_size * grad / (length + 1e-12))
    return project(x_adv + (moved - x_adv) * 1.0 + (x_adv - state.x_old) * 0.0)


def apgd_step(sizes: tuple[int, ...], dtype: str, norm: str, device: str) -> Built:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(sizes, generator=generator)
    start = (x + EPS * (2 * torch.rand(sizes, generator=generator) - 1)).clamp(0, 1)
    grad = 1e-3 * torch.rand(sizes, generator=generator) - 5e-4
    x, start, grad = (t.to(device, DTYPES[dtype]) for t in (x, start, grad))
    loss = torch.full((sizes[0],), -1.0, device=device)
    wrong = torch.zeros(sizes[0], dtype=torch.bool, device=device)

    def state(of: torch.dtype | None = None) -> afm_kernels.APGDState:
        return afm_kernels.APGDState.at(start.to(of or start.dtype), step_size=2 * EPS)

    def ours(at: afm_kernels.APGDState) -> Tensor:
        given = {"eps": EPS, "norm": norm, "momentum": 0.0}
        return afm_kernels.apgd_step(at, grad, x, loss, wrong, **given).x_adv

    def eager(*args: Any) -> Tensor:
        return eager_apgd(*args, norm)

    calls = with_backends({"ours": partial(ours, state())}, "apgd_step", device)
    calls["eager"] = partial(eager, state(), grad, x, loss, wrong)
    calls["compile"] = partial(compiled(eager), state(), grad, x, loss, wrong)
    true = eager(state(torch.float64), grad.double(), x.double(), loss.double(), wrong)
    return Built(candidates=calls, outputs=("x_adv",), truth=(true,), bytes=5 * x.numel() * x.element_size())


def scale_shift_relu(sizes: tuple[int, ...], dtype: str, residual: bool, mode: str, device: str) -> Built:
    generator = torch.Generator().manual_seed(0)
    channels = sizes[1]
    x, skip, upstream = (torch.randn(sizes, generator=generator) for _ in range(3))
    mean, weight, bias = (torch.randn(channels, generator=generator) for _ in range(3))
    var = 0.5 + torch.rand(channels, generator=generator)
    x, skip, upstream = (
        t.to(device, DTYPES[dtype], memory_format=torch.channels_last) for t in (x, skip, upstream)
    )
    wide = torch.float64 if dtype == "float64" else torch.float32  # what F.batch_norm takes beside x
    mean, var, weight, bias = (t.to(device, wide) for t in (mean, var, weight, bias))
    scale = weight / (var + 1e-5).sqrt()
    shift = bias - mean * scale

    def eager(
        x: Tensor, skip: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        y = F.batch_norm(x, mean, var, weight, bias, training=False)
        return F.relu(y if skip is None else y + skip)

    def fused(x: Tensor, skip: Tensor | None, *_: Tensor) -> Tensor:
        return afm_kernels.scale_shift_relu(x, scale, shift, skip)

    constants = (mean, var, weight, bias)
    skip_or_none = skip if residual else None

    def call(function: object) -> Call:
        return _timed(function, mode, x, skip_or_none, upstream, constants)

    calls = with_backends({"ours": call(fused)}, "scale_shift_relu_forward", device)
    calls["eager"] = call(eager)
    calls["compile"] = call(compiled(eager))
    doubles = tuple(t.double() for t in constants)
    skip_double = skip.double() if residual else None
    true = _timed(eager, mode, x.double(), skip_double, upstream.double(), doubles)()
    # Backward reads the upstream gradient and the output, writes the input's gradient and the residual's.
    tensors = (2 + residual) + ((3 + residual) if mode == "input_grad" else 0)
    return Built(
        candidates=calls,
        outputs=("y",) if mode == "forward" else ("y", "grad_x", *(["grad_residual"] if residual else [])),
        truth=tuple(t.detach() for t in ((true,) if isinstance(true, Tensor) else true)),
        bytes=tensors * x.numel() * x.element_size(),
        autograd=mode == "input_grad",
    )


def _timed(
    function: object,
    mode: str,
    x: Tensor,
    skip: Tensor | None,
    upstream: Tensor,
    constants: tuple[Tensor, ...],
) -> Call:
    assert callable(function)
    if mode == "forward":
        return lambda: function(x, skip, *constants)
    x = x.detach().requires_grad_()
    wrt: tuple[Tensor, ...] = (x,)
    if skip is not None:
        skip = skip.detach().requires_grad_()
        wrt = (x, skip)

    def call() -> tuple[Tensor, ...]:
        y = function(x, skip, *constants)
        return y, *torch.autograd.grad(y, wrt, upstream)

    return call


def cases() -> Iterator[Case]:
    """Every case of the image ops; `make bench` takes one image batch and one activation of each, in float32."""
    steps = {"pgd_step": pgd_step, "apgd_step": apgd_step}
    for op, (label, sizes, family), dtype, norm in product(steps, IMAGES, DTYPES, ("linf", "l2")):
        yield Case(
            op,
            norm,
            label,
            dtype,
            family,
            partial(steps[op], sizes, dtype, norm),
            # Of apgd_step the norm that takes more passes.
            standard=(label, dtype) == ("128x3x32x32", "float32") and (op, norm) != ("apgd_step", "linf"),
            elements=math.prod(sizes),
        )
    modes = ("forward", "input_grad")
    for (label, sizes, family), dtype, residual, mode in product(ACTIVATIONS, DTYPES, (False, True), modes):
        yield Case(
            "scale_shift_relu" + ("-residual" if residual else ""),
            mode,
            label,
            dtype,
            family,
            partial(scale_shift_relu, sizes, dtype, residual, mode),
            standard=(label, dtype) == ("16x64x32x32-cl", "float32"),
            elements=math.prod(sizes),
        )
