"""What a method adds to the settings: its defaults, which settings it looks at, and which do not go with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import TrainConfig, complete_with, default_settings
from ..data.augment import MIXING, parse_augmentation
from ..errors import InputError
from .method import FALLBACKS, METHODS, get_method


def fill_in_defaults(config: TrainConfig) -> TrainConfig:
    """The configuration with the method's value for each setting that was left to it, and all of its own settings.

    Raises:
        InputError: there is no such method, or a setting of its own is none or cannot be.
    """
    method = get_method(config.method)
    filled: dict[str, Any] = {}
    for name, fallback in FALLBACKS.items():
        if getattr(config, name) is None:
            filled[name] = method.defaults[name].value if name in method.defaults else fallback
    return replace(config, settings=method.own_settings(config.settings or {}), **filled)


def check_with_method(config: TrainConfig) -> None:
    """InputError for settings that do not go with the method."""
    method = get_method(config.method)
    for name in parse_augmentation(config.augment):
        if name in MIXING and method.needs_labels:
            raise InputError(
                f"augment {name!r} mixes images, which leaves no label that method {config.method!r} could use; "
                "it goes with "
                + ", ".join(other.name for other in METHODS.values() if not other.needs_labels)
            )
    if config.reduction == "sum" and config.accumulate > 1 and "reduction" not in method.unused:
        raise InputError(
            f"reduction is 'sum', but accumulate = {config.accumulate} batches need a mean: batchmean or mean"
        )
    if method.needs_teacher and config.teacher is None:
        raise InputError(f"method {config.method!r} matches a teacher, so teacher must name a checkpoint")


def unused_settings(config: TrainConfig) -> list[str]:
    """Settings of a resolved configuration that were changed, and that its method never looks at."""
    unused = get_method(config.method).unused
    defaults = default_settings()
    usual = replace(config, **{name: defaults[name] for name in unused}).resolve()
    return [name for name in unused if getattr(config, name) != getattr(usual, name)]


complete_with(fill_in_defaults, check_with_method)
