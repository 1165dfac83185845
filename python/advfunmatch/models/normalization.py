"""(x − mean) / std in front of networks that were trained on normalised images, and what shows that one was.

Note [What the first BatchNorm saw]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
A state dict does not say whether its images were normalised. But the running mean of the BatchNorm after the first
convolution is, apart from the borders, that convolution of the images' mean: Σ_c m_c Σ_ij w_ocij. Least squares give
back the m of the training images, a channel each: about a half for images in [0, 1], about 0 for normalised ones. Where
they fit badly, or the statistics are as they were made, the file shows nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .preprocess import STATISTICS as PREPROCESS

STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    **PREPROCESS,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
}
NORMALIZATIONS = f"{', '.join(STATISTICS)}, MEAN/STD with commas between channels, or none"
# The means that images in [0, 1] have, of one channel and of several; that of normalised ones is about 0.
USUAL_MEANS = {1: (0.05, 0.95), 3: (0.15, 0.9)}
# Last parts of the names under which files hold a mean and a standard deviation.
NAMES = (
    *(("mean", "std"), ("mu", "sigma"), ("_mean", "_std"), ("means", "stds"), ("means", "sds")),
    *((f"{what}_mean", f"{what}_std") for what in ("image", "pixel", "data", "norm")),
)
Statistics = tuple[Tensor, Tensor]


class Normalized(nn.Module):
    """A network behind (x − mean) / std, for weights that were trained on normalised images."""

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1).float())
        self.register_buffer("std", std.reshape(1, -1, 1, 1).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.std)


def parse_normalization(text: str, name: str = "normalize") -> Statistics | None:
    """The statistics that a setting names; None for ``none``.

    Args:
        text: a data set of `STATISTICS`, ``none``, or MEAN/STD, each one number or one for each channel with commas,
            for images in [0, 1].
        name: the setting, for an error.

    >>> parse_normalization("0.5/0.25")
    (tensor([0.5000]), tensor([0.2500]))
    """
    if text == "none":
        return None
    if text in STATISTICS:
        mean, std = STATISTICS[text]
        return torch.tensor(mean), torch.tensor(std)
    try:
        parts = [[float(number) for number in part.split(",")] for part in text.split("/")]
        mean_values, std_values = parts
    except ValueError:
        mean_values = std_values = []
    if not mean_values or len(mean_values) != len(std_values):
        raise InputError(f"{name} is {text!r}, but must be {NORMALIZATIONS}")
    found = torch.tensor(mean_values), torch.tensor(std_values)
    check_statistics(*found, f"{name} is {text!r}, but")
    return found


def normalizations_of(channels: int | None) -> str:
    """The values of `normalize` that fit images of so many channels, for a sentence."""
    fitting = [name for name, (mean, _) in STATISTICS.items() if channels in (None, len(mean))]
    return ", ".join([*fitting, "MEAN/STD or none"])


def take_statistics(left: dict[str, Tensor], what: str) -> Statistics | None:
    """Remove a mean and a standard deviation from the entries that are no weights, and return them.

    Raises:
        InputError: there are several that differ.
    """
    pairs: dict[str, Statistics] = {}
    for key in list(left):
        parent, _, last = key.rpartition(".")
        for mean_name, std_name in NAMES:
            partner = f"{parent}.{std_name}" if parent else std_name
            if last == mean_name and key in left and partner in left:
                mean, std = left.pop(key).flatten().float(), left.pop(partner).flatten().float()
                pairs[key] = mean, std.expand_as(mean) if len(std) == 1 else std
    if not pairs:
        return None
    first = next(iter(pairs.values()))
    for mean, std in pairs.values():
        if not (torch.equal(mean, first[0]) and torch.equal(std, first[1])):
            raise InputError(f"{what} holds several normalisations, which differ: {', '.join(pairs)}")
    return first


def check_statistics(mean: Tensor, std: Tensor, beginning: str) -> None:
    """InputError, which starts with `beginning`, unless they can be of images in [0, 1]."""
    if len(mean) != len(std) or not bool((mean.abs() <= 1).all() and (std > 0).all() and (std <= 4).all()):
        of_bytes = len(mean) == len(std) and bool(
            (mean > 1).any() and ((mean >= 0) & (mean <= 255) & (std > 0)).all()
        )
        scaled = "/".join(",".join(f"{value / 255:.4g}" for value in part.tolist()) for part in (mean, std))
        raise InputError(
            f"{beginning} means must be at most 1 and deviations positive, as of images in [0, 1], and not "
            f"{mean.tolist()} and {std.tolist()}"
            + (f"; of images from 0 to 255 it is {scaled}" if of_bytes else "")
        )


def statistics_beside(stored: Any, in_channels: int | None) -> tuple[str, Statistics, bool] | None:
    """A mean and a standard deviation that a file holds beside its weights, such as among its options.

    Returns:
        The mean's key, both, and whether they are the images' for certain: a number for each of several channels, or
        under a name that says so. A lone number may be an accuracy's. None if there are none.
    """
    for key, mean, std in _pairs_beside(stored, ""):
        certain = len(mean) > 1 or any(word in key.lower() for word in ("norm", "image"))
        if len(mean) == len(std) and len(mean) in (1, in_channels) and (certain or bool(mean.abs() <= 1)):
            return key, (mean, std), certain
    return None


def _pairs_beside(stored: Any, key: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    entries = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    if not isinstance(entries, Mapping):
        return
    for name, value in entries.items():
        partner = next((std for mean, std in NAMES if name == mean and std in entries), None)
        if partner is None:
            yield from _pairs_beside(value, f"{key}{name}.")
            continue
        mean, std = _numbers(value), _numbers(entries[partner])
        if mean is not None and std is not None:
            yield f"{key}{name}", mean, std


def _numbers(value: Any) -> Tensor | None:
    """A number or a list of them as (C,); None for anything else."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    plain = found.is_floating_point() or isinstance(value, list | tuple)
    return found.flatten().float() if plain and not found.is_complex() else None


