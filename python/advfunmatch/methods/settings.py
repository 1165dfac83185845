"""What a method adds to the settings: its defaults, which settings it looks at, and which do not go with it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ..config import TrainConfig, complete_with
from ..data.augment import MIXING, parse_augmentation
from ..errors import InputError
from .table import METHODS, get_method

# What a setting is when neither the user nor the method says.
FALLBACKS: dict[str, Any] = {
    "alpha": 1.0,
    "beta": 1.0,
    "begin_epoch": 0,
    "detach_target": False,
    "temperature": 1.0,
    "reduction": "batchmean",
    "scale_by_t2": False,
    "teacher_input": "adversarial",
    "teacher_gradient": True,
    "attack_init": "gaussian",
    "attack_bn": "eval",
}


def fill_in_defaults(config: TrainConfig) -> TrainConfig:
    """The configuration with the method's value for each setting that was left to it.

    Raises:
        InputError: there is no such method.
    """
    method = get_method(config.method)
    filled: dict[str, Any] = {}
    for name, fallback in FALLBACKS.items():
        if getattr(config, name) is None:
            filled[name] = method.defaults[name].value if name in method.defaults else fallback
    return replace(config, **filled)


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
    defaults: dict[str, Any] = {setting.name: setting.default for setting in fields(TrainConfig)}
    usual = replace(config, **{name: defaults[name] for name in unused}).resolve()
    return [name for name in unused if getattr(config, name) != getattr(usual, name)]


complete_with(fill_in_defaults, check_with_method)
