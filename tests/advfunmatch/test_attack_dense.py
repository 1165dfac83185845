"""Attacks on networks that answer with more than a matrix of logits: objects that hold them, and a row a pixel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from advfunmatch import PGDAttack
from advfunmatch.attacks import input_gradient
from advfunmatch.lean import PreparedModel, prepare_for_attack
from torch import Tensor, nn


class Wrapped(nn.Module):
    """A network that returns an object, as those of Hugging Face do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.network(x), loss=None)


def dense(seed: int, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 5, 3, padding=1)).double()
    with torch.no_grad():
        net[2].weight.mul_(scale)
    return net


def kl_of(student: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    """KL(T ‖ S) of each image, summed over its pixels, by its definition."""
    log_p, log_q = teacher(x).log_softmax(1), student(x).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum((1, 2, 3))


@pytest.mark.parametrize("scale", [1.0, 200.0])  # ordinary rows, and such as are nearly certain
@pytest.mark.parametrize("objective", ["mismatch", "cross_entropy"])
def test_a_dense_gradient_is_the_sum_over_the_pixels(objective: str, scale: float) -> None:
    student, teacher = dense(0, scale), dense(1, scale)
    x = torch.rand(3, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (3, 6, 4)).to(torch.int16)
    labels[0, :3] = -100
    if objective == "mismatch":
        truth = kl_of(student, teacher, x).sum()
        found = input_gradient(student, teacher, x.detach())
    else:
        truth = F.cross_entropy(student(x), labels.long(), reduction="sum")
        found = input_gradient(Wrapped(student), None, x.detach(), "cross_entropy", labels)
    (wanted,) = torch.autograd.grad(truth, x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize("prepared", [(True, True), (True, False), (False, True)])
def test_dense_networks_with_a_backward_of_their_own_have_the_same_gradient(
    prepared: tuple[bool, bool],
) -> None:
    """Both sides' parts add up, whichever of them comes from a graph and whichever from a pullback."""
    pair = dense(0), dense(1)
    for net in pair:
        net[1] = nn.ReLU()
    x = torch.rand(3, 3, 6, 4, dtype=torch.float64)
    want = input_gradient(*pair, x)
    lean = [prepare_for_attack(net) if lean else net for net, lean in zip(pair, prepared, strict=True)]
    assert all(net.backward == "its own" for net in lean if isinstance(net, PreparedModel))
    torch.testing.assert_close(input_gradient(*lean, x), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_a_dense_attack_raises_the_divergence_of_every_image(bn: str) -> None:
    student, teacher = dense(0, 20.0), dense(1, 20.0)
    student.insert(1, nn.BatchNorm2d(8).double())
    x = torch.rand(4, 3, 6, 4, dtype=torch.float64)
    attack = PGDAttack(eps=0.1, step_size=0.02, steps=10, restarts=2, seed=0, bn=bn)
    x_adv = attack(Wrapped(student), Wrapped(teacher), x)
    student.eval()
    assert bool(((x_adv - x).abs() <= 0.1 + 1e-9).all())
    if bn == "eval":
        assert bool((kl_of(student, teacher, x_adv) > 1.2 * kl_of(student, teacher, x)).all())
    assert attack.zero_gradients == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_width(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    attacks = [PGDAttack("cross_entropy", eps=0.1, step_size=0.04, steps=3, seed=0) for _ in range(2)]
    assert torch.equal(attacks[0](net, None, x, labels), attacks[1](net, None, x, labels.to(dtype)))


def test_what_does_not_go_with_dense_logits_is_said() -> None:
    net, x = dense(0), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="one for each row of logits, 16 for each image, got 2 for 2 images"):
        PGDAttack("cross_entropy", eps=0.1)(net, None, x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"early_stop=True goes with .*not with dense"):
        PGDAttack("cross_entropy", eps=0.1, early_stop=True)(
            net, None, x, torch.zeros(2, 4, 4, dtype=torch.int64)
        )
    with pytest.raises(ValueError, match=r"labels must be integers .*got torch.bool"):
        PGDAttack("cross_entropy", eps=0.1)(net, None, x, torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="or an object with such logits, got dict"):
        PGDAttack("margin", eps=0.1)(Answers({}), None, x, torch.tensor([0, 1]))


class Answers(nn.Module):
    """The same answer whatever it is asked."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer
