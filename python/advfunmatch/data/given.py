"""Images and labels that are given as objects: tensors, arrays, data sets and loaders of PyTorch.

Note [Given data]
~~~~~~~~~~~~~~~~~
What is given is read once, into memory, and is then a data set like one that was read by name: the same digests, limits
and augmentations. So whatever a transform draws at random is drawn once, with a fixed seed, for each image, and not
anew in each epoch; that is said where it is seen, and ``augment`` draws anew. A loader is read in its data set's order
where its sampler only shuffles or shares out, by its workers and its ``collate_fn``.

Images must be what attacks measure their radius on: uint8 (0 to 255), or floats in [0, 1]. Normalised ones are refused,
for eps = 8/255 means something else there: the normalisation belongs into the network.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from .arrays import as_class_numbers, find_axes, numbered_classes
from .dataset import ImageDataset, choose
from .mapped import MappedImages

ALLOWED = (
    "must be an ImageDataset, a pair (images, labels) of tensors or arrays, a data set of (image, label) or a "
    "DataLoader of such"
)
SPLITS = ("train", "test")
HELD_OUT = 0.1  # share of the images that becomes the test split where none is given
LOOKED_AT = 4  # images that are read twice, to see whether they are the same again


@dataclass(frozen=True)
class Read:
    """What was given, read: images (N, C, H, W), labels (N,) int64, and the names of the classes, if it has any."""

    name: str
    images: Tensor | MappedImages
    labels: Tensor
    class_names: tuple[str, ...] | None


def as_dataset(
    data: Any,
    *,
    split: str = "test",
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    unlabelled: bool = False,
    what: str = "data",
) -> ImageDataset:
    """One split of data that was given as an object. See Note [Given data].

    Args:
        data: an `ImageDataset`; ``(images, labels)`` or ``(images, labels, class_names)`` with images (N, C, H, W),
            (N, H, W, C) or (N, H, W), tensors or arrays; a map-style or iterable data set of (image, label), where an
            image is a PIL image, a tensor (C, H, W) or an array; a ``DataLoader`` of batches of these; or a mapping or
            pair of such, for ``"train"`` and ``"test"``. Images are uint8, or floats in [0, 1]; labels are integers of
            any width.
        split: which of a mapping or pair is taken, and what the result is called.
        name: what the result is called [default: what it is].
        class_names: one for each class [default: its own ``classes``, or the numbers].
        unlabelled: accept the label −1 of images that have none.
        what: the argument that gave it, for an error's sentence.

    Returns:
        The images and labels, on the device that they were on, without a copy where none is needed.

    Warns:
        UserWarning: a transform or a sampler draws at random, which happens once.

    Raises:
        InputError: it is nothing of these, is empty, has values, sizes or labels that cannot be.

    >>> as_dataset((torch.zeros(4, 3, 8, 8), [0, 1, 2, 1]))
    ImageDataset(tensors test: 4 images of 3×8×8, 3 classes)
    """
    given = _by_split(data)
    if given is not None and split not in given:
        raise InputError(f"{what} has {', '.join(map(repr, given))}, but {split!r} is needed")
    chosen = data if given is None else given[split]
    read = read_given(chosen, what, class_names, unlabelled)
    split = chosen.split if isinstance(chosen, ImageDataset) else split
    return _finished(read, split, name, _names([read], unlabelled, what), what)


def as_splits(data: Any, *, name: str | None = None, what: str = "data") -> tuple[ImageDataset, ImageDataset]:
    """The train and the test split of data that was given as an object, as for `as_dataset`.

    A mapping has ``"train"`` and ``"test"``; a pair is (train, test). Where there is but one set, a tenth of it, drawn
    with a fixed seed whatever the run's, becomes the test split. Classes without names are numbered over both.

    Warns:
        UserWarning: images are held out for the test split.
    """
    given = _by_split(data)
    if given is not None:
        if missing := [split for split in SPLITS if split not in given]:
            raise InputError(f"{what} has {', '.join(map(repr, given))}, but {missing[0]!r} is missing")
        reads = [read_given(given[split], f"{what}[{split!r}]", None, False) for split in SPLITS]
        names = _names(reads, False, what)
        train, test = (
            _finished(read, split, name, read.class_names or names, f"{what}[{split!r}]")
            for read, split in zip(reads, SPLITS, strict=True)
        )
        return train, test
    read = read_given(data, what, None, False)
    whole = _finished(read, "train", name, _names([read], False, what), what)
    held = torch.zeros(len(whole), dtype=torch.bool)
    held[choose(len(whole), max(1, round(HELD_OUT * len(whole))))] = True
    if held.all():
        raise InputError(f"{what} has one image and no test split; give {{'train': …, 'test': …}}")
    warnings.warn(
        f"{what} has no test split: {int(held.sum())} of its {len(whole)} images, the same for every run, are held out "
        "for it; {'train': …, 'test': …} gives one's own",
        stacklevel=2,
    )
    test = replace(whole.subset(held.nonzero()[:, 0]), split="test")
    return whole.subset((~held).nonzero()[:, 0]), test


def name_of(data: Any) -> str:
    """What given data is called where it has no name: the type of a data set, or that it is tensors."""
    given = _by_split(data)
    if given is not None:
        return name_of(next(iter(given.values())))
    if isinstance(data, ImageDataset):
        return data.name
    if _is_arrays(data):
        return "tensors"
    inner = getattr(data, "dataset", None)
    return type(data).__name__ if inner is None else name_of(inner)


def _by_split(data: Any) -> Mapping[str, Any] | None:
    """Data by split, where it is a mapping or a pair of sets; None where it is one set."""
    if isinstance(data, Mapping):
        return data
    if isinstance(data, list | tuple) and len(data) == 2 and not _is_arrays(data) and not _is_item(data[0]):
        return dict(zip(SPLITS, data, strict=True))
    return None


def _is_arrays(data: Any) -> bool:
    return (
        isinstance(data, list | tuple)
        and len(data) in (2, 3)
        and isinstance(data[0], Tensor | np.ndarray)
        and not _is_number(data[1])
    )


def _is_item(item: Any) -> bool:
    """Whether this is one (image, label), as a list of such has them."""
    return isinstance(item, list | tuple) and len(item) == 2 and _is_number(item[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | np.integer) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)


def read_given(data: Any, what: str, class_names: Sequence[str] | None, unlabelled: bool) -> Read:
    """One set that was given, checked: what `as_dataset` and `as_splits` are made of."""
    images: Any
    labels: Any
    own: Sequence[str] | None
    if isinstance(data, ImageDataset):
        images, labels, own = data.images, data.labels, data.class_names
    elif _is_arrays(data):
        images, labels, own = data[0], data[1], data[2] if len(data) == 3 else None
    elif isinstance(data, DataLoader) or (hasattr(data, "__iter__") and hasattr(data, "dataset")):
        images, labels = _of_loader(data, what)
        own = _classes(data.dataset)
    elif isinstance(data, str | bytes | Tensor | np.ndarray) or not (
        hasattr(data, "__getitem__") or hasattr(data, "__iter__")
    ):
        hint = "; load_dataset reads data by name" if isinstance(data, str) else ""
        raise InputError(f"{what} is of type {type(data).__name__}, but {ALLOWED}{hint}")
    else:
        images, labels = _of_items(data, what)
        own = _classes(data)
    numbers = _as_labels(labels, what, unlabelled)
    if not isinstance(images, MappedImages):
        images = _as_images(images, len(numbers), what)
    names = class_names if class_names is not None else own
    if names is not None:
        names = _checked_names(names, int(numbers.max()), what)
    return Read(name_of(data), images, numbers, names)


def _finished(
    read: Read, split: str, name: str | None, class_names: tuple[str, ...], what: str
) -> ImageDataset:
    return ImageDataset(name or read.name, split, read.images, read.labels, class_names)


def _names(reads: Sequence[Read], unlabelled: bool, what: str) -> tuple[str, ...]:
    """The names that the sets have, or the numbers of all their labels."""
    for read in reads:
        if read.class_names is not None:
            return read.class_names
    labels = np.concatenate([read.labels.cpu().numpy() for read in reads])
    return numbered_classes(labels, what, unlabelled=unlabelled)


# ---- one item, or one batch, after the other -------------------------------------------------------------------------


def _of_items(data: Any, what: str) -> tuple[Tensor, list[Any]]:
    """Images and labels of a data set, in its order; of an iterable one as it gives them."""
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    with _seeded():
        items = (data[index] for index in range(len(data))) if sized else iter(data)
        images, labels = _gathered((_pair(item, what, "(image, label)") for item in items), what)
        if sized:
            _say_if_random(images, (data[index][0] for index in range(min(LOOKED_AT, len(data)))), what)
    return images, labels


def _of_loader(loader: Any, what: str) -> tuple[Tensor, list[Any]]:
    """Images and labels of all batches, in the data set's order where the sampler allows."""

    def one_by_one(loader: Any) -> Iterator[tuple[Any, Any]]:
        for batch in loader:
            images, labels = _pair(batch, what, "(images, labels)")
            if _is_number(labels):  # batch_size=None
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
        pixels = _as_tensor(image, what)
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


