"""Prepared networks against the eval-mode networks they stand for: outputs, input gradients, and after an update."""

from __future__ import annotations

import copy
import io
import operator
import random
import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from advfunmatch.lean import prepare_for_attack
from stands_for import SEED, assert_near, assert_stands_for, out_and_gradient, settle
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from afm_kernels import ops, use_backend

torch.manual_seed(SEED)  # for the layers among the parameters below: some draws leave nothing behind a ReLU


def torchvision_model(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(SEED)
    return getattr(torchvision.models, name)(weights=None, num_classes=10, **options)


# name -> (BatchNorms folded, into scale_shift_relu)
TORCHVISION = {
    "resnet18": (20, 0),
    "mobilenet_v2": (52, 0),
    "shufflenet_v2_x0_5": (56, 0),
    "mnasnet0_5": (52, 0),
    "squeezenet1_0": (0, 0),
}
# Bigger, and no other rule in them.
SLOW_TORCHVISION = {
    "densenet121": (59, 62),
    "googlenet": (57, 0),
    "efficientnet_b0": (49, 0),
    "regnet_y_400mf": (53, 0),
    "convnext_tiny": (0, 0),
    "mobilenet_v3_small": (34, 0),
}
TIMM = ["resnet18", "efficientnet_b0"]
SLOW_TIMM = ["resnetv2_50", "res2net50_14w_8s", "repvgg_a0", "dla34", "seresnet18", "hrnet_w18_small"]


def slow(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*TORCHVISION, *slow(*SLOW_TORCHVISION)])
def test_torchvision_networks(name: str) -> None:
    folded, fused = {**TORCHVISION, **SLOW_TORCHVISION}[name]
    prepared = assert_stands_for(torchvision_model(name), torch.rand(2, 3, 32, 32))
    assert (prepared.traced, len(prepared.folded), len(prepared.fused), prepared.left) == (
        True,
        folded,
        fused,
        [],
    )


@pytest.mark.parametrize("name", [*TIMM, *slow(*SLOW_TIMM)])
def test_timm_networks(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(SEED)
    prepared = assert_stands_for(timm.create_model(name, num_classes=10), torch.rand(2, 3, 32, 32))
    assert prepared.left == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "size", "folded"),
    [
        ("torchvision:inception_v3", {"init_weights": False}, 75, 94),
        ("torchvision:vit_b_32", {"image_size": 64}, 64, 0),
        ("timm:mixer_s32_224", {}, 224, 0),
    ],
)
def test_networks_of_one_size_or_with_heads_of_zeros(
    name: str, options: dict, size: int, folded: int
) -> None:
    library, _, name = name.partition(":")
    torch.manual_seed(SEED)
    if library == "timm":
        model = pytest.importorskip("timm").create_model(name, num_classes=10)
    else:
        model = torchvision.models.get_model(name, num_classes=10, **options)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    prepared = assert_stands_for(model, torch.rand(2, 3, size, size))
    assert (prepared.traced, len(prepared.folded), prepared.left) == (True, folded, [])


