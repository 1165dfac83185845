"""The autograd Functions of the fused losses: softmax_kl, distillation, dkl, topk_kl.

Note [Two kinds of Function]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~
An eager call costs 8 µs through a Function whose ``forward`` takes ``ctx``, and 42 to 50 µs through one with
``setup_context`` (measured on two shared cores), which only torch.func needs. So ``FusedLoss`` is an old-style
Function, and under an active torch.func transform ``TransformedLoss`` stands in for it. Whatever is no tensor comes in
one ``Call``: each argument of a Function costs a quarter of a microsecond on its way there, and a None on the way back.

Note [Second derivatives]
~~~~~~~~~~~~~~~~~~~~~~~~~
A backward that is itself recorded (create_graph=True, torch.func.grad) runs the reference's formulas, which are
plain differentiable PyTorch, whatever the backend: every higher derivative then comes from PyTorch. A compiled
graph has no double backward, and PyTorch says so. Forward mode is refused: by ``TransformedLoss`` under torch.func,
else at the public boundary, since torch.compile takes no Function that has a ``jvp`` to refuse it with.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from afm_kernels import ops
from afm_kernels.autograd.expected import expected_gradient, meet_gradient

# Whether somebody watches each operator, to trace it or to know shapes alone: no number can be looked at then.
_modes = torch._C._len_torch_dispatch_stack
# Who looks after saved tensors, if not autograd itself.
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
# Whether the backward that runs keeps its graph, and whether an upstream gradient is many in one, under
# autograd.grad(is_grads_batched=True).
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_is_batched = torch._C._functorch.is_legacy_batchedtensor


class LossOps(NamedTuple):
    """The names of a loss's operators."""

    forward: str
    backward: str
    forward_grad: str


LOSS_OPS = {
    stem: LossOps(f"{stem}_forward", f"{stem}_backward", f"{stem}_forward_grad")
    for stem in ("softmax_kl", "distillation", "dkl", "topk_kl")
}

# Number of classes from which on `recompute=None` recomputes, by backend and loss; absent: never.
#
# cpp: in main memory, reading or writing a tensor is what costs. Both gradients made in the forward move four
# tensors, and four more where an upstream gradient scales them; recomputing moves six in either case. With one
# gradient it is three tensors and two more against five: no gain. Of fewer classes, what is scaled mostly is in the
# caches still. An eager softmax_kl does better than either: see Note [Expected gradients] in expected.py. The other
# losses, of 16384, 32000 and 128256 classes: distillation has more to compute, 15 % longer against 12 % less up to
# 32000 classes, but 12 and 28 % less of 128256; dkl reads its rows twice in either case, 2 % longer against 15 % less.
#
# triton: rows of more than 8192 classes are streamed, and read twice in either case: gradients made in the
# forward would save nothing and hold memory until the backward.
RECOMPUTE_FROM: dict[str, dict[str, int]] = {
    "cpp": {"softmax_kl": 16384, "distillation": 65536, "dkl": 16384},
    "triton": dict.fromkeys(LOSS_OPS, 8193),
}


def prefers_recompute(stem: str, student: Tensor, teacher: Tensor, backend: str) -> bool:
    """What ``recompute=None`` means for this loss of these logits.

    float16 always recomputes: a gradient made in the forward is rounded to float16 before a loss scale
    multiplies it, and what the scale was there to save has underflowed by then.
    """
    if student.dtype is torch.float16 or teacher.dtype is torch.float16:
        return True
    limit = RECOMPUTE_FROM.get(backend, {}).get(stem)
    if limit is None or student.shape[-1] < limit:
        return False
    return backend != "cpp" or (student.requires_grad and teacher.requires_grad)


def is_watched(stem: str, student: Tensor, teacher: Tensor, reduction: int, backend: str) -> bool:
    """Whether ``recompute=None`` goes by Note [Expected gradients] in expected.py: of long rows, and of float16."""
    return (
        stem == "softmax_kl"
        and reduction == 1
        and backend == "cpp"
        and not torch.compiler.is_compiling()
        and (
            student.shape[-1] >= RECOMPUTE_FROM["cpp"]["softmax_kl"]
            or student.dtype is torch.float16
            or teacher.dtype is torch.float16
        )
        and _saved_tensors_hooks(False) is None
    )


def refuse_forward_mode() -> NoReturn:
    """Raises the one sentence about forward mode. Without it an operator would drop the tangents."""
    raise RuntimeError(
        "forward-mode derivatives (jvp, jacfwd, hessian) of afm_kernels losses are not supported; use reverse mode "
        "(grad, vjp, jacrev)"
    )


