"""Networks by name: `create_model("wrn-34-10", num_classes=10, in_channels=3)`.

Every network takes images in [0, 1] and returns logits. In a name the
numbers that a spelling holds in <> are its parameters; a new network is one more row of `MODELS`, the package's own of
`FAMILIES`, one's own by `register_model`.

Note [One state dict, several networks]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Where a block's shortcut starts, which activation follows a BatchNorm, and what is done to the images first leaves no
trace in a state dict: weights of the one network load into the other, and compute something else. Rows with the same
`weights` are such networks; `same_weights` lists them, so that whoever loads a file can say so.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import nn

from ..errors import InputError, one_of
from ..plugins import Origin, Registry, caller, load_installed
from .dajat import dajat_resnet18, dajat_wide_resnet
from .gowal import swish_preactresnet, swish_wide_resnet
from .hypersphere import Hypersphere
from .idbh import idbh_wide_resnet
from .libraries import timm_model, torchvision_model
from .mobilenetv2 import mobilenetv2
from .preactresnet import preactresnet
from .preprocess import StandardizeEach
from .resnet import resnet, resnet_lbgat
from .small_cnn import TradesCNN, small_cnn
from .wide_resnet import wide_resnet


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        spelling: how its names look, with <> for each number, or <1|2> for one of those.
        build: the function that makes one: (num_classes, in_channels, *numbers).
        weights: what its state dicts are like, with {} for each number; see Note [One state dict, several networks].
        origin: whose code the network is equal to, and what sets it apart.
        normalizes: whether it normalises the images itself.
    """

    spelling: str
    build: Callable[..., nn.Module]
    weights: str
    origin: str
    normalizes: bool = False

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """The numbers in a name of this row; None if it is not one."""
        match = re.fullmatch(_pattern(self.spelling), name)
        return None if match is None else tuple(map(int, match.groups()))

    def name(self, numbers: Sequence[int]) -> str:
        """The name with these numbers."""
        remaining = iter(numbers)
        return re.sub("<[^>]*>", lambda _: str(next(remaining)), self.spelling)