@pytest.mark.slow
def test_a_timm_network_whose_padding_depends_on_the_size() -> None:
    """By an if; it also scales in place, with the result's name unused."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(SEED)
    prepared = assert_stands_for(timm.create_model("dm_nfnet_f0", num_classes=10), torch.rand(2, 3, 32, 32))
    assert prepared.traced


# ---- graphs that are easy to get wrong ---------------------------------------------------------------------------


class Net(nn.Module):
    """Layers a (conv), bn, b (conv), bn2, fc, wired by a function of the module and x."""

    def __init__(self, wiring: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.a = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.relu_in_place = nn.ReLU(), nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1))
        self.std = torch.tensor([0.2, 0.3, 0.2]).view(-1, 1, 1)
        self.fc = nn.Linear(4, 5)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.wiring(self, x).mean((2, 3)))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Net:
        self.std = function(self.std)  # a plain attribute, as users' normalisation layers often have them
        return super()._apply(function, recurse)


def residual(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    return F.relu(net.bn(net.b(x)) + x)


def two_foldable_branches(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.a(x))
    return (net.bn(net.b(x)) + net.bn2(x)).relu()


def batch_norm_plus_residual(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.a(x))
    return net.relu(net.bn(x.tanh()) + x)


def in_place_changes_the_shortcut(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    out = net.relu_in_place(x)
    return net.bn(net.b(out)) + x  # x is relu(x) by now


def in_place_result_unused(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    x.mul_(0.5)
    x.add_(0.25)
    F.relu_(x)
    return net.b(x)


def in_place_on_a_view(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    x[:, :2].relu_()
    return net.bn2(net.b(x))


def in_place_add_of_an_old_reader(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    y = net.bn2(net.b(x))
    y += x
    return torch.relu_(y) + y


def conv_read_twice(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.relu(net.bn(x)) + x


def batch_norm_read_twice(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    return net.relu(x) + x


def shared_layers(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.bn(net.b(net.relu(net.a(x)))))
    return net.relu(net.bn2(net.b(x)))


def broadcast_residual(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.a(x))
    return F.relu(net.bn(net.b(x)) + x.mean((2, 3), keepdim=True))


def broadcast_to_a_larger_residual(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.a(x))
    return F.relu(net.bn(net.b(x.mean((2, 3), keepdim=True))) + x)


def broadcast_batch_norm(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.a(x))
    return F.relu(net.bn(x.mean((2, 3), keepdim=True).sigmoid()) + x)


def scalar_added(net: Net, x: Tensor) -> Tensor:
    return F.relu(net.bn(net.a(x)) + 0.5)


def added_to_itself(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    return F.relu(x + x)


def added_with_a_factor(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    return F.relu(torch.add(net.bn(net.b(x)), x, alpha=3))


def normalised_with_dropout(net: Net, x: Tensor) -> Tensor:
    x = net.dropout(net.relu(net.bn(net.a((x - net.mean) / net.std))))
    return F.dropout(net.b(x), 0.5, training=net.training)


def functional_batch_norm(net: Net, x: Tensor) -> Tensor:
    bn = net.bn
    return F.relu(F.batch_norm(net.a(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps))


def keyword_inputs(net: Net, x: Tensor) -> Tensor:
    x = net.relu(input=net.bn(input=net.a(input=x)))
    y = torch.add(input=net.bn2(net.b(x)), other=x)
    y = F.dropout(input=net.dropout(input=torch.relu(input=y)), training=False)
    return F.relu(input=(y * 0.5).sub_(0.1), inplace=True) + y


def functional_batch_norm_by_keywords(net: Net, x: Tensor) -> Tensor:
    bn = net.bn
    x = F.batch_norm(
        input=net.a(x), running_mean=bn.running_mean, running_var=bn.running_var, weight=bn.weight
    )
    return F.relu(x, inplace=True)


def functional_batch_norm_without_relu(net: Net, x: Tensor) -> Tensor:
    bn = net.bn
    return F.batch_norm(net.a(x), bn.running_mean * 2, bn.running_var + 1).tanh()


def augmented_assignment_to_a_second_name(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    y = x
    y += 1
    y *= 2
    return x.relu()


def augmented_assignment_to_a_view(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    y = x[:, :2]
    y += net.b(x)[:, 2:]
    return net.bn2(x)


def augmented_assignment_of_a_convolution_to_a_view(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    y = x.flatten(0, 0)
    y += net.b(x)
    return net.bn2(x) + net.relu(y)


def augmented_assignment_to_a_number(net: Net, x: Tensor) -> Tensor:
    size = x.shape[2] + 0
    half = size
    size //= 2
    size += 1
    return F.interpolate(net.a(x), (half, size))


def in_place_relu_then_add_on_a_view(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    x[:, :2].relu_().add_(1)
    return net.bn2(x)


def in_place_after_a_view_was_taken(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    y = x[:, :2]
    x.relu_()
    return net.bn2(x) + y.sum(1, keepdim=True)


def input_of_a_convolution_changed_before_the_addition(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).tanh()
    y = net.bn(net.b(x))
    x.mul_(2)
    return F.relu(y + x)


def input_of_a_batch_norm_changed_before_the_relu(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).tanh()
    y = net.bn(x)
    x.mul_(2)
    return F.relu(y) + x


def input_of_a_convolution_changed_through_a_view(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    y = net.b(x)
    x[:, 0].zero_()
    return net.relu(net.bn2(y)) + x


def tuples(net: Net, x: Tensor) -> Tensor:
    low, high = net.bn(net.a(x)).chunk(2, 1)
    return net.relu(net.bn2(net.b(torch.cat([high, low], 1))))


def in_place_by_position(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    y = x.view(x.shape)
    F.leaky_relu(y, 0.1, True)
    return net.bn2(x)


def in_place_silu(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    y = F.silu(x, inplace=True)
    return net.relu(net.bn2(net.b(y)) + x)


WIRINGS = [
    residual,
    two_foldable_branches,
    batch_norm_plus_residual,
    in_place_changes_the_shortcut,
    in_place_result_unused,
    in_place_on_a_view,
    in_place_add_of_an_old_reader,
    conv_read_twice,
    batch_norm_read_twice,
    shared_layers,
    broadcast_residual,
    broadcast_to_a_larger_residual,
    broadcast_batch_norm,
    scalar_added,
    added_to_itself,
    added_with_a_factor,
    normalised_with_dropout,
    functional_batch_norm,
    keyword_inputs,
    functional_batch_norm_by_keywords,
    functional_batch_norm_without_relu,
    augmented_assignment_to_a_second_name,
    augmented_assignment_to_a_number,
    in_place_after_a_view_was_taken,
    tuples,
    in_place_by_position,
    in_place_silu,
]


@pytest.mark.parametrize("wiring", WIRINGS, ids=operator.attrgetter("__name__"))
def test_wirings(wiring: Callable[[Net, Tensor], Tensor]) -> None:
    assert_stands_for(Net(wiring), torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    "wiring",
    [
        augmented_assignment_to_a_view,
        augmented_assignment_of_a_convolution_to_a_view,
        in_place_relu_then_add_on_a_view,
        input_of_a_convolution_changed_before_the_addition,
        input_of_a_batch_norm_changed_before_the_relu,
        input_of_a_convolution_changed_through_a_view,
    ],
    ids=operator.attrgetter("__name__"),
)
def test_wirings_that_change_what_a_gradient_needs(wiring: Callable[[Net, Tensor], Tensor]) -> None:
    """With trained weights autograd refuses these, so the logits are all there is to compare."""
    net = settle(Net(wiring).double())
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_near(prepare_for_attack(net)(x), net(x), 1e-10)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding="same", dilation=2),
        nn.Conv2d(4, 6, (3, 2), padding="same"),
        nn.Conv2d(4, 6, 3, padding="valid", stride=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 8, 3, padding=(1, 0), stride=(1, 2), groups=4, bias=False),
        parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
        nn.ConvTranspose2d(4, 6, 3),
    ],
    ids=["same", "same-asymmetric", "valid", "reflect", "grouped", "weight-norm", "transposed"],
)
@pytest.mark.parametrize("relu", [False, True])
def test_convolutions(conv: nn.Module, relu: bool) -> None:
    conv = copy.deepcopy(conv)
    channels = conv.out_channels
    net = nn.Sequential(
        conv, nn.BatchNorm2d(channels), nn.ReLU() if relu else nn.Identity(), nn.Flatten(), nn.LazyLinear(3)
    )
    x = torch.rand(2, 4, 9, 9)
    net(x)
    assert_stands_for(net, x)


@pytest.mark.parametrize("output_size", [1, 2, 3, 6, 4, (None, 2), (3, 1)])
def test_adaptive_pooling(output_size) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(output_size),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    x = torch.rand(2, 3, 8, 8)
    net(x)
    assert_stands_for(net, x)


def test_adaptive_pooling_changed_in_place_leaves_its_input_alone() -> None:
    def wiring(net: Net, x: Tensor) -> Tensor:
        x = net.bn(net.a(x))
        y = net.pool(x)
        y.mul_(2)
        return x + y

    net = Net(wiring)
    net.pool = nn.AdaptiveAvgPool2d(8)
    assert_stands_for(net, torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    "reparametrise", [prune.identity, nn.utils.spectral_norm, parametrizations.spectral_norm]
)
def test_weights_that_are_computed_from_others(reparametrise: Callable[..., nn.Module]) -> None:
    """Also while the network is trained: reading a spectral norm then would change it."""
    torch.manual_seed(SEED)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).double()
    reparametrise(net[0], "weight")
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    net.train()(x)  # leaves a weight with a graph
    before = {name: value.clone() for name, value in net.state_dict().items()}
    prepared = prepare_for_attack(net)
    for _ in range(2):
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        got = out_and_gradient(prepared, x)
        for ours, want in zip(got, out_and_gradient(net.eval(), x), strict=True):
            assert_near(ours, want, 1e-10)
        net.train()
        with torch.no_grad():
            next(net[0].parameters()).mul_(1.1)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        prepared.refresh_()


def test_a_prepared_network_that_was_moved_still_follows() -> None:
    net = Net(lambda net, x: net.bn(x.tanh()))  # a BatchNorm that nothing takes, so its statistics are copied
    net.a = net.b = nn.Identity()
    net.bn, net.fc = nn.BatchNorm2d(3), nn.Linear(3, 5)
    prepared = prepare_for_attack(settle(net)).double()
    settle(net, SEED + 1)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    got = prepared.refresh_()(x.float())
    assert got.dtype == torch.float64
    assert_near(got, net.double()(x), 1e-6)


def test_a_prepared_network_is_not_saved() -> None:
    with pytest.raises(TypeError, match="follows one live network; save that one"):
        torch.save(prepare_for_attack(nn.Linear(2, 2)), io.BytesIO())


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 0.1}, {"track_running_stats": False}])
def test_batch_norms(options: dict) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    prepared = assert_stands_for(net, torch.rand(3, 3, 8, 8))
    assert (prepared.folded == []) == ("track_running_stats" in options)


def test_hooks_on_a_layer_keep_the_layer() -> None:
    net = Net(residual)
    net.bn.register_forward_hook(lambda module, args, out: out * 2)
    assert_stands_for(net, torch.rand(2, 3, 8, 8))


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.flatten(1)).tanh())

    prepared = assert_stands_for(Tied(), torch.rand(2, 3, 2, 2))
    assert prepared.network.a.weight is prepared.network.b.weight


# ---- what cannot be traced ---------------------------------------------------------------------------------------


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x if x.sum() > 0 else -x).mean((2, 3))


def test_an_untraceable_network_works_unfolded_and_says_so() -> None:
    with pytest.warns(UserWarning, match="the whole network, which torch.fx cannot trace"):
        prepared = assert_stands_for(DataDependent(), torch.rand(2, 3, 8, 8))
    assert not prepared.traced
    assert "the whole network" in repr(prepared)


def test_around_an_untraceable_submodule_the_rest_is_folded() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), DataDependent())
    with pytest.warns(UserWarning, match="left unfolded: 3, which torch.fx cannot trace"):
        prepared = assert_stands_for(net, torch.rand(2, 3, 8, 8))
    assert prepared.traced
    assert prepared.folded == ["1"]


def test_a_batch_norm_that_nothing_takes_is_a_scale_and_shift() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    prepared = assert_stands_for(net, torch.rand(2, 3, 8, 8))
    assert (prepared.fused, prepared.left) == (["0"], [])


def test_options_of_forward_keep_their_defaults() -> None:
    class WithOption(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(residual)

        def forward(self, x: Tensor, features: bool = False) -> Tensor:
            return x if features else self.net(x)

    prepared = assert_stands_for(WithOption(), torch.rand(2, 3, 8, 8))
    assert prepared.folded == ["net.bn"]


# ---- hooks, and forwards that are not their class's ---------------------------------------------------------------


def normalised(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return ((args[0] - 0.3) / 0.37,)


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "pre": lambda m: m.register_forward_pre_hook(normalised),
    "forward": lambda m: m.register_forward_hook(lambda module, args, out: out * 2 + 0.1),
    "with-kwargs": lambda m: m.register_forward_hook(
        lambda module, args, kwargs, out: out * len(args), with_kwargs=True, always_call=True
    ),
    "backward": lambda m: m.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 3,)),
    "backward-pre": lambda m: m.register_full_backward_pre_hook(lambda module, grad_out: (grad_out[0] * 3,)),
    "in-place-pre": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0].clone().mul_(2),)),
}


def block(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *layers)


HOOKED: dict[str, nn.Module | None] = {
    "root": None,
    "relu": nn.ReLU(),
    "relu-in-place": nn.ReLU(inplace=True),
    "identity": nn.Identity(),
    "dropout": nn.Dropout(),
    "pool": nn.AdaptiveAvgPool2d(2),
    "maxpool": nn.MaxPool2d(2),
    "container": nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "bn": nn.BatchNorm2d(4),
}


@pytest.mark.parametrize(
    ("where", "hook"),
    # Autograd refuses an in-place operation behind a backward hook.
    [(w, h) for w in HOOKED for h in HOOKS if w != "relu-in-place" or not h.startswith("backward")],
)
@pytest.mark.filterwarnings("ignore:.*left unfolded.*it has hooks")
def test_hooks_run(where: str, hook: str) -> None:
    torch.manual_seed(SEED)
    layer = copy.deepcopy(HOOKED[where])
    net = nn.Sequential(
        block(), layer or nn.ReLU(), nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.Linear(16, 3)
    )
    HOOKS[hook](net if layer is None else layer)
    prepared = assert_stands_for(net, torch.rand(2, 3, 8, 8))
    assert "0.1" in prepared.folded


def test_a_submodule_with_hooks_is_kept_whole_and_named() -> None:
    """Traced, a hook that records would record proxies, once."""
    net = nn.Sequential(block(nn.ReLU()), block(nn.ReLU()))
    net[1][0] = nn.Conv2d(4, 4, 3)
    seen = []
    net[0].register_forward_hook(lambda module, args, out: seen.append(out))
    with pytest.warns(UserWarning, match=r"left unfolded: 0, which torch.fx cannot trace \(it has hooks\)"):
        prepared = prepare_for_attack(settle(net))
    assert prepared.folded == ["1.1"]
    assert seen == []
    x = torch.rand(2, 3, 8, 8)
    prepared(x)
    prepared(x)
    assert len(seen) == 2


def test_a_hook_of_the_network_that_reads_its_buffers_follows_them() -> None:
    net = Net(residual).double()
    net.register_forward_pre_hook(lambda module, args: (args[0] - module.mean,))
    prepared = prepare_for_attack(settle(net), torch.float32)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        assert_near(prepared.refresh_()(x), net(x), 1e-5)
        net.mean.mul_(3)
    assert prepared.folded == ["bn"]


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.filterwarnings("ignore:.*left unfolded")
def test_hooks_of_a_graph_module(part: bool) -> None:
    """Its own deepcopy loses them."""
    net: nn.Module = torch.fx.symbolic_trace(block(nn.ReLU()).double())
    net.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] - 0.3,), kwargs), with_kwargs=True)
    model, x = settle(nn.Sequential(net, nn.Flatten()) if part else net), torch.rand(2, 3, 8, 8).double()
    got = out_and_gradient(prepare_for_attack(model), x)
    for ours, want in zip(got, out_and_gradient(model, x), strict=True):
        assert_near(ours, want, 1e-10)


def test_a_network_with_hooks_compiles_without_a_graph_break() -> None:
    net = block(nn.ReLU())
    net.register_forward_pre_hook(normalised)
    prepared = prepare_for_attack(settle(net))
    x = torch.rand(2, 3, 8, 8)
    assert_near(torch.compile(prepared, fullgraph=True, backend="eager")(x), net(x), 1e-5)


PREPARED_FIRST = """
import torch
from advfunmatch import create_model, prepare_for_attack

