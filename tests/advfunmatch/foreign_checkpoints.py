"""Checkpoints in the forms of official repositories, made small; and what each was read as when they were first tried.

A row makes its file and says what its network computes, by `restated`. The networks are narrow: eight channels at
first.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import restated
import torch
import torch.nn.functional as F
from advfunmatch import InputError, create_model, load_model
from restated import CIFAR10, Entries
from torch import Tensor, nn

State = dict[str, Tensor]
Forward = Callable[[Entries, Tensor], Tensor]
NARROW = [f"advfunmatch.models.{module}.WIDTH" for module in ("resnet", "preactresnet", "dajat", "gowal")]
RIGHT, WRONG = "right", "wrong, without a word"
NUMBERS = re.compile(r"(-?\d+\.\d\d(, )?)+")
SHIFTED = ((0.5,) * 3, (0.5,) * 3)  # 2x − 1


def lacks(name: str, more: int) -> str:
    return f"refused: it lacks `{name}` and {more} more"


DAMAGED = "refused: truncated or damaged (it is not)"
NO_STATE = "refused: holds no state dict"


@contextmanager
def narrow_networks() -> Iterator[None]:
    patches = [mock.patch(place, 8) for place in NARROW]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@dataclass(frozen=True)
class Row:
    """A form.

    Attributes:
        repository, holds: whose it is, and what lies in the file.
        before: what came of it when it was first tried.
        forward: what its network computes of images in [0, 1], on the official state dict; None if only code says so.
        model: the architecture that is right.
        plain: the name that one who knows no more gives, if another.
        said: what has to be said else: normalize, weights_key.
        ending: of the file's name.
        file: what is stored, from the official state dict.
        statistics: of the normalisation in front of the network.
        size, channels, classes: of the images.
    """

    repository: str
    holds: str
    before: str
    forward: Forward
    model: str
    file: Callable[[State], Any] = lambda state: state
    plain: str | None = None
    said: Mapping[str, str] = field(default_factory=dict)
    statistics: tuple | None = None
    size: int = 16
    channels: int = 3
    classes: int = 10
    ending: str = "pt"

    @property
    def needs(self) -> str:
        """The library that its form needs."""
        return "safetensors" if self.ending == "safetensors" else "torch"


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def parallel(state: State) -> State:
    return under("module.", state)


def at(key: str, prefix: str = "", **more: Any) -> Callable[[State], Any]:
    """The weights under a key, behind a prefix, with what else lies there."""
    return lambda state: {key: under(prefix, state), **more}


def statistics_of(mean: str, std: str, values: tuple = CIFAR10) -> State:
    return {name: torch.tensor(each).view(1, 3, 1, 1) for name, each in zip((mean, std), values, strict=True)}


def unused_block(state: State) -> State:
    """TRADES': a first stage twice, of which one is never used."""
    twice = {f"sub_{name}": value + 1 for name, value in state.items() if name.startswith("block1.")}
    return state | twice


def other(state: State) -> State:
    """Other weights of the same network: an average, an earlier epoch."""
    return {name: value * 0.9 if value.is_floating_point() else value for name, value in state.items()}


def whole(state: State, model: str = "resnet18") -> nn.Module:
    network = create_model(model, num_classes=10, in_channels=3)
    return network


def scripted(state: State) -> Any:
    return torch.jit.trace(whole(state).eval(), torch.rand(1, 3, 16, 16))


OPTIMIZER = {
    "state": {0: {"momentum_buffer": torch.ones(3, 3)}},
    "param_groups": [{"lr": 0.1, "params": [0]}],
}
BESTS = {"epoch": 3, "best": 51.0, "optimizer": OPTIMIZER}
OPTIONS = argparse.Namespace(lr=0.1, arch="resnet18", opt=None)
AS_CIFAR = {"normalize": "cifar10"}

raw = partial(restated.preact, raw=True)
no_last = partial(restated.preact, last=False)
wong = partial(restated.preact, raw=True, last=False)
two_blocks = partial(restated.wide, blocks=2)
R, P, W = "resnet18", "preactresnet18", "wrn-10-1"

