"""softmax_kl_div and softmax_kl_div_grad: values, gradients, reductions, layouts, on every backend."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from samples import DTYPE_PAIRS, FINITE, HARD_ROWS, SAMPLES, Sample, draw
from tolerances import (
    TWO_ROUNDINGS,
    assert_gradient,
    assert_loss,
    relative_l2,
    same_specials,
)
from torch import Tensor
from truth import brute_force_row, eager_with_grads, gradient_terms, truth_divergence

from afm_kernels import SoftmaxKLDivFunction, SoftmaxKLDivLoss, softmax_kl_div, softmax_kl_div_grad
from afm_kernels.ops import DIVERGENCES, backend_for

STEM = "softmax_kl"
BETA = 0.3


@functools.cache
def expected(
    name: str, dtype: torch.dtype, teacher_dtype: torch.dtype, divergence: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Truth and eager's answer for a sample: (rows, by student, by teacher) of each, class dimension last."""
    sample = draw(name, dtype=dtype, teacher_dtype=teacher_dtype)
    student, teacher = sample.class_last()
    arguments = (sample.temperature, divergence, BETA)
    return truth_divergence(student, teacher, *arguments), eager_with_grads(student, teacher, *arguments)


def weighted(sample: Sample, rows: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    """Row values and gradients times the sample's row weights, where 0 wins over NaN."""
    weight = sample.operator_row_weight()
    if weight is None:
        return rows, *gradients
    weight = weight.to(rows)
    rows = (rows * weight).masked_fill(weight == 0, 0)
    weight = weight.unsqueeze(-1)
    return rows, *((g * weight).masked_fill(weight == 0, 0) for g in gradients)


def leaves(sample: Sample) -> tuple[Tensor, Tensor]:
    return sample.student.detach().requires_grad_(), sample.teacher.detach().requires_grad_()


def is_reference(device: torch.device) -> bool:
    return backend_for("softmax_kl_forward", device.type) == "reference"


def recompute_modes(device: torch.device) -> tuple[bool, ...]:
    """The reference computes the same thing twice; everybody else has code for both."""
    return (False,) if is_reference(device) else (False, True)


def terms(sample: Sample) -> Tensor:
    return gradient_terms(*sample.class_last(), sample.temperature)


def loss_of(sample: Sample, student: Tensor, teacher: Tensor, **others: object) -> Tensor:
    return softmax_kl_div(
        student,
        teacher,
        temperature=sample.temperature,
        dim=sample.dim,
        row_weight=sample.row_weight,
        **others,  # type: ignore[arg-type]
    )


def check(sample: Sample, name: str, divergence: str, **others: object) -> None:
    """Row values, and both gradients of their sum, against the truth."""
    truth, eager = expected(name, sample.student.dtype, sample.teacher.dtype, divergence)
    truth = weighted(sample, *truth)
    eager = weighted(sample, *(e.double() for e in eager))
    student, teacher = leaves(sample)
    rows = loss_of(sample, student, teacher, divergence=divergence, beta=BETA, reduction="none", **others)
    assert rows.shape == sample.rows
    assert_loss(rows, truth[0], eager[0])
    gradients = torch.autograd.grad(rows.sum(), (student, teacher))
    for logits, gradient, wanted, peer in zip(
        (student, teacher), gradients, truth[1:], eager[1:], strict=True
    ):
        assert gradient.dtype == logits.dtype
        assert_gradient(gradient.movedim(sample.dim, -1), wanted, peer, terms=terms(sample))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", SAMPLES)
def test_rows_and_gradients(device: torch.device, name: str, divergence: str) -> None:
    for recompute in recompute_modes(device):
        check(draw(name, device=device), name, divergence, recompute=recompute)


@pytest.mark.parametrize(("dtype", "teacher_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize(
    "name", ["classes_33", "hard_rows", "sliced", "channels_last", "near_1e-2", "saturated"]
)
def test_dtypes(device: torch.device, name: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    sample = draw(name, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
    for divergence in DIVERGENCES:
        check(sample, name, divergence)
    double = torch.float64 in (dtype, teacher_dtype)
    assert loss_of(sample, sample.student, sample.teacher).dtype == (
        torch.float64 if double else torch.float32
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("row", HARD_ROWS)
def test_each_hard_row_by_itself(device: torch.device, row: str, divergence: str) -> None:
    """The tables of Note [Hard rows]: the batch of all of them would hide a row that only fails alone."""
    student, teacher = (torch.tensor([side], device=device, requires_grad=True) for side in HARD_ROWS[row])
    value, by_student, by_teacher = brute_force_row(*HARD_ROWS[row], 1.0, divergence, BETA)
    loss = softmax_kl_div(student, teacher, divergence=divergence, beta=BETA, reduction="none")
    loss.sum().backward()
    assert_loss(loss, torch.tensor([value], dtype=torch.float64))
    scale = gradient_terms(student, teacher)
    assert_gradient(student.grad, torch.tensor([by_student], dtype=torch.float64), terms=scale)
    assert_gradient(teacher.grad, torch.tensor([by_teacher], dtype=torch.float64), terms=scale)


@pytest.mark.parametrize("recompute", [False, True, None])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize(
    "name", ["three_dimensions", "channels_last", "broadcast_weight", "vector", "weighted"]
)
def test_reductions(device: torch.device, name: str, reduction: str, recompute: bool | None) -> None:
    sample = draw(name, dtype=torch.float64, device=device)
    truth, by_student, by_teacher = weighted(sample, *expected(name, torch.float64, torch.float64, "kl")[0])
    rows, classes = truth.numel(), sample.student.shape[sample.dim]
    divisor = {"none": 1, "sum": 1, "mean": rows * classes, "batchmean": rows}[reduction]
    student, teacher = leaves(sample)
    loss = loss_of(sample, student, teacher, reduction=reduction, recompute=recompute, scale_by_t2=True)
    t2 = sample.temperature**2
    wanted = (truth if reduction == "none" else truth.sum()) * t2 / divisor
    torch.testing.assert_close(loss.cpu(), wanted, rtol=1e-11, atol=1e-13)
    # An upstream gradient that is neither 1 nor the same for all rows.
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64, device=device).reshape(loss.shape)
    loss.backward(upstream)
    factor = (upstream.unsqueeze(-1) if reduction == "none" else upstream).cpu() * t2 / divisor
    for logits, gradient in ((student, by_student), (teacher, by_teacher)):
        got = logits.grad.movedim(sample.dim, -1)
        assert_gradient(got, gradient * factor, terms=terms(sample) * sample.rows.numel())


def test_batchmean_is_that_of_kl_div(device: torch.device) -> None:
    """Against F.kl_div itself, for two-dimensional logits, where the two definitions of a batch agree."""
    sample = draw("classes_100", dtype=torch.float64, device=device)
    log_q, log_p = sample.student.log_softmax(-1), sample.teacher.log_softmax(-1)
    for reduction in ("sum", "batchmean"):
        wanted = torch.nn.functional.kl_div(log_q, log_p, reduction=reduction, log_target=True)
        torch.testing.assert_close(
            softmax_kl_div(sample.student, sample.teacher, reduction=reduction), wanted
        )


@pytest.mark.parametrize("shape", [(0, 10), (3, 0, 10)])
def test_no_rows(device: torch.device, shape: tuple[int, ...]) -> None:
    student, teacher = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
    assert softmax_kl_div(student, teacher, reduction="none").shape == shape[:-1]
    assert softmax_kl_div(student, teacher, reduction="sum") == 0
    for reduction in ("mean", "batchmean"):
        loss = softmax_kl_div(student, teacher, reduction=reduction)
        assert loss.isnan()
        gradients = torch.autograd.grad(loss, (student, teacher))
        assert all(g.shape == shape for g in gradients)
    assert all(g.shape == shape for g in softmax_kl_div_grad(student, teacher))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_class_is_no_choice(device: torch.device, divergence: str) -> None:
    sample = draw("classes_1", device=device)
    student, teacher = leaves(sample)
    loss = softmax_kl_div(student, teacher, divergence=divergence, reduction="none")
    loss.sum().backward()
    for zero in (loss, student.grad, teacher.grad):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("offset", [torch.finfo(torch.float32).min, 1e30, -(2.0**25)])
def test_offset_of_one_side_alone(device: torch.device, offset: float, divergence: str) -> None:
    """A mask may leave a whole row at the dtype's lowest value: uniform, however far from the other side."""
    generator = torch.Generator().manual_seed(7)
    for num_classes in (1, 3, 19, 203):
        # At 2^25 float32 still tells multiples of 4 apart.
        steps = 4.0 * torch.randint(0, 2, (3, num_classes), generator=generator) * (abs(offset) < 1e9)
        other = 2 * torch.randn(3, num_classes, generator=generator)
        for sides in ((steps, other), (other, steps)):
            truth = truth_divergence(*sides, 1.0, divergence, BETA)
            student, teacher = (
                (side + offset * (side is steps)).to(device).requires_grad_() for side in sides
            )
            rows = softmax_kl_div(student, teacher, divergence=divergence, beta=BETA, reduction="none")
            assert_loss(rows, truth[0], terms=gradient_terms(*sides) / 8)
            gradients = torch.autograd.grad(rows.sum(), (student, teacher))
            for gradient, wanted in zip(gradients, truth[1:], strict=True):
                assert_gradient(gradient, wanted, terms=gradient_terms(*sides))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_gradient_alone(device: torch.device, divergence: str, side: str, recompute: bool) -> None:
    """The same bits as with both, and none for the other side."""
    sample = draw("classes_100", device=device)
    both = leaves(sample)
    arguments = {"divergence": divergence, "beta": BETA, "recompute": recompute}
    softmax_kl_div(*both, **arguments).backward()
    alone = leaves(sample)
    alone[side == "student"].requires_grad_(False)
    softmax_kl_div(*alone, **arguments).backward()
    index = 0 if side == "student" else 1
    assert_gradient(alone[index].grad, both[index].grad.double())
    assert alone[1 - index].grad is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "name", ["classes_33", "channels_last", "sliced", "weighted", "hard_rows", "permuted", "no_rows"]
)
def test_grad_function(device: torch.device, name: str, divergence: str) -> None:
    sample = draw(name, device=device)
    arguments = {
        "temperature": sample.temperature,
        "dim": sample.dim,
        "row_weight": sample.row_weight,
        "divergence": divergence,
        "beta": BETA,
    }
    _, by_student, by_teacher = weighted(sample, *expected(name, torch.float32, torch.float32, divergence)[0])
    student, teacher = softmax_kl_div_grad(sample.student, sample.teacher, **arguments)
    assert student.shape == sample.student.shape
    for got, wanted, logits in ((student, by_student, sample.student), (teacher, by_teacher, sample.teacher)):
        assert_gradient(got.movedim(sample.dim, -1), wanted, terms=terms(sample))
        assert got.stride() == torch.empty_like(logits).stride()
        assert not got.requires_grad
    # Each side alone, both in the other order, and into given tensors of any strides.
    # Bit by bit on CPUs, where neither the layout nor the sides that are wanted choose the arithmetic; elsewhere they
    # may choose another loop: the same up to rounding.
    exact = backend_for("softmax_kl_grad", device.type) == "cpp"
    rounding = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-7}
    same = functools.partial(torch.testing.assert_close, equal_nan=True, **rounding)
    same(softmax_kl_div_grad(sample.student, sample.teacher, wrt=("student",), **arguments)[0], student)
    same(softmax_kl_div_grad(sample.student, sample.teacher, wrt=("teacher",), **arguments)[0], teacher)
    turned = softmax_kl_div_grad(sample.student, sample.teacher, wrt=("teacher", "student"), **arguments)
    same(turned[1], student)
    same(turned[0], teacher)
    for out in (
        (torch.full_like(student, 7), torch.full_like(teacher, 7)),
        tuple(torch.full((*student.shape, 2), 7.0, device=device)[..., 0] for _ in range(2)),
    ):
        versions = [each._version for each in out]
        returned = softmax_kl_div_grad(sample.student, sample.teacher, out=out, **arguments)
        assert all(each._version > version for each, version in zip(out, versions, strict=True))
        assert returned[0] is out[0]
        assert returned[1] is out[1]
        same(out[0], student)
        same(out[1], teacher)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "name", ["channels_last", "mixed_layouts", "permuted", "transposed", "first_dimension"]
)
def test_gradients_keep_dense_strides(device: torch.device, name: str, recompute: bool) -> None:
    sample = draw(name, device=device)
    student, teacher = leaves(sample)
    loss_of(sample, student, teacher, recompute=recompute).backward()
    assert student.grad.stride() == student.stride()
    assert teacher.grad.stride() == teacher.stride()


@pytest.mark.parametrize("number", [np.float32(2), np.float64(2), np.int64(2)])
def test_numpy_numbers_are_numbers(device: torch.device, number: np.number) -> None:
    student, teacher = torch.randn(2, 3, 5, device=device)
    assert softmax_kl_div(student, teacher, temperature=number) == softmax_kl_div(
        student, teacher, temperature=2
    )


def test_inputs_are_left_alone(device: torch.device) -> None:
    sample = draw("hard_rows", device=device)
    student, teacher = leaves(sample)
    softmax_kl_div(student, teacher).backward()
    softmax_kl_div_grad(student, teacher)
    torch.testing.assert_close(
        student.detach(), draw("hard_rows", device=device).student, rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        teacher.detach(), draw("hard_rows", device=device).teacher, rtol=0, atol=0, equal_nan=True
    )


def test_same_tensor_on_both_sides(device: torch.device) -> None:
    """The loss of a tensor with itself is exactly 0, and so is its gradient."""
    logits = draw("classes_100", device=device).student.requires_grad_()
    for divergence in DIVERGENCES:
        loss = softmax_kl_div(logits, logits, divergence=divergence)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0
        assert gradient.abs().max() < 1e-9


def test_expanded_upstream_gradient(device: torch.device) -> None:
    """``rows.sum()`` hands back a gradient of stride 0."""
    sample = draw("three_dimensions", dtype=torch.float64, device=device)
    one, other = leaves(sample), leaves(sample)
    for recompute in (False, True):
        rows = softmax_kl_div(*one, reduction="none", recompute=recompute)
        expanded = torch.autograd.grad(
            rows, one, torch.ones((), device=device, dtype=torch.float64).expand(rows.shape)
        )
        dense = torch.autograd.grad(softmax_kl_div(*other, reduction="sum"), other)
        for a, b in zip(expanded, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_upstream_gradient_of_half_precision(device: torch.device) -> None:
    """A loss scale must save what float16 alone would lose: gradients below 6e-8 that are scaled by 2¹⁶."""
    sample = draw("classes_1000", dtype=torch.float16, device=device)
    student, teacher = leaves(sample)
    (softmax_kl_div(student, teacher, temperature=4.0, reduction="mean") * 2.0**16).backward()
    _, by_student, by_teacher = truth_divergence(student.detach(), teacher.detach(), 4.0)
    assert by_student.abs().median() / by_student.numel() < 6e-8  # unscaled, most would be 0 or a digit
    for gradient, wanted in ((student.grad, by_student), (teacher.grad, by_teacher)):
        assert_gradient(gradient, wanted * 2.0**16 / student.numel())


def test_scaled_bfloat16_rounds_twice_at_most(device: torch.device) -> None:
    sample = draw("classes_100", dtype=torch.bfloat16, device=device)
    student, teacher = leaves(sample)
    (softmax_kl_div(student, teacher, reduction="sum") * 0.7).backward()
    _, by_student, by_teacher = truth_divergence(student.detach(), teacher.detach())
    assert_gradient(student.grad, by_student * 0.7, factor=TWO_ROUNDINGS)
    assert_gradient(teacher.grad, by_teacher * 0.7, factor=TWO_ROUNDINGS)


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_twice(device: torch.device, recompute: bool) -> None:
    """retain_graph keeps the saved gradients as they were; without it a second backward is refused."""
    sample = draw("classes_33", device=device)
    student, teacher = leaves(sample)
    loss = softmax_kl_div(student, teacher, recompute=recompute) * 3
    first = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    second = torch.autograd.grad(loss, (student, teacher))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (student, teacher))


ERROR_CLASSES = (2, 10, 100, 1000, 32000)


@pytest.mark.parametrize("offsets", [(0, 0), (1000, 1000), (1000, 0), (0, -1000)])
@pytest.mark.parametrize("num_classes", ERROR_CLASSES)
@pytest.mark.parametrize(("difference", "largest"), [(1.0, 2e-6), (1e-2, 2e-5), (1e-3, 3e-4)])
def test_error_of_small_divergences(
    device: torch.device, difference: float, largest: float, num_classes: int, offsets: tuple[int, int]
) -> None:
    """Median relative error of the row KL at KL ≈ 0.4, 4e-5 and 4e-7; gradients no worse than PyTorch's."""
    if is_reference(device) and num_classes not in (10, 1000):
        pytest.skip("the reference is slow, and one code for all numbers of classes")
    generator = torch.Generator().manual_seed(num_classes)
    rows = max(3, min(200, 20000 // num_classes))
    teacher = 3 * torch.randn(rows, num_classes, generator=generator, dtype=torch.float64)
    student = teacher + difference * torch.randn(rows, num_classes, generator=generator, dtype=torch.float64)
    student, teacher = ((x + offset).float() for x, offset in zip((student, teacher), offsets, strict=True))
    truth = eager_with_grads(student.double(), teacher.double())
    eager = eager_with_grads(student, teacher)
    ours_student, ours_teacher = student.to(device).requires_grad_(), teacher.to(device).requires_grad_()
    values = softmax_kl_div(ours_student, ours_teacher, reduction="none")
    values.sum().backward()
    told_apart = truth[0] > 0  # two classes at an offset of 1000: some rows are equal in float32
    error = ((values.detach().cpu().double() - truth[0]) / truth[0])[told_apart].abs().median()
    assert error <= largest
    assert (values >= 0).all()
    for gradient, wanted, peer in zip(
        (ours_student.grad, ours_teacher.grad), truth[1:], eager[1:], strict=True
    ):
        assert relative_l2(gradient.cpu(), wanted) <= relative_l2(peer, wanted) + 1e-7


def test_never_negative(device: torch.device) -> None:
    """Differences down to the last bit, where the direct form is negative in every fourth row."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2000, 10, generator=generator)
    for difference in (0.0, 1e-7, 1e-5, 1e-3):
        student = teacher + difference * torch.randn(2000, 10, generator=generator)
        for divergence in DIVERGENCES:
            rows = softmax_kl_div(
                student.to(device), teacher.to(device), divergence=divergence, reduction="none"
            )
            assert (rows >= 0).all()


def test_determinism(device: torch.device) -> None:
    """The same bits run to run, and for 1 or 2 threads."""
    generator = torch.Generator().manual_seed(0)
    results = []
    threads = torch.get_num_threads()
    # Beyond any threshold for threads; the reference is PyTorch's own operators, and slow.
    rows = 64 if is_reference(device) else 512
    student, teacher = (torch.randn(rows, 1000, generator=generator).to(device) for _ in range(2))
    try:
        for count in (threads, 1, 2, 2):
            torch.set_num_threads(count)
            for recompute in (False, True):
                s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
                loss = softmax_kl_div(s, t, recompute=recompute)
                results.append((loss.detach(), *torch.autograd.grad(loss, (s, t))))
    finally:
        torch.set_num_threads(threads)
    for recompute in (0, 1):
        first, *others = results[recompute::2]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_module(device: torch.device) -> None:
    sample = draw("classes_33", device=device)
    module = SoftmaxKLDivLoss(4.0, "sum", True, divergence="js", beta=BETA)
    wanted = softmax_kl_div(
        sample.student,
        sample.teacher,
        temperature=4.0,
        reduction="sum",
        scale_by_t2=True,
        divergence="js",
        beta=BETA,
    )
    assert torch.equal(module(sample.student, sample.teacher), wanted)
    assert repr(module) == (
        "SoftmaxKLDivLoss(divergence='js', beta=0.3, temperature=4.0, reduction='sum', scale_by_t2=True)"
    )


def test_public_function_class(device: torch.device) -> None:
    """SoftmaxKLDivFunction.apply is the sum, with gradients, and composes."""
    sample = draw("classes_33", device=device)
    one, other = leaves(sample), leaves(sample)
    (2 * SoftmaxKLDivFunction.apply(*one)).backward()
    (2 * softmax_kl_div(*other, reduction="sum")).backward()
    assert torch.equal(one[0].grad, other[0].grad)
    assert torch.equal(one[1].grad, other[1].grad)


@pytest.mark.parametrize("name", FINITE)
def test_gradients_sum_to_zero(device: torch.device, name: str) -> None:
    """Softmax does not see a shift, so no gradient of it has a mean."""
    sample = draw(name, device=device)
    for gradient in softmax_kl_div_grad(
        sample.student, sample.teacher, dim=sample.dim, temperature=sample.temperature
    ):
        gradient = gradient.movedim(sample.dim, -1).double()
        assert (gradient.sum(-1).abs().cpu() <= 2e-6 * terms(sample) + 1e-9).all()


@pytest.mark.parametrize("gap", [100.0, 1e5, 1e9, 1e14, 1e30])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("classes", [5, 300])
def test_any_finite_gap(device: torch.device, classes: int, side: str, gap: float) -> None:
    """Beyond what an exponential's reduction can take the result must be that of a probability of 0."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, classes, generator=generator)
    if side != "teacher":
        student[1, 2] -= gap
    if side != "student":
        teacher[1, 2] -= gap
    truth, *by_truth = truth_divergence(student, teacher, 1.0, "kl", BETA)
    student, teacher = student.to(device).requires_grad_(), teacher.to(device).requires_grad_()
    loss = softmax_kl_div(student, teacher, reduction="none")
    assert_loss(loss, truth)
    gradients = torch.autograd.grad(loss.sum(), (student, teacher))
    for gradient, wanted in zip(gradients, by_truth, strict=True):
        assert_gradient(gradient, wanted, terms=gradient_terms(student, teacher))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("classes", [5, 300])
def test_masked_by_the_smallest_number(
    device: torch.device, classes: int, side: str, divergence: str
) -> None:
    """Its distance to other logits leaves the range where it is divided by a temperature below 1: no NaN follows."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, classes, generator=generator)
    if side != "teacher":
        student[1:, 2] = torch.finfo(student.dtype).min
    if side != "student":
        teacher[1:, 2] = torch.finfo(student.dtype).min
    for temperature in (1.0, 0.5, 0.1):
        arguments = (temperature, divergence, BETA)
        truth, *by_truth = truth_divergence(student, teacher, *arguments)
        own = [x.to(device).requires_grad_() for x in (student, teacher)]
        loss = softmax_kl_div(
            *own, temperature=temperature, divergence=divergence, beta=BETA, reduction="none"
        )
        moderate = truth < 1e4  # a class that one side masks may be worth inf
        assert (loss.detach().cpu()[~moderate] > 1e4).all()
        assert_loss(loss[moderate.to(device)], truth[moderate], terms=truth[moderate])
        gradients = torch.autograd.grad(loss.sum(), own)
        allowed = gradient_terms(student, teacher, temperature)[moderate]
        for gradient, wanted in zip(gradients, by_truth, strict=True):
            assert_gradient(gradient.cpu()[moderate], wanted[moderate], terms=allowed)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", [9, 300])
def test_gradients_of_certain_rows_that_disagree(device: torch.device, classes: int, divergence: str) -> None:
    """Logits ten thousand apart, some of them -inf: what a mean of that size rounds to is no part of a gradient."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 1e3 * torch.randn(2, 60, classes, generator=generator)
    student[::2, 0] = teacher[::2, 0] = -torch.inf
    arguments = (4.0, divergence, BETA)
    _, *by_truth = truth_divergence(student, teacher, *arguments)
    own = [x.to(device).requires_grad_() for x in (student, teacher)]
    loss = softmax_kl_div(*own, temperature=4.0, divergence=divergence, beta=BETA, reduction="sum")
    # On CPUs; other backends keep to the size of the terms, as PyTorch does.
    on_cpu = backend_for("softmax_kl_forward", device.type) == "cpp"
    size = torch.full((60,), 4.0) if on_cpu else gradient_terms(student, teacher, 4.0)
    for gradient, wanted in zip(torch.autograd.grad(loss, own), by_truth, strict=True):
        assert_gradient(gradient, wanted, terms=size)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("classes", [10, 1000])
def test_a_certain_teacher_far_away(
    device: torch.device, classes: int, recompute: bool, temperature: float
) -> None:
    """Where one class has all of p the teacher's gradient is next to nothing, however large the KL."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, classes, generator=generator)
    student[:, 1] += 1e4
    teacher[:, 0] += 100
    student, teacher = student.to(device), teacher.to(device).requires_grad_()
    loss = softmax_kl_div(
        student, teacher, temperature=temperature, reduction="batchmean", recompute=recompute
    )
    (gradient,) = torch.autograd.grad(loss, teacher)
    assert gradient.abs().max() < 1e-8


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("classes", [10, 128, 129, 1000])
def test_gradients_where_both_sides_are_certain_of_one_class(
    device: torch.device, classes: int, recompute: bool, divergence: str
) -> None:
    """q - p is next to nothing there, and keeps its digits, with all else that is left."""
    generator = torch.Generator().manual_seed(0)
    student = 0.1 * torch.randn(5, classes, generator=generator)
    teacher = student + 0.1 * torch.randn(5, classes, generator=generator)
    for row, (by_student, by_teacher) in enumerate(((16, 14), (12, 14), (15, 16), (14, 14), (12, 13))):
        student[row, 3], teacher[row, 3] = by_student, by_teacher
    for temperature in (1.0, 1.3):
        _, *by_truth = truth_divergence(student, teacher, temperature, divergence, BETA)
        own = [x.to(device).requires_grad_() for x in (student, teacher)]
        loss = softmax_kl_div(
            *own,
            divergence=divergence,
            beta=BETA,
            temperature=temperature,
            reduction="sum",
            recompute=recompute,
        )
        for gradient, wanted in zip(torch.autograd.grad(loss, own), by_truth, strict=True):
            error = (gradient.double().cpu() - wanted).norm(dim=1) / wanted.norm(dim=1)
            assert error.max() < 1e-5, (temperature, error)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", [10, 300])
def test_small_temperatures_of_rows_that_agree(device: torch.device, classes: int, divergence: str) -> None:
    """Each side is a certainty then, and the same one: no noise of its exact value is magnified."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, classes, generator=generator)
    student[:, 3], teacher[:, 3] = 9, 7
    for temperature in (3e-3, 1e-6, 1e-13, 1e-25):
        own = [x.to(device).requires_grad_() for x in (student, teacher)]
        loss = softmax_kl_div(*own, temperature=temperature, divergence=divergence, beta=BETA)
        assert loss == 0
        for gradient in torch.autograd.grad(loss, own):
            assert (gradient == 0).all()


@pytest.mark.parametrize("classes", [10, 300])
def test_a_nan_upstream_stays_one_in_bfloat16(device: torch.device, classes: int) -> None:
    """Rounding must not carry a NaN's bits over into the sign, as it would those of 0x7fffffff, CUDA's NaN."""
    student, teacher = torch.randn(2, 4, classes).to(device, torch.bfloat16).requires_grad_()
    upstream = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).to(device)
    loss = softmax_kl_div(student, teacher, recompute=True)
    for gradient in torch.autograd.grad(loss, (student, teacher), upstream):
        assert gradient.isnan().all()


def test_samples_hold_what_they_promise() -> None:
    """A hard sample that lost its hard values would make every test above pass for nothing."""
    for name in ("hard_rows", "hard_values_in_long_rows", "weighted"):
        rows = expected(name, torch.float32, torch.float32, "kl")[0][0]
        assert rows.isnan().any()
        assert rows.isinf().any()
        assert rows.isfinite().any()
    assert draw("channels_last").student.is_contiguous(memory_format=torch.channels_last)
    assert draw("expanded_classes").student.stride() == (1, 0)
    assert draw("sliced").student.storage_offset() == 3
    assert not same_specials(torch.tensor([1.0]), torch.tensor([float("nan")]))
    assert not torch.equal(draw("classes_10", seed=0).student, draw("classes_10", seed=1).student)


# Logits, less the largest of a row's first, at the ends of what float32's exponential can hold, beyond, and where the
# arithmetic of exponents comes round to an innocent number again: 2^22 and 2^23 + 127 doublings.
OUT_OF_RANGE = (-87.0, -87.7, -88.2, -88.6, -1e4, -2907269.9, -5814626.0, -1e9, -3e38, 88.5, 89.2, 2907269.9)


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("logit", OUT_OF_RANGE)
def test_logits_beyond_the_range_of_exp(device: torch.device, logit: float, side: str) -> None:
    """Loops that take exponentials without bounds have to notice, in any tile, and in the vector that ends a row."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 5003, generator=generator)
    student = teacher + torch.tensor([[1.0], [1.0], [1.0], [1e-2], [1e-2], [1e-2]]) * torch.randn(
        6, 5003, generator=generator
    )
    for row, place in enumerate((900, 3000, 5002) * 2):
        for tensor in (student,) * (side != "teacher") + (teacher,) * (side != "student"):
            tensor[row, place] = tensor[row, :128].max() + logit
    student, teacher = student.to(device).requires_grad_(), teacher.to(device).requires_grad_()
    for divergence in DIVERGENCES:
        truth = truth_divergence(student, teacher, 1.0, divergence, BETA)
        eager = eager_with_grads(student, teacher, 1.0, divergence, BETA)
        for recompute in recompute_modes(device):
            rows = softmax_kl_div(
                student, teacher, divergence=divergence, beta=BETA, reduction="none", recompute=recompute
            )
            assert_loss(rows, truth[0], eager[0])
            gradients = torch.autograd.grad(rows.sum(), (student, teacher))
            for gradient, wanted, peer in zip(gradients, truth[1:], eager[1:], strict=True):
                assert_gradient(gradient, wanted, peer, terms=gradient_terms(student, teacher))