# fmt: off
FAMILIES = (
    Family("small_cnn", small_cnn, "small_cnn", "this project's, for digits and CPUs"),
    Family("small_cnn-<width>", small_cnn, "small_cnn-{}", "the same, wider or narrower"),
    Family("small_cnn-trades", TradesCNN, "small_cnn-trades", "TRADES' SmallCNN: MNIST, 28×28 pixels"),

    Family("resnet18", partial(resnet, depth=18), "resnet18",
           "kuangliu's ResNet: RSLAD, AdaAD, ARD, IAD, MART, MTARD, DM-Improves-AT, RobustBench, AutoAttack"),
    Family("resnet34", partial(resnet, depth=34), "resnet34", "the same"),
    Family("resnet50", partial(resnet, depth=50), "resnet50", "the same"),
    Family("resnet18-lbgat", partial(resnet_lbgat, depth=18), "resnet18", "LBGAT: stride 1 in the second stage"),
    Family("resnet34-lbgat", partial(resnet_lbgat, depth=34), "resnet34", "the same"),
    Family("resnet18-dajat", partial(dajat_resnet18, suffix=""), "resnet18-dajat",
           "DAJAT: every BatchNorm twice; those that its evaluation uses"),
    Family("resnet18-dajat-auto", partial(dajat_resnet18, suffix="_auto"), "resnet18-dajat",
           "DAJAT: those for AutoAugment's images"),

    Family("preactresnet18", partial(preactresnet, depth=18), "preactresnet18",
           "AWP, robust_overfitting, VITA-Group, DM-Improves-AT, RobustBench's V2, Bag-of-Tricks"),
    Family("preactresnet34", partial(preactresnet, depth=34), "preactresnet34", "the same"),
    Family("preactresnet18-fastat", partial(preactresnet, depth=18, raw_shortcut=True), "preactresnet18",
           "fast_adversarial, N-FGSM, DA-Alone-Improves-AT: a block's shortcut takes its input itself"),
    Family("preactresnet18-softplus", partial(preactresnet, depth=18, activation=nn.Softplus), "preactresnet18",
           "Bag-of-Tricks: softplus for ReLU"),
    Family("preactresnet18-hypersphere", partial(preactresnet, depth=18, head=partial(Hypersphere, scale=15.0)),
           "preactresnet18-nobias", "Bag-of-Tricks: a last layer of 15 times cosines"),
    Family("preactresnet18-kuangliu", partial(preactresnet, depth=18, last_norm=False), "preactresnet18-kuangliu",
           "kuangliu/pytorch-cifar, IAD's teachers, PeerAiD: no last BatchNorm"),
    Family("preactresnet18-wong2020", partial(preactresnet, depth=18, last_norm=False, raw_shortcut=True),
           "preactresnet18-kuangliu", "RobustBench's Wong2020Fast: neither, and the shortcut takes the input"),
    Family("preactresnet<18|34>-swish", partial(swish_preactresnet, data="cifar10"), "preactresnet{}-swish",
           "Rebuffi et al., DM-Improves-AT: swish, CIFAR-10's statistics inside", normalizes=True),
    Family("preactresnet<18|34>-swish-cifar100", partial(swish_preactresnet, data="cifar100"), "preactresnet{}-swish",
           "the same with CIFAR-100's", normalizes=True),
    Family("preactresnet<18|34>-swish-svhn", partial(swish_preactresnet, data="svhn"), "preactresnet{}-swish",
           "the same with SVHN's", normalizes=True),

    Family("wrn-<depth>-<widen>", wide_resnet, "wrn-{}-{}",
           "TRADES, AWP, AdaAD, LBGAT, Carmon et al., RobustBench; depth 6·n + 4, or 6·n + 2 as FAT and IAD count"),
    Family("wrn-<depth>-<widen>-softplus", partial(wide_resnet, activation=nn.Softplus), "wrn-{}-{}",
           "Bag-of-Tricks: softplus for ReLU"),
    Family("wrn-<depth>-<widen>-mma", partial(wide_resnet, preprocess=StandardizeEach), "wrn-{}-{}",
           "RobustBench's Ding2020MMA: standardises each image", normalizes=True),
    Family("wrn-<depth>-<widen>-nobias", partial(wide_resnet, head=partial(nn.Linear, bias=False)), "wrn-{}-{}-nobias",
           "AdaAD, RobustBench: bias_last=False"),
    Family("wrn-<depth>-<widen>-hypersphere", partial(wide_resnet, head=Hypersphere), "wrn-{}-{}-nobias",
           "Pang et al., Bag-of-Tricks: a last layer of cosines"),
    Family("wrn-<depth>-<widen>-dajat", partial(dajat_wide_resnet, suffix=""), "wrn-{}-{}-dajat",
           "DAJAT: every BatchNorm twice; those that its evaluation uses"),
    Family("wrn-<depth>-<widen>-dajat-auto", partial(dajat_wide_resnet, suffix="_auto"), "wrn-{}-{}-dajat",
           "DAJAT: those for AutoAugment's images"),
    Family("wrn-<depth>-<widen>-idbh", idbh_wide_resnet, "wrn-{}-{}-idbh",
           "DA-Alone-Improves-AT: the stride is the second convolution's, the shortcut takes the input"),
    Family("wrn-<depth>-<widen>-swish", partial(swish_wide_resnet, data="cifar10"), "wrn-{}-{}-swish",
           "Gowal et al., Rebuffi et al., DM-Improves-AT: swish, CIFAR-10's statistics inside", normalizes=True),
    Family("wrn-<depth>-<widen>-swish-cifar100", partial(swish_wide_resnet, data="cifar100"), "wrn-{}-{}-swish",
           "the same with CIFAR-100's", normalizes=True),
    Family("wrn-<depth>-<widen>-swish-svhn", partial(swish_wide_resnet, data="svhn"), "wrn-{}-{}-swish",
           "the same with SVHN's", normalizes=True),

    Family("mobilenetv2", mobilenetv2, "mobilenetv2", "kuangliu's MobileNetV2: RSLAD, ARD, AdaAD"),
)
# fmt: on

OUTSIDE: dict[str, Callable[[str, int, int], nn.Module]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
}
Build = TypeVar("Build", bound=Callable[..., nn.Module])
SPELLING = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.+-]|<[a-z_]+>|<\d+(\|\d+)*>)*")
EXAMPLE = "7"  # a number that a name of a row may have, to see which other rows it would be of


def _overlap(spelling: str) -> str | None:
    """A row that some name of this spelling is of already, or the other way about."""
    name = _example(spelling)
    for family in MODELS.values():
        if family.numbers(name) is not None or re.fullmatch(_pattern(spelling), _example(family.spelling)):
            return family.spelling
    return None


def _pattern(spelling: str) -> str:
    parts = re.split("(<[^>]*>)", spelling)
    groups = [f"({part[1:-1]})" if "|" in part else r"(\d+)" for part in parts[1::2]]
    return "".join(re.escape(part) + group for part, group in zip(parts[::2], [*groups, ""], strict=True))


def _example(spelling: str) -> str:
    return re.sub("<([^>]*)>", lambda m: m[1].split("|")[0] if "|" in m[1] else EXAMPLE, spelling)


MODELS: Registry[Family] = Registry("model", _overlap)


def register_model(name: str, *, normalizes: bool = False) -> Callable[[Build], Build]:
    """Give a network a name, by which ``create_model`` and ``--model NAME`` find it.

    The decorated function, or class, takes ``(num_classes, in_channels)`` and returns an ``nn.Module`` that maps images
    in [0, 1], (N, C, H, W), to logits (N, num_classes). For each number in <> of the name, as in ``mynet-<width>``, it
    takes one more.

    Args:
        name: letters, digits, ``_``, ``-``, ``.``, ``+``, and numbers in <>.
        normalizes: whether the network normalises the images itself.

    Raises:
        InputError: the name is taken, or the function's arguments are others.

    Example:
        >>> @register_model("doctest_linear-<hidden>")
        ... def linear(num_classes, in_channels, hidden):
        ...     return nn.Sequential(nn.Flatten(), nn.LazyLinear(hidden), nn.Linear(hidden, num_classes))
        >>> create_model("doctest_linear-32", num_classes=10, in_channels=1)[2].out_features
        10
    """
    origin = caller()

    def register(build: Build) -> Build:
        described = (inspect.getdoc(build) or "").partition("\n")[0].rstrip(".")
        _add(Family(name, build, name, described or getattr(build, "__qualname__", ""), normalizes), origin)
        return build

    return register


