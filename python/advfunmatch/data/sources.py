"""Data by name: `load_dataset("digits", split="train")`, `load_dataset("folder:PATH", split="test")`."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import InputError, one_of
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
from .loading import Contents, Wanted, assemble

SPLITS = ("train", "test")
BUNDLED: dict[str, Callable[[Wanted], Contents]] = {"digits": read_digits}
AT_PATH: dict[str, Callable[[Wanted], Contents]] = {
    "folder": read_folder,
    "npz": read_npz,
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "cifar10.1": read_cifar101,
    "cifar10c": read_corrupted,
    "cifar100c": read_corrupted,
    "svhn": read_svhn,
    "mnist": read_mnist,
    "fashion_mnist": read_mnist,
    "imagenet": read_imagenet,
    "tiny_imagenet": read_tiny_imagenet,
    "pickle": read_pickle,
    "hf": read_huggingface,
    "webdataset": read_webdataset,
}
NAMES = (*BUNDLED, *(f"{kind}:PATH" for kind in AT_PATH))
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
            the quickstart has a table of them.
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
    reader = AT_PATH.get(kind) if colon else BUNDLED.get(name)
    if reader is None:
        raise one_of(what, name, NAMES)
    if path.endswith(BETON):
        raise InputError(
            f"{what} {path!r} is a file of ffcv, whose form is not read; the images that it was made from are, as a "
            "folder, as parquet files or as WebDataset shards"
        )
    wanted = Wanted(name, path, split, limit, resize, crop, cache, unlabelled)
    try:
        return assemble(wanted, reader(wanted))
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        raise InputError(
            f"{what} {name!r} needs the package {error.name!r}: pip install {error.name}"
        ) from error
