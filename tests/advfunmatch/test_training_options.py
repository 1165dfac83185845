"""Schedules, averages, accumulation, precision, augmentation, extra data: each does what its name says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import advfunmatch.training.run
import advfunmatch.training.trainer
import numpy as np
import pytest
import torch
from advfunmatch import InputError, TrainConfig, train
from advfunmatch.cli import run
from advfunmatch.config import config_from, read_settings
from advfunmatch.data.augment import MIXING, ON_STORED, augmented, parse_augmentation
from advfunmatch.methods import unused_settings
from advfunmatch.methods.presets import PRESETS
from advfunmatch.progress import ProgressBar
from advfunmatch.training.averaging import WeightAverage, refresh_batch_norm
from advfunmatch.training.schedule import learning_rate
from saved import same
from torch import nn

MakeConfig = Callable[..., TrainConfig]


def rates(steps_per_epoch: int = 10, **settings: object) -> list[float]:
    config = TrainConfig(data="", model="", method="ce", out="", epochs=10, lr=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, steps_per_epoch, config) for step in range(10 * steps_per_epoch)]


def test_cosine() -> None:
    assert rates()[0] == 1
    assert rates()[50] == pytest.approx(0.5)
    assert rates()[-1] < 1e-3


def test_one_cycle_rises_then_falls() -> None:
    values = rates(schedule="one_cycle", peak=0.3)
    assert values[0] == 0
    assert values[30] == max(values) == 1
    assert values[15] == pytest.approx(0.5)
    assert values[65] == pytest.approx(0.5)


def test_piecewise_divides_by_ten() -> None:
    values = rates(schedule="piecewise", milestones="4,8")
    assert (values[39], values[40], values[80]) == pytest.approx((1, 0.1, 0.01))


def test_warm_up_is_linear() -> None:
    values = rates(schedule="constant", warmup_epochs=2)
    assert values[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert values[20] == 1


def test_exponential_average_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average, expected = WeightAverage(model, decay=0.9), None
    for _ in range(4):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update(model)
        expected = (
            model.weight.detach().clone()
            if expected is None
            else 0.9 * expected + 0.1 * model.weight.detach()
        )
    torch.testing.assert_close(average.model.weight, expected)


def test_equal_average_by_hand_and_batch_norm_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2))
    average, seen = WeightAverage(model, decay=None), []
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 1, 1, 1))
        average.update(model)
        seen.append(model[0].weight.detach().clone())
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(average.model[0].weight, mean)
    batches = [torch.rand(8, 1, 4, 4) for _ in range(3)]
    refresh_batch_norm(average.model, batches)
    expected = (torch.cat(batches) * mean.view(1, 2, 1, 1)).mean((0, 2, 3))
    torch.testing.assert_close(average.model[1].running_mean, expected)
    assert not average.model.training


@pytest.mark.parametrize("settings", [{"ema": 0.5}, {"swa_start": 0}])
def test_the_average_is_what_is_saved(make_config: MakeConfig, settings: dict[str, object]) -> None:
    config = make_config(**settings)
    train(config)
    stored = torch.load(Path(config.out) / "checkpoint.pt", weights_only=True)
    assert not torch.equal(stored["state_dict"]["fc.weight"], stored["training"]["student"]["fc.weight"])


class WithoutBatchNorm(nn.Module):
    """Whose gradient of a batch is the mean over its images, so that batches can be split."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def test_accumulated_batches_equal_one_large_batch(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(advfunmatch.training.run, "create_model", lambda *_, **__: WithoutBatchNorm())
    settings = {"schedule": "constant", "epochs": 3, "clip_grad": 0.5}
    train(make_config(out=tmp_path / "large", batch_size=120, **settings))
    train(make_config(out=tmp_path / "small", batch_size=30, accumulate=4, **settings))  # 4·30, 2·30 + 20
    large, small = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state_dict"]["fc.weight"]
        for name in ("large", "small")
    )
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"precision": "bf16", "channels_last": True},
        {"precision": "fp16"},
        {"channels_last": True},
        {"lean": False},
        {"attack_bn": "train"},
        {"attack_bn": "batch"},
        {"norm": "l2", "eps": 0.5},
        {"awp": True, "awp_warmup": 0, "precision": "bf16"},
        {"early_steps": 1},
        {"augment": "mixup,flip"},
    ],
)
def test_learns_with(make_config: MakeConfig, teacher: str, settings: dict[str, object]) -> None:
    config = make_config(method="advfunmatch", teacher=teacher, epochs=3, model="small_cnn-8", **settings)
    train(config)
    rows = [json.loads(row) for row in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert rows[2]["loss"] < 0.8 * rows[0]["loss"]


def test_prepared_networks_change_the_attack_by_rounding_only(
    make_config: MakeConfig, teacher: str, tmp_path: Path
) -> None:
    settings = {"method": "advfunmatch", "teacher": teacher, "epochs": 1, "limit": 128}
    weights = []
    for lean in (True, False):
        train(make_config(out=tmp_path / str(lean), lean=lean, **settings))
        stored = torch.load(tmp_path / str(lean) / "checkpoint.pt", weights_only=True)
        weights.append(stored["state_dict"]["fc.weight"])
    # One step from the same start: a flipped sign moves a pixel, so this is far from bitwise.
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", [*ON_STORED, *MIXING])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_changes_images_and_keeps_their_form(name: str, channels: int) -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (8, channels, 32, 32), dtype=torch.uint8)
    torch.manual_seed(1)
    first = augmented(images, [name])
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert 0 <= first.min() <= first.max() <= 1
    assert not torch.equal(first, images / 255)
    torch.manual_seed(1)
    assert torch.equal(first, augmented(images, [name]))


def test_each_image_is_cropped_and_flipped_for_itself() -> None:
    torch.manual_seed(0)
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    for name in ("crop", "flip", "cutout"):
        views = augmented(image.repeat(64, 1, 1, 1), [name])
        assert len({view.numpy().tobytes() for view in views}) > 1, name
    flipped = augmented(image.repeat(64, 1, 1, 1), ["flip"]) * 255
    assert all(
        torch.equal(v.round(), image[0]) or torch.equal(v.round(), image[0].flip(2))
        for v in flipped.to(torch.uint8)
    )


def test_names_of_augmentations() -> None:
    assert parse_augmentation(" crop , flip,") == ["crop", "flip"]
    with pytest.raises(InputError, match="augment is 'rotate', but must be one of: crop"):
        parse_augmentation("crop,rotate")


def test_extra_images_are_mixed_in_at_the_ratio(
    make_config: MakeConfig, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    white = np.full((40, 8, 8), 255, np.uint8)
    labels = np.arange(40) % 10
    np.savez(tmp_path / "white.npz", x_train=white, y_train=labels, x_test=white, y_test=labels)
    shares, real = [], advfunmatch.training.run.augmented

    def counts(images, names):  # type: ignore[no-untyped-def]
        shares.append(float((images.flatten(1).float().mean(1) == 255).float().mean()))
        return real(images, names)

    monkeypatch.setattr(advfunmatch.training.run, "augmented", counts)
    extra = f"npz:{tmp_path / 'white.npz'}"
    config = make_config(
        method="funmatch", teacher=teacher, extra_data=extra, extra_ratio=0.25, batch_size=40, epochs=1
    )
    advanced: list[int] = []
    monkeypatch.setattr(ProgressBar, "advance", lambda self, images: advanced.append(images))
    result = train(config)
    assert len(shares) == 7  # 200 images at 30 a batch
    assert shares[:6] == [0.25] * 6
    assert shares[6] == pytest.approx(10 / 30)  # the last batch has 20 images of the set's, and the extra ten
    # An epoch is the set once; extra images come on top and are not counted.
    assert advanced == [30] * 6 + [20]
    assert result["train_images"] == 200


def test_config_file_and_flags_over_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: digits\nmodel: small_cnn-4\nepochs: 5\neps: 8/255\nlimit: 60\neval_limit: 20\nmilestones: [2, 4]\n"
    )
    arguments = [
        "train",
        "--preset",
        "pgd_at-cifar10",
        "--config",
        str(file),
        "--epochs",
        "1",
        "--steps",
        "2",
    ]
    assert run([*arguments, "--no-nesterov", "--out", str(tmp_path / "run")]) == 0
    stored = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    config = stored["config"]
    assert (config["method"], config["weight_decay"]) == ("pgd_at", 5e-4)  # from the preset
    assert (config["model"], config["eps"], config["milestones"]) == (
        "small_cnn-4",
        8 / 255,
        "2,4",
    )  # from the file
    assert (config["epochs"], config["steps"]) == (1, 2)  # from flags
    assert set(stored["environment"]) >= {"torch", "python", "advfunmatch", "git_commit"}


def test_a_run_is_repeated_from_its_own_record(tmp_path: Path, make_config: MakeConfig, teacher: str) -> None:
    first = make_config(method="trades", teacher=teacher, overwrite=True, lr=1e-5, epochs=1)
    train(first)
    record = Path(first.out) / "run.json"
    assert run(["train", "--config", str(record)]) == 2, "overwrite is not repeated"
    assert run(["train", "--config", str(record), "--out", str(tmp_path / "again")]) == 0
    weights = [
        torch.load(out / "checkpoint.pt", weights_only=True)["state_dict"]
        for out in (Path(first.out), tmp_path / "again")
    ]
    assert same(*weights)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete_and_in_use(name: str) -> None:
    settings = {**PRESETS[name], "data": "digits", "out": "unused", "teacher": "unused"}
    assert unused_settings(config_from(settings).resolve()) == []


def test_settings_that_the_method_does_not_use_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "train --data digits --model small_cnn-4 --method ce --epochs 1 --limit 100 --eval-limit 20 --out"
    )
    warning = "warning: method 'ce' does not use "
    out = tmp_path / "in-vain"
    assert run([*arguments.split(), str(out), "--beta", "3", "--step-size", "1/255"]) == 0
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert f"{warning}step_size = {1 / 255}, beta = 3.0\n" in said
    assert (
        run(["train", "--config", str(out / "run.json"), "--out", str(tmp_path / "again"), "--beta", "1"])
        == 0
    )
    assert f"{warning}step_size = {1 / 255}\n" in capsys.readouterr().err
    assert run([*arguments.split(), str(tmp_path / "plain")]) == 0
    assert (
        run(["train", "--config", str(tmp_path / "plain" / "run.json"), "--out", str(tmp_path / "twice")])
        == 0
    )
    assert "warning" not in capsys.readouterr().err


