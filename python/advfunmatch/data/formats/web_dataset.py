"""WebDataset shards, through its library: train-000000.tar and test-000000.tar (or val), with images and .cls.

Only the bytes of images and labels are taken. The library's own decoding is not used: it unpickles what is named .pkl.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from ..arrays import as_class_numbers, numbered_classes
from ..loading import SPLIT_NAMES, Contents, Wanted, files_of_split

if TYPE_CHECKING:
    from ..image_files import Encoded

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")
LABEL = "cls"


def read_webdataset(wanted: Wanted) -> Contents:
    """One split of shards: those whose names have ``train``, or ``test`` or ``val``."""
    path = Path(wanted.path)
    if not path.exists():
        raise InputError(f"data folder {wanted.path!r} does not exist")
    if path.is_file():
        by_split = {"train": [path], "test": []}
    else:
        files = sorted(path.rglob("*.tar"))
        by_split = {split: files_of_split(files, path, split) for split in SPLIT_NAMES}
    if not by_split[wanted.split]:
        raise InputError(
            f"{wanted.path!r} has no {wanted.split} split: no .tar, nor folder, is named "
            + " or ".join(SPLIT_NAMES[wanted.split])
        )
    labels = {
        split: as_class_numbers(
            np.array([_label(sample, wanted.path) for sample in _samples(listed, wanted.path)]),
            LABEL,
            wanted.path,
            unlabelled=wanted.unlabelled,
        )
        for split, listed in by_split.items()
        if listed
    }
    names = numbered_classes(np.concatenate(list(labels.values())), wanted.path, unlabelled=wanted.unlabelled)

    def parts(kept: np.ndarray) -> Iterator[np.ndarray]:
        from ..image_files import any_colour, decoded_parts

        colour = any_colour(
            _image(sample, wanted.path)
            for listed in by_split.values()
            for sample in _samples(listed, wanted.path)
        )
        chosen = {*kept.tolist()}
        samples = enumerate(_samples(by_split[wanted.split], wanted.path))
        images = (_image(sample, wanted.path) for index, sample in samples if index in chosen)
        return decoded_parts(images, colour, wanted)

    return Contents(parts, labels[wanted.split], names, sized=True)


def _samples(files: list[Path], path: str) -> Iterator[dict[str, Any]]:
    """What lies in the shards under each key, in order, as bytes."""
    import webdataset

    try:
        # Absolute paths: a name that starts with "pipe:" would be run as a command.
        yield from webdataset.WebDataset([str(file.resolve()) for file in files], shardshuffle=False)
    except Exception as error:  # tarfile and the library raise many kinds for a shard that is damaged
        raise InputError(f"{path!r} cannot be read as WebDataset shards: {error}") from error


def _label(sample: dict[str, Any], path: str) -> int:
    try:
        return int(sample[LABEL])
    except (KeyError, ValueError) as error:
        holds = ", ".join(name for name in sample if not name.startswith("__"))
        raise InputError(
            f"{path!r} has under {sample['__key__']!r} no class number in .{LABEL}, but {holds or 'nothing'}"
        ) from error


def _image(sample: dict[str, Any], path: str) -> Encoded:
    for ending in IMAGES:
        if ending in sample:
            return f"{sample['__key__']}.{ending} of {path}", sample[ending]
    raise InputError(f"{path!r} has under {sample['__key__']!r} no image ({', '.join(IMAGES)})")
