"""The nearest adversarial image: against the hyperplane of linear networks, and a plain transcription in float64."""

from __future__ import annotations

import pytest
import torch
from advfunmatch import InputError, evaluate
from advfunmatch.attacks import Nearest, carlini_wagner, carlini_wagner_linf, lbfgs
from advfunmatch.data import load_dataset
from advfunmatch.evaluation import Attacked
from torch import Tensor, nn

DUAL = {"l2": 2, "linf": 1}  # the norm in which a hyperplane's gradient is measured


@pytest.fixture
def small_test() -> object:
    return load_dataset("digits", split="test", limit=8)


def linear(classes: int, features: int = 12, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(classes)
    return nn.Linear(features, classes, dtype=dtype).eval()


def images(
    network: nn.Module, count: int, *shape: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Images away from their box, and what the network says of them."""
    torch.manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(count, *shape, dtype=dtype)
    with torch.no_grad():
        return x, network(x).argmax(1)


def convolutional(dtype: torch.dtype) -> nn.Module:
    """A network of 1×6×6 images to three classes, none of which is far from any image."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(64, 3)
    )
    network.double().eval().requires_grad_(False)
    network[4].weight.mul_(10)
    network[4].bias.sub_(network(images(network, 30, 1, 6, 6)[0]).mean(0))
    return network.to(dtype)


def to_hyperplanes(network: nn.Linear, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """(N,): the distance to the nearest class, where the box is further."""
    logits, weight = network(x).detach(), network.weight.detach()
    margins = logits.gather(1, y[:, None]) - logits
    sizes = torch.linalg.vector_norm(weight[y][:, None] - weight, DUAL[norm], dim=2)
    return (margins / sizes).scatter(1, y[:, None], torch.inf).amin(1)


@pytest.mark.parametrize(
    ("attack", "norm", "classes", "worst"),
    [
        (lambda *a: carlini_wagner(*a, steps=1000), "l2", 2, 0.01),
        (lambda *a: carlini_wagner(*a, steps=1000), "l2", 4, 0.01),
        (
            lambda *a: carlini_wagner_linf(*a, steps=300, initial_const=0.01),
            "linf",
            2,
            0.12,
        ),  # τ shrinks by a tenth at a time
        (lbfgs, "l2", 2, 0.03),
        (lambda *a: lbfgs(*a, targets=3), "l2", 4, 0.35),  # cross-entropy pulls at all classes, not at one
    ],
)
def test_finds_the_nearest_point_beyond_the_hyperplanes(attack, norm, classes, worst) -> None:  # type: ignore[no-untyped-def]
    network = linear(classes)
    x, y = images(network, 40, 12)
    truth = to_hyperplanes(network, x, y, norm)
    kept = (truth > 0.05) & (
        truth < (0.3 if norm == "l2" else 0.2)
    )  # beyond Adam's first step, and before the box
    x, y, truth = x[kept], y[kept], truth[kept]
    assert len(x) >= 8
    found = attack(network, x, y)
    assert bool((network(found.images).argmax(1) != y).all())
    assert bool(((found.images >= 0) & (found.images <= 1)).all())
    order = torch.inf if norm == "linf" else 2
    torch.testing.assert_close(found.distances, torch.linalg.vector_norm(found.images - x, order, dim=1))
    assert bool((found.distances >= truth * (1 - 1e-9)).all())
    assert float((found.distances / truth).median()) < 1 + worst


def transcribed(network, x, label, norm, steps, searches) -> Tensor | None:  # type: ignore[no-untyped-def]
    """One image, as the authors' code goes about it, with autograd."""

    def start(image: Tensor) -> Tensor:
        return torch.atanh((2 * image - 1) * 0.999999).clone().requires_grad_()

    def margin(image: Tensor) -> Tensor:
        logits = network(image)[0]
        return (logits[label] - torch.cat([logits[:label], logits[label + 1 :]]).max()).clamp_min(0)

    class Adam:
        def __init__(self, rate: float) -> None:
            self.rate, self.t, self.m, self.v = rate, 0, torch.zeros_like(x), torch.zeros_like(x)

        def step(self, w: Tensor, loss: Tensor) -> None:
            (gradient,) = torch.autograd.grad(loss, w)
            self.t += 1
            self.m = 0.9 * self.m + 0.1 * gradient
            self.v = 0.999 * self.v + 0.001 * gradient**2
            rate = self.rate * (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)
            w.data -= rate * self.m / (self.v**0.5 + 1e-8)

    clean, best = (torch.tanh(start(x)).detach() + 1) / 2, None
    if norm == "l2":
        lower, upper, c, nearest = 0.0, 1e10, 1.0, 1e10
        for _ in range(searches):
            w = start(x)
            adam, before, success = Adam(0.01), 1e6, False
            for step in range(steps):
                image = (w.tanh() + 1) / 2
                loss = c * margin(image) + (image - clean).square().sum()
                if step % (steps // 10) == 0:
                    if loss.item() > 0.9999 * before:
                        break
                    before = loss.item()
                if int(network(image).argmax()) != label:
                    success = True
                    if (distance := (image - x).norm().item()) < nearest:
                        nearest, best = distance, image.detach()
                adam.step(w, loss)
            lower, upper = (lower, min(upper, c)) if success else (max(lower, c), upper)
            c = (lower + upper) / 2 if upper < 1e9 else 10 * c
        return best
    tau, c, begin = 1.0, 1.0, x
    while tau > 1 / 256:
        w = start(begin)
        adam, reached = Adam(5e-3), None
        while c < 20 and reached is None:
            for _ in range(steps):
                image = (w.tanh() + 1) / 2
                loss = c * margin(image) + ((image - clean).abs() - tau).clamp_min(0).sum()
                adam.step(w, loss)
                image = (w.detach().tanh() + 1) / 2
                if loss.item() < 1e-4 * c and int(network(image).argmax()) != label:
                    reached = image
                    break
            else:
                c *= 2
        if reached is None:
            break
        begin = best = reached
        tau = 0.9 * min(tau, float((reached - x).abs().max()))
    return best


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_is_the_published_algorithm_image_by_image(norm: str) -> None:
    network = convolutional(torch.float64)
    x, y = images(network, 6, 1, 6, 6)
    y[0] = (y[0] + 1) % 3  # one that is misclassified as it is
    attack = carlini_wagner if norm == "l2" else carlini_wagner_linf
    settings = {"steps": 60, "search_steps": 5} if norm == "l2" else {"steps": 100}
    settings["initial_const"] = 1.0
    found = attack(network, x, y, **settings)
    assert torch.equal(found.images[0], x[0])
    assert float(found.distances[0]) == 0
    reached = 0
    for index in range(1, len(x)):
        expected = transcribed(network, x[index : index + 1], int(y[index]), norm, settings["steps"], 5)
        if expected is None:
            assert not found.distances[index].isfinite()
            continue
        reached += 1
        torch.testing.assert_close(found.images[index], expected[0], atol=1e-6, rtol=0)
    assert reached >= 3
    order = torch.tensor([4, 0, 3])
    some = attack(network, x[order], y[order], **settings)
    torch.testing.assert_close(some.images, found.images[order], atol=1e-9, rtol=0)


@pytest.mark.parametrize("attack", [carlini_wagner, carlini_wagner_linf, lbfgs])
def test_what_the_prepared_network_finds_the_network_itself_agrees_to(attack) -> None:  # type: ignore[no-untyped-def]
    """float32 and bfloat16: found images lie next to the boundary, where arithmetic decides."""
    for dtype in (torch.float32, torch.bfloat16):
        network = convolutional(dtype)
        x, y = images(network, 8, 1, 6, 6, dtype=dtype)
        found = attack(network, x, y, steps=50, initial_const=1.0)
        hits = found.distances.isfinite()
        assert int(hits.sum()) >= 6
        assert found.images.dtype == dtype
        with torch.no_grad():
            assert torch.equal(network(found.images).argmax(1) != y, hits)


def test_images_without_a_gradient_are_counted_and_not_found() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.flatten(1).sum(1) * 0 + 1, x.flatten(1).sum(1) * 0], 1)

    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)
    for attack in (carlini_wagner, carlini_wagner_linf, lbfgs):
        found = attack(Flat().eval(), x, y, steps=10)
        assert isinstance(found, Nearest)
        assert found.zero_gradients == 3
        assert bool(found.distances.isinf().all())
        assert torch.equal(found.images, x)


