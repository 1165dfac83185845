"""Cases of the fused losses: softmax_kl with its four divergences, distillation, dkl.

Logits are 3·randn, and the teacher's differ from the student's by randn: a student in the middle of its training, KL
about 0.4. Modes: "loss" (no gradient wanted), "student" (loss and its gradient by the student's logits), "both" (by
both sides' logits) and "grad" (both gradients, the loss not wanted: what each step of an attack needs). The last is
an operator of its own for softmax_kl and its divergences; distillation and dkl have none, "both" is what they cost.

Losses are summed over the rows: with the mean over a quarter of a million pixels, gradients in float16 would underflow.

The fewest bytes: both logits read once, each gradient written once. The fewest exponentials: one an element a side.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import afm_kernels
from afm_kernels import use_backend
from benchmarks.kernels.case import DTYPES, Built, Call, Case


@dataclass(frozen=True)
class Shape:
    """Logits of one use: a label, the sizes, where the classes are, and the family it stands for."""

    label: str
    sizes: tuple[int, ...]
    family: str
    dim: int = -1

    @property
    def rows(self) -> int:
        return math.prod(self.sizes) // self.sizes[self.dim]


SHAPES = (
    Shape("128x10", (128, 10), "adversarial"),
    Shape("128x100", (128, 100), "adversarial"),
    Shape("256x100", (256, 100), "adversarial"),
    Shape("128x200", (128, 200), "adversarial"),
    Shape("65536x10", (65536, 10), "segmentation"),
    Shape("65536x19", (65536, 19), "segmentation"),
    Shape("512x1000", (512, 1000), "imagenet"),
    Shape("96x21841", (96, 21841), "imagenet"),
    Shape("8x19x128x256-cl", (8, 19, 128, 256), "segmentation", dim=1),
    Shape("256x32000", (256, 32000), "vocabulary"),
    Shape("64x128256", (64, 128256), "vocabulary"),
)
MODES = ("loss", "student", "both", "grad")

Loss = Callable[[Tensor, Tensor], Tensor]


def logits(sizes: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits; four-dimensional ones channels-last."""
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(sizes, generator=generator)
    teacher = student + torch.randn(sizes, generator=generator)
    layout = torch.channels_last if len(sizes) == 4 else torch.contiguous_format
    return (
        student.to(device, dtype).to(memory_format=layout),
        teacher.to(device, dtype).to(memory_format=layout),
    )


def eager_divergence(student: Tensor, teacher: Tensor, divergence: str, dim: int) -> Tensor:
    """The log-space form, summed: what careful people write today."""
    log_q, log_p = F.log_softmax(student, dim), F.log_softmax(teacher, dim)
    kl = partial(F.kl_div, log_target=True, reduction="sum")
    if divergence == "kl":
        return kl(log_q, log_p)
    if divergence == "reverse_kl":
        return kl(log_p, log_q)
    if divergence == "jeffreys":
        return kl(log_q, log_p) + kl(log_p, log_q)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return 0.5 * (kl(log_m, log_p) + kl(log_m, log_q))