def test_a_configuration_in_python_takes_what_the_command_line_takes(tmp_path: Path) -> None:
    written = TrainConfig(data="digits", model="small_cnn", method="ce", out=tmp_path, eps="8/255", lr=1)  # type: ignore[arg-type]
    assert (written.resolve().eps, written.resolve().out) == (8 / 255, str(tmp_path))
    with pytest.raises(InputError, match=r"epochs is '3', but must be of type int"):
        replace(written, epochs="3").resolve()  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"epochs is .*Path\('3'\), but must be of type int"):
        replace(written, epochs=Path("3")).resolve()  # type: ignore[arg-type]


def test_none_stands_for_a_default_only_where_there_is_one(tmp_path: Path) -> None:
    written = TrainConfig(data="digits", model="small_cnn", method="ce", out=str(tmp_path))
    usual, types = written.resolve(), get_type_hints(TrainConfig)
    for name, kind in types.items():
        nothing = replace(written, **{name: None})
        if getattr(written, name) is None:  # a setting that may be left out
            assert nothing.resolve() == usual, name
        else:
            with pytest.raises(InputError, match=f"{name} is None, but must be of type {kind.__name__}"):
                nothing.resolve()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [", "cannot be read as YAML"),
        ("- epochs", "must hold lines such as"),
        ("epoch: 3", "setting is 'epoch', but must be one of: data, model"),
        ("epochs: many", "epochs is 'many', but must be of type int"),
        ("epochs: true", "epochs is True, but must be of type int"),
        ("lr: fast", "lr is 'fast', but must be a number"),
        ("awp: 1", "awp is 1, but must be of type bool"),
        ("epochs:", "epochs is None, but must be of type int"),
        ("lr:", "lr is None, but must be of type float"),
        ("eps: null", "eps is None, but must be of type float"),
        ("data: ~", "data is None, but must be of type str"),
        ("augment:", "augment is None, but must be of type str"),
        (f"lr: 1{'0' * 400}", "but must be a number"),
        ("out: 2026-13-01", "cannot be read as YAML: month must be in 1"),
        (f"out: {'[' * 3000}", "cannot be read as YAML"),
    ],
)
def test_bad_config_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        config_from(
            {"data": "", "model": "", "method": "", "out": "", **read_settings(str(tmp_path / "bad.yaml"))}
        )


