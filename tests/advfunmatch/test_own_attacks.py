"""Attacks of one's own, and settings in text: what is handed over, what is checked, how results are told apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from advfunmatch import ImageDataset, InputError, PGDAttack, evaluate, register_attack
from advfunmatch.cli import run
from advfunmatch.evaluation import attack_images, attack_of, pgd, split_attacks
from torch import Tensor, nn


class Linear(nn.Module):
    """Three classes by a fixed linear map, so that every attack has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("weight", torch.randn(3, 48, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    """What the network is right about, so that accuracies begin at 100 %."""
    images = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return ImageDataset("rows", "test", images, Linear()(images).argmax(1), ("a", "b", "c"))


def test_each_attack_in_each_ball_has_a_row(data: ImageDataset) -> None:
    strong = PGDAttack("margin", norm="l2", eps=0.7, step_size=0.2, steps=7, seed=0)
    attacks = ["clean", "fgsm", pgd(steps=40, step_size=2 / 255), strong, "pgd(steps=3, norm=l2, eps=0.5)"]
    found = evaluate(Linear(), data, attacks, eps=["4/255", 8 / 255])
    rows = {(row.attack, row.norm, row.eps): row.accuracy for row in found.results}
    named = "PGDAttack(Margin, steps=7, step_size=0.2)"
    assert list(rows) == [
        ("clean", None, None),
        ("fgsm", "linf", 4 / 255),
        ("fgsm", "linf", 8 / 255),
        ("pgd(steps=40, step_size=2/255)", "linf", 4 / 255),
        ("pgd(steps=40, step_size=2/255)", "linf", 8 / 255),
        (named, "l2", 0.7),
        ("pgd(steps=3)", "l2", 0.5),
    ]
    # Of a linear network every one of these finds the same, which a call by hand gives too.
    for eps in (4 / 255, 8 / 255):
        weight, x, y = Linear().weight, data.images.flatten(1), data.labels
        margins = (weight[y][:, None] - weight[None]).abs().sum(2) * eps
        gaps = (x @ weight.T).gather(1, y[:, None]) - x @ weight.T
        unclipped = 100 * float((gaps > margins).sum(1).eq(2).double().mean())
        assert rows["fgsm", "linf", eps] >= rows["pgd(steps=40, step_size=2/255)", "linf", eps]
        assert rows["pgd(steps=40, step_size=2/255)", "linf", eps] >= unclipped
    flat = found.to_dict()
    assert set(flat) & {"clean", "fgsm", named} == {"clean", named}, (
        "a name with two figures has none of its own"
    )
    assert flat["settings"]["eps"] == [4 / 255, 8 / 255]
    assert {row["eps"] for row in json.loads(json.dumps(flat))["results"]} == {
        None,
        4 / 255,
        8 / 255,
        0.7,
        0.5,
    }


def test_an_attack_is_handed_what_it_names_and_its_settings_are_typed(data: ImageDataset) -> None:
    handed = []

    @register_attack("noise")
    def noise(
        model, x, y, *, eps, norm, seed, tries: int, share: float = 0.5, sign: bool = True, kind="flat"
    ):  # type: ignore[no-untyped-def]
        handed.append((len(x), eps, norm, seed, tries, share, sign, kind))
        return (x + eps * share * torch.rand(x.shape)).clamp(0, 1)

    text = "noise(tries=3, share=1/4, sign=false, kind='wide')"
    first = evaluate(Linear(), data, [text], eps=0.1, seed=5, batch_size=30)
    assert handed == [
        (30, 0.1, "linf", 5, 3, 0.25, False, "wide"),
        (10, 0.1, "linf", 6, 3, 0.25, False, "wide"),
    ]
    torch.manual_seed(1)
    again = evaluate(Linear(), data, [text], eps=0.1, seed=5, batch_size=30)
    assert first.results[0].standing == again.results[0].standing, "what it draws is seeded"
    assert first.results[0].attack == "noise(tries=3, share=0.25, sign=False, kind=wide)"
    for text, said in (
        ("noise", "needs tries"),
        ("noise(tries=2.5)", "tries of attack 'noise' is '2.5', but must be of type int"),
        ("noise(tries=1, sign=perhaps)", "must be of type bool"),
        ("noise(tries=1, times=2)", "setting of attack 'noise' is 'times', but must be one of: tries, share"),
        ("noise(tries=1", "must end with a parenthesis"),
        ("noise(3)", "must be NAME=VALUE"),
        ("noise(tries=1, tries=2)", "gives tries twice"),
        ("pgd(restarts=0)", "restarts must be at least 1"),
        ("pgd(step_size=eps/0)", "step_size"),
        ("pgd(objective=mismatch)", "objective of attack 'pgd' is 'mismatch'"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            evaluate(Linear(), data, [text], eps=0.1)
    with pytest.raises(InputError, match=r"attack 'noise' of .* is already registered by"):
        register_attack("noise")(noise)
    with pytest.raises(InputError, match="its name must be of letters"):
        register_attack("two words")(noise)
    with pytest.raises(InputError, match=r"must take \(model, x, y, ...\)"):
        register_attack("short")(lambda model, x: x)


def far(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return 1 - x


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ([far], r"attack 'far' moved an image by 0\.\d+ in linf, but eps is 0.1"),
        ({"out": lambda model, x, y: x + 0.099}, "attack 'out' returned values from .*, but images lie in"),
        ({"nan": lambda model, x, y: x * float("nan")}, "attack 'nan' returned images that are not finite"),
        ({"few": lambda model, x, y: x[:1]}, r"attack 'few' returned torch.float32 of shape \(1, 3, 4, 4\)"),
        ({"none": lambda model, x, y: None}, "attack 'none' returned NoneType"),
        ([lambda model, x, y: x], "attack is a lambda, which has no name"),
        (["fgsm", "fgsm"], "attack 'fgsm' is given twice"),
        (["pgd20", "pgd20(eps=0.1)"], "attack 'pgd20' would be measured twice"),
        (["clean(eps=0.1)"], "attack 'clean' takes no eps"),
        ([PGDAttack(eps=0.1)], r"attack 'PGDAttack\(Mismatch.* needs a teacher, which is missing"),
        ({"near": lambda model, x, y, *, teacher: x}, "attack 'near' needs a teacher"),
        ([PGDAttack], r"is the class PGDAttack, but must be one of its instances"),
    ],
)
def test_what_is_no_attack_in_the_ball_gives_no_figure(
    data: ImageDataset, attacks: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(Linear(), data, attacks, eps=0.1)  # type: ignore[arg-type]


def test_an_attack_without_eps_is_measured_in_one_ball(data: ImageDataset) -> None:
    assert evaluate(Linear(), data, [far], eps=1.0).results[0].ball.eps == 1.0  # type: ignore[union-attr]
    with pytest.raises(InputError, match="takes no eps, so it cannot be measured in 2 balls"):
        evaluate(Linear(), data, [far], eps=[0.5, 1.0])


def test_clean_needs_no_radius(data: ImageDataset) -> None:
    assert evaluate(Linear(), data, ["clean"]).accuracies == {"clean": 100.0}
    with pytest.raises(InputError, match="eps is missing, but mismatched examples"):
        evaluate(Linear(), data, ["clean"], teacher=Linear())


def test_progress_tells_how_far_each_attack_is(data: ImageDataset) -> None:
    told: list[tuple[str, int, int]] = []
    evaluate(
        Linear(),
        data,
        ["pgd10"],
        eps=0.1,
        batch_size=16,
        progress=lambda *what: told.append(what),
        teacher=Linear(),
    )
    name, near = "pgd10, 0.1 (linf)", "mismatched, 0.1 (linf)"
    assert list(dict.fromkeys(what for what, _, _ in told)) == [name, near]
    assert [done for what, done, total in told if what == near and total == 40] == [0, 16, 32, 40]
    autoattack: list[int] = []
    tell = {"progress": lambda what, done, total: autoattack.append(done)}
    evaluate(Linear(), data, ["autoattack"], eps=0.1, batch_size=10, **tell)  # type: ignore[arg-type]
    assert autoattack == sorted(autoattack)
    assert len(set(autoattack)) > 3, "it moves while its attacks run"


def test_text_is_split_outside_parentheses_only() -> None:
    assert split_attacks("clean,pgd(steps=40, restarts=5),cw") == ["clean", "pgd(steps=40, restarts=5)", "cw"]
    assert attack_of("pgd(step_size=2/255)").label == "pgd(step_size=2/255)"


def test_images_of_one_attack(data: ImageDataset) -> None:
    x_adv = attack_images("pgd(steps=2)", Linear(), data, eps=0.1)
    assert 0.05 < float((x_adv - data.images).abs().max()) <= 0.1 + 1e-6


class WithLogits(Linear):
    """As networks of transformers answer."""

    def forward(self, x: Tensor) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(x))


def test_objects_with_logits_are_measured_as_logits(data: ImageDataset) -> None:
    def seen(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(model(x), Tensor)
        return x

    settings = {"eps": 0.1, "teacher": Linear()}
    plain, wrapped = (
        evaluate(network(), data, ["fgsm", "pgd10", seen], **settings) for network in (Linear, WithLogits)
    )
    assert [row.standing for row in wrapped.results] == [row.standing for row in plain.results]
    assert wrapped.kl_mismatched == plain.kl_mismatched


def test_a_file_brings_an_attack_to_the_command_line(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from advfunmatch import register_attack\n"
        "@register_attack('darker')\n"
        "def darker(model, x, y, *, eps, share: float = 1.0):\n"
        "    return (x - share * eps).clamp(0, 1)\n"
    )
    command = ["evaluate", "--checkpoint", teacher, "--data", "digits", "--limit", "20", "--import"]
    command += [
        str(tmp_path / "mine.py"),
        "--attacks",
        "clean,darker(share=1/2)",
        "--out",
        str(tmp_path / "x.json"),
    ]
    assert run(command) == 0
    row = json.loads((tmp_path / "x.json").read_text())["results"][1]
    assert (row["attack"], row["norm"], row["eps"]) == ("darker(share=0.5)", "linf", 0.15)
