"""Weights in the forms in which others store them: each loads and is equal, is warned of, or is refused by a sentence.

What may not happen is that a file loads without a word and computes something else.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import pathlib
import pickle
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from advfunmatch import InputError, create_model, load_dataset, load_model
from advfunmatch.cli import run
from advfunmatch.models import load_network
from torch import Tensor, nn
from torch.nn.utils import prune

NAME = "small_cnn-8"
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
State = dict[str, Tensor]


def settled(
    name: str = NAME, seed: int = 0, preprocess: Callable[[Tensor], Tensor] = lambda x: x
) -> nn.Module:
    """A network whose batch norms have seen images in [0, 1], or what `preprocess` makes of them."""
    torch.manual_seed(seed)
    network = create_model(name, num_classes=7, in_channels=3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(preprocess(torch.rand(32, 3, 16, 16)))
    return network.eval()


def normalised(x: Tensor) -> Tensor:
    return (x - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def statistics(mean: str, std: str) -> State:
    return {mean: MEAN.view(1, 3, 1, 1), std: STD.view(1, 3, 1, 1)}


def averaged(state: State) -> State:
    return {**under("module.", state), "n_averaged": torch.tensor(3)}


EQUAL: dict[str, Callable[[State], Any]] = {
    "DataParallel": lambda s: under("module.", s),
    "under net, with accuracies": lambda s: {"net": s, "epoch": 3, "accs": [0.1]},
    "model_state_dict of Sequential(network)": lambda s: {"model_state_dict": under("module.0.", s)},
    "model_best": lambda s: {"state_dict": under("module.", s), "acc": np.float64(9), "rows": np.arange(3)},
    "optimizer beside it": lambda s: {
        "state_dict": s,
        "optimizer": {"state": {0: {"exp_avg": s["fc.weight"]}}},
    },
    "AveragedModel": averaged,
    "queues and ranges": lambda s: {
        "state_dict": s,
        "last": [collections.deque([1.0], 3), range(3), frozenset([1])],
    },
    "Lightning": lambda s: {"state_dict": under("net.", s), "hyper_parameters": {"lr": 0.1}},
    "torch.compile": lambda s: under("_orig_mod.", s),
    "ema alone": lambda s: {"ema": s, "best": torch.tensor(93.1)},
    "options of argparse": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1)},
    "paths and times": lambda s: {
        "state_dict": s,
        "more": [pathlib.Path("a/b"), datetime.datetime(2020, 1, 1)],
    },
    "an attack that knows its network": lambda s: under("basic_net.", s) | under("attack.model.", s),
    "thop": lambda s: s | {"total_ops": torch.zeros(1), "conv1.total_params": torch.zeros(1)},
    "half precision": lambda s: {n: v.half() if v.is_floating_point() else v for n, v in s.items()},
    "torch 0.4": lambda s: {n: v for n, v in s.items() if "num_batches" not in n},
    "numbers among the weights": lambda s: {**s, "epoch": 3, "best": 0.9},
    "in a tuple": lambda s: (3, {"net": s}, OrderedDict(lr=0.1)),
    "a defaultdict": lambda s: collections.defaultdict(
        dict, net=s, seen=collections.defaultdict(list, a=[1])
    ),
    "arrays of NumPy": lambda s: {n: v.numpy() for n, v in s.items()},
    "accuracies' mean": lambda s: {"net": s, "mean": 93.1, "std": 0.2},
    "two networks of which one fits": lambda s: {
        "teacher": create_model("small_cnn-4", num_classes=7, in_channels=3).state_dict(),
        "student": s,
    },
}

NORMALISED: dict[str, Callable[[State], Any]] = {
    "mu and sigma": lambda s: statistics("mu", "sigma") | under("model.", s),
    "Sequential(Normalize, network)": lambda s: (
        statistics("module.0.mean", "module.0.std") | under("module.1.", s)
    ),
    "normalize": lambda s: statistics("normalize.mean", "normalize.std") | under("model.", s),
    "beside plain names": lambda s: statistics("mean", "std") | s,
    "every weight twice": lambda s: {
        **statistics("model.0.mean", "model.0.std") | under("model.1.", s),
        **statistics("attack.net.0.mean", "attack.net.0.std") | under("attack.net.1.", s),
    },
}


def loaded(path: Path, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_model(path, **{"model": NAME} | options)


@pytest.mark.parametrize(
    ("form", "zipped"),
    [
        *((form, True) for form in EQUAL),
        *((form, False) for form in ("DataParallel", "options of argparse", "a defaultdict")),
    ],
)
def test_forms_that_load_without_a_word(form: str, zipped: bool, tmp_path: Path) -> None:
    network, path = settled(), tmp_path / "w.pt"
    torch.save(EQUAL[form](network.state_dict()), path, _use_new_zipfile_serialization=zipped)
    x = torch.rand(2, 3, 16, 16)
    model = loaded(path)
    tolerance = 1e-2 if form == "half precision" else 1e-6
    torch.testing.assert_close(model(x), network(x), rtol=tolerance, atol=tolerance)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("form", NORMALISED)
def test_a_normalisation_in_the_file_goes_in_front(form: str, tmp_path: Path) -> None:
    network, x = settled(preprocess=normalised), torch.rand(2, 3, 16, 16)
    torch.save(NORMALISED[form](network.state_dict()), tmp_path / "w.pt")
    torch.testing.assert_close(loaded(tmp_path / "w.pt")(x), network(normalised(x)))


@pytest.mark.parametrize(
    "options",
    [
        {"mean": MEAN, "std": STD},
        {"args": argparse.Namespace(mean=tuple(MEAN.tolist()), std=tuple(STD.tolist()))},
        {"data": {"normalize": {"mu": MEAN.tolist(), "sigma": STD.numpy()}}},
    ],
)
def test_a_normalisation_beside_the_weights_goes_in_front_and_is_said(
    options: dict[str, Any], tmp_path: Path
) -> None:
    network, path, x = settled(preprocess=normalised), tmp_path / "w.pt", torch.rand(2, 3, 16, 16)
    torch.save({"state_dict": network.state_dict()} | options, path)
    with pytest.warns(
        UserWarning, match=r"0\.4,0\.5,0\.6/0\.2,0\.3,0\.1 beside its weights.* in front of the network"
    ):
        model = load_model(path, model=NAME)
    torch.testing.assert_close(model(x), network(normalised(x)))
    torch.testing.assert_close(loaded(path, normalize="none")(x), network(x))


def random_mask(layer: nn.Module, dim: int = 0) -> None:
    prune.random_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.5)


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "pruning": random_mask,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "weight norm of all": lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=None),
    "weight norm of columns": lambda layer: nn.utils.weight_norm(layer, dim=1),
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "spectral norm by hooks": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weights_that_are_computed_are_computed(kind: str, tmp_path: Path) -> None:
    network = settled().requires_grad_(False)
    COMPUTED[kind](network.fc)
    if kind.startswith("weight norm"):
        length = "parametrizations.weight.original0" if "columns" not in kind else "weight_g"
        network.fc.get_parameter(length).data.mul_(2)
    network.train()(torch.rand(4, 3, 16, 16))  # a step of spectral norm's iteration
    state, x = network.eval().state_dict(), torch.rand(2, 3, 16, 16)
    torch.save({"state_dict": under("module.", state)}, tmp_path / "w.pt")
    with pytest.warns(
        UserWarning, match=f"'module.fc.weight'.* by {' '.join(kind.split()[:2])}; that is computed"
    ):
        model = load_model(tmp_path / "w.pt", model=NAME, normalize="none")
    torch.testing.assert_close(model(x), network(x))


def test_dark_images_of_one_channel_are_no_normalised_ones(tmp_path: Path) -> None:
    network, path = create_model("small_cnn-8", num_classes=7, in_channels=1), tmp_path / "w.pt"
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    x = torch.rand(32, 1, 16, 16) ** 6  # a mean of 0.14, as MNIST's
    network(x)
    torch.save(network.state_dict(), path)
    loaded(path)
    network((x - 0.1307) / 0.3081)
    torch.save(network.state_dict(), path)
    with pytest.warns(UserWarning, match=r"unless normalize \(mnist, fashion_mnist, MEAN/STD or none\)"):
        load_model(path, model="small_cnn-8")


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda s: s, r"trained on images of mean -?0\.\d\d, .* unless normalize"),
        (lambda s: {"net": under("module.", s), "acc": 93.0}, "so perhaps normalised ones"),
        (
            lambda s: {"model_state_dict": under("module.1.", s)},
            r"stand behind 'module\.1\.', second in a sequence",
        ),
        (
            lambda s: {"state_dict": s, "normalize_input": True},
            "normalize_input = True, but not the statistics",
        ),
    ],
)
def test_a_normalisation_that_is_not_in_the_file_is_asked_for(
    form: Callable[[State], Any], said: str, tmp_path: Path
) -> None:
    network, path, x = settled(preprocess=normalised), tmp_path / "w.pt", torch.rand(2, 3, 16, 16)
    torch.save(form(network.state_dict()), path)
    with pytest.warns(UserWarning, match=said):
        model = load_model(path, model=NAME)
    torch.testing.assert_close(model(x), network(x))
    model = loaded(path, normalize="0.4,0.5,0.6/0.2,0.3,0.1")
    torch.testing.assert_close(model(x), network(normalised(x)))
    torch.testing.assert_close(loaded(path, normalize="none")(x), network(x))


def test_statistics_that_were_never_moved_show_nothing(tmp_path: Path) -> None:
    torch.save(create_model(NAME, num_classes=7, in_channels=3).state_dict(), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="does not show whether it was trained on normalised images"):
        load_model(tmp_path / "w.pt", model=NAME)


def test_one_of_several_sets_of_weights(tmp_path: Path) -> None:
    networks, path, x = [settled(seed=seed) for seed in range(2)], tmp_path / "w.pt", torch.rand(2, 3, 16, 16)
    one, two = (network.state_dict() for network in networks)
    for keys in (
        ("state_dict", "swa_state_dict"),
        ("best", "last"),
        ("model", "model_ema"),
        ("x.net", "y.net"),
    ):
        first, second = keys
        stored = {first: one, second: averaged(two), "epoch": 3}
        if "." in first:
            stored = {"x": {"net": one}, "y": {"net": two}}
        torch.save(stored, path)
        with pytest.warns(UserWarning, match=f"'{first}' is taken, not '{second}'; weights_key chooses"):
            model = load_model(path, model=NAME)
        torch.testing.assert_close(model(x), networks[0](x))
        torch.testing.assert_close(loaded(path, weights_key=second)(x), networks[1](x))
    with pytest.raises(InputError, match=r"weights_key is 'z', but checkpoint .* holds: 'x\.net', 'y\.net'"):
        load_model(path, model=NAME, weights_key="z")


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (
            lambda s, other: {"state_dict": other | {"x.w": torch.ones(2, 2)}, "ema": s},
            "since 'state_dict' does not",
        ),
        (lambda s, other: {"momentum": other, "final": s}, "'final' is taken, not 'momentum'"),
    ],
)
def test_what_is_taken_in_place_of_the_main_weights_is_said(
    form: Callable[[State, State], Any], said: str, tmp_path: Path
) -> None:
    wanted = settled()
    torch.save(form(wanted.state_dict(), settled(seed=1).state_dict()), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=said):
        found = load_model(tmp_path / "w.pt", model=NAME)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(found(x), wanted(x))


def test_weights_that_are_not_finite_are_said(tmp_path: Path) -> None:
    torch.save(
        {n: v / 0 if v.dim() == 4 else v for n, v in settled().state_dict().items()}, tmp_path / "w.pt"
    )
    with pytest.warns(UserWarning, match="has NaN or infinity in 'features.0.weight'"):
        load_model(tmp_path / "w.pt", model=NAME, normalize="none")


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_sparse_weights_are_made_dense(tmp_path: Path) -> None:
    network = settled()
    sparse = {n: v.to_sparse() if v.dim() > 1 else v for n, v in network.state_dict().items()}
    torch.save(sparse, tmp_path / "w.pt")
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_model(tmp_path / "w.pt", model=NAME)(x), network(x))


def test_a_normalisation_of_bytes_can_be_replaced(tmp_path: Path) -> None:
    network = settled(preprocess=normalised)
    torch.save(network.state_dict() | {"pixel_mean": 255 * MEAN, "pixel_std": 255 * STD}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="holds the normalisation"):
        found = load_model(tmp_path / "w.pt", model=NAME, normalize="0.4,0.5,0.6/0.2,0.3,0.1")
    x = torch.rand(2, 3, 16, 16)
    assert torch.allclose(found(x), network(normalised(x)), atol=1e-5)


def test_one_of_two_networks_in_a_state_dict(tmp_path: Path) -> None:
    networks, path, x = [settled(seed=seed) for seed in range(2)], tmp_path / "w.pt", torch.rand(2, 3, 16, 16)
    torch.save(
        under("teacher.", networks[0].state_dict()) | under("student.", networks[1].state_dict()), path
    )
    with pytest.raises(InputError, match=r"several networks .* behind '\w+\.' and '\w+\.'; weights_key"):
        load_model(path, model=NAME)
    for name, network in zip(("teacher", "student"), networks, strict=True):
        torch.testing.assert_close(loaded(path, weights_key=name)(x), network(x))


def test_where_weights_fit_several_networks_the_name_decides(tmp_path: Path) -> None:
    network, x = settled("wrn-10-1-softplus"), torch.rand(2, 3, 16, 16)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.warns(
        UserWarning, match=r"taken for a 'wrn-10-1', but its weights fit wrn-10-1-softplus, wrn-"
    ):
        load_model(tmp_path / "w.pt", model="wrn-10-1")
    torch.testing.assert_close(loaded(tmp_path / "w.pt", model="wrn-10-1-softplus")(x), network(x))


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (lambda s: [1, 2], "holds no state dict, but a list"),
        (
            lambda s: {"acc": 0.9, "more": [torch.ones(2, 2)]},
            r"holds no state dict, but a dict of 'acc' \(float\), 'more' \(list\)",
        ),
        (lambda s: {"a": {"acc": torch.tensor(1.0)}}, "holds no state dict"),
        (
            lambda s: {
                n.replace("fc.weight", "fc.parametrizations.weight.original"): v for n, v in s.items()
            },
            "'fc.weight' as a parametrization of 'original', whose code is not in the file",
        ),
        (lambda s: {"net": s, "mean": [125.3, 123.0, 113.9], "std": [63.0] * 3}, "normalize says what goes"),
        (lambda s: {n.replace("features", "layers"): v for n, v in s.items()}, r"it lacks '.*' and \d+ more"),
        (
            lambda s: s | {"popup_scores": torch.ones(3, 3)},
            "has 'popup_scores', HYDRA's: .* is not in the file",
        ),
        # A prefix on a part of the entries, and one within their names.
        (lambda s: {("module." if "fc" in n else "") + n: v for n, v in s.items()}, "it lacks"),
        (lambda s: {n.replace("fc.", "fc.module."): v for n, v in s.items()}, "it lacks"),
        (
            lambda s: s | statistics("mean", "std") | {"0.mean": torch.ones(3), "0.std": torch.ones(3)},
            "which differ",
        ),
        (
            lambda s: s | {"mean": 102 * torch.ones(3), "std": 51 * torch.ones(3)},
            r"as of images in \[0, 1\].* from 0 to 255 it is 0.4,0.4,0.4/0.2,0.2,0.2",
        ),
        (
            lambda s: {"state_dict": under("model.", s) | {"loss.weight": torch.ones(7)}},
            "beyond the network's 'loss.weight'; .*weights_key = 'model' leaves it out",
        ),
        (
            lambda s: {n: v.to("meta") for n, v in s.items()},
            "holds no state dict",
        ),
        (
            lambda s: {n: v.char() if n == "fc.weight" else v for n, v in s.items()},
            "torch.int8 and not torch.float32",
        ),
    ],
)
def test_what_is_refused(form: Callable[[State], Any], sentence: str, tmp_path: Path) -> None:
    torch.save(form(settled().state_dict()), tmp_path / "w.pt")
    with pytest.raises(InputError, match=sentence):
        load_model(tmp_path / "w.pt", model=NAME)


def test_the_sizes_come_from_the_file_and_are_compared(tmp_path: Path) -> None:
    network = create_model("resnet18", num_classes=100, in_channels=1)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="resnet18-lbgat"):
        assert load_model(tmp_path / "w.pt", model="resnet18")(torch.rand(1, 1, 32, 32)).shape == (1, 100)
    with pytest.raises(
        InputError,
        match=r"another shape of 'fc\.weight' and 1 more: \(100, 512\) in the file, \(10, 512\) in the network; its "
        "last layer is for 100 classes, and not for 10",
    ):
        load_model(tmp_path / "w.pt", model="resnet18", num_classes=10)


class Runs:
    """An object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(zipped: bool, tmp_path: Path) -> None:
    path, network = tmp_path / "w.pt", settled()
    for stored, sentence in (
        ({"state_dict": network.state_dict(), "more": Runs(tmp_path / "ran")}, "whose code would be run"),
        ({"more": collections.UserDict(a=[1])}, "holds a collections.UserDict, whose code"),
        (network, r"whose code would be run; .* torch\.load\(.*torch\.save\("),
        ({"net": network}, "SmallCNN, whose code would be run"),
    ):
        torch.save(stored, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=sentence):
            load_model(path, model=NAME)
    assert not (tmp_path / "ran").exists()


