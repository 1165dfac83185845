"""Labelled images held as one tensor on the device that trains on them, or in a file that is read as needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral

import torch

from ..errors import InputError
from .classes import match_classes
from .mapped import MappedImages

UNLABELLED = -1


@dataclass(frozen=True)
class ImageDataset:
    """All images of one split.

    Attributes:
        name: the name it was loaded by.
        split: ``"train"`` or ``"test"``.
        images: (N, C, H, W), uint8 (0 to 255) or float32 (0 to 1). Of a set that stays in its file, `MappedImages`,
            which are indexed in the same way.
        labels: (N,), int64; −1 for an image without label, which only extra training images may be.
        class_names: one for each class; its length is the number of classes.
    """

    name: str
    split: str
    images: torch.Tensor | MappedImages
    labels: torch.Tensor
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.shape[2], self.images.shape[3]

    def __repr__(self) -> str:
        channels, (height, width) = self.in_channels, self.image_size
        return (
            f"ImageDataset({self.name} {self.split}: {len(self)} images of {channels}×{height}×{width}, "
            f"{self.num_classes} classes)"
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return as_float(self.images[index]), int(self.labels[index])

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, indices: torch.Tensor) -> ImageDataset:
        """The images at `indices`, in that order."""
        images = self.images.keep(indices) if isinstance(self.images, MappedImages) else self.images[indices]
        return replace(self, images=images, labels=self.labels[indices])

    def ask_for(self, indices: torch.Tensor) -> None:
        """Have those images read from their file, if they stay in one, so that indexing them later does not wait."""
        if isinstance(self.images, MappedImages):
            self.images.ask_for(indices)

    def with_classes_of(self, other: ImageDataset) -> ImageDataset:
        """The same images, their labels counted in the order of another set's classes; InputError if those differ."""
        order = match_classes(
            self.class_names,
            other.class_names,
            of_have=f"data {self.name!r} ({self.split})",
            of_wanted=f"data {other.name!r}",
        )
        if order is None:
            return self
        places = order.argsort().to(self.labels.device)
        labels = torch.where(self.labels < 0, self.labels, places[self.labels.clamp_min(0)])
        return replace(self, labels=labels, class_names=other.class_names)


def as_float(images: torch.Tensor | MappedImages) -> torch.Tensor:
    """float32 images in [0, 1] from stored ones.

    >>> as_float(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    if isinstance(images, MappedImages):
        images = images[:]
    return images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images


def check_limit(limit: int | None, what: str = "limit") -> None:
    """InputError for what is no number of images to keep, nor of pixels."""
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, Integral):
        raise InputError(f"{what} is {limit!r}, but must be of type int")
    if limit < 1:
        raise InputError(f"{what} is {limit}, but must be at least 1")


def choose(total: int, limit: int | None, seed: int = 0) -> torch.Tensor:
    """Sorted indices of `limit` items drawn at random without replacement, or of all of them."""
    check_limit(limit)
    if limit is None or limit >= total:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:limit].sort().values
