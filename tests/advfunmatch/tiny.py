"""The settings of runs that take half a second."""

from __future__ import annotations

from pathlib import Path

from advfunmatch import TrainConfig


def tiny_config(out: Path, **settings: object) -> TrainConfig:
    """Two epochs on 200 digits with a two-step attack."""
    values: dict[str, object] = {
        "data": "digits",
        "model": "small_cnn-4",
        "method": "ce",
        "epochs": 2,
        "limit": 200,
        "eval_limit": 60,
        "eps": 0.15,
        "steps": 2,
        "out": str(out),
    }
    return TrainConfig(**{**values, **settings})  # type: ignore[arg-type]
