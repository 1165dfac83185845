"""Learning rates as functions of the step, so that a continued run needs no state for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainConfig


def cosine(progress: float, config: TrainConfig) -> float:
    """From 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float, config: TrainConfig) -> float:
    """1 throughout."""
    return 1.0


SCHEDULES: dict[str, Callable[[float, TrainConfig], float]] = {"cosine": cosine, "constant": constant}


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`."""
    return config.lr * SCHEDULES[config.schedule](step / total_steps, config)
