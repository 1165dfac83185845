"""Random numbers of an attack that belong to its images, whatever batch, order or process these are in.

Note [Draws]
~~~~~~~~~~~~
A number is a function of (seed, image, stream, draw, place), without a state: SplitMix64 (Steele, Lea and Flood 2014)
over a counter, in wrapping int64 operations of PyTorch. An image is known by a digest of its float32 bytes, so that a
result does not depend on which images are with it; the same image twice has the same numbers. ``stream`` belongs to an
attack, plus its restart or target (the table below), ``draw`` counts what is drawn in it.

Integers, signs and uniform numbers have the same bits on every device. Normal ones are made in float64 and rounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["APGD_CE", "APGD_DLR", "APGD_T", "FAB", "FAB_T", "SQUARE", "Draws", "image_keys"]

# The first stream of each attack; a restart or a target is added to it.
APGD_CE, APGD_DLR, APGD_T, FAB, FAB_T, SQUARE = (attack << 20 for attack in range(6))

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def image_keys(x: Tensor) -> Tensor:
    """(N,) int64 digests of images (N, ...), of their values in float32.

    >>> x = torch.rand(3, 1, 8, 8)
    >>> torch.equal(image_keys(x)[[2, 0]], image_keys(x[[2, 0]]))
    True
    """
    bits = x.detach().float().flatten(1).contiguous().view(torch.int32).long()
    # A sum modulo 2^64 has no order, so that every device finds the same.
    return _mixed(_mixed(bits + _counter(bits.shape[1], x.device)).sum(1))


class Draws:
    """The random numbers of some images.

    Args:
        seed: any integer.
        keys: (N,) int64 of `image_keys`.

    Every method takes a ``stream`` and a ``draw`` (see Note [Draws]) and the shape of what is drawn for one image, and
    returns (N, *shape) on the keys' device.
    """

    def __init__(self, seed: int, keys: Tensor) -> None:
        self._keys = _mixed(keys + _signed(_mixed_int(seed + _GOLDEN)))

    def rows(self, index: Tensor) -> Draws:
        """Those of some of the images: int64 indices, or flags."""
        chosen = object.__new__(Draws)
        chosen._keys = self._keys[index]
        return chosen

    def integers(self, stream: int, draw: int, shape: tuple[int, ...], high: int) -> Tensor:
        """int64 in [0, high), high below 2^31."""
        if not 0 < high < 1 << 31:
            raise ValueError(f"high must be from 1 to 2^31 - 1, got {high}")
        return (_shifted(self._words(stream, draw, shape), 32) * high) >> 32

    def uniform(self, stream: int, draw: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """In [0, 1), as many bits as the dtype has digits for."""
        digits = 1 - round(math.log2(torch.finfo(dtype).eps))
        words = _shifted(self._words(stream, draw, shape), 64 - digits)
        return words.to(dtype) * 2.0**-digits

    def normal(self, stream: int, draw: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Normal with mean 0 and variance 1 (Box and Muller 1958)."""
        pairs = self.uniform(stream, draw, (2, *shape), torch.float64)
        radius = (-2 * torch.log1p(-pairs[:, 0])).sqrt()
        return (radius * torch.cos(2 * math.pi * pairs[:, 1])).to(dtype)

    def signs(self, stream: int, draw: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """-1 or 1."""
        return (2 * _shifted(self._words(stream, draw, shape), 63) - 1).to(dtype)

    def _words(self, stream: int, draw: int, shape: tuple[int, ...]) -> Tensor:
        """(N, *shape) of 64 random bits."""
        first = _mixed(self._keys + _signed(_mixed_int(_mixed_int(stream + _GOLDEN) + draw)))
        counter = _counter(math.prod(shape), first.device)
        return _mixed(first[:, None] + counter).view(len(first), *shape)


def _counter(count: int, device: torch.device) -> Tensor:
    """SplitMix64's steps, one for each of so many numbers."""
    return torch.arange(1, count + 1, device=device) * _signed(_GOLDEN)


def _mixed(words: Tensor) -> Tensor:
    """SplitMix64's output of its states."""
    words = (words ^ _shifted(words, 30)) * _signed(_FIRST)
    words = (words ^ _shifted(words, 27)) * _signed(_SECOND)
    return words ^ _shifted(words, 31)


def _mixed_int(word: int) -> int:
    word &= _WORD
    word = (word ^ word >> 30) * _FIRST & _WORD
    word = (word ^ word >> 27) * _SECOND & _WORD
    return word ^ word >> 31


def _shifted(words: Tensor, by: int) -> Tensor:
    """To the right, without the sign's copies that int64 shifts in."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    """64 bits as an int64's value."""
    return word - (1 << 64) if word >> 63 else word
