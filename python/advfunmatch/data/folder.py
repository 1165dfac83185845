"""Image folders: PATH/train/<class>/*.png and PATH/test/<class>/*.png (or val/), all images of one size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from .dataset import ImageDataset, choose

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


def load_folder(path: str, split: str, limit: int | None) -> ImageDataset:
    """Read one split of an image folder; only the images that `limit` keeps are decoded."""
    from .image_files import any_colour, decode_all  # needs Pillow, which those who attack only may not have

    root = Path(path)
    if not os.path.isdir(root):
        raise InputError(f"data folder {path!r} does not exist or is not a folder")
    try:
        found = {name: _split_folder(root, name) for name in SPLIT_FOLDERS}
        folder = found[split]
        if folder is None:
            raise InputError(
                f"data folder {path!r} has no folder {split!r}; it needs train/<class>/ and test/<class>/ (or val/)"
            )
        if found["train"] and found["test"] and found["train"].samefile(found["test"]):
            raise InputError(f"train and test of data folder {path!r} are one and the same folder")
        by_split = {name: _class_files(where) for name, where in found.items() if where is not None}
    except OSError as error:
        raise InputError(f"data folder {path!r} cannot be listed: {error.strerror}") from error
    classes = _class_names(by_split, split, folder)
    files = [(file, label) for label, name in enumerate(classes) for file in by_split[split].get(name, [])]
    kept = [files[index] for index in choose(len(files), limit)]

    # The files of both splits decide, so that neither a grey file that comes first nor a grey split makes a set grey.
    colour = any_colour(file for listed in by_split.values() for group in listed.values() for file in group)
    arrays = decode_all([file for file, _ in kept], colour)
    for (file, _), array in zip(kept, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise InputError(
                f"image {str(file)!r} is {array.shape[1]}×{array.shape[0]} pixels, but {str(kept[0][0])!r} is "
                f"{arrays[0].shape[1]}×{arrays[0].shape[0]}; all images must have one size"
            )
    images = torch.from_numpy(np.stack(arrays))
    images = images.permute(0, 3, 1, 2).contiguous() if colour else images.unsqueeze(1)
    labels = torch.tensor([label for _, label in kept])
    return ImageDataset(f"folder:{path}", split, images, labels, classes)


def _split_folder(root: Path, split: str) -> Path | None:
    """Where a split lies: the first of its usual names that has class folders, or that is there at all."""
    there = [root / name for name in SPLIT_FOLDERS[split] if os.path.isdir(root / name)]
    with_classes = [folder for folder in there if any(entry.is_dir() for entry in _visible(folder))]
    return next(iter(with_classes or there), None)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, in folders below it too; hidden ones are no classes and no images."""
    hidden = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name.startswith("."))
    if hidden:
        warnings.warn(f"hidden folders of {str(folder)!r} are no classes: {', '.join(hidden)}", stacklevel=2)
    listed: dict[str, list[Path]] = {}
    places: dict[Path, str] = {}
    for entry in _visible(folder):
        if not entry.is_dir():
            continue
        if other := places.get(entry.resolve()):
            raise InputError(
                f"class folders {other!r} and {entry.name!r} of {str(folder)!r} are one and the same"
            )
        places[entry.resolve()] = entry.name
        listed[entry.name] = list(_images(entry))
    return listed


def _images(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link to a folder that it lies in
        return
    for entry in _visible(folder):
        if entry.suffix.lower() in EXTENSIONS:
            yield entry
        elif entry.is_dir():
            yield from _images(entry, (*above, real))


def _class_names(by_split: dict[str, dict[str, list[Path]]], split: str, folder: Path) -> tuple[str, ...]:
    """The classes, which the training folder names, so that one missing from the test split keeps its number."""
    listed = by_split[split]
    naming = by_split.get("train", listed)
    if not any(listed.values()):
        raise InputError(
            f"data folder {str(folder)!r} holds no images in class folders ({', '.join(EXTENSIONS)})"
        )
    strangers = [name for name in listed if name not in naming]
    if strangers:
        raise InputError(
            f"data folder {str(folder)!r} has class {strangers[0]!r}, which train/ does not have"
        )
    empty = [name for name in naming if not any(files.get(name) for files in by_split.values())]
    if empty:
        warnings.warn(f"folders without images are no classes: {', '.join(empty)}", stacklevel=2)
    classes = tuple(name for name in naming if name not in empty)
    if len(classes) < 2:
        raise InputError(
            f"data folder {str(folder)!r} holds {len(classes)} class folder, but at least 2 are needed"
        )
    absent = [name for name in classes if not listed.get(name)]
    if absent:
        warnings.warn(
            f"{len(absent)} classes have no image in {str(folder)!r}: {', '.join(absent[:5])}", stacklevel=2
        )
    return classes
