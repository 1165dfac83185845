"""A network's logits, and the gradients by its images: what every gradient attack asks of a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models import logits_in
from .prepared import PreparedModel
from .trace import hooks_of

__all__ = ["own_vjp", "vjp"]

Pullback = Callable[[Tensor], Tensor]


def vjp(network: nn.Module, x: Tensor) -> tuple[Tensor, Pullback]:
    """The network's logits at x, and the function that pulls gradients by the logits back to x.

    The network runs in the mode it is in; its parameters get no gradient, and an ambient ``no_grad`` or inference mode
    changes nothing.

    Args:
        network: any network of images (N, ...) to logits, or to an object that has them as ``logits``.
        x: images (N, ...), floating point. It is not changed, and needs not require a gradient.

    Returns:
        logits: (N, C, ...), without a graph, a tensor of the caller's own.
        pullback: takes the gradient by the logits, of their shape and of any floating dtype, and returns the gradient
            by x, of x's shape and dtype, a fresh tensor. It may be called several times, until the next ``vjp`` of
            the same network.

    Raises:
        TypeError: the network returns no logits.
        ValueError, from pullback: a gradient of another shape than the logits; logits that do not depend on x
            differentiably.

    Example:
        >>> net = torch.nn.Linear(3, 2)
        >>> logits, pullback = vjp(net, torch.rand(5, 3))
        >>> pullback(torch.ones(5, 2)).shape
        torch.Size([5, 3])
    """
    return own_vjp(network, x) or _by_autograd(network, x)


def own_vjp(network: nn.Module, x: Tensor) -> tuple[Tensor, Pullback] | None:
    """``vjp`` where it takes no autograd graph, for callers who would rather share one between networks otherwise."""
    if not isinstance(network, PreparedModel) or hooks_of(network):
        return None
    own = network.vjp(x)
    if own is None:
        return None
    logits, backward = own

    def pullback(grad_logits: Tensor) -> Tensor:
        _check_gradient(grad_logits, logits)
        return backward(grad_logits)

    return logits, pullback


def _by_autograd(network: nn.Module, x: Tensor) -> tuple[Tensor, Pullback]:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
        output = logits_in(network(leaf))
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{type(network).__name__} must return a tensor of logits, or an object with such logits, got "
            f"{type(output).__name__}"
        )

    def pullback(grad_logits: Tensor) -> Tensor:
        _check_gradient(grad_logits, output)
        if not output.requires_grad:
            raise ValueError(f"{type(network).__name__}'s logits do not depend on x differentiably")
        with torch.inference_mode(False):
            grad_logits = grad_logits.clone() if grad_logits.is_inference() else grad_logits.detach()
            (grad_x,) = torch.autograd.grad(
                output, leaf, grad_logits.to(output.dtype), retain_graph=True, allow_unused=True
            )
        if grad_x is None:
            raise ValueError(f"{type(network).__name__}'s logits do not depend on x differentiably")
        return grad_x

    return output.detach().clone(), pullback


def _check_gradient(grad_logits: Tensor, logits: Tensor) -> None:
    if grad_logits.shape != logits.shape:
        raise ValueError(
            f"grad_logits must have the logits' shape {tuple(logits.shape)}, got {tuple(grad_logits.shape)}"
        )
