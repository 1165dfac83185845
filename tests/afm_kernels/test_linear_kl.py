"""linear_kl_div against what it replaces: logits by PyTorch's own products, and the losses of logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afm_kernels import (
    LinearKLDivLoss,
    Projection,
    TopK,
    linear_kl_chunk_rows,
    linear_kl_div,
    softmax_kl_div,
    topk_kl_div,
)
from afm_kernels.autograd.expected import STREAK, forget_gradients

STEM = "linear_kl_rows"
ROWS, CLASSES = (3, 11), 37


class Case:
    """Two heads in float64 with all that requires a gradient, and the loss by way of their logits."""

    def __init__(self, device: torch.device | str = "cpu", classes: int = CLASSES) -> None:
        torch.manual_seed(0)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, device=device).requires_grad_()

        self.hidden, self.weight, self.bias = leaf(*ROWS, 8), leaf(classes, 8), leaf(classes)
        self.teacher = Projection(leaf(*ROWS, 6), leaf(classes, 6), leaf(classes), 5.0, 1.2)
        self.labels = torch.randint(0, classes, ROWS, device=device)
        self.row_weight = torch.rand(ROWS, device=device, dtype=torch.float64)
        self.row_weight[0, 3] = 0
        self.row_weight[2] = 0

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias, *self.teacher[:3]]

    @staticmethod
    def logits(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, scale: float
    ) -> Tensor:
        z = scale * (hidden @ weight.t() + (0 if bias is None else bias))
        return z if cap is None else cap * torch.tanh(z / cap)

    def plain(self, teacher_logits: Tensor | None = None, **options: Any) -> Tensor:
        student = self.logits(
            self.hidden, self.weight, self.bias, options.get("softcap"), options.get("logit_scale", 1.0)
        )
        teacher = self.logits(*self.teacher) if teacher_logits is None else teacher_logits
        alpha = options.get("alpha", 1.0)
        value = alpha * softmax_kl_div(
            student,
            teacher,
            reduction="none",
            **{k: v for k, v in options.items() if k in ("temperature", "divergence", "beta", "scale_by_t2")},
        )
        if "labels" in options:
            hard = F.cross_entropy(
                student.movedim(-1, 1),
                options["labels"],
                reduction="none",
                label_smoothing=options.get("label_smoothing", 0.0),
            )
            value = value + (1 - alpha) * hard
        if options.get("row_weight") is not None:
            value = value * options["row_weight"]
        if options.get("reduction", "batchmean") == "none":
            return value
        return value.sum() / (value.numel() * (CLASSES if options.get("reduction") == "mean" else 1))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"recompute": True, "row_weight": True},
    {"reduction": "none", "row_weight": True, "softcap": 3.0},
    {"softcap": 3.0, "logit_scale": 0.7, "reduction": "mean"},
    {"labels": True, "alpha": 0.6, "temperature": 2.0, "scale_by_t2": True, "label_smoothing": 0.1},
    {"labels": True, "alpha": 0.0, "row_weight": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(o) or "plain" for o in OPTIONS])
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jeffreys", "js"])
def test_loss_and_gradients(device: torch.device, divergence: str, options: dict[str, Any]) -> None:
    """Every option against the losses of logits: both sides' six gradients, in chunks of 1, 7 and all rows."""
    case = Case(device)
    options = {**options, "divergence": divergence, "beta": 0.3}
    for name in ("labels", "row_weight"):
        if name in options:
            options[name] = getattr(case, name)
    per_row = options.get("reduction") == "none"
    upstream = torch.rand(ROWS, dtype=torch.float64, device=device) if per_row else 1.7
    wanted = case.plain(**options)
    truth = torch.autograd.grad((wanted * upstream).sum(), case.leaves, allow_unused=True)
    for chunk_rows in (1, 7, None):
        loss = linear_kl_div(
            case.hidden,
            case.weight,
            case.teacher,
            student_bias=case.bias,
            chunk_rows=chunk_rows,
            **options,
        )
        torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
        grads = torch.autograd.grad((loss * upstream).sum(), case.leaves, allow_unused=True)
        for grad, exact in zip(grads, truth, strict=True):
            if grad is None:  # alpha = 0: the teacher is not looked at
                assert exact is None or exact.abs().max() == 0
            else:
                torch.testing.assert_close(grad, exact, rtol=1e-9, atol=1e-11)


