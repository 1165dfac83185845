"""What an attack finds does not depend on the unit of the logits, and images without any gradient are counted."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from advfunmatch import PGDAttack, prepare_for_attack
from advfunmatch.attacks.objectives import CrossEntropy, divergence_score
from torch import Tensor, nn

SEED = 0
EPS, STEP, STEPS = 0.02, 0.005, 8


def networks(unit: float, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher that differ somewhat; the same decisions in every unit of their logits."""
    generator = torch.Generator().manual_seed(SEED)
    weights = torch.randn(10, 192, generator=generator), torch.randn(10, 192, generator=generator)
    pair = []
    for weight in (weights[0], weights[0] + weights[1] / 2):
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False))
        network[1].weight = nn.Parameter((weight.double() * unit).to(dtype))
        pair.append(network)
    return pair[0], pair[1]


def images(count: int = 200) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(SEED + 1)) - 0.5


def left(objective: str, unit: float, dtype: torch.dtype, prepared: bool, norm: str = "linf") -> float:
    """The share of images on which the attack does not reach what its objective is about, in float64."""
    x, (student, teacher) = images(), networks(1.0)
    labels, clean = student(x).argmax(1), teacher(x).argmax(1)
    labelled = objective in ("cross_entropy", "margin")
    pair = networks(unit, dtype)
    if prepared:
        pair = prepare_for_attack(pair[0]), prepare_for_attack(pair[1])
    scale = 1.0 if norm == "linf" else 8.0
    attack = PGDAttack(
        objective, norm, EPS * scale, STEP * scale, STEPS, clip=None, init="gaussian", seed=SEED
    )
    x_adv = attack(pair[0], None if labelled else pair[1], x.to(dtype), labels if labelled else None).to(
        x.dtype
    )
    assert attack.zero_gradients == 0
    goal = {"mismatch": teacher(x_adv).argmax(1), "fixed_teacher": clean}.get(objective, labels)
    return float((student(x_adv).argmax(1) == goal).float().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("objective", ["cross_entropy", "margin", "mismatch", "fixed_teacher"])
def test_what_is_left_does_not_depend_on_the_unit(objective: str, dtype: torch.dtype) -> None:
    """Beyond a unit of 10 everything is certain. float16 ends where its logits do."""
    want = left(objective, 10.0, torch.float32, prepared=True)
    assert want < 0.5  # the attack does something
    for unit, prepared in ((100.0, False), (1000.0, True), (1e6, True), (1e30, False)):
        if dtype != torch.float16 or unit <= 1000:
            assert left(objective, unit, dtype, prepared) == pytest.approx(want, abs=0.04), unit


@pytest.mark.parametrize("objective", ["cross_entropy", "mismatch"])
def test_tiny_units_and_l2_are_ordinary(objective: str) -> None:
    want = left(objective, 1e-3, torch.float32, prepared=True)
    for unit in (1e-6, 1e-20):
        assert left(objective, unit, torch.float32, prepared=True) == pytest.approx(want, abs=0.03)
    want = left(objective, 10.0, torch.float32, prepared=True, norm="l2")
    for unit in (1e-20, 1e30):
        assert left(objective, unit, torch.float32, prepared=True, norm="l2") < want + 0.5
    assert left(objective, 1e30, torch.float32, True, "l2") == pytest.approx(want, abs=0.04)


class Sine(nn.Module):
    """Deep enough in powers of two that float16 overflows, or vanishes, inside the backward."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(networks(1.0)[0][1].weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x.flatten(1)) * self.first
        return (x @ self.weight.T.to(x.dtype)) / self.first


@pytest.mark.parametrize("first", [2.0**-12, 2.0**10])
def test_factors_adapt_to_what_a_float16_backward_holds(first: float) -> None:
    net, x = Sine(first).half(), images(50).half()
    labels = net(x).argmax(1)
    attack = PGDAttack("cross_entropy", eps=EPS, step_size=STEP, steps=STEPS, init="zero", clip=None)
    x_adv = attack(net, None, x, labels)
    exact = PGDAttack("cross_entropy", eps=EPS, step_size=STEP, steps=STEPS, init="zero", clip=None)
    x_exact = exact(Sine(1.0), None, x.float(), labels)
    broken = [float((Sine(1.0)(z.float()).argmax(1) != labels).float().mean()) for z in (x_adv, x_exact)]
    assert attack.zero_gradients == 0
    assert broken[0] == pytest.approx(broken[1], abs=0.05)


def test_a_users_rows_are_scaled_as_the_built_in_ones() -> None:
    """Gradients of 1e-30 would vanish in float16, and do not in float32: both are the same to a step."""

    def tiny(student: Tensor, teacher: None, labels: Tensor) -> Tensor:
        return CrossEntropy()(student.float(), None, labels) * 1e-30

    x, (student, _) = images(20), networks(1.0)
    labels = student(x).argmax(1)
    options = {"eps": EPS, "step_size": STEP, "steps": 3, "init": "zero", "clip": None}
    found = PGDAttack(tiny, **options)(student.half(), None, x.half(), labels)
    want = PGDAttack("cross_entropy", **options)(student, None, x.half(), labels)
    torch.testing.assert_close(found, want)


class Dead(nn.Module):
    """No gradient for images whose first pixel is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.network = networks(1.0)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x * (x[:, :1, :1, :1] > 0)) + self.network(x.detach())