def gradient_formula(student: Tensor, teacher: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The gradients of the summed KL written out, without autograd: the strongest eager peer of "grad"."""
    log_q, log_p = F.log_softmax(student, dim), F.log_softmax(teacher, dim)
    difference = log_p - log_q
    p = log_p.exp()
    kl = (p * difference).sum(dim, keepdim=True)
    return log_q.exp() - p, p * (difference - kl)


def _liger(divergence: str) -> Loss | None:
    """Liger-Kernel's loss of log-probabilities, which it does not make itself; None where it has none, or is absent."""
    if divergence not in ("kl", "js") or importlib.util.find_spec("liger_kernel") is None:
        return None
    liger = importlib.import_module("liger_kernel.transformers")
    if divergence == "kl":
        kl = liger.LigerKLDIVLoss(reduction="sum", log_target=True)
        return lambda s, t: kl(F.log_softmax(s, -1), F.log_softmax(t, -1).detach())
    js = liger.LigerJSD(beta=0.5)  # divides by the number of rows
    return lambda s, t: s.shape[0] * js(F.log_softmax(s, -1), F.log_softmax(t, -1).detach())


def upcast(loss: Loss) -> Loss:
    """The loss of float32 copies of its inputs, as under autocast."""
    return lambda student, teacher: loss(student.float(), teacher.float())


def differentiated(loss: Loss, student: Tensor, teacher: Tensor, mode: str) -> Call:
    """The call that a mode times: the loss, or the loss and its gradients, or the gradients alone."""
    if mode == "loss":
        return lambda: loss(student, teacher)
    student = student.detach().requires_grad_()
    wrt: tuple[Tensor, ...] = (student,)
    if mode != "student":
        teacher = teacher.detach().requires_grad_()
        wrt = (student, teacher)

    def call() -> tuple[Tensor, ...]:
        value = loss(student, teacher)
        return value, *torch.autograd.grad(value, wrt)

    return (lambda: call()[1:]) if mode == "grad" else call


def compiled(function: Any) -> Any:
    """torch.compile at its best for one shape."""
    return torch.compile(function, dynamic=False)


def backends_here(op: str, device: str) -> tuple[str, ...]:
    """The compiled and Triton backends that serve ``op`` on ``device``; never the interpreter."""
    from afm_kernels import ops

    served = ops.TABLE[op, device.partition(":")[0]]
    return tuple(
        name for name in ("cuda", "cpp", "triton") if name in served and (name, device) != ("triton", "cpu")
    )


def with_backends(calls: dict[str, Call], op: str, device: str) -> dict[str, Call]:
    """Our calls, by the backend chosen for "auto", and once more by every other one that could serve."""
    from afm_kernels import ops

    device = device.partition(":")[0]
    chosen = ops.backend_for(op, device)
    out = dict(calls)
    for backend in backends_here(op, device):
        if backend != chosen:
            out[f"ours {backend}"] = _by_backend(calls["ours"], backend)
    return out


def _by_backend(call: Call, backend: str) -> Call:
    def selected() -> Any:
        with use_backend(backend):
            return call()

    return selected


def softmax_kl(shape: Shape, dtype: str, mode: str, device: str, divergence: str) -> Built:
    """softmax_kl_div and softmax_kl_div_grad."""
    student, teacher = logits(shape.sizes, DTYPES[dtype], device)
    options: dict[str, Any] = {"dim": shape.dim, "divergence": divergence}
    eager = partial(eager_divergence, **options)
    if mode == "grad":
        ours: dict[str, Call] = {
            "ours": partial(afm_kernels.softmax_kl_div_grad, student, teacher, **options)
        }
        built = _built("softmax_kl_grad", ours, eager, student, teacher, mode)
        if divergence == "kl":
            formula = partial(gradient_formula, dim=shape.dim)
            built.candidates["formula"] = partial(formula, student, teacher)
            built.candidates["compiled formula"] = partial(compiled(formula), student, teacher)
        return built

    fused = partial(afm_kernels.softmax_kl_div, reduction="sum", **options)
    ours = {"ours": differentiated(fused, student, teacher, mode)}
    if mode == "both":
        ours["ours recompute"] = differentiated(partial(fused, recompute=True), student, teacher, mode)
    built = _built("softmax_kl_forward_grad", ours, eager, student, teacher, mode)
    liger = _liger(divergence) if mode in ("loss", "student") and len(shape.sizes) == 2 else None
    if liger is not None and device != "cpu":
        built.candidates["liger"] = differentiated(liger, student, teacher, mode)
    return built


def distillation(shape: Shape, dtype: str, mode: str, device: str) -> Built:
    """distillation_loss: (1 − α)·CE + α·T²·KL, against F.cross_entropy and F.kl_div."""
    alpha, temperature, dim = 0.5, 4.0, shape.dim
    generator = torch.Generator().manual_seed(1)
    sizes = list(shape.sizes)
    classes = sizes.pop(dim)
    labels = torch.randint(classes, sizes, generator=generator).to(device)

    def eager(s: Tensor, t: Tensor) -> Tensor:
        hard = F.cross_entropy(s, labels, reduction="sum")
        log_q, log_p = F.log_softmax(s / temperature, dim), F.log_softmax(t / temperature, dim)
        soft = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        return (1 - alpha) * hard + alpha * temperature**2 * soft

    options = {"alpha": alpha, "temperature": temperature, "dim": dim, "reduction": "sum"}
    fused = partial(afm_kernels.distillation_loss, labels=labels, **options)
    student, teacher = logits(shape.sizes, DTYPES[dtype], device)
    ours = {"ours": differentiated(fused, student, teacher, mode)}
    return _built("distillation_forward_grad", ours, eager, student, teacher, mode)


def dkl(shape: Shape, dtype: str, mode: str, device: str) -> Built:
    """dkl_loss, against the same O(C) sums in PyTorch and the published pairwise tensors."""
    dim = shape.dim

    def soft_cross_entropy(s: Tensor, p: Tensor) -> Tensor:
        return -(p * F.log_softmax(s, dim)).sum()

    def eager(s: Tensor, t: Tensor) -> Tensor:
        p = F.softmax(t, dim).detach()
        d = t - s
        mean = (p * d).sum(dim, keepdim=True)
        return soft_cross_entropy(s, p) + 0.5 * (p * (d - mean).square()).sum()

    def published(s: Tensor, t: Tensor) -> Tensor:
        p = F.softmax(t, -1).detach()
        pairs_t = t.unsqueeze(2) - t.unsqueeze(1)
        pairs_s = s.unsqueeze(2) - s.unsqueeze(1)
        weights = p.unsqueeze(2) * p.unsqueeze(1)
        squared = 0.25 * ((pairs_t - pairs_s).square() * weights).sum()
        return soft_cross_entropy(s, p) + squared

    student, teacher = logits(shape.sizes, DTYPES[dtype], device)
    ours = {
        "ours": differentiated(
            partial(afm_kernels.dkl_loss, dim=dim, reduction="sum"), student, teacher, mode
        )
    }
    built = _built("dkl_forward_grad", ours, eager, student, teacher, mode)
    pairs = student.numel() * shape.sizes[dim]
    if (
        len(shape.sizes) == 2 and pairs <= 2**24
    ):  # 64 MiB a tensor in float32; the method's own limit in practice
        built.candidates["published"] = differentiated(published, student, teacher, mode)
    return built


GRADIENTS = {
    "loss": (),
    "student": ("grad_student",),
    "both": ("grad_student", "grad_teacher"),
    "grad": ("grad_student", "grad_teacher"),
}
"""What each mode returns, beside the loss."""


def _built(op: str, ours: dict[str, Call], eager: Loss, student: Tensor, teacher: Tensor, mode: str) -> Built:
    """Our calls by every backend, beside what people write, the same compiled, and the same after upcasting."""
    device, gradients = str(student.device), GRADIENTS[mode]
    calls = with_backends(ours, op, device)
    peers = {"eager": eager, "compile": compiled(eager)}
    if student.element_size() < 4:
        peers["eager float32"] = upcast(eager)
    calls |= {name: differentiated(peer, student, teacher, mode) for name, peer in peers.items()}
    true = differentiated(eager, student.double(), teacher.double(), mode)()
    return Built(
        candidates=calls,
        outputs=gradients if mode == "grad" else ("loss", *gradients),
        truth=tuple(t.detach() for t in ((true,) if isinstance(true, Tensor) else true)),
        bytes=(2 + len(gradients)) * student.numel() * student.element_size(),
        exps=2 * student.numel(),
        autograd=mode in ("student", "both"),
    )


# What `make bench` measures of each op, as regular expressions over MODE/SHAPE/DTYPE: it has ten minutes, most of which
# torch.compile takes. Each shape family, each mode and each dtype is there once at least.
STANDARD = {
    "softmax_kl": r"(both|grad)/(128x10|256x100|512x1000|8x19x128x256-cl|256x32000)/float32"
    r"|student/(128x10|512x1000|256x32000)/float32|loss/512x1000/float32"
    r"|(both|grad)/(8x19x128x256-cl|256x32000)/bfloat16|both/512x1000/(float16|float64)",
    "softmax_kl-reverse_kl": r"both/512x1000/float32",
    "softmax_kl-jeffreys": r"both/512x1000/float32",
    "softmax_kl-js": r"both/(512x1000|8x19x128x256-cl)/float32",
    "distillation": r"student/(128x10|512x1000|256x32000)/float32",
    "dkl": r"both/(128x10|128x100)/float32",
}


def cases() -> Iterator[Case]:
    """Every case of every loss: each op with each shape, dtype and mode."""
    makers: dict[str, Callable[..., Built]] = {
        "softmax_kl": partial(softmax_kl, divergence="kl"),
        "softmax_kl-reverse_kl": partial(softmax_kl, divergence="reverse_kl"),
        "softmax_kl-jeffreys": partial(softmax_kl, divergence="jeffreys"),
        "softmax_kl-js": partial(softmax_kl, divergence="js"),
        "distillation": distillation,
        "dkl": dkl,
    }
    for op, maker in makers.items():
        has_gradient_op = maker not in (distillation, dkl)
        for shape, dtype, mode in product(SHAPES, DTYPES, MODES):
            if mode == "grad" and not has_gradient_op:
                continue
            yield Case(
                op,
                mode,
                shape.label,
                dtype,
                shape.family,
                partial(maker, shape, dtype, mode),
                standard=re.fullmatch(STANDARD[op], f"{mode}/{shape.label}/{dtype}") is not None,
                elements=math.prod(shape.sizes),
                compiles=2 if (op, mode) == ("softmax_kl", "grad") else 1,
            )
