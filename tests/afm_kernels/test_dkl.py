"""dkl_loss: the O(C) form against the published pairwise one, on every backend."""

from __future__ import annotations

import pytest
import torch
from samples import DTYPE_PAIRS, FINITE, HARD_ROWS, Sample, draw
from tolerances import GRADIENT, LOSS, excess, relative_l2, same_specials
from torch import Tensor
from truth import pairwise_dkl

from afm_kernels import DKLLoss, dkl_loss, softmax_kl_div

STEM = "dkl"
NAN, INF = float("nan"), float("inf")
SMALL = [name for name in FINITE if name not in ("vocabulary", "classes_1000", "classes_1003")]


def logits_of(sample: Sample, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return tuple(x.detach().to(dtype or x.dtype).requires_grad_() for x in (sample.student, sample.teacher))  # type: ignore[return-value]


def published(
    sample: Sample, alpha: float, beta: float, class_weight: Tensor | None = None, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairwise form in float64: row values, and gradients of their sum, class dimension where the sample has it."""
    student, teacher = logits_of(sample, torch.float64)
    rows = pairwise_dkl(
        student.movedim(sample.dim, -1),
        teacher.movedim(sample.dim, -1),
        alpha,
        beta,
        None if class_weight is None else class_weight.double(),
        symmetric,
        sample.temperature,
    )
    return rows.detach(), *torch.autograd.grad(rows.sum(), (student, teacher), materialize_grads=True)


def scales(sample: Sample) -> Tensor:
    """The size of a row's terms: |t - s|², whose rounding the squared term carries, and |log q|."""
    student, teacher = (x.detach().cpu().double() for x in sample.class_last())
    d = (teacher - student).abs().amax(-1)
    return d + d * d + 1


def check(sample: Sample, **arguments: object) -> None:
    class_weight = arguments.get("class_weight")
    truth = published(sample, arguments["alpha"], arguments["beta"], class_weight, arguments["symmetric"])  # type: ignore[arg-type]
    student, teacher = logits_of(sample)
    rows = dkl_loss(
        student,
        teacher,
        reduction="none",
        dim=sample.dim,
        temperature=sample.temperature,
        **arguments,  # type: ignore[arg-type]
    )
    terms = scales(sample)
    assert excess(rows.unsqueeze(-1), truth[0].unsqueeze(-1), None, LOSS[rows.dtype], terms=terms) <= 1
    got = torch.autograd.grad(rows.sum(), (student, teacher), materialize_grads=True)
    for gradient, wanted in zip(got, truth[1:], strict=True):
        last = gradient.movedim(sample.dim, -1)
        assert same_specials(gradient, wanted)
        assert excess(last, wanted.movedim(sample.dim, -1), None, GRADIENT[gradient.dtype], terms=terms) <= 1


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_is_the_published_form(device: torch.device, name: str, symmetric: bool, recompute: bool) -> None:
    check(draw(name, device=device), alpha=0.7, beta=1.3, symmetric=symmetric, recompute=recompute)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, 0.0), (4.0, 20.0)])
@pytest.mark.parametrize("name", ["classes_33", "saturated", "temperature_4"])
def test_factors(device: torch.device, name: str, alpha: float, beta: float) -> None:
    check(draw(name, device=device), alpha=alpha, beta=beta, symmetric=True)


