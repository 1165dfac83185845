"""distillation_loss: values, gradients, labels, hard rows, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from samples import DTYPE_PAIRS, HARD_ROWS, SAMPLES, Sample, draw
from tolerances import assert_gradient, assert_loss
from torch import Tensor
from truth import eager_divergence, gradient_terms, truth_divergence

from afm_kernels import DistillationLoss, distillation_loss
from afm_kernels.ops import backend_for

STEM = "distillation"
NAN, INF = float("nan"), float("inf")
IGNORE = -100


def truth_distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Row values and row gradients in float64, from the definition: class by class for the cross-entropy."""
    student = student.detach().cpu().double()
    labels = labels.cpu()
    num_classes = student.shape[-1]
    value = torch.zeros(student.shape[:-1], dtype=torch.float64)
    by_student, by_teacher = torch.zeros_like(student), torch.zeros_like(student)
    if alpha != 1:
        log_q = student.log_softmax(-1)
        target = torch.full_like(student, smoothing / num_classes)
        known = (labels != IGNORE).unsqueeze(-1)
        target.scatter_add_(
            -1, labels.where(known[..., 0], 0).unsqueeze(-1), torch.full_like(student[..., :1], 1 - smoothing)
        )
        terms = -(target * log_q).masked_fill((target == 0) & ~log_q.isnan(), 0)
        value = value + (1 - alpha) * terms.sum(-1).masked_fill(~known[..., 0], 0)
        by_student = by_student + (1 - alpha) * (log_q.exp() - target).masked_fill(~known, 0)
    if alpha != 0:
        factor = alpha * temperature**2
        kl, kl_student, kl_teacher = truth_divergence(student, teacher, temperature)
        value = value + factor * kl
        by_student, by_teacher = by_student + factor * kl_student, by_teacher + factor * kl_teacher
    lost = ~value.isfinite().unsqueeze(-1)
    by_teacher = by_teacher.masked_fill(lost, NAN) if alpha != 0 else by_teacher
    return value, by_student.masked_fill(lost, NAN), by_teacher


def eager_distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What one writes today, in the logits' own dtype: row values, and the gradients of their sum."""
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    hard = F.cross_entropy(
        student.movedim(-1, 1) if student.dim() > 1 else student,
        labels,
        reduction="none",
        label_smoothing=smoothing,
        ignore_index=IGNORE,
    )
    soft = eager_divergence(student, teacher, temperature)
    rows = (1 - alpha) * hard + alpha * temperature**2 * soft
    return rows.detach(), *torch.autograd.grad(rows.sum(), (student, teacher))


def check(sample: Sample, alpha: float, smoothing: float, recompute: bool | None = None) -> None:
    student, teacher = sample.class_last()
    labels = sample.labels(IGNORE)
    arguments = (labels, sample.temperature, alpha, smoothing)
    truth = truth_distillation(student, teacher, *arguments)
    eager = eager_distillation(student, teacher, *arguments)
    terms = gradient_terms(student, teacher, sample.temperature) * max(1.0, sample.temperature**2) + 1
    weight = sample.operator_row_weight()
    if weight is not None:
        mask, weight = (weight == 0).cpu(), weight.double().cpu()
        truth = (
            (truth[0] * weight).masked_fill(mask, 0),
            *((g * weight[..., None]).masked_fill(mask[..., None], 0) for g in truth[1:]),
        )
    own_student, own_teacher = (x.detach().requires_grad_() for x in (sample.student, sample.teacher))
    rows = distillation_loss(
        own_student,
        own_teacher,
        labels,
        alpha=alpha,
        temperature=sample.temperature,
        label_smoothing=smoothing,
        reduction="none",
        row_weight=sample.row_weight,
        dim=sample.dim,
        recompute=recompute,
    )
    # log q is a difference of numbers of the size of the logits: 0 comes out as their rounding, but not where a CPU
    # kernel takes the maximum off every logit first.
    size = student.detach().double().cpu().nan_to_num(0, 0, 0).abs().amax(-1)
    exact = backend_for("distillation_forward_grad", student.device.type) == "cpp"
    assert_loss(rows, truth[0], eager[0], terms=None if exact else size)
    gradients = torch.autograd.grad(rows.sum(), (own_student, own_teacher))
    for logits, gradient, wanted, peer in zip(
        (own_student, own_teacher), gradients, truth[1:], eager[1:], strict=True
    ):
        assert gradient.dtype == logits.dtype
        assert_gradient(gradient.movedim(sample.dim, -1), wanted, peer, terms=terms)


@pytest.mark.parametrize(("alpha", "smoothing", "recompute"), [(0.7, 0.0, False), (0.3, 0.1, True)])
@pytest.mark.parametrize("name", SAMPLES)
def test_rows_and_gradients(
    device: torch.device, name: str, alpha: float, smoothing: float, recompute: bool
) -> None:
    check(draw(name, device=device), alpha, smoothing, recompute)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", ["classes_33", "hard_rows", "weighted", "temperature_4"])
def test_ends(device: torch.device, name: str, alpha: float, smoothing: float) -> None:
    """A term of factor 0 contributes exactly 0, whatever it holds."""
    check(draw(name, device=device), alpha, smoothing)


