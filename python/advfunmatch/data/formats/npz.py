"""NumPy archives: PATH holds x_train, y_train, x_test, y_test; class_names, unless the labels show all classes; axes,
unless the sizes show which is which.

The names that MedMNIST and the published sets of generated images use are read too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from numpy.lib.npyio import NpzFile

from ...errors import InputError
from ..arrays import as_class_numbers, as_pixels, find_axes, numbered_classes
from ..dataset import UNLABELLED
from ..loading import PART, Contents, Wanted, in_parts

# The names under which archives hold images and labels of each split, as different projects write them.
KEYS: tuple[dict[str, tuple[str, str]], ...] = (
    {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")},  # Keras, and `advfunmatch attack`
    {"train": ("train_images", "train_labels"), "test": ("test_images", "test_labels")},  # MedMNIST
    {"train": ("image", "label")},  # generated images (Rebuffi et al. 2021, Wang et al. 2023)
)
OBJECTS = "{} holds Python objects, but must hold plain arrays only; pickle: reads a pickle of arrays"
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(wanted: Wanted) -> Contents:
    """One split: images (N, H, W), (N, H, W, C) or (N, C, H, W), as uint8 or as floats in [0, 1]."""
    path = wanted.path
    with _opened(path) as archive:
        keys = _keys(archive.files, wanted)
        headers = {name: _header(archive, name) for name, _ in keys.values() if name in archive.files}
        labels = {name: archive[name] for _, name in keys.values() if name in archive.files}
        class_names = archive["class_names"] if "class_names" in archive.files else None
        said = str(archive["axes"]) if "axes" in archive.files else None
    own = keys[wanted.split]
    if any(dtype.hasobject for _, _, dtype in headers.values()):
        raise InputError(OBJECTS.format(repr(path)))
    shapes = {name: shape for name, (shape, _, _) in headers.items()}
    if own[1] not in labels:
        labels[own[1]] = np.full(shapes[own[0]][:1], UNLABELLED)
    numbers = {
        name: as_class_numbers(stored, name, path, unlabelled=wanted.unlabelled)
        for name, stored in sorted(labels.items())
    }
    # Both splits decide, so that they cannot be read in different ways, nor a class be missing from one of them.
    pairs = [own, *(pair for pair in keys.values() if pair != own and {*pair} <= {*shapes, *labels})]
    axes = find_axes([(x, shapes[x], len(numbers[y])) for x, y in pairs], path, said)
    every_label = np.concatenate(list(numbers.values()))
    if class_names is not None:
        names = _checked_names(class_names, int(every_label.max()), path)
    else:
        names = numbered_classes(every_label, path, unlabelled=wanted.unlabelled)

    def parts(kept: np.ndarray) -> Iterator[np.ndarray]:
        highest, brightest = 0, 0.0
        with _opened(path) as archive:
            for rows in _rows(archive, own[0], axes, kept):
                images = as_pixels(rows, own[0], path)
                highest = max(highest, int(images.max()) if images.dtype == np.uint8 else 2)
                brightest = max(brightest, float(images.max()))
                yield images if images.ndim == 4 else images[:, None]
        if highest == 1:
            warnings.warn(
                f"{own[0]} in {path!r} is uint8 with no value above 1, and is read as shades of 255; store 0 and "
                "255, or floats, if 1 is meant to be white",
                stacklevel=2,
            )
        if 0 < brightest < 1.01 / 255:
            warnings.warn(
                f"{own[0]} in {path!r} has no value above 1/255, as images that were divided by 255 twice",
                stacklevel=2,
            )

    return Contents(parts, numbers[own[1]], names)


@contextmanager
def _opened(path: str) -> Iterator[NpzFile]:
    """The archive; whatever goes wrong in reading it becomes an InputError."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, NpzFile):
            raise InputError(
                f"{path!r} is a single array, but an .npz archive is needed; cifar10.1: and cifar10c: read those sets"
            )
        with loaded as archive:
            yield archive
    except InputError:
        raise
    except Exception as error:  # zip, zlib and numpy each raise their own for a file that is damaged
        if "allow_pickle" in str(error):
            raise InputError(OBJECTS.format(repr(path))) from error
        raise InputError(f"{path!r} cannot be read as an .npz archive: {error}") from error


def _header(archive: NpzFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of an array, from its header alone."""
    with _member(archive, name) as file:
        return _read_header(file)


def _member(archive: NpzFile, name: str) -> IO[bytes]:
    assert archive.zip is not None  # it is until the archive is closed
    return archive.zip.open(f"{name}.npy")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    return HEADERS[np.lib.format.read_magic(file)](file)


def _rows(archive: NpzFile, name: str, axes: tuple[int, ...], kept: np.ndarray) -> Iterator[np.ndarray]:
    """The images at `kept`, in parts; an archive whose first axis counts the images is never held whole."""
    shape, fortran, dtype = _header(archive, name)
    if axes[0] != 0 or fortran:
        yield from in_parts(archive[name].transpose(axes))(kept)
        return
    with _member(archive, name) as file:
        _read_header(file)
        for start in range(0, int(kept[-1]) + 1, PART):
            stop = min(start + PART, shape[0])
            content = file.read((stop - start) * dtype.itemsize * math.prod(shape[1:]))
            rows = np.frombuffer(content, dtype).reshape(stop - start, *shape[1:]).transpose(axes)
            first, last = np.searchsorted(kept, (start, stop))
            if first < last:
                yield rows[kept[first:last] - start]


def _keys(stored: list[str], wanted: Wanted) -> dict[str, tuple[str, str]]:
    """The names of images and labels by split; InputError if the wanted split is not stored."""
    split, path = wanted.split, wanted.path
    for family in KEYS:
        if {name for pair in family.values() for name in pair} & {*stored}:
            break
    else:
        family = KEYS[0]
    if split not in family:
        raise InputError(
            f"{path!r} holds {' and '.join(family['train'])}, training images alone, and has no {split} split; it "
            "goes with extra_data"
        )
    images, labels = family[split]
    missing = [name for name in (images, labels) if name not in stored]
    if wanted.unlabelled and missing == [labels]:
        return family
    if missing:
        needed = [name for pair in family.values() for name in pair]
        raise InputError(
            f"{path!r} has no array {missing[0]!r}; it needs {', '.join(needed[:-1])} and {needed[-1]}, "
            f"and holds {', '.join(stored) or 'nothing'}"
        )
    return family


def _checked_names(class_names: np.ndarray, last: int, path: str) -> tuple[str, ...]:
    """The stored names of the classes; InputError unless they are different strings, one for each label at least."""
    if class_names.ndim != 1 or class_names.dtype.kind != "U" or len(set(class_names)) != len(class_names):
        raise InputError(f"class_names in {path!r} must be a list of different strings")
    if last >= len(class_names):
        raise InputError(f"{path!r} has label {last}, but only {len(class_names)} class_names")
    if len(class_names) < 2:
        raise InputError(f"{path!r} holds only one class, but at least 2 are needed")
    return tuple(str(name) for name in class_names)
