"""Images that stay in a file: what is indexed is read through a memory map, and arrives on a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class MappedImages:
    """Images (N, C, H, W) in a memory map, read as they are asked for; the rest of an `ImageDataset` is in memory.

    Args:
        stored: a tensor on a memory map, all images of the file.
        rows: which of them these are, (N,) int64; None for all.
        device: where images go that are read.
    """

    def __init__(
        self, stored: Tensor, rows: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.stored, self.rows, self.device = stored, rows, torch.device(device)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.stored.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def __len__(self) -> int:
        return len(self.stored if self.rows is None else self.rows)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Tensor:
        """Those images, read into memory and moved to the device."""
        where = index.to("cpu") if isinstance(index, Tensor) else index
        rows = where if self.rows is None else self.rows[where]
        return self.stored[rows].to(self.device)

    def keep(self, indices: Tensor) -> MappedImages:
        """The images at `indices`, none of them read."""
        indices = indices.to("cpu")
        return MappedImages(self.stored, indices if self.rows is None else self.rows[indices], self.device)

    def to(self, device: torch.device | str) -> MappedImages:
        """The same images, read onto another device."""
        return MappedImages(self.stored, self.rows, device)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]
