"""Evaluation: figures against what the attacks give when called by hand, and repeatability."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from advfunmatch import InputError, evaluate, load_dataset, load_model
from advfunmatch.evaluation import margin_warnings, masking_warnings
from pyautoattack import AutoAttack

EPS = 0.1


@pytest.fixture(scope="module")
def small_test() -> object:
    return load_dataset("digits", split="test", limit=24)


def test_clean_accuracy_and_fidelity_by_hand(teacher: str) -> None:
    data = load_dataset("digits", split="test")
    model = load_model(teacher)
    other = load_model(teacher)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
        x = data.images.float() / 255
        ours, theirs = model(x), other(x)
    result = evaluate(model, data, ["clean"], eps=EPS, teacher=other)
    assert result.accuracies["clean"] == pytest.approx(
        100 * float((ours.argmax(1) == data.labels).double().mean()), abs=0.01
    )
    assert result.agreement == pytest.approx(
        100 * float((ours.argmax(1) == theirs.argmax(1)).double().mean()), abs=0.01
    )
    kl = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
    assert result.kl_clean == pytest.approx(float(kl), rel=1e-3)
    assert result.kl_mismatched > 2 * result.kl_clean


def test_a_network_agrees_with_itself(teacher: str, small_test) -> None:  # type: ignore[no-untyped-def]
    model = load_model(teacher)
    result = evaluate(model, small_test, ["clean"], eps=EPS, teacher=load_model(teacher))
    assert result.agreement == result.agreement_mismatched == 100
    assert result.kl_clean == pytest.approx(0, abs=1e-9)
    assert result.kl_mismatched == pytest.approx(0, abs=1e-9)


def nearest_mean_classifier() -> torch.nn.Module:
    """A linear digit classifier, fast enough for AutoAttack's thousands of queries."""
    train = load_dataset("digits", split="train")
    images = train.images.flatten(1).float() / 255
    means = torch.stack([images[train.labels == digit].mean(0) for digit in range(10)])
    linear = torch.nn.Linear(64, 10)
    with torch.no_grad():
        linear.weight.copy_(means)
        linear.bias.copy_(-means.square().sum(1) / 2)
    return torch.nn.Sequential(torch.nn.Flatten(), linear)


def test_autoattack_equals_a_call_by_hand(small_test) -> None:  # type: ignore[no-untyped-def]
    model = nearest_mean_classifier()
    result = evaluate(model, small_test, ["clean", "pgd20", "autoattack_official"], eps=0.08, seed=1)
    images = small_test.images.float() / 255
    adversary = AutoAttack(model, eps=0.08, norm="Linf", seed=1)
    x_adv, _ = adversary.run_standard_evaluation(images, small_test.labels, batch_size=500)
    by_hand = 100 * float((model(x_adv).argmax(1) == small_test.labels).double().mean())
    assert 0 < by_hand < 100, "neither all nor none, or the comparison says nothing"
    assert result.accuracies["autoattack_official"] == pytest.approx(by_hand, abs=0.01)
    assert (
        result.accuracies["autoattack_official"] <= result.accuracies["pgd20"] <= result.accuracies["clean"]
    )


def test_same_seed_same_figures_and_the_model_is_left_as_it_was(teacher: str, small_test) -> None:  # type: ignore[no-untyped-def]
    model = load_model(teacher).train().requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate(model, small_test, ["pgd20"], eps=EPS, seed=5)
    again = evaluate(model, small_test, ["pgd20"], eps=EPS, seed=5)
    assert first.accuracies == again.accuracies
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def fails(model: object, x: object, y: object) -> torch.Tensor:
    raise RuntimeError("an attack that fails")