ROWS = (
    Row("RSLAD", "ResNet-18, DataParallel", RIGHT, restated.resnet, R, parallel),
    Row("RSLAD", "MobileNetV2, DataParallel", RIGHT, restated.mobilenetv2, "mobilenetv2", parallel),
    Row("RSLAD", "its teacher of DeepMind, swish, normalisation in code", lacks("conv1.weight", 69),
        restated.swish_wide,
        "wrn-10-1-swish", plain=W),
    Row("AdaAD", "ResNet-18, {net, accs, epoch}", RIGHT, restated.resnet, R, at("net", accs=[0.1], epoch=3)),
    Row("AdaAD", "ResNet-18, {net: the module} (without CUDA)", DAMAGED, restated.resnet, R,
        lambda s: {"net": whole(s)}),
    Row("AdaAD", "MobileNetV2, {net}", RIGHT, restated.mobilenetv2, "mobilenetv2", at("net")),
    Row("AdaAD", "WideResNet with sub_block1, {net}", RIGHT, restated.wide, W, lambda s: {"net": unused_block(s)}),
    Row("AdaAD", "WideResNet of Chen2021LTD, DataParallel", RIGHT, restated.wide, W, parallel),
    Row("AdaAD", "WideResNet, bias_last=False", "its own code fails", partial(restated.wide, last="nobias"),
        "wrn-10-1-nobias"),
    Row("AdaAD", "ResNet-18 of Tiny-ImageNet, {net}", RIGHT, restated.resnet, R, at("net"), size=32, classes=200),
    Row("ARD", "MobileNetV2, {net, optimizer}, .t7", RIGHT, restated.mobilenetv2, "mobilenetv2",
        at("net", optimizer=OPTIMIZER), ending="t7"),
    Row("ARD", "ResNet-18, {net, optimizer}, .t7", RIGHT, restated.resnet, R, at("net", optimizer=OPTIMIZER),
        ending="t7"),
    Row("ARD", "ResNet-50, {net, optimizer}, .t7", RIGHT, restated.resnet50, "resnet50", at("net", optimizer=OPTIMIZER),
        ending="t7"),
    Row("IAD", "ResNet-18, {state_dict of DataParallel, ...}", RIGHT, restated.resnet, R,
        at("state_dict", "module.", **BESTS, accs=[0.1])),
    Row("IAD pre_train", "PreActResNet-18 without a last BatchNorm", lacks("bn.weight", 3), no_last,
        "preactresnet18-kuangliu", at("state_dict", "module."), plain=P),
    Row("IAD pre_train", "WideResNet as Madry counts", "refused: the depth must be 6·n + 4", two_blocks, "wrn-14-1",
        at("state_dict", "module.")),
    Row("IAD pre_train", "the same, named by its blocks", RIGHT, two_blocks, "wrn-16-1",
        at("state_dict", "module.")),
    Row("IAD", "pResNet-18, normalises inside", RIGHT, restated.preact, P,
        lambda s: {"state_dict": parallel(statistics_of("normalize.mean", "normalize.std") | s), "accs": [0.1]},
        statistics=CIFAR10),
    Row("TRADES", "WideResNet with sub_block1", RIGHT, restated.wide, W, unused_block),
    Row("TRADES", "SmallCNN, MNIST", lacks("features.0.weight", 16), restated.trades_cnn, "small_cnn-trades",
        plain="small_cnn",
        size=28, channels=1),
    Row("MART", "ResNet-18", RIGHT, restated.resnet, R),
    Row("AWP trades_AWP", "WideResNet, DataParallel", RIGHT, restated.wide, W, parallel),
    Row("AWP AT_AWP", "PreActResNet-18, model_best; normalises outside", WRONG, restated.preact, P,
        at("state_dict", "module.", test_robust_acc=0.5), said=AS_CIFAR, statistics=CIFAR10),
    Row("DM-Improves-AT", "WideResNet, swish, {model_state_dict, unaveraged}", lacks("conv1.weight", 69),
        restated.swish_wide,
        "wrn-10-1-swish",
        lambda s: {"model_state_dict": under("module.0.", s),
                   "unaveraged_model_state_dict": under("module.0.", other(s))}, plain=W),
    Row("DM-Improves-AT", "PreActResNet-18, swish, {model_state_dict}", lacks("conv1.weight", 89),
        restated.swish_preact,
        "preactresnet18-swish", at("model_state_dict", "module.0."), plain=P),
    Row("DM-Improves-AT", "ResNet-18, {model_state_dict, unaveraged}", lacks("conv1.weight", 101), restated.resnet, R,
        lambda s: {"model_state_dict": under("module.0.", s),
                   "unaveraged_model_state_dict": under("module.0.", other(s))}),
    Row("imrahulr", "PreActResNet-18 --normalize, {model_state_dict}", lacks("conv1.weight", 89), restated.preact, P,
        at("model_state_dict", "module.1."), said=AS_CIFAR, statistics=CIFAR10),
    Row("imrahulr", "WideResNet, {model_state_dict}", lacks("conv1.weight", 129), restated.wide, W,
        at("model_state_dict", "module.0.")),
    Row("imrahulr", "ResNet-18 to resume: optimizer, OneCycleLR", lacks("conv1.weight", 101), restated.resnet, R,
        at("model_state_dict", "module.0.", **BESTS, scheduler_state_dict={"total_steps": 9, "_last_lr": [0.1]})),
    Row("DAJAT", "ResNet-18 with two BatchNorms each", lacks("layer2.0.downsample.1.weight", 11), restated.resnet,
        "resnet18-dajat", parallel, plain=R),
    Row("RobustBench", "Rice2020, written by the live model: mu, sigma", RIGHT, restated.wide, W,
        lambda s: statistics_of("mu", "sigma") | s, statistics=CIFAR10),
    Row("RobustBench", "Rice2020, the zoo's file: constants in code", WRONG, restated.wide, W, said=AS_CIFAR,
        statistics=CIFAR10),
    Row("RobustBench", "Hendrycks2019Using: 2x − 1 in code", WRONG, restated.wide, W, said={"normalize": "0.5/0.5"},
        statistics=SHIFTED),
    Row("RobustBench", "Ding2020MMA: each image standardised in code", WRONG, restated.wide_of_standardized_images,
        "wrn-10-1-mma", plain=W),
    Row("RobustBench", "Engstrom2019, ResNet-50: mu, sigma", RIGHT, restated.resnet50, "resnet50",
        lambda s: statistics_of("mu", "sigma") | s, statistics=CIFAR10),
    Row("RobustBench", "Kireev2021, {last, best}", NO_STATE, restated.preact, P, lambda s: {"last": other(s),
        "best": s}),
    Row("RobustBench", "Rice2020 L2, PreActResNet-18 (V2)", RIGHT, restated.preact, P,
        lambda s: statistics_of("mu", "sigma") | s, statistics=CIFAR10),
    Row("RobustBench", "Wong2020Fast, PreActResNet-18", lacks("bn.weight", 3), wong, "preactresnet18-wong2020",
        lambda s: statistics_of("mu", "sigma") | s, plain=P, statistics=CIFAR10),
    Row("RobustBench", "Chen2020Efficient, {state_dict}, constants in code", WRONG, restated.wide, W,
        at("state_dict", "module.model."), said=AS_CIFAR, statistics=CIFAR10),
    Row("RobustBench", "normalize_model(torchvision's ResNet-18)", RIGHT, restated.torchvision_resnet18,
        "torchvision:resnet18", lambda s: statistics_of("normalize.mean", "normalize.std") | under("model.", s),
        statistics=CIFAR10, size=32),
    Row("HYDRA", "ResNet-18, dense", RIGHT, restated.resnet, R, at("state_dict", arch="ResNet18", best_prec1=51.0)),
    Row("HYDRA", "ResNet-18, subnet by popup_scores", "refused: beyond the network's `conv1.popup_scores`",
        restated.resnet, R,
        lambda s: {"state_dict": s | {"conv1.popup_scores": torch.rand(8, 3, 3, 3)}}),
    Row("AutoAttack's examples", "ResNet-18, model_test.pt", RIGHT, restated.resnet, R),
    Row("PeerAiD", "ResNet-18 of Tiny-ImageNet, {state_dict, ...}", RIGHT, restated.resnet, R,
        at("state_dict", **BESTS, exp_id="a"), size=32, classes=200),
    Row("PeerAiD", "PreActResNet-18, {state_dict, optimizer}", lacks("bn.weight", 3), no_last,
        "preactresnet18-kuangliu", at("state_dict", **BESTS), plain=P),
    Row("PeerAiD", "WideResNet, {state_dict, optimizer}", RIGHT, restated.wide, W, at("state_dict", **BESTS)),
    Row("DA-Alone-Improves-AT", "PreActResNet-18, {state_dict, ...}", WRONG, raw, "preactresnet18-fastat",
        at("state_dict", **BESTS), plain=P),
    Row("DA-Alone-Improves-AT", "WideResNet, {state_dict}", lacks("block1.layer.0.bn1.weight", 154),
        restated.wide_with_late_strides, "wrn-10-1-idbh", at("state_dict"), plain=W),
    Row("N-FGSM", "PreActResNet-18; normalises outside", WRONG, raw, "preactresnet18-fastat", plain=P, said=AS_CIFAR,
        statistics=CIFAR10),
    Row("fast_adversarial", "PreActResNet-18; normalises in the loader", WRONG, raw, "preactresnet18-fastat", plain=P,
        said=AS_CIFAR, statistics=CIFAR10),
    Row("fast_adversarial", "the same without a normalisation", WRONG, raw, "preactresnet18-fastat", plain=P),
    Row("robust_overfitting", "PreActResNet-18, model_best; normalises outside", WRONG, restated.preact, P,
        at("state_dict", "module.", test_robust_acc=0.5), said=AS_CIFAR, statistics=CIFAR10),
    Row("robust_overfitting", "WideResNet, model_199.pth; normalises outside", WRONG, restated.wide, W, parallel,
        said=AS_CIFAR, statistics=CIFAR10, ending="pth"),
    Row("VITA-Group ARO", "PreActResNet-18 and advertorch's normalisation", RIGHT, restated.preact, P,
        lambda s: {"state_dict": statistics_of("normalize.mean", "normalize.std") | s}, statistics=CIFAR10),
    Row("VITA-Group ARO", "the same; its averaged weights are wanted", WRONG, restated.preact, P,
        lambda s: {"state_dict": statistics_of("normalize.mean", "normalize.std") | other(s),
                   "swa_state_dict": statistics_of("normalize.mean", "normalize.std") | s},
        said={"weights_key": "swa_state_dict"}, statistics=CIFAR10),
    Row("pytorch-cifar", "ResNet-18, {net, acc, epoch}; normalises in the loader", WRONG, restated.resnet, R,
        at("net", "module.", acc=93.1, epoch=3), said=AS_CIFAR, statistics=CIFAR10),
    Row("pytorch-cifar", "PreActResNet-18, {net}", lacks("bn.weight", 3), no_last, "preactresnet18-kuangliu",
        at("net", "module."), plain=P),
    Row("semisup-adv (Carmon)", "WideResNet, {num_classes, state_dict, normalize_input}", RIGHT, restated.wide, W,
        at("state_dict", "module.", num_classes=10, normalize_input=False)),
    Row("semisup-adv (Carmon)", "Sequential(NormalizeInput, WideResNet)", lacks("conv1.weight", 129), restated.wide, W,
        lambda s: {"state_dict": statistics_of("module.0.mean", "module.0.std") | under("module.1.", s),
                   "normalize_input": True}, statistics=CIFAR10),
    Row("Bag-of-Tricks-for-AT", "WideResNet, softplus, {state_dict}", WRONG, partial(restated.wide, act=F.softplus),
        "wrn-10-1-softplus", at("state_dict", "module."), plain=W),
    Row("Bag-of-Tricks-for-AT", "PreActResNet-18, hypersphere", "refused: it lacks `linear.bias`",
        partial(restated.preact, sphere=True), "preactresnet18-hypersphere", at("state_dict", "module."), plain=P),
    Row("LBGAT", "WideResNet, the student, DataParallel", RIGHT, restated.wide, W, parallel),
    Row("LBGAT", "ResNet-18, the teacher, DataParallel", WRONG, partial(restated.resnet, strides=(1, 1, 2, 2)),
        "resnet18-lbgat", parallel, plain=R),
    Row("MTARD", "ResNet-18", RIGHT, restated.resnet, R),
    Row("deepmind-research", "WideResNet, swish, constants in code", lacks("conv1.weight", 129), restated.swish_wide,
        "wrn-10-1-swish", plain=W),
    Row("(torch.optim.swa_utils)", "AveragedModel(ResNet-18): n_averaged", "refused: beyond the network's `n_averaged`",
        restated.resnet, R, lambda s: {"n_averaged": torch.tensor(3), **parallel(s)}),
    Row("(timm)", "CheckpointSaver's: args a Namespace, state_dict_ema", DAMAGED, restated.resnet, R,
        lambda s: {"epoch": 3, "arch": R, "state_dict": s, "version": 2, "args": OPTIONS, "state_dict_ema": other(s)}),
    Row("(Lightning)", "ResNet-18, {state_dict: net., hyper_parameters}", lacks("conv1.weight", 101),
        restated.resnet, R,
        at("state_dict", "net.", hyper_parameters={"lr": 0.1})),
    Row("(form)", "the whole module by torch.save(model)", DAMAGED, restated.resnet, R, whole),
    Row("(form)", "an accuracy as numpy.float64 beside the weights", DAMAGED, restated.resnet, R, at("net",
        acc=np.float64(9))),
    Row("(form)", "an accuracy as a tensor, weights under ema", NO_STATE, restated.resnet, R, at("ema",
        acc=torch.tensor(9.0))),
    Row("(torchvision's references)", "{model, model_ema, args}", DAMAGED, restated.resnet, R,
        lambda s: {"model": s, "model_ema": {"n_averaged": torch.tensor(3), **parallel(other(s))}, "args": OPTIONS}),
    Row("(form)", "half precision", RIGHT, restated.resnet, R,
        lambda s: {n: v.half() if v.is_floating_point() else v for n, v in s.items()}),
    Row("(form)", "torch 0.4: no num_batches_tracked", RIGHT, restated.resnet, R,
        lambda s: {n: v for n, v in s.items() if "num_batches" not in n}),
    Row("(form)", "the older form of torch.save", RIGHT, restated.resnet, R, ending="legacy"),
    Row("(form)", "safetensors", RIGHT, restated.resnet, R, ending="safetensors"),
    Row("(form)", "TorchScript by torch.jit.save", DAMAGED, restated.resnet, R, scripted, ending="jit"),
    Row("understanding-fast-adv-training", "PreActResNet-18, {last, best}, first layers twice", NO_STATE, wong,
        "preactresnet18-wong2020",
        lambda s: {"last": other(s), "best": s | under("model_preact_hl1.", first_layers(s))}, plain=P),
    Row("DKL v2", "WideResNet, an EMA in its \"SWA\" file, DataParallel", RIGHT, restated.wide, W, parallel),
)  # fmt: skip


