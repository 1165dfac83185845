"""A tiny trained teacher on digits, shared by the tests of training, evaluation and the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from advfunmatch import TrainConfig, train


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # threads that wait for one another cost more than these tiny networks need


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """checkpoint.pt of a small network that knows most digits."""
    out = tmp_path_factory.mktemp("teacher")
    train(tiny_config(out, method="ce", model="small_cnn-8", epochs=3, limit=None))
    return str(out / "checkpoint.pt")


def tiny_config(out: Path, **settings: object) -> TrainConfig:
    """Two epochs on 200 digits with a two-step attack: half a second."""
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


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda **settings: tiny_config(settings.pop("out", tmp_path / "run"), **settings)
