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
    divergence_score,
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


def gradients_of(objective: object, *known: torch.Tensor | None) -> list[torch.Tensor]:
    """An objective's directions times what it says they have been divided by."""
    directions = objective(*known)
    scale = objective.log_scale(*known).exp().unsqueeze(1)
    return [d * scale for d in (directions if isinstance(directions, tuple) else (directions,))]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mismatch_is_the_gradient_of_the_kl_on_both_sides(temperature: float) -> None:
    student, teacher, _ = logits()
    got = gradients_of(Mismatch(temperature), student, teacher, None)
    leaves = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    want = torch.autograd.grad(kl(*leaves, temperature), leaves)
    torch.testing.assert_close(got, list(want), rtol=1e-10, atol=1e-12)


def test_mismatch_without_the_teachers_gradient_moves_the_student_only() -> None:
    student, teacher, _ = logits()
    objective = Mismatch(teacher_gradient=False)
    assert objective.teacher == "detached"
    (got,) = gradients_of(objective, student, teacher, None)
    torch.testing.assert_close(got, gradients_of(Mismatch(), student, teacher, None)[0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_fixed_teacher_is_the_students_gradient_of_the_kl(temperature: float) -> None:
    student, teacher, _ = logits()
    leaf = student.clone().requires_grad_()
    (want,) = torch.autograd.grad(kl(leaf, teacher, temperature), leaf)
    (got,) = gradients_of(FixedTeacher(temperature), student, teacher, None)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("targeted", [False, True])
def test_cross_entropy_is_the_gradient_of_the_cross_entropy(targeted: bool) -> None:
    student, _, labels = logits()
    leaf = student.clone().requires_grad_()
    loss = F.cross_entropy(leaf, labels, reduction="sum")
    (want,) = torch.autograd.grad(-loss if targeted else loss, leaf)
    (got,) = gradients_of(CrossEntropy(targeted), student, None, labels)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mismatch", "fixed_teacher", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_as_large_where_everything_is_certain(name: str, dtype: torch.dtype) -> None:
    """p - onehot and q - p are 0 here in any dtype: what the obvious forms would have given."""
    student = torch.tensor([[3e30, 0.0, -1e30, 1e30]]).to(dtype)
    teacher = torch.tensor([[3e30, 1e30, -1e30, 0.0]]).to(dtype)
    directions = create_objective(name)(student, teacher, torch.tensor([0]))
    directions = torch.stack(directions if isinstance(directions, tuple) else (directions,))
    assert directions.isfinite().all()
    assert directions.abs().max() >= 0.5
    assert not directions.float().sum(-1).any()
    if name == "cross_entropy":
        assert directions[0].tolist() == [[-1.0, 0.0, 0.0, 1.0]]  # the softmax over the other classes


def test_one_class_has_no_gradient() -> None:
    labels = torch.tensor([0])
    assert CrossEntropy()(torch.zeros(1, 1), None, labels).tolist() == [[0.0]]
    assert CrossEntropy()(torch.tensor([[1.0, -torch.inf]]), None, labels).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("gap", [1.0, 30.0, 3000.0, 1e30])
def test_scores_tell_divergences_apart_that_underflow(gap: float) -> None:
    """The farther the runner-ups are below the class that both are certain of, the smaller the KL."""
    student = torch.tensor([[4.0, 1.0, 0.0], [4.0, 1.5, 0.0], [4.0, 2.0, 0.0], [4.0, 2.0, 0.0]]) * gap
    teacher = torch.tensor([[4.0, 0.0, 1.0], [4.0, 0.0, 1.5], [4.0, 0.0, 2.0], [4.0, 2.0, 0.0]]) * gap
    score = divergence_score(student, teacher)
    assert score[0] < score[1] < score[2]
    assert score[3] == (0 if gap < 1e3 else -torch.inf) or score[3] == -torch.inf
    assert divergence_score(student.double(), teacher.double()).argsort()[-1] == 2


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
