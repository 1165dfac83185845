"""Images and labels: data sets by name, and augmentation."""

from __future__ import annotations

from .dataset import UNLABELLED, ImageDataset, as_float, choose
from .extra import as_extra_images, require_labels
from .formats.corruptions import Cell, corruption_cells, is_corrupted_set, missing_of_benchmark
from .given import SPLITS, as_dataset, as_splits, name_of, reduced
from .loading import Contents, Wanted, in_parts
from .sources import DATASETS, load_dataset, register_dataset

__all__ = [
    "DATASETS",
    "SPLITS",
    "UNLABELLED",
    "Cell",
    "Contents",
    "ImageDataset",
    "Wanted",
    "as_dataset",
    "as_extra_images",
    "as_float",
    "as_splits",
    "choose",
    "corruption_cells",
    "in_parts",
    "is_corrupted_set",
    "load_dataset",
    "missing_of_benchmark",
    "name_of",
    "reduced",
    "register_dataset",
    "require_labels",
]
