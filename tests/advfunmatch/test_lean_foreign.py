"""Networks that cannot be folded, or that do more than compute: served as they are, or refused in a sentence."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from advfunmatch import PGDAttack
from advfunmatch.data import load_dataset
from advfunmatch.evaluation import evaluate
from advfunmatch.lean import prepare_for_attack
from stands_for import SEED, assert_near, out_and_gradient, settle
from torch import Tensor, nn


def small() -> nn.Sequential:
    torch.manual_seed(SEED)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    return settle(network)  # type: ignore[return-value]


def traced() -> nn.Module:
    return torch.jit.trace(small(), torch.rand(2, 1, 8, 8))


def scripted() -> nn.Module:
    return torch.jit.script(small().train())


def frozen() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(small()))


def exported() -> nn.Module:
    dynamic = ({0: torch.export.Dim("n")},)
    return torch.export.export(small(), (torch.rand(2, 1, 8, 8),), dynamic_shapes=dynamic).module()


class WithLock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = small()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.network(x)


def uncopyable() -> nn.Module:
    return WithLock().train()


def partly_scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(small()), nn.Linear(10, 10))


def partly_exported() -> nn.Module:
    return nn.Sequential(exported(), nn.Linear(10, 10))


WHOLE = [traced, scripted, frozen, exported, uncopyable, partly_scripted, partly_exported]


@pytest.mark.parametrize("make", WHOLE, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_networks_of_other_makes_are_served_whole(make: Callable[[], nn.Module]) -> None:
    live = make()
    modes = [getattr(module, "training", None) for module in live.modules()]
    needs_gradient = [parameter.requires_grad for parameter in live.parameters()]
    data = load_dataset("digits", split="test", limit=10)
    x, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
    with pytest.warns(
        UserWarning, match=r"left unfolded: (the whole network|0), which (torch.fx cannot|cannot be)"
    ):
        prepared = prepare_for_attack(live)
    assert prepared.folded == []
    expected = small() if not make.__name__.startswith("partly") else nn.Sequential(small(), live[1])
    for got, want in zip(out_and_gradient(prepared, x), out_and_gradient(expected, x), strict=True):
        assert_near(got, want, 1e-5)
    attacked = [
        PGDAttack("margin", eps=0.1, step_size=0.03, steps=2, seed=0)(each, None, x, labels)
        for each in (prepared, live, expected)
    ]
    assert_near(attacked[0], attacked[2], 1e-5)
    assert_near(attacked[1], attacked[2], 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (evaluate(each, data, ["clean", "fgsm"], eps=0.1) for each in (live, expected))
    assert ours.accuracies == theirs.accuracies
    assert [getattr(module, "training", None) for module in live.modules()] == modes
    assert [parameter.requires_grad for parameter in live.parameters()] == needs_gradient
    if make is not frozen:
        with torch.no_grad():
            next(live.parameters()).mul_(1.5)
            next(expected.parameters()).mul_(1.5)
        assert_near(prepared.refresh_()(x), expected(x), 1e-5)


@pytest.mark.filterwarnings("ignore:.*left unfolded", "ignore:.*torch.jit")
def test_the_dtype_of_what_cannot_be_converted_is_its_own() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float64, but model is TorchScript that was frozen"):
        prepare_for_attack(frozen(), torch.float64)
    with pytest.raises(
        ValueError, match=r"dtype is torch.float64, but model is a WithLock, which cannot be copied"
    ):
        prepare_for_attack(uncopyable(), torch.float64)
    x = torch.rand(2, 1, 8, 8)
    for make in (scripted, exported):
        assert_near(prepare_for_attack(make(), torch.float64)(x), small().double()(x.double()), 1e-6)


def test_a_prepared_network_is_returned_as_it_is() -> None:
    prepared = prepare_for_attack(small())
    assert prepare_for_attack(prepared) is prepared
    data = load_dataset("digits", split="test", limit=10)
    assert (
        evaluate(prepared, data, ["fgsm"], eps=0.1).accuracies
        == evaluate(small(), data, ["fgsm"], eps=0.1).accuracies
    )


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapper_inside_of_a_network_is_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    network = nn.Sequential(wrap(small()[:3]), *small()[3:])
    prepared = prepare_for_attack(network)
    assert (len(prepared.folded), prepared.left) == (1, [])
    x = torch.rand(2, 1, 8, 8)
    assert_near(prepared(x), small()(x), 1e-5)
    settle(network, SEED + 1)
    assert_near(prepared.refresh_()(x), settle(small(), SEED + 1)(x), 1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization")
def test_a_quantised_layer_is_called_as_it_is() -> None:
    network = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear})
    prepared = prepare_for_attack(network)
    x = torch.rand(2, 1, 8, 8)
    assert len(prepared.folded) == 1
    assert_near(prepared(x), network(x), 1e-2)


def test_parameters_that_are_not_there_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"parameters without a shape yet \(0.weight\): pass images through it once"
    ):
        prepare_for_attack(nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.Linear(4, 2)))


def test_parameters_spread_over_processes_are_named() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        with pytest.raises(ValueError, match=r"spread over processes \(0.weight is a DTensor\)"):
            prepare_for_attack(fully_shard(small(), mesh=mesh))
    finally:
        dist.destroy_process_group()


# ---- forwards that do more than compute: Note [Side effects] ------------------------------------------------------


class Part(nn.Module):
    """A part of a network whose forward has an effect: ``effect(part, x)`` gives the features."""

    def __init__(self, effect: Callable[[Part, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.tensor([0.5, 1.5, 2.0]).view(3, 1, 1))
        self.register_buffer("shift", torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
        self.std = torch.tensor([0.2, 0.3, 0.2], dtype=torch.float64).view(3, 1, 1)
        self.calls, self.seen, self.by_name, self.last = 0, [], {}, None
        self.effect = effect

    def forward(self, x: Tensor) -> Tensor:
        return self.effect(self, self.bn(self.conv(x)))


def assigns_data_of_a_layer(part: Part, x: Tensor) -> Tensor:
    part.conv.weight.data = part.conv.weight.data * 0.9
    return part.bn(part.conv(x))


def copies_into_data(part: Part, x: Tensor) -> Tensor:
    part.scale.data.copy_(F.normalize(part.scale, dim=0))
    return x * part.scale


def writes_a_slice_of_data(part: Part, x: Tensor) -> Tensor:
    part.scale.data[0] = part.scale.data[1] * 0.9
    return x * part.scale


def multiplies_a_name_of_data(part: Part, x: Tensor) -> Tensor:
    weight = part.scale.data
    weight *= 0.9
    return x * part.scale


def adds_to_a_view_of_detached(part: Part, x: Tensor) -> Tensor:
    part.scale.detach().view(-1)[1:].add_(0.1)
    return x * part.scale


def copies_without_gradient(part: Part, x: Tensor) -> Tensor:
    with torch.no_grad():
        part.scale.copy_(part.scale / part.scale.norm())
    return x * part.scale


def multiplies_without_gradient(part: Part, x: Tensor) -> Tensor:
    with torch.no_grad():
        part.scale.mul_(0.9)
    return x * part.scale


def clamps_all_parameters(part: Part, x: Tensor) -> Tensor:
    for parameter in part.parameters():
        parameter.data.clamp_(-0.2, 0.2)
    return part.conv(x) * part.scale


def updates_a_buffer(part: Part, x: Tensor) -> Tensor:
    part.shift.add_(0.1)
    return x + part.shift


def replaces_a_buffer(part: Part, x: Tensor) -> Tensor:
    part.shift = part.shift * 1.1
    return x + part.shift


def writes_with_out(part: Part, x: Tensor) -> Tensor:
    torch.mul(part.shift, 1.1, out=part.shift)
    return x + part.shift


def updates_a_tensor_that_is_no_buffer(part: Part, x: Tensor) -> Tensor:
    part.std.mul_(1.1)
    return x / part.std


def replaces_a_tensor_that_is_no_buffer(part: Part, x: Tensor) -> Tensor:
    part.std = part.std * 1.1
    return x / part.std


def counts(part: Part, x: Tensor) -> Tensor:
    part.calls += 1
    return x * part.calls


def differs_at_the_first_call(part: Part, x: Tensor) -> Tensor:
    if part.last is None:
        part.last = "called"
        return x * 2
    return x


def keeps_an_activation(part: Part, x: Tensor) -> Tensor:
    previous = x if part.last is None else part.last
    part.last = x.detach()
    return x + previous * 2


def appends_an_activation(part: Part, x: Tensor) -> Tensor:
    part.seen.append(x.detach())
    return x + len(part.seen) * part.seen[0]


def stores_under_a_name(part: Part, x: Tensor) -> Tensor:
    part.by_name["sizes"] = [*part.by_name.get("sizes", []), 1]
    return x * len(part.by_name["sizes"])


def changes_a_mode(part: Part, x: Tensor) -> Tensor:
    part.bn.train()
    return part.bn(part.conv(x))


def changes_a_layers_option(part: Part, x: Tensor) -> Tensor:
    part.bn.eps = 0.5
    return part.bn(x)


EFFECTS = [
    assigns_data_of_a_layer,
    copies_into_data,
    writes_a_slice_of_data,
    multiplies_a_name_of_data,
    adds_to_a_view_of_detached,
    copies_without_gradient,
    multiplies_without_gradient,
    clamps_all_parameters,
    updates_a_buffer,
    replaces_a_buffer,
    writes_with_out,
    updates_a_tensor_that_is_no_buffer,
    replaces_a_tensor_that_is_no_buffer,
    counts,
    differs_at_the_first_call,
    keeps_an_activation,
    appends_an_activation,
    stores_under_a_name,
    changes_a_mode,
    changes_a_layers_option,
]


def around(part: Part) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), part, nn.Flatten(), nn.Linear(192, 4)
    )


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.__name__)
def test_a_part_with_an_effect_is_served_whole(effect: Callable[[Part, Tensor], Tensor]) -> None:
    """At each of several calls it answers as the live network would, which itself is left alone."""
    torch.manual_seed(SEED)
    live = settle(around(Part(effect)).double())
    before = copy.deepcopy(live)
    with pytest.warns(UserWarning, match=r"left unfolded: 3, which torch.fx cannot trace \(it "):
        prepared = prepare_for_attack(live)
    assert prepared.folded == ["1"]
    assert not prepared.capturable
    reference = copy.deepcopy(live).requires_grad_(False)
    for _ in range(3):
        x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
        for got, want in zip(out_and_gradient(prepared, x), out_and_gradient(reference, x), strict=True):
            assert_near(got, want, 1e-10)
    for ours, theirs in zip(live.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert {k: v for k, v in vars(live[3]).items() if k in ("calls", "last", "seen", "by_name")} == {
        "calls": 0,
        "last": None,
        "seen": [],
        "by_name": {},
    }


class WritesToASibling(nn.Module):
    """Its head writes to the convolution that the body holds: neither can be folded without the other."""

    def __init__(self, without_gradient: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = Head(self.body[0], without_gradient)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Head(nn.Module):
    def __init__(self, conv: nn.Conv2d, without_gradient: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.theirs = (conv,)
        self.without_gradient = without_gradient

    def forward(self, x: Tensor) -> Tensor:
        if self.without_gradient:
            with torch.no_grad():
                self.theirs[0].weight.copy_(self.theirs[0].weight * 0.9)
        else:
            self.theirs[0].weight.data *= 0.9
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("without_gradient", [False, True])
def test_a_write_to_another_part_keeps_both_whole(without_gradient: bool) -> None:
    live = settle(WritesToASibling(without_gradient).double())
    with pytest.warns(UserWarning, match=r"the whole network, .*it writes to body.0.weight"):
        prepared = prepare_for_attack(live)
    reference = copy.deepcopy(live).requires_grad_(False)
    for _ in range(3):
        x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
        assert_near(prepared(x), reference(x), 1e-10)


GATHERED: list[Tensor] = []
CALLS = 0


def counted_in_this_file(part: Part, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return x * 2


@pytest.mark.parametrize("where", ["list", "closure", "number"])
def test_what_a_forward_leaves_outside_of_the_network_is_left_there(where: str) -> None:
    in_closure: list[Tensor] = []
    effects = {
        "list": lambda part, x: (GATHERED.append(x.detach()), x)[1],
        "closure": lambda part, x: (in_closure.append(x.detach()), x)[1],
        "number": counted_in_this_file,
    }
    live = settle(around(Part(effects[where])))
    before = CALLS
    GATHERED.clear()
    with pytest.warns(UserWarning, match="the whole network, .* which is outside of the network"):
        prepared = prepare_for_attack(live)
    assert (CALLS, GATHERED, in_closure) == (before, [], [])
    x = torch.rand(2, 3, 8, 8)
    assert_near(prepared(x), live(x), 1e-6)
    assert (CALLS - before, len(GATHERED), len(in_closure)).count(2) == 1  # one of either


def test_statistics_moved_once_are_a_cache_and_folded() -> None:
    """The first call sets what the second finds."""

    def normalised(part: Part, x: Tensor) -> Tensor:
        if part.last is None:
            part.last = part.std.to(x.device).float().to(torch.float64)
            part.by_name["mean"] = torch.full((3, 1, 1), 0.4, dtype=torch.float64)
        return (x - part.by_name["mean"]) / part.last

    torch.manual_seed(SEED)
    live = settle(around(Part(normalised)).double())
    prepared = prepare_for_attack(live)
    assert (prepared.folded, prepared.left) == (["1", "3.bn"], [])
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert live[3].last is None
    for got, want in zip(out_and_gradient(prepared, x), out_and_gradient(live, x), strict=True):
        assert_near(got, want, 1e-10)
    assert_near(prepared.refresh_()(x), live(x), 1e-10)
