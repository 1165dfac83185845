"""Properties that hold for all shapes, strides, dtypes and values, searched by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_gradient, assert_loss
from torch import Tensor
from truth import eager_with_grads, gradient_terms, truth_divergence

from afm_kernels import softmax_kl_div, softmax_kl_div_grad
from afm_kernels.ops import DIVERGENCES

STEM = "softmax_kl"

# Derandomised, so that a failure is the commit's and not the day's. Raise max_examples to search for longer.
quick = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# Exactly representable in every dtype: conversions add no error of their own.
ordinary = st.integers(-48, 48).map(lambda n: n / 8)
hard = st.sampled_from([float("-inf"), float("inf"), float("nan"), -1e4, 1e4, 0.0])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """How a tensor of ``shape`` lies in memory: an order of dimensions, steps, and an offset."""
    order = draw(st.permutations(range(len(shape))))
    steps = tuple(draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape)
    return tuple(order), steps, draw(st.integers(0, 3))


def laid_out(values: Tensor, order: tuple[int, ...], steps: tuple[int, ...], offset: int) -> Tensor:
    """``values`` as a view of a larger storage, surrounded by NaN that must never be read."""
    sizes = [values.shape[d] * steps[d] for d in order]
    storage = torch.full((offset + int(torch.tensor(sizes).prod()),), float("nan"), dtype=values.dtype)
    view = storage[offset:].reshape(sizes).permute([order.index(d) for d in range(len(order))])
    view = view[tuple(slice(None, None, step) for step in steps)]
    view.copy_(values)
    return view


@st.composite
def problems(draw: st.DrawFn, values: st.SearchStrategy[float]) -> tuple[Tensor, Tensor, int]:
    """Student, teacher and class dimension."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=2)))
    dim = draw(st.integers(0, len(shape)))
    shape = (*shape[:dim], draw(st.integers(1, 40)), *shape[dim:])
    count = int(torch.tensor(shape).prod())
    sides = []
    for _ in range(2):
        flat = torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float64)
        tensor = flat.reshape(shape).to(draw(st.sampled_from(DTYPES)))
        sides.append(laid_out(tensor, *draw(layouts(shape))))
    return sides[0], sides[1], draw(st.sampled_from([dim, dim - len(shape)]))


def check(
    student: Tensor, teacher: Tensor, dim: int, divergence: str, temperature: float, recompute: bool
) -> None:
    own = [x.detach().requires_grad_() for x in (student, teacher)]
    arguments = {"temperature": temperature, "divergence": divergence, "beta": 0.3}
    rows = softmax_kl_div(*own, dim=dim, reduction="none", recompute=recompute, **arguments)
    gradients = torch.autograd.grad(rows.sum(), own)
    last = [x.movedim(dim, -1) for x in (student, teacher)]
    truth = truth_divergence(*last, temperature, divergence, 0.3)
    same = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    eager = eager_with_grads(*(x.to(same) for x in last), temperature, divergence, 0.3)
    terms = gradient_terms(*last, temperature)
    assert_loss(rows, truth[0], eager[0])
    for gradient, wanted, peer, logits in zip(gradients, truth[1:], eager[1:], own, strict=True):
        assert gradient.shape == logits.shape
        assert gradient.dtype == logits.dtype
        assert_gradient(gradient.movedim(dim, -1), wanted, peer, terms=terms)


@quick
@given(problems(ordinary), st.sampled_from(DIVERGENCES), st.sampled_from([0.5, 1.0, 4.0]), st.booleans())
def test_any_layout(
    device: torch.device,
    problem: tuple[Tensor, Tensor, int],
    divergence: str,
    temperature: float,
    recompute: bool,
) -> None:
    student, teacher, dim = problem
    check(student.to(device), teacher.to(device), dim, divergence, temperature, recompute)


@quick
@given(problems(st.one_of(ordinary, hard)), st.sampled_from(DIVERGENCES), st.booleans())
def test_any_hard_values(
    device: torch.device, problem: tuple[Tensor, Tensor, int], divergence: str, recompute: bool
) -> None:
    student, teacher, dim = problem
    check(student.to(device), teacher.to(device), dim, divergence, 1.0, recompute)


@quick
@given(problems(ordinary), st.sampled_from(DIVERGENCES), st.integers(-512, 512))
def test_a_shift_of_the_logits_changes_nothing(
    device: torch.device, problem: tuple[Tensor, Tensor, int], divergence: str, shift: int
) -> None:
    student, teacher, dim = problem
    student, teacher = student.to(device).double(), teacher.to(device).double()
    arguments = {"dim": dim, "divergence": divergence, "beta": 0.3}
    plain = softmax_kl_div(student, teacher, reduction="none", **arguments)
    shifted = softmax_kl_div(student + shift, teacher, reduction="none", **arguments)
    torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-12)


@quick
@given(problems(st.one_of(ordinary, hard)), st.sampled_from(DIVERGENCES))
def test_rows_do_not_see_each_other(
    device: torch.device, problem: tuple[Tensor, Tensor, int], divergence: str
) -> None:
    """Each row alone gives what it gives in its batch."""
    student, teacher = (x.to(device).movedim(problem[2], -1) for x in problem[:2])
    num_classes = student.shape[-1]
    arguments = {"divergence": divergence, "beta": 0.3}
    rows = softmax_kl_div(student, teacher, reduction="none", **arguments).reshape(-1)
    gradients = [g.reshape(-1, num_classes) for g in softmax_kl_div_grad(student, teacher, **arguments)]
    for i, (s, t) in enumerate(
        zip(student.reshape(-1, num_classes), teacher.reshape(-1, num_classes), strict=True)
    ):
        close = {"rtol": 1e-5, "atol": 1e-7, "equal_nan": True}
        torch.testing.assert_close(softmax_kl_div(s, t, reduction="none", **arguments), rows[i], **close)
        for alone, batch in zip(softmax_kl_div_grad(s, t, **arguments), gradients, strict=True):
            torch.testing.assert_close(
                alone, batch[i], **(close | ({"rtol": 1e-2} if alone.element_size() == 2 else {}))
            )