prepare_for_attack(create_model("small_cnn", num_classes=10, in_channels=1))
assert torch.compile(lambda x: x + len([1, 2]) * isinstance(x, list), fullgraph=True, backend="eager")(1.0) == 1.0
"""


def test_torch_compile_still_knows_the_builtins_where_preparing_was_the_first_to_import_it() -> None:
    done = subprocess.run([sys.executable, "-c", PREPARED_FIRST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_hooks_on_a_wrapper_are_an_error() -> None:
    wrapped = nn.DataParallel(nn.Linear(2, 2))
    wrapped.register_forward_pre_hook(normalised)
    with pytest.raises(ValueError, match=r"DataParallel with hooks.*register them on the Linear in it"):
        prepare_for_attack(wrapped)


@pytest.mark.parametrize("part", ["", "0", "1", "0.0", "0.1", "2"])
@pytest.mark.filterwarnings("ignore:.*left unfolded")
def test_a_forward_of_the_instances_own(part: str) -> None:
    """Also one that calls the live network's, which is in training mode."""
    net = nn.Sequential(block(), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    module = net.get_submodule(part)
    forward = module.forward
    module.forward = lambda x: forward(x * 2) + 0.2
    x = torch.rand(2, 3, 8, 8)
    net = settle(net.double()).train()
    prepared = prepare_for_attack(net)
    half_way = prepare_for_attack(net, torch.float32)
    before = copy.deepcopy(net.state_dict())
    got = out_and_gradient(prepared, x.double())
    in_float32 = half_way(x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for ours, want in zip(got, out_and_gradient(net.eval(), x.double()), strict=True):
        assert_near(ours, want, 1e-10)
    assert_near(in_float32, got[0], 1e-4)


class ShiftedReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.2)


class AlwaysDropout(nn.Dropout):
    """As for Monte-Carlo estimates: eval mode does not end it. Here of all or nothing, so that it can be compared."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.0, training=True) * 0.5


class ScaledConv(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class ScaledBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class DoublesItsCall(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class DataDependentTwice(nn.Module):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Pool(nn.AdaptiveAvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs() if x.sum() > 0 else x)


@pytest.mark.parametrize(
    "layer",
    [
        ShiftedReLU(),
        ShiftedReLU(inplace=True),
        AlwaysDropout(),
        ScaledConv(4, 4, 3),
        ScaledBatchNorm(4),
        DoublesItsCall(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        DataDependentTwice(),
        Pool(6),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.filterwarnings("ignore:.*left unfolded")
def test_subclasses_are_not_their_base(layer: nn.Module) -> None:
    torch.manual_seed(SEED)
    net = block(copy.deepcopy(layer), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.Linear(16, 3))
    assert_stands_for(net, torch.rand(2, 3, 8, 8))


def test_a_call_of_the_networks_own_runs() -> None:
    net = DoublesItsCall(*block(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)))
    assert assert_stands_for(net, torch.rand(2, 3, 8, 8)).folded == ["1"]


# ---- what a trace would lose or freeze ---------------------------------------------------------------------------


def partly_without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = x.sigmoid()
    return x * gate


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        product = x.float() @ torch.ones(6, 6)
    return x + product


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("function", [partly_without_gradient, under_autocast])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.filterwarnings("ignore:.*left unfolded")
def test_what_a_graph_cannot_hold(function: Callable[[Tensor], Tensor], whole: bool) -> None:
    """The logits would be right without either of these, and the gradients wrong."""
    if whole:
        net: nn.Module = Net(lambda net, x: function(net.a(x)[..., :6, :6]))
    else:
        net = block(Applied(function), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    model, x = settle(net.double()), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    prepared = prepare_for_attack(model)
    assert prepared.traced != whole
    for ours, want in zip(out_and_gradient(prepared, x), out_and_gradient(model, x), strict=True):
        assert_near(ours, want, 1e-10)


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(1), random.random, np.random.rand], ids=["torch", "python", "numpy"]
)
def test_a_network_that_draws_random_numbers_goes_on_drawing(draw: Callable[[], float]) -> None:
    net = block(Applied(lambda x: x * draw()), nn.ReLU())
    torch.manual_seed(SEED)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"2, which torch.fx cannot trace \(it draws random numbers\)"):
        prepared = prepare_for_attack(net.eval())
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.rand(2, 3, 8, 8)
    assert not torch.equal(prepared(x), prepared(x))


def test_what_is_computed_from_buffers_follows_them() -> None:
    net = Net(lambda net, x: net.a((x - net.mean.view(1, 3, 1, 1)) / (2 * net.scale)))
    net.register_buffer("scale", torch.tensor(0.7))
    prepared = prepare_for_attack(settle(net.double()))
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    net.mean.mul_(3)
    net.scale.mul_(3)
    assert_near(prepared.refresh_()(x), net(x), 1e-10)
    assert prepared.traced


def test_a_weight_shared_with_a_part_that_cannot_be_traced() -> None:
    class Shared(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, self.weight)
            return x if x.sum() > 0 else -x

    net = Net(lambda net, x: F.conv2d(net.part(net.a(x)), net.b.weight))
    net.part = Shared(net.b.weight)
    with pytest.warns(UserWarning, match="part, which torch.fx cannot trace"):
        assert_stands_for(net, torch.rand(2, 3, 8, 8))


# ---- the memory format of activations ----------------------------------------------------------------------------


class LeNet(nn.Module):
    """As the networks of TRADES and of most tutorials on MNIST end."""

    def __init__(self, flat: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3))
        self.fc = nn.Linear(32, 3)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flat(self.features(x)))


FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "sizes": lambda x: x.view(-1, 32),
    "size-of-x": lambda x: x.view(x.size(0), -1),
    "tuple": lambda x: x.view((x.shape[0], 32)),
    "keyword": lambda x: x.view(size=(-1, 32)),
    "view-as": lambda x: x.view_as(torch.empty(2, 32)),
    "permuted": lambda x: x.permute(0, 2, 3, 1).contiguous().view(-1, 32),
    "dtype": lambda x: (x + x.detach().view(x.dtype)).flatten(1),
    "halves": lambda x: torch.cat([h.view(x.size(0), -1) for h in x.chunk(2, 1)], 1),
    "strides": lambda x: x.as_strided((2, 32), (32, 1)),
    "untraceable": lambda x: x.view(-1, 32) if x.sum() > 0 else -x.view(-1, 32),
    "changed-in-place": lambda x: (x.view(-1, 32).mul_(2), x.flatten(1))[1],
    "reshape-changed-in-place": lambda x: (x.reshape(-1, 32).mul_(2), x.flatten(1))[1],
    "contiguous-changed-in-place": lambda x: (x.contiguous().mul_(2), x.flatten(1))[1],
}


@pytest.mark.parametrize("flat", FLAT)
@pytest.mark.filterwarnings("ignore:.*torch.fx cannot trace")
def test_views_of_activations(flat: str) -> None:
    assert_stands_for(LeNet(FLAT[flat]), torch.rand(2, 1, 10, 10))


@pytest.mark.filterwarnings("ignore:.*torch.fx cannot trace")
def test_views_in_a_part_or_hook_that_is_kept_whole() -> None:
    net = LeNet(torch.flatten)
    net.flat = Applied(FLAT["untraceable"])
    prepared = assert_stands_for(net, torch.rand(2, 1, 10, 10))
    assert prepared.memory_format == torch.contiguous_format
    net = LeNet(lambda x: x.flatten(1))
    net.features[3].register_forward_hook(lambda module, args, out: out.view(-1, 32).view_as(out) * 2)
    assert_stands_for(net, torch.rand(2, 1, 10, 10))


def test_the_usual_in_place_activations_keep_channels_last() -> None:
    for name in ("mobilenet_v2", "efficientnet_b0", "resnet18", "densenet121"):
        assert prepare_for_attack(torchvision_model(name)).memory_format == torch.channels_last


def test_an_error_in_a_prepared_network_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError):
        prepare_for_attack(LeNet(lambda x: x.view(-1, 31)))(torch.rand(2, 1, 10, 10))
    assert capfd.readouterr() == ("", "")


# ---- what it must not touch, and what it accepts -----------------------------------------------------------------


def test_the_live_network_is_not_touched() -> None:
    net = settle(Net(residual)).train()
    net.bn2.eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    prepared = prepare_for_attack(net)
    prepared(torch.rand(2, 3, 8, 8))
    prepared.refresh_()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    memory = {t.data_ptr() for t in net.state_dict().values()}
    assert not memory & {t.data_ptr() for t in prepared.state_dict().values()}


def test_a_prepared_network_stays_in_eval_mode_and_has_nothing_to_train() -> None:
    prepared = prepare_for_attack(settle(Net(normalised_with_dropout)))
    holder = nn.ModuleList([prepared]).train()
    assert holder.training
    assert not any(m.training for m in prepared.modules())
    assert not any(p.requires_grad for p in prepared.parameters())
    assert not any(m is prepared._live[0] for m in prepared.modules())


def test_refresh_keeps_the_memory_a_captured_graph_reads() -> None:
    net = settle(torchvision_model("resnet18"))
    prepared = prepare_for_attack(net)
    before = {name: value.data_ptr() for name, value in prepared.state_dict().items()}
    settle(net, SEED + 1)
    prepared.refresh_()
    assert before == {name: value.data_ptr() for name, value in prepared.state_dict().items()}


@pytest.mark.skipif("cpp" not in ops.TABLE["conv3x3_forward", "cpu"], reason="the CPU module is not built")
def test_wide_3x3_convolutions_are_winograds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradient in float32, with and without a residual; on few tiles and other backends they are not."""
    calls = []
    kernel = ops.kernel
    monkeypatch.setattr(ops, "kernel", lambda op, *args: (calls.append(op), kernel(op, *args))[1])
    torch.manual_seed(SEED)
    prepared = prepare_for_attack(settle(torchvision.models.resnet18(num_classes=10)))
    x = torch.rand(2, 3, 64, 64)
    out_and_gradient(prepared, x)
    # 4 at 16x16 and 3 at 8x8; the 3 at 4x4 and those below have two tiles.
    winograds = [op for op in calls if op.startswith("conv3x3")]
    assert winograds == ["conv3x3_forward"] * 7 + ["conv3x3_input_grad"] * 7
    winograd = out_and_gradient(prepared, x)[0]
    calls.clear()
    with use_backend("reference"):
        assert_near(prepared(x), winograd, 1e-5)
    prepared(x[:1, :, :16, :16])
    prepare_for_attack(prepared._live[0], torch.float64)(x)
    assert not [op for op in calls if op.startswith("conv3x3")]


def _steps(**options: bool) -> Callable[[nn.Module, Tensor], None]:
    def step(net: nn.Module, x: Tensor) -> None:
        net.eval()(x).square().sum().backward()
        torch.optim.SGD(net.parameters(), lr=1.0, **options).step()

    return step


CHANGES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "foreach": _steps(foreach=True),
    "fused": _steps(fused=True),
    "one by one": _steps(foreach=False),
    "load_state_dict": lambda net, x: net.load_state_dict(settle(copy.deepcopy(net), SEED + 1).state_dict()),
    "batch statistics": lambda net, x: net.train()(x),
    "a buffer": lambda net, x: net.bn.running_mean.add_(1),
    "a new parameter": lambda net, x: setattr(net.fc, "weight", nn.Parameter(-net.fc.weight.detach())),
    "data replaced": lambda net, x: setattr(net.b.weight, "data", -net.b.weight.data),
    "dtype": lambda net, x: net.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forgotten_refresh_is_made_up_for(change: str) -> None:
    net, x = settle(Net(residual)), torch.rand(2, 3, 8, 8)
    prepared = prepare_for_attack(net)
    before = prepared(x)
    CHANGES[change](net, x)
    live = net.eval()(x.to(net.fc.weight.dtype))
    assert change == "dtype" or not torch.allclose(before, live, atol=1e-3)
    assert_near(prepared(x), live.float(), 1e-5)


def test_nothing_is_read_again_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = settle(Net(residual)).train(), torch.rand(2, 3, 8, 8)
    prepared = prepare_for_attack(net)
    monkeypatch.setattr(prepared, "refresh_", pytest.fail)
    out_and_gradient(prepared, x)
    net.eval()(x)
    net.fc.weight.data.mul_(2)  # leaves no trace: this is what refresh_ is for
    prepared(x)
    monkeypatch.undo()
    assert_near(prepared.refresh_()(x), net(x), 1e-5)


def test_refresh_follows_replaced_parameters() -> None:
    net = settle(Net(residual))
    prepared = prepare_for_attack(net)
    net.b.weight = nn.Parameter(torch.randn_like(net.b.weight))
    net.fc.weight = nn.Parameter(torch.randn_like(net.fc.weight))
    x = torch.rand(2, 3, 8, 8)
    assert_near(prepared.refresh_()(x), net(x), 1e-5)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = settle(Net(residual))
    x = torch.rand(2, 3, 8, 8)
    prepared = prepare_for_attack(wrap(net))
    assert prepared.folded == ["bn"]
    assert_near(prepared(x), net(x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wiring", [residual, batch_norm_plus_residual, normalised_with_dropout])
def test_half_precision_weights(wiring, dtype) -> None:
    net = settle(Net(wiring))
    x = torch.rand(2, 3, 8, 8)
    prepared = prepare_for_attack(net, dtype=dtype)
    out, gradient = out_and_gradient(prepared, x)
    assert out.dtype == dtype
    assert gradient.dtype == x.dtype
    assert_near(out, net(x), 16 * torch.finfo(dtype).eps)


def test_under_autocast_the_prepared_precision_holds() -> None:
    net = settle(Net(residual))
    x = torch.rand(2, 3, 8, 8)
    prepared = prepare_for_attack(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert prepared(x).dtype == torch.float32


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(memory_format: torch.memory_format) -> None:
    net = settle(torchvision_model("resnet18"))
    prepared = prepare_for_attack(net, memory_format=memory_format)
    x = torch.rand(2, 3, 32, 32)
    assert_near(prepared(x), net(x), 1e-4)
    weights = [m.weight for m in prepared.modules() if hasattr(m, "weight") and m.weight.dim() == 4]
    assert weights
    assert all(w.is_contiguous(memory_format=memory_format) for w in weights)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "resnet18"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating-point dtype"),
        ({"dtype": "bf16"}, TypeError, "dtype must be a floating-point dtype such as .*; got 'bf16'"),
        (
            {"memory_format": torch.preserve_format},
            ValueError,
            "memory_format must be torch.channels_last or",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        prepare_for_attack(**{"model": nn.Identity(), **arguments})


def test_preparing_a_traceable_network_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_for_attack(torchvision_model("mobilenet_v2"))
