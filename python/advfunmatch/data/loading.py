"""From what a format holds to an `ImageDataset`: which images are kept, their size, and where they are held.

Note [Held in memory or mapped]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
A reader hands over its images in parts, in order, so that no set need fit into memory twice. They are held in memory
or, where a cache folder is given, written there once as one uncompressed .npy, which is memory-mapped from then on. The
file's name is a digest of what was asked for and of the source's sizes and times, so a changed source is read anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import make_folder
from .dataset import ImageDataset, choose
from .mapped import MappedFile, MappedImages

PART = 1024  # images handed over at a time: 3 MB of CIFAR, 150 MB of ImageNet

# What folders and files of a split are called, the first that is there.
SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "valid", "validation")}

# The images at sorted positions, in parts (n, C, H, W) of uint8 or float32.
Parts = Callable[[np.ndarray], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Wanted:
    """What is asked of a data set.

    Attributes:
        name: the set as it was named, such as ``"cifar10:PATH"``.
        path: what follows the colon.
        split: ``"train"`` or ``"test"``.
        limit: how many images to keep, drawn at random with a fixed seed; None for all.
        resize: length of the shorter side that images are scaled to; None leaves them.
        crop: side of the square that is cut from the middle; None leaves them.
        cache: folder for images that are to stay on disk; None holds them in memory.
        unlabelled: whether images without label (−1) are allowed.
    """

    name: str
    path: str
    split: str
    limit: int | None = None
    resize: int | None = None
    crop: int | None = None
    cache: str | None = None
    unlabelled: bool = False


@dataclass(frozen=True)
class Contents:
    """What a source holds of one split.

    Attributes:
        parts: reads images.
        labels: (N,), int64.
        class_names: one for each class.
        sized: whether `parts` has applied `resize` and `crop` already.
        files: what the images are read from; None for all that lies at the source's path.
    """

    parts: Parts
    labels: np.ndarray
    class_names: tuple[str, ...]
    sized: bool = False
    files: Sequence[Path] | None = None


def in_parts(images: np.ndarray) -> Parts:
    """Parts of an array (N, C, H, W) that is in memory, or in a memory map."""

    def parts(kept: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(kept), PART):
            yield images[kept[start : start + PART]]

    return parts


def files_of_split(files: Sequence[Path], root: Path, split: str) -> list[Path]:
    """The files that the first usual name of a split names, in theirs or in those of the folders between them and root.

    >>> files_of_split([Path("d/train-00001.tar"), Path("d/val/0.tar"), Path("d/test-0.tar")], Path("d"), "test")
    [PosixPath('d/test-0.tar')]
    """
    for name in SPLIT_NAMES[split]:
        named = [file for file in files if name in _words(str(file.relative_to(root)))]
        if named:
            return named
    return []


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()


def assemble(wanted: Wanted, contents: Contents) -> ImageDataset:
    """The data set: what `limit` keeps of the contents, in the wanted size, in memory or in the cache.

    Raises:
        InputError: it does not fit into memory, or the cache cannot be written.
    """
    last = int(contents.labels.max(initial=-1))
    if contents.class_names and last >= len(contents.class_names):
        raise InputError(
            f"data {wanted.name!r} ({wanted.split}) has label {last}, but only {len(contents.class_names)} classes"
        )
    kept = choose(len(contents.labels), wanted.limit)
    resized = not contents.sized and (wanted.resize is not None or wanted.crop is not None)

    def parts() -> Iterator[np.ndarray]:
        for part in contents.parts(kept.numpy()):
            yield _resized(part, wanted) if resized else part

    count = len(kept)
    images = (
        _in_memory(parts(), count, wanted)
        if wanted.cache is None
        else _in_cache(parts, count, wanted, contents.files)
    )
    labels = torch.from_numpy(contents.labels)[kept]
    return ImageDataset(wanted.name, wanted.split, images, labels, contents.class_names)


def _resized(images: np.ndarray, wanted: Wanted) -> np.ndarray:
    from torchvision.transforms.v2 import functional

    tensor = torch.from_numpy(np.ascontiguousarray(images))
    if wanted.resize is not None:
        tensor = functional.resize(tensor, [wanted.resize], antialias=True)
    if wanted.crop is not None:
        require_room(tensor.shape[3], tensor.shape[2], wanted.crop, f"images of {wanted.name!r}")
        tensor = functional.center_crop(tensor, [wanted.crop])
    return tensor.clamp_(0, 1).numpy() if tensor.is_floating_point() else tensor.numpy()


def require_room(width: int, height: int, crop: int, what: str) -> None:
    """InputError where a square of `crop` pixels cannot be cut from an image."""
    if min(width, height) < crop:
        raise InputError(f"crop is {crop}, but {what} have {width}×{height} pixels; resize makes them larger")


def _in_memory(parts: Iterator[np.ndarray], count: int, wanted: Wanted) -> Tensor:
    whole: np.ndarray | None = None
    done = 0
    for part in parts:
        if whole is None:
            _require_memory(count * part[0].nbytes, wanted)
            whole = np.empty((count, *part.shape[1:]), part.dtype)
        whole[done : done + len(part)] = part
        done += len(part)
    assert whole is not None
    assert done == count
    return torch.from_numpy(whole)


def _require_memory(needed: int, wanted: Wanted) -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise InputError(
            f"data {wanted.name!r} ({wanted.split}) needs {needed / 2**30:.0f} GiB of this machine's "
            f"{there / 2**30:.0f} GiB of memory; data_cache names a folder from which training images are read as "
            "needed, and limit keeps a part"
        )


def _in_cache(
    parts: Callable[[], Iterator[np.ndarray]], count: int, wanted: Wanted, files: Sequence[Path] | None
) -> MappedImages:
    """The images mapped from the cache, into which they are written first if they are not there."""
    assert wanted.cache is not None
    folder = Path(wanted.cache)
    make_folder(folder, "data_cache")
    try:
        stored = folder / f"{_digest(wanted, files)}.npy"
        with open(stored.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a run want the same file; one writes it
            if not stored.exists() or not MappedFile.is_whole(stored):
                _write(stored, parts(), count)
        return MappedImages(MappedFile(stored))
    except OSError as error:
        raise InputError(f"data_cache {wanted.cache!r} cannot be used: {error.strerror}") from error


def _write(stored: Path, parts: Iterator[np.ndarray], count: int) -> None:
    """The images as .npy, whole or not at all. Not through a map: a full disk would end the process there."""
    partial = stored.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            for index, part in enumerate(parts):
                if index == 0:
                    shape = (count, *part.shape[1:])
                    header = {"descr": part.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(part).data)
        os.replace(partial, stored)
    finally:
        partial.unlink(missing_ok=True)


def _digest(wanted: Wanted, files: Sequence[Path] | None) -> str:
    """A name for the images that are wanted, which changes with what they are read from."""
    kind, colon, _ = wanted.name.partition(":")
    if files is None:
        path = wanted.path if os.path.exists(wanted.path) else wanted.path.rpartition("@")[0]
        files = _below(path) if colon else []
    asked = (kind, os.path.abspath(wanted.path), wanted.split, wanted.limit, wanted.resize, wanted.crop)
    digest = hashlib.blake2b(repr(asked).encode(), digest_size=16)
    for file in files:
        status = os.stat(file)
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _below(path: str) -> list[Path]:
    """A file, or all files in a folder and those below it, in order."""
    if os.path.isfile(path):
        return [Path(path)]
    found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return sorted(file for file in found if file.is_file())