class Call(NamedTuple):
    """The arguments of a fused loss that are not tensors."""

    stem: str
    device_type: str
    backend: str
    params: tuple[Any, ...]
    grad_params: tuple[Any, ...]  # parameters that only gradients have
    reduction: int
    scale: float
    recompute: bool = False
    watched: bool = False  # recompute only what was not expected: Note [Expected gradients] in expected.py


def fused_forward(ctx: Any, student: Tensor, teacher: Tensor, call: Call, *tensors: Tensor | None) -> Tensor:
    """The loss; what its backward needs goes to ``ctx``. The tensors are as its operators order them."""
    stem, device_type, backend, params, grad_params, reduction, scale, recompute, watched = call
    wrt = ctx.needs_input_grad[:2]
    kept = (student, teacher, *tensors)
    if not torch.compiler.is_compiling():
        for tensor in kept:
            if tensor is not None and tensor.is_inference():
                # A teacher's logits, or what was made of them, often come from torch.inference_mode(), whose
                # tensors no graph can save.
                kept = tuple(t.clone() if t is not None and t.is_inference() else t for t in kept)
                break
    # The upstream gradient that gradients are made for; None where they are not made yet.
    made_for = expected_gradient(student.shape[-1]) if watched else None if recompute else 1.0
    made: tuple[Tensor, ...]
    if made_for is None:
        loss, *made = ops.kernel(LOSS_OPS[stem].forward, device_type, backend)(
            student, teacher, *tensors, *params, reduction, scale
        )
    elif watched:
        loss, *made = ops.kernel("softmax_kl_forward_backward", device_type, backend)(
            student, teacher, *tensors, *params, scale, made_for, *wrt
        )
    else:
        loss, *made = ops.kernel(LOSS_OPS[stem].forward_grad, device_type, backend)(
            student, teacher, *tensors, *params, *grad_params, reduction, scale, *wrt
        )
    ctx.save_for_backward(*kept, *made)
    ctx.call, ctx.made_for = call, made_for
    if made_for is not None:
        ctx.is_ours = torch.compiler.is_compiling() or _saved_tensors_hooks(False) is None
    return loss


def fused_backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by student and teacher of a fused loss; by its other arguments, None."""
    stem, device_type, backend, params, grad_params, reduction, scale, _, watched = ctx.call
    made_for, saved = ctx.made_for, ctx.saved_tensors
    wrt = ctx.needs_input_grad
    wrt_student, wrt_teacher, *others = wrt
    wrt = wrt[:2]
    compiling = torch.compiler.is_compiling()
    recorded = not compiling and torch.is_grad_enabled()
    traced = not compiling and (type(grad_loss) is not Tensor or _modes() != 0)
    # Whether nobody will ask for the saved gradients again.
    once = not (compiling or recorded or traced or _keeps_graph() or _is_batched(grad_loss))
    # Looked at only where that waits for no device.
    if once and device_type == "cpu" and reduction == 1 and (watched or made_for is not None):
        met = grad_loss.item()
        if watched:
            meet_gradient(saved[0].shape[-1], met)
        if met == made_for:
            return (
                saved[-2] if wrt_student else None,
                saved[-1] if wrt_teacher else None,
                *(None,) * len(others),
            )
    if recorded:  # See Note [Second derivatives].
        tensors = saved[:-1] if made_for is None else saved[:-2]
        grad_student, grad_teacher = ops.kernel(LOSS_OPS[stem].backward, device_type, "reference")(
            grad_loss, *tensors, None, *params, *grad_params, scale, *wrt
        )
    elif made_for is None or watched:
        if made_for is not None:  # something else came than was expected, or it is wanted again
            saved = saved[:-2]
            _, row_stats = ops.kernel(LOSS_OPS[stem].forward, device_type, backend)(
                *saved, *params, reduction, scale
            )
            saved = *saved, row_stats
        grad_student, grad_teacher = ops.kernel(LOSS_OPS[stem].backward, device_type, backend)(
            grad_loss.contiguous(), *saved, *params, *grad_params, scale, *wrt
        )
    else:
        row_weight, grad_student, grad_teacher = saved[-3:]
        factor = grad_loss
        if row_weight is not None:  # a row of weight 0 has gradients of 0, whatever comes from above
            factor = factor.masked_fill(row_weight == 0, 0)
        if factor.dim():
            factor = factor.unsqueeze(-1)
        if wrt_student:
            grad_student = _scaled(grad_student, factor, once and ctx.is_ours)
        if wrt_teacher:
            grad_teacher = _scaled(grad_teacher, factor, once and ctx.is_ours)
    return (
        grad_student if wrt_student else None,
        grad_teacher if wrt_teacher else None,
        *(None,) * len(others),
    )


class FusedLoss(torch.autograd.Function):
    """Any fused loss: ``apply(student, teacher, call, *tensors)``."""

    forward = staticmethod(fused_forward)
    backward = staticmethod(fused_backward)


class QuickLoss(torch.autograd.Function):
    """FusedLoss's commonest case, summed softmax_kl with gradients made in the forward, and nothing in its way.

    Not for compiled calls, nor for logits from torch.inference_mode(). See Note [Calls like one before] in
    functional/loss.py.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, call: Call, row_weight: Tensor | None) -> Tensor:
        loss, to_student, to_teacher = torch.ops.afm_kernels.softmax_kl_forward_grad.default(
            student, teacher, row_weight, *call.params, 1, call.scale, *ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(student, teacher, row_weight, to_student, to_teacher)
        ctx.call, ctx.made_for, ctx.is_ours = call, 1.0, _saved_tensors_hooks(False) is None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or _keeps_graph()
            or _is_batched(grad_loss)
            or type(grad_loss) is not Tensor
            or _modes() != 0
            or grad_loss.item() != 1
        ):
            return fused_backward(ctx, grad_loss)
        *_, to_student, to_teacher = ctx.saved_tensors
        wrt_student, wrt_teacher, *_ = ctx.needs_input_grad
        return to_student if wrt_student else None, to_teacher if wrt_teacher else None, None, None


