"""The direction of KL's gradients against exact arithmetic: where nothing underflows, and far beyond."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from samples import DTYPE_PAIRS, Sample, draw
from torch import Tensor

from afm_kernels import softmax_kl_direction, softmax_kl_div_grad

STEM = "softmax_kl_direction"
SEED = 0

# Of a row's largest entry: a few roundings of the accumulation dtype, and that of the result.
ALLOWED = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
WRT = (("student", "teacher"), ("student",), ("teacher",))


def exact_row(student: list[float], teacher: list[float], temperature: float) -> tuple[list, list]:
    """KL's gradients of one row by student and teacher, in as many digits as the row takes."""
    finite = [x for x in student + teacher if x > -math.inf]
    with mpmath.workdps(40 + int((max(finite) - min(finite)) / temperature)):
        e_s = [mpmath.exp(mpmath.mpf(x) / temperature) for x in student]
        e_t = [mpmath.exp(mpmath.mpf(x) / temperature) for x in teacher]
        q, p = [x / sum(e_s) for x in e_s], [x / sum(e_t) for x in e_t]
        gap = [mpmath.log(a / b) if a > 0 else mpmath.mpf(0) for a, b in zip(p, q, strict=True)]
        kl = sum(a * g for a, g in zip(p, gap, strict=True))
        by_student = [(b - a) / temperature for a, b in zip(p, q, strict=True)]
        return by_student, [a * (g - kl) / temperature for a, g in zip(p, gap, strict=True)]


def assert_direction(
    student: Tensor, teacher: Tensor, wrt: tuple[str, ...], temperature: float = 1.0
) -> None:
    """Every row against ``exact_row``: entries by the row's largest, and log_scale."""
    to_student, to_teacher, log_scale = softmax_kl_direction(
        student, teacher, wrt=wrt, temperature=temperature
    )
    for i in range(len(student)):
        sides = exact_row(student[i].tolist(), teacher[i].tolist(), temperature)
        wanted = [
            (got[i].double().cpu(), side, ALLOWED[got.dtype])
            for got, side in ((to_student, sides[0]), (to_teacher, sides[1]))
            if got is not None
        ]
        largest = max(abs(x) for _, side, _ in wanted for x in side)
        # Against the row's largest of both: a power of two is theirs to choose.
        scale = max(got.abs().max().item() for got, _, _ in wanted)
        assert 0.49 < scale <= 1, f"row {i}: the largest entry is {scale}"
        for got, side, allowed in wanted:
            truth = torch.tensor([float(x / largest) for x in side], dtype=torch.float64)
            error = float((got / scale - truth).abs().max())
            narrowest = max(allowed, *(a for _, _, a in wanted))
            assert error <= 2 * narrowest, f"row {i}: {got} for {truth}, off by {error}"
        # As close as the number itself, and as the entry that it is told by, can say it.
        off = abs(float(mpmath.log(largest / scale)) - log_scale[i].item())
        slack = (1e-12 if log_scale.dtype == torch.float64 else 1e-6) * (2 + abs(log_scale[i].item()))
        assert off <= slack + 2 * max(a for _, _, a in wanted)


