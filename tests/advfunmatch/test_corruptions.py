"""Corrupted sets: every cell is measured on its own images, and the means are the benchmark's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from advfunmatch import InputError, create_model
from advfunmatch.cli import run
from advfunmatch.evaluation import evaluate_corruptions
from torch import nn

BLOCK = 8


class Brightness(nn.Module):
    """Says class 1 of images whose first pixel is above 100, and class 0 of others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = (255 * x[:, 0, 0, 0] > 100).float()
        return torch.stack([1 - bright, bright, *[torch.zeros_like(bright) - 1] * 8], 1)


@pytest.fixture
def corrupted(tmp_path: Path) -> str:
    """Labels are all 1. Of `fog`, 8 − s of 8 images of severity s are bright; of `snow` all; of `saturate` none."""
    bright = {"fog": lambda s: BLOCK - s, "snow": lambda s: BLOCK, "saturate": lambda s: 0}
    for name, count in bright.items():
        images = np.zeros((5 * BLOCK, 32, 32, 3), np.uint8)
        for severity in range(1, 6):
            start = (severity - 1) * BLOCK
            images[start : start + count(severity)] = 200
        np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "labels.npy", np.ones(5 * BLOCK, np.uint8))
    return f"cifar10c:{tmp_path}"


def test_cells_and_means(corrupted: str) -> None:
    measured = evaluate_corruptions(Brightness(), corrupted, eps=8 / 255)
    fog = {severity: 100 * (BLOCK - severity) / BLOCK for severity in range(1, 6)}
    assert measured.by_corruption()["fog"] == fog
    assert measured.mean(corruption="fog") == pytest.approx(100 * 5 / 8)
    assert measured.mean(corruption="saturate") == 0
    assert measured.mean(severity=2) == pytest.approx((fog[2] + 100) / 2)
    # `saturate` is published beside the benchmark, whose mean leaves it out.
    assert measured.mean() == pytest.approx((62.5 + 100) / 2)
    alone = evaluate_corruptions(Brightness(), f"{corrupted}@saturate:4", eps=8 / 255)
    assert (len(alone.cells), alone.mean()) == (1, 0)


def test_a_folder_that_is_not_whole_is_said(corrupted: str) -> None:
    """Before anything is measured where a file is wrong; after it where corruptions are missing from the mean."""
    assert (
        "over fifteen corruptions: brightness, contrast"
        in evaluate_corruptions(Brightness(), corrupted).warnings[0]
    )
    assert not evaluate_corruptions(Brightness(), f"{corrupted}@fog").warnings
    folder = Path(corrupted.partition(":")[2])
    images = np.load(folder / "snow.npy")
    told: list[str] = []
    for stored, message in (
        (images[:-1], r"snow.npy' are uint8 of shape \(39, 32, 32, 3\), but must be uint8 \(40"),
        (images.astype(np.float32), "snow.npy' are float32"),
        (images.transpose(0, 3, 1, 2), r"snow.npy' are uint8 of shape \(40, 3, 32, 32\)"),
    ):
        np.save(folder / "snow.npy", stored)
        with pytest.raises(InputError, match=message):
            evaluate_corruptions(
                Brightness(), corrupted, progress=lambda what, done, total: told.append(what)
            )
    (folder / "snow.npy").write_bytes((folder / "fog.npy").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"snow.npy' cannot be read as an array"):
        evaluate_corruptions(Brightness(), corrupted, progress=lambda what, done, total: told.append(what))
    assert told == []
    np.save(folder / "snow.npy", images)
    np.save(folder / "labels.npy", np.ones(39, np.uint8))
    with pytest.raises(InputError, match=r"has shape \(39,\), but must hold five blocks"):
        evaluate_corruptions(Brightness(), corrupted)


def test_limit_takes_the_same_images_of_every_cell(corrupted: str) -> None:
    few = evaluate_corruptions(Brightness(), corrupted, eps=8 / 255, limit=3)
    assert few.to_dict()["images"] == 3
    fog = [*few.by_corruption()["fog"].values()]
    assert fog == sorted(fog, reverse=True)


def test_cells_that_were_measured_before_a_stop_are_not_measured_again(
    corrupted: str, tmp_path: Path
) -> None:
    left, network = [4], Brightness()

    def stops(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return x

    settings = {"eps": 0.1, "out": tmp_path / "x.json"}
    with pytest.raises(KeyboardInterrupt):
        evaluate_corruptions(network, f"{corrupted}@fog", [stops], **settings)
    stored = json.loads((tmp_path / "x.json").read_text())
    assert (len(stored["cells"]), stored["complete"]) == (4, False)
    left[0] = 1
    whole = evaluate_corruptions(network, f"{corrupted}@fog", [stops], resume=True, **settings)
    assert whole.by_corruption("stops") == evaluate_corruptions(network, f"{corrupted}@fog").by_corruption()
    assert json.loads((tmp_path / "x.json").read_text())["complete"]
    with pytest.raises(InputError, match="seed was 0, and is 1"):
        evaluate_corruptions(network, f"{corrupted}@fog", [stops], resume=True, seed=1, **settings)


def test_on_the_command_line(corrupted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = create_model("small_cnn-8", num_classes=10, in_channels=3)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    command = ["evaluate", "--checkpoint", str(tmp_path / "weights.pt"), "--model", "small_cnn-8"]
    command += ["--data", corrupted, "--out", str(tmp_path / "out.json")]
    assert run(command) == 0
    stored = json.loads((tmp_path / "out.json").read_text())
    assert {*stored["corruptions"]["clean"]} == {"fog", "snow", "saturate"}
    assert {*stored["corruptions"]["clean"]["fog"]} == {"1", "2", "3", "4", "5"}
    assert "mean" in capsys.readouterr().out
    assert run([*command, "--teacher", str(tmp_path / "weights.pt"), "--teacher-model", "small_cnn-8"]) == 2
    with pytest.raises(InputError, match="corruption is 'frost', but must be one of: fog, saturate, snow"):
        evaluate_corruptions(model, f"{corrupted}@frost", eps=8 / 255)
