"""MNIST and Fashion-MNIST in their idx files, packed or not, and SVHN in its .mat files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..arrays import as_class_numbers, find_axes
from ..loading import Contents, Wanted, in_parts

DIGITS = tuple(str(digit) for digit in range(10))
FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# The folder below torchvision's root, and the classes.
SETS = {"mnist": ("MNIST", DIGITS), "fashion_mnist": ("FashionMNIST", FASHION)}
PREFIXES = {"train": "train", "test": "t10k"}
UNSIGNED_BYTE = 0x08


def read_mnist(wanted: Wanted) -> Contents:
    """``mnist`` or ``fashion_mnist`` at PATH: the folder of the idx files, or torchvision's root."""
    folder_name, classes = SETS[wanted.name.partition(":")[0]]
    root = Path(wanted.path)
    images, labels = (
        _read_idx(_find(root, folder_name, f"{PREFIXES[wanted.split]}-{what}"), dimensions)
        for what, dimensions in (("images", 3), ("labels", 1))
    )
    numbers = as_class_numbers(labels, "labels", wanted.path)
    last = max(numbers.tolist(), default=-1)
    if len(images) != len(numbers) or not 0 <= last < len(classes):
        raise InputError(
            f"{wanted.path!r} holds {len(images)} images and {len(numbers)} labels up to {last} "
            f"({wanted.split}), but there must be as many of both, and labels below {len(classes)}"
        )
    return Contents(in_parts(images[:, None]), numbers, classes)


def read_svhn(wanted: Wanted) -> Contents:
    """SVHN's cropped digits at PATH: the folder of train_32x32.mat and test_32x32.mat, or one such file."""
    path = Path(wanted.path)
    if path.suffix == ".mat":
        if (wanted.split == "test") != path.name.startswith("test"):
            raise InputError(f"{wanted.path!r} has no {wanted.split} split; PATH may be the folder of both")
    else:
        path = path / f"{wanted.split}_32x32.mat"
    images, labels = _read_mat(path)
    numbers = as_class_numbers(labels, "y", str(path))
    if not {*numbers.tolist()} <= {*range(1, 11)}:
        raise InputError(f"y of {str(path)!r} must hold 1 to 10, which is the digit 0")
    axes = find_axes([("X", images.shape, len(numbers))], str(path))
    return Contents(in_parts(images.transpose(axes)), numbers % 10, DIGITS)


def _read_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import scipy.io

    if not path.is_file():
        raise InputError(f"{str(path)!r} does not exist or is not a file")
    try:
        stored = scipy.io.loadmat(path)
        return stored["X"], stored["y"]
    except KeyError as error:
        raise InputError(f"{str(path)!r} has no array {error}, but must hold X and y") from error
    except Exception as error:  # scipy raises many kinds for a file that is damaged
        raise InputError(f"{str(path)!r} cannot be read as a .mat file: {error}") from error


def _find(root: Path, folder_name: str, stem: str) -> Path:
    for folder in (root, root / folder_name / "raw", root / "raw"):
        for file in sorted(folder.glob(f"{stem}[-.]idx*")):
            if file.is_file():
                return file
            if (below := file / file.name).is_file():  # as some unpack it, in a folder of its own
                return below
    raise InputError(f"data folder {str(root)!r} holds no {stem}-idx…-ubyte, packed (.gz) or not")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An array in the form that LeCun's page describes: type, number of dimensions, sizes, bytes."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read()
        zeros, kind, stored = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if (zeros, kind, stored) != (0, UNSIGNED_BYTE, dimensions) or len(content) != start + math.prod(shape):
        raise InputError(f"{str(path)!r} is no idx file of bytes in {dimensions} dimensions, or is truncated")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
