"""NumPy archives: PATH holds x_train, y_train, x_test, y_test; and class_names, unless the labels show all classes."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import InputError
from .dataset import ImageDataset, choose

MOST_CLASSES = 1_000_000  # more is a mistake, such as indices in place of labels


def load_npz(path: str, split: str, limit: int | None) -> ImageDataset:
    """Read one split: images (N, H, W), (N, H, W, C) or (N, C, H, W), as uint8 or as floats in [0, 1]."""
    wanted = (f"x_{split}", f"y_{split}")
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise InputError(f"{path!r} is a single array, but an .npz archive is needed")
        with loaded as archive:
            missing = [name for name in wanted if name not in archive.files]
            if missing:
                raise InputError(
                    f"{path!r} has no array {missing[0]!r}; it needs x_train, y_train, x_test and y_test, "
                    f"and holds {', '.join(archive.files) or 'nothing'}"
                )
            images, labels = archive[wanted[0]], archive[wanted[1]]
            class_names = archive["class_names"] if "class_names" in archive.files else None
            train_labels = archive["y_train"] if "y_train" in archive.files else labels
    except InputError:
        raise
    except Exception as error:  # zip, zlib and numpy each raise their own for a file that is damaged
        raise InputError(f"{path!r} cannot be read as an .npz archive: {error}") from error

    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    labels = labels.reshape(-1)
    if images.ndim != 4 or len(images) != len(labels) or images.size == 0:
        raise InputError(
            f"{wanted[0]} has shape {images.shape} and {wanted[1]} has {len(labels)} labels in {path!r}; "
            "images must be (N, H, W), (N, H, W, C) or (N, C, H, W) with as many labels"
        )
    _require_labels(labels, wanted[1], path)
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise InputError(
                f"{wanted[0]} in {path!r} is {images.dtype}, but must be uint8 or floating point"
            )
        images = images.astype(np.float32)
        if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
            raise InputError(
                f"{wanted[0]} in {path!r} holds floats outside [0, 1]; divide by 255 or store uint8"
            )
    if class_names is None:
        _require_labels(train_labels, "y_train", path)
        names = tuple(str(label) for label in range(int(max(train_labels.max(), labels.max())) + 1))
    else:
        names = _checked_names(class_names, int(labels.max()), path)
    if len(names) < 2:
        raise InputError(f"{path!r} holds only one class, but at least 2 are needed")
    kept = choose(len(labels), limit)
    return ImageDataset(
        f"npz:{path}",
        split,
        torch.from_numpy(np.ascontiguousarray(images))[kept],
        torch.from_numpy(labels.astype(np.int64))[kept],
        names,
    )


def _require_labels(labels: np.ndarray, name: str, path: str) -> None:
    """InputError unless they are class numbers."""
    integers = np.issubdtype(labels.dtype, np.integer) and labels.size > 0
    if not integers or not 0 <= labels.min() <= labels.max() < MOST_CLASSES:
        raise InputError(
            f"{name} in {path!r} must hold integer class numbers from 0 on, below {MOST_CLASSES}"
        )


def _checked_names(class_names: np.ndarray, last: int, path: str) -> tuple[str, ...]:
    """The stored names of the classes; InputError unless they are different strings, one for each label at least."""
    if class_names.ndim != 1 or class_names.dtype.kind != "U" or len(set(class_names)) != len(class_names):
        raise InputError(f"class_names in {path!r} must be a list of different strings")
    if last >= len(class_names):
        raise InputError(f"{path!r} has label {last}, but only {len(class_names)} class_names")
    return tuple(str(name) for name in class_names)