@pytest.mark.parametrize("attacks", [["clean"], ["clean", "fgsm"], [fails]])
def test_each_module_is_left_in_its_mode(
    attacks: list[object],
    teacher: str,
    small_test,  # type: ignore[no-untyped-def]
) -> None:
    networks = load_model(teacher).train(), load_model(teacher).train()
    for network in networks:
        next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    before = [[module.training for module in network.modules()] for network in networks]
    with pytest.raises(RuntimeError) if fails in attacks else nullcontext():
        evaluate(networks[0], small_test, attacks, eps=EPS, teacher=networks[1])
    assert [[module.training for module in network.modules()] for network in networks] == before


def test_autoattack_leaves_the_callers_generators_alone(small_test) -> None:  # type: ignore[no-untyped-def]
    def seeded() -> None:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)

    def drawn() -> list[float]:
        return [float(torch.rand(())), np.random.rand(), random.random()]

    model = nearest_mean_classifier()
    seeded()
    expected = drawn()
    seeded()
    evaluate(model, small_test, ["autoattack", "autoattack_official"], eps=0.5, seed=1)
    assert drawn() == expected


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_figures(
    without_gradients: type[torch.no_grad],
    small_test,  # type: ignore[no-untyped-def]
) -> None:
    model, attacks = nearest_mean_classifier(), ["pgd10", "autoattack"]
    expected = evaluate(model, small_test, attacks, eps=0.5).accuracies
    with without_gradients():
        assert evaluate(model, small_test, attacks, eps=0.5).accuracies == expected


class Returns(torch.nn.Module):
    """A network that makes what it returns of the flattened images."""

    def __init__(self, make: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> object:
        return self.make(x.flatten(1))


@pytest.mark.parametrize("what", ["model", "teacher"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x[:, :5], r"returns 5 logits, but data 'digits' has 10 classes"),
        (lambda x: x[:, :10, None], r"returns torch.float32 of shape \(2, 10, 1\), but must return"),
        (lambda x: x.mean(0, keepdim=True), r"returns torch.float32 of shape \(1, 64\), but must return"),
        (lambda x: x[:, :10].long(), "returns torch.int64"),
        (lambda x: (x, x), r"returns tuple, but must return .* logits \(N, C\), here \(2, 10\)"),
        (lambda x: x.reshape(3, 5, 7), "cannot take images of 8×8 pixels"),
        (lambda x: [x][1], "cannot take images of 8×8 pixels: list index out of range"),
    ],
)
def test_a_network_that_does_not_return_logits(
    what: str,
    make: Callable[[torch.Tensor], object],
    message: str,
    small_test,  # type: ignore[no-untyped-def]
) -> None:
    networks = {"model": torch.nn.Flatten(), "teacher": torch.nn.Flatten(), what: Returns(make)}
    with pytest.raises(InputError, match=f"{what} {message}"):
        evaluate(data=small_test, attacks=["clean"], eps=EPS, **networks)


def test_a_teacher_with_other_logits_is_refused_before_any_attack(
    small_test,  # type: ignore[no-untyped-def]
) -> None:
    def never(model: object, x: object, y: object) -> torch.Tensor:
        raise AssertionError("attacked")

    with pytest.raises(InputError, match="teacher returns 12 logits, but model 64"):
        evaluate(torch.nn.Flatten(), small_test, [never], eps=EPS, teacher=Returns(lambda x: x[:, :12]))


def test_attacks_may_come_from_a_generator(small_test) -> None:  # type: ignore[no-untyped-def]
    names = (name for name in ("clean", "fgsm"))
    assert list(evaluate(torch.nn.Flatten(), small_test, names, eps=EPS).accuracies) == ["clean", "fgsm"]


def test_three_classes_are_attacked_too(small_test) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    three = replace(small_test.subset(small_test.labels < 3), class_names=("0", "1", "2"))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    left = evaluate(model, three, ["clean", "pgd20", "autoattack"], eps=0.1).accuracies
    assert left["autoattack"] <= left["pgd20"] <= left["clean"]


