"""A loss's own arithmetic keeps its digits, in half precision and near 1; a reduction is that of the KL terms alone.

Logits are whole numbers, which every dtype holds, so what a loss loses is its own doing.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from advfunmatch.methods import METHODS, Logits
from test_methods import configured, kl
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def hard_logits() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student on x and x', teacher on x and x', labels: sure of the label, sure of another class, and in between."""
    torch.manual_seed(0)
    student, student_adv, teacher, teacher_adv = torch.randint(-3, 4, (4, 60, 10)).double()
    labels = torch.randint(10, (60,))
    for index in range(48):
        gap, peak = (4, 12, 20, 35)[index % 4], int(labels[index])
        student[index, peak] += gap
        student_adv[index, (peak + index % 3) % 10] += gap
        teacher[index, peak] += gap
        teacher_adv[index, (peak + index % 2) % 10] += gap
    return student, student_adv, teacher, teacher_adv, labels


def loss_and_gradient(method: str, dtype: torch.dtype, **settings: object) -> tuple[Tensor, Tensor]:
    """The loss where both networks answer in that dtype, and its gradient at the student's logits on x and x'."""
    student, student_adv, teacher, teacher_adv, labels = hard_logits()
    leaves = torch.stack([student, student_adv]).requires_grad_()
    x, x_adv = torch.zeros(1), torch.ones(1)
    batch = Logits(
        lambda images: leaves[int(images)].to(dtype),
        lambda images: (teacher_adv if int(images) else teacher).to(dtype),
        x,
        labels,
        epoch=60,
    )
    batch.x_adv = x_adv
    with torch.autocast("cpu", dtype, enabled=dtype in HALVES):
        loss = METHODS[method].loss(batch, configured(method, **settings))
    loss.backward()
    assert leaves.grad is not None
    return loss.detach(), leaves.grad


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_logits_give_the_float64_loss(method: str, dtype: torch.dtype) -> None:
    expected, truth = loss_and_gradient(method, torch.float64)
    loss, gradient = loss_and_gradient(method, dtype)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=0)
    # The gradient is rounded once, on its way into the network: half an ulp, or half the smallest float16.
    torch.testing.assert_close(gradient, truth, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("method", ["mart", "iad"])
def test_probabilities_near_one_keep_their_complement(method: str) -> None:
    """1.0001 - p, 1.0000001 - p and 1 - p^β in float32, where p is 1 but for its last digits."""
    expected, truth = loss_and_gradient(method, torch.float64)
    loss, gradient = loss_and_gradient(method, torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-8)


def test_mart_of_a_row_that_is_sure_of_a_wrong_class() -> None:
    rows = torch.tensor([[10.0, 0.0, 0.0]])
    for dtype in (torch.float32, *HALVES):
        batch = Logits(lambda x, dtype=dtype: x.to(dtype), None, torch.zeros(1, 3), torch.tensor([1]), 0)
        batch.x_adv = rows
        loss = METHODS["mart"].loss(batch, configured("mart"))
        p = rows.double().softmax(1)
        by_hand = -p[0, 1].log() - (1.0001 - p[0, 0] + 1e-12).log()
        by_hand += 6 * kl(rows.double(), torch.zeros(1, 3).double())[0] * (1.0000001 - 1 / 3)
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_the_reduction_is_that_of_the_kl_terms_alone(reduction: str) -> None:
    s, s_adv, t, t_adv, y = hard_logits()

    scale = {"batchmean": 1 / len(y), "mean": 1 / s.numel(), "sum": 1.0}[reduction]

    def match(student: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
        return scale * kl(student, target, temperature).sum()

    doubt = 1 - t_adv.softmax(1).gather(1, y[:, None]).squeeze(1) ** 0.1
    by_hand = {
        "kd": 0.1 * F.cross_entropy(s, y) + 0.9 * 16 * match(s, t, 4.0),
        "ard": 0.5 * F.cross_entropy(s, y) + 0.5 * 900 * match(s_adv, t, 30.0),
        "trades": F.cross_entropy(s, y) + 6 * match(s_adv, s),
        "iad": match(s_adv, t) + scale * doubt @ kl(s_adv, s),
        "rslad": 5 / 6 * match(s_adv, t) + 1 / 6 * match(s, t),
        "adaad": match(s_adv, t_adv),
        "funmatch": match(s, t),
        "advfunmatch": match(s_adv, t_adv),
    }
    assert set(by_hand) == {name for name, method in METHODS.items() if "reduction" in (method.reads or ())}
    for name, expected in by_hand.items():
        settings = {"alpha": 0.5} if name == "ard" else {}
        loss, _ = loss_and_gradient(name, torch.float64, reduction=reduction, **settings)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0, msg=lambda m, name=name: f"{name}: {m}")
