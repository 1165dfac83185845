"""Images and labels: data sets by name, and augmentation."""

from __future__ import annotations

from .dataset import UNLABELLED, ImageDataset, as_float, choose
from .extra import as_extra_images, require_labels
from .formats.corruptions import Cell, corruption_cells, is_corrupted_set
from .sources import SPLITS, load_dataset

__all__ = [
    "SPLITS",
    "UNLABELLED",
    "Cell",
    "ImageDataset",
    "as_extra_images",
    "as_float",
    "choose",
    "corruption_cells",
    "is_corrupted_set",
    "load_dataset",
    "require_labels",
]
