"""Each method against an independent transcription of its formula in plain PyTorch: loss, gradients, attack.

A transcription is written from the paper's formula or the official code's arithmetic, with `torch.nn.functional` only.
In float64, so that a wrong term cannot hide behind rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from advfunmatch import TrainConfig, create_model
from advfunmatch.methods import ATTACK_READS, METHODS, SETTINGS, Logits, make_attack
from advfunmatch.training.awp import perturbed_weights
from advfunmatch.training.distributed import World
from advfunmatch.training.trainer import run_attack
from torch import Tensor, nn

CLASSES = 5


def kl(student: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(target/T) ‖ softmax(student/T)) of each row."""
    log_p, log_q = F.log_softmax(target / temperature, 1), F.log_softmax(student / temperature, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def mart_by_hand(s: Callable[[Tensor], Tensor], x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    # As the official function is written: sort, pick the runner-up where the label leads.
    clean, adv = s(x), s(x_adv)
    probabilities = F.softmax(adv, 1)
    order = torch.argsort(probabilities, 1)[:, -2:]
    other = torch.where(order[:, -1] == y, order[:, -2], order[:, -1])
    bce = F.cross_entropy(adv, y) + F.nll_loss(torch.log(1.0001 - probabilities + 1e-12), other)
    true = F.softmax(clean, 1).gather(1, y.unsqueeze(1)).squeeze(1)
    weighted = F.kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction="none").sum(1) * (
        1.0000001 - true
    )
    return bce + 6.0 * weighted.sum() / len(y)


def iad_by_hand(s, t, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    outputs, rows = s(x_adv), []
    guide = F.softmax(t(x_adv), 1)
    for index in range(len(y)):
        trust = guide[index][y[index]].pow(0.1).item()
        rows.append(kl(outputs, s(x))[index] * (1 - trust))
    return kl(outputs, t(x)).sum() / len(y) + torch.stack(rows).sum() / len(y)


# method -> loss of (student, teacher, x, x', labels) with the method's defaults
BY_HAND = {
    "ce": lambda s, t, x, a, y: F.cross_entropy(s(x), y),
    "kd": lambda s, t, x, a, y: 0.1 * F.cross_entropy(s(x), y) + 0.9 * 16 * kl(s(x), t(x), 4.0).mean(),
    "funmatch": lambda s, t, x, a, y: kl(s(x), t(x)).mean(),
    "pgd_at": lambda s, t, x, a, y: F.cross_entropy(s(a), y),
    "trades": lambda s, t, x, a, y: F.cross_entropy(s(x), y) + 6 * kl(s(a), s(x)).mean(),
    "mart": lambda s, t, x, a, y: mart_by_hand(s, x, a, y),
    "ard": lambda s, t, x, a, y: 30**2 * kl(s(a), t(x), 30.0).mean() / CLASSES,
    "rslad": lambda s, t, x, a, y: (5 / 6 * kl(s(a), t(x)) + 1 / 6 * kl(s(x), t(x))).mean() / CLASSES,
    "iad": lambda s, t, x, a, y: iad_by_hand(s, t, x, a, y),
    "adaad": lambda s, t, x, a, y: kl(s(a), t(a)).mean() / CLASSES,
    "advfunmatch": lambda s, t, x, a, y: kl(s(a), t(a)).mean(),
}

# (method, settings, the same by hand) where papers differ
SWITCHED = [
    (
        "trades",
        {"detach_target": True},
        lambda s, t, x, a, y: F.cross_entropy(s(x), y) + 6 * kl(s(a), s(x).detach()).mean(),
    ),
    (
        "trades",
        {"beta": 1.0, "reduction": "sum"},
        lambda s, t, x, a, y: F.cross_entropy(s(x), y) + kl(s(a), s(x)).sum(),
    ),
    (
        "ard",
        {"alpha": 0.5, "temperature": 5.0},
        lambda s, t, x, a, y: (
            0.5 * 25 * kl(s(a), t(x), 5.0).mean() / CLASSES + 0.5 * F.cross_entropy(s(x), y)
        ),
    ),
    (
        "ard",
        {"scale_by_t2": False, "teacher_input": "adversarial"},
        lambda s, t, x, a, y: kl(s(a), t(a), 30.0).mean() / CLASSES,
    ),
    (
        "adaad",
        {"alpha": 0.7, "reduction": "batchmean"},
        lambda s, t, x, a, y: (0.7 * kl(s(a), t(a)) + 0.3 * kl(s(x), t(x))).mean(),
    ),
    ("iad", {"begin_epoch": 61}, lambda s, t, x, a, y: kl(s(a), t(x)).mean()),
    ("advfunmatch", {"temperature": 3.0}, lambda s, t, x, a, y: 9 * kl(s(a), t(a), 3.0).mean()),
    ("advfunmatch", {"teacher_input": "clean"}, lambda s, t, x, a, y: kl(s(a), t(x)).mean()),
    ("pgd_at", {"label_smoothing": 0.1}, lambda s, t, x, a, y: F.cross_entropy(s(a), y, label_smoothing=0.1)),
]


@pytest.fixture
def setting() -> tuple[nn.Module, nn.Module, Tensor, Tensor, Tensor]:
    """Student, teacher, x, x' and labels: small, float64, with batch norm."""
    torch.manual_seed(0)
    student = create_model("small_cnn-3", num_classes=CLASSES, in_channels=2).double().train()
    teacher = (
        create_model("small_cnn-4", num_classes=CLASSES, in_channels=2).double().eval().requires_grad_(False)
    )
    with torch.no_grad():
        teacher.fc.weight.mul_(10)  # type: ignore[union-attr, operator]
    x = torch.rand(6, 2, 8, 8, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    return student, teacher, x, x_adv, torch.tensor([0, 1, 2, 3, 4, 0])


def configured(method: str, **settings: object) -> TrainConfig:
    values = {
        "data": "digits",
        "model": "small_cnn",
        "out": "unused",
        "teacher": "unused",
        "eps": 0.1,
        "steps": 3,
    }
    return TrainConfig(method=method, **{**values, **settings}).resolve()  # type: ignore[arg-type]


def loss_and_gradients(student: nn.Module, loss: Tensor) -> tuple[Tensor, ...]:
    return (loss, *torch.autograd.grad(loss, list(student.parameters())))


def test_every_method_has_a_transcription() -> None:
    assert set(BY_HAND) == set(METHODS)


@pytest.mark.parametrize(
    ("method", "settings", "by_hand"),
    [(name, {}, by_hand) for name, by_hand in BY_HAND.items()] + SWITCHED,
)
def test_loss_and_parameter_gradients(setting, method, settings, by_hand) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, x_adv, labels = setting
    twin = copy.deepcopy(student)
    logits = Logits(student, teacher, x, labels, epoch=60)
    logits.x_adv = x_adv
    ours = loss_and_gradients(student, METHODS[method].loss(logits, configured(method, **settings)))
    theirs = loss_and_gradients(twin, by_hand(twin, teacher, x, x_adv, labels))
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_no_network_runs_that_the_loss_does_not_need(setting, method) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, x_adv, labels = setting
    calls = []

    def counted(name: str, network: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda images: (calls.append(name + ("'" if images is x_adv else "")), network(images))[1]

    logits = Logits(counted("S", student), counted("T", teacher), x, labels, epoch=0)
    logits.x_adv = x_adv
    METHODS[method].loss(logits, configured(method))
    formula = METHODS[method].formula.split("[epoch")[0]
    expected = {name for name in ("S(x)", "S(x')", "T(x)", "T(x')") if name in formula}
    if method in ("ard", "adaad"):
        expected -= {"S(x)"} | ({"T(x)"} if method == "adaad" else set())  # their weight is 0 by default
    assert sorted(calls) == sorted(name.replace("(x)", "").replace("(x')", "'") for name in expected)


ATTACKED = {
    "pgd_at": lambda s, t, x, a, y: F.cross_entropy(s(a), y),
    "mart": lambda s, t, x, a, y: F.cross_entropy(s(a), y),
    "ard": lambda s, t, x, a, y: F.cross_entropy(s(a), y),
    "iad": lambda s, t, x, a, y: F.cross_entropy(s(a), y),
    "trades": lambda s, t, x, a, y: kl(s(a), s(x).detach()).sum(),
    "rslad": lambda s, t, x, a, y: kl(s(a), t(x)).sum(),
    "adaad": lambda s, t, x, a, y: kl(s(a), t(a)).sum(),
    "advfunmatch": lambda s, t, x, a, y: kl(s(a), t(a)).sum(),
}


def test_every_attacking_method_is_checked() -> None:
    assert set(ATTACKED) == {name for name, method in METHODS.items() if method.objective}


@pytest.mark.parametrize("method", ATTACKED)
def test_attack(setting, method) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, _, labels = setting
    config = configured(method)
    attack = make_attack(config)
    assert attack is not None

    def run(steps: int) -> Tensor:
        attack.steps = steps
        torch.manual_seed(7)
        return run_attack(
            attack, METHODS[method], Logits(copy.deepcopy(student), teacher, x, labels, epoch=0)
        )

    start = run(0)
    assert 0 < (start - x).abs().max() <= (0.1 if config.attack_init == "uniform" else 0.01)
    net = copy.deepcopy(student).train(config.attack_bn == "train")
    x_adv = start
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        gradient = torch.autograd.grad(ATTACKED[method](net, teacher, x, x_adv, labels), x_adv)[0]
        x_adv = (x_adv + 0.025 * gradient.sign()).detach()
        x_adv = torch.min(torch.max(x_adv, x - 0.1), x + 0.1).clamp(0, 1)
    torch.testing.assert_close(run(3), x_adv, rtol=0, atol=1e-9)


def test_a_detached_teacher_is_attacked_differently(setting) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, _, labels = setting
    found = []
    for gradient in (True, False):
        attack = make_attack(configured("advfunmatch", teacher_gradient=gradient))
        assert attack is not None
        torch.manual_seed(7)
        found.append(run_attack(attack, METHODS["advfunmatch"], Logits(student, teacher, x, labels, epoch=0)))
    assert not torch.equal(*found)


def test_awp_step_against_the_official_arithmetic(setting) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, x_adv, labels = setting
    config = configured("trades")
    proxy, twin = copy.deepcopy(student), copy.deepcopy(student)
    before = copy.deepcopy(student.state_dict())

    # As csdongxian/AWP does it: one SGD step of a proxy up the loss, rescaled to each weight's norm.
    (-BY_HAND["trades"](proxy, teacher, x, x_adv, labels)).backward()
    torch.optim.SGD(proxy.parameters(), lr=0.01).step()
    moves = {}
    for (name, old), new in zip(twin.named_parameters(), proxy.parameters(), strict=True):
        if old.dim() > 1 and "weight" in name:
            change = new.detach() - old.detach()
            moves[name] = 5e-3 * old.norm().detach() / (change.norm() + 1e-20) * change
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.add_(moves.get(name, 0))
    expected = loss_and_gradients(twin, BY_HAND["trades"](twin, teacher, x, x_adv, labels))

    def loss_of(network: Callable[[Tensor], Tensor]) -> Tensor:
        logits = Logits(network, None, x, labels, epoch=0)
        logits.x_adv = x_adv
        return METHODS["trades"].loss(logits, config)

    with perturbed_weights(student, loss_of, 5e-3, World()):
        assert torch.equal(student.features[1].running_mean, before["features.1.running_mean"])  # type: ignore[index]
        ours = loss_and_gradients(student, loss_of(student))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-12, atol=1e-14)


def test_defaults_are_settings_with_a_source() -> None:
    for method in METHODS.values():
        assert set(method.defaults) <= {field.name for field in fields(TrainConfig)}
        assert all(default.source for default in method.defaults.values())
        resolved = configured(method.name)
        assert all(getattr(resolved, name) == default.value for name, default in method.defaults.items())
        assert getattr(configured(method.name, temperature=7.0), "temperature") == 7.0  # noqa: B009


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_reads_what_it_says(setting, method) -> None:  # type: ignore[no-untyped-def]
    """So that a run can say which settings it was given in vain."""
    student, teacher, x, x_adv, labels = setting
    config, read = configured(method.name, alpha=0.5, begin_epoch=0), set()

    class Watched:
        def __getattr__(self, name: str) -> object:
            read.add(name)
            return getattr(config, name)

    logits = Logits(student, teacher, x, labels, epoch=60)
    logits.x_adv = x_adv
    method.loss(logits, Watched())
    assert read & set(SETTINGS) == set(method.reads)
    read.clear()
    make_attack(Watched())  # type: ignore[arg-type]
    elsewhere = {"early_steps", "lean"} if method.objective else set()
    assert read & set(SETTINGS) | elsewhere == set(ATTACK_READS[method.objective])


def test_methods_command_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    from advfunmatch.cli import run

    assert run(["methods"]) == 0
    printed = capsys.readouterr().out
    for method in METHODS.values():
        assert f"{method.name}  ({method.source})" in printed
        assert method.formula in printed
    assert "--temperature 30" in printed
