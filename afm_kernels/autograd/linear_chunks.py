"""A loss of hidden states, chunk by chunk: products by the library, rows by the fused kernel, no N x V logits.

A chunk's logits, S = k (h Wᵀ + b) of the student and T likewise, lie in two buffers that all chunks share. The row
kernel (operator linear_kl_rows) leaves in them the gradients G of the loss by the logits, and

    dh = k G W        dW += Gᵀ (k h)        db += k Σ G

A softcap c, z = c tanh(S / c), multiplies G by 1 - (z / c)².

Note [Digits of a projection]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
A KL of 4e-4 between logits that were rounded to bfloat16 is off by 40 %, one of 4e-6 by a factor of 7: the loss is a
difference of logits, and their roundings are not its own. So products have float32 results (float64 of float64), of
16-bit hidden states and weights too, whatever autocast says. CPUs get a weight in float32, some classes at a time;
GPUs multiply 16-bit numbers into float32. On the way back bfloat16 gradients of logits do there: a rounding of the
gradient is relative to the gradient. float16 ones would underflow; float16 is multiplied as float32.

The weight's gradient is summed over chunks in ``accumulate_dtype``: in bfloat16 its error would grow with the number of
chunks, 1.6e-3 of one and 1.1e-2 of 128.

Note [Rows of a chunk]
~~~~~~~~~~~~~~~~~~~~~~
Each chunk reads the weight three times, and reads and writes its gradient: few rows and that is the time, many and
the buffers are the memory. Measured (``python -m benchmarks --part linear``, docs/performance.md) on two AVX-512
cores at 2048 rows and 32000 classes, where nearly all of the time is products: chunks of 1024 rows take 3 % longer
than one of 2048, 512 rows 6 %, 256 13 %, 64 rows 58 %. So CPUs take a quarter of the rows, which leaves an
eighth of the memory of whole logits or less, within 256 and 1024. GPUs have ten times the arithmetic for a byte, and
want the 2048 rows that the roofline asks for (not measured). Where classes are few, rows are added until the buffers
have 2²² logits each, below which the calls themselves cost. Chunks are of equal size, so that none is thin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from afm_kernels import ops

CHUNK_ROWS_ON_CPU = (256, 1024)
CHUNK_ROWS_ELSEWHERE = 2048
LEAST_LOGITS = 2**22
_BLOCK_ELEMENTS = 2**21  # of a 16-bit weight that are float32 at a time: 8 MiB, which stays in the caches

_KL = ops.DIVERGENCES.index("kl")


def chunk_rows_of(rows: int, num_classes: int, device_type: str) -> int:
    """See Note [Rows of a chunk]."""
    most = CHUNK_ROWS_ELSEWHERE
    if device_type == "cpu":
        low, high = CHUNK_ROWS_ON_CPU
        most = min(max(-(-rows // 4), low), high)
    most = max(most, LEAST_LOGITS // num_classes)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


class Head(NamedTuple):
    """What turns hidden states into logits, without the tensors."""

    softcap: float | None = None
    logit_scale: float = 1.0


class Plan(NamedTuple):
    """The arguments of a loss that are not tensors."""

    student: Head
    teacher: Head
    temperature: float
    divergence: int
    beta: float
    divergence_weight: float
    label_weight: float
    label_smoothing: float
    ignore_index: int
    scale: float
    num_classes: int
    chunk_rows: int  # 0: by Note [Rows of a chunk]
    accumulate_dtype: torch.dtype
    backend: str
    is_tied: bool  # one weight on both sides, whose gradients are one sum
    topk_mode: int = -1  # an index into TOPK_MODES, where k classes of the teacher are known
    topk_backend: str = "reference"


class Inputs(NamedTuple):
    """Rows are the first dimension of what has any.

    The teacher has a weight, or its logits are given, or k classes of them; with a divergence_weight of 0, nothing.
    """

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None
    labels: Tensor | None
    row_weight: Tensor | None
    topk_indices: Tensor | None = None
    topk_log_probs: Tensor | None = None
    topk_log_tail: Tensor | None = None


DIFFERENTIABLE = 7
"""So many of ``Inputs`` have gradients, in this order."""


def loss_dtype(inputs: Inputs) -> torch.dtype:
    sides = (*inputs[:DIFFERENTIABLE], inputs.topk_log_probs)
    return ops.accumulation_dtype(*(t for t in sides if t is not None))


def linear_kl(
    inputs: Inputs,
    plan: Plan,
    wanted: tuple[bool, ...],
    grad_loss: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> tuple[Tensor, list[Tensor | None]]:
    """The row values, and the gradients that are ``wanted`` of ``Inputs``, of their sum.

    Gradients are multiplied with ``gradient_scale``, and gradients and row values with ``grad_loss``, of each row or of
    all of them. Gradients by weights and biases are in the dtype that they were summed in, those by float16 hidden
    states in float32.
    """
    with torch.no_grad(), torch.autocast(inputs.student_hidden.device.type, enabled=False):
        return _Loss(inputs, plan, wanted, grad_loss, gradient_scale).run()


def _rows_that_count(row_weight: Tensor | None) -> Tensor | None:
    """The rows whose weight is not 0, where some are and knowing it waits for no device and breaks no trace."""
    if (
        row_weight is None
        or not row_weight.is_cpu
        or type(row_weight) is not Tensor
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    rows = row_weight.nonzero().squeeze(1)
    return rows if rows.shape[0] < row_weight.shape[0] else None


class _Loss:
    """One call of ``linear_kl``."""

    def __init__(
        self,
        inputs: Inputs,
        plan: Plan,
        wanted: tuple[bool, ...],
        grad_loss: Tensor | None,
        gradient_scale: float,
    ) -> None:
        self.inputs, self.plan, self.gradient_scale = inputs, plan, gradient_scale
        self.dtype = loss_dtype(inputs)
        self.weight = inputs.row_weight
        if grad_loss is not None:
            upstream = grad_loss.to(self.dtype).expand(inputs.student_hidden.shape[0])
            self.weight = (
                upstream if self.weight is None else (self.weight * upstream).masked_fill(self.weight == 0, 0)
            )
        self.packed = _rows_that_count(inputs.row_weight)
        self.student = _Side(inputs[:3], plan.student, plan, wanted[:3], gradient_scale)
        self.teacher = None
        if inputs.teacher_hidden is not None:
            sums_in = self.student if plan.is_tied else None
            self.teacher = _Side(inputs[3:6], plan.teacher, plan, wanted[3:6], gradient_scale, sums_in)
        self.given = self.grad_given = None
        if inputs.teacher_logits is not None:
            self.given = inputs.teacher_logits[:, : plan.num_classes]
            if wanted[6]:
                self.grad_given = torch.zeros_like(inputs.teacher_logits)

    def run(self) -> tuple[Tensor, list[Tensor | None]]:
        hidden, plan = self.inputs.student_hidden, self.plan
        values = hidden.new_zeros(hidden.shape[0], dtype=self.dtype)
        count = hidden.shape[0] if self.packed is None else self.packed.shape[0]
        step = plan.chunk_rows or chunk_rows_of(count, plan.num_classes, hidden.device.type)
        for start in range(0, count, step):
            span = slice(start, min(start + step, count))
            rows = span if self.packed is None else self.packed[span]
            values[rows] = self.take(rows)
        from_teacher = (None, None, None) if self.teacher is None else self.teacher.gradients()
        return values, [*self.student.gradients(), *from_teacher, self.grad_given]

    def take(self, rows: slice | Tensor) -> Tensor:
        """The values of some rows; their part of the gradients goes where it belongs."""
        weight, given_weight = self.weight, self.inputs.row_weight
        inert = None  # rows that may hold anything, and must not reach a product
        if given_weight is not None and self.packed is None:
            inert = (given_weight[rows] == 0).unsqueeze(-1)
        student = self.student.project(rows, inert)
        teacher, wrt_teacher = student, False  # not looked at, unless:
        if self.teacher is not None:
            teacher, wrt_teacher = self.teacher.project(rows, inert), self.teacher.wants
        elif self.given is not None:
            teacher = self.given[rows]
            if self.grad_given is not None:
                teacher, wrt_teacher = teacher.clone(), True
        values = self.overwrite(
            student, teacher, rows, None if weight is None else weight[rows].contiguous(), wrt_teacher
        )
        self.student.differentiate(rows)
        if self.teacher is not None:
            self.teacher.differentiate(rows)
        if self.grad_given is not None:
            if self.gradient_scale != 1:
                teacher.mul_(self.gradient_scale)
            self.grad_given[rows, : self.plan.num_classes] = teacher
        return values

    def overwrite(
        self,
        student: Tensor,
        teacher: Tensor,
        rows: slice | Tensor,
        weight: Tensor | None,
        wrt_teacher: bool,
    ) -> Tensor:
        """The row kernel: values of a chunk whose logits become their gradients."""
        plan = self.plan
        kernel = ops.kernel("linear_kl_rows", student.device.type, plan.backend)
        labels = None if self.inputs.labels is None else self.inputs.labels[rows]

        def run(
            student: Tensor, labels: Tensor | None, by_divergence: float, by_label: float, wrt_teacher: bool
        ) -> Tensor:
            return kernel(
                student,
                teacher,
                labels,
                weight,
                plan.temperature,
                plan.divergence,
                plan.beta,
                by_divergence,
                by_label,
                plan.label_smoothing,
                plan.ignore_index,
                plan.scale,
                self.student.wants,
                wrt_teacher,
            )

        if self.inputs.topk_indices is None:
            if labels is None or plan.divergence == _KL or plan.divergence_weight == 0:
                return run(student, labels, plan.divergence_weight, plan.label_weight, wrt_teacher)
        elif labels is None:
            return self.overwrite_by_topk(student, rows, weight)
        # Kernels take labels along with KL; other divergences' gradients are added to those of the labels.
        hard = student.clone()
        values = run(hard, labels, 0.0, plan.label_weight, False)
        if self.inputs.topk_indices is None:
            values = values + run(student, None, plan.divergence_weight, 0.0, wrt_teacher)
        else:
            values = values + self.overwrite_by_topk(student, rows, weight)
        if self.student.wants:
            student.add_(hard)
        return values

    def overwrite_by_topk(self, student: Tensor, rows: slice | Tensor, weight: Tensor | None) -> Tensor:
        plan, inputs = self.plan, self.inputs
        assert inputs.topk_indices is not None
        assert inputs.topk_log_probs is not None
        tail = inputs.topk_log_tail
        arguments = (
            student,
            inputs.topk_log_probs[rows],
            inputs.topk_indices[rows],
            None if tail is None else tail[rows],
            weight,
            plan.temperature,
            plan.topk_mode,
            0,
            plan.scale * plan.divergence_weight,
        )
        op = "topk_kl_forward_grad_out" if self.student.wants else "topk_kl_forward"
        kernel = ops.kernel(op, student.device.type, plan.topk_backend)
        return kernel(*arguments, student) if self.student.wants else kernel(*arguments)[0]


class _Side:
    """Hidden states, the weight that makes logits of them, and the gradients of both."""

    def __init__(
        self,
        tensors: tuple[Tensor | None, ...],
        head: Head,
        plan: Plan,
        wanted: tuple[bool, ...],
        gradient_scale: float,
        sums_in: _Side | None = None,
    ) -> None:
        hidden, weight, bias = tensors
        assert hidden is not None
        assert weight is not None
        self.hidden, self.head, self.plan = hidden, head, plan
        self.weight = weight[: plan.num_classes]
        self.bias = None if bias is None else bias[: plan.num_classes]
        self.classes = weight.shape[0]
        self.wants_hidden, self.wants_weight, self.wants_bias = wanted
        self.wants = any(wanted)
        self.sums_in = sums_in if self.wants_weight else None
        self.dtype = ops.accumulation_dtype(hidden, weight)
        self.sum_dtype = torch.promote_types(self.dtype, plan.accumulate_dtype)
        self.factor = head.logit_scale * gradient_scale
        # GPUs multiply bfloat16 into float32. See Note [Digits of a projection].
        self.is_bfloat16 = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
        self.logits: Tensor | None = None  # buffers, which all chunks share
        self.slope: Tensor | None = None
        self.block: Tensor | None = None
        self.chunk: Tensor | None = None  # the hidden states of the present one
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the dtype of the products: as it is, or some classes at a time."""
        n, weight = self.plan.num_classes, self.weight
        if weight.dtype == self.dtype or self.is_bfloat16:
            yield slice(0, n), weight
            return
        step = self.block_classes()
        if self.block is None:
            self.block = weight.new_empty((step, weight.shape[1]), dtype=self.dtype)
        for start in range(0, n, step):
            classes = slice(start, min(start + step, n))
            yield classes, self.block[: classes.stop - start].copy_(weight[classes])

    def block_classes(self) -> int:
        return min(self.plan.num_classes, max(64, _BLOCK_ELEMENTS // max(1, self.weight.shape[1])))

    def project(self, rows: slice | Tensor, inert: Tensor | None) -> Tensor:
        """The logits of some rows, in a buffer that the next rows will share."""
        chunk, n, scale = self.hidden[rows], self.plan.num_classes, self.head.logit_scale
        if not self.is_bfloat16:
            chunk = chunk.to(self.dtype)
        self.chunk = chunk = chunk if inert is None else chunk.masked_fill(inert, 0)
        if self.logits is None:
            self.logits = chunk.new_empty((chunk.shape[0], n), dtype=self.dtype)
        logits = self.logits[: chunk.shape[0]]  # the last chunk may be shorter
        for classes, weight in self.blocks():
            out = logits[:, classes]
            if self.is_bfloat16:
                torch.mm(chunk, weight.t(), out_dtype=torch.float32, out=out)
                if scale != 1:
                    out.mul_(scale)
            elif scale == 1:
                torch.mm(chunk, weight.t(), out=out)
            else:
                torch.addmm(out, chunk, weight.t(), beta=0, alpha=scale, out=out)
        if self.bias is not None:
            logits.add_(self.bias.to(self.dtype), alpha=scale)
        cap = self.head.softcap
        if cap is not None:
            logits.div_(cap).tanh_()
            if self.wants:
                if self.slope is None:
                    self.slope = torch.empty_like(self.logits)
                torch.mul(logits, logits, out=self.slope[: logits.shape[0]])
            logits.mul_(cap)
        return logits

    def differentiate(self, rows: slice | Tensor) -> None:
        """From gradients by the logits, which lie where the logits were, to those by what made them."""
        if not self.wants:
            return
        chunk = self.chunk
        assert self.logits is not None
        assert chunk is not None
        grad = self.logits[: chunk.shape[0]]
        if self.slope is not None:
            grad.addcmul_(grad, self.slope[: chunk.shape[0]], value=-1)
        if self.wants_bias:
            total = grad.sum(0, dtype=self.sum_dtype).mul_(self.factor)
            if self.grad_bias is None:
                self.grad_bias = total.new_zeros(self.classes)
            self.grad_bias[: self.plan.num_classes] += total
        if self.is_bfloat16:
            grad = grad.to(torch.bfloat16)
        if self.wants_hidden:
            self.add_to_hidden(rows, grad)
        if self.wants_weight:
            (self.sums_in or self).add_to_weight(grad, chunk, self.factor)

    def add_to_hidden(self, rows: slice | Tensor, grad: Tensor) -> None:
        if self.grad_hidden is None:
            half = self.hidden.dtype is torch.float16
            self.grad_hidden = torch.zeros_like(self.hidden, dtype=torch.float32 if half else None)
        target = self.grad_hidden[rows] if isinstance(rows, slice) else None
        if target is None or target.dtype != grad.dtype or not target.is_contiguous():
            out = grad.new_empty((grad.shape[0], self.hidden.shape[1]))
        else:
            out = target
        for i, (classes, weight) in enumerate(self.blocks()):
            torch.addmm(out, grad[:, classes], weight, beta=0 if i == 0 else 1, alpha=self.factor, out=out)
        if out is not target:
            self.grad_hidden[rows] = out.to(self.grad_hidden.dtype)

    def add_to_weight(self, grad: Tensor, chunk: Tensor, factor: float) -> None:
        n = self.plan.num_classes
        is_first = self.grad_weight is None
        if self.grad_weight is None:
            self.grad_weight = grad.new_empty((self.classes, chunk.shape[1]), dtype=self.sum_dtype)
            self.grad_weight[n:] = 0
        total = self.grad_weight[:n]
        beta = 0 if is_first else 1
        if grad.dtype == total.dtype:
            torch.addmm(total, grad.t(), chunk, beta=beta, alpha=factor, out=total)
        elif self.is_bfloat16 and total.dtype == torch.float32:
            torch.addmm(total, grad.t(), chunk, out_dtype=torch.float32, beta=beta, alpha=factor, out=total)
        else:
            step = self.block_classes()
            for start in range(0, n, step):
                classes = slice(start, min(start + step, n))
                left = grad[:, classes].t()
                part = (
                    torch.mm(left, chunk, out_dtype=torch.float32) if self.is_bfloat16 else left @ chunk
                ).mul_(factor)
                total[classes].copy_(part) if is_first else total[classes].add_(part)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """By hidden states, weight and bias, as far as they are wanted. No rows, no product, zeros."""
        if self.wants_hidden and self.grad_hidden is None:
            self.grad_hidden = torch.zeros_like(self.hidden)
        if self.wants_weight and self.grad_weight is None and self.sums_in is None:
            shape = (self.classes, self.hidden.shape[1])
            self.grad_weight = self.hidden.new_zeros(shape, dtype=self.sum_dtype)
        if self.wants_bias and self.grad_bias is None:
            self.grad_bias = self.hidden.new_zeros(self.classes, dtype=self.sum_dtype)
        return self.grad_hidden, self.grad_weight, self.grad_bias
