"""Cases of the fused losses: softmax_kl with its four divergences, distillation, dkl.

Logits are 3·randn, and the teacher's differ from the student's by randn: a student in the middle of its training, KL
about 0.4. Modes: "loss" (no gradient wanted), "student" (loss and its gradient by the student's logits), "both" (by
both sides' logits) and "grad" (both gradients, the loss not wanted: what each step of an attack needs).

The fewest bytes: both logits read once, each gradient written once. The fewest exponentials: one an element a side.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
    Shape("512x1000", (512, 1000), "imagenet"),
    Shape("96x21841", (96, 21841), "imagenet"),
    Shape("8x19x128x256-cl", (8, 19, 128, 256), "segmentation", dim=1),
    Shape("256x32000", (256, 32000), "vocabulary"),
    Shape("64x128256", (64, 128256), "vocabulary"),
)
MODES = ("loss", "student", "both", "grad")
# `make bench` has ten minutes, most of which torch.compile would take: these shapes stand for their families.
STANDARD = ("128x10", "256x100", "512x1000", "256x32000", "8x19x128x256-cl")

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


def eager_divergence(student: Tensor, teacher: Tensor, divergence: str, rows: int, dim: int) -> Tensor:
    """The log-space form: what careful people write today."""
    log_q, log_p = F.log_softmax(student, dim), F.log_softmax(teacher, dim)
    kl = partial(F.kl_div, log_target=True, reduction="sum")
    if divergence == "kl":
        return kl(log_q, log_p) / rows
    if divergence == "reverse_kl":
        return kl(log_p, log_q) / rows
    if divergence == "jeffreys":
        return (kl(log_q, log_p) + kl(log_p, log_q)) / rows
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return 0.5 * (kl(log_m, log_p) + kl(log_m, log_q)) / rows


def gradient_formula(student: Tensor, teacher: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The gradients of the summed KL written out, without autograd: the strongest eager peer of "grad"."""
    log_q, log_p = F.log_softmax(student, dim), F.log_softmax(teacher, dim)
    difference = log_p - log_q
    p = log_p.exp()
    kl = (p * difference).sum(dim, keepdim=True)
    return log_q.exp() - p, p * (difference - kl)


def liger_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Liger-Kernel's KL on log-probabilities, which it does not make itself."""
    liger = importlib.import_module("liger_kernel.transformers")
    loss = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return loss(F.log_softmax(student, -1), F.log_softmax(teacher, -1).detach())


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


def _outputs(mode: str) -> tuple[str, ...]:
    return {
        "loss": ("loss",),
        "student": ("loss", "grad_student"),
        "both": ("loss", "grad_student", "grad_teacher"),
        "grad": ("grad_student", "grad_teacher"),
    }[mode]


def _truth(loss: Loss, student: Tensor, teacher: Tensor, mode: str) -> tuple[Tensor, ...]:
    got = differentiated(loss, student.double(), teacher.double(), mode)()
    return tuple(t.detach() for t in ((got,) if isinstance(got, Tensor) else got))


def _bytes(student: Tensor, mode: str) -> int:
    tensors = {"loss": 2, "student": 3, "both": 4, "grad": 4}[mode]
    return tensors * student.numel() * student.element_size()


def softmax_kl(shape: Shape, dtype: str, mode: str, divergence: str, device: str) -> Built:
    """softmax_kl_div and softmax_kl_div_grad."""
    student, teacher = logits(shape.sizes, DTYPES[dtype], device)
    low = DTYPES[dtype].itemsize < 4

    def eager(s: Tensor, t: Tensor) -> Tensor:
        # Of the summed loss where gradients alone are wanted, as softmax_kl_div_grad defines them.
        rows = 1 if mode == "grad" else shape.rows
        return eager_divergence(s, t, divergence, rows, shape.dim)

    if mode == "grad":
        ours: dict[str, Call] = {
            "ours": lambda: afm_kernels.softmax_kl_div_grad(
                student, teacher, dim=shape.dim, divergence=divergence
            )
        }
    else:

        def fused(s: Tensor, t: Tensor, recompute: bool | None = None) -> Tensor:
            return afm_kernels.softmax_kl_div(s, t, dim=shape.dim, divergence=divergence, recompute=recompute)

        ours = {"ours": differentiated(fused, student, teacher, mode)}
        if mode == "both":
            again = partial(fused, recompute=True)
            ours["ours recompute"] = differentiated(again, student, teacher, mode)

    calls = with_backends(ours, "softmax_kl_grad" if mode == "grad" else "softmax_kl_forward_grad", device)
    calls["eager"] = differentiated(eager, student, teacher, mode)
    if low:
        calls["eager float32"] = differentiated(upcast(eager), student, teacher, mode)
    calls["compile"] = differentiated(compiled(eager), student, teacher, mode)
    if mode == "grad" and divergence == "kl":
        formula = partial(gradient_formula, dim=shape.dim)
        calls["formula"] = partial(formula, student, teacher)
        calls["compiled formula"] = partial(compiled(formula), student, teacher)
    has_liger = device != "cpu" and importlib.util.find_spec("liger_kernel") is not None
    if has_liger and mode in ("loss", "student") and divergence == "kl" and len(shape.sizes) == 2:
        calls["liger"] = differentiated(liger_divergence, student, teacher, mode)
    return Built(
        candidates=calls,
        outputs=_outputs(mode),
        truth=_truth(eager, student, teacher, mode),
        bytes=_bytes(student, mode),
        exps=2 * student.numel(),
        autograd=mode in ("student", "both"),
    )