@pytest.mark.parametrize(("dtype", "teacher_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("name", ["classes_33", "hard_rows", "channels_last", "temperature_4"])
def test_dtypes(device: torch.device, name: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    check(draw(name, dtype=dtype, teacher_dtype=teacher_dtype, device=device), 0.6, 0.1)


@pytest.mark.parametrize("label", [0, 4, IGNORE])
@pytest.mark.parametrize(("alpha", "smoothing"), [(0.7, 0.0), (0.3, 0.1), (0.0, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("row", HARD_ROWS)
def test_each_hard_row_by_itself(
    device: torch.device, row: str, alpha: float, smoothing: float, label: int
) -> None:
    """The table of Note [Hard rows of distillation]."""
    student, teacher = (torch.tensor([side], device=device, requires_grad=True) for side in HARD_ROWS[row])
    labels = torch.tensor([label], device=device)
    truth = truth_distillation(student, teacher, labels, 2.0, alpha, smoothing)
    loss = distillation_loss(
        student, teacher, labels, alpha=alpha, temperature=2.0, label_smoothing=smoothing, reduction="none"
    )
    loss.sum().backward()
    terms = 4 * gradient_terms(student, teacher, 2.0) + 1
    assert_loss(loss, truth[0])
    assert_gradient(student.grad, truth[1], terms=terms)
    assert_gradient(teacher.grad, truth[2], terms=terms)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 4.0)])
@pytest.mark.parametrize("offset", [1000.0, 2.0**24, -1e30])
def test_offset_of_the_student(
    device: torch.device, offset: float, alpha: float, temperature: float, recompute: bool
) -> None:
    """A softmax knows no offset, and its gradient must not: not even where the logits have no digits left."""
    steps = torch.tensor([[0.0, 4.0, 2.0, 0.0, 6.0]]) * (abs(offset) < 1e9)
    teacher = torch.tensor([[1.0, 3.0, -2.0, 0.5, 0.0]])
    gradients = []
    for logits in (steps.double(), (steps + offset).to(device)):
        student = logits.requires_grad_()
        loss = distillation_loss(
            student,
            teacher.to(student),
            torch.tensor([1], device=student.device),
            alpha=alpha,
            temperature=temperature,
            label_smoothing=0.1,
            recompute=recompute,
        )
        gradients.append(torch.autograd.grad(loss, student)[0].cpu())
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=1e-6, atol=1e-6)


def test_table_by_hand(device: torch.device) -> None:
    """Cells worked out on paper: two classes, T = 1, α = ½."""
    ln2 = 0.6931471805599453
    cases = [
        # student, teacher, label, smoothing, loss, student's gradient
        ([0.0, 0.0], [-INF, 0.0], 1, 0.0, ln2, [0.5, -0.5]),  # CE log 2, KL log 2
        ([0.0, 0.0], [-INF, 0.0], IGNORE, 0.0, ln2 / 2, [0.25, -0.25]),  # KL alone
        ([-INF, 0.0], [-INF, 0.0], 1, 0.0, 0.0, [0.0, 0.0]),
        ([-INF, 0.0], [-INF, 0.0], 0, 0.0, INF, [NAN, NAN]),  # the label's class is excluded
        ([-INF, 0.0], [-INF, 0.0], 1, 0.1, INF, [NAN, NAN]),  # smoothing asks for every class
    ]
    for student_row, teacher_row, label, smoothing, value, gradient in cases:
        student = torch.tensor([student_row], device=device, requires_grad=True)
        loss = distillation_loss(
            student,
            torch.tensor([teacher_row], device=device),
            torch.tensor([label], device=device),
            alpha=0.5,
            temperature=1.0,
            label_smoothing=smoothing,
        )
        loss.backward()
        assert loss.item() == pytest.approx(value, abs=1e-7)
        assert student.grad[0].tolist() == pytest.approx(gradient, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_reductions(device: torch.device, reduction: str) -> None:
    sample = draw("three_dimensions", dtype=torch.float64, device=device)
    labels = sample.labels()
    arguments = {"alpha": 0.4, "temperature": 3.0, "label_smoothing": 0.1}
    rows = distillation_loss(sample.student, sample.teacher, labels, reduction="none", **arguments)
    divisor = {"sum": 1, "mean": sample.student.numel(), "batchmean": rows.numel()}[reduction]
    loss = distillation_loss(sample.student, sample.teacher, labels, reduction=reduction, **arguments)
    torch.testing.assert_close(loss, rows.sum() / divisor)
    assert torch.equal(
        DistillationLoss(reduction=reduction, **arguments)(sample.student, sample.teacher, labels), loss
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_label_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    sample = draw("classes_33", device=device)
    labels = sample.labels(0)
    wanted = distillation_loss(sample.student, sample.teacher, labels, alpha=0.5, temperature=2.0)
    got = distillation_loss(sample.student, sample.teacher, labels.to(dtype), alpha=0.5, temperature=2.0)
    assert torch.equal(got, wanted)


def test_label_that_is_no_class(device: torch.device) -> None:
    """Refused where that costs no wait for the device; elsewhere, and inside the operators, the row is NaN."""
    from afm_kernels import ops

    student = torch.randn(2, 5, device=device)
    labels = torch.tensor([7, 1], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"labels holds 7; allowed: 0 to 4, and ignore_index=-100"):
            distillation_loss(student, student, labels, alpha=0.5, temperature=1.0)
    arguments = (student, student, labels, None, 1.0, 0.5, 0.1, IGNORE, 0, 1.0)
    if ops.backend_for("distillation_forward", device.type) == "cpp":
        with pytest.raises(RuntimeError, match=r"labels\[0\] is 7; allowed: 0 to 4"):
            ops.kernel("distillation_forward", device.type)(*arguments)
    else:
        rows, _ = ops.kernel("distillation_forward", device.type)(*arguments)
        assert rows.isnan().tolist() == [True, False]


def test_no_rows(device: torch.device) -> None:
    student = torch.zeros(0, 10, device=device, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long, device=device)
    loss = distillation_loss(student, student.detach(), labels, alpha=0.5, temperature=2.0)
    assert loss.isnan()
    loss.backward()
    assert student.grad.shape == (0, 10)
