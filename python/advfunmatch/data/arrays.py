"""What an array of images is: which axis is which, what its values mean, and whose labels go with it.

Note [Axes]
~~~~~~~~~~~
The number of labels says which axis counts the images: the first, or else the last. The axis of channels is that of one
or three, or one shorter than both others; what leaves more than one reading, or none, is refused rather than guessed.
All arrays of a file are read the same way. An archive's array ``axes`` decides before all that: "NCHW", "NHWC".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ..errors import InputError, one_of
from .dataset import UNLABELLED

MOST_CLASSES = 1_000_000  # more is a mistake, such as indices in place of labels
# How an array may be laid out, and the order of its axes that makes it (N, C, H, W), or (N, H, W) for three of them.
LAYOUTS: dict[str, tuple[int, ...]] = {
    "(N, C, H, W)": (0, 1, 2, 3),
    "(N, H, W, C)": (0, 3, 1, 2),
    "(N, H, W)": (0, 1, 2),
    "(C, H, W, N)": (3, 0, 1, 2),
    "(H, W, C, N)": (3, 2, 0, 1),
    "(H, W, N)": (2, 0, 1),
}
AXES = "in an archive, an array axes = 'NCHW' or 'NHWC' says which it is"
ALLOWED = "images must be (N, H, W), (N, H, W, C) or (N, C, H, W) with as many labels"


def find_axes(
    arrays: Sequence[tuple[str, tuple[int, ...], int]], path: str, said: str | None = None
) -> tuple[int, ...]:
    """The order of axes that makes each array (N, C, H, W), or (N, H, W). See Note [Axes].

    Args:
        arrays: name, shape and number of labels of each.
        path: the file, for an error's sentence.
        said: what the file itself says of them, such as "NCHW".

    Raises:
        InputError: the arrays can be read in no way, or in several.

    >>> find_axes([("x", (10, 32, 32, 4), 10)], "FILE")
    (0, 3, 1, 2)
    """
    if said is not None:
        return _axes_said(arrays, path, said)
    shared = list(LAYOUTS)
    for name, shape, labels in arrays:
        readings = _readings(shape, labels)
        if not readings:
            raise InputError(
                f"{name} has shape {shape} and {labels} labels in {path!r}; {_missing(shape, labels)}"
            )
        shared = [layout for layout in shared if layout in readings]
    name, shape, _ = arrays[0]
    if not shared:
        sizes = ", ".join(f"{name} {shape}" for name, shape, _ in arrays)
        raise InputError(f"the arrays of {path!r} are not laid out alike: {sizes}; {ALLOWED}")
    if len(shared) > 1:
        raise InputError(
            f"{name} has shape {shape} in {path!r}, which can be read as {' or as '.join(shared)}; store it as one "
            f"that leaves no doubt, such as (N, H, W) for grey images; {AXES}"
        )
    return LAYOUTS[shared[0]]


def _axes_said(arrays: Sequence[tuple[str, tuple[int, ...], int]], path: str, said: str) -> tuple[int, ...]:
    """The order of axes that a file asks for; InputError where its arrays are not such ones."""
    by_letters = {layout.strip("()").replace(", ", ""): axes for layout, axes in LAYOUTS.items()}
    if said not in by_letters:
        raise one_of(f"axes in {path!r}", said, by_letters)
    axes = by_letters[said]
    for name, shape, labels in arrays:
        if len(shape) != len(axes) or shape[axes[0]] != labels or 0 in shape:
            raise InputError(
                f"{name} has shape {shape} and {labels} labels in {path!r}, but axes says {said!r}"
            )
    return axes


def _missing(shape: tuple[int, ...], labels: int) -> str:
    """Why an array of that shape can be read in no way."""
    if len(shape) == 4 and labels in (shape[0], shape[-1]) and 0 not in shape:
        sizes = shape[1:] if shape[0] == labels else shape[:-1]
        return (
            f"which of {', '.join(map(str, sizes))} counts the channels it does not show: they are taken to be 1 or 3, "
            f"or fewer than rows and columns; {AXES}"
        )
    return ALLOWED


def _readings(shape: tuple[int, ...], labels: int) -> list[str]:
    """The layouts that an array of that shape may have."""
    if 0 in shape:
        return []
    found = []
    for layout, axes in LAYOUTS.items():
        if len(axes) != len(shape) or shape[axes[0]] != labels:
            continue
        sizes = [shape[axis] for axis in axes[1:]]
        if len(sizes) == 2 or sizes[0] in (1, 3) or sizes[0] < min(sizes[1:]):
            found.append(layout)
    first = [layout for layout in found if layout.startswith("(N")]
    return first or found


def as_pixels(images: np.ndarray, name: str, path: str) -> np.ndarray:
    """The values as uint8 (0 to 255) or float32 (0 to 1); InputError for any other range or type."""
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"{name} in {path!r} is {images.dtype}, but must be uint8 or floating point")
    images = images.astype(np.float32)
    if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
        raise InputError(f"{name} in {path!r} holds floats outside [0, 1]; divide by 255 or store uint8")
    return images


def as_class_numbers(labels: np.ndarray, name: str, path: str, *, unlabelled: bool = False) -> np.ndarray:
    """Labels as int64 (N,), from (N,), (N, 1) or (1, N).

    Args:
        labels: as they are stored.
        name, path: the array and its file, for an error's sentence.
        unlabelled: whether −1 may stand for an image without label.

    Raises:
        InputError: they are no class numbers, or several an image.
    """
    if labels.ndim > 2 or (labels.ndim == 2 and 1 not in labels.shape):
        raise InputError(
            f"{name} in {path!r} has shape {labels.shape}, but must hold one class number an image; of one-hot rows "
            "store argmax(1)"
        )
    labels = labels.reshape(-1)
    lowest = UNLABELLED if unlabelled else 0
    if not np.issubdtype(labels.dtype, np.integer) or (
        labels.size and not lowest <= labels.min() <= labels.max() < MOST_CLASSES
    ):
        raise InputError(
            f"{name} in {path!r} must hold integer class numbers from 0 on, below {MOST_CLASSES}"
        )
    return labels.astype(np.int64)


def numbered_classes(labels: np.ndarray, path: str, *, unlabelled: bool = False) -> tuple[str, ...]:
    """The numbers from 0 to the largest label as names of classes, where nothing else names them.

    Args:
        labels: of every split that is there, so that no class is missing from one of them.
        path: the file, for a sentence.
        unlabelled: whether images without label, and so sets of one class or none, are allowed.

    Raises:
        InputError: there is but one class.
    """
    last = int(labels.max())
    if last == UNLABELLED:
        return ()
    if last < 1 and not unlabelled:
        raise InputError(f"{path!r} holds only one class, but at least 2 are needed")
    if labels.min() == 1:
        warnings.warn(
            f"the labels of {path!r} are 1 to {last}, and are read as {last + 1} classes from 0 on, of which 0 has "
            "no image; subtract 1 if they count from 1",
            stacklevel=2,
        )
    return tuple(str(label) for label in range(last + 1))