def first_layers(state: State) -> State:
    """The first convolution and BatchNorm again, under their places in a Sequential."""
    places = {"conv1.": "1.", "layer1.0.bn1.": "2."}
    return {
        theirs + name.removeprefix(ours): value
        for ours, theirs in places.items()
        for name, value in state.items()
        if name.startswith(ours)
    }


def normalised(x: Tensor, row: Row) -> Tensor:
    return x if row.statistics is None else restated.standardized(x, row.statistics)


@cache
def trained(model: str, size: int, channels: int, classes: int, statistics: tuple | None) -> State:
    """The official state dict of a network whose BatchNorms have seen the images that it is made for."""
    torch.manual_seed(0)
    network = create_model(model, num_classes=classes, in_channels=channels)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    x = torch.rand(16, channels, size, size)
    with torch.no_grad():
        network(x if statistics is None else restated.standardized(x, statistics))
    return restated.official(model, network.state_dict())


def write(row: Row, folder: Path) -> tuple[Path, State]:
    state = trained(row.model, row.size, row.channels, row.classes, row.statistics)
    path, stored = folder / f"weights.{row.ending}", row.file(dict(state))
    if row.ending == "safetensors":
        import safetensors.torch

        safetensors.torch.save_file(stored, path)
    elif row.ending == "jit":
        stored.save(str(path))
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=row.ending != "legacy")
    return path, state


