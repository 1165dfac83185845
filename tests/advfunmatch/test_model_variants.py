"""The networks of official repositories, against plain re-statements of their forwards on their own state dicts.

A re-statement names the entries of the official state dict and computes with functions alone. Every entry must be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from advfunmatch import InputError, create_model
from advfunmatch.lean import prepare_for_attack
from advfunmatch.models import FAMILIES, load_weights, models_text, same_weights
from stands_for import SEED, assert_near, out_and_gradient, settle
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
    return e.linear(F.avg_pool2d(x, 4 if strides[1] == 2 else 8).flatten(1), "linear")


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
    x = F.avg_pool2d(x, 4).flatten(1)
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
    x = F.avg_pool2d(act(e.bn(x, f"bn1{suffix}")), 8).flatten(1)
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
    return e.linear(F.avg_pool2d(F.silu(e.bn(x, "batchnorm")), 8).flatten(1), "logits")


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
    return e.linear(F.avg_pool2d(F.silu(e.bn(x, "batchnorm")), 4).flatten(1), "logits")


def trades_cnn(e: Entries, x: Tensor) -> Tensor:
    for first, second in ((1, 2), (3, 4)):
        for index in (first, second):
            name = f"feature_extractor.conv{index}"
            x = F.relu(F.conv2d(x, e[f"{name}.weight"], e[f"{name}.bias"]))
        x = F.max_pool2d(x, 2)
    x = F.relu(e.linear(x.flatten(1), "classifier.fc1"))
    return e.linear(F.relu(e.linear(x, "classifier.fc2")), "classifier.fc3")


# name -> (its forward, BatchNorms folded and fused in the prepared network, and left)
VARIANTS: dict[str, tuple[Callable[[Entries, Tensor], Tensor], tuple[int, int, int]]] = {
    "resnet18": (resnet, (20, 0, 0)),
    "resnet18-lbgat": (lambda e, x: resnet(e, x, (1, 1, 2, 2)), (20, 0, 0)),
    "resnet18-dajat": (resnet, (20, 0, 0)),
    "resnet18-dajat-auto": (lambda e, x: resnet(e, x, suffix="_auto"), (20, 0, 0)),
    "preactresnet18": (preact, (8, 9, 0)),
    "preactresnet18-fastat": (lambda e, x: preact(e, x, raw=True), (8, 9, 0)),
    "preactresnet18-kuangliu": (lambda e, x: preact(e, x, last=False), (8, 8, 0)),
    "preactresnet18-wong2020": (lambda e, x: preact(e, x, raw=True, last=False), (8, 8, 0)),
    "preactresnet18-softplus": (lambda e, x: preact(e, x, act=F.softplus), (8, 0, 9)),
    "preactresnet18-hypersphere": (lambda e, x: preact(e, x, sphere=True), (8, 9, 0)),
    "preactresnet18-swish": (swish_preact, (8, 0, 9)),
    "wrn-10-2": (wide, (4, 3, 0)),
    "wrn-14-1": (lambda e, x: wide(e, x, blocks=2), (6, 7, 0)),  # as Madry counts
    "wrn-10-2-softplus": (lambda e, x: wide(e, x, act=F.softplus), (4, 0, 3)),
    "wrn-10-2-mma": (wide_of_standardized_images, (4, 3, 0)),
    "wrn-10-2-nobias": (lambda e, x: wide(e, x, last="nobias"), (4, 3, 0)),
    "wrn-10-2-hypersphere": (lambda e, x: wide(e, x, last="cosines"), (4, 3, 0)),
    "wrn-10-2-dajat": (wide, (4, 3, 0)),
    "wrn-10-2-dajat-auto": (lambda e, x: wide(e, x, suffix="_auto"), (4, 3, 0)),
    "wrn-10-2-idbh": (wide_with_late_strides, (3, 4, 0)),
    "wrn-10-2-swish": (swish_wide, (4, 0, 3)),
    "wrn-10-2-swish-cifar100": (lambda e, x: swish_wide(e, x, statistics=CIFAR100), (4, 0, 3)),
    "wrn-10-2-swish-svhn": (lambda e, x: swish_wide(e, x, statistics=SVHN), (4, 0, 3)),
    "small_cnn-trades": (trades_cnn, (0, 0, 0)),
}


def made(name: str) -> tuple[torch.nn.Module, Tensor]:
    """The network as training leaves one, and images for it."""
    torch.manual_seed(SEED)
    channels, size = (1, 28) if name == "small_cnn-trades" else (3, 32)
    network = settle(create_model(name, num_classes=7, in_channels=channels).double())
    return network, torch.rand(1, channels, size, size, dtype=torch.float64)


def official(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries by their official names."""
    if name.startswith("resnet18") and "dajat" not in name:
        return {n.replace("downsample.", "shortcut.").replace("fc.", "linear."): t for n, t in state.items()}
    return dict(state)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_network_is_the_official_one_and_folds(name: str) -> None:
    network, x = made(name)
    forward, folds = VARIANTS[name]
    state = official(name, network.state_dict())
    entries = Entries({n: t.detach() for n, t in state.items()})
    want = out_and_gradient(lambda x: forward(entries, x), x)
    for got, expected in zip(out_and_gradient(network, x), want, strict=True):
        assert_near(got, expected, 1e-12)
    unread = {n for n in state.keys() - entries.read if not n.endswith("num_batches_tracked")}
    other_set = ("_auto",) if name.endswith("dajat") else ("bn1.", "bn2.", "shortcut_bn.")
    assert "dajat" in name or not unread
    assert all(any(part in n for part in other_set) for n in unread)
    prepared = prepare_for_attack(network)
    for got, expected in zip(out_and_gradient(prepared, x), want, strict=True):
        assert_near(got, expected, 1e-10)
    assert (len(prepared.folded), len(prepared.fused), len(prepared.left)) == folds