def test_missing_config_file() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_settings("nowhere.yaml")


def test_tensorboard_has_every_epoch_once_after_a_stop(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def save_that_is_too_late(path: Path, checkpoint: dict[str, object], *rest: object) -> None:
        if checkpoint["epoch"] == 2:  # the second epoch is on the board already
            raise KeyboardInterrupt
        save(path, checkpoint, *rest)

    config = make_config(epochs=3, tensorboard=True)
    save = advfunmatch.training.trainer.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(advfunmatch.training.trainer, "save_checkpoint", save_that_is_too_late)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(make_config(epochs=3, tensorboard=True, resume=True))
    (log,) = (Path(config.out) / "tensorboard").iterdir()
    board = EventAccumulator(str(log)).Reload()
    rows = [json.loads(row) for row in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "train_clean"):
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        assert shown == [(row["epoch"], pytest.approx(row[name])) for row in rows]


def test_speedrun_runs(make_config: MakeConfig, teacher: str, tmp_path: Path) -> None:
    settings = {"data": "digits", "model": "small_cnn-4", "teacher": teacher, "out": str(tmp_path / "run")}
    settings |= {"epochs": 2, "limit": 600, "eval_limit": 60, "eps": 0.15, "step_size": 0.04}
    result = train(config_from({**PRESETS["speedrun"], **settings}))
    assert result["config"]["precision"] == "bf16"
    assert result["config"]["channels_last"]
    assert torch.isfinite(torch.tensor([result["clean"], result["kl_mismatched"]])).all()
