"""The forwards of official repositories' networks, re-stated with functions alone, on their own state dicts.

What the project's networks, and weights that were loaded, are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
SVHN = ((0.5,) * 3, (0.5,) * 3)
Act = Callable[[Tensor], Tensor]


class Entries:
    """A state dict that knows which of its entries were read, and layers by the name of their entries."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.state[name]

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix + ".") for name in self.state)

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, self[f"{name}.weight"], stride=stride, padding=padding)

    def bn(self, x: Tensor, name: str) -> Tensor:
        values = (self[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])


def standardized(x: Tensor, statistics: tuple) -> Tensor:
    mean, std = (torch.tensor(values).to(x).view(3, 1, 1) for values in statistics)
    return (x - mean) / std


def resnet(e: Entries, x: Tensor, strides=(1, 2, 2, 2), suffix: str = "") -> Tensor:
    x = F.relu(e.bn(e.conv(x, "conv1", 1, 1), f"bn1{suffix}"))
    for stage, stride in enumerate(strides, 1):
        for index in range(2):
            block, step = f"layer{stage}.{index}", stride if index == 0 else 1
            out = F.relu(e.bn(e.conv(x, f"{block}.conv1", step, 1), f"{block}.bn1{suffix}"))
            out = e.bn(e.conv(out, f"{block}.conv2", 1, 1), f"{block}.bn2{suffix}")
            if e.has(f"{block}.shortcut"):
                twins = e.has(f"{block}.shortcut_bn")
                norm = f"{block}.shortcut_bn{suffix}.0" if twins else f"{block}.shortcut.1"
                x = e.bn(e.conv(x, f"{block}.shortcut.0", step), norm)
            x = F.relu(out + x)
    return e.linear(x.mean((2, 3)), "linear")


