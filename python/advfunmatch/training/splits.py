"""The images of a run: those it trains on, those held out to choose an epoch by, and those for the end.

Note [Splits]
~~~~~~~~~~~~~
The test split is looked at once, when training has ended. What is shown before that comes from `validation` images,
which are held out of the training split, the same for every run of that seed, and never augmented; without them from a
few of the training images themselves, which is called that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..config import TrainConfig
from ..data import ImageDataset, as_extra_images, as_splits, choose, load_dataset, reduced, require_labels
from ..data.augment import parse_augmentation, require_augmentable
from ..errors import InputError
from ..methods import get_method

TEACHER_IMAGES = 256  # on which a teacher is measured before it teaches


@dataclass(frozen=True)
class Splits:
    """The data of a run, on its device. See Note [Splits].

    Attributes:
        train: what is trained on.
        test: what the trained network is measured on.
        extra: images that are mixed into each batch, or None.
        validation: images held out of the training split, or None.
    """

    train: ImageDataset
    test: ImageDataset
    extra: ImageDataset | None = None
    validation: ImageDataset | None = None

    @property
    def watched(self) -> str:
        """What is measured while training: "validation" or "train"."""
        return "train" if self.validation is None else "validation"

    def to_watch(self, count: int) -> ImageDataset:
        """All validation images, or `count` of the training images."""
        return self.validation or self.train.subset(choose(len(self.train), count))

    def for_teacher(self) -> ImageDataset:
        """Images to measure a teacher on before it teaches."""
        images = self.validation or self.train
        return images.subset(choose(len(images), TEACHER_IMAGES))


def load_splits(
    config: TrainConfig, device: torch.device, given: Any = None
) -> tuple[Splits, dict[str, ImageDataset]]:
    """The data that a configuration names.

    Args:
        config: resolved.
        device: where it goes.
        given: data in place of what `data` names, as `as_splits` takes it.

    Returns:
        The splits; and what was read, by the setting that named it, which is what a run depends on.

    Raises:
        InputError: they cannot be read, are not of one kind, or cannot be augmented or divided as configured.
    """
    load = partial(load_dataset, resize=config.resize, crop=config.crop)
    if given is None:
        train = load(config.data, split="train", limit=config.limit, cache=config.data_cache)
        test = load(config.data, split="test", limit=config.eval_limit)
    else:
        train, test = as_splits(given, name=config.data)
        train = reduced(train, config.limit, config.resize, config.crop)
        test = reduced(test, config.eval_limit, config.resize, config.crop)
    train, test = train.to(device), test.to(device)
    _require_same_images(train, test)
    test = test.with_classes_of(train)
    require_augmentable(parse_augmentation(config.augment), train)
    read, extra = {"training images": train, "test images": test}, None
    if config.extra_data:
        extra = load(
            config.extra_data, split="train", cache=config.data_cache, unlabelled=True, what="extra_data"
        ).to(device)
        _require_same_images(train, extra)
        method = get_method(config.method)
        if method.needs_labels:
            extra = as_extra_images(extra, train)
        if method.attacks_labels:
            require_labels(extra, f"method {config.method!r}")
        read["extra images"] = extra
    if config.validation is None:
        return Splits(train, test, extra), read
    train, validation = hold_out(train, config.validation, config.seed)
    return Splits(train, test, extra, validation), read


def hold_out(data: ImageDataset, count: int, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """`data` without `count` images that the seed decides, and those; InputError if none would be left."""
    if count >= len(data):
        raise InputError(
            f"validation is {count}, but must leave at least one of the {len(data)} training images of {data.name!r}"
        )
    held = torch.zeros(len(data), dtype=torch.bool)
    held[choose(len(data), count, seed)] = True
    return data.subset((~held).nonzero()[:, 0]), data.subset(held.nonzero()[:, 0])


def _require_same_images(train: ImageDataset, other: ImageDataset) -> None:
    for what, ours, theirs in (
        ("images of shape", tuple(train.images.shape[1:]), tuple(other.images.shape[1:])),
        ("values of type", train.images.dtype, other.images.dtype),
    ):
        if ours != theirs:
            raise InputError(
                f"data {train.name!r} has {what} {ours}, but {other.name!r} ({other.split}) has {theirs}"
            )
