"""Networks of other projects: torchvision's and timm's by name, and weights in the field's usual state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

PREFIXES = (
    "module.",
    "model.",
    "backbone.",
    "_orig_mod.",
)  # of DataParallel, RobustBench, wrappers, torch.compile
HOLDERS = (
    "state_dict",
    "model_state_dict",
    "net",
    "model",
    "ema_state_dict",
)  # keys under which weights are stored
# The same layer in CIFAR ResNets of the kuangliu family and in torchvision's naming, which ours follows.
RENAMED = (("shortcut.", "downsample."), ("linear.", "fc."))
STATISTICS = (("mu", "sigma"), ("mean", "std"), ("normalize.mean", "normalize.std"))


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


def torchvision_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's network of that name, untrained."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)  # classifiers only
    if name not in names:
        raise InputError(
            f"model is 'torchvision:{name}', but torchvision has no such classifier; it has: {', '.join(names)}"
        )
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    _require_channels(f"torchvision:{name}", network, in_channels)
    return network


def timm_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """timm's network of that name, untrained."""
    try:
        import timm
    except ImportError:
        raise InputError(f"model is 'timm:{name}', but the package timm is not installed") from None
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=num_classes, in_chans=in_channels
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"model is 'timm:{name}', but timm cannot make it: {error}") from error
    return network


def _require_channels(name: str, network: nn.Module, in_channels: int) -> None:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels != in_channels:
        raise InputError(
            f"model {name!r} takes {first.in_channels} channels, but the images have {in_channels}"
        )


def load_weights(network: nn.Module, stored: Any, what: str) -> nn.Module:
    """A network with weights from a state dict in one of the field's usual forms.

    Args:
        network: of the architecture that the weights belong to.
        stored: what ``torch.load`` gave: a state dict, or a dict that holds one. Prefixes are dropped; a mean and a
            standard deviation among the entries put a normalisation before the network.
        what: how to call the file in an error.

    Raises:
        InputError: if the entries are not this network's; it names the first that is missing or left over.
    """
    weights = _state_dict(stored, what)
    mean = std = None
    for mean_name, std_name in STATISTICS:
        if mean_name in weights and std_name in weights:
            mean, std = weights.pop(mean_name), weights.pop(std_name)
            break
    own = network.state_dict()
    weights = {_own_name(name, own): value for name, value in weights.items()}
    weights = {
        name: value for name, value in weights.items() if not name.startswith("sub_block1.")
    }  # unused in TRADES
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in own]
    wrong = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    for problem, names in (
        ("lacks", missing),
        ("has beyond the network's", unexpected),
        ("has another shape of", wrong),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(
                f"{what} does not hold the weights of this architecture: it {problem} {names[0]!r}{more}"
            )
    network.load_state_dict(weights, strict=False)
    return network if mean is None or std is None else Normalized(network, mean, std)


def _state_dict(stored: Any, what: str) -> dict[str, Tensor]:
    for holder in HOLDERS:
        if isinstance(stored, Mapping) and isinstance(stored.get(holder), Mapping):
            stored = stored[holder]
    if not isinstance(stored, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in stored.values()
    ):
        raise InputError(f"{what} holds no state dict")
    weights = dict(stored)
    shortened = True
    while shortened and weights:
        shortened = False
        for prefix in PREFIXES:
            with_prefix = [name for name in weights if name.startswith(prefix)]
            # A normalisation may stand beside a wrapped network, so not every entry needs the prefix.
            if with_prefix and len(with_prefix) >= len(weights) - 2:
                weights = {name.removeprefix(prefix): value for name, value in weights.items()}
                shortened = True
    return weights


def _own_name(name: str, own: Mapping[str, Tensor]) -> str:
    for theirs, ours in RENAMED:
        renamed = name.replace(theirs, ours)
        if name not in own and renamed in own:
            name = renamed
    return name
