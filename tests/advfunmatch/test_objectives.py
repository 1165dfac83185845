"""Objectives: their logit gradients against autograd through the loss each one names, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from advfunmatch.attacks.objectives import (
    OBJECTIVES,
    CrossEntropy,
    FixedTeacher,
    Margin,
    Mismatch,
    create_objective,
)

SEED = 0


def logits(rows: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    student = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3
    teacher = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_q, log_p = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mismatch_is_the_gradient_of_the_kl_on_both_sides(temperature: float) -> None:
    student, teacher, _ = logits()
    got = Mismatch(temperature)(student, teacher, None)
    leaves = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    want = torch.autograd.grad(kl(*leaves, temperature), leaves)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_mismatch_without_the_teachers_gradient_moves_the_student_only() -> None:
    student, teacher, _ = logits()
    objective = Mismatch(teacher_gradient=False)
    assert objective.teacher == "detached"
    torch.testing.assert_close(objective(student, teacher, None), Mismatch()(student, teacher, None)[0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_fixed_teacher_is_the_students_gradient_of_the_kl(temperature: float) -> None:
    student, teacher, _ = logits()
    leaf = student.clone().requires_grad_()
    (want,) = torch.autograd.grad(kl(leaf, teacher, temperature), leaf)
    torch.testing.assert_close(
        FixedTeacher(temperature)(student, teacher, None), want, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("targeted", [False, True])
def test_cross_entropy_is_the_gradient_of_the_cross_entropy(targeted: bool) -> None:
    student, _, labels = logits()
    leaf = student.clone().requires_grad_()
    loss = F.cross_entropy(leaf, labels, reduction="sum")
    (want,) = torch.autograd.grad(-loss if targeted else loss, leaf)
    torch.testing.assert_close(CrossEntropy(targeted)(student, None, labels), want, rtol=1e-10, atol=1e-12)


def test_cross_entropy_keeps_the_labels_entry_where_p_minus_one_rounds_to_zero() -> None:
    student = torch.tensor([[30.0, 0.0, -1.0]])
    gradient = CrossEntropy()(student, None, torch.tensor([0]))
    want = student.double().softmax(1)
    want = torch.cat([-want[:, 1:].sum(1, keepdim=True), want[:, 1:]], 1).float()
    torch.testing.assert_close(gradient, want, rtol=1e-5, atol=0.0)
    assert F.softmax(student, 1)[0, 0] - 1 == 0  # what the obvious form would have given


@pytest.mark.parametrize("targeted", [False, True])
def test_margin_is_the_gradient_of_the_margin(targeted: bool) -> None:
    student, _, labels = logits()
    leaf = student.clone().requires_grad_()
    own = leaf.gather(1, labels[:, None]).squeeze(1)
    best = leaf.scatter(1, labels[:, None], -torch.inf).amax(1)
    (want,) = torch.autograd.grad(((own - best) if targeted else (best - own)).sum(), leaf)
    torch.testing.assert_close(Margin(targeted)(student, None, labels), want)


def test_margin_stops_at_its_confidence() -> None:
    student = torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    gradient = Margin(confidence=2.0)(student, None, torch.tensor([0, 0]))
    assert gradient.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


@pytest.mark.parametrize("objective", [CrossEntropy(), Margin(), CrossEntropy(True), Margin(True)])
def test_score_is_positive_exactly_where_the_attack_succeeded(objective: CrossEntropy) -> None:
    student, _, labels = logits(rows=50)
    success = objective.success(student, None, labels)
    assert 0 < success.sum() < 50
    assert torch.equal(objective.score(student, None, labels) > 0, success)


@pytest.mark.parametrize("name", ["mismatch", "fixed_teacher"])
def test_score_is_the_rows_kl(name: str) -> None:
    student, teacher, _ = logits()
    score = create_objective(name, temperature=2.0).score(student, teacher, None)
    torch.testing.assert_close(score.sum(), kl(student, teacher, 2.0))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_their_logits_dtype(name: str, dtype: torch.dtype) -> None:
    student, teacher, labels = logits()
    gradients = create_objective(name)(student.to(dtype), teacher.to(dtype), labels)
    for gradient in gradients if isinstance(gradients, tuple) else (gradients,):
        assert gradient.dtype == dtype


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nonsense", {}, "mismatch, fixed_teacher, cross_entropy, margin"),
        ("mismatch", {"targeted": True}, "targeted"),
        ("cross_entropy", {"temperature": 2.0}, "temperature"),
        ("mismatch", {"temperature": 0.0}, "temperature must be positive"),
        ("mismatch", {"temperature": float("nan")}, "temperature must be positive"),
    ],
)
def test_bad_options_are_named(name: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_objective(name, **options)
