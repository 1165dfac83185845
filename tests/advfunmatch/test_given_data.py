"""Data that is given as objects: every form becomes the same images, and what cannot be used is refused with why."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from advfunmatch import InputError, as_dataset, load_dataset
from advfunmatch.data import ImageDataset, as_splits
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

COUNT = 13
torch.manual_seed(0)
IMAGES = torch.randint(256, (COUNT, 3, 6, 5), dtype=torch.uint8)
LABELS = torch.arange(COUNT) % 3
ITEMS = list(zip(IMAGES, LABELS.tolist(), strict=True))


class Items(Dataset):
    """A data set of PyTorch with class names, as torchvision's have them."""

    classes = ("cat", "dog", "owl")

    def __init__(self, images: Any = IMAGES, labels: Any = LABELS) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


class Stream(IterableDataset):
    """The same without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter(ITEMS)


class Jitter(Items):
    """One whose transform draws at random, from all three generators."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        noise = torch.rand(()) * 0.2 + random.random() * 0.2 + np.random.rand() * 0.2
        return self.images[index] / 255 * float(noise), self.labels[index]


PIL = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in IMAGES]
FORMS: dict[str, Any] = {
    "pair": (IMAGES, LABELS.to(torch.int8)),
    "arrays": (IMAGES.permute(0, 2, 3, 1).numpy(), LABELS.numpy().astype(np.uint16)),
    "list of labels": (IMAGES, LABELS.tolist()),
    "pairs": ITEMS,
    "tensor set": TensorDataset(IMAGES, LABELS),
    "PIL": Items(PIL),
    "numpy labels": Items(PIL, LABELS.numpy().astype(np.int16)),
    "stream": Stream(),
    "loader without length": DataLoader(Stream(), batch_size=4),
    "shuffled loader": DataLoader(Items(), batch_size=4, shuffle=True, drop_last=True),
    "loader of single images": DataLoader(Items(), batch_size=None),
    "loader with workers": DataLoader(Items(), batch_size=5, shuffle=True, num_workers=1),
    "collated": DataLoader(
        Items(PIL),
        batch_size=4,
        collate_fn=lambda batch: (np.stack([np.asarray(x) for x, _ in batch]), [y for _, y in batch]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_images(form: str) -> None:
    data = as_dataset(FORMS[form])
    assert torch.equal(data.images, IMAGES)
    assert torch.equal(data.labels, LABELS)
    assert data.labels.dtype == torch.int64
    names = (
        ("cat", "dog", "owl")
        if hasattr(getattr(FORMS[form], "dataset", FORMS[form]), "classes")
        else ("0", "1", "2")
    )
    assert data.class_names == names


def test_floats_keep_their_values_and_classes_their_names() -> None:
    data = as_dataset((IMAGES.double() / 255, LABELS, ["a", "b", "c", "d"]))
    assert data.images.dtype == torch.float32
    torch.testing.assert_close(data.images, IMAGES / 255)
    assert data.class_names == ("a", "b", "c", "d")
    assert as_dataset(Subset(Items(), [3, 1])).class_names == Items.classes
    digits = load_dataset("digits", split="test")
    assert torch.equal(as_dataset(digits).images, digits.images)
    grey = Image.fromarray(np.full((6, 5), 7, np.uint8))
    mixed = as_dataset([(grey, 0), (PIL[1], 1)])
    assert mixed.images.shape == (2, 3, 6, 5)
    assert bool((mixed.images[0] == 7).all())


def test_what_is_drawn_at_random_is_drawn_once_and_alike() -> None:
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with pytest.warns(
        UserWarning, match="data has a transform that draws at random: each image was drawn once"
    ):
        first = as_dataset(Jitter())
    with pytest.warns(UserWarning, match="draws at random"):
        again = as_dataset(DataLoader(Jitter(), batch_size=4, shuffle=True))
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(torch.get_rng_state(), state[2])
    assert torch.equal(first.images, as_dataset_quietly(Jitter()).images)
    assert torch.equal(
        again.images, as_dataset_quietly(DataLoader(Jitter(), batch_size=4, shuffle=True)).images
    )
    subset = as_dataset(DataLoader(Items(), sampler=SubsetRandomSampler([5, 2, 7])))
    assert torch.equal(subset.images, IMAGES[[2, 5, 7]])
    weighted = DataLoader(Items(), sampler=WeightedRandomSampler([1.0] * COUNT, 8))
    with pytest.warns(UserWarning, match="WeightedRandomSampler chooses images; what it chooses once"):
        drawn = as_dataset(weighted)
    assert torch.equal(drawn.images, as_dataset_quietly(weighted).images)


def as_dataset_quietly(data: Any) -> ImageDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return as_dataset(data)


def test_splits() -> None:
    for data in ({"train": ITEMS, "test": ITEMS[:4]}, (Stream(), (IMAGES[:4], LABELS[:4]))):
        train, test = as_splits(data)
        assert (len(train), len(test)) == (COUNT, 4)
        assert train.class_names == test.class_names == ("0", "1", "2")
        assert (train.split, test.split) == ("train", "test")
    assert len(as_dataset({"train": ITEMS, "test": ITEMS[:4]})) == 4
    # A class that only one split shows is a class of both.
    train, test = as_splits((ITEMS, (IMAGES[:2], [0, 1])))
    assert train.num_classes == test.num_classes == 3
    with pytest.warns(UserWarning, match="no test split: 1 of its 13 images"):
        train, test = as_splits(ITEMS)
    assert (len(train), len(test)) == (COUNT - 1, 1)
    with pytest.raises(InputError, match="'test' is missing"):
        as_splits({"train": ITEMS})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            (torch.randn(4, 3, 6, 5), [0, 1, 0, 1]),
            r"outside \[0, 1\], as a Normalize leaves them; .*Normalized",
        ),
        ((torch.rand(4, 3, 6, 5) * 255, [0, 1, 0, 1]), "divide by 255, or give uint8"),
        ((torch.full((2, 3, 6, 5), torch.nan), [0, 1]), "values that are not finite"),
        ((IMAGES.long(), LABELS), "are torch.int64, but must be uint8"),
        ((IMAGES, LABELS.float()), "labels of data are float32, but must be integers"),
        ((IMAGES, LABELS == 0), "labels of data are bool"),
        ((IMAGES, torch.eye(COUNT, 3, dtype=torch.uint8)), "one-hot rows store argmax"),
        ((IMAGES, torch.eye(COUNT, 3)), "of one-hot or soft rows give argmax"),
        ((IMAGES, LABELS[:-1]), "for 12 labels"),
        ((IMAGES, LABELS - 1), "integer class numbers from 0 on"),
        ((IMAGES, LABELS, ["a", "b"]), "class_names of data are 2, but its labels go to 2"),
        ((IMAGES[:, None], LABELS), r"have shape \(13, 1, 3, 6, 5\)"),
        ([(IMAGES[0], 0), (IMAGES[1, :, :4], 1)], "several shapes: .* as number 2; .*Resize"),
        ([(IMAGES[0], 0), (IMAGES[1] / 255, 1)], "several types, torch.float32, torch.uint8"),
        ([(IMAGES[0], 0, 1)], r"gives tuple of 3, but must give \(image, label\)"),
        ([("a.png", 0)], "an image of type str, but must give PIL images"),
        ([], "data has no images"),
        ((IMAGES[:0], LABELS[:0]), "data has no images"),
        ("digits", "is of type str, .*load_dataset reads data by name"),
        (3, "is of type int, but must be an ImageDataset"),
    ],
)
def test_what_cannot_be_used_says_why(data: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        as_dataset(data)
