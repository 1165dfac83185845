"""One row of an evaluation: what an attack returns is checked, and counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageDataset
from ..errors import InputError
from .attacks import Attack, Attacked
from .autoattack_official import warnings_of_autoattack
from .balls import Ball
from .fidelity import zero_gradient_warnings
from .networks import logits_on, percent
from .results import Figure, packed
from .stored import EvaluationFile


@dataclass(frozen=True)
class Measuring:
    """What every row of one evaluation shares."""

    model: nn.Module
    teacher: nn.Module | None
    data: ImageDataset
    images: Tensor
    seed: int
    batch_size: int
    shared: bool = False
    file: EvaluationFile | None = None


def measure(
    attack: Attack, ball: Ball | None, measuring: Measuring, progress: Callable[[int], None]
) -> Figure:
    """One row."""
    started = time.perf_counter()
    labels, images = measuring.data.labels, len(measuring.data)
    said: list[str] = []
    with warnings_of_autoattack(said):
        attacked = run(attack, ball, measuring, progress)
    said += attacked.warnings
    said += zero_gradient_warnings(attack.label, ball, attacked.zero_gradients, images)
    logits = logits_on(measuring.model, attacked.images, measuring.batch_size)
    if broken := int((~logits.isfinite().all(1)).sum()):
        said.append(f"{attack.label}: the logits of {broken} images are not finite")
    correct = logits.argmax(1) == labels
    names = measuring.data.class_names
    distances = None if attack.source else attacked.distances  # to the source's boundary
    near = None if distances is None else distances[(distances > 0) & distances.isfinite()]
    return Figure(
        attack=attack.label,
        norm=ball.norm if ball else None,
        eps=ball.eps if ball else None,
        accuracy=percent(correct),
        per_class={names[label]: percent(correct[labels == label]) for label in labels.unique().tolist()},
        seconds=round(time.perf_counter() - started, 3),
        zero_gradients=attacked.zero_gradients,
        standing=packed(correct),
        warnings=list(dict.fromkeys(said)),
        found=None if near is None else len(near),
        distance=None if near is None or not len(near) else float(near.double().quantile(0.5)),
        source=attack.source or None,
        stages=list(attacked.stages),
    )


def label_in(attack: Attack, ball: Ball | None) -> str:
    """What a row is called where it is not the only one of its attack."""
    return f"{attack.label}, {ball}" if ball else attack.label


def run(attack: Attack, ball: Ball | None, measuring: Measuring, progress: Callable[[int], None]) -> Attacked:
    """The attacked images, all at once or a batch at a time; see Note [Attack functions].

    Raises:
        InputError: what came back are no images of the ball.
    """
    x, y = measuring.images, measuring.data.labels
    x = x.clone() if x.is_inference() else x
    named, network = attack.parameters, measuring.model if attack.network is None else attack.network
    offered: dict[str, Any] = {"teacher": measuring.teacher, "batch_size": measuring.batch_size}
    offered |= {"shared": measuring.shared}
    whole = "batch_size" in named
    offered["state"] = measuring.file.state_of(label_in(attack, ball)) if whole and measuring.file else None
    offered |= {"eps": ball.eps, "norm": ball.norm} if ball else {}
    handed = {name: value for name, value in offered.items() if name in named}
    size = len(x) if whole else measuring.batch_size
    parts: list[Tensor] = []
    distances: list[Tensor] = []
    said: list[str] = []
    stages: list[dict[str, Any]] = []
    zero_gradients = 0
    # An attack may draw from PyTorch's default generators, and needs autograd, whoever calls.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=devices):
        for index, (x_part, y_part) in enumerate(zip(x.split(size), y.split(size), strict=True)):
            first, seed = index * size, (measuring.seed + index) % 2**63
            if "seed" in named:
                handed["seed"] = seed
            if "progress" in named:
                handed["progress"] = lambda count, first=first: progress(first + count)
            torch.manual_seed(seed)
            found = attack.function(network, x_part, y_part, **attack.settings, **handed)
            found = found if isinstance(found, Attacked) else Attacked(found)
            zero_gradients += found.zero_gradients
            said += found.warnings
            stages += found.stages
            parts.append(_checked_images(found.images, x_part, ball, attack.label))
            if found.distances is not None:
                distances.append(_checked_distances(found.distances, x_part, attack.label))
            progress(first + len(x_part))
    return Attacked(
        torch.cat(parts), zero_gradients, torch.cat(distances) if distances else None, said, stages
    )


def _checked_distances(distances: Any, x: Tensor, label: str) -> Tensor:
    """InputError for what cannot be one distance for each image."""
    if (
        not isinstance(distances, Tensor)
        or distances.shape != x.shape[:1]
        or not bool((distances >= 0).all())
    ):
        raise InputError(f"attack {label!r} must return distances of shape ({len(x)},), none below 0 or NaN")
    return distances.detach()


def _checked_images(x_adv: Any, x: Tensor, ball: Ball | None, label: str) -> Tensor:
    """InputError for what is no image of the ball: its figure would be one of another ball, or of none."""
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape or not x_adv.is_floating_point():
        got = (
            f"{x_adv.dtype} of shape {tuple(x_adv.shape)}"
            if isinstance(x_adv, Tensor)
            else type(x_adv).__name__
        )
        raise InputError(
            f"attack {label!r} returned {got}, but must return {x.dtype} of shape {tuple(x.shape)}"
        )
    x_adv = x_adv.detach().to(x)
    if not bool(x_adv.isfinite().all()):
        raise InputError(f"attack {label!r} returned images that are not finite")
    if ball is None:
        return x_adv
    change = (x_adv - x).flatten(1)
    reach = float((change.abs().amax(1) if ball.norm == "linf" else change.norm(dim=1)).max())
    if reach > ball.eps * (1 + 1e-4) + 1e-5:
        raise InputError(
            f"attack {label!r} moved an image by {reach:.5g} in {ball.norm}, but eps is {ball.eps:.5g}"
        )
    low, high = (float(bound) for bound in x_adv.aminmax())
    slack = 1e-5
    if low < min(0.0, float(x.min())) - slack or high > max(1.0, float(x.max())) + slack:
        raise InputError(
            f"attack {label!r} returned values from {low:.5g} to {high:.5g}, but images lie in [0, 1]"
        )
    return x_adv
