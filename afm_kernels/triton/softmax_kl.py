"""Divergences between two softmaxes, and their gradients: Triton kernels and launchers.

The mathematics is at the head of ``row_math.py``. Bytes, for N logits of e bytes a side:

    classes <= Limits.on_chip      one launch; the rows stay in registers   forward 2Ne   loss and both gradients 4Ne
    more                           one row (or part of one) a program       forward 2Ne   loss and both gradients 6Ne
    js, more                       its sums need the normalisers first      forward 4Ne   loss and both gradients 8Ne

* ``tile_kernel``: several short rows, or one of medium length, in one 2-D tile of registers.
* ``stream_kernel``: one pass over a long row. Every lane keeps its own maximum and sums, so that the loop has no
  barrier; they meet once, at the end. Where rows are few each is split, and ``combine_kernel`` joins the parts
  in a fixed order.
* ``stream_grad_kernel``: the gradients of long rows from their ``row_stats``.
* ``js_stream_kernel``, ``js_combine_kernel``: the second pass of JS.
* ``sum_kernel``: the summed loss, in a fixed order; no atomics anywhere, so results repeat bit for bit.

Reverse KL is KL with student and teacher exchanged; only launchers know of it. ``distillation`` is KL with
``HAS_LABELS``.

Names: ``g_`` marks pointers into global memory; everything else lives in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from afm_kernels.schemas import accumulation_dtype, arguments_of
from afm_kernels.triton import launch
from afm_kernels.triton.row_math import JS, KL
from afm_kernels.triton.row_memory import PARTS, STATS
from afm_kernels.triton.softmax_kl_js import js_combine_kernel, js_stream_kernel
from afm_kernels.triton.softmax_kl_stream import combine_kernel, stream_kernel, sum_kernel
from afm_kernels.triton.softmax_kl_stream_grad import stream_grad_kernel
from afm_kernels.triton.softmax_kl_tile import tile_kernel

REVERSE_KL = 1  # index into ops.DIVERGENCES; the others are in row_math
MAX_SPLITS = 64  # parts of a row; enough to fill 132 multiprocessors from 8 rows on


# Launchers. See Note [Operator contract] in afm_kernels/ops.py.


class Mixture:
    """What ``distillation`` adds to KL: labels, and the weights of its two terms."""

    def __init__(self, labels: Tensor, alpha: float, label_smoothing: float, ignore_index: int) -> None:
        self.labels, self.alpha, self.label_smoothing, self.ignore_index = (
            labels,
            alpha,
            label_smoothing,
            ignore_index,
        )


class Problem:
    """One call: the logits as rows in memory, the gradients to fill, and the scalars that all kernels take."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        row_weight: Tensor | None,
        temperature: float,
        divergence: int,
        beta: float,
        scale: float,
        mixture: Mixture | None = None,
        grad_student: Tensor | None = None,
        grad_teacher: Tensor | None = None,
    ) -> None:
        if divergence == REVERSE_KL:
            student, teacher = teacher, student
            grad_student, grad_teacher = grad_teacher, grad_student
            divergence = KL.value
        if divergence == JS.value and beta > 0.5:
            student, teacher = teacher, student
            grad_student, grad_teacher = grad_teacher, grad_student
            beta = 1.0 - beta
        self.divergence, self.beta, self.temperature, self.scale = divergence, beta, temperature, scale
        self.row_weight, self.mixture = row_weight, mixture
        self.copy_out: list[tuple[Tensor, Tensor]] = []
        tensors = [t for t in (student, teacher, grad_student, grad_teacher) if t is not None]
        rows = launch.describe_rows(tensors)
        if rows is None:
            student, teacher = student.contiguous(), teacher.contiguous()
            grad_student, grad_teacher = (
                self._contiguous_out(grad_student),
                self._contiguous_out(grad_teacher),
            )
            tensors = [t for t in (student, teacher, grad_student, grad_teacher) if t is not None]
            rows = launch.describe_rows(tensors)
            assert rows is not None
        self.student, self.teacher, self.grad_student, self.grad_teacher = (
            student,
            teacher,
            grad_student,
            grad_teacher,
        )
        self.rows, self.tensors = rows, tensors
        self.dtype = accumulation_dtype(student, teacher)
        self.acc = launch.triton_dtype(self.dtype)
        self.vector = launch.vector_elements(student, teacher)
        self.lane_block = launch.LIMITS.lanes * self.vector
        limits = launch.LIMITS
        self.is_js = divergence == JS.value
        on_chip = limits.on_chip if mixture is None and not self.is_js else limits.on_chip_more
        # float64 takes twice the registers a value, and longer series
        self.double = 2 if self.dtype == torch.float64 else 1
        on_chip //= self.double * self.double
        # a streamed row has at least one whole tile between its edges
        self.on_chip = rows.classes <= max(on_chip, 2 * self.lane_block - 1)

    def _contiguous_out(self, out: Tensor | None) -> Tensor | None:
        if out is None or out.is_contiguous():
            return out
        temporary = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        self.copy_out.append((out, temporary))
        return temporary

    def new(self, *shape: int) -> Tensor:
        """An uninitialised tensor of the accumulation dtype."""
        return torch.empty(shape, dtype=self.dtype, device=self.student.device)

    def strides(self, *wanted: Tensor | None) -> list[int]:
        """Outer and inner row stride of each tensor, 0 where there is none."""
        result: list[int] = []
        for tensor in wanted:
            at = next((i for i, t in enumerate(self.tensors) if t is tensor), None)
            result += (0, 0) if at is None else (self.rows.outer_strides[at], self.rows.inner_strides[at])
        return result

    def mixture_arguments(self) -> tuple[Tensor | None, int, float, float]:
        """labels, ignore_index, alpha, label_smoothing."""
        m = self.mixture
        return (None, 0, 1.0, 0.0) if m is None else (m.labels, m.ignore_index, m.alpha, m.label_smoothing)

    def finish(self) -> None:
        for out, temporary in self.copy_out:
            out.copy_(temporary)

    # On chip: one launch, and one more for the sum over several programs.

    def tile(
        self,
        *,
        reduction: int | None = None,
        stats: Tensor | None = None,
        from_stats: bool = False,
        grad_loss: Tensor | None = None,
    ) -> Tensor | None:
        """Runs ``tile_kernel``; ``reduction`` None wants no loss."""
        rows = self.rows
        block = max(16, launch.next_power_of_2(rows.classes))
        # JS has few elements a lane; of half precision twice as many make an access of 16 bytes
        wide = 2 if self.is_js and self.vector > 4 else 1
        tile_rows = max(1, wide * launch.LIMITS.tile // self.double // block)
        programs = triton.cdiv(rows.num_rows, tile_rows)
        loss = None
        if reduction == 0:
            loss = self.new(rows.num_rows)
        elif reduction == 1:
            loss = self.new(programs)
        align = launch.row_alignment(rows, self.tensors)
        labels, ignore_index, alpha, smoothing = self.mixture_arguments()
        strides = self.strides(self.student, self.teacher, self.grad_student, self.grad_teacher)
        if programs:
            tile_kernel[(programs,)](
                self.student,
                self.teacher,
                self.row_weight,
                labels,
                grad_loss,
                loss,
                stats,
                self.grad_student,
                self.grad_teacher,
                rows.num_rows,
                rows.classes,
                rows.inner,
                *(stride // align for stride in strides),
                ignore_index,
                self.temperature,
                1.0 / self.temperature,
                self.scale,
                self.beta,
                alpha,
                smoothing,
                DIVERGENCE=self.divergence,
                HAS_LABELS=self.mixture is not None,
                FROM_STATS=from_stats,
                WANT_LOSS=0 if reduction is None else reduction + 1,
                GRAD_LOSS=grad_loss_kind(grad_loss),
                ALIGN=align,
                TWO_LEVELS=rows.two_levels,
                ACC=self.acc,
                ROWS=tile_rows,
                BLOCK=block,
                num_warps=self.tile_warps(block * tile_rows),
            )
        if reduction == 1 and loss is not None:
            return self.sum(loss)
        return loss

    def tile_warps(self, elements: int) -> int:
        """256 lanes with 8 elements of each side, 4 in float64, or 16 if little else is kept of a row; JS has 512."""
        many = elements > (1024 if self.is_js else 4096)
        return launch.warps(512 if many else min(256, elements * self.double // 8))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values``, which one value already is."""
        if values.numel() == 1:
            return values.view(())
        total = self.new()
        sum_kernel[(1,)](values, total, values.numel(), BLOCK=4096, num_warps=launch.warps(512))
        return total

    # Streaming.

    def phase(self) -> bool:
        return launch.equal_phase(self.rows, self.tensors)

    def splits(self) -> tuple[int, int]:
        """Parts that each row is split into, and tiles a part: few rows would leave multiprocessors idle."""
        tiles = triton.cdiv(self.rows.classes + self.vector - 1, self.lane_block)
        wanted = launch.multiprocessors(self.student.device) * launch.LIMITS.programs_per_multiprocessor
        splits = min(max(1, wanted // max(self.rows.num_rows, 1)), MAX_SPLITS, tiles)
        tiles_per_split = triton.cdiv(tiles, splits)
        return triton.cdiv(tiles, tiles_per_split), tiles_per_split

    def stream(self, *, want_loss: bool) -> tuple[Tensor | None, Tensor]:
        """The rows' losses, where wanted, and scalars: one pass, or two for JS."""
        rows = self.rows
        stats = self.new(rows.num_rows, STATS.value)
        loss = self.new(rows.num_rows) if want_loss else None
        if rows.num_rows == 0:
            return loss, stats
        splits, tiles_per_split = self.splits()
        labels, ignore_index, alpha, smoothing = self.mixture_arguments()
        parts = self.new(rows.num_rows * splits, PARTS.value) if splits > 1 or self.is_js else None
        s_outer, s_inner, t_outer, t_inner = self.strides(self.student, self.teacher)
        scalars = (self.temperature, 1.0 / self.temperature, self.scale, alpha, smoothing)
        first_loss = None if self.is_js else loss
        phase, two_levels = self.phase(), rows.two_levels
        stream_kernel[(rows.num_rows * splits,)](
            self.student,
            self.teacher,
            self.row_weight,
            labels,
            None if splits > 1 else first_loss,
            None if splits > 1 else stats,
            parts if splits > 1 else None,
            rows.num_rows,
            rows.classes,
            rows.inner,
            s_outer,
            s_inner,
            t_outer,
            t_inner,
            ignore_index,
            splits,
            tiles_per_split,
            *scalars,
            DIVERGENCE=self.divergence,
            HAS_LABELS=self.mixture is not None,
            SPLIT=splits > 1,
            PHASE=phase,
            TWO_LEVELS=two_levels,
            ACC=self.acc,
            LANES=launch.LIMITS.lanes,
            VECTOR=self.vector,
            num_warps=launch.warps(launch.LIMITS.lanes),
        )
        if splits > 1:
            combine_kernel[(rows.num_rows,)](
                self.student,
                self.row_weight,
                labels,
                first_loss,
                stats,
                parts,
                rows.num_rows,
                rows.classes,
                rows.inner,
                s_outer,
                s_inner,
                ignore_index,
                splits,
                *scalars,
                DIVERGENCE=self.divergence,
                HAS_LABELS=self.mixture is not None,
                TWO_LEVELS=two_levels,
                ACC=self.acc,
                SPLITS=MAX_SPLITS,
                num_warps=launch.warps(MAX_SPLITS),
            )
        if self.is_js:
            js_stream_kernel[(rows.num_rows * splits,)](
                self.student,
                self.teacher,
                stats,
                parts,
                rows.num_rows,
                rows.classes,
                rows.inner,
                s_outer,
                s_inner,
                t_outer,
                t_inner,
                splits,
                tiles_per_split,
                1.0 / self.temperature,
                self.beta,
                PHASE=phase,
                TWO_LEVELS=two_levels,
                ACC=self.acc,
                LANES=launch.LIMITS.lanes,
                VECTOR=self.vector,
                num_warps=launch.warps(launch.LIMITS.lanes),
            )
            js_combine_kernel[(rows.num_rows,)](
                self.row_weight,
                loss,
                stats,
                parts,
                rows.num_rows,
                splits,
                self.scale,
                self.beta,
                ACC=self.acc,
                SPLITS=MAX_SPLITS,
                num_warps=launch.warps(MAX_SPLITS),
            )
        return loss, stats

    def stream_grad(self, stats: Tensor, grad_loss: Tensor | None = None) -> None:
        """The gradients of long rows from their scalars."""
        rows = self.rows
        if rows.num_rows == 0 or (self.grad_student is None and self.grad_teacher is None):
            return
        block = launch.LIMITS.grad_block // self.double // (2 if self.is_js else 1)
        tiles = triton.cdiv(rows.classes + self.vector - 1, block)
        labels, ignore_index, alpha, smoothing = self.mixture_arguments()
        stream_grad_kernel[(rows.num_rows * tiles,)](
            self.student,
            self.teacher,
            self.row_weight,
            labels,
            grad_loss,
            stats,
            self.grad_student,
            self.grad_teacher,
            rows.num_rows,
            rows.classes,
            rows.inner,
            *self.strides(self.student, self.teacher, self.grad_student, self.grad_teacher),
            ignore_index,
            tiles,
            self.temperature,
            1.0 / self.temperature,
            self.scale,
            self.beta,
            alpha,
            smoothing,
            DIVERGENCE=self.divergence,
            HAS_LABELS=self.mixture is not None,
            GRAD_LOSS=grad_loss_kind(grad_loss),
            PHASE=self.phase(),
            TWO_LEVELS=rows.two_levels,
            ACC=self.acc,
            BLOCK=block,
            VECTOR=self.vector,
            num_warps=launch.warps(256),
        )

    # The operators, whichever kernels serve them.

    def forward(self, shape: torch.Size, reduction: int) -> tuple[Tensor, Tensor]:
        with launch.on_device(self.student):
            if self.on_chip:
                stats = self.new(self.rows.num_rows, STATS.value)
                loss = self.tile(reduction=reduction, stats=stats)
                assert loss is not None
                return (loss.view(shape) if reduction == 0 else loss), stats
            loss, stats = self.stream(want_loss=True)
            assert loss is not None
            return (loss.view(shape) if reduction == 0 else self.sum(loss)), stats

    def backward(self, stats: Tensor, grad_loss: Tensor) -> None:
        with launch.on_device(self.student):
            if self.on_chip:
                self.tile(stats=stats, from_stats=True, grad_loss=grad_loss)
            else:
                self.stream_grad(stats, grad_loss)
            self.finish()

    def forward_grad(self, shape: torch.Size, reduction: int) -> Tensor:
        with launch.on_device(self.student):
            if self.on_chip:
                loss = self.tile(reduction=reduction)
            else:
                loss, stats = self.stream(want_loss=True)
                self.stream_grad(stats)
                if reduction == 1 and loss is not None:
                    loss = self.sum(loss)
            self.finish()
        assert loss is not None
        return loss.view(shape) if reduction == 0 else loss

    def grad(self) -> None:
        if self.grad_student is None and self.grad_teacher is None:
            return
        with launch.on_device(self.student):
            if self.on_chip:
                self.tile()
            else:
                _, stats = self.stream(want_loss=False)
                self.stream_grad(stats)
            self.finish()


def grad_loss_kind(grad_loss: Tensor | None) -> int:
    """GRAD_LOSS of the kernels."""
    return 0 if grad_loss is None else 1 if grad_loss.ndim == 0 else 2


def outputs(call: Any) -> tuple[Tensor | None, Tensor | None]:
    """Tensors for the gradients that ``call`` wants."""
    return (
        torch.empty_like(call.student) if call.wrt_student else None,
        torch.empty_like(call.teacher) if call.wrt_teacher else None,
    )


def returned(grads: tuple[Tensor | None, Tensor | None], call: Any) -> tuple[Tensor, Tensor]:
    """A gradient that was not asked for is an empty tensor."""
    to_student, to_teacher = grads
    return (
        call.student.new_empty(0) if to_student is None else to_student,
        call.teacher.new_empty(0) if to_teacher is None else to_teacher,
    )


def loss_operators(stem: str, problem_of: Callable[..., Problem]) -> tuple[Any, Any, Any]:
    """The operators forward, backward and forward_grad of a loss of these kernels.

    ``problem_of`` makes a ``Problem`` of a call and the gradients to fill.
    """
    forward_arguments, backward_arguments, forward_grad_arguments = (
        arguments_of(f"{stem}_{kind}") for kind in ("forward", "backward", "forward_grad")
    )

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        call = forward_arguments(*args)
        return problem_of(call).forward(call.student.shape[:-1], call.reduction)

    def backward(*args: Any) -> tuple[Tensor, Tensor]:
        call = backward_arguments(*args)
        grads = outputs(call)
        problem_of(call, *grads).backward(call.row_stats, call.grad_loss)
        return returned(grads, call)

    def forward_grad(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = forward_grad_arguments(*args)
        grads = outputs(call)
        loss = problem_of(call, *grads).forward_grad(call.student.shape[:-1], call.reduction)
        return loss, *returned(grads, call)

    return forward, backward, forward_grad


def _problem(call: Any, *grads: Tensor | None) -> Problem:
    return Problem(
        call.student,
        call.teacher,
        call.row_weight,
        call.temperature,
        call.divergence,
        call.beta,
        call.scale,
        None,
        *grads,
    )


softmax_kl_forward, softmax_kl_backward, softmax_kl_forward_grad = loss_operators("softmax_kl", _problem)

_Grad = arguments_of("softmax_kl_grad")
_GradOut = arguments_of("softmax_kl_grad_out")


def softmax_kl_grad(*args: Any) -> tuple[Tensor, Tensor]:
    call = _Grad(*args)
    grads = outputs(call)
    _problem(call, *grads).grad()
    return returned(grads, call)


def softmax_kl_grad_out(*args: Any) -> None:
    call = _GradOut(*args)
    _problem(call, call.grad_student, call.grad_teacher).grad()