@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("unit", [1e-3, 1.0, 25.0, 120.0])
def test_equals_exact_arithmetic_in_any_unit(
    device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype, unit: float
) -> None:
    generator = torch.Generator().manual_seed(SEED)
    student, teacher = (3 * torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher[1] = student[1] + teacher[1] / 500  # near each other
    student[2, 3], teacher[2, 3] = 9.0, 8.0  # certain of one class
    student = (student * unit).to(device, student_dtype)
    teacher = (teacher * unit).to(device, teacher_dtype)
    for wrt in WRT:
        assert_direction(student, teacher, wrt, temperature=1.5)


ROWS = {
    # Classes that differ by as much stay together: the direction comes from far below them.
    "the two largest tie": ([500.0, 500.0, 12.0, 0.0], [500.0, 500.0, 30.0, 1.0]),
    "runner-up moves with the largest": ([500.0, 492.0, 100.0, 0.0], [480.0, 472.0, 50.0, 1.0]),
    "sides are certain of different classes": ([0.0, 300.0, 1.0], [300.0, 0.0, 1.0]),
    "the teacher alone is certain": ([0.0, 0.5, 1.0], [300.0, 0.0, 1.0]),
    "an offset on one side": ([1e3 + 200, 1e3, 1e3 + 1], [200.0, 0.0, 4.0]),
    "excluded by the teacher": ([200.0, 0.0, 1.0], [200.0, 1.0, -math.inf]),
    "excluded by both": ([200.0, 0.0, -math.inf, 7.0], [200.0, 1.0, -math.inf, 9.0]),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_one_trouble(device: torch.device, name: str, dtype: torch.dtype) -> None:
    student, teacher = (torch.tensor([row], dtype=dtype, device=device) for row in ROWS[name])
    for wrt in WRT:
        assert_direction(student, teacher, wrt)


@pytest.mark.parametrize("classes", [130, 1500, 4099])
def test_long_rows(device: torch.device, classes: int) -> None:
    """Certain rows of more classes than lanes, tiles and blocks hold, against float64 that does not underflow yet."""
    generator = torch.Generator().manual_seed(SEED)
    student, teacher = (3 * torch.randn(4, classes, generator=generator) for _ in range(2))
    student[:2, classes - 1] += 60  # exp(-60) is far below float32's rounding of 1, and fine in float64
    teacher[:2, classes - 1] += 50
    student, teacher = student.to(device), teacher.to(device)
    got = softmax_kl_direction(student, teacher)
    want = softmax_kl_direction(student.double(), teacher.double())
    for mine, exact in zip(got[:2], want[:2], strict=True):
        scale = torch.exp(got[2].double() - want[2]).unsqueeze(1)
        torch.testing.assert_close(mine.double() * scale, exact, rtol=0, atol=2e-5)
    log_p, log_q = teacher[:2].double().log_softmax(1), student[:2].double().log_softmax(1)
    others = (log_q.exp() - log_p.exp())[:, :-1].cpu()  # no cancellation there
    mine = got[0][:2, :-1].double().cpu()
    mine, others = (side / side.norm(dim=1, keepdim=True) for side in (mine, others))
    torch.testing.assert_close(mine, others, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["hard_rows", "classes_10", "channels_last", "sliced", "near_1e-2"])
def test_is_the_gradient_divided_by_its_scale(device: torch.device, name: str) -> None:
    """Where the gradients themselves can be had: any layout, NaN in the same rows, zeros where both are."""
    sample: Sample = draw(name, seed=SEED, device=device, dtype=torch.float64)
    got = softmax_kl_direction(sample.student, sample.teacher, dim=sample.dim)
    want = softmax_kl_div_grad(sample.student, sample.teacher, dim=sample.dim)
    assert got[2].shape == sample.rows
    scale = got[2].exp().unsqueeze(sample.dim)
    for direction, gradient, logits in zip(got[:2], want, (sample.student, sample.teacher), strict=True):
        assert direction.stride() == torch.empty_like(logits).stride()
        assert torch.equal(direction.isnan(), gradient.isnan())
        torch.testing.assert_close(direction * scale, gradient, rtol=1e-9, atol=1e-15, equal_nan=True)
    assert torch.equal(got[2].isnan(), want[0].isnan().any(sample.dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_equal_sides_have_no_direction_and_say_so(device: torch.device, dtype: torch.dtype) -> None:
    logits = torch.tensor([[900.0, 3.0, 0.0], [0.0, 1.0, 2.0]], device=device, dtype=dtype)
    to_student, to_teacher, log_scale = softmax_kl_direction(logits, logits + 4)
    assert log_scale.tolist() == [-math.inf] * 2
    assert not to_student.any()
    assert not to_teacher.any()
    to_student, _, log_scale = softmax_kl_direction(logits[:, :1], logits[:, 1:2])  # one class
    assert log_scale.tolist() == [-math.inf] * 2
    assert not to_student.any()


def test_logits_up_to_the_largest_number(device: torch.device) -> None:
    student = torch.tensor([[3e38, -3e38, -2.9e38], [1e30, 2e30, 3e30]], device=device)
    teacher = torch.tensor([[2e38, -3e38, -1e38], [1e30, 1.5e30, 3e30]], device=device)
    to_student, to_teacher, log_scale = softmax_kl_direction(student, teacher)
    assert log_scale.isfinite().all()
    assert (log_scale < -1e29).all()
    for side in (to_student, to_teacher):
        assert side.isfinite().all()
    # The teacher's runner-up is the student's too, but far less so in the first row: it is the teacher's to give up.
    assert (to_teacher[:, 2] > 0).tolist() == [True, False]
    torch.testing.assert_close(to_teacher.sum(1), torch.zeros(2, device=device))


@pytest.mark.default_backend
def test_compiles_in_one_graph_and_takes_no_rows(device: torch.device) -> None:
    compiled = torch.compile(softmax_kl_direction, fullgraph=True, backend="aot_eager")
    student, teacher = torch.randn(2, 6, 4, device=device)
    for got, want in zip(compiled(student, teacher), softmax_kl_direction(student, teacher), strict=True):
        assert torch.equal(got, want)
    assert softmax_kl_direction(student[:0], teacher[:0])[2].shape == (0,)
    with pytest.raises(ValueError, match="wrt is"):
        softmax_kl_direction(student, teacher, wrt=("nobody",))
