"""Images that stay in a file: what is indexed is read through a memory map, and arrives on a device.

Note [Reading ahead]
~~~~~~~~~~~~~~~~~~~~
A map that is left to itself reads megabytes around each image that is touched, because the kernel expects a file to be
read in order: 360 ms for 128 images of 32×32 pixels that are not in the page cache. Told that the order is random, and
which images are wanted before the first is touched, it reads just those, side by side: 3 to 7 ms; asked for a step
before, 1 ms, as from memory (``python -m benchmarks.training.mapped``, on a virtual machine's disk).
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

DTYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32}


class MappedFile:
    """A .npy of images (N, C, H, W) in a memory map.

    Args:
        path: the file, in C's order, of uint8 or float32.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            shape, dtype, self.start = _header(file)
            # A private copy where it is written to, since PyTorch has no tensors that cannot be; nobody writes.
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.map.madvise(mmap.MADV_RANDOM)
        count = int(np.prod(shape))
        self.images = torch.frombuffer(self.map, dtype=DTYPES[dtype], count=count, offset=self.start).view(
            shape
        )
        self.row_bytes = count // shape[0] * dtype.itemsize

    @staticmethod
    def is_whole(path: Path) -> bool:
        """Whether a file has all the images that its head announces."""
        with open(path, "rb") as file:
            try:
                shape, dtype, start = _header(file)
            except ValueError:
                return False
        return path.stat().st_size == start + math.prod(shape) * dtype.itemsize

    def ask_for(self, rows: Tensor) -> None:
        """Have the images at `rows` read into the page cache, without waiting for them."""
        for row in rows.tolist():
            first = self.start + row * self.row_bytes
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_WILLNEED, page, first + self.row_bytes - page)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of the array in a .npy, and where its values begin."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype, file.tell()


class MappedImages:
    """Images (N, C, H, W) of a mapped file, read as they are asked for; the rest of an `ImageDataset` is in memory.

    Args:
        file: all images of the file.
        rows: which of them these are, (N,) int64; None for all.
        device: where images go that are read.
    """

    def __init__(
        self, file: MappedFile, rows: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.file, self.device = file, torch.device(device)
        self.rows = torch.arange(len(file.images)) if rows is None else rows

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), *self.file.images.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.file.images.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Tensor:
        """Those images, read into memory and moved to the device."""
        rows = self._rows(index)
        self.file.ask_for(rows.reshape(-1))
        return self.file.images[rows].to(self.device)

    def ask_for(self, index: Tensor) -> None:
        """Have those images read into the page cache, so that indexing them later does not wait."""
        self.file.ask_for(self._rows(index))

    def keep(self, indices: Tensor) -> MappedImages:
        """The images at `indices`, none of them read."""
        return MappedImages(self.file, self._rows(indices), self.device)

    def to(self, device: torch.device | str) -> MappedImages:
        """The same images, read onto another device."""
        return MappedImages(self.file, self.rows, device)

    def split(self, size: int) -> list[MappedImages]:
        """All images in order, `size` a set."""
        return [MappedImages(self.file, rows, self.device) for rows in self.rows.split(size)]

    def _rows(self, index: int | slice | list[int] | Tensor) -> Tensor:
        return self.rows[index.to("cpu") if isinstance(index, Tensor) else index]
