"""NumPy archives: PATH holds x_train, y_train, x_test, y_test."""

from __future__ import annotations

import zipfile

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
            all_labels = archive["y_train"] if "y_train" in archive.files else labels
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{path!r} cannot be read as an .npz archive: {error}") from error

    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    labels = labels.reshape(-1)
    if images.ndim != 4 or len(images) != len(labels) or len(labels) == 0:
        raise InputError(
            f"{wanted[0]} has shape {images.shape} and {wanted[1]} has {len(labels)} labels in {path!r}; "
            "images must be (N, H, W), (N, H, W, C) or (N, C, H, W) with as many labels"
        )
    if not np.issubdtype(labels.dtype, np.integer) or not 0 <= labels.min() <= labels.max() < MOST_CLASSES:
        raise InputError(
            f"{wanted[1]} in {path!r} must hold integer class numbers from 0 on, below {MOST_CLASSES}"
        )
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
    num_classes = int(max(all_labels.max(), labels.max())) + 1
    if num_classes < 2:
        raise InputError(f"{path!r} holds only one class, but at least 2 are needed")
    kept = choose(len(labels), limit)
    return ImageDataset(
        f"npz:{path}",
        split,
        torch.from_numpy(np.ascontiguousarray(images))[kept],
        torch.from_numpy(labels.astype(np.int64))[kept],
        tuple(str(label) for label in range(num_classes)),
    )
