"""CIFAR-10 and CIFAR-100 in every form they are shipped in, and the test set CIFAR-10.1.

PATH is the folder into which torchvision downloads, the folder within it, the archive as it is downloaded (of pickles
or of binary records), or the folder that this lies in.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..arrays import as_class_numbers
from ..loading import Contents, Wanted, in_parts
from .pickles import load_arrays

PIXELS = 3 * 32 * 32
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Form:
    """One way in which a set is shipped.

    Attributes:
        folder, archive: what holds the files.
        splits: the files of each split.
        meta: the file that names the classes.
        names, label: the keys of the classes and the labels in pickles.
        label_bytes: how many bytes come before the pixels of a binary record, the last of them the label; 0 in pickles.
    """

    folder: str
    archive: str
    splits: dict[str, tuple[str, ...]]
    meta: str
    names: str = ""
    label: str = ""
    label_bytes: int = 0


BATCHES = tuple(f"data_batch_{index}" for index in range(1, 6))
FORMS: dict[str, tuple[Form, ...]] = {
    "cifar10": (
        Form(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            {"train": BATCHES, "test": ("test_batch",)},
            meta="batches.meta",
            names="label_names",
            label="labels",
        ),
        Form(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            {"train": tuple(f"{batch}.bin" for batch in BATCHES), "test": ("test_batch.bin",)},
            meta="batches.meta.txt",
            label_bytes=1,
        ),
    ),
    "cifar100": (
        Form(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            {"train": ("train",), "test": ("test",)},
            meta="meta",
            names="fine_label_names",
            label="fine_labels",
        ),
        Form(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            {"train": ("train.bin",), "test": ("test.bin",)},
            meta="fine_label_names.txt",
            label_bytes=2,
        ),
    ),
}


def read_cifar(wanted: Wanted) -> Contents:
    """``cifar10`` or ``cifar100``, whichever the wanted name says; nothing is downloaded."""
    kind = wanted.name.partition(":")[0]
    for form in FORMS[kind]:
        files = (*form.splits[wanted.split], form.meta)
        found = _find(wanted.path, form, files)
        if found is not None:
            break
    else:
        usual = [name for form in FORMS[kind] for name in (form.folder, form.archive)]
        raise InputError(
            f"data folder {wanted.path!r} does not hold {', '.join(usual[:-1])} or {usual[-1]}, nor is it one of them"
        )
    missing = [name for name in files if name not in found]
    if missing:
        raise InputError(f"{form.folder} of {wanted.path!r} lacks {', '.join(missing)}")
    read = _read_records if form.label_bytes else _read_pickle
    try:
        batches = [read(found[name], form) for name in form.splits[wanted.split]]
        names = _class_names(found[form.meta], form)
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{form.folder} of {wanted.path!r} cannot be read: {error}") from error
    images = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)
    labels = as_class_numbers(np.concatenate([numbers for _, numbers in batches]), "labels", wanted.path)
    last = max(labels.tolist(), default=-1)
    if len(images) != len(labels) or not 0 <= last < len(names):
        raise InputError(
            f"{form.folder} of {wanted.path!r} holds {len(images)} images, {len(labels)} labels up to {last}, and "
            f"{len(names)} classes"
        )
    return Contents(in_parts(images), labels, names)


def read_cifar101(wanted: Wanted) -> Contents:
    """CIFAR-10.1 (Recht et al. 2018), a test set: cifar10.1_v6_data.npy and its labels, or those of v4."""
    if wanted.split != "test":
        raise InputError(f"data {wanted.name!r} is a test set, and has no {wanted.split} split")
    path = Path(wanted.path)
    folder = path.parent if path.is_file() else path
    versions = [version for version in ("v6", "v4") if (folder / f"cifar10.1_{version}_data.npy").is_file()]
    if path.is_file():
        versions = [version for version in versions if path.name.startswith(f"cifar10.1_{version}_")]
    if len(versions) != 1:
        raise InputError(
            f"data folder {wanted.path!r} holds "
            + (
                "both v4 and v6 of CIFAR-10.1; name the file, such as cifar10.1_v6_data.npy"
                if versions
                else "no cifar10.1_v6_data.npy, nor v4"
            )
        )
    images, labels = (
        load_array(folder / f"cifar10.1_{versions[0]}_{what}.npy") for what in ("data", "labels")
    )
    require_cifar_images(images, len(labels), str(folder))
    return Contents(
        in_parts(images.transpose(0, 3, 1, 2)),
        as_class_numbers(labels, "labels", str(folder)),
        CIFAR10_CLASSES,
    )


def load_array(path: Path) -> np.ndarray:
    """A .npy in a memory map; InputError if there is none, or it is damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises many kinds for a file that is damaged
        raise InputError(f"{str(path)!r} cannot be read as an array: {error}") from error


def require_cifar_images(images: np.ndarray, count: int, path: str) -> None:
    """InputError unless they are `count` images (N, 32, 32, 3) of uint8."""
    if images.dtype != np.uint8 or images.shape != (count, 32, 32, 3):
        raise InputError(
            f"images of {path!r} are {images.dtype} of shape {images.shape}, but must be uint8 ({count}, 32, 32, 3)"
        )


def _find(path: str, form: Form, names: Iterable[str]) -> dict[str, bytes] | None:
    """The files of a form by name, as far as they are there; None if PATH holds nothing of that form."""
    place = Path(path)
    if place.is_file():
        return _unpacked(place, form, names) if place.name.endswith((".tar.gz", ".tgz", ".tar")) else None
    for folder in (place, place / form.folder):
        there = {name: folder / name for name in names if (folder / name).is_file()}
        if set(there) - {form.meta}:
            return {name: file.read_bytes() for name, file in there.items()}
    archive = place / form.archive
    return _unpacked(archive, form, names) if archive.is_file() else None


def _unpacked(archive: Path, form: Form, names: Iterable[str]) -> dict[str, bytes] | None:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if member.isfile() and os.path.basename(folder) == form.folder and name in names:
                    content = tar.extractfile(member)
                    assert content is not None
                    found[name] = content.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{str(archive)!r} cannot be unpacked: {error}") from error
    return found or None


def _read_pickle(content: bytes, form: Form) -> tuple[np.ndarray, np.ndarray]:
    batch = load_arrays(io.BytesIO(content))
    return batch["data"], np.array(batch[form.label], np.int64)


def _read_records(content: bytes, form: Form) -> tuple[np.ndarray, np.ndarray]:
    records = np.frombuffer(content, np.uint8).reshape(-1, form.label_bytes + PIXELS)
    return records[:, form.label_bytes :], records[:, form.label_bytes - 1]


def _class_names(content: bytes, form: Form) -> tuple[str, ...]:
    if form.label_bytes:
        return tuple(line for line in content.decode().splitlines() if line)
    return tuple(load_arrays(io.BytesIO(content))[form.names])