def test_given_logits(device: torch.device) -> None:
    """Logits instead of a projection: their gradient too, and they are not written."""
    case = Case(device)
    given = case.logits(*case.teacher).detach().requires_grad_()
    before = given.detach().clone()
    for weight in (None, case.row_weight):
        leaves = [case.hidden, case.weight, given]
        wanted = case.plain(given, row_weight=weight)
        loss = linear_kl_div(
            case.hidden, case.weight, given, student_bias=case.bias, row_weight=weight, chunk_rows=7
        )
        torch.testing.assert_close(loss, wanted)
        for grad, exact in zip(
            torch.autograd.grad(loss * 3, leaves), torch.autograd.grad(wanted * 3, leaves), strict=True
        ):
            torch.testing.assert_close(grad, exact)
    assert torch.equal(given, before)


@pytest.mark.parametrize("mode", ["tail", "renormalise", "both", "truncate"])
def test_kept_classes(mode: str) -> None:
    """A teacher of whom k classes are known, with labels and without, weighted, recomputed and compiled."""
    case = Case()
    teacher = TopK.from_logits(case.logits(*case.teacher), 5, temperature=2.0).with_mode(mode)
    leaves = [case.hidden, case.weight, case.bias]
    for alpha, weight in ((1.0, None), (0.6, case.row_weight)):
        options: dict[str, Any] = {"temperature": 2.0, "chunk_rows": 7, "student_bias": case.bias}
        options |= {"labels": case.labels, "alpha": alpha, "scale_by_t2": True, "row_weight": weight}
        logits = case.logits(case.hidden, case.weight, case.bias, None, 1.0)
        values = 4 * alpha * topk_kl_div(logits, teacher, temperature=2.0, reduction="none")
        values = values + (1 - alpha) * F.cross_entropy(logits.movedim(-1, 1), case.labels, reduction="none")
        wanted = (values if weight is None else values * weight).mean()
        exact = torch.autograd.grad(wanted, leaves)

        def loss(h: Tensor, w: Tensor, options: dict[str, Any] = options, **more: Any) -> Tensor:
            return linear_kl_div(h, w, teacher, **options, **more)

        calls = [loss, partial(loss, recompute=True)]
        if mode == "tail" and weight is not None:
            calls.append(torch.compile(loss, fullgraph=True, backend="aot_eager"))
        for call in calls:
            got = call(case.hidden, case.weight)
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
            for grad, true in zip(torch.autograd.grad(got, leaves), exact, strict=True):
                torch.testing.assert_close(grad, true, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"temperature is 1\.0, but the teacher"):
        linear_kl_div(case.hidden, case.weight, teacher)
    with pytest.raises(ValueError, match="divergence is 'js'; of a TopK"):
        linear_kl_div(case.hidden, case.weight, teacher, temperature=2.0, divergence="js")
    with pytest.raises(ValueError, match="student_weight has 36 classes and teacher 37"):
        linear_kl_div(case.hidden, case.weight[:-1], teacher, temperature=2.0)


@pytest.mark.default_backend
def test_gradcheck(device: torch.device) -> None:
    case = Case(device)
    with torch.no_grad():
        parts = [t[:1, :3].clone() if t.dim() == 3 else t[:5].clone() for t in case.leaves]
    parts = [part.requires_grad_() for part in parts]

    def loss(h: Tensor, w: Tensor, b: Tensor, ht: Tensor, wt: Tensor, bt: Tensor) -> Tensor:
        return linear_kl_div(
            h, w, Projection(ht, wt, bt, 4.0), student_bias=b, chunk_rows=2, softcap=3.0, divergence="js"
        )

    assert torch.autograd.gradcheck(loss, parts)


@pytest.mark.default_backend
@pytest.mark.parametrize(("size", "kl"), [(0.1, 4e-2), (0.01, 4e-4), (0.0003, 4e-6)])
def test_bfloat16_keeps_small_divergences(device: torch.device, size: float, kl: float) -> None:
    """KL of 4e-2, 4e-4 and 4e-6 from bfloat16: a projection that rounds logits to it is off by 40 % and 700 %."""
    torch.manual_seed(1)
    weight = (torch.randn(4096, 64, device=device) * (3 / 8)).bfloat16()
    teacher = torch.randn(128, 64, device=device)
    hidden = (teacher + size * torch.randn_like(teacher)).bfloat16()
    teacher = teacher.bfloat16()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_kl_div(h, w, Projection(teacher, weight))
    loss.backward()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    truth = softmax_kl_div(h64 @ w64.t(), teacher.double() @ weight.double().t())
    truth.backward()
    assert kl / 3 < truth.item() < 3 * kl
    assert abs(loss.item() / truth.item() - 1) < 1e-4
    for grad, exact in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert grad is not None
        assert exact is not None
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - exact).norm() / exact.norm() < 2**-8  # one rounding


