"""Learning rates as functions of the step, so that a continued run needs no state for them."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..config import SCHEDULES, TrainConfig, parse_milestones


def cosine(epoch: float, config: TrainConfig) -> float:
    """From 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))


def constant(epoch: float, config: TrainConfig) -> float:
    """1 throughout."""
    return 1.0


def one_cycle(epoch: float, config: TrainConfig) -> float:
    """Linearly from 0 to 1 over the first `peak` of the run, and back to 0 over the rest (Smith and Topin, 2018)."""
    progress = epoch / config.epochs
    return progress / config.peak if progress < config.peak else (1 - progress) / (1 - config.peak)


def piecewise(epoch: float, config: TrainConfig) -> float:
    """A tenth of what it was at each of `milestones`."""
    return 0.1 ** sum(epoch >= milestone for milestone in parse_milestones(config.milestones))


FUNCTIONS: dict[str, Callable[[float, TrainConfig], float]] = dict(
    zip(SCHEDULES, (cosine, one_cycle, piecewise, constant), strict=True)
)


def learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The learning rate of step `step`, counted from 0."""
    epoch = step / steps_per_epoch
    warm = min(1.0, (epoch + 1 / steps_per_epoch) / config.warmup_epochs) if config.warmup_epochs else 1.0
    return config.lr * warm * FUNCTIONS[config.schedule](epoch, config)
