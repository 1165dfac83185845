"""Calls like one before take a shorter way to the compiled operators, and nothing else about them is different."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from afm_kernels import ops, softmax_kl_div, softmax_kl_div_grad, use_backend
from afm_kernels.functional import loss as way
from afm_kernels.functional import softmax_kl

pytestmark = pytest.mark.skipif(
    "cpp" not in ops.TABLE["softmax_kl_forward", "cpu"], reason="the C++ kernels are not built"
)


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(2))  # type: ignore[return-value]


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who took the long way, in order."""
    taken: list[str] = []
    check = softmax_kl.check_logits

    def counted(*args: Any) -> Any:
        taken.append("long")
        return check(*args)

    monkeypatch.setattr(softmax_kl, "check_logits", counted)
    monkeypatch.setattr(way, "_good", {})
    return taken


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 4.0, "scale_by_t2": True},
    {"reduction": "sum"},
    {"reduction": "mean", "temperature": 2},
    {"divergence": "reverse_kl"},
    {"divergence": "jeffreys"},
    {"divergence": "js", "beta": 0.3},
    {"recompute": True},
    {"recompute": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 10), (2, 3, 200)])
def test_the_second_call_is_quick_and_gives_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], long_ways: list[str]
) -> None:
    logits = pair(*shape, dtype=dtype)
    for wrt in (logits, logits[:1], logits[1:], ()):
        long_ways.clear()
        way._good.clear()
        inputs = [t if any(t is w for w in wrt) else t.detach() for t in logits]
        results = []
        for _ in range(2):
            loss = softmax_kl_div(*inputs, **options)
            results.append((loss.detach(), *(torch.autograd.grad(3 * loss, wrt) if wrt else ())))
            if wrt:
                softmax_kl_div(*inputs, **options).backward()
        assert long_ways == ["long"]
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    for t in logits:
        t.grad = None


@pytest.mark.parametrize("divergence", ops.DIVERGENCES)
def test_gradients_alone(divergence: str, long_ways: list[str]) -> None:
    first, second = (
        softmax_kl_div_grad(*pair(4, 10), temperature=2.0, divergence=divergence) for _ in range(2)
    )
    assert long_ways == ["long"]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert not b.requires_grad


@pytest.mark.parametrize("recompute", [None, True])
def test_second_derivatives_and_kept_graphs(recompute: bool | None, long_ways: list[str]) -> None:
    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return softmax_kl_div(student, teacher, recompute=recompute)

    logits = pair(3, 7, dtype=torch.float64)
    divergence(*logits)
    torch.autograd.gradgradcheck(divergence, logits)
    loss = divergence(*logits)
    first = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = [t.clone() for t in first]
    for t in first:
        t.zero_()  # a gradient belongs to whoever got it
    many = torch.autograd.grad(
        loss, logits, torch.ones(2, dtype=torch.float64), retain_graph=True, is_grads_batched=True
    )
    for a, b, c in zip(torch.autograd.grad(loss, logits), many, kept, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c.expand_as(b))
    assert long_ways == ["long"]


@pytest.mark.parametrize(
    "case",
    ["transform", "backend", "inference", "no rows", "weights", "class dimension", "rows apart"],
)
def test_what_takes_the_long_way(case: str, long_ways: list[str]) -> None:
    student, teacher = (t.detach() for t in pair(4, 10))
    softmax_kl_div(student, teacher)
    assert long_ways == ["long"]
    if case == "transform":
        torch.func.grad(softmax_kl_div)(student, teacher)
    elif case == "backend":
        with use_backend("reference"):
            softmax_kl_div(student, teacher)
    elif case == "inference":
        with torch.inference_mode():
            teacher = teacher.clone()
        softmax_kl_div(student.requires_grad_(), teacher).backward()
    elif case == "no rows":
        assert softmax_kl_div(student[:0], teacher[:0]).isnan()
    elif case == "weights":
        softmax_kl_div(student, teacher, row_weight=torch.ones(4))
    elif case == "class dimension":
        softmax_kl_div(student, teacher, dim=0)
    else:
        for _ in range(2):
            softmax_kl_div(student, teacher, reduction="none")
    assert len(long_ways) >= 2


def test_forward_mode_is_refused_all_the_same(long_ways: list[str]) -> None:
    student, teacher = (t.detach() for t in pair(4, 10))
    softmax_kl_div(student, teacher)
    softmax_kl_div_grad(student, teacher)
    for call in (softmax_kl_div, softmax_kl_div_grad):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(student, student)
            with pytest.raises(RuntimeError, match="forward-mode derivatives"):
                call(dual, teacher)


def test_a_schedule_of_temperatures_is_not_remembered_for_ever(long_ways: list[str]) -> None:
    student, teacher = pair(1, 2)
    for step in range(3 * way._MOST_REMEMBERED):
        softmax_kl_div(student, teacher, temperature=1 + step)
    assert len(way._good) <= way._MOST_REMEMBERED
