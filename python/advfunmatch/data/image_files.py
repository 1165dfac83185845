"""Encoded images as arrays of one kind: grey or colour, upright, eight bits a channel.

Note [Pixels of files]
~~~~~~~~~~~~~~~~~~~~~~
A set is colour as soon as one of its files is; a palette of greys is grey. Photos are turned upright as their EXIF
orientation says, which torchvision's folders do not do. Sixteen bits keep their upper eight: Pillow's own conversion
makes all above 255 white. Transparency is left out, as torchvision leaves it out, and a warning says so where there is
any. Sizes change as torchvision's Resize and CenterCrop change them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from .loading import Wanted, require_room

GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "F")
PART = 256  # images decoded at a time: 40 MB of ImageNet

# A file, or the name and the content of one that lies within another.
Encoded = Path | tuple[str, bytes]
Result = TypeVar("Result")


def any_colour(files: Iterable[Encoded]) -> bool:
    """Whether one of these images has colour; reads headers, up to the first that has."""
    return any(_read(file, has_colour) for file in files)


def decoded_parts(files: Iterator[Encoded], colour: bool, wanted: Wanted) -> Iterator[np.ndarray]:
    """The images in order, (n, 3, H, W) where `colour` and (n, 1, H, W) otherwise, uint8, in the wanted size.

    Raises:
        InputError: a file is no image, or is damaged, or of no fixed range, or of another size.
    """
    first: tuple[str, tuple[int, ...]] | None = None
    transparent: list[str] = []
    with ThreadPoolExecutor() as pool:
        while part := [file for _, file in zip(range(PART), files, strict=False)]:
            decoded = list(
                pool.map(lambda file: _read(file, lambda image: decode(image, colour, wanted)), part)
            )
            for file, (array, opaque) in zip(part, decoded, strict=True):
                name = _name(file)
                first = first or (name, array.shape)
                if array.shape != first[1]:
                    raise InputError(
                        f"image {name!r} is {array.shape[1]}×{array.shape[0]} pixels, but {first[0]!r} is "
                        f"{first[1][1]}×{first[1][0]}; all images must have one size, as resize and crop make them"
                    )
                if not opaque:
                    transparent.append(name)
            stacked = np.stack([array for array, _ in decoded])
            yield stacked.transpose(0, 3, 1, 2) if colour else stacked[:, None]
    if transparent:
        warnings.warn(
            f"{len(transparent)} images have transparent pixels, such as {transparent[0]!r}; transparency is left "
            "out, and what it hid is seen",
            stacklevel=2,
        )


def _name(file: Encoded) -> str:
    return str(file if isinstance(file, Path) else file[0])


def _read(file: Encoded, look: Callable[[Image.Image], Result]) -> Result:
    """What `look` makes of the opened file; InputError says why it cannot be read."""
    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file[1])) as image:
            return look(image)
    except InputError:
        raise
    except Exception as error:  # Pillow raises many kinds for a file that is damaged
        raise InputError(f"image {_name(file)!r} cannot be read: {error}") from error


def has_colour(image: Image.Image) -> bool:
    """Whether it is more than grey, its palette included."""
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
        return bool((palette != palette[:, :1]).any())
    return image.mode not in GREY_MODES


def decode(image: Image.Image, colour: bool, wanted: Wanted | None = None) -> tuple[np.ndarray, bool]:
    """The pixels (H, W, 3) where `colour` and (H, W) otherwise, uint8, and whether all of them are opaque."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not deep:
        raise ValueError("it has 32 bits a pixel, which have no fixed range; 8 or 16 do")
    image = ImageOps.exif_transpose(image)
    if deep:
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    opaque = True
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = image.getchannel("A").getextrema()[0] == 255
    image = image.convert("RGB" if colour else "L")
    if wanted is not None and (wanted.resize is not None or wanted.crop is not None):
        image = _sized(image, wanted)
    return np.array(image), opaque


def _sized(image: Image.Image, wanted: Wanted) -> Image.Image:
    from torchvision.transforms.v2 import functional

    if wanted.resize is not None:
        image = functional.resize(image, [wanted.resize])
    if wanted.crop is not None:
        require_room(image.width, image.height, wanted.crop, "images")
        image = functional.center_crop(image, [wanted.crop])
    return image
