"""Square Attack: the published trajectories, images of any shape, and what may not change a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from advfunmatch.attacks.draws import Draws, image_keys
from advfunmatch.attacks.searched import Searched
from advfunmatch.attacks.square import Square, square_side
from torch import Tensor, nn

RECORDED = dict(np.load(Path(__file__).parent / "recorded" / "square.npz"))
EPS = {"linf": 0.05, "l2": 0.3}


def recorded(name: str) -> Tensor:
    return torch.from_numpy(RECORDED[name])


class Small(nn.Module):
    """The recorded network, or one of its kind; remembers what it was asked."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().flatten(1).clone())
        return torch.tanh(x.flatten(1) @ self.first) @ self.second


def small(classes: int, shape: tuple[int, ...] = (3, 6, 6), images: int = 24) -> tuple[Small, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    sizes = (int(np.prod(shape)), 16), (16, classes)
    network = Small(*(0.4 * torch.randn(*size, generator=generator) for size in sizes))
    x = torch.rand(images, *shape, generator=generator)
    return network, x, network(x).argmax(1)


class Given(Draws):
    """The recorded random numbers."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.images = torch.arange(len(recorded(f"{run}.colours")))

    def rows(self, index: Tensor) -> Given:
        chosen = Given(self.run)
        chosen.images = self.images[index]
        return chosen

    def uniform(self, stream: int, draw: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if draw == 0:
            return recorded(f"{self.run}.turns").expand(len(self.images), -1)
        return self._queries(recorded(f"{self.run}.places")[None], draw, shape).expand(
            len(self.images), *shape
        )

    def signs(self, stream: int, draw: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if draw < 2:
            return recorded(f"{self.run}.stripes")[self.images]
        return self._queries(recorded(f"{self.run}.colours")[self.images], draw, shape)

    @staticmethod
    def _queries(numbers: Tensor, draw: int, shape: tuple[int, ...]) -> Tensor:
        part = numbers[:, (draw // 2 - 1) * shape[0] :][:, : shape[0]]
        return torch.cat([part, torch.ones(len(part), shape[0] - part.shape[1], shape[1])], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_asks_for_the_published_points(norm: str) -> None:
    x, y = recorded("x"), recorded("y")
    network = Small(recorded("first"), recorded("second"))
    attack = Square(norm, EPS[norm], queries=recorded(f"{norm}.places").shape[0])
    x_adv = attack(Searched(network), x, y, Given(norm))
    asked = torch.cat(network.asked) @ recorded("weights")
    torch.testing.assert_close(asked, recorded(f"{norm}.points"), rtol=0, atol=1e-9)
    best = recorded(f"{norm}.best")
    broken = network(best).argmax(1) != y
    assert 0 < int(broken.sum()) < len(x)
    want = torch.where(broken.view(-1, 1, 1, 1), best, x)
    torch.testing.assert_close(x_adv, want, rtol=0, atol=1e-9)


def test_the_squares_of_other_images() -> None:
    assert [round(square_side(each, 8, 8)) for each in (0, 10, 11, 51, 501)] == [7, 7, 5, 4, 2]
    assert square_side(60, 32, 32, queries=1000) == square_side(600, 32, 32)


@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 14, 9), (2, 1, 1), (3, 8, 8)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_on_images_of_any_shape(norm: str, shape: tuple[int, ...]) -> None:
    network, x, y = small(2, shape, 12)
    x_adv = Square(norm, 0.3, queries=60)(Searched(network), x, y, Draws(0, image_keys(x)))
    delta = (x_adv - x).flatten(1)
    lengths = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert float(lengths.max()) <= 0.3 * (1 + 1e-6)
    assert torch.equal((delta != 0).any(1), network(x_adv).argmax(1) != y)


def test_square_goes_on_where_two_classes_are_level_and_the_label_is_named_first() -> None:
    class Level(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            low = (x.flatten(1).mean(1) - 0.5).clamp(min=0)
            return torch.stack([low, torch.zeros_like(low)], 1)

    x = torch.full((2, 1, 4, 4), 0.51)
    x_adv = Square("linf", 0.2, queries=20)(
        Searched(Level()), x, torch.zeros(2, dtype=torch.int64), Draws(0, image_keys(x))
    )
    assert torch.equal(x_adv, x)


@pytest.mark.parametrize(
    "attack",
    [
        Square("linf", 0.06, queries=60),
        Square("l2", 0.4, queries=120, restarts=2),
    ],
    ids=lambda attack: attack.norm,
)
def test_an_image_is_attacked_alike_whatever_is_with_it(attack: Any) -> None:
    network, x, y = small(5)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))

    def run(rows: Tensor) -> Tensor:
        return attack(Searched(network), x[rows], y[rows], Draws(3, image_keys(x[rows])))

    whole = run(torch.arange(len(x)))
    broken = (whole != x).flatten(1).any(1)
    assert 0 < int(broken.sum()) < len(x)
    torch.testing.assert_close(
        torch.cat([run(rows) for rows in order.split(7)]), whole[order], rtol=0, atol=2e-6
    )


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="eps"):
        Square("linf", 0.0)
    with pytest.raises(ValueError, match="norm"):
        Square("l1", 0.1)
    with pytest.raises(ValueError, match="restarts"):
        Square("linf", 0.1, restarts=0)
    network, x, y = small(3)
    with pytest.raises(TypeError, match="y must be"):
        Square("linf", 0.1)(Searched(network), x, y.float(), Draws(0, image_keys(x)))
