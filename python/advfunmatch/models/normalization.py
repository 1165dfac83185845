"""(x − mean) / std in front of networks that were trained on normalised images, and what shows that one was.

Note [What the first BatchNorm saw]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
A state dict does not say whether its images were normalised. But the running mean of the BatchNorm after the first
convolution is, apart from the borders, that convolution of the images' mean: Σ_c m_c Σ_ij w_ocij. Least squares give
back the m of the training images, a channel each: about a half for images in [0, 1], about 0 for normalised ones. Where
they fit badly, or the statistics are as they were made, the file shows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError
from .preprocess import STATISTICS as PREPROCESS

STATISTICS = {**PREPROCESS, "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
NORMALIZATIONS = f"{', '.join(STATISTICS)}, MEAN/STD with commas between channels, or none"
# Last parts of the names under which files hold a mean and a standard deviation.
NAMES = (("mean", "std"), ("mu", "sigma"), ("_mean", "_std"), ("image_mean", "image_std"))
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
    _check(*found, f"{name} is {text!r}, but")
    return found


def take_statistics(left: dict[str, Tensor], what: str) -> Statistics | None:
    """Remove a mean and a standard deviation from the entries that are no weights, and return them.

    Raises:
        InputError: several that differ, or such as are not for images in [0, 1].
    """
    pairs: dict[str, Statistics] = {}
    for key in list(left):
        parent, _, last = key.rpartition(".")
        for mean_name, std_name in NAMES:
            partner = f"{parent}.{std_name}" if parent else std_name
            if last == mean_name and key in left and partner in left:
                pairs[key] = left.pop(key).flatten().float(), left.pop(partner).flatten().float()
    if not pairs:
        return None
    first = next(iter(pairs.values()))
    for mean, std in pairs.values():
        if not (torch.equal(mean, first[0]) and torch.equal(std, first[1])):
            raise InputError(f"{what} holds several normalisations, which differ: {', '.join(pairs)}")
    _check(*first, f"{what} holds a normalisation {next(iter(pairs))!r} whose")
    return first


def _check(mean: Tensor, std: Tensor, beginning: str) -> None:
    if len(mean) != len(std) or not bool((mean.abs() <= 1).all() and (std > 0).all() and (std <= 4).all()):
        raise InputError(
            f"{beginning} means must be at most 1 and deviations positive, as of images in [0, 1], and not "
            f"{mean.tolist()} and {std.tolist()}"
        )


def put_before(network: nn.Module, statistics: Statistics, in_channels: int | None, what: str) -> Normalized:
    """`network` behind a normalisation; InputError unless it has one value, or one for each channel."""
    mean, std = statistics
    if in_channels is not None and len(mean) not in (1, in_channels):
        raise InputError(f"{what} normalises {len(mean)} channels, but the network takes {in_channels}")
    return Normalized(network, mean, std)


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
