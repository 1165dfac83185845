"""Image folders: PATH/train/<class>/*.png and PATH/test/<class>/*.png, all images of one size."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from .dataset import ImageDataset, choose

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def load_folder(path: str, split: str, limit: int | None) -> ImageDataset:
    """Read one split of an image folder; only the images that `limit` keeps are decoded."""
    root = Path(path)
    if not os.path.isdir(root):
        raise InputError(f"data folder {path!r} does not exist or is not a folder")
    folder = root / split
    if not os.path.isdir(folder):
        raise InputError(
            f"data folder {path!r} has no folder {split!r}; it needs train/<class>/ and test/<class>/"
        )
    try:
        # The training folder names the classes, so that a class missing from the test split keeps its number.
        names = root / "train" if (root / "train").is_dir() else folder
        classes = tuple(sorted(entry.name for entry in names.iterdir() if entry.is_dir()))
        strangers = sorted(
            entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in classes
        )
        if strangers:
            raise InputError(
                f"data folder {str(folder)!r} has class {strangers[0]!r}, which train/ does not have"
            )
        files = [
            (file, label)
            for label, name in enumerate(classes)
            if (folder / name).is_dir()
            for file in sorted((folder / name).iterdir())
            if file.suffix.lower() in EXTENSIONS
        ]
    except OSError as error:
        raise InputError(f"data folder {path!r} cannot be listed: {error.strerror}") from error
    if not files:
        raise InputError(
            f"data folder {str(folder)!r} holds no images in class folders ({', '.join(EXTENSIONS)})"
        )
    if len(classes) < 2:
        raise InputError(
            f"data folder {str(folder)!r} holds {len(classes)} class folder, but at least 2 are needed"
        )
    kept = [files[index] for index in choose(len(files), limit)]

    mode = _read(kept[0][0], None).ndim
    with ThreadPoolExecutor() as pool:
        arrays = list(pool.map(lambda entry: _read(entry[0], "L" if mode == 2 else "RGB"), kept))
    for (file, _), array in zip(kept, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise InputError(
                f"image {str(file)!r} is {array.shape[1]}×{array.shape[0]} pixels, but {str(kept[0][0])!r} is "
                f"{arrays[0].shape[1]}×{arrays[0].shape[0]}; all images must have one size"
            )
    images = torch.from_numpy(np.stack(arrays))
    images = images.unsqueeze(1) if mode == 2 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label for _, label in kept])
    return ImageDataset(f"folder:{path}", split, images, labels, classes)


def _read(file: Path, mode: str | None) -> np.ndarray:
    """One decoded image, (H, W) for grey and (H, W, 3) for colour; the file decides if no mode is given."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image: Image.Image = opened
            if image.mode in ("I", "F"):
                raise ValueError("it has 32 bits a pixel, which have no fixed range; 8 or 16 do")
            if image.mode.startswith("I;16"):  # Pillow's own conversion makes all above 255 white
                image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
            wanted = mode or ("L" if image.mode in ("1", "L", "LA") else "RGB")
            return np.array(image.convert(wanted))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image {str(file)!r} cannot be read: {error}") from error
