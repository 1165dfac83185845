"""Attacks that look for the nearest adversarial image, as rows of an evaluation.

An image is broken where the nearest that was found lies in the ball; elsewhere the clean image is returned. How far the
nearest are is known whatever the ball is, and stands beside the accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import Nearest, carlini_wagner, carlini_wagner_linf, lbfgs
from ..errors import InputError
from .attacks import Attacked

Progress = Callable[[int], None]


def carlini_wagner_row(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str,
    batch_size: int,
    progress: Progress,
    confidence: float | None = None,
    learning_rate: float | None = None,
    search_steps: int | None = None,
    steps: int | None = None,
    initial_const: float | None = None,
    abort_early: bool | None = None,
    largest_const: float | None = None,
    decrease_factor: float | None = None,
) -> Attacked:
    """The attack of Carlini and Wagner (2017) in the ball's norm, with its published settings where none are given.

    Args:
        model, x, y, eps, norm, batch_size, progress: see Note [Attack functions].
        learning_rate, steps, initial_const: as for `advfunmatch.attacks.carlini_wagner`, or ``carlini_wagner_linf``.
        confidence, search_steps, abort_early: of the l2 form alone.
        largest_const, decrease_factor: of the linf form alone.
    """
    common = {"learning_rate": learning_rate, "steps": steps, "initial_const": initial_const}
    of_l2 = {"confidence": confidence, "search_steps": search_steps, "abort_early": abort_early}
    of_linf = {"largest_const": largest_const, "decrease_factor": decrease_factor}
    own, others = (of_linf, of_l2) if norm == "linf" else (of_l2, of_linf)
    for name, value in others.items():
        if value is not None:
            raise InputError(
                f"{name} of attack 'carlini_wagner' is {value}, but its {norm} form has none; it has "
                f"{', '.join([*common, *own])}"
            )
    given = {name: value for name, value in (common | own).items() if value is not None}
    find = carlini_wagner_linf if norm == "linf" else carlini_wagner
    return _in_ball("carlini_wagner", find, given, model, (x, y), eps, batch_size, progress)


def lbfgs_row(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str,
    batch_size: int,
    progress: Progress,
    targets: int = 1,
    search_steps: int = 9,
    steps: int = 100,
    initial_const: float = 1.0,
) -> Attacked:
    """Box-constrained L-BFGS towards another class (Szegedy et al. 2014).

    Args:
        model, x, y, eps, norm, batch_size, progress: see Note [Attack functions].
        targets, search_steps, steps, initial_const: as for `advfunmatch.attacks.lbfgs`.
    """
    given = {"norm": norm, "targets": targets, "search_steps": search_steps, "steps": steps}
    given |= {"initial_const": initial_const}
    return _in_ball("lbfgs", lbfgs, given, model, (x, y), eps, batch_size, progress)


def _in_ball(
    name: str,
    find: Callable[..., Nearest],
    settings: dict[str, Any],
    model: nn.Module,
    tensors: tuple[Tensor, Tensor],
    eps: float,
    batch_size: int,
    progress: Progress,
) -> Attacked:
    """What an attack finds, a batch at a time, with the clean image where that is outside the ball."""
    images, distances, zero_gradients, done = [], [], 0, 0
    for x, y in zip(*(tensor.split(batch_size) for tensor in tensors), strict=True):
        try:
            found = find(
                model, x, y, **settings, progress=lambda count, before=done: progress(before + count)
            )
        except (ValueError, TypeError) as error:
            raise InputError(f"attack {name!r}: {error}") from error
        images.append(found.within(x, eps))
        distances.append(found.distances)
        zero_gradients += found.zero_gradients
        done += len(x)
        progress(done)
    return Attacked(torch.cat(images), zero_gradients, distances=torch.cat(distances))
