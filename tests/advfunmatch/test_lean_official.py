"""What the forwards of official repositories do beside calling layers: folded all the same.

Small networks, each with the constructs of one repository's, written anew: AdaAD and PeerAiD make modules in forward,
google-deepmind's ask where the images are, keep statistics that are no buffers, apply a torch.autograd.Function and pad
by hand, others compute with sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from advfunmatch.lean import PreparedModel, prepare_for_attack
from stands_for import SEED, assert_near, assert_stands_for, out_and_gradient, settle
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.act(out)


class Net(nn.Module):
    """A stem, a block and a linear layer, around what is tried: ``before`` on the images, ``after`` on the features."""

    def __init__(
        self,
        before: Callable[[Net, Tensor], Tensor] = lambda net, x: x,
        after: Callable[[Net, Tensor], Tensor] = lambda net, x: x.mean((2, 3)),
        act: Callable[[Tensor], Tensor] = F.relu,
        features: int = 8,
    ) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(act))
        self.linear = nn.Linear(features, 5)
        self.before, self.after, self.act = before, after, act
        self.mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
        self.std = torch.tensor([0.2471, 0.2435, 0.2616]).view(3, 1, 1)
        self.mean_cuda = self.std_cuda = None
        self.features = features
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(self.before(self, x))))
        return self.linear(self.after(self, self.layer1(out)))


# ---- on the features


def module_made_in_forward(net: Net, x: Tensor) -> Tensor:
    x = nn.AdaptiveAvgPool2d((1, 1))(nn.ReLU()(x))
    return x.view(x.size(0), -1)


def modules_in_a_sequential_made_in_forward(net: Net, x: Tensor) -> Tensor:
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten())(x)[:, : net.features]


def pooled_by_a_function(net: Net, x: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)


def pooled_by_keywords(net: Net, x: Tensor) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(input=x, output_size=1).squeeze(-1).squeeze(-1)


def pooled_by_its_own_size(net: Net, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, x.size()[2:]).view(-1, net.features)


def pooled_by_its_last_size(net: Net, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, x.shape[-1]).reshape(x.shape[0], x.size(1))


def summed_over_its_sizes(net: Net, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, channels, height * width).sum(2) / (height * width)


def asked_for_its_dimensions(net: Net, x: Tensor) -> Tensor:
    if isinstance(x, (list, tuple)):
        x = x[-1]
    if not torch.is_tensor(x):
        raise TypeError
    return (
        x.mean((2, 3))
        if isinstance(x, torch.Tensor | None) and not isinstance(x.shape, torch.Tensor)
        else x[0]
    )


def zeros_of_its_size(net: Net, x: Tensor) -> Tensor:
    more = torch.zeros(x.size(0), 8, x.size(2), x.size(3), device=x.device, dtype=x.dtype)
    return torch.cat([x, more + 1], 1).mean((2, 3))


def viewed_by_its_length(net: Net, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).view(len(x), -1)


def pooled_by_numbers(net: Net, x: Tensor) -> Tensor:
    x = F.avg_pool2d(x, int(x.size(2) / 2)) * float(x.shape[3]) ** 0.5
    return F.avg_pool2d(x, min(x.size(2), x.size(3))).flatten(1)


def sizes_in_a_call(net: Net, x: Tensor) -> Tensor:
    def mean(batch: int, channels: int, height: int, width: int) -> Tensor:
        return x.reshape(batch, channels, height * width).mean(-1)

    return mean(*x.shape) + x.view(*x.size()[:2], -1).mean(dim=-1)


def channel_by_channel(net: Net, x: Tensor) -> Tensor:
    if x.dim() != 4 or len(x.shape) != 4 or x.size(1) > 8:
        return x
    return torch.stack([x[:, channel].mean((1, 2)) for channel in range(x.shape[1])], 1)


def as_a_gradient_is_wanted(net: Net, x: Tensor) -> Tensor:
    return x.mean((2, 3)) if x.requires_grad else x.amax((2, 3))


def as_gradients_are_enabled(net: Net, x: Tensor) -> Tensor:
    return x.mean((2, 3)) if torch.is_grad_enabled() else x.amax((2, 3))


def as_it_is_large(net: Net, x: Tensor) -> Tensor:
    if x.shape[-1] > 6 and x.size(0) > 1:
        x = F.avg_pool2d(x, 2)
    while x.size(2) > 4:
        x = x[:, :, 1:, 1:]
    return x.sum((2, 3))


# ---- on the images


def statistics_where_the_images_are(net: Net, x: Tensor) -> Tensor:
    if x.is_cuda:
        if net.mean_cuda is None:
            net.mean_cuda, net.std_cuda = net.mean.cuda(), net.std.cuda()
        return (x - net.mean_cuda) / net.std_cuda
    return (x - net.mean) / net.std


def statistics_moved_when_needed(net: Net, x: Tensor) -> Tensor:
    if net.mean.device != x.device:
        net.mean, net.std = net.mean.to(x.device), net.std.to(x.device)
    return x.sub(net.mean).div(net.std)


def statistics_like_the_images(net: Net, x: Tensor) -> Tensor:
    return (x - net.mean.to(x)) / net.std.type_as(x)


def statistics_moved_for_good(net: Net, x: Tensor) -> Tensor:
    net.mean = net.mean.to(x.device)
    return x - net.mean


def statistics_made_in_forward(net: Net, x: Tensor) -> Tensor:
    mean = torch.tensor([0.5, 0.4, 0.3], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    std = x.new_tensor([0.2, 0.3, 0.2]).view(1, 3, 1, 1)
    return (x - mean) / std


def statistics_in_a_buffer(net: Net, x: Tensor) -> Tensor:
    return (x - net.mu.to(x.device)) / 0.25


def channels_one_by_one(net: Net, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = (x[:, 0] - 0.5) / 0.25
    x[:, 1:] -= 0.4
    return x


def dimensions_asked(net: Net, x: Tensor) -> Tensor:
    if x.dim() == 3:
        x = x.unsqueeze(0)
    if len(x.shape) != 4 or x.ndim != 4 or not x.is_floating_point():
        raise ValueError("images are wanted")
    return x * 2 - 1


def each_image_standardised(net: Net, x: Tensor) -> Tensor:
    mean, std = x.mean(dim=(1, 2, 3), keepdim=True), x.std(dim=(1, 2, 3), keepdim=True)
    least = torch.ones_like(std) / (x.shape[1] * x.shape[2] * x.shape[3]) ** 0.5
    return (x - mean) / torch.max(std, least)


AFTER = {
    module_made_in_forward: 8,
    modules_in_a_sequential_made_in_forward: 8,
    pooled_by_a_function: 8,
    pooled_by_keywords: 8,
    pooled_by_its_own_size: 8,
    pooled_by_its_last_size: 8,
    summed_over_its_sizes: 8,
    asked_for_its_dimensions: 8,
    zeros_of_its_size: 16,
    viewed_by_its_length: 8,
    pooled_by_numbers: 8,
    sizes_in_a_call: 8,
    channel_by_channel: 8,
}
BEFORE = [
    statistics_where_the_images_are,
    statistics_moved_when_needed,
    statistics_like_the_images,
    statistics_moved_for_good,
    statistics_made_in_forward,
    statistics_in_a_buffer,
    channels_one_by_one,
    dimensions_asked,
    each_image_standardised,
]


def name_of(function: Callable[..., object]) -> str:
    return function.__name__


def assert_folded(network: nn.Module, x: Tensor, folded: list[str]) -> PreparedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = assert_stands_for(network, x)
    assert (sorted(prepared.folded), prepared.left) == (folded, [])
    return prepared


@pytest.mark.parametrize("after", AFTER, ids=name_of)
def test_what_is_done_to_features(after: Callable[[Net, Tensor], Tensor]) -> None:
    network = Net(after=after, features=AFTER[after])
    assert_folded(network, torch.rand(2, 3, 8, 8), ["bn1", "layer1.0.bn1", "layer1.0.bn2"])


@pytest.mark.parametrize("before", BEFORE, ids=name_of)
def test_what_is_done_to_images(before: Callable[[Net, Tensor], Tensor]) -> None:
    network = Net(before)
    assert_folded(network, torch.rand(2, 3, 8, 8), ["bn1", "layer1.0.bn1", "layer1.0.bn2"])
    assert network.mean_cuda is None


def test_a_normalisation_in_front_that_keeps_no_buffers() -> None:
    class Normalization(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.sigma = (torch.rand(1, 3, 1, 1) + 0.1 for _ in range(2))
            self.mean_cuda, self.sigma_cuda = None, None

        def forward(self, x: Tensor) -> Tensor:
            if x.is_cuda:
                if self.mean_cuda is None:
                    self.mean_cuda, self.sigma_cuda = self.mean.cuda(), self.sigma.cuda()
                return (x - self.mean_cuda) / self.sigma_cuda
            return (x - self.mean) / self.sigma

    network = nn.Sequential(Normalization(), Net())
    assert_folded(network, torch.rand(2, 3, 8, 8), ["1.bn1", "1.layer1.0.bn1", "1.layer1.0.bn2"])


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * (gate * (1 + x * (1 - gate)))


_swish = _Swish.apply


def from_a_closure() -> Callable[[Tensor], Tensor]:
    swish = _Swish.apply
    return lambda x: swish(x)


def from_a_table() -> Callable[[Tensor], Tensor]:
    table = {"relu": torch.Tensor.relu, "swish": _Swish.apply}
    return lambda x: table["swish"](x)


@pytest.mark.parametrize(
    "act",
    [
        _Swish.apply,
        lambda x: _swish(x),
        from_a_closure(),
        from_a_table(),
        torch.Tensor.relu_,
        partial(F.relu, inplace=True),
    ],
    ids=["attribute", "global", "closure", "table", "method", "partial"],
)
def test_functions_that_are_kept_under_a_name(act: Callable[[Tensor], Tensor]) -> None:
    assert_folded(Net(act=act), torch.rand(2, 3, 8, 8), ["bn1", "layer1.0.bn1", "layer1.0.bn2"])


class Hypersphere(nn.Module):
    """The head writes its normalised weight back at every call, as the official ones do."""

    def __init__(self, write: Callable[[nn.Linear], None]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.linear, self.write = nn.Linear(8, 5, bias=False), write

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.body(x).mean((2, 3)), p=2, dim=1) * 15
        for _, module in self.linear.named_modules():
            if isinstance(module, nn.Linear):
                self.write(module)
        return self.linear(x)


def projects(module: nn.Linear) -> None:
    module.weight.data = F.normalize(module.weight, p=2, dim=1)


def decays(module: nn.Linear) -> None:
    module.weight.data = module.weight.data * 0.9


def test_the_body_of_a_hypersphere_is_folded() -> None:
    """A write that changes nothing the second time is computed; another is served whole."""
    prepared = assert_folded(Hypersphere(projects), torch.rand(2, 3, 8, 8), ["body.1"])
    assert prepared.memory_format == torch.channels_last
    network = settle(Hypersphere(decays))
    with pytest.warns(UserWarning, match=r"it writes to linear\.weight"):
        prepared = prepare_for_attack(network)
    x = torch.rand(2, 3, 8, 8)
    assert_near(prepared(x) * 0.9, prepared(x), 1e-5)


@pytest.mark.parametrize("act", [F.silu, F.softplus, _Swish.apply])
def test_a_batch_norm_before_another_activation_is_a_scale_and_shift(act: Callable[[Tensor], Tensor]) -> None:
    network = Net(after=lambda net, x: act(net.pre(x + 1)).mean((2, 3)))
    network.pre = nn.BatchNorm2d(8)
    prepared = assert_folded(network, torch.rand(2, 3, 8, 8), ["bn1", "layer1.0.bn1", "layer1.0.bn2"])
    assert prepared.fused == ["pre"]


class _HalvesInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x.mul_(0.5)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def test_a_function_of_its_own_runs_forward_and_backward() -> None:
    """One that only computes leaves the network in channels-last; one that may change its input does not."""
    network = Net(act=lambda x: _Swish.apply(x))
    prepared = assert_folded(network, torch.rand(2, 3, 8, 8), ["bn1", "layer1.0.bn1", "layer1.0.bn2"])
    assert prepared.memory_format == torch.channels_last
    network = Net(act=lambda x: _HalvesInPlace.apply(x + 1))
    prepared = assert_folded(network, torch.rand(2, 3, 8, 8), ["bn1", "layer1.0.bn1", "layer1.0.bn2"])
    assert prepared.memory_format == torch.contiguous_format


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("relu", [False, True])
def test_zeros_padded_by_hand_are_the_convolutions_own(stride: int, relu: bool) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3, stride), nn.BatchNorm2d(8)
            self.again, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
            self.zeros = nn.ZeroPad2d((1, 1, 0, 0))

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn(self.conv(F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))))
            out = F.relu(out) if relu else out
            out = self.again(self.zeros(out))
            return self.fc(F.pad(out, [2, 2, 1, 1]).mean((2, 3)))

    prepared = assert_folded(Padded(), torch.rand(2, 3, 8, 8), ["bn"])
    pads = [n for n in prepared.network.graph.nodes if n.target is F.pad or "zeros" in str(n.target)]
    assert len(pads) == (1 if stride == 1 else 2)  # what no convolution reads, and what is not even


# pytest rewrites the assert statements of its own files.
ASSERTING = """
def asserts_a_size(x):
    assert x.size(1) == 3, f"three channels, not {x.size(1)}"
    return x
