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

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import InputError
from .arrays import as_class_numbers, find_axes, numbered_classes
from .dataset import ImageDataset, choose
from .items import as_tensor, is_number, of_items, of_loader
from .loading import Contents, Wanted, assemble, in_parts
from .mapped import MappedImages

ALLOWED = (
    "must be an ImageDataset, a pair (images, labels) of tensors or arrays, a data set of (image, label) or a "
    "DataLoader of such"
)
SPLITS = ("train", "test")
HELD_OUT = 0.1  # share of the images that becomes the test split where none is given


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


def reduced(data: ImageDataset, limit: int | None, resize: int | None, crop: int | None) -> ImageDataset:
    """What `limit` keeps of a set, in the size that `resize` and `crop` make, as for `load_dataset`."""
    if resize is None and crop is None:
        return data if limit is None else data.subset(choose(len(data), limit))
    images = data.images[:] if isinstance(data.images, MappedImages) else data.images
    wanted = Wanted(data.name, "", data.split, limit, resize, crop)
    contents = Contents(in_parts(images.cpu().numpy()), data.labels.cpu().numpy(), data.class_names)
    return assemble(wanted, contents)


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
        and not is_number(data[1])
    )


def _is_item(item: Any) -> bool:
    """Whether this is one (image, label), as a list of such has them."""
    return isinstance(item, list | tuple) and len(item) == 2 and is_number(item[1])


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
        images, labels = of_loader(data, what)
        own = _classes(data.dataset)
    elif isinstance(data, str | bytes | Tensor | np.ndarray) or not (
        hasattr(data, "__getitem__") or hasattr(data, "__iter__")
    ):
        hint = "; load_dataset reads data by name" if isinstance(data, str) else ""
        raise InputError(f"{what} is of type {type(data).__name__}, but {ALLOWED}{hint}")
    else:
        images, labels = of_items(data, what)
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
    images = as_tensor(given, what)
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
