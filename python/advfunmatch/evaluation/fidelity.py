"""Fidelity: how far a student is from its teacher, on clean images and where in the ball it differs most."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from afm_kernels import softmax_kl_div

from ..attacks import PGDAttack
from ..lean import prepare_for_attack
from .attacks import Attacked
from .balls import Ball
from .networks import logits_on, percent
from .results import Fidelity
from .rows import run_in_batches

MISMATCH_STEPS = 20
ABOUT = f"PGD on KL(teacher ‖ student), {MISMATCH_STEPS} steps of eps/4, gaussian start, each image's best iterate"

Compared = tuple[
    Tensor, Tensor
]  # of each image, whether both networks agree on its class, and KL(teacher ‖ student)


def mismatched_examples(
    model: nn.Module, teacher: nn.Module, images: Tensor, *, eps: float, norm: str, seed: int, batch_size: int
) -> Tensor:
    """Images in the ball on which KL(teacher ‖ model) is largest, as far as PGD finds them: of each image's iterates,
    its start and itself the best."""
    return _mismatched(model, teacher, images, Ball(norm, eps), seed, batch_size, lambda done: None).images


def _mismatched(
    model: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    ball: Ball,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> Attacked:
    attack = PGDAttack(
        "mismatch",
        norm=ball.norm,
        eps=ball.eps,
        step_size=ball.eps / 4,
        steps=MISMATCH_STEPS,
        seed=seed,
    )
    networks = prepare_for_attack(model), prepare_for_attack(teacher)
    return run_in_batches(attack, networks, (images,), batch_size, progress)


def clean_fidelity(clean: Callable[[], Compared]) -> Fidelity:
    """On the images as they are, of which `clean` is what `compare` gives."""
    started = time.perf_counter()
    agrees, kl = clean()
    seconds = round(time.perf_counter() - started, 3)
    return Fidelity("clean", None, None, percent(agrees), float(kl.mean()), seconds, 0, [])


def mismatched_fidelity(
    model: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    ball: Ball,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None],
    clean: Callable[[], Compared],
) -> Fidelity:
    """On mismatched examples."""
    started = time.perf_counter()
    attacked = _mismatched(model, teacher, images, ball, seed, batch_size, progress)
    agrees, kl = compare(model, teacher, attacked.images, batch_size)
    agrees_clean, kl_clean = clean()
    # Which is best was decided by the prepared networks; by these an image itself may be better by a rounding.
    clean_is_best = kl_clean > kl
    warnings = zero_gradient_warnings("mismatched", ball, attacked.zero_gradients, len(images))
    return Fidelity(
        "mismatched",
        ball.norm,
        ball.eps,
        percent(torch.where(clean_is_best, agrees_clean, agrees)),
        float(torch.where(clean_is_best, kl_clean, kl).mean()),
        round(time.perf_counter() - started, 3),
        attacked.zero_gradients,
        warnings,
    )


def zero_gradient_warnings(what: str, ball: Ball | None, count: int, images: int) -> list[str]:
    """A sentence about images that were not attacked at all, if there are any."""
    if not count:
        return []
    return [
        f"{what}: the gradient of {count} of {images} images was exactly zero at every step, so they have not been "
        f"attacked within {ball}"
    ]


def compare(model: nn.Module, teacher: nn.Module, x: Tensor, batch_size: int) -> Compared:
    """Of each image, whether both agree on its class, and KL(teacher ‖ student) in float64."""
    ours, theirs = logits_on(model, x, batch_size), logits_on(teacher, x, batch_size)
    kl = softmax_kl_div(ours.double(), theirs.double(), reduction="none")
    return ours.argmax(1) == theirs.argmax(1), kl
