"""FAB: the published trajectories, the way to a plane, few classes, and what may not change a result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from advfunmatch.attacks.draws import Draws, image_keys
from advfunmatch.attacks.fab import FAB, _Walk
from advfunmatch.attacks.searched import Searched
from torch import Tensor, nn

RECORDED = dict(np.load(Path(__file__).parent / "recorded" / "fab.npz"))
EPS = {"linf": 0.1, "l2": 0.25}


class Given(Draws):
    """Recorded noise."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def uniform(self, *args: object) -> Tensor:
        return self.noise

    normal = uniform


class Small(nn.Module):
    """The recorded network, or one of its kind."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.first) @ self.second


def small(
    classes: int = 10, images: int = 40, dtype: torch.dtype = torch.float64
) -> tuple[Small, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    first, second = (0.9 * torch.randn(*s, generator=generator) for s in ((12, 16), (16, classes)))
    network = Small(first.to(dtype), second.to(dtype))
    x = torch.rand(images, 3, 2, 2, generator=generator).to(dtype)
    return network, x, network(x).argmax(1)


def attacked(network: nn.Module, x: Tensor, y: Tensor, *args: object, **options: object) -> Tensor:
    return FAB(*args, **options)(Searched(network), x, y, Draws(0, image_keys(x)))


def recorded(name: str) -> Tensor:
    return torch.from_numpy(RECORDED[name])


@pytest.mark.parametrize("name", sorted(key[:-7] for key in RECORDED if key.endswith(".points")))
def test_every_point_is_the_published_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, norm = name.split("_")
    x, y, expected = recorded("x"), recorded("y"), recorded(f"{name}.points")
    points: list[Tensor] = []
    for place in ("arrive", "end"):
        real = getattr(_Walk, place)

        def seen(self: _Walk, point: Tensor, real: object = real) -> None:
            points.append(point.flatten(1) @ recorded("weights"))
            real(self, point)  # type: ignore[operator]

        monkeypatch.setattr(_Walk, place, seen)
    attack = FAB(norm, EPS[norm], targeted=kind != "untargeted", steps=len(expected))
    aims = None if kind == "untargeted" else recorded(f"{name}.targets")
    start = attack._start(x, Given(recorded(f"{name}.noise")), 0, 1) if kind == "restart" else x
    searched = Searched(Small(recorded("first"), recorded("second")))
    nearest, distance = attack._run(searched, start, x, y, aims)
    torch.testing.assert_close(torch.stack(points), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(nearest, recorded(f"{name}.nearest"), rtol=0, atol=1e-9)
    assert torch.equal(distance.isfinite(), (nearest != x).flatten(1).any(1))
    assert len(points) * len(x) < searched.forwards <= 2 * len(points) * len(x)


@pytest.mark.parametrize("norm", EPS)
def test_the_way_to_a_plane_is_the_shortest(norm: str) -> None:
    """No shorter step meets the plane: of all steps no longer, none reaches further; and one that is short of it is
    as far as the range allows."""
    generator = torch.Generator().manual_seed(3)
    start = torch.rand(200, 3, 4, 4, generator=generator, dtype=torch.float64)
    start[:40] = start[:40].round()
    gradient = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    gradient[::5, 0] = 0
    height = 4 * torch.randn(200, 1, 1, 1, generator=generator, dtype=torch.float64)
    height[::7] *= 20
    height[1] = 0
    attack = FAB(norm, 0.1)
    way = attack._to_plane(start, height, gradient)
    assert float((start + way).min()) >= -1e-15
    assert float((start + way).max()) <= 1 + 1e-15
    moved = (gradient * way).sum((1, 2, 3), keepdim=True)
    sign = torch.where(height >= 0, -1.0, 1.0)
    furthest = (torch.where(gradient * sign > 0, 1 - start, start) * gradient.abs()).sum(
        (1, 2, 3), keepdim=True
    )
    enough = furthest >= height.abs()
    assert 100 < int(enough.sum()) < 200
    torch.testing.assert_close(moved[enough], -height[enough], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((sign * moved)[~enough], furthest[~enough], rtol=1e-12, atol=1e-12)
    # Any feasible step of that length gains no more: the best one has each pixel go as far, or by the same share of
    # its gradient, until it meets its end.
    length = attack.length(way)
    if norm == "linf":
        best = torch.where(gradient * sign > 0, 1 - start, start).minimum(length) * gradient.abs()
        torch.testing.assert_close(best.sum((1, 2, 3), keepdim=True), sign * moved, rtol=1e-12, atol=1e-12)
    else:
        inside = (start + way > 1e-12) & (start + way < 1 - 1e-12) & (gradient != 0)
        share = (way / gradient).where(inside, torch.nan).flatten(1)[:, :]
        spread = share.nan_to_num(-torch.inf).amax(1) - share.nan_to_num(torch.inf).amin(1)
        assert float(spread[inside.flatten(1).any(1)].max()) < 1e-12


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_what_it_breaks_is_broken_and_in_the_ball(classes: int, norm: str, targeted: bool) -> None:
    network, x, y = small(classes, dtype=torch.float32)
    x_adv = attacked(network, x, y, norm, EPS[norm], targeted, steps=20, restarts=2)
    change = (x_adv - x).flatten(1)
    assert float((change.abs().amax(1) if norm == "linf" else change.norm(dim=1)).max()) <= EPS[norm]
    broken = network(x_adv).argmax(1) != y
    assert torch.equal(broken, (change != 0).any(1))
    assert 3 < int(broken.sum()) < 40


def test_neither_batch_nor_order_change_a_result() -> None:
    network, x, y = small()
    settings = ("l2", EPS["l2"], True, 20, 2, 3)
    whole = attacked(network, x, y, *settings)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    parts = [attacked(network, x[part], y[part], *settings) for part in order.split(7)]
    torch.testing.assert_close(torch.cat(parts), whole[order], rtol=0, atol=1e-12)


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"norm": "l1"}, {"eps": 0.0}, {"steps": 0}, {"targets": 0}, {"restarts": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FAB(**wrong)