"""


def checks_sizes(net: Net, x: Tensor) -> Tensor:
    namespace: dict = {}
    exec(ASSERTING, namespace)
    x = namespace["asserts_a_size"](x)
    if x.shape[-1] % 4 != 0:
        raise ValueError("sizes must be multiples of four")
    if not x.shape[-2] >= 8:
        raise ValueError("eight rows at least")
    return x


def test_checks_of_sizes_are_kept() -> None:
    prepared = assert_folded(
        Net(checks_sizes), torch.rand(2, 3, 8, 8), ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    )
    for refused in (torch.rand(2, 3, 8, 10), torch.rand(2, 3, 4, 8)):
        with pytest.raises(AssertionError, match="checks the sizes of its tensors"):
            prepared(refused.double())


@pytest.mark.parametrize(
    "after", [as_a_gradient_is_wanted, as_gradients_are_enabled, as_it_is_large], ids=name_of
)
def test_each_side_of_a_branch_is_folded_for_the_images_that_take_it(
    after: Callable[[Net, Tensor], Tensor],
) -> None:
    network = settle(Net(after=after).double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare_for_attack(network)
        for seed in range(2):
            for count, size in ((2, 8), (2, 5), (1, 8), (2, 8), (1, 5)):
                x = torch.rand(count, 3, size, size, dtype=torch.float64)
                with torch.set_grad_enabled(size == 5):
                    assert_near(prepared(x), network.requires_grad_(False)(x), 1e-10)
                for got, want in zip(
                    out_and_gradient(prepared, x), out_and_gradient(network, x), strict=True
                ):
                    assert_near(got, want, 1e-10)
            settle(network, SEED + 1 + seed)
            prepared.refresh_()
    assert 1 < len(prepared._ways) <= 5
    assert all(
        sorted(way.folded) == ["bn1", "layer1.0.bn1", "layer1.0.bn2"] for way in prepared._ways.values()
    )


def test_what_was_taken_for_granted_is_asserted() -> None:
    prepared = prepare_for_attack(settle(Net(dimensions_asked)))
    with pytest.raises(ValueError, match=r"x must be images \(N, C, H, W\).* got \(3, 8, 8\)"):
        prepared(torch.rand(3, 8, 8))
    prepared = prepare_for_attack(settle(Net(statistics_where_the_images_are)))
    with pytest.raises(ValueError, match=r"x is on meta, but the network was on cpu when it was prepared"):
        prepared(torch.rand(1, 3, 8, 8, device="meta"))


def test_cplusplus_is_not_handed_a_proxy_for_a_tensor() -> None:
    """It would read its memory as a tensor's; the network is called as it is."""
    network, x = settle(Net(lambda net, x: torch.autograd.Variable(x) * 2)), torch.rand(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="the whole network, which torch.fx cannot trace"):
        prepared = prepare_for_attack(network)
    assert_near(prepared(x), network(x), 1e-5)


