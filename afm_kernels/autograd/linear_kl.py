"""The autograd Functions of ``linear_kl_div``: eager, compiled, under torch.func.

Note [Gradients of a projected loss]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Made in the forward they cost two products a side less than when the logits are made again, and nothing is kept beside
them but what the caller will own anyway. What the loss is multiplied with afterwards is not known then. On CPUs it is
nearly always what it was before: Note [Expected gradients] in expected.py holds here too, with products that scale for
nothing. Where something else comes, or on a GPU, where nobody looks, the gradients are multiplied once, in the pass
that brings them to their tensors' dtype where there is one. Row values (no reduction) are multiplied each with its own;
their gradients are always made in the backward.

They are kept by the graph's node and not among its saved tensors, whose second reference would make autograd copy the
weight's gradient instead of handing it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from afm_kernels.autograd.expected import expected_gradient, meet_gradient
from afm_kernels.autograd.fused import refuse_forward_mode
from afm_kernels.autograd.linear_chunks import DIFFERENTIABLE, Head, Inputs, Plan, linear_kl, loss_dtype
from afm_kernels.schemas import accumulation_dtype

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_is_batched = torch._C._functorch.is_legacy_batchedtensor

Grads = Sequence[Tensor | None]


def _key(plan: Plan) -> int:
    return -plan.num_classes  # not among the losses of logits


def _dtypes(inputs: Inputs) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in inputs[:DIFFERENTIABLE])


def _finished(
    grads: Grads, dtypes: Sequence[torch.dtype | None], factor: Tensor | float
) -> list[Tensor | None]:
    """In their tensors' dtypes, times ``factor``."""
    is_one = isinstance(factor, float) and factor == 1
    done: list[Tensor | None] = []
    for grad, dtype in zip(grads, dtypes, strict=True):
        if grad is None or dtype is None:
            done.append(None)
        elif is_one:
            done.append(grad.to(dtype))
        elif grad.dtype != dtype:
            done.append(torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype)))
        else:
            done.append(grad.mul_(factor))
    return done


_NO_SECOND = (
    "second derivatives of linear_kl_div are not supported: its logits are gone; use softmax_kl_div of "
    "hidden @ weight.t() where they are wanted"
)


