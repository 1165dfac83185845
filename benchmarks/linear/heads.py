"""The candidates: forward KL of two heads from hidden states, with the student's gradients, by all who do it on a CPU.

    eager        both projections, F.kl_div of two log-softmaxes, autograd
    compile      the same through torch.compile
    checkpoint   chunks of 256 rows, each under activation checkpointing: the form of TRL's chunked losses
    torch        F.linear_cross_entropy on the teacher's probabilities, chunked: forward KL plus the teacher's entropy
    liger        Liger-Kernel's pure-PyTorch chunked_loss (JSD with beta 0 is forward KL), compiled, 1024 rows a chunk
    ours         linear_kl_div; "ours recompute", and "ours N rows" with chunks of N

A call returns the loss and the gradients by the student's hidden states and weight.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from afm_kernels import Projection, linear_kl_div

Call = Callable[[], Any]
CHUNK_OF_CHECKPOINT = 256


@dataclass(frozen=True)
class Shape:
    rows: int
    hidden: int
    teacher_hidden: int
    classes: int

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.hidden},{self.teacher_hidden}x{self.classes}"

    @property
    def products(self) -> int:
        """Multiplications: the student's logits and two gradients, and the teacher's logits."""
        return self.rows * self.classes * (3 * self.hidden + self.teacher_hidden)


@dataclass
class Heads:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def draw(cls, shape: Shape) -> Heads:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(shape.rows, shape.hidden, generator=generator)
        weight = torch.randn(shape.classes, shape.hidden, generator=generator) * (2 / shape.hidden**0.5)
        teacher_hidden = torch.randn(shape.rows, shape.teacher_hidden, generator=generator)
        teacher_weight = torch.randn(shape.classes, shape.teacher_hidden, generator=generator)
        teacher_weight *= 2 / shape.teacher_hidden**0.5
        return cls(hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight)

    def double(self) -> Heads:
        made = [t.detach().double() for t in (self.hidden, self.weight)]
        return Heads(
            *(t.requires_grad_() for t in made), self.teacher_hidden.double(), self.teacher_weight.double()
        )


def _kl(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    log_q = F.log_softmax(hidden @ weight.t(), -1)
    with torch.no_grad():
        log_p = F.log_softmax(teacher_hidden @ teacher_weight.t(), -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def _in_chunks(heads: Heads) -> Tensor:
    total = heads.hidden.new_zeros(())
    for rows in torch.arange(heads.hidden.shape[0]).split(CHUNK_OF_CHECKPOINT):
        span = slice(int(rows[0]), int(rows[-1]) + 1)
        total = total + checkpoint(
            _kl,
            heads.hidden[span],
            heads.weight,
            heads.teacher_hidden[span],
            heads.teacher_weight,
            use_reentrant=False,
        )
    return total / heads.hidden.shape[0]


def with_gradients(loss: Callable[[], Tensor], heads: Heads) -> Any:
    value = loss()
    # As a training step does: into .grad, which takes the tensor over where it can.
    value.backward()
    grads = heads.hidden.grad, heads.weight.grad
    heads.hidden.grad = heads.weight.grad = None
    return value.detach(), *grads


def truth(shape: Shape) -> tuple[Tensor, ...]:
    """In float64, in chunks: the whole would not fit."""
    heads = Heads.draw(shape).double()
    return with_gradients(partial(_in_chunks, heads), heads)


def _liger() -> Callable[[Heads], Tensor] | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    function = importlib.import_module("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction

    def loss(heads: Heads) -> Tensor:
        labels = torch.zeros(heads.hidden.shape[0], dtype=torch.long)
        tensors = (heads.hidden, heads.weight, heads.teacher_hidden, heads.teacher_weight, labels)
        value = function.apply(*tensors, None, None, 0.0, 1.0, 0.0)
        return value[0] if isinstance(value, tuple) else value

    return loss


def _torch(heads: Heads) -> Tensor:
    """Less the teacher's entropy, which has no gradient by the student, so that the loss is KL."""
    from torch.nn import LinearCrossEntropyOptions  # type: ignore[attr-defined]

    with torch.no_grad():
        log_p = F.log_softmax(heads.teacher_hidden @ heads.teacher_weight.t(), -1)
        entropy = F.kl_div(torch.zeros_like(log_p), log_p, log_target=True, reduction="batchmean")
        p = log_p.exp_()
    options = LinearCrossEntropyOptions()
    return F.linear_cross_entropy(heads.hidden, heads.weight, p, options=options) + entropy


def losses(compiles: bool) -> dict[str, Callable[[Heads], Tensor]]:
    def eager(heads: Heads) -> Tensor:
        value = _kl(heads.hidden, heads.weight, heads.teacher_hidden, heads.teacher_weight)
        return value / heads.hidden.shape[0]

    def ours(heads: Heads, **options: Any) -> Tensor:
        return linear_kl_div(
            heads.hidden, heads.weight, Projection(heads.teacher_hidden, heads.teacher_weight), **options
        )

    found: dict[str, Callable[[Heads], Tensor]] = {
        "ours": ours,
        "eager": eager,
        "checkpoint": _in_chunks,
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = _torch
    liger = _liger()
    if compiles:
        found["compile"] = torch.compile(eager)
        if liger is not None:
            found["liger"] = liger
    found["ours recompute"] = partial(ours, recompute=True)
    for rows in (64, 128, 256, 512, 1024, 2048):
        found[f"ours {rows} rows"] = partial(ours, chunk_rows=rows)
    return found
