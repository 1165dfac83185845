"""Evaluations that are stopped: what was measured is kept, and only the same is continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from advfunmatch import ImageDataset, InputError, evaluate
from torch import Tensor, nn


def network(scale: float = 1.0) -> nn.Module:
    linear = nn.Linear(12, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(scale * torch.randn(3, 12, generator=torch.Generator().manual_seed(2)))
    return nn.Sequential(nn.Flatten(), linear)


@pytest.fixture
def data() -> ImageDataset:
    images = torch.rand(20, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return ImageDataset("rows", "test", images, network()(images).argmax(1).detach(), ("a", "b", "c"))


def stops(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    raise KeyboardInterrupt


def test_what_was_done_is_kept_and_gone_on_with(data: ImageDataset, tmp_path: Path) -> None:
    out, calls = tmp_path / "x.json", []

    def counted(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
        calls.append(eps)
        return x

    settings = {"eps": [0.1, 0.2], "out": out, "about": {"note": "kept"}}
    with pytest.raises(KeyboardInterrupt):
        evaluate(network(), data, ["fgsm", counted, {"late": stops}.popitem()], **settings)
    stored = json.loads(out.read_text())
    assert [row["attack"] for row in stored["results"]] == ["fgsm", "fgsm", "counted", "counted"]
    assert not stored["complete"]
    assert stored["note"] == "kept"

    with pytest.raises(InputError, match="is already there; --resume goes on with it"):
        evaluate(network(), data, ["fgsm"], **settings)
    late = ("late", lambda model, x, y, *, eps: x)
    whole = evaluate(network(), data, ["fgsm", counted, late], resume=True, **settings)
    assert calls == [0.1, 0.2], "none of it is measured again"
    assert [row.attack for row in whole.results] == ["fgsm", "fgsm", "counted", "counted", "late", "late"]
    assert json.loads(out.read_text()) == {**whole.to_dict(), "note": "kept"}
    assert whole.complete
    few = evaluate(network(), data, ["clean"], resume=True, **settings)
    assert [row.attack for row in few.results][:2] == ["clean", "fgsm"], "what is not asked for now stays"
    new = evaluate(network(), data, ["clean"], overwrite=True, **settings)
    assert [row["attack"] for row in json.loads(out.read_text())["results"]] == ["clean"]
    assert new.accuracies == {"clean": 100.0}


def test_the_same_figures_as_without_a_stop(data: ImageDataset, tmp_path: Path) -> None:
    teacher = network(3.0)
    settings = {"eps": 0.2, "teacher": teacher}
    whole = evaluate(network(), data, ["pgd10", "cw"], out=tmp_path / "whole.json", **settings)
    with pytest.raises(KeyboardInterrupt):
        evaluate(network(), data, ["pgd10", stops], out=tmp_path / "x.json", **settings)
    resumed = evaluate(network(), data, ["pgd10", "cw"], out=tmp_path / "x.json", resume=True, **settings)
    for one, other in zip(whole.results, resumed.results, strict=True):
        assert (one.attack, one.standing, one.accuracy) == (other.attack, other.standing, other.accuracy)
    assert [(row.images, row.kl) for row in whole.fidelity] == [
        (row.images, row.kl) for row in resumed.fidelity
    ]
    assert resumed.warnings == whole.warnings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": network(2.0)}, "model is not the one it was begun with"),
        ({"data": "other"}, "data is not the one it was begun with"),
        ({"eps": [0.1, 0.2]}, r"eps was 0.1, and is \[0.1, 0.2\]"),
        ({"norm": "l2"}, "norm was linf, and is l2"),
        ({"seed": 3}, "seed was 0, and is 3"),
        ({"teacher": network(0.5)}, "teacher is not the one it was begun with"),
    ],
)
def test_only_the_same_is_continued(data: ImageDataset, tmp_path: Path, change: dict, said: str) -> None:  # type: ignore[type-arg]
    given = {"model": network(), "data": data, "attacks": ["fgsm"], "eps": 0.1, "teacher": network(3.0)}
    evaluate(**given, out=tmp_path / "x.json")
    before = (tmp_path / "x.json").read_bytes()
    if "data" in change:
        change = {"data": data.subset(torch.arange(19))}
    with pytest.raises(InputError, match=f"cannot be continued: {said}"):
        evaluate(**{**given, **change}, out=tmp_path / "x.json", resume=True)
    assert (tmp_path / "x.json").read_bytes() == before
    (tmp_path / "x.json").write_text('{"clean": 3}')
    with pytest.raises(InputError, match="holds nothing that can be continued"):
        evaluate(**given, out=tmp_path / "x.json", resume=True)
