"""Image files as arrays of one kind: grey or colour, upright, eight bits a channel.

Note [Pixels of files]
~~~~~~~~~~~~~~~~~~~~~~
A set is colour as soon as one of its files is; a palette of greys is grey. Photos are turned upright as their EXIF
orientation says, which torchvision's folders do not do. Sixteen bits keep their upper eight: Pillow's own conversion
makes all above 255 white. Transparency is left out, as torchvision leaves it out, and a warning says so where there is
any.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError

GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "F")

Result = TypeVar("Result")


def any_colour(files: Iterable[Path]) -> bool:
    """Whether one of these image files has colour; reads headers, up to the first that has."""
    return any(_read(file, _has_colour) for file in files)


def decode_all(files: Sequence[Path], colour: bool) -> list[np.ndarray]:
    """The images, (H, W, 3) where `colour` and (H, W) otherwise, uint8, of any size.

    Raises:
        InputError: a file is no image, or is damaged, or its pixels have no fixed range.
    """
    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(lambda file: _read(file, lambda image: _decode(image, colour)), files))
    transparent = [file for file, (_, opaque) in zip(files, decoded, strict=True) if not opaque]
    if transparent:
        warnings.warn(
            f"{len(transparent)} images have transparent pixels, such as {str(transparent[0])!r}; transparency "
            "is left out, and what it hid is seen",
            stacklevel=2,
        )
    return [array for array, _ in decoded]


def _read(file: Path, look: Callable[[Image.Image], Result]) -> Result:
    """What `look` makes of the opened file; InputError says why it cannot be read."""
    try:
        with Image.open(file) as image:
            return look(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image {str(file)!r} cannot be read: {error}") from error


def _has_colour(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        return bool((palette != palette[:, :1]).any())
    return image.mode not in GREY_MODES


def _decode(image: Image.Image, colour: bool) -> tuple[np.ndarray, bool]:
    """The pixels, and whether all of them are opaque."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not deep:
        raise ValueError("it has 32 bits a pixel, which have no fixed range; 8 or 16 do")
    image = ImageOps.exif_transpose(image)
    if deep:
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    opaque = True
    if image.has_transparency_data:
        image = image.convert("RGBA")
        lowest = image.getchannel("A").getextrema()[0]
        opaque = lowest == 255
    return np.array(image.convert("RGB" if colour else "L")), opaque
