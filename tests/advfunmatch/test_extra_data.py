"""Extra images: drawn with replacement, counted as official code counts them, their labels taken by name or left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import advfunmatch.training.run
import numpy as np
import pytest
import torch
from advfunmatch import InputError, TrainConfig, train
from advfunmatch.data import UNLABELLED, ImageDataset, as_extra_images
from advfunmatch.methods.table import METHODS
from advfunmatch.training.trainer import batches
from torch import Tensor

MakeConfig = Callable[..., TrainConfig]


def named(labels: list[int], names: tuple[str, ...]) -> ImageDataset:
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return ImageDataset("set", "train", images, torch.tensor(labels), names)


def test_labels_go_by_name_or_by_number() -> None:
    train_set = named([0, 1, 2], ("cat", "dog", "emu"))
    other_order = as_extra_images(named([0, 1, -1, 1], ("emu", "cat")), train_set)
    assert other_order.labels.tolist() == [2, 0, -1, 0]
    assert other_order.class_names == train_set.class_names
    assert as_extra_images(named([1, 0, -1], ("0", "1")), train_set).labels.tolist() == [1, 0, -1]
    with pytest.raises(
        InputError, match="extra_data 'set' has the classes 'cat', 'ant', but data 'set' has 'cat'"
    ):
        as_extra_images(named([0], ("cat", "ant")), train_set)
    with pytest.raises(InputError, match="must be the same"):
        as_extra_images(named([3], ("0", "1", "2", "3")), train_set)


def test_an_epoch_of_given_length_goes_on_from_pass_to_pass() -> None:
    order = list(batches(10, 4, seed=1, epoch=3, steps=7))
    assert [len(part) for part in order] == [4, 4, 2, 4, 4, 2, 4]
    for start in (0, 3):
        assert torch.cat(order[start : start + 3]).sort().values.tolist() == [*range(10)]
    assert torch.equal(order[0], next(batches(10, 4, seed=1, epoch=3)))
    assert not torch.equal(order[0], order[3])


@pytest.fixture
def generated(tmp_path: Path) -> str:
    """A generated set of 200 images, sorted class by class; image i is i everywhere. Classes 5 to 9 lack labels."""
    images = np.arange(200, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    labels = np.arange(200) // 20
    np.savez(tmp_path / "generated.npz", image=images, label=np.where(labels < 5, labels, UNLABELLED))
    return f"npz:{tmp_path / 'generated.npz'}"


def test_extra_images_are_drawn_from_the_whole_set(
    make_config: MakeConfig, generated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eighty of each hundred images are extra; an epoch of 500 is five such batches, as official code counts."""
    seen: list[Tensor] = []
    real = advfunmatch.training.run.augmented

    def record(images: Tensor, names: list[str]) -> Tensor:
        seen.append(images[20:, 0, 0, 0].clone())
        return real(images, names)

    monkeypatch.setattr(advfunmatch.training.run, "augmented", record)
    config = make_config(
        method="trades", extra_data=generated, extra_ratio=0.8, batch_size=100, epoch_images=500, epochs=1
    )
    result = train(config)
    assert [len(part) for part in seen] == [80] * 5
    drawn = torch.cat(seen)
    assert drawn.bincount(minlength=200).reshape(10, 20).sum(1).min() >= 15, (
        "of every class, not the first ones"
    )
    assert len(drawn.unique()) < len(drawn), "with replacement"
    row = json.loads((Path(config.out) / "metrics.jsonl").read_text().splitlines()[0])
    assert row["step"] == 5
    seconds = 500 / result["images_per_second"]
    assert seconds == pytest.approx(result["seconds"], rel=0.01, abs=0.006), "which is rounded to hundredths"


def test_images_without_label_have_no_cross_entropy(
    make_config: MakeConfig, generated: str, teacher: str, tmp_path: Path
) -> None:
    student = torch.randn(4, 10)
    labels = torch.tensor([3, UNLABELLED, 1, UNLABELLED])
    config = make_config(method="ce").resolve()
    loss = METHODS["ce"].loss(
        advfunmatch.methods.Logits(lambda x: student, None, torch.zeros(4), labels, 0), config
    )
    wanted = torch.nn.functional.cross_entropy(student[[0, 2]], labels[[0, 2]], reduction="sum") / 4
    torch.testing.assert_close(loss, wanted)
    with pytest.raises(
        InputError, match=r"method 'pgd_at' needs a label for every image, but 100 of extra_data"
    ):
        train(make_config(method="pgd_at", extra_data=generated))
    images = f"npz:{tmp_path / 'images.npz'}"
    np.savez(tmp_path / "images.npz", image=np.zeros((30, 8, 8), np.uint8))
    for source in (generated, images):
        out = tmp_path / source[-9:]
        train(
            make_config(out=out, method="advfunmatch", teacher=teacher, extra_data=source, epochs=1, steps=1)
        )


def test_training_from_a_cache_ends_with_the_same_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    weights = []
    for name, cache in (("memory", None), ("file", str(tmp_path / "cache"))):
        config = make_config(
            out=tmp_path / name, data_cache=cache, epochs=2, augment="crop,flip", swa_start=1
        )
        train(config)
        weights.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state_dict"])
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key
    assert [*(tmp_path / "cache").glob("*.npy")]
