"""Auto-PGD: the published trajectories, units of the logits, few classes, and what may not change a result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from advfunmatch.attacks.apgd import APGD, checkpoints
from advfunmatch.attacks.draws import Draws, image_keys
from advfunmatch.attacks.logit_losses import LOGIT_LOSSES
from advfunmatch.attacks.searched import Searched
from torch import Tensor, nn

RECORDED = dict(np.load(Path(__file__).parent / "recorded" / "apgd.npz"))
EPS = {"linf": 0.1, "l2": 0.25}


class Given(Draws):
    """A recorded start."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def rows(self, index: Tensor) -> Given:
        return Given(self.noise[index])

    def uniform(self, *args: object) -> Tensor:
        return self.noise

    normal = uniform


class Small(nn.Module):
    """The recorded network, or one of its kind; remembers what it was asked."""

    def __init__(self, first: Tensor, second: Tensor, unit: float = 1.0) -> None:
        super().__init__()
        self.first, self.second, self.unit = first, second, unit
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.unit * (torch.tanh(x.flatten(1) @ self.first) @ self.second)


def small(classes: int = 10, images: int = 40, unit: float = 1.0) -> tuple[Small, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    first, second = (0.9 * torch.randn(*s, generator=generator) for s in ((12, 16), (16, classes)))
    network, x = Small(first, second, unit), torch.rand(images, 3, 2, 2, generator=generator)
    return network, x, network(x).argmax(1)


def run(network: nn.Module, x: Tensor, y: Tensor, *args: object, **options: object) -> tuple[Tensor, Tensor]:
    x_adv = APGD(*args, **options)(Searched(network), x, y, Draws(0, image_keys(x)))
    return x_adv, network(x_adv).argmax(1) != y


def recorded(name: str) -> Tensor:
    return torch.from_numpy(RECORDED[name])


@pytest.mark.parametrize("name", sorted(key[:-7] for key in RECORDED if key.endswith(".points")))
def test_every_point_is_the_published_one(name: str) -> None:
    norm = name.removesuffix("_short").rsplit("_", 1)[1]
    loss = name[: name.index(f"_{norm}")]
    x, y, points = recorded("x"), recorded("y"), recorded(f"{name}.points")
    network = Small(recorded("first"), recorded("second"))
    attack = APGD(norm, EPS[norm], loss, steps=len(points) - 1)
    aims = recorded(f"{name}.targets") if loss == "dlr_targeted" else None
    start = attack._start(x, Given(recorded(f"{name}.noise")), 0, 0)
    x_hit, hit = attack._run(Searched(network), start, x, y, aims)
    found = torch.stack([asked.flatten(1) @ recorded("weights") for asked in network.asked])
    torch.testing.assert_close(found, points, rtol=0, atol=1e-9)
    assert torch.equal(hit, recorded(f"{name}.hit"))
    torch.testing.assert_close(x_hit, recorded(f"{name}.x_hit"), rtol=0, atol=1e-9)


def test_checkpoints_of_other_numbers_of_steps() -> None:
    assert checkpoints(10) == {2: 2, **dict.fromkeys(range(3, 11), 1)}
    assert list(checkpoints(50)) == [11, 21, 30, 38, 45]
    assert checkpoints(1) == {1: 1}


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("norm", EPS)
def test_the_unit_of_the_logits_does_not_matter(norm: str, loss: str) -> None:
    """In float32 the cross-entropy of the large ones is 0, and so is its gradient."""
    broken = []
    for unit in (1.0, 1e3, 1e6):
        network, x, y = small(unit=unit)
        broken.append(int(run(network, x, y, norm, EPS[norm], loss, steps=30, targets=3)[1].sum()))
    assert 5 < broken[0] < 35
    assert max(broken) - min(broken) <= 1


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(classes: int, loss: str) -> None:
    """About as strong as plain gradient ascent on the margin, which needs no third class."""
    network, x, y = small(classes, images=100)
    x_adv, broken = run(network, x, y, "linf", 0.15, loss, steps=30)
    assert float((x_adv - x).abs().max()) <= 0.15 + 1e-6
    assert broken.sum() >= by_margin(network, x, y, 0.15).sum() - 4 > 3


def by_margin(network: Small, x: Tensor, y: Tensor, eps: float) -> Tensor:
    point, broken = x.clone(), torch.zeros(len(x), dtype=torch.bool)
    for _ in range(30):
        leaf = point.requires_grad_(True)
        z = network(leaf)
        others = z.scatter(1, y[:, None], -torch.inf).amax(1)
        broken |= z.argmax(1) != y
        (grad,) = torch.autograd.grad((others - z.gather(1, y[:, None]).squeeze(1)).sum(), leaf)
        point = (point.detach() + eps / 8 * grad.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return broken


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_directions_are_the_gradients_of_the_losses(classes: int, loss: str) -> None:
    z = torch.randn(20, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    z.requires_grad_(True)
    y = torch.arange(20) % classes
    at = LOGIT_LOSSES[loss][0](z, y, (y + 1) % classes)
    published = nn.functional.softplus(at.value) if loss == "ce" else at.value
    (grad,) = torch.autograd.grad(published.sum(), z)
    torch.testing.assert_close(at.direction * at.log_scale.exp()[:, None], grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", EPS)
def test_a_stop_at_the_first_hit_breaks_the_same_images_for_less(norm: str) -> None:
    network, x, y = small()
    _, to_the_end = run(network, x, y, norm, EPS[norm], steps=50)
    asked = sum(map(len, network.asked))
    network.asked.clear()
    x_adv, stopped = run(network, x, y, norm, EPS[norm], steps=50, stop_at_hit=True)
    assert torch.equal(stopped, to_the_end)
    assert sum(map(len, network.asked)) < 0.8 * asked
    for image in range(5):  # whoever else is in the batch and leaves it
        one = slice(image, image + 1)
        alone, _ = run(network, x[one], y[one], norm, EPS[norm], steps=50, stop_at_hit=True)
        torch.testing.assert_close(alone, x_adv[one], rtol=0, atol=1e-6)


def test_several_gradients_are_averaged_with_their_weights() -> None:
    """Of a network that answers in turn as two would, one far more certain than the other."""
    network, x, y = small(images=6)
    turns = [1.0, 4.0]

    class Turns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            turns.append(turns.pop(0))
            return network(x) * turns[-1]

    grad, _, _ = APGD(eot=2)._evaluate(Searched(Turns()), x, y, None)
    leaf = x.clone().requires_grad_(True)
    loss = sum(nn.functional.cross_entropy(network(leaf) * unit, y, reduction="sum") for unit in turns)
    (expected,) = torch.autograd.grad(loss, leaf)
    cosine = nn.functional.cosine_similarity(grad.flatten(1), expected.flatten(1))
    assert float(cosine.min()) > 1 - 1e-5


def test_restarts_and_targets_take_the_images_that_are_left() -> None:
    network, x, y = small()
    searched, done = Searched(network), []
    attack = APGD("linf", EPS["linf"], "dlr_targeted", steps=12, restarts=2, targets=20)
    x_adv = attack(searched, x, y, Draws(0, image_keys(x)), done.append)
    broken = network(x_adv).argmax(1) != y
    assert sum(done) == len(x)
    assert len(done) == 9 * 2 + 1
    assert done[-1] == int((~broken).sum())
    assert torch.equal(x_adv[~broken], x[~broken])
    assert searched.forwards < len(x) * (1 + 13 * 18)


def test_bad_arguments_are_named() -> None:
    network, x, y = small(images=2)
    for options, message in (
        ({"norm": "l1"}, "norm must be"),
        ({"eps": 0.0}, "eps must be"),
        ({"loss": "margin"}, "loss must be"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"eot": True}, "eot must be an integer"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            APGD(**options)
    for labels, message in ((y[:1], "one label for each of 2 images"), (y.float(), "integer labels")):
        with pytest.raises((ValueError, TypeError), match=message):
            APGD()(Searched(network), x, labels, Draws(0, image_keys(x)))
