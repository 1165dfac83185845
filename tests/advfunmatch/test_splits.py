"""The test split is for the end: what is watched while training comes from training images, held out or called that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import advfunmatch.training.results as results
import advfunmatch.training.trainer as trainer
import pytest
import torch
from advfunmatch import InputError, TrainConfig, load_dataset, load_model, train
from advfunmatch.cli import run
from advfunmatch.training.splits import hold_out
from saved import flags_of, same

MakeConfig = Callable[..., TrainConfig]


def test_held_out_images_are_fixed_by_the_seed() -> None:
    data = load_dataset("digits", split="train", limit=200)
    kept, held = hold_out(data, 50, seed=3)
    again, other = hold_out(data, 50, seed=3)[1], hold_out(data, 50, seed=4)[1]
    assert torch.equal(held.images, again.images)
    assert not torch.equal(held.images, other.images)
    rows = {image.numpy().tobytes() for image in data.images}
    both = [{image.numpy().tobytes() for image in part.images} for part in (kept, held)]
    assert (len(kept), len(held)) == (150, 50)
    assert both[0] | both[1] == rows


@pytest.mark.parametrize("validation", [None, 40])
def test_test_images_are_measured_once_at_the_end(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, validation: int | None
) -> None:
    measured, real = [], results.evaluate

    def seen(model, data, *arguments, **settings):  # type: ignore[no-untyped-def]
        measured.append(data)
        return real(model, data, *arguments, **settings)

    monkeypatch.setattr(results, "evaluate", seen)
    config = make_config(augment="crop,cutout", validation=validation, monitor_images=30)
    result = train(config)
    train_set, test_set = (load_dataset("digits", split=split) for split in ("train", "test"))
    stored = {image.numpy().tobytes() for image in train_set.images}
    *watched, last = measured[:3]
    for data in watched:
        assert len(data) == (validation or 30)
        assert {image.numpy().tobytes() for image in data.images} <= stored, "never augmented"
    assert {image.numpy().tobytes() for image in last.images} <= {
        i.numpy().tobytes() for i in test_set.images
    }
    assert result["train_images"] == 200 - (validation or 0)
    prefix = "validation" if validation else "train"
    for row in map(json.loads, (Path(config.out) / "metrics.jsonl").read_text().splitlines()):
        assert {name for name in row if name.endswith(("clean", "pgd10"))} == {
            f"{prefix}_clean",
            f"{prefix}_pgd10",
        }


def test_the_best_epoch_is_kept_beside_the_last(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, saved, save = (10.0, 30.0, 30.0, 20.0), {}, trainer.save_checkpoint

    def scripted(run, epoch):  # type: ignore[no-untyped-def]
        return {"validation_clean": 50.0 + epoch, "validation_pgd10": scores[epoch]}

    def recorded(path: Path, checkpoint: dict[str, object], *rest: object) -> None:
        save(path, checkpoint, *rest)
        saved[path.name, checkpoint["epoch"]] = torch.load(path, weights_only=True)

    config = make_config(epochs=4, validation=40, ema=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "monitor", scripted)
        patch.setattr(trainer, "save_checkpoint", recorded)
        assert run(["train", *flags_of(config)]) == 0
    out = Path(config.out)
    result = json.loads((out / "result.json").read_text())
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["epoch"] == 2
    assert same(best["state_dict"], saved["checkpoint.pt", 2]["state_dict"])
    assert {epoch for name, epoch in saved if name == "best.pt"} == {1, 2}
    watched = {"validation_clean": 51.0, "validation_pgd10": 30.0}
    assert {"epoch": 2, "checkpoint": "best.pt", **watched}.items() <= result["best"].items()
    assert result["last"] == {
        "epoch": 4,
        "checkpoint": "checkpoint.pt",
        "validation_clean": 53.0,
        "validation_pgd10": 20.0,
    }
    test = load_dataset("digits", split="test", limit=60)
    for file, figures in (("checkpoint.pt", result), ("best.pt", result["best"])):
        correct = load_model(out / file)(test.images.float() / 255).argmax(1) == test.labels
        assert figures["clean"] == round(100 * correct.double().mean().item(), 2)
        assert {"pgd20", "per_class", "settings"} <= set(figures)
    assert "best epoch, 2" in capsys.readouterr().out
    assert run(["report", str(out), "--out", str(out / "report.html")]) == 0
    page = (out / "report.html").read_text()
    assert all(f"run, {name}</td>" in page for name in ("last epoch", "best epoch: 2"))

    train(make_config(epochs=1, overwrite=True))
    assert not (out / "best.pt").exists(), "of a run that was replaced"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 0}, "validation is 0, but must be at least 1"),
        ({"validation": 200}, "validation is 200, but must leave at least one of the 200 training images"),
        ({"validation": 20, "eval_every": 0}, "eval_every is 0, so no epoch would be measured"),
    ],
)
def test_what_cannot_be_held_out(make_config: MakeConfig, settings: dict[str, int], message: str) -> None:
    config = make_config(**settings)
    with pytest.raises(InputError, match=message):
        train(config)
    assert not Path(config.out).exists()