def _as_tensor(image: Any, what: str) -> Tensor:
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
        second = _as_tensor(second, what)
        if second.shape == image.shape and not torch.equal(image, second):
            warnings.warn(
                f"{what} has a transform that draws at random: each image was drawn once, and is the same in every "
                "epoch; what is named in augment is drawn anew",
                stacklevel=2,
            )
            return


# ---- what the values are ---------------------------------------------------------------------------------------------


def _as_labels(labels: Any, what: str, unlabelled: bool) -> Tensor:
    """int64 (N,), from integers of any width."""
    if isinstance(labels, Tensor):
        numbers = labels.detach()
        kind, integral = str(numbers.dtype).removeprefix("torch."), not numbers.dtype.is_floating_point
        integral = integral and not numbers.dtype.is_complex and numbers.dtype != torch.bool
        array = numbers.cpu().numpy() if integral else None
    else:
        try:
            array = np.asarray(
                [label.item() if isinstance(label, Tensor) and label.ndim == 0 else label for label in labels]
                if isinstance(labels, list | tuple)
                else labels
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"labels of {what} are no list of class numbers: {error}") from error
        kind, integral = str(array.dtype), np.issubdtype(array.dtype, np.integer)
    if array is not None and array.size == 0:
        raise InputError(f"{what} has no images")
    if not integral or array is None:
        raise InputError(
            f"labels of {what} are {kind}, but must be integers, one class number an image; of one-hot or soft rows "
            "give argmax(1)"
        )
    numbers = torch.from_numpy(as_class_numbers(array, "labels", what, unlabelled=unlabelled))
    return numbers.to(labels.device) if isinstance(labels, Tensor) else numbers