def _add(family: Family, origin: Origin) -> None:
    numbers = family.spelling.count("<") if isinstance(family.spelling, str) else 0
    try:
        with contextlib.suppress(ValueError):  # of what is built in, whose arguments nothing says
            inspect.signature(family.build).bind(*range(2 + numbers))
    except TypeError as error:
        wanted = ", ".join(["num_classes", "in_channels", *["number"] * numbers])
        raise InputError(
            f"model {family.spelling!r} of {origin} is built by a function that cannot be called as ({wanted}): {error}"
        ) from error
    MODELS.add(family.spelling, family, origin, SPELLING)


for _family in FAMILIES:
    _add(_family, caller(1))


def find_family(name: str) -> tuple[Family, tuple[int, ...]] | None:
    """The row that a name is of, and its numbers; installed plugins are looked at for one that is not here."""
    for look_further in (load_installed, None):
        for family in MODELS.values():
            if (numbers := family.numbers(name)) is not None:
                return family, numbers
        if look_further is not None:
            look_further()
    return None


def create_model(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: one of the spellings in `MODELS`, such as ``small_cnn-32``, ``resnet18`` or ``wrn-34-10``; or
            ``torchvision:NAME`` or ``timm:NAME``. ``advfunmatch models`` lists them with their origins.
        num_classes: number of logits.
        in_channels: channels of the images.

    Returns:
        The network, in training mode, on the CPU, initialised from PyTorch's global generator.

    Raises:
        InputError: if no network has that name, or it cannot have these numbers.

    >>> sum(p.numel() for p in create_model("resnet18", num_classes=10, in_channels=3).parameters())
    11173962
    """
    if num_classes < 2 or in_channels < 1:
        raise InputError(
            f"num_classes is {num_classes} and in_channels {in_channels}, but at least 2 and 1 are needed"
        )
    network = _create(name, num_classes, in_channels)
    network.model_name = name  # type: ignore[assignment]  # by which `load_weights` knows what else has such weights
    return network


def _create(name: str, num_classes: int, in_channels: int) -> nn.Module:
    source, colon, outside = name.partition(":")
    if colon and source in OUTSIDE:
        return OUTSIDE[source](outside, num_classes, in_channels)
    if (found := find_family(name)) is None:
        raise one_of("model", name, [*MODELS, *(f"{source}:NAME" for source in OUTSIDE)])
    family, numbers = found
    if MODELS.origin(family.spelling).kind != "built in":
        network = family.build(num_classes, in_channels, *numbers)
        if not isinstance(network, nn.Module):
            raise InputError(
                f"model {name!r} of {MODELS.origin(family.spelling)} is built as a {type(network).__name__}, but must "
                "be a torch.nn.Module"
            )
        return network
    try:
        return family.build(num_classes, in_channels, *numbers)
    except (RuntimeError, OverflowError) as error:  # more memory than there is, or than can be addressed
        raise InputError(f"model is {name!r}, but it is too large to be made here") from error


def same_weights(name: str) -> list[str]:
    """The other networks that the weights of the named one load into, and which compute something else.

    >>> same_weights("wrn-34-10")
    ['wrn-34-10-softplus', 'wrn-34-10-mma']
    """
    if (found := find_family(name)) is None:
        return []
    family, numbers = found
    weights = family.weights.format(*numbers)
    others = []
    for other in MODELS.values():
        pattern = re.escape(other.weights).replace(r"\{\}", r"(\d+)")
        if other is not family and (match := re.fullmatch(pattern, weights)):
            others.append(other.name([int(number) for number in match.groups()]))
    return others


def models_text() -> str:
    """Every row of the table with its origin, and which networks share one state dict."""
    lines = ["images in [0, 1] in, logits out; * normalises them itself", ""]
    for family in FAMILIES:
        star = "*" if family.normalizes else " "
        lines.append(f"{family.spelling:<36} {star} {family.origin}")
    lines += ["torchvision:NAME, timm:NAME".ljust(36) + "   theirs, untrained", ""]
    if outside := MODELS.outside():
        lines.append("From plugins:")
        for name, origin in outside.items():
            star = "*" if MODELS[name].normalizes else " "
            lines.append(f"{name:<36} {star} {MODELS[name].origin} ({origin})")
        lines.append("")
    lines.append("One state dict fits each of these, but they compute different things; the name decides:")
    groups: dict[str, list[str]] = {}
    for family in FAMILIES:
        groups.setdefault(family.weights, []).append(family.spelling)
    lines += ["  " + ", ".join(group) for group in groups.values() if len(group) > 1]
    return "\n".join(lines)