@pytest.mark.parametrize("early_stop", [False, True])
def test_images_without_any_gradient_are_counted(early_stop: bool) -> None:
    net, x = Dead(), images(60)
    labels = net(x).argmax(1)
    attack = PGDAttack(
        "cross_entropy", eps=1e-3, step_size=1e-4, steps=2, init="zero", clip=None, early_stop=early_stop
    )
    assert attack.zero_gradients is None
    x_adv = attack(net, None, x, labels)
    unmoved = (x_adv == x).flatten(1).all(1)
    assert attack.zero_gradients.item() == int(unmoved.sum()) == int((x[:, 0, 0, 0] <= 0).sum())
    attack(net, None, x[:0], labels[:0])
    assert attack.zero_gradients == 0


def test_equal_networks_have_nothing_to_mismatch_and_say_so() -> None:
    student, x = networks(1.0)[0], images(5)
    attack = PGDAttack("mismatch", eps=EPS, step_size=STEP, steps=2, clip=None)
    attack(student, copy.deepcopy(student), x)
    assert attack.zero_gradients == 5


@pytest.mark.parametrize("unit", [1.0, 1e4])
def test_the_best_iterate_is_no_worse_than_the_image_itself(unit: float) -> None:
    """Steps of twice the radius jump over the maximum: the last iterate is often worse than where it started."""
    x, (student, teacher) = images(), networks(unit)
    scores = {}
    for keep in ("last", "best"):
        attack = PGDAttack(
            "mismatch", eps=EPS, step_size=2 * EPS, steps=3, keep=keep, clip=None, restarts=2, seed=SEED
        )
        x_adv = attack(student, teacher, x)
        scores[keep] = divergence_score(student(x_adv), teacher(x_adv))
    clean = divergence_score(student(x), teacher(x))
    assert (scores["best"] >= clean).all()
    assert (scores["best"] >= scores["last"]).float().mean() > 0.9
    assert PGDAttack("mismatch").keep == "best"
    assert PGDAttack("fixed_teacher").keep == PGDAttack("margin").keep == "last"


def test_shared_statistics_keep_the_weights_of_rows() -> None:
    """Through its batch's statistics an image's gradient is made of every row's: as autograd of the summed loss."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    net, x = net.double(), images(6).double()
    labels = torch.arange(6)
    attack = PGDAttack("cross_entropy", eps=EPS, step_size=STEP, steps=1, init="zero", clip=None, bn="batch")
    x_adv = attack(net, None, x, labels)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        nn.functional.cross_entropy(net.train()(leaf), labels, reduction="sum"), leaf
    )
    torch.testing.assert_close(x_adv, x + STEP * gradient.sign())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "l2", "eps": 8 / 255, "step_size": 2 / 255}, "0.5 = 128/255 is usual"),
        ({"eps": 0.1, "step_size": 0.3}, "more than the diameter of the ball"),
        ({"norm": "l2", "eps": 0.5, "step_size": 0.1}, None),
        ({"eps": 8 / 255, "step_size": 10 / 255}, None),
    ],
)
def test_sizes_that_nobody_means_are_pointed_out(options: dict, words: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PGDAttack(**options)
    assert [words in str(w.message) for w in caught] == ([] if words is None else [True])


def test_keep_best_needs_a_score_and_a_whole_run() -> None:
    with pytest.raises(ValueError, match="keep must be one of best, last"):
        PGDAttack(keep="first")
    with pytest.raises(ValueError, match="keep='best' needs an objective with a score"):
        PGDAttack(lambda *known: known[0], keep="best")
    with pytest.raises(ValueError, match="early_stop=True keeps"):
        PGDAttack("margin", keep="best", early_stop=True)


def test_a_batchs_unusual_images_change_nothing_for_the_usual_ones() -> None:
    """Alone those are stepped without a look at their scales: beside one that has no gradient the same bits."""
    student, teacher = networks(1.0)
    x = images(8)
    attack = PGDAttack("mismatch", eps=EPS, step_size=STEP, steps=4, init="zero", keep="last", clip=None)
    alone = attack(student, teacher, x[:7])
    assert int(attack.zero_gradients) == 0
    x[7] = torch.nan
    beside = attack(student, teacher, x)
    assert int(attack.zero_gradients) == 1
    assert torch.equal(beside[:7], alone)


def test_scores_of_certain_rows_do_not_depend_on_their_batch() -> None:
    logits = (
        torch.tensor([[0.0, 1.0], [0.0, 2000.0], [0.0, 3.0]]),
        torch.tensor([[0.5, 0.0], [0.0, 1900.0], [3.0, 0.0]]),
    )
    together = divergence_score(*logits)
    assert together[1] < 0 < together[0]
    for row in range(3):
        assert torch.equal(divergence_score(*(z[row : row + 1] for z in logits)), together[row : row + 1])