def test_unknown_attack_lists_what_there_is(teacher: str, small_test) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=r"attack is 'pdg', but must be one of: clean, .*autoattack"):
        evaluate(load_model(teacher), small_test, ["pdg"], eps=EPS)
    with pytest.raises(InputError, match="attacks is empty"):
        evaluate(load_model(teacher), small_test, [], eps=EPS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, "eps is 8, .*try 8/255"),
        ({"eps": "8/0"}, "eps is '8/0', but must be a number or a fraction"),
        ({"norm": "l1"}, "norm is 'l1', but must be one of: linf, l2"),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"eps": None, "attacks": ["fgsm"]}, "eps is missing, but attack 'fgsm' needs the radius"),
        ({"eps": True}, "eps is True, but must be a number"),
        ({"batch_size": 2.5}, "batch_size is 2.5, but must be of type int"),
        ({"seed": None}, "seed is None, but must be of type int"),
        ({"seed": True}, "seed is True, but must be of type int"),
        ({"attacks": "clean"}, "attacks is 'clean', but must be a list"),
        ({"attacks": None}, "attacks is None, but must be a list"),
        ({"attacks": [["clean"]]}, r"attack is \['clean'\], but must be one of: clean"),
        ({"model": "checkpoint.pt"}, "model is of type str, but must be a torch.nn.Module"),
        ({"teacher": "checkpoint.pt"}, "teacher is of type str, but must be a torch.nn.Module"),
        ({"data": "digits"}, "data is of type str, but must be an ImageDataset"),
        ({"model": torch.nn.Linear(3, 10)}, r"model cannot take images of 8×8 pixels: mat1 and mat2"),
        ({"teacher": torch.nn.Linear(3, 10)}, r"teacher cannot take images of 8×8 pixels: mat1 and mat2"),
    ],
)
def test_what_cannot_be_is_named(small_test, settings: dict, message: str) -> None:  # type: ignore[no-untyped-def]
    given = {"model": torch.nn.Flatten(), "data": small_test, "attacks": ["clean"], "eps": "8/255"}
    evaluate(**given)  # a module without parameters is a model, too
    with pytest.raises(InputError, match=message):
        evaluate(**{**given, **settings})


