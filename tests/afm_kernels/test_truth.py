"""The judges of the other tests: the float64 truth against rows worked out class by class, and those by hand."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch
from samples import SAMPLES, draw
from truth import brute_force_row, certain_divergence, truth_divergence

from afm_kernels.ops import DIVERGENCES


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "name", [n for n in SAMPLES if not n.startswith(("vocab", "classes_100", "many", "near"))]
)
def test_truth_is_the_brute_force(name: str, divergence: str) -> None:
    sample = draw(name)
    student, teacher = (x.double().reshape(-1, x.shape[-1])[:60] for x in sample.class_last())
    truth = truth_divergence(student, teacher, sample.temperature, divergence, 0.3)
    for row, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        force = brute_force_row(s, t, sample.temperature, divergence, 0.3)
        for got, wanted in zip(truth, force, strict=True):
            torch.testing.assert_close(
                got[row], torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-13, equal_nan=True
            )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_hard_table_by_hand(divergence: str) -> None:
    """Some cells of Note [Hard rows] worked out on paper, so that truth.py is not the only judge."""
    ln2, inf, nan = 0.6931471805599453, float("inf"), float("nan")
    # Two classes; the teacher is certain of the second, the student undecided.
    value, by_student, by_teacher = brute_force_row([0.0, 0.0], [-inf, 0.0], 1.0, divergence, 0.5)
    if divergence == "kl":  # log 2; q - p = (1/2, -1/2)
        assert value == pytest.approx(ln2)
        assert by_student == pytest.approx([0.5, -0.5])
        assert by_teacher == pytest.approx([0.0, 0.0])
    elif divergence == "js":  # m = (1/4, 3/4): ½ log 4/3 + ½ (½ log 2 + ½ log 2/3)
        assert value == pytest.approx(0.21576155433883565)
        assert by_teacher == pytest.approx([0.0, 0.0])
        assert by_student == pytest.approx([0.13732653608351372, -0.13732653608351372])
    else:
        assert value == inf
        assert by_student == pytest.approx([nan, nan], nan_ok=True)


def _decimal_gradients(
    student: list[float], teacher: list[float], divergence: str, beta: float
) -> tuple[list[Decimal], list[Decimal]]:
    """By student and teacher, from the definitions; in as many digits as the context has."""

    def softmax(row: list[float]) -> list[Decimal]:
        exponentials = [Decimal(x).exp() for x in row]
        return [e / sum(exponentials) for e in exponentials]

    q, p = softmax(student), softmax(teacher)
    b = Decimal(beta)
    m = [b * y + (1 - b) * x for x, y in zip(q, p, strict=True)]

    def slope(of: list[Decimal], to: list[Decimal]) -> list[Decimal]:
        """The gradient of Σ of log(of / to) by the logits of ``of``."""
        logs = [(x / y).ln() for x, y in zip(of, to, strict=True)]
        mean = sum(x * y for x, y in zip(of, logs, strict=True))
        return [x * (y - mean) for x, y in zip(of, logs, strict=True)]

    if divergence == "js":
        return [(1 - b) * x for x in slope(q, m)], [b * x for x in slope(p, m)]
    nothing = [Decimal(0)] * len(q)
    forward, reverse = divergence != "reverse_kl", divergence != "kl"
    difference = [x - y for x, y in zip(q, p, strict=True)]
    parts = (
        (difference if forward else nothing, slope(q, p) if reverse else nothing),
        (slope(p, q) if forward else nothing, [-x for x in difference] if reverse else nothing),
    )
    return tuple([x + y for x, y in zip(*side, strict=True)] for side in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.3, 1 - 1e-6])
def test_certain_rows_to_eighty_digits(divergence: str, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for gap_student, gap_teacher, together in ((0, 60, True), (85, 0, True), (30, 60, True), (60, 30, False)):
        student, teacher = torch.randn(2, 1, 7, generator=generator, dtype=torch.float64)
        student[0, 3] += gap_student
        teacher[0, 3 if together else 5] += gap_teacher
        with localcontext(prec=80):
            wanted = _decimal_gradients(student[0].tolist(), teacher[0].tolist(), divergence, beta)
        got = certain_divergence(student, teacher, 1.0, divergence, beta)
        for gradient, digits in zip(got, wanted, strict=True):
            exact = torch.tensor([float(x) for x in digits], dtype=torch.float64)
            assert (gradient[0] - exact).norm() <= 1e-8 * exact.norm()