def test_arguments_that_cannot_be_are_named() -> None:
    network = linear(3, dtype=torch.float32)
    x, y = images(network, 2, 12, dtype=torch.float32)
    for attack in (carlini_wagner, carlini_wagner_linf, lbfgs):
        for message, args, settings in (
            ("network must be in eval mode", (nn.Linear(12, 3), x, y), {}),
            ("x must lie within", (network, x + 1, y), {}),
            (r"y must be integer labels of shape \(2,\)", (network, x, y[:1]), {}),
            ("steps must be at least 1", (network, x, y), {"steps": 0}),
            ("initial_const must be finite and above 0", (network, x, y), {"initial_const": 0.0}),
            ("2 classes or more", (nn.Linear(12, 1).eval(), x, y * 0), {}),
        ):
            with pytest.raises(ValueError, match=message):
                attack(*args, **settings)


def test_evaluate_counts_what_lies_in_the_ball_and_says_how_far_the_nearest_are(small_test) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    y = network(small_test.images.float() / 255).argmax(1)
    data = (small_test.images.float() / 255, y)
    names = ["carlini_wagner(steps=100)", "lbfgs(search_steps=5)"]
    for norm, eps in (("l2", 0.3), ("linf", 0.02)):
        measured = evaluate(network, data, names, eps=[eps, 2 * eps], norm=norm)
        for row in measured.results:
            assert row.found == len(y)
            assert row.distance == measured.results[0].distance or row.attack != measured.results[0].attack
            inside = 100 - row.accuracy
            assert (inside > 50) == (row.distance < row.eps) or inside == 50
            assert f"median distance {row.distance:.4g} ({norm})" in row.nearest
    with pytest.raises(
        InputError, match="search_steps of attack 'carlini_wagner' is 3, but its linf form has none"
    ):
        evaluate(network, data, ["carlini_wagner(search_steps=3)"], eps=0.1)


def test_an_attack_of_ones_own_may_say_distances(small_test) -> None:  # type: ignore[no-untyped-def]
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()

    def told(model, x, y, *, far: float = 2.0):  # type: ignore[no-untyped-def]
        return Attacked(x, 0, distances=torch.full((len(x),), far))

    (row,) = evaluate(network, small_test, [told], eps=0.1).results
    assert (row.found, row.distance) == (len(small_test), 2.0)
    with pytest.raises(InputError, match="must return distances"):
        evaluate(
            network,
            small_test,
            [("told", lambda m, x, y: Attacked(x, 0, distances=x.new_full((len(x),), -1)))],
            eps=0.1,
        )
