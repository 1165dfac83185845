"""CIFAR-10 and CIFAR-100 in the format that torchvision downloads and reads."""

from __future__ import annotations

import pickle

import torch

from ..errors import InputError
from .dataset import ImageDataset, choose


def load_cifar(name: str, path: str, split: str, limit: int | None) -> ImageDataset:
    """Read ``cifar10`` or ``cifar100`` below PATH, torchvision's root folder; nothing is downloaded."""
    import torchvision

    reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        data = reader(path, train=split == "train", download=False)
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(
            f"data folder {path!r} does not hold {reader.base_folder} as torchvision writes it: {error}"
        ) from error
    kept = choose(len(data.targets), limit)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2)[kept].contiguous()
    return ImageDataset(
        f"{name}:{path}", split, images, torch.tensor(data.targets)[kept], tuple(data.classes)
    )