@pytest.mark.default_backend
def test_half_precision_and_mixed(device: torch.device) -> None:
    """float16 gradients wait in float32 for their loss scale; dtypes may differ; autocast changes nothing."""
    case = Case(device)
    for dtype, weight_dtype in (
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        h = case.hidden.detach().to(dtype).requires_grad_()
        w = case.weight.detach().to(weight_dtype).requires_grad_()
        teacher = Projection(case.teacher.hidden.detach().float(), case.teacher.weight.detach().to(dtype))
        h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        truth = softmax_kl_div(h64 @ w64.t(), teacher.hidden.double() @ teacher.weight.double().t())
        with torch.autocast(device.type, torch.bfloat16):
            loss = linear_kl_div(h, w, teacher)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
        tiny = 2.0**-20
        (loss * tiny).backward()
        (truth * tiny).backward()
        for grad, exact, own in ((h.grad, h64.grad, dtype), (w.grad, w64.grad, weight_dtype)):
            assert grad is not None
            assert exact is not None
            assert grad.dtype == own
            torch.testing.assert_close(grad.double(), exact.to(own).double(), rtol=1e-2, atol=1.2e-7)


@pytest.mark.default_backend
def test_rows_of_weight_0_are_inert(device: torch.device) -> None:
    """Whatever they hold: eager, where they are left out, and compiled, where they are not."""
    case = Case(device)
    hidden = case.hidden.detach().clone()
    teacher_hidden = case.teacher.hidden.detach().clone()
    hidden[case.row_weight == 0] = torch.nan
    teacher_hidden[case.row_weight == 0] = torch.inf
    hidden.requires_grad_()
    teacher_hidden.requires_grad_()
    wanted = torch.autograd.grad(case.plain(row_weight=case.row_weight), case.leaves)

    def loss(h: Tensor, w: Tensor, b: Tensor, *teacher: Tensor) -> Tensor:
        return linear_kl_div(
            h, w, Projection(*teacher, 5.0, 1.2), student_bias=b, row_weight=case.row_weight, chunk_rows=7
        )

    leaves = [hidden, case.weight, case.bias, teacher_hidden, *case.teacher[1:3]]
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        for grad, exact in zip(torch.autograd.grad(call(*leaves), leaves), wanted, strict=True):
            torch.testing.assert_close(grad, exact)
    nothing = linear_kl_div(hidden, case.weight, case.teacher, row_weight=torch.zeros((), device=device))
    nothing.backward()
    assert nothing.item() == 0
    assert case.weight.grad is not None
    assert case.weight.grad.abs().max() == 0


@pytest.mark.default_backend
def test_hard_rows_stay_their_own(device: torch.device) -> None:
    """A NaN row is NaN in the loss and in its own hidden gradient; others are untouched."""
    case = Case(device)
    hidden = case.hidden.detach().clone()
    hidden[0, 0] = torch.nan
    hidden.requires_grad_()
    values = linear_kl_div(hidden, case.weight, case.teacher, student_bias=case.bias, reduction="none")
    wanted = case.plain(reduction="none")
    assert values[0, 0].isnan()
    torch.testing.assert_close(values.flatten()[1:], wanted.flatten()[1:])
    (grad,) = torch.autograd.grad(values.sum(), hidden)
    (exact,) = torch.autograd.grad(wanted.sum(), case.hidden)
    assert grad[0, 0].isnan().all()
    torch.testing.assert_close(grad.flatten(0, 1)[1:], exact.flatten(0, 1)[1:])
    # A class that the bias takes out on both sides, and one that it takes out of the student alone.
    for both, value in ((True, "finite"), (False, "inf")):
        bias, bias_t = case.bias.detach().clone(), torch.zeros(CLASSES, dtype=torch.float64, device=device)
        bias[4] = -torch.inf
        if both:
            bias_t[4] = -torch.inf
        loss = linear_kl_div(
            case.hidden, case.weight, Projection(*case.teacher[:2], bias_t), student_bias=bias
        )
        assert bool(loss.isfinite()) == (value == "finite")
        assert not loss.isnan()


@pytest.mark.default_backend
def test_one_weight_on_both_sides_and_shared_classes(device: torch.device) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 8, dtype=torch.float64, device=device).requires_grad_()
    student, teacher = torch.randn(2, 9, 8, dtype=torch.float64, device=device).requires_grad_()
    for recompute in (True, False):
        loss = linear_kl_div(
            student, weight, Projection(teacher, weight), num_classes=13, recompute=recompute
        )
        (grad,) = torch.autograd.grad(loss, weight)
        exact = torch.autograd.grad(
            softmax_kl_div(student @ weight[:13].t(), teacher @ weight[:13].t()), weight
        )
        torch.testing.assert_close(grad, exact[0])
    larger = torch.randn(31, 8, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"student_hidden has shape .* with H at least 1"):
        linear_kl_div(student[:, :0], weight[:, :0], Projection(teacher, larger))
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"logit_scale is .*; a finite number is expected"):
            linear_kl_div(student, weight, Projection(teacher, weight), logit_scale=scale)
        with pytest.raises(ValueError, match=r"teacher\.logit_scale is .*; a finite number is expected"):
            linear_kl_div(student, weight, Projection(teacher, weight, logit_scale=scale))
    with pytest.raises(ValueError, match=r"student_weight has 20 classes and teacher\.weight 31"):
        linear_kl_div(student, weight, Projection(teacher, larger))
    linear_kl_div(student, weight, Projection(teacher, larger), num_classes=20).backward()