def test_files_are_called_what_they_are(tmp_path: Path) -> None:
    state, path = settled().state_dict(), tmp_path / "w.pt"
    for zipped in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match="is truncated"):
            load_model(path, model=NAME)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="is a pickle, but not one of"):
        load_model(path, model=NAME)
    np.savez(path.with_suffix(".npz"), a=np.ones(2))
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("a/w.pt", whole)
    with tarfile.open(tmp_path / "w.tar", "w") as packed:
        packed.add(path, "w.pt")
    for name, sentence in (
        ("w.npz", r"of NumPy arrays; .*torch.save\(dict\(numpy.load"),
        ("w.zip", "a zip archive of a/w.pt, .*unpack it"),
        ("w.tar", "is a tar archive: unpack it first"),
    ):
        with pytest.raises(InputError, match=sentence):
            load_model(tmp_path / name, model=NAME)
    for content, sentence in (
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        (b"BZh91AY&SY", "is a bzip2 archive: unpack it first"),
        (b"<!doctype html>", "is a web page"),
        (b"hello world", "is not a PyTorch checkpoint: neither"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            load_model(path, model=NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(InputError, match=r"is a TorchScript program, .*torch\.jit\.load\("):
        load_model(path, model=NAME)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("cifar", "normalize is 'cifar', but must be cifar10, cifar100"),
        ("0.5", "MEAN/STD"),
        ("0.5/0", "deviations positive"),
        ("0.1,0.2/0.5,0.5", "normalises 2 channels, but the network takes 3"),
    ],
)
def test_a_normalisation_that_cannot_be(given: str, sentence: str, tmp_path: Path) -> None:
    torch.save(settled().state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=sentence):
        load_model(tmp_path / "w.pt", model=NAME, normalize=given)


def test_networks_that_normalise_are_not_normalised_twice(tmp_path: Path) -> None:
    network = create_model("wrn-10-1-swish-svhn", num_classes=7, in_channels=3)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="normalises its images itself"):
        loaded(tmp_path / "w.pt", model="wrn-10-1-swish-svhn", normalize="svhn")
    loaded(tmp_path / "w.pt", model="wrn-10-1-swish-svhn")


