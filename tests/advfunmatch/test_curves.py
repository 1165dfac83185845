"""Accuracy against the radius: against linear networks' margins, and gone on with, printed and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from advfunmatch import InputError, PGDAttack, evaluate
from advfunmatch.cli import run
from advfunmatch.evaluation import Evaluation
from torch import Tensor, nn

EPS = 0.06


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Two classes, images away from their box, labels of which one in ten is wrong, and margins in linf."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    x = 0.3 + 0.4 * torch.rand(60, 1, 4, 4)
    with torch.no_grad():
        logits = network(x)
        network[1].bias -= logits.mean(0)
        logits = network(x)
    y = logits.argmax(1)
    weight = network[1].weight.detach()
    margins = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).abs().sum()
    y[::10] = 1 - y[::10]
    margins[::10] = 0
    return network, x, y, margins


def test_curves_are_the_margins(linear: tuple[nn.Module, Tensor, Tensor, Tensor]) -> None:
    network, x, y, margins = linear
    measured = evaluate(
        network,
        (x, y),
        ["fgsm"],
        eps=[EPS, 0.05],
        curve=["fgsm", "carlini_wagner(steps=200,initial_const=0.01)"],
    )
    exact, near = measured.curves
    assert exact.eps == pytest.approx([0, 0.015, 0.03, 0.045, 0.05, 0.06, 0.075, 0.09, 0.105, 0.12])
    expected = [100 * (margins > eps).double().mean().item() for eps in exact.eps]
    assert exact.accuracy == pytest.approx(expected, abs=0.01)
    assert 10 < exact.accuracy[5] < exact.accuracy[0] == 90
    assert exact.accuracy[5] == measured.results[0].accuracy
    # τ shrinks by a tenth at a time.
    within = [100 * (1.15 * margins > eps).double().mean().item() for eps in near.eps]
    for accuracy, least, most in zip(near.accuracy, expected, within, strict=True):
        assert least - 0.01 <= accuracy <= most + 2
    stored = measured.to_dict()
    assert Evaluation.from_dict(json.loads(json.dumps(stored))).curves == measured.curves


def test_only_images_that_still_stand_are_attacked(linear: tuple[nn.Module, Tensor, Tensor, Tensor]) -> None:
    network, x, y, margins = linear
    handed = []

    def counts(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
        handed.append((eps, len(x)))
        return x + eps * (model[1].weight[1 - y] - model[1].weight[y]).sign().view_as(x)

    (curve,) = evaluate(network, (x, y), ["clean"], eps=EPS, curve=counts).curves
    before = [0.0, *curve.eps[1:-1]]
    standing = [(eps, int((margins > last).sum())) for last, eps in zip(before, curve.eps[1:], strict=True)]
    assert handed == [each for each in standing if each[1]]


def test_what_has_no_radius_is_refused(linear: tuple[nn.Module, Tensor, Tensor, Tensor]) -> None:
    network, x, y, _ = linear
    for message, curve, eps in (
        ("curve is 'clean', which takes no eps", "clean", EPS),
        ("whose eps is 0.1", PGDAttack("cross_entropy", eps=0.1), EPS),
        ("eps is missing, but a curve", "fgsm", None),
        ("attack is 'fgms'", "fgms", EPS),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(network, (x, y), ["clean"], eps=eps, curve=curve)


def test_on_the_command_line_and_gone_on_with(teacher: str, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "x.json"
    command = ["evaluate", "--checkpoint", teacher, "--data", "digits", "--limit", "20", "--out", str(out)]
    command += ["--attacks", "clean,fgsm", "--eps", "8/255", "--no-fidelity"]
    assert run([*command, "--curve", "fgsm"]) == 0
    (curve,) = json.loads(out.read_text())["curves"]
    said = capsys.readouterr().out
    heads, values = said.splitlines()[-2:]
    assert heads.split() == ["eps", "(linf)", "0", *(f"{2 * n}/255" for n in range(1, 9))]
    assert values.split() == ["fgsm,", "%", *(f"{value:.2f}" for value in curve["accuracy"])]
    assert "per class, %" in said
    assert run([*command, "--curve", "fgsm,pgd10", "--resume"]) == 0
    first, second = json.loads(out.read_text())["curves"]
    assert first == curve
    assert second["attack"] == "pgd10"
