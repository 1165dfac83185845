"""Data by name: `load_dataset("digits", split="train")`, `load_dataset("folder:PATH", split="test")`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..errors import one_of
from .cifar import load_cifar
from .dataset import ImageDataset, check_limit, choose
from .digits import load_digits
from .folder import load_folder
from .npz import load_npz

SPLITS = ("train", "test")
BUNDLED: dict[str, Callable[[str], ImageDataset]] = {"digits": load_digits}
AT_PATH: dict[str, Callable[[str, str, int | None], ImageDataset]] = {
    "folder": load_folder,
    "npz": load_npz,
    "cifar10": partial(load_cifar, "cifar10"),
    "cifar100": partial(load_cifar, "cifar100"),
}


def load_dataset(name: str, *, split: str, limit: int | None = None, what: str = "data") -> ImageDataset:
    """Read one split of a data set into memory.

    Args:
        name: ``digits``, ``folder:PATH``, ``npz:PATH``, ``cifar10:PATH`` or ``cifar100:PATH``.
        split: ``"train"`` or ``"test"``.
        limit: keep this many images, drawn at random with a fixed seed; None keeps all.
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
    if name in BUNDLED:
        data = BUNDLED[name](split)
        return data.subset(choose(len(data), limit))
    kind, colon, path = name.partition(":")
    if colon and kind in AT_PATH:
        return AT_PATH[kind](path, split, limit)
    raise one_of(what, name, [*BUNDLED, *(f"{kind}:PATH" for kind in AT_PATH)])
