"""A run that is killed and continued ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from advfunmatch import InputError, TrainConfig, train
from saved import same, state_of

MakeConfig = Callable[..., TrainConfig]

# Everything that has a state at once: momentum, average, scaler, augmentation, schedule, a teacher.
STATEFUL = {
    "method": "advfunmatch",
    "augment": "crop,cutout",
    "ema": 0.9,
    "schedule": "one_cycle",
    "batch_size": 50,
}


def test_killed_at_any_moment_and_continued(make_config: MakeConfig, teacher: str, tmp_path: Path) -> None:
    settings = {**STATEFUL, "teacher": teacher, "epochs": 25, "save_every": 1, "eval_every": 10}
    whole = make_config(out=tmp_path / "whole", **settings)
    train(whole)

    killed = make_config(out=tmp_path / "killed", **settings)
    flags = []
    for name in (
        "data",
        "model",
        "method",
        "teacher",
        "out",
        "epochs",
        "limit",
        "eval_limit",
        "eps",
        "steps",
    ):
        flags += [f"--{name.replace('_', '-')}", str(getattr(killed, name))]
    for name in ("augment", "ema", "schedule", "batch_size", "save_every", "eval_every"):
        flags += [f"--{name.replace('_', '-')}", str(getattr(killed, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "advfunmatch", "train", *flags], env=environment)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = torch.load(checkpoint, weights_only=True)
    assert 0 < stored["step"] < 100, "it was to be killed on the way"
    assert not (tmp_path / "killed" / "result.json").exists()

    train(make_config(out=tmp_path / "killed", resume=True, **settings))
    assert same(state_of(killed.out), state_of(whole.out))
    rows = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == list(range(1, 26))


@pytest.mark.parametrize(
    "extra", [{"swa_start": 1}, {"accumulate": 2}, {"precision": "bf16"}, {"precision": "fp16"}]
)
def test_stopped_in_the_middle_of_an_epoch(  # type: ignore[no-untyped-def]
    make_config: MakeConfig, tmp_path: Path, monkeypatch, extra
) -> None:
    import advfunmatch.run

    settings = {"method": "pgd_at", "epochs": 3, "batch_size": 50, "save_every": 2, **extra}
    whole, stopped = (
        make_config(out=tmp_path / "whole", **settings),
        make_config(out=tmp_path / "stopped", **settings),
    )
    train(whole)
    real, calls = advfunmatch.run.augmented, []

    def stops(*arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(advfunmatch.run, "augmented", stops)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"] == 6
    train(make_config(out=tmp_path / "stopped", resume=True, **settings))
    assert same(state_of(stopped.out), state_of(whole.out))


def test_resume_where_there_is_nothing_yet_starts(make_config: MakeConfig) -> None:
    config = make_config(epochs=1, resume=True)
    assert train(config)["epochs"] == 1


def test_resume_of_a_checkpoint_without_a_training_state_is_refused(make_config: MakeConfig) -> None:
    config = make_config(epochs=1)
    train(config)
    path = Path(config.out) / "checkpoint.pt"
    stored = torch.load(path, weights_only=True)
    for training in ({}, {**stored["training"], "optimizer": {}}):
        torch.save({**stored, "training": training}, path)
        with pytest.raises(InputError, match="lacks what a continued run needs"):
            train(make_config(epochs=1, resume=True))


def test_resume_of_another_run_is_refused(make_config: MakeConfig) -> None:
    train(make_config(epochs=1))
    with pytest.raises(InputError, match=r"lr is 0\.05, but the run in .* was started with 0\.1"):
        train(make_config(epochs=1, lr=0.05, resume=True))
