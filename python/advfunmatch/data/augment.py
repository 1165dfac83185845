"""Augmentation by name, one view of each image for student and teacher alike.

Crop, flip and cutout work on the whole batch at once with a choice for each image; AutoAugment, RandAugment and
TrivialAugment are torchvision's, image by image; mixup and CutMix mix images of the batch. Randomness comes from
PyTorch's default generator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, one_of
from .dataset import ImageDataset, as_float

CROP_PADDING = 4  # on 32 pixels, as everywhere on CIFAR; in proportion on other sizes
CUTOUT_SHARE = 0.5  # of the image's side: 16 of 32 pixels (DeVries and Taylor, 2017)


def crop(images: Tensor) -> Tensor:
    """Pad with zeros and crop back to size at a random place."""
    count, _, height, width = images.shape
    padding = max(1, round(CROP_PADDING * height / 32))
    padded = F.pad(images, (padding,) * 4)
    top = torch.randint(2 * padding + 1, (count, 1), device=images.device) + torch.arange(
        height, device=images.device
    )
    left = torch.randint(2 * padding + 1, (count, 1), device=images.device) + torch.arange(
        width, device=images.device
    )
    rows = torch.arange(count, device=images.device)[:, None, None]
    return (
        padded.permute(0, 2, 3, 1)[rows, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2).contiguous()
    )


def flip(images: Tensor) -> Tensor:
    """Mirror each image with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def cutout(images: Tensor) -> Tensor:
    """Black out a square around a random centre in each image."""
    count, _, height, width = images.shape

    def near(size: int) -> Tensor:
        centre = torch.randint(size, (count, 1), device=images.device)
        return (torch.arange(size, device=images.device) - centre).abs() < CUTOUT_SHARE * size / 2

    hole = near(height)[:, None, :, None] & near(width)[:, None, None, :]
    return images.masked_fill(hole, 0)


def _policy(name: str) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        from torchvision.transforms import v2

        policies = {
            "autoaugment": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
            "randaugment": v2.RandAugment,
            "trivialaugment": v2.TrivialAugmentWide,
        }
        policy = policies[name]()
        return torch.stack([policy(image) for image in images])

    return run


def mixup(images: Tensor) -> Tensor:
    """λ·x + (1-λ)·x' with another image of the batch, λ uniform (FunMatch's aggressive mixup)."""
    share = torch.rand(len(images), 1, 1, 1, device=images.device)
    return share * images + (1 - share) * images[torch.randperm(len(images), device=images.device)]


def cutmix(images: Tensor) -> Tensor:
    """Replace a random box by that of another image of the batch (Yun et al., 2019; λ uniform)."""
    count, _, height, width = images.shape
    side = (1 - torch.rand(count, 1, device=images.device)).sqrt() / 2

    def near(size: int) -> Tensor:
        centre = torch.rand(count, 1, device=images.device)
        return ((torch.arange(size, device=images.device) + 0.5) / size - centre).abs() < side

    box = near(height)[:, None, :, None] & near(width)[:, None, None, :]
    return torch.where(box, images[torch.randperm(count, device=images.device)], images)


POLICIES = ("autoaugment", "randaugment", "trivialaugment")  # whose colour operations know grey and RGB
# What sees uint8 images, in the order given, and what sees float images after that.
ON_STORED: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": crop,
    "flip": flip,
    **{name: _policy(name) for name in POLICIES},
    "cutout": cutout,
}
MIXING: dict[str, Callable[[Tensor], Tensor]] = {"mixup": mixup, "cutmix": cutmix}


def parse_augmentation(text: str) -> list[str]:
    """The names in text such as "crop,flip"; InputError lists what there is."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ON_STORED and name not in MIXING:
            raise one_of("augment", name, [*ON_STORED, *MIXING])
    return names


def require_augmentable(names: list[str], data: ImageDataset) -> None:
    """Find out before work begins whether images can be augmented so.

    Raises:
        InputError: an augmentation does not take images of that many channels.
        ModuleNotFoundError: it needs torchvision, which is not installed.
    """
    for name in names:
        if name not in POLICIES:
            continue
        import torchvision.transforms.v2  # noqa: F401

        if data.in_channels not in (1, 3):
            others = ", ".join(other for other in (*ON_STORED, *MIXING) if other not in POLICIES)
            raise InputError(
                f"augment {name!r} takes images of 1 or 3 channels, but data {data.name!r} has {data.in_channels}; "
                f"any number goes with {others}"
            )


def augmented(images: Tensor, names: list[str]) -> Tensor:
    """float32 images in [0, 1]: the stored ones after the named augmentations."""
    for name in names:
        if name in ON_STORED:
            images = ON_STORED[name](images)
    images = as_float(images)
    for name in names:
        if name in MIXING:
            images = MIXING[name](images)
    return images