def _as_images(given: Any, count: int, what: str) -> Tensor:
    """(N, C, H, W), uint8 or float32 in [0, 1]."""
    images = _as_tensor(given, what)
    if images.ndim not in (3, 4) or len(images) != count:
        raise InputError(
            f"images of {what} have shape {tuple(images.shape)} for {count} labels, but must be (N, C, H, W), "
            "(N, H, W, C) or (N, H, W), with as many labels"
        )
    images = _channels_first(images, count, what)
    if 0 in images.shape:
        raise InputError(f"images of {what} have shape {tuple(images.shape)}, which holds no pixel")
    if images.dtype == torch.uint8:
        if count > 1 and int(images.amax()) == 1:
            warnings.warn(
                f"images of {what} are uint8 with no value above 1, and are read as shades of 255; give 0 and 255, or "
                "floats, if 1 is meant to be white",
                stacklevel=2,
            )
        return images
    if not images.is_floating_point():
        raise InputError(
            f"images of {what} are {images.dtype}, but must be uint8 (0 to 255) or floats in [0, 1]"
        )
    images = images.float()
    low, high = (float(bound) for bound in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise InputError(f"images of {what} {_outside(low, high)}")
    return images


def _outside(low: float, high: float) -> str:
    if not np.isfinite([low, high]).all():
        return "hold values that are not finite"
    held = f"hold values from {low:.4g} to {high:.4g}, outside [0, 1]"
    if low >= 0 and high <= 255:
        return held + "; divide by 255, or give uint8"
    return (
        held
        + ", as a Normalize leaves them; eps is measured on images in [0, 1], so leave it out of the transform "
        "and put it into the network: advfunmatch.models.Normalized(network, mean, std)"
    )


def _channels_first(images: Tensor, count: int, what: str) -> Tensor:
    if images.ndim == 3:
        return images[:, None]
    shape = tuple(images.shape)
    try:
        axes = find_axes([("images", shape, count)], what)
    except InputError:
        axes = (0, 1, 2, 3)  # any number of channels, where PyTorch has them
    return images.permute(*axes)


def _classes(data: Any) -> Sequence[str] | None:
    """The names of its classes, as torchvision's sets and subsets of them have them."""
    while data is not None:
        found = getattr(data, "classes", None)
        if isinstance(found, list | tuple) and found and all(isinstance(name, str) for name in found):
            return found
        data = getattr(data, "dataset", None)
    return None


def _checked_names(names: Any, last: int, what: str) -> tuple[str, ...]:
    if not isinstance(names, list | tuple | np.ndarray) or not all(isinstance(name, str) for name in names):
        raise InputError(f"class_names of {what} must be a list of strings, and not {names!r}")
    if len(set(names)) != len(names) or last >= len(names):
        why = f"its labels go to {last}" if last >= len(names) else "some are the same"
        raise InputError(f"class_names of {what} are {len(names)}, but {why}")
    return tuple(str(name) for name in names)