@pytest.mark.parametrize("name", ["resnet18-lbgat", "wrn-10-2-swish"])
def test_the_official_state_dict_loads(name: str) -> None:
    network, x = made(name)
    channels = x.shape[1]
    fresh = create_model(name, num_classes=7, in_channels=channels).double()
    loaded = load_weights(fresh, official(name, network.state_dict()), "weights").eval()
    assert_near(loaded(x), network(x), 1e-12)


def test_every_row_with_weights_like_anothers_computes_something_else() -> None:
    """And no other does: two networks of different rows have the same entries only where the table says so."""
    names = [name for name in VARIANTS if name != "wrn-14-1"]
    networks = {name: create_model(name, num_classes=7, in_channels=3).eval() for name in names}
    shapes = {n: {entry: t.shape for entry, t in net.state_dict().items()} for n, net in networks.items()}
    x, seen = torch.rand(1, 3, 32, 32), set()
    for name in names:
        alike = {other for other in names if other != name and shapes[other] == shapes[name]}
        assert alike == set(same_weights(name)) & set(names)
        if alike and not alike & seen:
            logits = []
            state = settle(networks[name]).state_dict()
            for each in (name, *alike):
                networks[each].load_state_dict(state)
                logits.append(networks[each](x))
            for index, one in enumerate(logits):
                assert all((one - other).abs().max() > 1e-3 * one.abs().max() for other in logits[:index])
        seen.add(name)


def test_both_countings_of_depth_give_one_network() -> None:
    first, second = (create_model(f"wrn-{d}-1", num_classes=7, in_channels=3).state_dict() for d in (32, 34))
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in second.items()}


def test_the_table_lists_every_network_once() -> None:
    text = models_text()
    spellings = [family.spelling for family in FAMILIES]
    assert len(set(spellings)) == len(spellings)
    assert all(spelling in text for spelling in spellings)
    assert "preactresnet18, preactresnet18-fastat, preactresnet18-softplus" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrn-33-2-swish", "the depth must be 6·n"),
        ("preactresnet50-swish", "model is 'preactresnet50-swish', but must be one of"),
        (
            "wrn-10-1-swish",
            "normalises images of 3 channels with the statistics of cifar10, but in_channels is 1",
        ),
    ],
)
def test_what_a_network_cannot_be_is_named(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        create_model(name, num_classes=7, in_channels=1)