def preact(
    e: Entries, x: Tensor, *, act: Act = F.relu, raw: bool = False, last: bool = True, sphere: bool = False
) -> Tensor:
    x = e.conv(x, "conv1", 1, 1)
    for stage in range(1, 5):
        for index in range(2):
            block, stride = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            out = act(e.bn(x, f"{block}.bn1"))
            short = x
            if e.has(f"{block}.shortcut"):
                short = e.conv(x if raw else out, f"{block}.shortcut.0", stride)
            out = act(e.bn(e.conv(out, f"{block}.conv1", stride, 1), f"{block}.bn2"))
            x = e.conv(out, f"{block}.conv2", 1, 1) + short
    if last:
        x = act(e.bn(x, "bn"))
    x = x.mean((2, 3))
    if sphere:
        weight = e["linear.weight"]
        return 15 * (x / x.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T
    return e.linear(x, "linear")


def wide(
    e: Entries, x: Tensor, *, blocks: int = 1, act: Act = F.relu, last: str = "linear", suffix: str = ""
) -> Tensor:
    x = e.conv(x, "conv1", 1, 1)
    for stage in range(1, 4):
        for index in range(blocks):
            block, stride = f"block{stage}.layer.{index}", 2 if stage > 1 and index == 0 else 1
            out = act(e.bn(x, f"{block}.bn1{suffix}"))
            short = e.conv(out, f"{block}.convShortcut", stride) if e.has(f"{block}.convShortcut") else x
            out = act(e.bn(e.conv(out, f"{block}.conv1", stride, 1), f"{block}.bn2{suffix}"))
            x = e.conv(out, f"{block}.conv2", 1, 1) + short
    x = act(e.bn(x, f"bn1{suffix}")).mean((2, 3))
    if last == "cosines":
        weight = e["fc.weight"]
        return (x / x.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T
    return x @ e["fc.weight"].T if last == "nobias" else e.linear(x, "fc")


def wide_of_standardized_images(e: Entries, x: Tensor) -> Tensor:
    mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
    return wide(e, (x - mean) / torch.max(std, torch.full_like(std, x[0].numel() ** -0.5)))


def wide_with_late_strides(e: Entries, x: Tensor) -> Tensor:
    x = e.conv(x, "conv1", 1, 1)
    for stage in range(1, 4):
        block, stride = f"layer{stage}.block0", 2 if stage > 1 else 1
        out = e.conv(F.relu(e.bn(x, f"{block}.bn1")), f"{block}.conv1", 1, 1)
        out = e.conv(F.relu(e.bn(out, f"{block}.bn2")), f"{block}.conv2", stride, 1)
        x = out + (e.conv(x, f"{block}.shortcut.0", stride) if e.has(f"{block}.shortcut") else x)
    return e.linear(F.relu(e.bn(x, "bn1")).mean((2, 3)), "fc0")


def tensorflows(x: Tensor, stride: int) -> Tensor:
    return F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


def swish_wide(e: Entries, x: Tensor, *, statistics: tuple = CIFAR10) -> Tensor:
    x = e.conv(standardized(x, statistics), "init_conv", 1, 1)
    for stage in range(3):
        block, stride = f"layer.{stage}.block.0", 2 if stage else 1
        out = F.silu(e.bn(x, f"{block}.batchnorm_0"))
        short = e.conv(out, f"{block}.shortcut", stride) if e.has(f"{block}.shortcut") else x
        out = e.conv(tensorflows(out, stride), f"{block}.conv_0", stride)
        x = e.conv(F.silu(e.bn(out, f"{block}.batchnorm_1")), f"{block}.conv_1", 1, 1) + short
    return e.linear(F.silu(e.bn(x, "batchnorm")).mean((2, 3)), "logits")


def swish_preact(e: Entries, x: Tensor, *, statistics: tuple = CIFAR10) -> Tensor:
    x = e.conv(standardized(x, statistics), "conv_2d", 1, 1)
    for stage in range(4):
        for index in range(2):
            block, stride = f"layer_{stage}.{index}", 2 if stage and index == 0 else 1
            out = F.silu(e.bn(x, f"{block}.batchnorm_0"))
            short = x
            if e.has(f"{block}.shortcut"):
                short = e.conv(tensorflows(x, stride), f"{block}.shortcut", stride)
            out = e.conv(tensorflows(out, stride), f"{block}.conv_2d_1", stride)
            x = e.conv(F.silu(e.bn(out, f"{block}.batchnorm_1")), f"{block}.conv_2d_2", 1, 1) + short
    return e.linear(F.silu(e.bn(x, "batchnorm")).mean((2, 3)), "logits")


def trades_cnn(e: Entries, x: Tensor) -> Tensor:
    for first, second in ((1, 2), (3, 4)):
        for index in (first, second):
            name = f"feature_extractor.conv{index}"
            x = F.relu(F.conv2d(x, e[f"{name}.weight"], e[f"{name}.bias"]))
        x = F.max_pool2d(x, 2)
    x = F.relu(e.linear(x.flatten(1), "classifier.fc1"))
    return e.linear(F.relu(e.linear(x, "classifier.fc2")), "classifier.fc3")


def resnet50(e: Entries, x: Tensor) -> Tensor:
    x = F.relu(e.bn(e.conv(x, "conv1", 1, 1), "bn1"))
    for stage, (blocks, stride) in enumerate(((3, 1), (4, 2), (6, 2), (3, 2)), 1):
        for index in range(blocks):
            block, step = f"layer{stage}.{index}", stride if index == 0 else 1
            out = F.relu(e.bn(e.conv(x, f"{block}.conv1"), f"{block}.bn1"))
            out = F.relu(e.bn(e.conv(out, f"{block}.conv2", step, 1), f"{block}.bn2"))
            out = e.bn(e.conv(out, f"{block}.conv3"), f"{block}.bn3")
            if e.has(f"{block}.shortcut"):
                x = e.bn(e.conv(x, f"{block}.shortcut.0", step), f"{block}.shortcut.1")
            x = F.relu(out + x)
    return e.linear(x.mean((2, 3)), "linear")


def mobilenetv2(e: Entries, x: Tensor) -> Tensor:
    x = F.relu(e.bn(e.conv(x, "conv1", 1, 1), "bn1"))
    strides = [1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
    for index, stride in enumerate(strides):
        block = f"layers.{index}"
        out = F.relu(e.bn(e.conv(x, f"{block}.conv1"), f"{block}.bn1"))
        kernel = e[f"{block}.conv2.weight"]
        out = F.relu(
            e.bn(F.conv2d(out, kernel, stride=stride, padding=1, groups=len(kernel)), f"{block}.bn2")
        )
        out = e.bn(e.conv(out, f"{block}.conv3"), f"{block}.bn3")
        if stride == 1 and e.has(f"{block}.shortcut"):
            x = e.bn(e.conv(x, f"{block}.shortcut.0"), f"{block}.shortcut.1")
        x = out + x if stride == 1 else out
    return e.linear(F.relu(e.bn(e.conv(x, "conv2"), "bn2")).mean((2, 3)), "linear")


def torchvision_resnet18(e: Entries, x: Tensor) -> Tensor:
    """torchvision's own: the official code is at hand."""
    import torchvision

    network = torchvision.models.resnet18(num_classes=len(e["fc.bias"]))
    network.load_state_dict(dict(e.state))
    return network.eval()(x)


def official(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries by their official names."""
    if name.startswith("resnet") and "dajat" not in name:
        return {n.replace("downsample.", "shortcut.").replace("fc.", "linear."): t for n, t in state.items()}
    return dict(state)