def _once(grads: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients that refuse to be differentiated, as ``once_differentiable`` makes them."""
    there = [grad.detach().requires_grad_() for grad in grads if grad is not None]
    made = torch._C._functions.DelayedError(_NO_SECOND.encode(), len(there))(*there)
    refusing = iter((made,) if isinstance(made, Tensor) else made)
    return [None if grad is None else next(refusing) for grad in grads]


def _kept(inputs: Inputs) -> Inputs:
    """As a graph can save them: a teacher's often come from torch.inference_mode."""
    if torch.compiler.is_compiling():
        return inputs
    kept: Any = [t.clone() if t is not None and t.is_inference() else t for t in inputs]
    return Inputs(*kept)


class LinearKL(torch.autograd.Function):
    """``apply(plan, per_row, recompute, *inputs)``: the summed loss, or the row values."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, per_row: bool, recompute: bool, *tensors: Any) -> Tensor:
        inputs = Inputs(*tensors)
        ctx.wanted = ctx.needs_input_grad[3 : 3 + DIFFERENTIABLE]
        ctx.plan, ctx.per_row, ctx.made_for, ctx.made = plan, per_row, None, None
        compiling = torch.compiler.is_compiling()
        if per_row or recompute:
            values, _ = call(inputs, plan, (False,) * DIFFERENTIABLE)
            ctx.save_for_backward(*_kept(inputs))
        else:
            expected = None
            if not compiling and inputs.student_hidden.is_cpu:
                expected = expected_gradient(_key(plan))
            ctx.made_for = 1.0 if expected is None or not 0 < abs(expected) < float("inf") else expected
            values, made = call(inputs, plan, ctx.wanted, gradient_scale=ctx.made_for)
            if compiling:
                ctx.save_for_backward(*made)
            else:
                ctx.made = made
            ctx.dtypes = _dtypes(inputs)
        return values if per_row else values.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        if not compiling and _is_batched(grad_loss):
            raise RuntimeError(
                "linear_kl_div takes one upstream gradient at a time; is_grads_batched=True is not supported"
            )
        if ctx.made_for is None:
            inputs = Inputs(*ctx.saved_tensors)
            if not compiling and torch.is_grad_enabled():
                grads = list(LinearKLGradients.apply(ctx.plan, ctx.wanted, grad_loss, *inputs))
            else:
                _, made = call(inputs, ctx.plan, ctx.wanted, grad_loss)
                grads = _finished(made, _dtypes(inputs), 1.0)
        elif compiling:
            grads = [
                None if grad is None else (grad * grad_loss).to(dtype)
                for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=False)
            ]
        else:
            grads = LinearKL.made_before(ctx, grad_loss)
        return None, None, None, *grads, *(None,) * (len(Inputs._fields) - DIFFERENTIABLE)

    @staticmethod
    def made_before(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
        if ctx.made is None:
            raise RuntimeError(
                "backward through linear_kl_div a second time: its gradients were handed over; pass retain_graph=True "
                "to the first backward"
            )
        made = ctx.made
        if _keeps_graph():
            made = [None if grad is None else grad.clone() for grad in made]
        else:
            ctx.made = None
        factor: Tensor | float = grad_loss / ctx.made_for
        if grad_loss.is_cpu and type(grad_loss) is Tensor:
            met = grad_loss.item()
            meet_gradient(_key(ctx.plan), met)
            factor = met / ctx.made_for
        if torch.is_grad_enabled():
            return _once(_finished(made, ctx.dtypes, factor))
        return _finished(made, ctx.dtypes, factor)


class LinearKLGradients(torch.autograd.Function):
    """The gradients of ``inputs`` where somebody records them: ``apply(plan, wanted, grad_loss, *inputs)``."""

    @staticmethod
    def forward(
        plan: Plan, wanted: tuple[bool, ...], grad_loss: Tensor, *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        inputs = Inputs(*tensors)
        _, made = call(inputs, plan, wanted, grad_loss)
        return tuple(_finished(made, _dtypes(inputs), 1.0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(_NO_SECOND)

    @staticmethod
    def vmap(*args: Any) -> NoReturn:
        _refuse_vmap()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward_mode()


class TransformedLinearKL(torch.autograd.Function):
    """The loss under torch.func.grad, vjp and their like: ``apply(plan, per_row, *inputs)``."""

    @staticmethod
    def forward(plan: Plan, per_row: bool, *tensors: Any) -> Tensor:
        values, _ = call(Inputs(*tensors), plan, (False,) * DIFFERENTIABLE)
        return values if per_row else values.sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan = inputs[0]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[2 : 2 + DIFFERENTIABLE])
        grads = LinearKLGradients.apply(ctx.plan, wanted, grad_loss, *ctx.saved_tensors)
        return None, None, *grads, *(None,) * (len(Inputs._fields) - DIFFERENTIABLE)

    @staticmethod
    def vmap(*args: Any) -> NoReturn:
        _refuse_vmap()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward_mode()


def _refuse_vmap() -> NoReturn:
    raise RuntimeError(
        "linear_kl_div under vmap is not supported; rows are a batch already: give it all of them at once, with "
        'reduction="none" where values of rows are wanted'
    )


def linear_loss(inputs: Inputs, plan: Plan, per_row: bool, recompute: bool) -> Tensor:
    """The loss of checked arguments, by the Function that fits the moment."""
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_kl_div inside a torch.func transform inside torch.compile is not supported: compile without "
                "the transform, or transform without compiling"
            )
        return TransformedLinearKL.apply(plan, per_row, *inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return LinearKL.apply(plan, per_row, recompute, *inputs)
    values, _ = call(inputs, plan, (False,) * DIFFERENTIABLE)
    return values if per_row else values.sum()


# For graphs: one operator, whose loop over chunks is not unrolled. -------------------------------------------------


def call(
    inputs: Inputs,
    plan: Plan,
    wanted: tuple[bool, ...],
    grad_loss: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> tuple[Tensor, list[Tensor | None]]:
    """``linear_kl``, as one operator where a graph is made."""
    if not torch.compiler.is_compiling():
        return linear_kl(inputs, plan, wanted, grad_loss, gradient_scale)
    numbers = [
        value
        for head in (plan.student, plan.teacher)
        for value in (head.logit_scale, 0.0 if head.softcap is None else head.softcap)
    ]
    values, *made = linear_kl_op(
        list(inputs),
        grad_loss,
        [*numbers, *(getattr(plan, name) for name in _FLOATS), gradient_scale],
        [getattr(plan, name) for name in _INTEGERS],
        list(wanted),
        plan.is_tied,
        plan.accumulate_dtype,
        plan.backend,
        plan.topk_backend,
    )
    some = iter(made)
    return values, [next(some) if is_made else None for is_made in _is_made(plan.is_tied, wanted)]


_FLOATS = ("temperature", "beta", "divergence_weight", "label_weight", "label_smoothing", "scale")
_INTEGERS = ("divergence", "ignore_index", "num_classes", "chunk_rows", "topk_mode")


def _is_made(is_tied: bool, wanted: Sequence[bool]) -> list[bool]:
    """Which gradients there are: of a tied weight, the student's is the sum."""
    return [wants and not (is_tied and i == 4 and wanted[1]) for i, wants in enumerate(wanted)]


@torch.library.custom_op("afm_kernels::linear_kl", mutates_args=())
def linear_kl_op(
    tensors: Sequence[Tensor | None],
    grad_loss: Tensor | None,
    floats: Sequence[float],
    integers: Sequence[int],
    wanted: Sequence[bool],
    is_tied: bool,
    accumulate_dtype: torch.dtype,
    backend: str,
    topk_backend: str,
) -> list[Tensor]:
    """The row values, and those gradients that are wanted."""
    (s_scale, s_cap, t_scale, t_cap), rest = floats[:4], floats[4:]
    options: dict[str, Any] = dict(zip((*_FLOATS, *_INTEGERS), (*rest[:-1], *integers), strict=True))
    some: Any = tensors
    plan = Plan(
        student=Head(s_cap or None, s_scale),
        teacher=Head(t_cap or None, t_scale),
        accumulate_dtype=accumulate_dtype,
        backend=backend,
        topk_backend=topk_backend,
        is_tied=is_tied,
        **options,
    )
    values, made = linear_kl(Inputs(*some), plan, tuple(wanted), grad_loss, rest[-1])
    return [values, *(grad for grad in made if grad is not None)]


@linear_kl_op.register_fake
def _(
    tensors: Sequence[Tensor | None],
    grad_loss: Tensor | None,
    floats: Sequence[float],
    integers: Sequence[int],
    wanted: Sequence[bool],
    is_tied: bool,
    accumulate_dtype: torch.dtype,
    backend: str,
    topk_backend: str,
) -> list[Tensor]:
    some: Any = tensors
    inputs = Inputs(*some)
    made = [inputs.student_hidden.new_empty(inputs.student_hidden.shape[0], dtype=loss_dtype(inputs))]
    for i, (tensor, is_made) in enumerate(zip(inputs, _is_made(is_tied, wanted), strict=False)):
        if not is_made or tensor is None:
            continue
        dtype = tensor.dtype
        if i in (0, 3):
            dtype = torch.float32 if dtype is torch.float16 else dtype
        elif i != 6:
            hidden, weight = inputs[0:2] if i < 3 else inputs[3:5]
            assert hidden is not None
            assert weight is not None
            dtype = torch.promote_types(accumulation_dtype(hidden, weight), accumulate_dtype)
        if i in (1, 4):
            made.append(tensor.new_empty(tensor.shape, dtype=dtype))
        else:
            made.append(torch.empty_like(tensor, dtype=dtype))
    return made
