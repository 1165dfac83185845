"""Accuracy against the radius, from 0 to twice as far as the figures go.

Balls lie within each other: an image that was broken in a smaller one is broken in all larger ones. So only those that
still stand are attacked again, radius after radius, and an attack that looks for the nearest adversarial image runs
once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import InputError
from .attacks import Attack, attacks_of
from .balls import Ball
from .measuring import Measuring, run
from .networks import logits_on, percent
from .results import Curve
from .rows import clean

STEPS = 8  # radii between 0, which is not counted, and twice the largest


def curve_attacks(given: object) -> list[Attack]:
    """The attacks to draw curves of: one, several, or None; InputError for one that has no radius to vary."""
    if given is None:
        return []
    attacks = attacks_of(given if isinstance(given, (list, tuple)) else [given])
    for attack in attacks:
        if attack.eps is not None:
            raise InputError(
                f"curve is {attack.label!r}, whose eps is {attack.eps:g}, but a curve has many radii"
            )
        if attack.function is clean or "eps" not in attack.parameters:
            raise InputError(
                f"curve is {attack.label!r}, which takes no eps, but must be an attack in balls, as pgd20"
            )
    return attacks


def curve_radii(balls: list[Ball]) -> list[float]:
    """From 0 to twice the largest radius, in even steps, and the balls' own."""
    largest = max(ball.eps for ball in balls)
    return sorted(
        {0.0, *(ball.eps for ball in balls), *(2 * largest * step / STEPS for step in range(1, STEPS + 1))}
    )


def measure_curve(
    attack: Attack,
    norm: str,
    radii: list[float],
    measuring: Measuring,
    known: Mapping[float, Tensor],
    progress: Callable[[int], None],
) -> Curve:
    """The share of images that stand up to an attack in each of some growing balls, the first of radius 0.

    ``known``: by radius, which images stood up to it there when the figures were measured; it is not repeated.
    """
    started = time.perf_counter()
    labels = measuring.data.labels
    standing = logits_on(measuring.model, measuring.images, measuring.batch_size).argmax(1) == labels
    accuracies = [percent(standing)]
    distances: Tensor | None = None
    for index, eps in enumerate(radii[1:]):
        rows = standing.nonzero()[:, 0]
        if eps in known and distances is None:
            standing = standing & known[eps].to(standing.device)
        elif len(rows) and distances is None:
            data = measuring.data.subset(rows)
            part = replace(measuring, images=measuring.images[rows], data=data, file=None)
            attacked = run(attack, Ball(norm, eps), part, lambda done: None)
            logits = logits_on(measuring.model, attacked.images, measuring.batch_size)
            standing[rows] = logits.argmax(1) == labels[rows]
            if attacked.distances is not None:
                distances = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
                distances[rows] = attacked.distances.double()
        if distances is not None:
            standing = distances > eps
        accuracies.append(percent(standing))
        progress(len(labels) * (index + 1) // (len(radii) - 1))
    return Curve(attack.label, norm, radii, accuracies, round(time.perf_counter() - started, 3))
