"""Networks of torchvision and timm by name, untrained."""

from __future__ import annotations

from torch import nn

from ..errors import InputError


def torchvision_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's network of that name."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)  # classifiers only
    if name not in names:
        raise InputError(
            f"model is 'torchvision:{name}', but torchvision has no such classifier; it has: {', '.join(names)}"
        )
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels != in_channels:
        raise InputError(
            f"model 'torchvision:{name}' takes {first.in_channels} channels, but the images have {in_channels}"
        )
    return network


def timm_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """timm's network of that name."""
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
