"""Adversarial weight perturbation (Wu, Xia and Wang, 2020): the loss is taken at the worst weights nearby.

Each weight of two or more dimensions moves along the gradient of the loss by `gamma` times its own norm; the step is
taken with the gradient found there, and the move is undone after it, as in csdongxian/AWP. Its proxy network is a
copy there; here a functional call leaves the student's batch-norm statistics alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .distributed import World

TINY = 1e-20  # the official code's guard against a gradient of zero


@contextmanager
def perturbed_weights(
    student: nn.Module,
    loss_of: Callable[[Callable[[Tensor], Tensor]], Tensor],
    gamma: float,
    world: World,
) -> Iterator[None]:
    """Move the weights up the loss, and back when the block ends.

    Args:
        student: the network, in train mode.
        loss_of: this process's part of the batch's loss as a function of a student.
        gamma: length of each weight's move, relative to its norm.
        world: the processes that share the batch.
    """
    weights: list[Tensor] = [
        p
        for name, p in student.named_parameters()
        if p.requires_grad and p.dim() > 1 and name.endswith("weight")
    ]
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}

    def proxy(x: Tensor) -> Tensor:
        return functional_call(student, buffers, (x,))

    # Zeros for weights that the loss does not reach, which then stay.
    gradients = torch.autograd.grad(loss_of(proxy), weights, materialize_grads=True)
    world.sum_(gradients)
    with torch.no_grad():
        moves = [
            gamma * weight.norm() / (gradient.norm() + TINY) * gradient
            for weight, gradient in zip(weights, gradients, strict=True)
        ]
        torch._foreach_add_(weights, moves)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_sub_(weights, moves)