def test_data_that_nothing_can_be_measured_on(small_test) -> None:  # type: ignore[no-untyped-def]
    for data, message in (
        (small_test.subset(torch.arange(0)), "data 'digits' has no images"),
        (replace(small_test, class_names=("0", "1")), "labels from 1 to 9, but only 2 class names"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(torch.nn.Flatten(), data, ["clean"], eps=EPS)


def test_stronger_attacks_leave_less(teacher: str, small_test) -> None:  # type: ignore[no-untyped-def]
    left = evaluate(
        load_model(teacher), small_test, ["clean", "fgsm", "pgd20", "pgd100", "cw_pgd"], eps=0.08
    ).accuracies
    by_luck = 100 / len(small_test)  # one image, which a weaker attack may break and a stronger one not
    assert left["fgsm"] < left["clean"] - 2 * by_luck
    for weak, strong in (("fgsm", "pgd20"), ("pgd20", "pgd100"), ("pgd20", "cw_pgd")):
        assert left[strong] <= left[weak] + by_luck


def test_per_class_accuracies_make_up_the_whole(teacher: str) -> None:
    data = load_dataset("digits", split="test")
    result = evaluate(load_model(teacher), data, ["clean"], eps=EPS)
    counts = data.labels.bincount(minlength=10)
    assert list(result.per_class["clean"]) == [str(digit) for digit in range(10)]
    whole = (
        sum(float(n) * share for n, share in zip(counts, result.per_class["clean"].values(), strict=True))
        / 360
    )
    assert whole == pytest.approx(result.accuracies["clean"], abs=0.02)


def test_masked_gradients_are_flagged() -> None:
    assert masking_warnings({"fgsm": 40.0, "pgd20": 50.0}) == [
        "fgsm leaves 40 % but pgd20 50 %: one step does more than twenty, so gradients may be masked"
    ]
    assert "has not converged" in masking_warnings({"pgd20": 60.0, "pgd100": 50.0})[0]
    assert (
        masking_warnings({"clean": 90.0, "fgsm": 60.0, "pgd20": 55.0, "pgd100": 54.0, "autoattack": 51.0})
        == []
    )


def test_a_network_without_gradients_is_flagged(small_test) -> None:  # type: ignore[no-untyped-def]
    class Masked(torch.nn.Module):
        """Rounds its input, so that no gradient reaches the images."""

        def __init__(self) -> None:
            super().__init__()
            self.network = nearest_mean_classifier()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network((x * 4).round() / 4)

    result = evaluate(
        Masked(), small_test.subset(torch.arange(8)), ["pgd20", "autoattack", "autoattack_official"], eps=0.3
    )
    for said in ("of 8 images have a gradient of exactly zero", "Square Attack has decreased"):
        assert any(said in warning for warning in result.warnings), result.warnings


class Certain(torch.nn.Module):
    """The nearest mean in a unit that leaves nothing uncertain; blind to the images that are darker than ``blind``."""

    def __init__(self, unit: float, blind: float = 0.0) -> None:
        super().__init__()
        self.network, self.unit, self.blind = nearest_mean_classifier(), unit, blind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x.flatten(1).mean(1).detach() >= self.blind
        return self.network(torch.where(seen.view(-1, 1, 1, 1), x, x.detach())) * self.unit


def test_robust_accuracy_does_not_depend_on_the_unit_of_the_logits(small_test) -> None:  # type: ignore[no-untyped-def]
    attacks = ["pgd20", "cw_pgd"]
    found = [evaluate(Certain(unit), small_test, attacks, eps=0.08) for unit in (10.0, 1e6)]
    assert 0 < found[0].accuracies["pgd20"] < 100
    for name in attacks:
        assert found[1].accuracies[name] == pytest.approx(found[0].accuracies[name], abs=4.5)  # an image
    assert not found[1].warnings
    assert not found[1].zero_gradients


def test_images_without_a_gradient_are_counted_and_said(small_test) -> None:  # type: ignore[no-untyped-def]
    model = Certain(1.0, blind=0.3)
    x = small_test.images.flatten(1).float() / 255
    result = evaluate(model, small_test, ["clean", "fgsm"], eps=1e-3)
    blind = int((x.mean(1) < 0.3).sum())
    assert 0 < blind < len(x)
    assert result.to_dict()["zero_gradients"] == {"fgsm": blind}
    assert f"fgsm: the gradient of {blind} of {len(x)} images was exactly zero" in result.warnings[0]


def test_no_image_ends_below_its_own_divergence(small_test) -> None:  # type: ignore[no-untyped-def]
    """Certain networks that agree: steps overshoot, and the last iterate was often worse than the image."""
    student, teacher = Certain(300.0), Certain(200.0)
    result = evaluate(student, small_test, ["clean"], eps=0.005, teacher=teacher)
    assert result.kl_mismatched >= result.kl_clean > 0


def test_what_only_the_margin_breaks_is_said() -> None:
    standing = {"pgd20": torch.ones(40, dtype=torch.bool), "cw_pgd": torch.arange(40) >= 3}
    assert margin_warnings(standing)[0].startswith("cw_pgd breaks 7.5 % of the images that pgd20 leaves")
    standing["cw_pgd"] = torch.arange(40) >= 2  # 5 %
    assert not margin_warnings(standing)
    assert not margin_warnings({"cw_pgd": standing["cw_pgd"]})


def test_a_radius_of_the_other_norm_is_pointed_out(small_test, recwarn) -> None:  # type: ignore[no-untyped-def]
    result = evaluate(Certain(1.0), small_test, ["pgd10"], eps=8 / 255, norm="l2")
    assert "0.5 = 128/255 is usual" in result.warnings[0]
    assert not [w for w in recwarn if "radius of linf" in str(w.message)]  # said once
