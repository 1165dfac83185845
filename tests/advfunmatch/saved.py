"""What a run left behind, to compare runs by; and its settings as flags, to start it elsewhere."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from advfunmatch import TrainConfig
from advfunmatch.config import default_settings


def same(first: object, second: object) -> bool:
    """Whether two nested checkpoints are equal to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)  # type: ignore[arg-type]
    if isinstance(first, dict):
        return set(first) == set(second) and all(same(first[k], second[k]) for k in first)  # type: ignore[call-overload, index]
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))  # type: ignore[arg-type, call-overload]
    return first == second


def state_of(out: str | Path) -> dict[str, object]:
    """What the last checkpoint holds, but for the time it took and the folder's name."""
    stored = torch.load(Path(out) / "checkpoint.pt", weights_only=True)
    kept = {name: stored[name] for name in ("state_dict", "step", "epoch", "training")}
    kept["training"].pop("seconds")
    for row in kept["training"]["metrics"]:
        row.pop("seconds")
        row.pop("images_per_second")
    return kept


def flags_of(config: TrainConfig) -> list[str]:
    """The command line's flags for whatever a configuration has beside its defaults."""
    flags, defaults = [], default_settings()
    for field in fields(config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if field.name == "settings":
            flags += [part for name, given in (value or {}).items() for part in ("--set", f"{name}={given}")]
        elif value is True:
            flags.append(flag)
        elif value is not None and value != defaults[field.name]:
            flags += [flag, str(value)]
    return flags
