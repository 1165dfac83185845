"""Several processes, one batch: torchrun starts them, and each takes its share of every batch.

Note [Processes]
~~~~~~~~~~~~~~~~
A run of N processes computes what one process with the same global batch computes, up to rounding:

* every process draws the whole batch, its augmentation and the attack's start, and keeps its share, so that what
  happens to an image does not depend on N (only dropout draws apart);
* batch norm in training normalises by the statistics of the whole batch;
* the loss of a share is weighted by the share's size, and gradients are summed.

There is no DistributedDataParallel wrapper: the attack's input gradients and the two forwards of some losses would each
need its hooks off. Gradients travel as one flat tensor. Process 0 measures and writes; it also says what went
wrong, since `World.together` makes an error of one process the error of all.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError, ProcessLost

SYNCHRONISED = (nn.BatchNorm1d, nn.BatchNorm2d)  # what `synchronise_batch_norm` can
PATIENCE = timedelta(hours=2)  # the others wait that long while process 0 evaluates or writes


@dataclass(frozen=True)
class World:
    """The processes of one run; by default there is only this one."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process measures and writes."""
        return self.rank == 0

    def share(self, *batch: Tensor) -> tuple[tuple[Tensor, ...], float]:
        """This process's part of tensors with a row for each image, and its weight in the mean over the batch."""
        total = len(batch[0])
        # Too few to go round: every process does all of them, which only the unbiased variance of batch norm notices.
        if total < self.size:
            return batch, 1 / self.size
        parts = tuple(tensor.tensor_split(self.size)[self.rank] for tensor in batch)
        return parts, len(parts[0]) / total

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        _all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end of the block until all are there; an InputError of one process is raised in all."""
        if self.size == 1:
            yield
            return
        sentence = None
        try:
            yield
        except InputError as error:
            sentence = str(error)
        sentences: list[str | None] = [None] * self.size
        _collectively(lambda: dist.all_gather_object(sentences, sentence))
        for found in sentences:
            if found is not None:
                raise InputError(found)

    def require_alike(self, digests: Mapping[str, str]) -> None:
        """InputError where processes were given different things, as objects made without a seed are."""
        found: list[Mapping[str, str]] = [{}] * self.size
        _collectively(lambda: dist.all_gather_object(found, dict(digests)))
        for name in digests:
            if len({each.get(name) for each in found}) > 1:
                raise InputError(
                    f"{name} of the {self.size} processes differ; what is made in Python must be made alike in each, "
                    "with a seed of its own"
                )


def join_world(device: torch.device) -> tuple[World, torch.device]:
    """The processes that torchrun started, and this one's device; NCCL between GPUs, gloo between CPUs."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(), device
    if device.type == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise InputError(
                f"processes (nproc-per-node) is {here}, but this machine has {gpus} GPUs, one for each process"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # A module whose functions take the group of all processes as a default argument. Imported later (by dynamo, for
        # one), it would keep the group and its threads alive beyond `leave_world`, and a thread of gloo's that lets go
        # of its last tensor while the interpreter ends aborts the process.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return World(dist.get_rank(), size), device


def leave_world() -> None:
    """Part from the other processes at the end of a run."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def synchronise_batch_norm(model: nn.Module, name: str) -> None:
    """Let the batch-norm layers of a model normalise by the statistics of all processes' batches, in place.

    Raises:
        InputError: a layer has its own way of normalising; `name` is what the model is called.
    """
    for module in model.modules():
        if type(module) in SYNCHRONISED:
            # Only its forward changes: parameters, names and the optimizer's references stay.
            module.plain_class = type(module)  # type: ignore[assignment]
            module.__class__ = SynchronisedBatchNorm
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"model is {name!r}, whose {type(module).__name__} cannot be synchronised over several processes"
            )


def plain_batch_norm(model: nn.Module) -> None:
    """Undo `synchronise_batch_norm`."""
    for module in model.modules():
        if type(module) is SynchronisedBatchNorm:
            module.__class__ = module.__dict__.pop("plain_class")


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes; unlike torch.nn.SyncBatchNorm it also works on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        others = [d for d in range(x.dim()) if d != 1]
        per_channel = (1, -1, *[1] * (x.dim() - 2))
        count = wide.new_full((1,), wide.numel() / wide.shape[1])
        # Two passes: Σx² − (Σx)²/n would cancel.
        sums = _Sum.apply(torch.cat([wide.sum(others), count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = wide - mean.view(per_channel)
        variance = _Sum.apply(centred.square().sum(others)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        out = centred * scale.view(per_channel)
        if self.bias is not None:
            out = out + self.bias.view(per_channel)
        return out.to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Images and rows of features alike."""

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


class _Sum(torch.autograd.Function):
    """The sum over processes. Every process uses it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _all_reduce(value.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduce(gradient.clone(memory_format=torch.contiguous_format))


def _all_reduce(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    _collectively(lambda: dist.all_reduce(tensor))
    return tensor


def _collectively(exchange: Callable[[], Any]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        raise ProcessLost("another process of this run has ended") from error