def put_before(network: nn.Module, statistics: Statistics, in_channels: int | None, what: str) -> Normalized:
    """`network` behind a normalisation; InputError unless it has one value, or one for each channel."""
    mean, std = statistics
    if in_channels is not None and len(mean) not in (1, in_channels):
        raise InputError(f"{what} normalises {len(mean)} channels, but the network takes {in_channels}")
    return Normalized(network, mean, std)


def is_usual(mean: Tensor) -> bool:
    """Whether a mean (C,) is one of images in [0, 1], rather than of normalised ones."""
    low, high = USUAL_MEANS[1 if len(mean) == 1 else 3]
    return bool(((mean > low) & (mean < high)).all())


def seen_mean(network: nn.Module, weights: Mapping[str, Tensor]) -> Tensor | None:
    """The mean (C,) of the images behind these weights; None where they do not show it.

    See Note [What the first BatchNorm saw].
    """
    conv: tuple[str, nn.Conv2d] | None = None
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if conv is not None:
                return None
            conv = name, module
        elif isinstance(module, nn.BatchNorm2d) and conv is not None:
            break
    else:
        return None
    assert conv is not None
    kernel, mean = weights[f"{conv[0]}.weight"], weights.get(f"{name}.running_mean")
    if conv[1].groups != 1 or mean is None or len(mean) != len(kernel):
        return None
    mean = mean.double() - weights.get(f"{conv[0]}.bias", torch.zeros(1)).double()
    sums = kernel.double().sum((2, 3))
    if (
        sums.shape[0] <= 2 * sums.shape[1]
        or not mean.any()
        or not math.isfinite(float(mean.abs().sum() + sums.abs().sum()))
    ):
        return None
    solution = torch.linalg.lstsq(sums, mean.unsqueeze(1)).solution
    unexplained = (mean - (sums @ solution).squeeze(1)).square().sum()
    # Whether it is small is measured against what images in [0, 1] would have left there.
    return None if unexplained > 0.1 * (0.5 * sums.sum(1)).square().sum() else solution.squeeze(1)
