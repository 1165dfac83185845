"""Images and labels: data sets by name, and augmentation."""

from __future__ import annotations

from .dataset import ImageDataset, as_float, choose
from .sources import SPLITS, load_dataset

__all__ = ["SPLITS", "ImageDataset", "as_float", "choose", "load_dataset"]