def outcome(row: Row, folder: Path) -> str:
    """What comes of the file now: refused, with the sentence's beginning, or right, and what had to be said for it.

    AssertionError where it loads without a word and computes something else.
    """
    path, state = write(row, folder)
    x = torch.rand(2, row.channels, row.size, row.size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = row.forward(Entries(state), normalised(x, row))
    tolerance = 1e-2 if "half" in row.holds else 1e-4

    def tried(model: str, **said: str) -> tuple[bool, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                network = load_model(path, model=model, **said)
                error = float((network(x) - want).abs().max() / want.abs().max())
                return error < tolerance, [short(warning.message, path) for warning in caught]
            except InputError as refusal:
                return False, [f"refused: {short(refusal, path)}"]

    right, remarks = tried(row.plain or row.model)
    assert right or remarks, f"{row} loads without a word and computes something else"
    if right:
        return "; ".join(["right", *(f"says: {remark}" for remark in remarks)])
    right, more = tried(row.model, **row.said)
    if not right:
        assert more[0].startswith("refused: "), f"{row} is neither right nor refused: {more}"
        return more[0]
    said = "".join(f", {name} = `{value}`" for name, value in row.said.items())
    first = "; ".join(remark if remark.startswith("refused") else f"says: {remark}" for remark in remarks)
    shown = f"right as `{row.model}`{said}"
    return shown if first.startswith("refused") else f"{first}; {shown}"


def short(sentence: object, path: Path) -> str:
    """The first part of a sentence, without what differs from machine to machine."""
    text = str(sentence).replace(f"checkpoint {str(path)!r}", "it").partition(";")[0]
    text = re.sub("^it is taken for a '[^']*', but its (weights fit .*), which .*", r"its \1", text)
    return NUMBERS.sub("… ", text)
