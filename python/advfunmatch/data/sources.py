"""Data by name: `load_dataset("digits", split="train")`, `load_dataset("folder:PATH", split="test")`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import InputError, one_of
from ..plugins import Registry, caller
from .arrays import numbered_classes
from .dataset import ImageDataset, check_limit
from .formats.cifar import read_cifar, read_cifar101
from .formats.corruptions import read_corrupted
from .formats.digits import read_digits
from .formats.folder import read_folder, read_imagenet, read_tiny_imagenet
from .formats.huggingface import read_huggingface
from .formats.mnist import read_mnist, read_svhn
from .formats.npz import read_npz
from .formats.pickles import read_pickle
from .formats.web_dataset import read_webdataset
from .given import SPLITS, read_given
from .loading import PART, Contents, Wanted, assemble

# What a function that reads a data set returns: see `register_dataset`.
Reader = TypeVar("Reader", bound=Callable[..., Any])


@dataclass(frozen=True)
class Form:
    """A row of the table: how a form of data is read.

    Attributes:
        read: what a source holds of a split.
        paths: whether a path may follow its name, and whether one must.
    """

    read: Callable[[Wanted], Contents]
    paths: tuple[bool, bool]

    def spelling(self, name: str) -> str:
        """How it is named."""
        return {(False, False): name, (True, True): f"{name}:PATH"}.get(self.paths, f"{name}[:PATH]")


DATASETS: Registry[Form] = Registry("data")


def register_dataset(name: str, *, at_path: bool = True) -> Callable[[Reader], Reader]:
    """Give a data set a name, by which ``load_dataset`` and ``--data NAME:PATH`` find it.

    The decorated function takes ``path`` and ``split`` (``"train"`` or ``"test"``) by these names, and returns what
    `as_dataset` takes: an `ImageDataset`, ``(images, labels)``, ``(images, labels, class_names)``, or a data set of
    PyTorch. One without ``path`` is named without, one whose ``path`` has a default with or without. Where a set is too
    large to be read whole, the function takes one argument, ``wanted``, a `Wanted` that says what is asked for, and
    returns `Contents`, which hands over its images in parts; `at_path` then says whether its name has a path.

    Without class names, classes are numbered, for which both splits are read.

    Raises:
        InputError: the name is taken, or the function's arguments are others.

    Example:
        >>> @register_dataset("doctest_noise")
        ... def noise(split):
        ...     count = 8 if split == "train" else 4
        ...     return torch.rand(count, 1, 8, 8), torch.arange(count) % 2, ["even", "odd"]
        >>> load_dataset("doctest_noise", split="test")
        ImageDataset(doctest_noise test: 4 images of 1×8×8, 2 classes)
    """
    origin = caller()

    def register(read: Reader) -> Reader:
        parameters = inspect.signature(read).parameters
        if list(parameters) == ["wanted"]:
            form = Form(read, (at_path, at_path))
        elif "split" in parameters and not _others(parameters, ("path", "split")):
            path = parameters.get("path")
            form = Form(_of_given(read), (path is not None, path is not None and path.default is path.empty))
        else:
            raise InputError(
                f"data {name!r} of {origin} is read by a function of ({', '.join(parameters)}), but must be of "
                "(path, split), (split) or (wanted)"
            )
        DATASETS.add(name, form, origin)
        return read

    return register


def _others(parameters: Mapping[str, inspect.Parameter], known: Sequence[str]) -> list[str]:
    """Parameters that must be given, and are not among those that are."""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in parameters.items()
        if name not in known and parameter.default is parameter.empty and parameter.kind not in optional
    ]


def _of_given(read: Callable[..., Any]) -> Callable[[Wanted], Contents]:
    """Contents of what a function of path and split returns."""

    def contents(wanted: Wanted) -> Contents:
        at = {"path": wanted.path} if wanted.path else {}
        what = f"{wanted.name} ({wanted.split})"
        found = read_given(read(split=wanted.split, **at), what, None, wanted.unlabelled)
        numbers = found.labels.cpu().numpy()
        names = found.class_names
        if names is None:
            other = next(split for split in SPLITS if split != wanted.split)
            with contextlib.suppress(InputError):  # there may be no other split
                second = read_given(read(split=other, **at), what, None, wanted.unlabelled)
                names = second.class_names
                numbers = np.concatenate([numbers, second.labels.cpu().numpy()])
            names = names or numbered_classes(numbers, wanted.name, unlabelled=wanted.unlabelled)

        def parts(kept: np.ndarray) -> Iterator[np.ndarray]:
            for start in range(0, len(kept), PART):
                yield found.images[torch.from_numpy(kept[start : start + PART])].cpu().numpy()

        return Contents(parts, numbers[: len(found.labels)], names)

    return contents


register_dataset("digits", at_path=False)(read_digits)
register_dataset("folder")(read_folder)
register_dataset("npz")(read_npz)
register_dataset("cifar10")(read_cifar)
register_dataset("cifar100")(read_cifar)
register_dataset("cifar10.1")(read_cifar101)
register_dataset("cifar10c")(read_corrupted)
register_dataset("cifar100c")(read_corrupted)
register_dataset("svhn")(read_svhn)
register_dataset("mnist")(read_mnist)
register_dataset("fashion_mnist")(read_mnist)
register_dataset("imagenet")(read_imagenet)
register_dataset("tiny_imagenet")(read_tiny_imagenet)
register_dataset("pickle")(read_pickle)
register_dataset("hf")(read_huggingface)
register_dataset("webdataset")(read_webdataset)

OPTIONAL = ("datasets", "webdataset")  # libraries that one form alone needs
BETON = ".beton"


def load_dataset(
    name: str,
    *,
    split: str,
    limit: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    cache: str | None = None,
    unlabelled: bool = False,
    what: str = "data",
) -> ImageDataset:
    """Read one split of a data set into memory, or map it from a cache on disk.

    Args:
        name: ``digits``, or the form of a data set and where it lies, such as ``folder:PATH`` or ``cifar10:PATH``;
            the quickstart has a table of them, and `register_dataset` adds others.
        split: ``"train"`` or ``"test"``.
        limit: keep this many images, drawn at random with a fixed seed; None keeps all.
        resize: scale images so that their shorter side has this many pixels.
        crop: cut a square of this many pixels from the middle of each image.
        cache: folder that keeps the decoded images, from which they are read as they are needed; None holds them in
            memory.
        unlabelled: accept the label −1 of images that have none.
        what: the setting that named it, for an error's sentence.

    Returns:
        The images (N, C, H, W), labels and class names. The images are uint8 (0 to 255); those of an archive of floats
        are float32 (0 to 1).

    Raises:
        InputError: if there is no such data, or it cannot be read.

    >>> data = load_dataset("digits", split="test")
    >>> len(data), data.image_size, data.num_classes
    (360, (8, 8), 10)
    """
    if split not in SPLITS:
        raise one_of("split", split, SPLITS)
    check_limit(limit)
    for setting, value in (("resize", resize), ("crop", crop)):
        check_limit(value, setting)
    kind, colon, path = name.partition(":")
    form = DATASETS.get(kind)
    if form is None or (bool(path) not in form.paths) or (colon and not path):
        raise one_of(what, name, [form.spelling(kind) for kind, form in DATASETS.items()])
    if path.endswith(BETON):
        raise InputError(
            f"{what} {path!r} is a file of ffcv, whose form is not read; the images that it was made from are, as a "
            "folder, as parquet files or as WebDataset shards"
        )
    wanted = Wanted(name, path, split, limit, resize, crop, cache, unlabelled)
    try:
        return assemble(wanted, form.read(wanted))
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        raise InputError(
            f"{what} {name!r} needs the package {error.name!r}: pip install {error.name}"
        ) from error
