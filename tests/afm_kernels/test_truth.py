"""The judges of the other tests: the float64 truth against rows worked out class by class, and those by hand."""

from __future__ import annotations

import pytest
import torch
from samples import SAMPLES, draw
from truth import brute_force_row, truth_divergence

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
