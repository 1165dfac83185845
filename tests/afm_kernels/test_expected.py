"""Gradients made in the forward for the upstream gradient that is expected: when, and that nobody can tell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.utils.checkpoint
from samples import SAMPLES, draw
from torch import Tensor

from afm_kernels import ops, softmax_kl_div
from afm_kernels.autograd import expected
from afm_kernels.autograd.fused import RECOMPUTE_FROM

pytestmark = pytest.mark.skipif(
    "cpp" not in ops.TABLE["softmax_kl_forward", "cpu"], reason="the C++ kernels are not built"
)

CLASSES = RECOMPUTE_FROM["cpp"]["softmax_kl"] + 5


@pytest.fixture(autouse=True)
def nothing_met() -> Iterator[None]:
    expected.forget_gradients()
    yield
    expected.forget_gradients()


def pair(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(3, CLASSES, generator=generator)
    teacher = student + torch.randn(3, CLASSES, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def gradients(
    logits: tuple[Tensor, Tensor], upstream: float, recompute: bool | None = None
) -> tuple[Tensor, ...]:
    loss = softmax_kl_div(*logits, recompute=recompute)
    return torch.autograd.grad(loss, [t for t in logits if t.requires_grad], torch.tensor(upstream))


def makes_gradients(logits: tuple[Tensor, Tensor]) -> bool:
    """Whether the next loss makes its gradients in the forward."""
    saved = softmax_kl_div(*logits).grad_fn.saved_tensors
    return sum(t is not None and t.shape == logits[0].shape for t in saved) > 2


def assert_same_bits(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


@pytest.mark.parametrize("divergence", range(4), ids=ops.DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.37, 4.0])
@pytest.mark.parametrize("name", SAMPLES)
def test_operator_gives_the_bits_of_a_backward(name: str, temperature: float, divergence: int) -> None:
    """Else what earlier losses met would show in later gradients."""
    sample = draw(name)
    student, teacher = sample.class_last()
    weight = sample.operator_row_weight()
    params = (temperature, divergence, 0.3)
    kernels = torch.ops.afm_kernels
    for upstream in (1.0, 0.3, -3.0, 65536.0):
        grad_loss = torch.tensor(upstream, dtype=ops.accumulation_dtype(student, teacher))
        loss, stats = kernels.softmax_kl_forward(student, teacher, weight, *params, 1, 0.25)
        wanted = kernels.softmax_kl_backward(
            grad_loss, student, teacher, weight, stats, *params, 0.25, True, True
        )
        got_loss, *got = kernels.softmax_kl_forward_backward(
            student, teacher, weight, *params, 0.25, grad_loss.item(), True, True
        )
        assert_same_bits((got_loss, *got), (loss, *wanted))


@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("num_classes", [129, 1000, 2049, 5000])
def test_bits_of_longer_rows(num_classes: int, distance: float) -> None:
    """Near, far and general rows, within a tile and beyond."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(7, num_classes, generator=generator)
    teacher = student + distance * torch.randn(7, num_classes, generator=generator)
    teacher[0, 1] = -torch.inf
    student[1, 2], teacher[1, 2] = 30.0, 30.0
    kernels = torch.ops.afm_kernels
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for divergence in range(4):
            s, t, params = student.to(dtype), teacher.to(dtype), (2.0, divergence, 0.5)
            grad_loss = torch.tensor(0.7, dtype=ops.accumulation_dtype(s, t))
            loss, stats = kernels.softmax_kl_forward(s, t, None, *params, 1, 0.25)
            wanted = kernels.softmax_kl_backward(grad_loss, s, t, None, stats, *params, 0.25, True, True)
            got = kernels.softmax_kl_forward_backward(s, t, None, *params, 0.25, grad_loss.item(), True, True)
            assert_same_bits(got, (loss, *wanted))


@pytest.mark.parametrize("sides", ["both", "student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_met_often_enough_is_expected(dtype: torch.dtype, sides: str) -> None:
    logits = pair(dtype=dtype)
    if sides != "both":
        logits[sides == "student"].requires_grad_(False)
    for upstream in (1.0, 0.25):
        for _ in range(expected.STREAK):
            assert not makes_gradients(logits)
            gradients(logits, upstream)
        assert makes_gradients(logits)
        assert_same_bits(gradients(logits, upstream), gradients(logits, upstream, recompute=True))
        gradients(logits, 3.0)  # once something else


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_guess_does_not_show(dtype: torch.dtype) -> None:
    logits = pair(dtype=dtype)
    for _ in range(expected.STREAK):
        gradients(logits, 1.0)
    assert makes_gradients(logits)
    assert_same_bits(gradients(logits, 0.3), gradients(logits, 0.3, recompute=True))
    assert not makes_gradients(logits)


def test_nan_is_never_expected() -> None:
    logits = pair()
    for _ in range(2 * expected.STREAK):
        gradients(logits, float("nan"))
    assert not makes_gradients(logits)


def test_only_losses_that_ask_are_counted() -> None:
    """Whoever chose a mode gets it; other numbers of classes, and rows apart, have nothing to do with it."""
    logits = pair()
    for _ in range(2 * expected.STREAK):
        gradients(logits, 1.0, recompute=True)
        longer = tuple(torch.randn(2, CLASSES + 1, requires_grad=True) for _ in range(2))
        gradients(longer, 1.0)
        rows = softmax_kl_div(*logits, reduction="none")
        torch.autograd.grad(rows, logits, torch.ones_like(rows))
    assert not makes_gradients(logits)


def test_a_graph_that_is_kept_gives_new_gradients_each_time() -> None:
    """Gradients handed out may be changed by whoever got them."""
    logits = pair()
    wanted = gradients(logits, 1.0, recompute=True)
    for _ in range(expected.STREAK):
        gradients(logits, 1.0)
    loss = softmax_kl_div(*logits)
    for _ in range(2):
        for got, right in zip(torch.autograd.grad(loss, logits, retain_graph=True), wanted, strict=True):
            assert torch.equal(got, right)
            got.zero_()
    for got, right in zip(torch.autograd.grad(loss, logits), wanted, strict=True):
        assert torch.equal(got, right)


def test_second_derivatives_and_batched_gradients() -> None:
    logits = tuple(t.detach().requires_grad_() for t in pair())
    for _ in range(expected.STREAK):
        gradients(logits, 1.0)
    assert makes_gradients(logits)
    first = torch.autograd.grad(softmax_kl_div(*logits), logits, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), logits)
    with torch.no_grad():
        assert all(torch.isfinite(t).all() and t.abs().max() > 0 for t in second)
    both = torch.tensor([1.0, -2.0])
    batched = torch.autograd.grad(softmax_kl_div(*logits), logits, both, is_grads_batched=True)
    for index, upstream in enumerate(both):
        wanted = gradients(logits, upstream.item(), recompute=True)
        for got, right in zip(batched, wanted, strict=True):
            torch.testing.assert_close(got[index], right)


def test_checkpointed_chunks() -> None:
    """A forward that runs again in the backward saves the same tensors, whatever was met in between."""
    features = torch.randn(expected.STREAK + 2, 3)
    heads = [torch.randn(3, CLASSES, requires_grad=True) for _ in range(2)]

    def chunk(x: Tensor) -> Tensor:
        return softmax_kl_div(x @ heads[0], x @ heads[1], reduction="sum")

    for _ in range(2):
        total = sum(
            torch.utils.checkpoint.checkpoint(chunk, x, use_reentrant=False) for x in features.split(1)
        )
        got = torch.autograd.grad(total, heads)
    wanted = torch.autograd.grad(chunk(features), heads)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
