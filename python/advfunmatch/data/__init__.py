"""Images and labels: data sets by name, and augmentation."""

from __future__ import annotations

from .dataset import ImageDataset, as_float, choose
from .formats.corruptions import Cell, corruption_cells, is_corrupted_set
from .sources import SPLITS, load_dataset

__all__ = [
    "SPLITS",
    "Cell",
    "ImageDataset",
    "as_float",
    "choose",
    "corruption_cells",
    "is_corrupted_set",
    "load_dataset",
]
