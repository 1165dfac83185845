"""Networks by name: `create_model("wrn-34-10", num_classes=10, in_channels=3)`.

Every network takes images in [0, 1] and returns logits. A name is either a fixed one or matches a pattern whose
numbers are its parameters; a new network is one more entry in `FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..errors import InputError, one_of
from .mobilenetv2 import mobilenetv2
from .outside import timm_model, torchvision_model
from .preactresnet import preactresnet18
from .resnet import resnet18, resnet34, resnet50
from .small_cnn import SmallCNN
from .wide_resnet import WideResNet


@dataclass(frozen=True)
class Family:
    """A row of the table: how its names look, and the function that builds one from the numbers in the name."""

    spelling: str
    pattern: str
    build: Callable[..., nn.Module]


def _small_cnn(num_classes: int, in_channels: int, width: int = 16) -> nn.Module:
    if width < 1:
        raise InputError(f"model is 'small_cnn-{width}', but its width must be at least 1")
    return SmallCNN(num_classes, in_channels, width)


def _wide_resnet(num_classes: int, in_channels: int, depth: int, widen: int) -> nn.Module:
    if depth < 10 or depth % 6 != 4 or widen < 1:
        raise InputError(
            f"model is 'wrn-{depth}-{widen}', but the depth must be 6·n + 4 (10, 16, 22, 28, 34, 40, ...) "
            "and the widening factor at least 1"
        )
    return WideResNet(depth, widen, num_classes, in_channels)


FAMILIES = (
    Family("small_cnn", r"small_cnn", _small_cnn),
    Family("small_cnn-<width>", r"small_cnn-(\d+)", _small_cnn),
    Family("resnet18", r"resnet18", resnet18),
    Family("resnet34", r"resnet34", resnet34),
    Family("resnet50", r"resnet50", resnet50),
    Family("preactresnet18", r"preactresnet18", preactresnet18),
    Family("wrn-<depth>-<widen>", r"wrn-(\d+)-(\d+)", _wide_resnet),
    Family("mobilenetv2", r"mobilenetv2", mobilenetv2),
)

OUTSIDE: dict[str, Callable[[str, int, int], nn.Module]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
}


def create_model(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: one of the spellings in `FAMILIES`, such as ``small_cnn-32``, ``resnet18`` or ``wrn-34-10``; or
            ``torchvision:NAME`` or ``timm:NAME``.
        num_classes: number of logits.
        in_channels: channels of the images.

    Returns:
        The network, in training mode, on the CPU, initialised from PyTorch's global generator.

    Raises:
        InputError: if no network has that name.

    >>> sum(p.numel() for p in create_model("resnet18", num_classes=10, in_channels=3).parameters())
    11173962
    """
    if num_classes < 2 or in_channels < 1:
        raise InputError(
            f"num_classes is {num_classes} and in_channels {in_channels}, but at least 2 and 1 are needed"
        )
    source, colon, outside = name.partition(":")
    if colon and source in OUTSIDE:
        return OUTSIDE[source](outside, num_classes, in_channels)
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, name):
            try:
                return family.build(num_classes, in_channels, *(int(number) for number in match.groups()))
            except (
                RuntimeError,
                OverflowError,
            ) as error:  # more memory than there is, or than can be addressed
                raise InputError(f"model is {name!r}, but it is too large to be made here") from error
    raise one_of(
        "model", name, [family.spelling for family in FAMILIES] + [f"{source}:NAME" for source in OUTSIDE]
    )
