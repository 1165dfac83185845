"""Digests of data sets, by which one is known again wherever its files lie."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from .dataset import ImageDataset, choose

SAMPLE = 4096  # images


def digest_of_data(data: ImageDataset) -> str:
    """Of images and labels; of a set that stays in its file, which may be hundreds of gigabytes, of `SAMPLE` images."""
    found = hashlib.blake2b(str(tuple(data.images.shape)).encode(), digest_size=16)
    images = data.images
    add_tensor(found, images if isinstance(images, Tensor) else images[choose(len(images), SAMPLE)])
    add_tensor(found, data.labels)
    return found.hexdigest()


def add_tensor(found: Any, tensor: Tensor) -> None:
    """Add a tensor's type, shape and bytes to a digest of ``hashlib``."""
    found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