def test_safetensors_of_others(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    network, path, x = settled(), tmp_path / "w.safetensors", torch.rand(2, 3, 16, 16)
    safetensors.save_file(under("module.", network.state_dict()), path)
    torch.testing.assert_close(loaded(path)(x), network(x))
    path.rename(tmp_path / "w.bin")  # known by its head, whatever its ending
    torch.testing.assert_close(loaded(tmp_path / "w.bin")(x), network(x))
    whole = (tmp_path / "w.bin").read_bytes()
    for length in (20, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="is truncated"):
            load_model(path, model=NAME)
    path.write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="is damaged, or not a file of safetensors"):
        load_model(path, model=NAME)


FEW = ["--data", "digits", "--limit", "64", "--device", "cpu"]
TRAIN = [
    "train",
    *FEW,
    "--model",
    "small_cnn-4",
    "--epochs",
    "1",
    "--eps",
    "0.1",
    "--steps",
    "1",
    "--eval-limit",
    "50",
]


def test_safetensors_of_a_run_know_what_they_are(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    more = ["--method", "pgd_at", "--save-safetensors", "--channels-last", "--validation", "50"]
    assert run([*TRAIN, *more, "--out", str(tmp_path)]) == 0
    x = torch.rand(4, 1, 8, 8)
    for name in ("checkpoint", "best"):
        ours = load_model(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(ours(x), load_model(tmp_path / f"{name}.pt")(x))
    data = load_dataset("digits", split="test", limit=4)
    _, stored = load_network(tmp_path / "checkpoint.safetensors", None, data)
    assert stored["config"]["method"] == "pgd_at"
    assert run([*TRAIN, "--method", "ce", "--overwrite", "--out", str(tmp_path)]) == 0
    assert not [*tmp_path.glob("*.safetensors")]  # of a run that is no more


def test_the_command_line_takes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = create_model("small_cnn-4", num_classes=10, in_channels=1)
    network(4 * load_dataset("digits", split="train", limit=200).images.float() / 255 - 2)
    path, figures = tmp_path / "w.pt", tmp_path / "x.json"
    other = create_model("small_cnn-4", num_classes=10, in_channels=1).state_dict()
    torch.save({"best": other, "last": network.state_dict()}, path)
    theirs = ["--teacher", str(path), "--teacher-model", "small_cnn-4"]
    said_of_it = ["--teacher-normalize", "0.5/0.25", "--teacher-weights-key", "last"]
    out = str(tmp_path / "run")
    bare = ["--weights-key" if flag == "--teacher-weights-key" else flag for flag in said_of_it]
    assert run([*TRAIN, "--method", "funmatch", *theirs, *bare, "--out", out]) == 0
    assert not re.search("unless teacher_normalize|is taken", capsys.readouterr().err)
    network = load_model(path, model="small_cnn-4", normalize="0.5/0.25", weights_key="last")
    images = load_dataset("digits", split="test", limit=64)
    correct = network(images.images.float() / 255).argmax(1) == images.labels
    options = ["--model", "small_cnn-4", "--normalize", "0.5/0.25", "--weights-key", "last"]
    evaluate = ["evaluate", *FEW, "--attacks", "clean", "--out", str(figures), "--overwrite", "--checkpoint"]
    assert run([*evaluate, str(path), *options]) == 0
    assert json.loads(figures.read_text())["clean"] == pytest.approx(
        100 * correct.double().mean().item(), abs=0.006
    )
    # The two sides, told the same and told apart.
    for side, equal in ((options, True), ([*options[:2], "--normalize", "none", *options[4:]], False)):
        assert run([*evaluate, str(path), "--eps", "0.1", *side, *theirs, *said_of_it]) == 0
        assert (json.loads(figures.read_text())["kl_clean"] < 1e-9) == equal
    # A student remembers what was said of its teacher: no doubts are left when it is compared with it.
    capsys.readouterr()
    assert run([*evaluate, out + "/checkpoint.pt", "--fidelity"]) == 0
    assert "agreement" in json.loads(figures.read_text())
    assert capsys.readouterr().err == ""
    # Without these words there are doubts, each one line.
    assert run([*evaluate, str(path), *options[:2]]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning", "warning"]
    assert "'best' is taken, not 'last'" in lines[0]
    assert [f"warning: {text}" for text in json.loads(figures.read_text())["warnings"]] == lines
    attack = [
        "attack",
        *FEW,
        "--attack",
        "fgsm",
        "--eps",
        "0.1",
        "--out",
        str(tmp_path / "x.npz"),
        "--checkpoint",
    ]
    assert run([*attack, str(path), *options]) == 0
    assert capsys.readouterr().err == ""
    for command, sentence in (
        ([*evaluate, str(path), "--normalize", "0.5/0.25"], "which needs model"),
        (
            [*evaluate, out + "/checkpoint.pt", *theirs, "--teacher-normalize", "c"],
            "teacher_normalize is 'c'",
        ),
        (
            [*TRAIN, "--method", "funmatch", *theirs, "--teacher-normalize", "c", "--out", out],
            "teacher_normalize is",
        ),
        ([*evaluate, str(path), *options[:-1], "first"], "weights_key is 'first', but"),
    ):
        assert run(command) == 2
        assert sentence in capsys.readouterr().err
