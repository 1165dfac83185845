"""A tiny trained teacher on digits, shared by the tests of training, evaluation and the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from advfunmatch import TrainConfig, train
from tiny import tiny_config


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """checkpoint.pt of a small network that knows most digits."""
    out = tmp_path_factory.mktemp("teacher")
    train(tiny_config(out, method="ce", model="small_cnn-8", epochs=3, limit=None))
    return str(out / "checkpoint.pt")


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda **settings: tiny_config(settings.pop("out", tmp_path / "run"), **settings)
