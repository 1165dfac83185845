"""Attacks made on another network: what they do to this one, and what that says of its gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from advfunmatch import InputError, evaluate
from advfunmatch.cli import run
from advfunmatch.data import ImageDataset, load_dataset
from torch import Tensor, nn


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits", split="test", limit=40)


class Means(nn.Module):
    """Nearest class mean; `masked` looks at the images through steps, which have no gradient."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        train = load_dataset("digits", split="train")
        x = train.images.flatten(1).float() / 255
        self.means = nn.Parameter(torch.stack([x[train.labels == label].mean(0) for label in range(10)]))
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        rounded = (64 * x).round() / 64
        x = rounded + 0 * x if self.masked else x + (rounded - x).detach()
        return -10 * torch.cdist(x, self.means).square()


def test_rows_are_what_the_other_networks_images_do(digits: ImageDataset) -> None:
    network, source = Means(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = evaluate(network, digits, ["clean", "fgsm"], eps=0.1, transfer_from={"linear": source})
    row = result.results[-1]
    assert (row.attack, row.source) == ("fgsm from linear", "linear")
    x = digits.images.float() / 255
    x.requires_grad_()
    nn.functional.cross_entropy(source(x), digits.labels).backward()
    x_adv = (x + 0.1 * x.grad.sign()).clamp(0, 1)
    right = network(x_adv.detach()).argmax(1) == digits.labels
    assert row.accuracy == pytest.approx(100 * right.double().mean().item(), abs=0.01)
    assert all(p.requires_grad and p.grad is not None for p in source.parameters())
    assert source.training


def test_a_network_that_hides_its_gradients_is_found_out(digits: ImageDataset) -> None:
    result = evaluate(
        Means(masked=True), digits, ["clean", "pgd10"], eps=0.2, transfer_from={"plain": Means()}
    )
    assert result.accuracies["pgd10 from plain"] < result.accuracies["pgd10"] - 10
    assert any(text.startswith("pgd10 from plain leaves") and "masked" in text for text in result.warnings)
    honest = evaluate(Means(), digits, ["pgd10"], eps=0.2, transfer_from={"plain": Means()})
    assert not [text for text in honest.warnings if "from plain" in text]


def test_what_cannot_be_transferred_is_said(digits: ImageDataset) -> None:
    network = Means()
    for message, attacks, sources in (
        ("must be networks by name", ["fgsm"], [network]),
        ("must be networks by name", ["fgsm"], {}),
        (r"transfer_from\['a'\] is of type str", ["fgsm"], {"a": "file.pt"}),
        ("names none that makes images", ["clean"], {"a": network}),
        ("transfer_from 'a'", ["fgsm"], {"a": nn.Linear(3, 2)}),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(network, digits, attacks, eps=0.1, transfer_from=sources)


def test_on_the_command_line_and_gone_on_with(teacher: str, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "x.json"
    command = ["evaluate", "--checkpoint", teacher, "--data", "digits", "--limit", "20", "--out", str(out)]
    command += ["--attacks", "clean,fgsm", "--no-fidelity"]
    assert run([*command, "--transfer-from", teacher]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["attack"] for row in rows] == ["clean", "fgsm", f"fgsm from {teacher}"]
    assert rows[1]["accuracy"] == rows[2]["accuracy"]
    assert f"fgsm from {teacher}" in capsys.readouterr().out
    again = torch.load(teacher, weights_only=True)
    again["state_dict"] = {name: value * 1.1 for name, value in again["state_dict"].items()}
    other = Path(teacher).with_name("other.pt")
    torch.save(again, other)
    assert run([*command, "--transfer-from", str(other), "--resume"]) == 0
    assert len(json.loads(out.read_text())["results"]) == 4
    torch.save({**again, "state_dict": torch.load(teacher, weights_only=True)["state_dict"]}, other)
    assert run([*command, "--transfer-from", str(other), "--resume"]) == 2
    assert f"transfer_from {other} is not the one it was begun with" in capsys.readouterr().err