def distillation(shape: Shape, dtype: str, mode: str, device: str) -> Built:
    """distillation_loss: (1 − α)·CE + α·T²·KL, against F.cross_entropy and F.kl_div."""
    alpha, temperature = 0.5, 4.0
    student, teacher = logits(shape.sizes, DTYPES[dtype], device)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(shape.sizes[-1], (shape.rows,), generator=generator).to(device)

    def eager(s: Tensor, t: Tensor) -> Tensor:
        hard = F.cross_entropy(s, labels)
        log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
        soft = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        return (1 - alpha) * hard + alpha * temperature**2 * soft

    def fused(s: Tensor, t: Tensor) -> Tensor:
        return afm_kernels.distillation_loss(s, t, labels, alpha=alpha, temperature=temperature)

    return _loss_case(fused, eager, student, teacher, mode, "distillation_forward_grad", device)


def dkl(shape: Shape, dtype: str, mode: str, device: str) -> Built:
    """dkl_loss, against the same O(C) sums in PyTorch and the published pairwise tensors."""
    student, teacher = logits(shape.sizes, DTYPES[dtype], device)

    def soft_cross_entropy(s: Tensor, p: Tensor) -> Tensor:
        return -(p * F.log_softmax(s, -1)).sum(-1).mean()

    def eager(s: Tensor, t: Tensor) -> Tensor:
        p = F.softmax(t, -1).detach()
        d = t - s
        mean = (p * d).sum(-1, keepdim=True)
        return soft_cross_entropy(s, p) + 0.5 * (p * (d - mean).square()).sum(-1).mean()

    def published(s: Tensor, t: Tensor) -> Tensor:
        p = F.softmax(t, -1).detach()
        pairs_t = t.unsqueeze(2) - t.unsqueeze(1)
        pairs_s = s.unsqueeze(2) - s.unsqueeze(1)
        weights = p.unsqueeze(2) * p.unsqueeze(1)
        squared = 0.25 * ((pairs_t - pairs_s).square() * weights).sum() / s.shape[0]
        return soft_cross_entropy(s, p) + squared

    built = _loss_case(afm_kernels.dkl_loss, eager, student, teacher, mode, "dkl_forward_grad", device)
    pairs = shape.rows * shape.sizes[-1] ** 2
    if pairs <= 2**24:  # 64 MiB a tensor; the method's own limit in practice
        built.candidates["published"] = differentiated(published, student, teacher, mode)
    return built


def _loss_case(
    fused: Loss, eager: Loss, student: Tensor, teacher: Tensor, mode: str, op: str, device: str
) -> Built:
    calls = with_backends({"ours": differentiated(fused, student, teacher, mode)}, op, device)
    calls["eager"] = differentiated(eager, student, teacher, mode)
    calls["compile"] = differentiated(compiled(eager), student, teacher, mode)
    return Built(
        candidates=calls,
        outputs=_outputs(mode),
        truth=_truth(eager, student, teacher, mode),
        bytes=_bytes(student, mode),
        exps=2 * student.numel(),
        autograd=mode in ("student", "both"),
    )


def cases() -> Iterator[Case]:
    """Every case of the three losses."""
    for shape in SHAPES:
        for dtype in DTYPES:
            for mode in MODES:
                standard = shape.label in STANDARD and (dtype == "float32" and mode != "loss")
                standard |= shape.label == "256x32000" and dtype == "bfloat16" and mode in ("both", "grad")
                build = partial(softmax_kl, shape, dtype, mode, "kl")
                yield Case("softmax_kl", mode, shape.label, dtype, shape.family, build, standard)

    by_label = {shape.label: shape for shape in SHAPES}
    for divergence in ("reverse_kl", "jeffreys", "js"):
        for label in ("128x10", "512x1000", "256x32000"):
            for mode in ("both", "grad"):
                shape = by_label[label]
                standard = (label, mode) == ("512x1000", "both")
                build = partial(softmax_kl, shape, "float32", mode, divergence)
                op = f"softmax_kl-{divergence}"
                yield Case(op, mode, label, "float32", shape.family, build, standard)

    for label in ("128x10", "128x100", "512x1000", "256x32000"):
        shape = by_label[label]
        for dtype in ("float32", "bfloat16"):
            for mode in ("student", "both"):
                standard = (dtype, mode, label) == ("float32", "student", "512x1000")
                build = partial(distillation, shape, dtype, mode)
                yield Case("distillation", mode, label, dtype, shape.family, build, standard)

    for shape in (*SHAPES[:2], Shape("16x1000", (16, 1000), "imagenet"), by_label["256x32000"]):
        standard = shape.label == "128x100"
        yield Case(
            "dkl",
            "both",
            shape.label,
            "float32",
            shape.family,
            partial(dkl, shape, "float32", "both"),
            standard,
        )
