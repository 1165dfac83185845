"""The networks of official repositories, against plain re-statements of their forwards on their own state dicts.

A re-statement names the entries of the official state dict and computes with functions alone. Every entry must be used.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from advfunmatch import InputError, create_model
from advfunmatch.lean import prepare_for_attack
from advfunmatch.models import FAMILIES, load_weights, models_text, same_weights
from restated import (
    CIFAR100,
    SVHN,
    Entries,
    official,
    preact,
    resnet,
    swish_preact,
    swish_wide,
    trades_cnn,
    wide,
    wide_of_standardized_images,
    wide_with_late_strides,
)
from stands_for import SEED, assert_near, out_and_gradient, settle
from torch import Tensor

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
    "preactresnet18-softplus": (lambda e, x: preact(e, x, act=F.softplus), (8, 9, 0)),
    "preactresnet18-hypersphere": (lambda e, x: preact(e, x, sphere=True), (8, 9, 0)),
    "preactresnet18-swish": (swish_preact, (8, 9, 0)),
    "wrn-10-2": (wide, (4, 3, 0)),
    "wrn-14-1": (lambda e, x: wide(e, x, blocks=2), (6, 7, 0)),  # as Madry counts
    "wrn-10-2-softplus": (lambda e, x: wide(e, x, act=F.softplus), (4, 3, 0)),
    "wrn-10-2-mma": (wide_of_standardized_images, (4, 3, 0)),
    "wrn-10-2-nobias": (lambda e, x: wide(e, x, last="nobias"), (4, 3, 0)),
    "wrn-10-2-hypersphere": (lambda e, x: wide(e, x, last="cosines"), (4, 3, 0)),
    "wrn-10-2-dajat": (wide, (4, 3, 0)),
    "wrn-10-2-dajat-auto": (lambda e, x: wide(e, x, suffix="_auto"), (4, 3, 0)),
    "wrn-10-2-idbh": (wide_with_late_strides, (3, 4, 0)),
    "wrn-10-2-swish": (swish_wide, (4, 3, 0)),
    "wrn-10-2-swish-cifar100": (lambda e, x: swish_wide(e, x, statistics=CIFAR100), (4, 3, 0)),
    "wrn-10-2-swish-svhn": (lambda e, x: swish_wide(e, x, statistics=SVHN), (4, 3, 0)),
    "small_cnn-trades": (trades_cnn, (0, 0, 0)),
}


def made(name: str) -> tuple[torch.nn.Module, Tensor]:
    """The network as training leaves one, and images for it."""
    torch.manual_seed(SEED)
    channels, size = (1, 28) if name == "small_cnn-trades" else (3, 32)
    network = settle(create_model(name, num_classes=7, in_channels=channels).double())
    return network, torch.rand(1, channels, size, size, dtype=torch.float64)


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