@pytest.mark.default_backend
def test_frozen_and_no_rows(device: torch.device) -> None:
    case = Case(device)
    weight = case.weight.detach()
    loss = linear_kl_div(case.hidden, weight, Projection(*(t.detach() for t in case.teacher[:2])))
    loss.backward()
    assert case.hidden.grad is not None
    empty = case.hidden[:0].detach().requires_grad_()
    teacher = Projection(case.teacher.hidden[:0], case.teacher.weight)
    for reduction, value in (("sum", 0.0), ("batchmean", torch.nan), ("mean", torch.nan)):
        loss = linear_kl_div(empty, case.weight, teacher, reduction=reduction)
        torch.testing.assert_close(loss.item(), value, equal_nan=True)
    loss = linear_kl_div(empty, case.weight, teacher, reduction="none")
    assert loss.shape == (0, 11)
    loss.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape


@pytest.mark.default_backend
@pytest.mark.parametrize(
    "options", [{}, {"recompute": True}, {"reduction": "none"}, {"alpha": 0.3, "labels": True}]
)
def test_compiled(device: torch.device, options: dict[str, Any]) -> None:
    """One operator in the graph, for any number of rows."""
    case = Case(device)
    labels = case.labels if options.get("labels") else None
    options = {**options, "labels": labels}

    def step(h: Tensor, w: Tensor, b: Tensor, *teacher: Tensor, **options: Any) -> Tensor:
        return linear_kl_div(h, w, Projection(*teacher), student_bias=b, **options).sum() * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (3, 2):
        leaves = [t[:rows] if t.dim() == 3 else t for t in case.leaves]
        if labels is not None:
            options["labels"] = labels[:rows]
        wanted, got = step(*leaves, **options), compiled(*leaves, **options)
        torch.testing.assert_close(got, wanted)
        for grad, exact in zip(
            torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True
        ):
            torch.testing.assert_close(grad, exact)


@pytest.mark.default_backend
def test_transforms_and_refusals(device: torch.device) -> None:
    case = Case(device)
    teacher = Projection(*(t.detach() for t in case.teacher[:3]))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_kl_div(h, w, teacher)

    plain = torch.autograd.grad(loss(case.hidden, case.weight), [case.hidden, case.weight])
    h, w = case.hidden.detach(), case.weight.detach()
    for grad, exact in zip(torch.func.grad(loss, (0, 1))(h, w), plain, strict=True):
        torch.testing.assert_close(grad, exact)
    with pytest.raises(RuntimeError, match="under vmap is not supported"):
        torch.func.vmap(loss, (0, None))(torch.stack((h, h)), w)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(loss, (h, w), (h, w))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, w).sum())(h)
    for recompute in (True, False):
        value = linear_kl_div(case.hidden, case.weight, teacher, recompute=recompute)
        (grad,) = torch.autograd.grad(value, case.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            grad.sum().backward()


@pytest.mark.default_backend
def test_backward_twice_and_expectations(device: torch.device) -> None:
    """Gradients made for the upstream gradient that is expected are those of any other that comes."""
    case = Case(device)
    (exact,) = torch.autograd.grad(case.plain(), case.weight)
    forget_gradients()
    try:
        for factor in [0.25] * (STREAK + 2) + [3.0, 0.0]:
            loss = linear_kl_div(case.hidden, case.weight, case.teacher, student_bias=case.bias)
            torch.testing.assert_close(loss, case.plain())
            (first,) = torch.autograd.grad(loss * factor, case.weight, retain_graph=True)
            (second,) = torch.autograd.grad(loss * factor, case.weight)
            torch.testing.assert_close(first, factor * exact)
            torch.testing.assert_close(second, factor * exact)
            with pytest.raises(RuntimeError, match="a second time"):
                loss.backward()
    finally:
        forget_gradients()


@pytest.mark.default_backend
def test_a_teacher_from_inference_mode_and_the_module(device: torch.device) -> None:
    case = Case(device)
    with torch.inference_mode():
        teacher = Projection(*(t.clone() for t in case.teacher[:3]), 5.0, 1.2)
    for recompute in (True, False):
        loss = LinearKLDivLoss(0.6, 2.0, recompute=recompute)(
            case.hidden, case.weight, teacher, case.labels, student_bias=case.bias
        )
        wanted = case.plain(alpha=0.6, temperature=2.0, labels=case.labels)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(loss, case.hidden), torch.autograd.grad(wanted, case.hidden)
        )