def test_statistics_that_are_gathered_are_still_gathered() -> None:
    """A list that grows is an effect: the activation is called as it is, around it all is folded."""

    class Gathering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gathered: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            self.gathered.append(x.abs().mean().item())
            return F.relu(x)

    network = settle(Net().double())
    network.layer1[0].act = Gathering()
    with pytest.warns(UserWarning, match=r"layer1.0.act, which torch.fx cannot trace"):
        prepared = prepare_for_attack(network)
    assert set(prepared.folded) == {"bn1", "layer1.0.bn1", "layer1.0.bn2"}
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for got, want in zip(out_and_gradient(prepared, x), out_and_gradient(network, x), strict=True):
        assert_near(got, want, 1e-10)
    (gathering,) = (m for m in prepared.modules() if isinstance(m, Gathering))
    assert len(gathering.gathered) == len(network.layer1[0].act.gathered) == 2


@pytest.mark.parametrize("written_down", ["torch.export", "torch.jit.trace"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_what_is_written_down_for_others_holds_pytorchs_operators_alone(written_down: str) -> None:
    """ONNX exporters start from either; a scale_shift_relu, a Winograd convolution or oneDNN's would stop them."""

    def pre_activation(net: Net, x: Tensor) -> Tensor:
        return F.relu(net.pre(x.tanh()) + x).mean((2, 3))

    network = Net(after=pre_activation)
    network.pre = nn.BatchNorm2d(8)
    prepared = prepare_for_attack(settle(network))
    assert prepared.fused == ["pre"]
    x = torch.rand(2, 3, 32, 32)
    if written_down == "torch.export":
        program = torch.export.export(prepared, (x,))
        calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert {call.namespace for call in calls} == {"aten"}
        again = program.module()
    else:
        again = torch.jit.trace(prepared, x)
        kinds = {node.kind().partition("::")[0] for node in again.inlined_graph.nodes()}
        assert kinds <= {"aten", "prim"}
    assert_near(again(x), prepared(x), 1e-5)


def test_transforms_that_let_a_proxy_through_are_not_lost() -> None:
    """torchvision's v2 transforms return what is no tensor unchanged: traced through, a normalisation would be lost."""
    from torchvision.transforms import v2

    normalise = v2.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.2))

    def elsewhere(net: Net, x: Tensor) -> Tensor:
        return normalise(x)

    for net, said in (
        (nn.Sequential(v2.Compose([normalise]), Net()), None),
        (Net(before=elsewhere), "no submodule of it"),
    ):
        network, x = settle(net).double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepared = prepare_for_attack(network)
        assert [said in str(warning.message) for warning in caught] == [True] * (said is not None)
        for ours, theirs in zip(out_and_gradient(prepared, x), out_and_gradient(network, x), strict=True):
            assert_near(ours, theirs, 1e-10)
