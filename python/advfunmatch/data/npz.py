"""NumPy archives: PATH holds x_train, y_train, x_test, y_test; and class_names, unless the labels show all classes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .arrays import as_class_numbers, as_pixels, find_axes
from .dataset import ImageDataset, choose

# The names under which archives hold images and labels of each split, as different projects write them.
KEYS: tuple[dict[str, tuple[str, str]], ...] = (
    {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")},  # Keras, and `advfunmatch attack`
    {"train": ("train_images", "train_labels"), "test": ("test_images", "test_labels")},  # MedMNIST
    {"train": ("image", "label")},  # generated images (Rebuffi et al. 2021, Wang et al. 2023)
)


def load_npz(path: str, split: str, limit: int | None) -> ImageDataset:
    """Read one split: images (N, H, W), (N, H, W, C) or (N, C, H, W), as uint8 or as floats in [0, 1]."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise InputError(f"{path!r} is a single array, but an .npz archive is needed")
        with loaded as archive:
            keys = _keys(archive.files, split, path)
            images = archive[keys[split][0]]
            shapes = {name: _shape(archive, name) for name, _ in keys.values() if name in archive.files}
            labels = {name: archive[name] for _, name in keys.values() if name in archive.files}
            class_names = archive["class_names"] if "class_names" in archive.files else None
    except InputError:
        raise
    except Exception as error:  # zip, zlib and numpy each raise their own for a file that is damaged
        if "allow_pickle" in str(error):
            raise InputError(f"{path!r} holds Python objects, but must hold plain arrays only") from error
        raise InputError(f"{path!r} cannot be read as an .npz archive: {error}") from error

    own = keys[split]
    numbers = {name: as_class_numbers(labels[name], name, path) for name in sorted(labels)}
    # Both splits decide, so that they cannot be read in different ways, nor a class be missing from one of them.
    pairs = [own, *(pair for pair in keys.values() if pair != own and {*pair} <= {*shapes, *labels})]
    axes = find_axes([(x, shapes[x], len(numbers[y])) for x, y in pairs], path)
    images = as_pixels(images.transpose(axes), own[0], path)
    names = _class_names(class_names, np.concatenate(list(numbers.values())), path)
    kept = choose(len(images), limit)
    tensor = torch.from_numpy(np.ascontiguousarray(images))[kept]
    return ImageDataset(
        f"npz:{path}",
        split,
        tensor if tensor.dim() == 4 else tensor.unsqueeze(1),
        torch.from_numpy(numbers[own[1]])[kept],
        names,
    )


def _keys(stored: list[str], split: str, path: str) -> dict[str, tuple[str, str]]:
    """The names of images and labels by split; InputError if the wanted split is not stored."""
    for family in KEYS:
        if {name for pair in family.values() for name in pair} & {*stored}:
            break
    else:
        family = KEYS[0]
    if split not in family:
        raise InputError(
            f"{path!r} holds {' and '.join(family['train'])}, training images alone, and has no {split} split"
        )
    missing = [name for name in family[split] if name not in stored]
    if missing:
        needed = [name for pair in family.values() for name in pair]
        raise InputError(
            f"{path!r} has no array {missing[0]!r}; it needs {', '.join(needed[:-1])} and {needed[-1]}, "
            f"and holds {', '.join(stored) or 'nothing'}"
        )
    return family


def _shape(archive: Any, name: str) -> tuple[int, ...]:
    """The shape of an array, from its header alone."""
    with archive.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return tuple(read[version](file)[0])


def _class_names(stored: np.ndarray | None, labels: np.ndarray, path: str) -> tuple[str, ...]:
    """The names of the classes: the stored ones, or else the numbers up to the largest label of either split."""
    last = int(labels.max())
    if stored is not None:
        return _checked_names(stored, last, path)
    if last < 1:
        raise InputError(f"{path!r} holds only one class, but at least 2 are needed")
    if labels.min() == 1:
        warnings.warn(
            f"the labels of {path!r} are 1 to {last}, and are read as {last + 1} classes from 0 on, of which 0 has "
            "no image; subtract 1 if they count from 1",
            stacklevel=2,
        )
    return tuple(str(label) for label in range(last + 1))


def _checked_names(class_names: np.ndarray, last: int, path: str) -> tuple[str, ...]:
    """The stored names of the classes; InputError unless they are different strings, one for each label at least."""
    if class_names.ndim != 1 or class_names.dtype.kind != "U" or len(set(class_names)) != len(class_names):
        raise InputError(f"class_names in {path!r} must be a list of different strings")
    if last >= len(class_names):
        raise InputError(f"{path!r} has label {last}, but only {len(class_names)} class_names")
    if len(class_names) < 2:
        raise InputError(f"{path!r} holds only one class, but at least 2 are needed")
    return tuple(str(name) for name in class_names)