@pytest.mark.parametrize(("dtype", "teacher_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("name", ["classes_33", "channels_last"])
def test_dtypes(device: torch.device, name: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    sample = draw(name, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
    check(sample, alpha=0.7, beta=1.3, symmetric=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_class_weights(device: torch.device, symmetric: bool) -> None:
    """GKL's class priors: not normalised, some of them 0."""
    sample = draw("classes_33", device=device)
    weight = torch.rand(5, 33, generator=torch.Generator().manual_seed(0)).to(device)
    weight[:, ::4] = 0
    check(sample, alpha=0.7, beta=1.3, symmetric=symmetric, class_weight=weight)


def test_class_weight_broadcasts_along_dim(device: torch.device) -> None:
    sample = draw("channels_last", device=device)
    prior = torch.rand(1, 19, 1, 1, device=device)
    got = dkl_loss(sample.student, sample.teacher, class_weight=prior, dim=1)
    student, teacher = (x.movedim(1, -1).reshape(-1, 19) for x in (sample.student, sample.teacher))
    torch.testing.assert_close(got, dkl_loss(student, teacher, class_weight=prior.reshape(19)))
    for same in (prior[0], prior.reshape(19)):  # as tensors broadcast, or one weight for each class
        assert torch.equal(dkl_loss(sample.student, sample.teacher, class_weight=same, dim=1), got)
    with pytest.raises(ValueError, match=r"class_weight has shape \(19, 1\), which does not broadcast"):
        dkl_loss(sample.student, sample.teacher, class_weight=prior[0, :, 0], dim=1)


def test_decoupled_gradients_are_those_of_kl(device: torch.device) -> None:
    """The theorem of the paper: with α = β = 1 and the student left out of the squared term."""
    sample = draw("classes_33", dtype=torch.float64, device=device)
    student, teacher = logits_of(sample)
    got = torch.autograd.grad(dkl_loss(student, teacher, symmetric=False), (student, teacher))
    wanted = torch.autograd.grad(softmax_kl_div(student, teacher), (student, teacher))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("difference", "largest"), [(1e-2, 1e-6), (1e-4, 1e-4)])
def test_error_of_small_differences(device: torch.device, difference: float, largest: float) -> None:
    """Where ½ [W Σ w d² - (Σ w d)²] has lost 3 % at 1e-2, and everything at 1e-4."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(200, 100, generator=generator)
    student = teacher + difference * torch.randn(200, 100, generator=generator)
    truth = pairwise_dkl(student.double(), teacher.double(), 0.0, 1.0)
    rows = dkl_loss(student.to(device), teacher.to(device), alpha=0.0, reduction="none").cpu()
    assert ((rows.double() - truth) / truth).abs().median() < largest


def test_common_offset(device: torch.device) -> None:
    """A common offset of d is no difference at all, and must not cancel."""
    sample = draw("near_1e-2", device=device)
    wanted = dkl_loss(sample.student, sample.teacher, alpha=0.0)
    shifted = dkl_loss(sample.student, sample.teacher + 64, alpha=0.0)
    torch.testing.assert_close(shifted, wanted, rtol=2e-2, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("classes", [10, 300])
@pytest.mark.parametrize("case", ["given", "own"])
def test_a_class_without_weight_far_away(
    device: torch.device, case: str, classes: int, recompute: bool
) -> None:
    """What is taken off to keep digits is taken from where the weight is."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, classes, generator=generator)
    teacher = student + 0.1 * torch.randn(8, classes, generator=generator)
    weight = None
    if case == "given":
        weight = torch.ones(classes)
        teacher[:, 0], weight[0] = 1e4, 0
    else:
        student[:, 0], teacher[:, 0] = 1e4, -100
    s, t = student.double(), teacher.double()
    w = t.softmax(1) if weight is None else weight.double().expand(8, classes)
    total, d = w.sum(1, keepdim=True), t - s
    off = d - (w * d).sum(1, keepdim=True) / total
    own = [x.to(device).requires_grad_() for x in (student, teacher)]
    loss = dkl_loss(
        *own,
        alpha=0.0,
        class_weight=None if weight is None else weight.to(device),
        reduction="sum",
        recompute=recompute,
    )
    assert loss.item() == pytest.approx((total / 2 * w * off * off).sum().item(), rel=1e-6)
    by_teacher = total * w * off
    for gradient, wanted in zip(torch.autograd.grad(loss, own), (-by_teacher, by_teacher), strict=True):
        assert relative_l2(gradient.cpu(), wanted) < 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("row", HARD_ROWS)
def test_each_hard_row_by_itself(
    device: torch.device, row: str, alpha: float, beta: float, symmetric: bool
) -> None:
    """The table of Note [Hard rows of dkl], own weights: KL's, but with values that need the excluded classes gone."""
    student_row, teacher_row = (torch.tensor(side, dtype=torch.float64) for side in HARD_ROWS[row])
    student, teacher = (x.float()[None].to(device).requires_grad_() for x in (student_row, teacher_row))
    rows = dkl_loss(student, teacher, alpha=alpha, beta=beta, symmetric=symmetric, reduction="none")
    rows.sum().backward()
    bad = any(x.isnan().any() or (x == INF).any() or (x == -INF).all() for x in (student_row, teacher_row))
    missing = bool(((student_row == -INF) & (teacher_row > -INF)).any())
    if bad or missing:
        assert rows.item() == INF if not bad else rows.isnan().item()
        assert student.grad.isnan().all()
        assert teacher.grad.isnan().all()
        return
    # The same row without the classes that the teacher excludes; α's softmax still has those of the student.
    kept = teacher_row > -INF
    d, w = (teacher_row - student_row)[kept], teacher_row[kept].softmax(0)
    mean = (w * d).sum()
    log_q, p = student_row.log_softmax(0), teacher_row.softmax(0)
    value = alpha * -(p[kept] * log_q[kept]).sum() + beta / 2 * (w * (d - mean) ** 2).sum()
    squared = torch.zeros(5, dtype=torch.float64)
    squared[kept] = beta * w * (d - mean)
    scale = (d.abs().max() ** 2 + 1)[None]
    assert excess(rows[:, None], value[None, None], None, LOSS[torch.float32], terms=scale) <= 1
    by_student = alpha * (log_q.exp() - p) - (squared if symmetric else 0)
    assert excess(student.grad, by_student[None], None, GRADIENT[torch.float32], terms=scale) <= 1
    assert excess(teacher.grad, squared[None], None, GRADIENT[torch.float32], terms=scale) <= 1


def test_hard_classes_under_class_weights(device: torch.device) -> None:
    """A class of weight 0 does not count, except that NaN and +inf spoil a row; the weights here are not softmax's."""
    weight = torch.tensor([0.0, 1.0, 2.0], device=device)

    def value(student: list[float], teacher: list[float], weight: Tensor = weight) -> float:
        s, t = (torch.tensor([x], device=device) for x in (student, teacher))
        return dkl_loss(s, t, alpha=0.0, class_weight=weight).item()

    plain = value([5.0, 1.0, 2.0], [0.0, 3.0, 1.0])
    assert plain == pytest.approx(0.25 * 2 * 1 * 2 * (2 + 1) ** 2)  # one pair, twice
    assert value([-INF, 1.0, 2.0], [0.0, 3.0, 1.0]) == pytest.approx(plain)
    assert value([5.0, 1.0, 2.0], [-INF, 3.0, 1.0]) == pytest.approx(plain)
    assert value([5.0, -INF, 2.0], [0.0, 3.0, 1.0]) == INF
    assert value([5.0, 1.0, 2.0], [0.0, -INF, 1.0]) == INF
    assert value([5.0, -INF, 2.0], [0.0, -INF, 1.0]) == 0
    for spoilt in (NAN, INF):
        assert value([spoilt, 1.0, 2.0], [0.0, 3.0, 1.0]) != value([spoilt, 1.0, 2.0], [0.0, 3.0, 1.0])
        assert value([5.0, 1.0, 2.0], [spoilt, 3.0, 1.0]) != value([5.0, 1.0, 2.0], [spoilt, 3.0, 1.0])
    assert value([5.0, 1.0, 2.0], [0.0, 3.0, 1.0], torch.zeros(3, device=device)) == 0


def test_row_weights(device: torch.device) -> None:
    sample = draw("weighted", device=device)
    student, teacher = logits_of(sample)
    dkl_loss(student, teacher, row_weight=sample.row_weight, reduction="sum").backward()
    masked = (sample.row_weight == 0).nonzero().flatten().tolist()
    for row in masked:
        assert (student.grad[row] == 0).all()
        assert (teacher.grad[row] == 0).all()
    kept = (sample.row_weight != 0).nonzero().flatten()
    alone_student, alone_teacher = (x.detach()[kept].requires_grad_() for x in (student, teacher))
    rows = dkl_loss(alone_student, alone_teacher, reduction="none")
    (rows * sample.row_weight[kept]).sum().backward()
    torch.testing.assert_close(student.grad[kept], alone_student.grad)
    torch.testing.assert_close(teacher.grad[kept], alone_teacher.grad)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_reductions(device: torch.device, reduction: str) -> None:
    sample = draw("three_dimensions", dtype=torch.float64, device=device)
    rows = dkl_loss(sample.student, sample.teacher, reduction="none", alpha=2.0)
    divisor = {"sum": 1, "mean": sample.student.numel(), "batchmean": rows.numel()}[reduction]
    loss = dkl_loss(sample.student, sample.teacher, reduction=reduction, alpha=2.0)
    torch.testing.assert_close(loss, rows.sum() / divisor)
    assert torch.equal(DKLLoss(2.0, reduction=reduction)(sample.student, sample.teacher), loss)


def test_second_derivatives_leave_the_weights_alone(device: torch.device) -> None:
    """Weights and targets are constants in every derivative, as they are where published code detaches them."""
    sample = draw("classes_7", dtype=torch.float64, device=device)
    for symmetric in (True, False):
        ours, theirs = [], []
        for form, results in ((dkl_loss, ours), (pairwise_dkl, theirs)):
            student, teacher = logits_of(sample)
            if form is dkl_loss:
                value = dkl_loss(student, teacher, alpha=0.7, beta=1.3, symmetric=symmetric, reduction="sum")
            else:
                value = pairwise_dkl(student, teacher, 0.7, 1.3, None, symmetric).sum()
            first = torch.autograd.grad(value, (student, teacher), create_graph=True)
            total = sum((g * g).sum() for g in first)
            results.extend(torch.autograd.grad(total, (student, teacher)))
        if symmetric:  # a form that is detached on one side has no full Hessian to compare with
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)
        else:
            torch.testing.assert_close(ours[1], theirs[1])