class QuickRecompute(torch.autograd.Function):
    """As QuickLoss, with gradients made in the backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, call: Call, row_weight: Tensor | None) -> Tensor:
        loss, row_stats = torch.ops.afm_kernels.softmax_kl_forward.default(
            student, teacher, row_weight, *call.params, 1, call.scale
        )
        ctx.save_for_backward(student, teacher, row_weight, row_stats)
        ctx.call, ctx.made_for = call, None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return fused_backward(ctx, grad_loss)
        call = ctx.call
        wrt_student, wrt_teacher, *_ = ctx.needs_input_grad
        to_student, to_teacher = torch.ops.afm_kernels.softmax_kl_backward.default(
            grad_loss, *ctx.saved_tensors, *call.params, call.scale, wrt_student, wrt_teacher
        )
        return to_student if wrt_student else None, to_teacher if wrt_teacher else None, None, None


def _scaled(grad: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    # In place where nobody will ask for the saved gradient again: out of place costs fresh pages and a pass
    # more.
    return grad.mul_(factor) if in_place else (grad * factor).to(grad.dtype)


class TransformedLoss(torch.autograd.Function):
    """Any fused loss under a torch.func transform, called as FusedLoss. See Note [Two kinds of Function]."""

    @staticmethod
    def forward(call: Call, student: Tensor, teacher: Tensor, *tensors: Tensor | None) -> Tensor:
        loss, _ = ops.kernel(LOSS_OPS[call.stem].forward, call.device_type, call.backend)(
            student, teacher, *tensors, *call.params, call.reduction, call.scale
        )
        return loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        wrt = ctx.needs_input_grad
        grads = ops.kernel(LOSS_OPS[call.stem].backward, call.device_type, "reference")(
            grad_loss, *ctx.saved_tensors, None, *call.params, *call.grad_params, call.scale, *wrt[1:3]
        )
        wanted = (grad if needed else None for grad, needed in zip(grads, wrt[1:3], strict=True))
        return None, *wanted, *(None,) * (len(wrt) - 3)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: Call, *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        """One call with the mapped dimension in front: rows are rows."""

        def batched(tensor: Tensor | None, in_dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            if in_dim is None:
                return tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
            return tensor.movedim(in_dim, 0)

        student, teacher, *others = (batched(t, d) for t, d in zip(tensors, in_dims[1:], strict=True))
        others = [t if t is None else t.contiguous() for t in others]
        values = TransformedLoss.apply(call._replace(reduction=0), student, teacher, *others)
        has_rows = call.reduction == 1 and values.dim() > 1  # of a single row there is nothing to sum
        return (values.flatten(1).sum(1) if has_rows else values), 0

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward_mode()


def transformed_loss(call: Call, student: Tensor, teacher: Tensor, *tensors: Tensor | None) -> Tensor:
    """A fused loss while a torch.func transform is active.

    torch.compile traces a Function around an operator under torch.func.grad to a gradient of zeros (torch
    2.13 and 2.14), so a compiled transform gets the reference without a Function: plain PyTorch,
    differentiated by PyTorch.
    """
    if not torch.compiler.is_compiling():
        return TransformedLoss.apply(call, student, teacher, *tensors)
    loss, _ = ops.kernel(LOSS_OPS[call.stem].forward, call.device_type, "reference")(
        student, teacher, *tensors, *call.params, call.reduction, call.scale
    )
    return loss
