"""What cannot be trained, augmented or learned from is found before anything is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import advfunmatch.training.run
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from advfunmatch import InputError, TrainConfig, load_dataset, train
from advfunmatch.cli import run
from advfunmatch.data.augment import MIXING, ON_STORED, POLICIES, augmented
from advfunmatch.training.distributed import World
from advfunmatch.training.trials import is_chance, require_trainable
from torch import Tensor, nn

MakeConfig = Callable[..., TrainConfig]


class FunctionalNorm(nn.Module):
    """Batch statistics that no other process hears of."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=self.training) if self.training else x


def network(norm: nn.Module, logits: int = 10) -> nn.Sequential:
    """Whose feature map is one pixel."""
    return nn.Sequential(nn.Conv2d(1, 4, 8), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4, logits))


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], None]:
    """Makes every new student that network."""

    def use(model: nn.Module) -> None:
        monkeypatch.setattr(advfunmatch.training.run, "create_model", lambda *_, **__: model)

    return use


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (network(nn.BatchNorm2d(4)), {"limit": 41, "batch_size": 20}, "a batch of one of the 41 images"),
        (network(nn.BatchNorm2d(4)), {"batch_size": 1}, "a batch of one of the 200 images"),
        (
            network(nn.BatchNorm2d(4)),
            {"limit": 61, "validation": 20, "batch_size": 20},
            "one of the 41 images",
        ),
        (network(FunctionalNorm()), {"limit": 41, "batch_size": 20}, "a batch of one of the 41 images"),
        (network(nn.InstanceNorm2d(4, track_running_stats=True)), {}, "a batch of 72 of the 200 images"),
        (network(nn.Identity(), logits=1), {}, "returns 1 logit, but at least 2 are needed"),
    ],
)
def test_networks_that_cannot_be_trained(
    make_config: MakeConfig,
    student: Callable[..., None],
    model: nn.Module,
    settings: dict[str, int],
    message: str,
) -> None:
    student(model)
    config = make_config(**settings)
    with pytest.raises(InputError, match=message):
        train(config)
    assert not Path(config.out).exists()


def test_shares_of_one_image(make_config: MakeConfig) -> None:
    data, config = load_dataset("digits", split="train", limit=22), make_config(batch_size=20)
    require_trainable(network(nn.BatchNorm2d(4)), data, config, World(0, 2))  # which normalises over both
    require_trainable(network(FunctionalNorm()), data, config, World(0, 1))
    with pytest.raises(InputError, match="a batch of 2 of the 22 images, 1 of them in a process, and"):
        require_trainable(network(FunctionalNorm()), data, config, World(0, 2))


def test_averaged_batch_norm_meets_no_batch_of_one(
    make_config: MakeConfig, student: Callable[..., None]
) -> None:
    student(network(nn.BatchNorm2d(4)))
    config = make_config(limit=41, batch_size=40, extra_data="digits", swa_start=0, epochs=1)
    assert train(config)["train_images"] == 41


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_augmentations_work_or_are_refused(make_config: MakeConfig, tmp_path: Path, channels: int) -> None:
    labels = np.arange(20) % 10
    for size in ((1, 1), (5, 3), (8, 9)):
        images = np.random.default_rng(0).integers(0, 256, (20, channels, *size), dtype=np.uint8)
        for name in (*ON_STORED, *MIXING):
            if channels in (1, 3) or name not in POLICIES:
                for seed in range(3):
                    torch.manual_seed(seed)
                    assert augmented(torch.from_numpy(images), [name]).shape == images.shape
    np.savez(tmp_path / "x.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    settings = {"data": f"npz:{tmp_path / 'x.npz'}", "limit": None, "eval_limit": None, "epochs": 1}
    for name in POLICIES if channels in (2, 4) else ():
        config = make_config(augment=f"crop,{name}", **settings)
        message = f"augment '{name}' takes images of 1 or 3 channels, but data .* has {channels}"
        with pytest.raises(InputError, match=message):
            train(config)
        assert not Path(config.out).exists()
    if channels == 4:
        assert train(make_config(augment="crop,flip,cutout", tensorboard=True, **settings))["images"] == 20


def test_the_teacher_is_measured_before_it_teaches(
    make_config: MakeConfig, teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from advfunmatch import evaluate, load_model

    settings = {"method": "funmatch", "teacher": teacher, "epochs": 1}
    config = make_config(limit=100, **settings)
    result = train(config)
    images = load_dataset("digits", split="train", limit=100)
    expected = evaluate(load_model(teacher), images, ["clean", "pgd10"], eps=0.15).accuracies
    accuracy = {**expected, "norm": "linf", "eps": 0.15, "images": 100, "warnings": []}
    assert result["teacher_accuracy"] == accuracy
    assert json.loads((Path(config.out) / "run.json").read_text())["teacher_accuracy"] == accuracy
    figures = f"clean {expected['clean']:.1f} %, PGD-10, 0.15 (linf), {expected['pgd10']:.1f} %"
    assert f"teacher: {figures} on 100 training images" in capsys.readouterr().err.splitlines()

    monkeypatch.delattr(advfunmatch.training.run, "measure_teacher")
    assert train(make_config(limit=100, resume=True, **settings))["teacher_accuracy"] == accuracy


def test_a_teacher_that_knows_nothing(
    make_config: MakeConfig, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = torch.load(teacher, weights_only=True)
    weights = {name: torch.zeros_like(value) for name, value in stored["state_dict"].items()}
    torch.save({**stored, "state_dict": weights}, tmp_path / "zero.pt")
    settings = {"method": "funmatch", "epochs": 1, "teacher": str(tmp_path / "zero.pt")}
    train(make_config(**settings))
    assert "which is no more than chance" in capsys.readouterr().err
    weights["fc.bias"][0] = 1e5  # finite, but in float16
    torch.save({**stored, "state_dict": weights}, tmp_path / "zero.pt")
    config = make_config(out=tmp_path / "other", precision="fp16", **settings)
    with pytest.raises(
        InputError, match="answers 200 of 200 training images with logits that are not finite in fp16"
    ):
        train(config)
    assert not Path(config.out).exists()


def test_what_counts_as_chance() -> None:
    even, uneven = torch.arange(10).repeat(25), torch.tensor([0] * 90 + [1] * 10)
    assert is_chance([10.0] * 10, even)
    assert is_chance([100.0] + [0.0] * 9, even)
    assert not is_chance([20.0] * 10, even)
    assert is_chance([100.0, 0.0], uneven), "90 % right, by the commonest class"
    assert not is_chance([95.0, 80.0], uneven)
    assert not is_chance([100.0], torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("tensorboard", "train --data digits --model small_cnn-4 --method ce --tensorboard"),
        ("torchvision", "train --data digits --model small_cnn-4 --method ce --augment randaugment"),
        ("pyautoattack", "evaluate --data digits --checkpoint TEACHER --attacks clean,autoattack_official"),
        ("matplotlib", "demo"),
    ],
)
def test_a_package_that_is_needed_later_is_missed_at_once(
    missing: str,
    command: str,
    teacher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    arguments = command.replace("TEACHER", teacher).split()
    assert run([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert f"{missing}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
