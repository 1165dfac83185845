"""Logits that several processes share: DTensors whose rows are sharded, each shard by the process that has it.

Rows are independent, so a shard needs nothing of the others: row values and gradients stay where their rows are, and a
sum or a mean takes one all-reduce of one number, whose backward is nothing at all. Not served, each with its sentence:
logits sharded over their classes, partial sums, and a DTensor beside a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afm_kernels.functional.checks import REDUCTIONS, check_choice, check_integer


def is_sharded(*tensors: Any) -> bool:
    """Whether one of them is a DTensor; asked of the type, since importing DTensor takes half a second."""
    return any(type(tensor) is not Tensor and hasattr(type(tensor), "device_mesh") for tensor in tensors)


class RowShards(NamedTuple):
    """How the rows of logits are spread over a mesh."""

    mesh: Any
    placements: tuple[Any, ...]  # of the logits, and of the rows
    row_placements: tuple[Any, ...]
    rows: torch.Size
    num_classes: int

    def local(self, name: str, value: Tensor, shape: torch.Size, placements: tuple[Any, ...]) -> Tensor:
        """This process's part of a tensor that goes with the logits."""
        if not is_sharded(value):
            raise TypeError(
                f"{name} is a {type(value).__name__} and the logits are DTensors; a DTensor is expected"
            )
        sharded: Any = value
        if (
            sharded.shape != shape
            or sharded.device_mesh != self.mesh
            or tuple(sharded.placements) != placements
        ):
            raise ValueError(
                f"{name} has shape {tuple(sharded.shape)}, placed {tuple(sharded.placements)}; beside these logits "
                f"{tuple(shape)} on the same mesh, placed {placements}, is expected"
            )
        return sharded.to_local()

    def local_rows(self, name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else self.local(name, value, self.rows, self.row_placements)

    def placed_rows(self, values: Tensor) -> Tensor:
        """Row values, where their rows are."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            values,
            self.mesh,
            self.row_placements,
            run_check=False,
            shape=self.rows,
            stride=torch.empty(self.rows, device="meta").stride(),
        )

    def total(self, local_sum: Tensor, reduction: str) -> Tensor:
        """The loss over all rows, the same on every process."""
        from torch.distributed.tensor import DTensor, Replicate

        count = self.rows.numel()
        divisor = {"sum": 1, "batchmean": count, "mean": count * self.num_classes}[reduction]
        groups = [
            self.mesh.get_group(index) for index, place in enumerate(self.placements) if place.is_shard()
        ]
        loss = _SumOfShards.apply(local_sum / divisor, groups)
        return DTensor.from_local(loss, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)


class _SumOfShards(torch.autograd.Function):
    """The sum over the processes of groups. Each shard's share of it has the sum's own gradient."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, groups: list[Any]) -> Tensor:
        total = share.detach().clone()
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gathered(torch.autograd.Function):
    """All of a sharded parameter; its gradient is the processes' mean, sharded as it is."""

    @staticmethod
    def forward(ctx: Any, shards: Any) -> Tensor:
        ctx.mesh, ctx.placements = shards.device_mesh, tuple(shards.placements)
        return shards.full_tensor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        each = DTensor.from_local(grad, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return each.redistribute(placements=ctx.placements) / ctx.mesh.size()


def gathered(parameter: Any) -> Any:
    """A plain tensor as it is; of a DTensor, as FSDP shards parameters, all of it, once."""
    return _Gathered.apply(parameter) if parameter is not None and is_sharded(parameter) else parameter


def row_shards(student_logits: Any, teacher_logits: Any, dim: int) -> RowShards:
    """Checks that logits are DTensors whose rows alone are sharded, and alike on both sides."""
    for name, value, other in (
        ("student_logits", student_logits, "teacher_logits"),
        ("teacher_logits", teacher_logits, "student_logits"),
    ):
        if not is_sharded(value):
            raise TypeError(
                f"{name} is a {type(value).__name__} and {other} a DTensor; both must be DTensors, or neither"
            )
    dims = student_logits.ndim
    dim = check_integer("dim", dim)
    if not -dims <= dim < dims:
        raise ValueError(f"dim is {dim}; allowed: {-dims} to {dims - 1} for {dims} dimensions")
    dim %= dims
    for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        for place in value.placements:
            if place.is_shard() and place.dim % value.ndim == dim:
                raise ValueError(
                    f"{name} is sharded over its classes ({place!r}); logits whose classes are sharded need group=, "
                    "which is not built yet: redistribute them over rows"
                )
            if type(place).__name__ not in ("Shard", "Replicate"):
                raise ValueError(
                    f"{name} has the placement {place!r}; allowed: Shard over a dimension of the rows, and Replicate"
                )
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher_logits.shape)} and student_logits "
            f"{tuple(student_logits.shape)}; they must be equal"
        )
    placements = tuple(student_logits.placements)
    if (
        teacher_logits.device_mesh != student_logits.device_mesh
        or tuple(teacher_logits.placements) != placements
    ):
        raise ValueError(
            f"teacher_logits is placed {tuple(teacher_logits.placements)} on {teacher_logits.device_mesh} and "
            f"student_logits {placements} on {student_logits.device_mesh}; they must be placed alike"
        )
    shape = student_logits.shape
    return RowShards(
        student_logits.device_mesh,
        placements,
        tuple(
            type(place)(place.dim % dims - (place.dim % dims > dim)) if place.is_shard() else place
            for place in placements
        ),
        shape[:dim] + shape[dim + 1 :],
        shape[dim],
    )


def sharded_loss(
    loss: Callable[..., Tensor],
    student_logits: Any,
    teacher_logits: Any,
    dim: int,
    reduction: str,
    rows: dict[str, Tensor | None],
    **options: Any,
) -> Tensor:
    """``loss`` of DTensors; ``rows`` are its tensors with a value for each row, ``options`` its other arguments."""
    shards = row_shards(student_logits, teacher_logits, dim)
    check_choice("reduction", reduction, REDUCTIONS)
    values = loss(
        student_logits.to_local(),
        teacher_logits.to_local(),
        dim=dim,
        reduction="none" if reduction == "none" else "sum",
        **{name: shards.local_rows(name, value) for name, value in rows.items()},
        **options,
    )
    return shards.placed_rows(values) if reduction == "none" else shards.total(values, reduction)


def sharded_gradients(
    gradients: Callable[..., tuple[Tensor, ...]],
    student_logits: Any,
    teacher_logits: Any,
    dim: int,
    row_weight: Tensor | None,
    out: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    """``softmax_kl_div_grad`` of DTensors."""
    from torch.distributed.tensor import DTensor

    shards = row_shards(student_logits, teacher_logits, dim)
    local_out = out
    if isinstance(out, (tuple, list)):
        shape = student_logits.shape
        local_out = [shards.local("out", tensor, shape, shards.placements) for tensor in out]
    made = gradients(
        student_logits.to_local(),
        teacher_logits.to_local(),
        dim=dim,
        row_weight=shards.local_rows("row_weight", row_weight),
        out=local_out,
        **options,
    )
    if out is not None:
        return tuple(out)
    shape, stride = student_logits.shape, student_logits.stride()
    return tuple(
        DTensor.from_local(grad, shards.mesh, shards.placements, run_check=False, shape=shape, stride=stride)
        for grad in made
    )