@pytest.mark.default_backend
def test_gradients_of_weights_do_not_depend_on_the_number_of_chunks(device: torch.device) -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 16, device=device).bfloat16()
    hidden, teacher = torch.randn(2, 128, 16, device=device).bfloat16()
    truth = None
    errors = []
    for chunk_rows in (128, 1):
        w = weight.clone().requires_grad_()
        linear_kl_div(hidden, w, Projection(teacher, weight), chunk_rows=chunk_rows).backward()
        if truth is None:
            w64 = weight.double().requires_grad_()
            softmax_kl_div(hidden.double() @ w64.t(), teacher.double() @ weight.double().t()).backward()
            truth = w64.grad
        assert w.grad is not None
        assert truth is not None
        errors.append(((w.grad.double() - truth).norm() / truth.norm()).item())
    assert errors[1] < 1.05 * errors[0]


def test_chunk_rows() -> None:
    assert linear_kl_chunk_rows(2048, 32000) == 512
    assert linear_kl_chunk_rows(1024, 128256) == 256
    assert linear_kl_chunk_rows(10000, 128256) == 1000
    assert linear_kl_chunk_rows(257, 128256) == 129  # two equal chunks, not one row by itself
    assert linear_kl_chunk_rows(10, 5) == 10
    assert linear_kl_chunk_rows(8192, 128256, "cuda") == 2048
    with pytest.raises(ValueError, match="num_classes 0"):
        linear_kl_chunk_rows(5, 0)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_hidden": torch.zeros(3, 4)}, ValueError, r"student_weight has shape \(5, 8\)"),
    ({"student_weight": torch.zeros(5, 8).long()}, TypeError, "student_weight has dtype torch.int64"),
    ({"student_bias": torch.zeros(4)}, ValueError, r"student_bias has shape \(4,\)"),
    ({"teacher": torch.zeros(2, 5)}, ValueError, r"teacher has shape \(2, 5\)"),
    ({"teacher": 3}, TypeError, "teacher is a int"),
    ({"teacher": torch.zeros(3, 6)}, ValueError, "student_weight has 5 classes and teacher 6"),
    ({"num_classes": 6}, ValueError, "num_classes is 6; allowed: 1 to 5"),
    ({"alpha": 0.5}, ValueError, "alpha is 0.5 and labels is None"),
    ({"alpha": 0.5, "labels": torch.tensor([0, 1, 5])}, ValueError, "labels holds 5"),
    ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ({"logit_scale": "a"}, TypeError, "logit_scale is a str"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows is 0"),
    ({"accumulate_dtype": torch.bfloat16}, ValueError, "accumulate_dtype is torch.bfloat16"),
    ({"divergence": "tv"}, ValueError, "divergence is 'tv'"),
    ({"reduction": "median"}, ValueError, "reduction is 'median'"),
    ({"recompute": 1}, TypeError, "recompute is a int"),
    ({"row_weight": torch.zeros(4)}, ValueError, "row_weight has shape"),
    ({"teacher": Projection(torch.zeros(3, 8, device="meta"), torch.zeros(5, 8))}, ValueError, "is on"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[next(reversed(b[0])) for b in BAD])
def test_what_is_refused(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "student_hidden": torch.zeros(3, 8),
        "student_weight": torch.zeros(5, 8),
        "teacher": torch.zeros(3, 5),
    }
    with pytest.raises(error, match=message):
        linear_kl_div(**{**good, **bad})
