"""Prepared networks against the eval-mode networks they stand for: outputs, input gradients, and after an update."""

from __future__ import annotations

import copy
import io
import operator
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from advfunmatch.lean import PreparedModel, prepare_for_attack
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from afm_kernels import ops, use_backend

SEED = 0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settle(model: nn.Module, seed: int = SEED) -> nn.Module:
    """BatchNorms as training leaves them: a fresh one is nearly the identity, and folding it wrong would not show."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def out_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = model(leaf)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    return out.detach(), gradient


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= tolerance, f"relative error {error:.3g}, allowed {tolerance}"


def assert_stands_for(model: nn.Module, x: Tensor) -> PreparedModel:
    """1e-10 in float64 in outputs and gradients, 1e-4 in float32 in outputs; before and after an update."""
    model = settle(model.double())
    x = x.double()
    prepared = prepare_for_attack(model)
    half_way = prepare_for_attack(copy.deepcopy(model).float())
    wants = [out_and_gradient(model, x)]
    for got, want in zip(out_and_gradient(prepared, x), wants[0], strict=True):
        assert_near(got, want, 1e-10)
    assert_near(half_way(x.float()), wants[0][0], 1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05).add_(1e-3)
    settle(model, SEED + 1)
    half_way._live[0].load_state_dict(model.state_dict())
    wants.append(out_and_gradient(model, x))
    assert not torch.allclose(wants[0][0], wants[1][0], rtol=1e-3)  # the update is one that shows
    for got, want in zip(out_and_gradient(prepared.refresh_(), x), wants[1], strict=True):
        assert_near(got, want, 1e-10)
    assert_near(half_way.refresh_()(x.float()), wants[1][0], 1e-4)
    return prepared


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
def test_a_timm_network_with_untraceable_convolutions_keeps_those() -> None:
    """Its padding depends on the image's size by an if; it also scales in place, with the result's name unused."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(SEED)
    with pytest.warns(UserWarning, match=r"left unfolded: stem\.conv1"):
        prepared = assert_stands_for(
            timm.create_model("dm_nfnet_f0", num_classes=10), torch.rand(2, 3, 32, 32)
        )
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
]


@pytest.mark.parametrize("wiring", WIRINGS, ids=operator.attrgetter("__name__"))
def test_wirings(wiring: Callable[[Net, Tensor], Tensor]) -> None:
    assert_stands_for(Net(wiring), torch.rand(2, 3, 8, 8))


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


def test_a_batch_norm_that_nothing_takes_is_named() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    prepared = assert_stands_for(net, torch.rand(2, 3, 8, 8))
    assert prepared.left == ["BatchNorm 0, which no convolution or ReLU could take"]


def test_options_of_forward_keep_their_defaults() -> None:
    class WithOption(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(residual)

        def forward(self, x: Tensor, features: bool = False) -> Tensor:
            return x if features else self.net(x)

    prepared = assert_stands_for(WithOption(), torch.rand(2, 3, 8, 8))
    assert prepared.folded == ["net.bn"]


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
    assert calls == ["conv3x3_forward"] * 7 + ["conv3x3_input_grad"] * 7
    winograd = out_and_gradient(prepared, x)[0]
    calls.clear()
    with use_backend("reference"):
        assert_near(prepared(x), winograd, 1e-5)
    prepared(x[:1, :, :16, :16])
    prepare_for_attack(prepared._live[0], torch.float64)(x)
    assert not [op for op in calls if op.startswith("conv3x3")]


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
