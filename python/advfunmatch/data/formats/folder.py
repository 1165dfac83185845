"""Image folders: PATH/train/<class>/*.png and PATH/test/<class>/*.png (or val/); ImageNet's and Tiny-ImageNet's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..loading import SPLIT_NAMES, Contents, Wanted

EXTENSIONS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
    ".jfif",
    ".jpe",
)
BESIDE = (".txt", ".csv", ".json", ".xml", ".yaml", ".md", ".db", ".ini", ".html")  # what lies beside images
IMAGENET_RESIZE, IMAGENET_CROP = 256, 224  # torchvision's for evaluation
TINY_IMAGENET = "tiny-imagenet-200"  # the folder that its archive holds
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's: file name, class, box

ClassFiles = dict[str, list[Path]]


def read_folder(wanted: Wanted) -> Contents:
    """One split of an image folder; only the images that `limit` keeps are decoded."""
    root = _root(wanted)
    if (root / "val" / ANNOTATIONS).is_file():
        raise InputError(
            f"data folder {wanted.path!r} is Tiny-ImageNet as it is shipped, whose classes lie in {ANNOTATIONS}; "
            f"tiny_imagenet:{wanted.path} reads it"
        )
    return _contents(wanted, _listed(root, wanted))


def read_imagenet(wanted: Wanted) -> Contents:
    """An image folder whose images are resized to 256 and cropped to 224, unless another size is asked for."""
    if wanted.resize is None and wanted.crop is None:
        wanted = replace(wanted, resize=IMAGENET_RESIZE, crop=IMAGENET_CROP)
    root = _root(wanted)
    val = root / "val"
    if wanted.split == "test" and val.is_dir() and any(val.glob("*.JPEG")):
        raise InputError(
            f"data folder {str(val)!r} holds images outside class folders, as ImageNet ships them; sort them into "
            "val/<class>/ first, as PyTorch's ImageNet example describes"
        )
    return _contents(wanted, _listed(root, wanted))


def read_tiny_imagenet(wanted: Wanted) -> Contents:
    """Tiny-ImageNet-200 as it is shipped: train/<class>/images, and val/images with their classes in a table."""
    root = _root(wanted)
    if (root / TINY_IMAGENET).is_dir():
        root = root / TINY_IMAGENET
    if not (root / "val" / ANNOTATIONS).is_file():
        return _contents(wanted, _listed(root, wanted))  # sorted into class folders by its user
    if not (root / "train").is_dir():
        raise InputError(f"data folder {wanted.path!r} has no folder 'train', which names the classes")
    val: ClassFiles = {}
    try:
        for line in (root / "val" / ANNOTATIONS).read_text().splitlines():
            name, class_name, *_ = line.split("\t")
            val.setdefault(class_name, []).append(root / "val" / "images" / name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(root / 'val' / ANNOTATIONS)!r} is no table of files and classes: {error}"
        ) from error
    return _contents(wanted, {"train": _class_files(root / "train"), "test": val})


def _root(wanted: Wanted) -> Path:
    require_folder(wanted.path)
    return Path(wanted.path)


def require_folder(path: str) -> None:
    """InputError if there is no such folder; an archive is to be unpacked first."""
    if not os.path.isdir(path):
        more = "; if it is an archive, unpack it first" if os.path.isfile(path) else ""
        raise InputError(f"data folder {path!r} does not exist or is not a folder{more}")


def _contents(wanted: Wanted, by_split: dict[str, ClassFiles]) -> Contents:
    from ..image_files import (
        any_colour,
        decoded_parts,
    )  # needs Pillow, which those who attack only may not have

    classes = _class_names(by_split, wanted)
    listed = by_split[wanted.split]
    files = [(file, label) for label, name in enumerate(classes) for file in listed.get(name, [])]

    def parts(kept: np.ndarray) -> Iterator[np.ndarray]:
        # The files of both splits decide: neither a grey file that comes first nor a grey split makes a set grey.
        colour = any_colour(file for one in by_split.values() for group in one.values() for file in group)
        return decoded_parts((files[index][0] for index in kept), colour, wanted)

    labels = np.array([label for _, label in files], np.int64)
    return Contents(parts, labels, classes, sized=True, files=[file for file, _ in files])


def _listed(root: Path, wanted: Wanted) -> dict[str, ClassFiles]:
    """The image files of each split that is there, by class."""
    try:
        found = {split: _split_folder(root, split) for split in SPLIT_NAMES}
        if found[wanted.split] is None:
            raise InputError(
                f"data folder {wanted.path!r} has no folder {wanted.split!r}; it needs train/<class>/ and "
                "test/<class>/ (or val/)"
            )
        if found["train"] and found["test"] and found["train"].samefile(found["test"]):
            raise InputError(f"train and test of data folder {wanted.path!r} are one and the same folder")
        return {split: _class_files(folder) for split, folder in found.items() if folder is not None}
    except OSError as error:
        raise InputError(f"data folder {wanted.path!r} cannot be listed: {error.strerror}") from error


def _split_folder(root: Path, split: str) -> Path | None:
    """Where a split lies: the first of its usual names that shares a class with train/, or that is there at all.

    Published sets often have a test/ without classes beside a val/ with them.
    """
    there = [root / name for name in SPLIT_NAMES[split] if os.path.isdir(root / name)]
    known = {entry.name for entry in _visible(root / "train")} if os.path.isdir(root / "train") else set()
    with_classes = [
        folder
        for folder in there
        if any(entry.is_dir() and entry.name in known for entry in _visible(folder))
    ]
    return next(iter(with_classes or there), None)


def _visible(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(os.listdir(folder)) if not _is_hidden(name)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # macOS's archives have a copy of every name there


def _class_files(folder: Path) -> ClassFiles:
    """The image files of each class folder, in folders below it too; hidden ones are no classes and no images."""
    hidden = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and _is_hidden(entry.name))
    if hidden:
        warnings.warn(f"hidden folders of {str(folder)!r} are no classes: {', '.join(hidden)}", stacklevel=2)
    listed: ClassFiles = {}
    places: dict[Path, str] = {}
    unread: list[Path] = []
    for entry in _visible(folder):
        if not entry.is_dir():
            unread.append(entry)
            continue
        if other := places.get(entry.resolve()):
            raise InputError(
                f"class folders {other!r} and {entry.name!r} of {str(folder)!r} are one and the same"
            )
        places[entry.resolve()] = entry.name
        found = list(_files(entry))
        listed[entry.name] = [file for file in found if file.suffix.lower() in EXTENSIONS]
        unread += [file for file in found if file.suffix.lower() not in EXTENSIONS]
    if unread := [file for file in unread if file.suffix.lower() not in BESIDE]:
        warnings.warn(
            f"{len(unread)} files of {str(folder)!r} are left out, such as {str(unread[0])!r}: images lie in class "
            f"folders and end in {', '.join(EXTENSIONS)}",
            stacklevel=2,
        )
    return listed


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link to a folder that it lies in
        return
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files(entry, (*above, real))
        else:
            yield entry


def _class_names(by_split: dict[str, ClassFiles], wanted: Wanted) -> tuple[str, ...]:
    """The classes, which the training folder names, so that one missing from the test split keeps its number."""
    listed = by_split[wanted.split]
    naming = by_split.get("train", listed)
    where = f"the {wanted.split} split of data folder {wanted.path!r}"
    if not any(listed.values()):
        raise InputError(f"{where} holds no images in class folders ({', '.join(EXTENSIONS)})")
    strangers = [name for name in listed if name not in naming]
    if strangers:
        raise InputError(f"{where} has class {strangers[0]!r}, which train/ does not have")
    empty = [name for name in naming if not any(files.get(name) for files in by_split.values())]
    if empty:
        warnings.warn(
            f"folders of {wanted.path!r} without images are no classes: {', '.join(empty)}", stacklevel=2
        )
    classes = tuple(name for name in naming if name not in empty)
    if len(classes) < 2:
        raise InputError(f"{where} holds {len(classes)} class folder, but at least 2 are needed")
    absent = [name for name in classes if not listed.get(name)]
    if absent:
        warnings.warn(
            f"{len(absent)} classes have no image in {where}: {', '.join(absent[:5])}", stacklevel=2
        )
    return classes
