"""A run that is killed and continued ends with the bits of one that was not."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import advfunmatch.training.run
import numpy as np
import pytest
import torch
from advfunmatch import InputError, TrainConfig, load_dataset, train
from advfunmatch.cli import run
from processes import start
from saved import flags_of, same, state_of
from tiny import tiny_config

MakeConfig = Callable[..., TrainConfig]

# Everything that has a state at once: momentum, average, scaler, augmentation, schedule, a teacher.
STATEFUL = {
    "method": "advfunmatch",
    "augment": "crop,cutout",
    "ema": 0.9,
    "schedule": "one_cycle",
    "batch_size": 50,
    "save_every": 1,
    "eval_every": 2,
}


# Eight steps that each save, killed at the third: in the midst of it, with half a file written, with a whole one that
# has not replaced the old yet, and between metrics.jsonl and checkpoint.pt, which are two files.
MOMENTS = {
    "in a step": ("advfunmatch.training.run.augmented", 3),
    "while writing": ("os.fsync", 3 * 2 + 1),
    "before replacing": ("os.replace", 3 * 2 + 1),
    "between two files": ("advfunmatch.training.trainer.save_checkpoint", 3),
}


@pytest.fixture(scope="module")
def whole(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a run that nothing disturbs leaves."""
    out = tmp_path_factory.mktemp("whole")
    train(tiny_config(out, **STATEFUL, teacher=teacher))
    return state_of(out)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_and_continued(
    moment: str, whole: dict[str, object], teacher: str, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = ["train", *flags_of(tiny_config(out, **STATEFUL, teacher=teacher))]
    process = start(command, tmp_path / "said", dies=MOMENTS[moment])
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()
    assert 0 < torch.load(out / "checkpoint.pt", weights_only=True)["step"] < 8, (
        "it was to be killed on the way"
    )
    assert not (out / "result.json").exists()

    process = start([*command, "--resume"], tmp_path / "said")
    process.join(timeout=300)
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    assert same(state_of(out), whole)
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1, 2]
    assert not list(out.glob(".*")), "half a file was left behind"


@pytest.mark.parametrize(
    "extra",
    [
        {"swa_start": 1},
        {"ema": 0.9, "validation": 40, "limit": 240},
        {"accumulate": 2, "save_every": 5},  # saved at 6, where the two batches that share a step end
        {"precision": "bf16"},
        {"precision": "fp16"},
    ],
)
def test_stopped_in_the_middle_of_an_epoch(  # type: ignore[no-untyped-def]
    make_config: MakeConfig, tmp_path: Path, monkeypatch, extra
) -> None:
    settings = {"method": "pgd_at", "epochs": 3, "batch_size": 50, "save_every": 2, **extra}
    whole, stopped = (
        make_config(out=tmp_path / "whole", **settings),
        make_config(out=tmp_path / "stopped", **settings),
    )
    train(whole)
    real, calls = advfunmatch.training.run.augmented, []

    def stops(*arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(advfunmatch.training.run, "augmented", stops)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"] == 6
    best = tmp_path / "stopped" / "best.pt"
    best.unlink(missing_ok=True)  # as after a stop between its two files
    train(make_config(out=tmp_path / "stopped", resume=True, **settings))
    assert same(state_of(stopped.out), state_of(whole.out))
    assert best.exists() == ("validation" in settings)
    if best.exists():
        kept = [torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("whole", "stopped")]
        assert same(*(stored["state_dict"] for stored in kept))


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


@pytest.fixture
def digits(tmp_path: Path) -> Callable[..., str]:
    """Writes an archive of a few digits under one name, changed as asked, and returns that name."""

    def write(name: str = "x", **changes: object) -> str:
        arrays: dict[str, object] = {"class_names": np.array([str(digit) for digit in range(10)])}
        for split in ("train", "test"):
            part = load_dataset("digits", split=split, limit=60)
            arrays |= {
                f"x_{split}": part.images.numpy()[:, 0].copy(),
                f"y_{split}": part.labels.numpy().copy(),
            }
        for array, value in changes.items():
            arrays[array] = value if array == "class_names" else arrays[array]
            if array != "class_names":
                arrays[array][3] = value  # type: ignore[index]
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        return f"npz:{tmp_path / name}.npz"

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": 7}, "training images of 'npz:.*' are not those that the run in .* was started with"),
        ({"y_train": 5}, "training images of 'npz:"),
        ({"x_test": 7}, "test images of 'npz:"),
        (
            {"class_names": np.array(list("1023456789"))},
            r"classes '1', '0', .* and not '0', '1', .* started with",
        ),
    ],
)
def test_resume_with_other_data_is_refused(  # type: ignore[no-untyped-def]
    make_config: MakeConfig, digits: Callable[..., str], changes, message: str
) -> None:
    settings = {"data": digits(), "limit": None, "eval_limit": None}
    config = make_config(epochs=1, **settings)
    train(config)
    before = state_of(config.out)
    digits(**changes)
    with pytest.raises(InputError, match=message):
        train(make_config(epochs=1, resume=True, **settings))
    assert same(state_of(config.out), before)
    digits()
    assert train(make_config(epochs=1, resume=True, **settings))["epochs"] == 1


def test_resume_with_other_extra_images_is_refused(
    make_config: MakeConfig, digits: Callable[..., str]
) -> None:
    settings = {"epochs": 1, "extra_data": digits()}
    train(make_config(**settings))
    digits(x_train=7)
    with pytest.raises(InputError, match=r"extra images of 'npz:.*x\.npz' are not those"):
        train(make_config(resume=True, **settings))


def test_resume_with_another_teacher_is_refused_wherever_it_lies(
    make_config: MakeConfig, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(method="advfunmatch", teacher=teacher, epochs=1)
    train(config)
    stored = torch.load(teacher, weights_only=True)
    torch.save(stored, tmp_path / "moved.pt")
    train(make_config(method="advfunmatch", teacher=str(tmp_path / "moved.pt"), epochs=1, resume=True))
    stored["state_dict"]["fc.bias"][0] += 1e-6
    torch.save(stored, tmp_path / "moved.pt")
    before = state_of(config.out)
    with pytest.raises(
        InputError, match=r"teacher '.*moved\.pt' is not the network that the run in .* was started"
    ):
        train(make_config(method="advfunmatch", teacher=str(tmp_path / "moved.pt"), epochs=1, resume=True))
    assert same(state_of(config.out), before)

    # A student whose teacher's file has changed since says so; and a run that recorded no digests goes on.
    path = Path(config.out) / "checkpoint.pt"
    stored = torch.load(path, weights_only=True)
    torch.save({**stored, "config": {**stored["config"], "teacher": str(tmp_path / "moved.pt")}}, path)
    out = str(tmp_path / "figures.json")
    capsys.readouterr()
    command = [
        "evaluate",
        "--checkpoint",
        str(path),
        "--data",
        "digits",
        "--attacks",
        "clean",
        "--limit",
        "20",
    ]
    assert run([*command, "--fidelity", "--out", out]) == 0
    assert "moved.pt' is no longer the network that this student was trained with" in capsys.readouterr().err
    stored.pop("digests")
    stored["config"].pop("validation")  # a setting that it did not have
    torch.save(stored, path)
    train(make_config(method="advfunmatch", teacher=str(tmp_path / "moved.pt"), epochs=1, resume=True))
    assert "does not record which teacher and data it was started with" in capsys.readouterr().err
