"""The items of a data set and the batches of a loader of PyTorch, read once; see Note [Given data] in ``given``."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from ..errors import InputError

LOOKED_AT = 4  # images that are read twice, to see whether they are the same again


def of_items(data: Any, what: str) -> tuple[Tensor, list[Any]]:
    """Images and labels of a data set, in its order; of an iterable one as it gives them."""
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    with _seeded():
        items = (data[index] for index in range(len(data))) if sized else iter(data)
        images, labels = _gathered((_pair(item, what, "(image, label)") for item in items), what)
        if sized:
            _say_if_random(images, (data[index][0] for index in range(min(LOOKED_AT, len(data)))), what)
    return images, labels


def of_loader(loader: Any, what: str) -> tuple[Tensor, list[Any]]:
    """Images and labels of all batches, in the data set's order where the sampler allows."""

    def one_by_one(loader: Any) -> Iterator[tuple[Any, Any]]:
        for batch in loader:
            images, labels = _pair(batch, what, "(images, labels)")
            if is_number(labels):  # batch_size=None
                yield images, labels
                continue
            if not hasattr(images, "__len__") or len(images) != len(labels):
                raise InputError(f"{what} gives a batch whose images and labels are not equally many")
            yield from zip(images, labels, strict=True)

    ordered = _in_order(loader, what)
    with _seeded():
        images, labels = _gathered(one_by_one(ordered), what)
        if ordered is not loader:
            again = (image for image, _ in one_by_one(_first_of(ordered)))
            _say_if_random(images, again, what)
    return images, labels


def _in_order(loader: Any, what: str) -> Any:
    """A loader that reads the same in the order of its data set, with the same workers; or the loader itself."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    sampler: Any = loader.sampler
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        sampler = loader.batch_sampler
    count = len(loader.dataset)  # type: ignore[arg-type]
    indices: Sequence[int] = range(count)
    if isinstance(sampler, SubsetRandomSampler):
        indices = sorted(int(index) for index in sampler.indices)
    elif not isinstance(sampler, SequentialSampler | DistributedSampler) and not (
        isinstance(sampler, RandomSampler) and not sampler.replacement and len(sampler) == count
    ):
        warnings.warn(
            f"{what} is a loader whose {type(sampler).__name__} chooses images; what it chooses once is used in every "
            "epoch",
            stacklevel=2,
        )
        return loader
    return _rebuilt(loader, indices)


def _rebuilt(loader: DataLoader[Any], indices: Sequence[int]) -> DataLoader[Any]:
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=indices,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _first_of(ordered: DataLoader[Any]) -> DataLoader[Any]:
    again = _rebuilt(ordered, list(ordered.sampler)[:LOOKED_AT])
    again.num_workers = 0
    return again


def _pair(item: Any, what: str, wanted: str) -> tuple[Any, Any]:
    if isinstance(item, list | tuple) and len(item) == 2:
        return item[0], item[1]
    got = type(item).__name__ + (f" of {len(item)}" if isinstance(item, list | tuple) else "")
    raise InputError(f"{what} gives {got}, but must give {wanted}")


def _gathered(pairs: Iterable[tuple[Any, Any]], what: str) -> tuple[Tensor, list[Any]]:
    """All images in one tensor, layout as it comes, and their labels."""
    images: list[Tensor] = []
    labels: list[Any] = []
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for image, label in pairs:
        pixels = as_tensor(image, what)
        room -= pixels.nbytes
        if room < 0:
            raise InputError(
                f"{what} gives more images than this machine has memory for, or never ends; data by name with "
                "data_cache stays on disk"
            )
        if images and pixels.shape != images[0].shape:
            pixels, images = _of_one_kind(pixels, images, what)
        images.append(pixels)
        labels.append(label)
    if not images:
        raise InputError(f"{what} has no images")
    if len({image.dtype for image in images}) > 1:
        kinds = ", ".join(sorted(str(dtype) for dtype in {image.dtype for image in images}))
        raise InputError(f"{what} gives images of several types, {kinds}, but must give one")
    return torch.stack(images), labels


def _of_one_kind(pixels: Tensor, images: list[Tensor], what: str) -> tuple[Tensor, list[Tensor]]:
    """Grey images among coloured PIL images become coloured; InputError for any other difference of shape."""
    first = images[0]
    if pixels.shape[1:] == first.shape[1:] and {len(pixels), len(first)} == {1, 3}:
        if len(first) == 1:
            return pixels, [image.expand_as(pixels) for image in images]
        return pixels.expand_as(first), images
    raise InputError(
        f"{what} gives images of several shapes: {tuple(first.shape)} first, and {tuple(pixels.shape)} as number "
        f"{len(images) + 1}; all must have one size, as a Resize or CenterCrop in its transform makes them"
    )


def as_tensor(image: Any, what: str) -> Tensor:
    """An image, or several, as a tensor, laid out as it comes; a PIL image as (C, H, W)."""
    if isinstance(image, Tensor):
        return image.detach().as_subclass(Tensor)
    if isinstance(image, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(image))
    if "PIL.Image" in sys.modules and isinstance(image, sys.modules["PIL.Image"].Image):
        from .image_files import decode, has_colour

        colour = has_colour(image)
        pixels = torch.from_numpy(decode(image, colour)[0])
        return pixels.permute(2, 0, 1) if colour else pixels[None]
    raise InputError(
        f"{what} gives an image of type {type(image).__name__}, but must give PIL images, tensors or arrays"
    )


@contextmanager
def _seeded() -> Iterator[None]:
    """The generators that transforms draw from, seeded alike for every reading; afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _say_if_random(images: Tensor, again: Iterable[Any], what: str) -> None:
    for image, second in zip(images, again, strict=False):
        second = as_tensor(second, what)
        if second.shape == image.shape and not torch.equal(image, second):
            warnings.warn(
                f"{what} has a transform that draws at random: each image was drawn once, and is the same in every "
                "epoch; what is named in augment is drawn anew",
                stacklevel=2,
            )
            return


def is_number(value: Any) -> bool:
    """Whether this is one label, rather than several."""
    return isinstance(value, int | np.integer) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)
