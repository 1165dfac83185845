"""The backward of prepared networks: the live network's gradient by the images, and where autograd takes its place."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from advfunmatch import PGDAttack, create_model
from advfunmatch.lean import prepare_for_attack, vjp
from torch import Tensor, nn

# One of each kind in models/.
NETWORKS = (
    ("small_cnn", 1, 8),
    ("small_cnn-trades", 1, 28),
    ("resnet18", 3, 16),
    ("resnet50", 3, 16),
    ("wrn-16-2", 3, 16),
    ("preactresnet18", 3, 16),
    ("mobilenetv2", 3, 32),
)


def made(
    name: str, channels: int, size: int, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor, Tensor]:
    """A network whose statistics are its data's, images, and a gradient by the logits."""
    torch.manual_seed(0)
    live = create_model(name, num_classes=7, in_channels=channels)
    with torch.no_grad():
        live(torch.rand(8, channels, size, size))
    live = live.eval().to(dtype)
    return live, torch.rand(3, channels, size, size, dtype=dtype), torch.randn(3, 7, dtype=dtype)


def by_autograd(network: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_(True)
    (grad_x,) = torch.autograd.grad(network(leaf), leaf, grad)
    return grad_x


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n[0])
@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "first"]
)
def test_it_is_the_live_networks_gradient(network, memory_format):
    live, x, grad = made(*network)
    prepared = prepare_for_attack(live, memory_format=memory_format)
    assert prepared.backward == "its own"
    logits, pullback = vjp(prepared, x)
    want = by_autograd(live, x, grad)
    torch.testing.assert_close(logits, live(x).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pullback(grad), want, rtol=1e-10, atol=1e-10 * float(want.abs().max()))
    # float32: a ReLU within rounding of zero may flip, in PyTorch's own too, and a few do in the deeper ones.
    single = prepare_for_attack(live.float(), memory_format=memory_format)
    got = vjp(single, x.float())[1](grad.float())
    assert got.dtype == torch.float32
    assert float((got.double() - want).norm() / want.norm()) < 0.1
    torch.testing.assert_close(got, by_autograd(single, x.float(), grad.float()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_and_gradients_of_other_dtypes(dtype):
    live, x, grad = made("wrn-16-2", 3, 16, torch.float32)
    prepared = prepare_for_attack(live, dtype)
    logits, pullback = vjp(prepared, x.double())
    assert logits.dtype == dtype
    got = pullback(grad.double())
    assert got.dtype == torch.float64
    want = by_autograd(live, x, grad).double()
    assert float((got - want).norm() / want.norm()) < (1e-2 if dtype == torch.float32 else 0.2)


def test_pullbacks_are_independent_and_fresh():
    """Several on one forward, two networks by turns, an older forward's after a newer one's."""
    first, x, grad = made("small_cnn", 1, 8, torch.float32)
    second = made("wrn-16-2", 1, 8, torch.float32)[0]
    networks = [prepare_for_attack(each) for each in (first, second)]
    pairs = [(each, images) for images in (x, x.flip(0)) for each in networks]
    want = [by_autograd(each, images, grad) for each, images in pairs]
    passes = [vjp(*pair) for pair in pairs]
    results = [pullback(grad) for _, pullback in passes]
    for result, expected in zip(results, want, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    again = [pullback(2 * grad) for _, pullback in passes]
    for result, (logits, pullback) in zip(results, passes, strict=True):
        result.zero_(), logits.zero_()
        torch.testing.assert_close(pullback(2 * grad), again.pop(0), rtol=0, atol=0)


def test_two_threads_share_a_network():
    live, _x, _grad = made("small_cnn", 1, 8, torch.float32)
    prepared = prepare_for_attack(live)
    images = [torch.rand(40, 1, 8, 8) for _ in range(2)]
    grads = [torch.randn(40, 7) for _ in range(2)]
    want = [vjp(prepared, images[i])[1](grads[i]) for i in range(2)]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(50):
            if not torch.equal(vjp(prepared, images[i])[1](grads[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_updates_are_followed_and_old_logits_refused():
    live, x, grad = made("small_cnn", 1, 8)
    prepared = prepare_for_attack(live)
    _, before = vjp(prepared, x)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.mul_(1.5)
    _, after = vjp(prepared, x)
    torch.testing.assert_close(after(grad), by_autograd(live, x, grad), rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="weights have changed"):
        before(grad)
    single = prepare_for_attack(live.float())
    leaf = x.float().requires_grad_(True)
    logits = single(leaf)
    single.refresh_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logits, leaf, grad.float())


class Block(nn.Module):
    """Readers of one value in every order, broadcast and repeated ones, and sizes in the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        a = F.relu(self.norm(h) + h)
        b = self.second(a) + a.mean((2, 3), keepdim=True)
        c = F.silu(self.third(a)) + h + b
        pooled = torch.cat([F.avg_pool2d(F.relu(c), c.size(2)), F.max_pool2d(c, c.size(2))], 1)
        return self.head(pooled.view(x.size(0), -1)) + 0.5


def test_values_with_several_readers():
    torch.manual_seed(1)
    live = Block().double().eval()
    prepared = prepare_for_attack(live)
    assert prepared.backward == "its own"
    x, grad = torch.rand(5, 3, 8, 8, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(vjp(prepared, x)[1](grad), by_autograd(live, x, grad), rtol=1e-10, atol=1e-10)
    single = prepare_for_attack(live.float())
    want = by_autograd(live.double(), x, grad)
    live.float()
    got = vjp(single, x.float())[1](grad.float())
    assert float((got.double() - want).norm() / want.norm()) < 1e-2


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        if x.size(2) > 8:
            x = F.avg_pool2d(x, 2)
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


def test_every_way_through_branches_has_its_own():
    torch.manual_seed(0)
    live = Branching().double().eval()
    prepared = prepare_for_attack(live)
    for size in (8, 16, 8):
        x, grad = torch.rand(2, 3, size, size, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
        want = by_autograd(live, x, grad)
        torch.testing.assert_close(vjp(prepared, x)[1](grad), want, rtol=1e-10, atol=1e-10)


class Attention(Branching):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(F.scaled_dot_product_attention(h, h, h).mean(1))


class InPlace(Branching):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x) + 1
        h[:, :2] = 0
        return self.head(F.relu(h).mean((2, 3)))


@pytest.mark.parametrize("kind", [Attention, InPlace, "hooks", "linear"])
def test_what_it_cannot_serve_is_autograds_and_says_so(kind):
    torch.manual_seed(0)
    if kind == "linear":
        live = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    elif kind == "hooks":
        live = Branching()
        live.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        live = kind()
    live = live.double().eval()
    prepared = prepare_for_attack(live)
    assert prepared.program is None
    assert prepared.backward.startswith("autograd's: ")
    assert prepared.backward in repr(prepared)
    x, grad = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    torch.testing.assert_close(vjp(prepared, x)[1](grad), by_autograd(live, x, grad), rtol=1e-10, atol=1e-10)


def test_a_hook_put_on_a_layer_afterwards_is_called():
    live, x, grad = made("small_cnn", 1, 8, torch.float32)
    prepared = prepare_for_attack(live)
    layer = next(iter(prepared.network.children()))
    seen = []
    handle = layer.register_forward_hook(lambda *args: seen.append(1))
    vjp(prepared, x)[1](grad)
    assert seen == [1]
    handle.remove()
    vjp(prepared, x)[1](grad)
    assert seen == [1]


def test_pgd_uses_it(monkeypatch):
    live, x, _ = made("small_cnn", 1, 8, torch.float32)
    prepared = prepare_for_attack(live)
    labels = torch.tensor([0, 1, 2])
    calls = []
    backward = type(prepared.program).backward
    monkeypatch.setattr(
        type(prepared.program), "backward", lambda self, *args: (calls.append(1), backward(self, *args))[1]
    )
    options = {"eps": 0.1, "step_size": 0.05, "steps": 3, "init": "zero"}
    got = PGDAttack("cross_entropy", **options)(prepared, None, x, labels)
    assert len(calls) == 3
    monkeypatch.undo()
    want = PGDAttack("cross_entropy", **options)(live, None, x, labels)
    # A step is a sign: a gradient within rounding of zero may go the other way.
    assert float((got != want).float().mean()) < 0.05
