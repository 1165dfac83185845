"""The loop: what it writes, that it learns, that a seed decides everything, and what stops it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import advfunmatch.models.checkpoint
import advfunmatch.training.run
import advfunmatch.training.trainer
import pytest
import torch
from advfunmatch import InputError, TrainConfig, TrainingDiverged, load_dataset, load_model, train
from advfunmatch.methods import METHODS

MakeConfig = Callable[..., TrainConfig]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_writes_its_run(make_config: MakeConfig, teacher: str, method: str) -> None:
    needs_teacher = METHODS[method].needs_teacher
    config = make_config(method=method, teacher=teacher if needs_teacher else None)
    result = train(config)
    out = Path(config.out)
    assert json.loads((out / "result.json").read_text()) == result
    assert 0 <= result["pgd20"] <= 100
    assert ("agreement" in result) == needs_teacher
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt",
        "metrics.jsonl",
        "result.json",
        "run.json",
    ]


def test_checkpoint_says_what_it_is_and_gives_the_measured_network(make_config: MakeConfig) -> None:
    config = make_config()
    result = train(config)
    path = Path(config.out) / "checkpoint.pt"
    stored = torch.load(path, weights_only=True)
    assert stored["model"] == "small_cnn-4"
    assert (stored["num_classes"], stored["in_channels"], stored["image_size"]) == (10, 1, [8, 8])
    assert stored["config"] == result["config"]
    assert set(stored["config"]) == {field.name for field in fields(TrainConfig)}
    model = load_model(path)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    test = load_dataset("digits", split="test", limit=60)
    correct = model(test.images.float() / 255).argmax(1) == test.labels
    assert round(100 * correct.double().mean().item(), 2) == result["clean"]


def test_the_seed_decides_every_bit(make_config: MakeConfig, teacher: str, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        torch.rand(len(name))  # whatever ran before must not matter
        train(make_config(method="advfunmatch", teacher=teacher, seed=seed, out=out))
        return torch.load(out / "checkpoint.pt", weights_only=True)["state_dict"]

    first, again, other = weights("a", 3), weights("again", 3), weights("other", 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_every_image_once_an_epoch_in_changing_order() -> None:
    epochs = [
        torch.cat(list(advfunmatch.training.trainer.batches(50, 16, seed=0, epoch=epoch)))
        for epoch in range(2)
    ]
    assert all(order.sort().values.tolist() == list(range(50)) for order in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_adversarial_training_resists_attacks_that_ordinary_training_does_not(
    make_config: MakeConfig, teacher: str, tmp_path: Path
) -> None:
    settings = {
        "model": "small_cnn-8",
        "epochs": 6,
        "limit": None,
        "eval_limit": None,
        "steps": 5,
        "eps": 0.1,
    }
    ordinary = train(make_config(method="ce", out=tmp_path / "ce", **settings))
    robust = train(make_config(method="pgd_at", out=tmp_path / "at", **settings))
    assert robust["pgd20"] > ordinary["pgd20"] + 10  # 79 and 45 or so; the seed moves either by 5


def test_nan_loss_stops_and_keeps_the_last_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def loss_that_breaks(logits, config):  # type: ignore[no-untyped-def]
        calls.append(1)
        return METHODS["ce"].loss(logits, config) * (float("nan") if len(calls) == 6 else 1)

    broken = replace(METHODS["ce"], loss=loss_that_breaks)
    monkeypatch.setattr(advfunmatch.training.run, "get_method", lambda name: broken)
    config = make_config(epochs=4, batch_size=50)
    with pytest.raises(TrainingDiverged, match=r"nan at step 6 .*last good checkpoint is '.*checkpoint\.pt'"):
        train(config)
    kept = torch.load(Path(config.out) / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 1
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def loss_without_a_gradient(logits, config):  # type: ignore[no-untyped-def]
    """Cross-entropy, finite as ever, whose gradient is NaN: that of the root of a number that happens to be 0."""
    clean = logits.student_clean
    return METHODS["ce"].loss(logits, config) + (clean - clean.detach()).abs().sqrt().sum()


def test_weights_that_are_not_finite_are_not_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def loss(logits, config):  # type: ignore[no-untyped-def]
        calls.append(1)
        return (loss_without_a_gradient if len(calls) == 8 else METHODS["ce"].loss)(logits, config)

    broken = replace(METHODS["ce"], loss=loss)
    monkeypatch.setattr(advfunmatch.training.run, "get_method", lambda name: broken)
    config = make_config(epochs=3, batch_size=50)  # step 8 is the last of epoch 2
    with pytest.raises(
        TrainingDiverged, match=r"features\.0\.weight is no longer finite after step 8, .*checkpoint\.pt'"
    ):
        train(config)
    kept = torch.load(Path(config.out) / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 1
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_fp16_steps_over_an_overflow_but_not_for_ever(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(METHODS["ce"], loss=loss_without_a_gradient)
    config = make_config(epochs=4, batch_size=20, precision="fp16")
    with monkeypatch.context() as patch:
        patch.setattr(advfunmatch.training.run, "get_method", lambda name: broken)
        with pytest.raises(TrainingDiverged, match=r"fp16 gradients overflow .*; bf16 or fp32 usually helps"):
            train(config)
    kept = torch.load(Path(config.out) / "checkpoint.pt", weights_only=True)
    assert kept["training"]["scaler"]["scale"] < 1
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_full_disk_keeps_the_last_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    real, saves = os.fsync, []

    def fsync_on_a_disk_that_fills_up(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 5000:  # only the checkpoint is that large
            saves.append(1)
            if len(saves) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_on_a_disk_that_fills_up)
    config = make_config()
    with pytest.raises(
        InputError, match=r"checkpoint\.pt': No space left on device; what it held before is untouched"
    ):
        train(config)
    out = Path(config.out)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "metrics.jsonl", "run.json"]


def test_an_existing_run_is_not_replaced_unasked(make_config: MakeConfig) -> None:
    train(make_config(epochs=1))
    with pytest.raises(InputError, match=r"already holds a run; --resume .*--overwrite"):
        train(make_config(epochs=1))
    killed_while_writing = Path(make_config().out) / ".checkpoint.pt.17.partial"
    killed_while_writing.write_bytes(b"half")
    train(make_config(epochs=1, overwrite=True))
    assert not killed_while_writing.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0, but must be at least 1"),
        ({"eps": 0.0}, "eps is 0, but must be positive"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"eps": 8.0}, "eps is 8, .*try 8/255"),
        ({"step_size": -1.0}, "step_size is -1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"limit": 0}, "limit is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"method": "advfunmtch"}, "method is 'advfunmtch', but must be one of: .*advfunmatch"),
        ({"model": "resnet"}, "model is 'resnet', but must be one of: small_cnn"),
        ({"data": "cifar"}, "data is 'cifar', but must be one of: digits"),
        ({"norm": "l1"}, "norm is 'l1', but must be one of: linf, l2"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"attack_init": "normal"}, "attack_init is 'normal'"),
        ({"schedule": "piecewise"}, "milestones is empty"),
        ({"milestones": "a,b"}, "milestones is 'a,b'"),
        ({"precision": "int8"}, "precision is 'int8', but must be one of: fp32, bf16, fp16"),
        ({"ema": 0.9, "swa_start": 1}, "ema and swa_start"),
        ({"swa_start": 2}, "swa_start is 2"),
        ({"warmup_epochs": 3}, "warmup_epochs is 3, but must be from 0 to epochs = 2"),
        ({"awp": True, "awp_warmup": 2}, "awp_warmup is 2, but must be from 0 to epochs - 1 = 1"),
        ({"augment": "crop,blur"}, "augment is 'blur', but must be one of: crop, flip"),
        ({"augment": "mixup"}, "leaves no label that method 'ce' could use"),
        ({"clip_grad": 0.0}, "clip_grad is 0"),
        ({"awp": True, "accumulate": 2}, "accumulate is 2"),
        ({"resume": True, "overwrite": True}, "resume and overwrite"),
        ({"extra_data": "digit"}, "extra_data is 'digit'"),
        ({"extra_ratio": 1.0}, "extra_ratio is 1"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        (
            {"extra_data": "digits", "extra_ratio": 0.001},
            "extra_ratio is 0.001, which is 0 of batch_size = 128",
        ),
        (
            {"extra_data": "digits", "extra_ratio": 0.9, "batch_size": 1},
            "which is 1 of batch_size = 1 images",
        ),
        ({"method": "trades", "reduction": "sum", "accumulate": 2}, "accumulate = 2 batches need a mean"),
        ({"teacher_model": "resnet18"}, "teacher_model is 'resnet18', but teacher names no file"),
        ({"method": "advfunmatch"}, "matches a teacher"),
        ({"method": "advfunmatch", "teacher": ""}, "teacher is empty, but must name a checkpoint"),
        ({"teacher": "t.pt", "teacher_model": ""}, "teacher_model is empty, but must name an architecture"),
        ({"extra_data": ""}, "extra_data is empty, but must name a data set"),
        ({"method": "funmatch", "teacher": "absent.pt"}, "teacher 'absent.pt' does not exist"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(
    make_config: MakeConfig, settings: dict[str, object], message: str
) -> None:
    config = make_config(**settings)
    with pytest.raises(InputError, match=message):
        train(config)
    assert not Path(config.out).exists()


def test_teacher_of_other_data_is_refused(make_config: MakeConfig, teacher: str, tmp_path: Path) -> None:
    import numpy as np

    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 3])
    np.savez(tmp_path / "four.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    config = make_config(method="funmatch", teacher=teacher, data=f"npz:{tmp_path / 'four.npz'}")
    with pytest.raises(InputError, match=r"teacher .* has num_classes = 10, but data .* has 4"):
        train(config)
    grey_labels = np.arange(10)
    colour = np.zeros((10, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "ten.npz", x_train=colour, y_train=grey_labels, x_test=colour, y_test=grey_labels)
    config = make_config(method="funmatch", teacher=teacher, data=f"npz:{tmp_path / 'ten.npz'}")
    with pytest.raises(InputError, match=r"teacher .* has in_channels = 1, but data .* has 3"):
        train(config)
