"""Bad input: each gives one sentence that names the argument, what it was, and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pytest
import torch

from afm_kernels import distillation_loss, dkl_loss, ops, softmax_kl_div, softmax_kl_div_grad, use_backend

GOOD = torch.zeros(4, 5)
SHARED = torch.zeros(5, 5)
PAIRS = torch.zeros(4, 10)
LABELS = torch.zeros(4, dtype=torch.long)


@pytest.fixture(autouse=True)
def remembered() -> None:
    """Options that were good once are taken for good: what is wrong then has to come out all the same."""
    softmax_kl_div(GOOD, GOOD)
    softmax_kl_div_grad(GOOD, GOOD)


def distillation(student: object, teacher: object, **others: object) -> object:
    return distillation_loss(
        student, teacher, **{"labels": LABELS, "alpha": 0.5, "temperature": 2.0, **others}
    )  # type: ignore[arg-type]


LOSSES: dict[str, Callable[..., object]] = {
    "softmax_kl_div": softmax_kl_div,
    "softmax_kl_div_grad": softmax_kl_div_grad,
    "distillation_loss": distillation,
    "dkl_loss": dkl_loss,
}

COMMON = [
    ([[1.0]], GOOD, {}, TypeError, r"student_logits is a list .*; a floating-point tensor is expected"),
    (
        GOOD,
        None,
        {},
        TypeError,
        r"teacher_logits is a NoneType \(None\); a floating-point tensor is expected",
    ),
    (
        GOOD,
        torch.zeros(4, 6),
        {},
        ValueError,
        r"teacher_logits has shape \(4, 6\) and student_logits \(4, 5\)",
    ),
    (
        GOOD,
        torch.zeros(1, 5),
        {},
        ValueError,
        r"teacher_logits has shape \(1, 5\) and student_logits \(4, 5\)",
    ),
    (
        GOOD.int(),
        GOOD,
        {},
        TypeError,
        r"student_logits has dtype torch.int32; allowed: float16, bfloat16, float32",
    ),
    (GOOD, GOOD.to(torch.complex64), {}, TypeError, r"teacher_logits has dtype torch.complex64; allowed"),
    (GOOD, GOOD.to_sparse(), {}, TypeError, r"teacher_logits has layout torch.sparse_coo; a dense tensor"),
    (GOOD, GOOD, {"dim": True}, TypeError, r"dim is a bool \(True\); an int is expected"),
    (GOOD, GOOD.bool(), {}, TypeError, r"teacher_logits has dtype torch.bool; allowed"),
    (GOOD, GOOD.to("meta"), {}, ValueError, r"teacher_logits is on meta and student_logits on cpu"),
    (torch.zeros(4, 0), torch.zeros(4, 0), {}, ValueError, r"class dimension of student_logits is empty"),
    (
        torch.zeros(()),
        torch.zeros(()),
        {},
        ValueError,
        r"student_logits has shape \(\), which has no class dimension",
    ),
    (GOOD, GOOD, {"dim": 2}, ValueError, r"dim is 2; allowed: -2 to 1 for logits of shape \(4, 5\)"),
    (GOOD, GOOD, {"dim": -3}, ValueError, r"dim is -3; allowed: -2 to 1"),
    (GOOD, GOOD, {"dim": 1.0}, TypeError, r"dim is a float \(1.0\); an int is expected"),
    (GOOD, GOOD, {"temperature": 0}, ValueError, r"temperature is 0; a positive, finite number is expected"),
    (GOOD, GOOD, {"temperature": -1.0}, ValueError, r"temperature is -1.0; a positive, finite number"),
    (GOOD, GOOD, {"temperature": float("inf")}, ValueError, r"temperature is inf; a positive, finite number"),
    (GOOD, GOOD, {"temperature": float("nan")}, ValueError, r"temperature is nan; a positive, finite number"),
    (
        GOOD,
        GOOD,
        {"temperature": "2"},
        TypeError,
        r"temperature is a str \('2'\); a positive number is expected",
    ),
    (GOOD, GOOD, {"row_weight": [1.0] * 4}, TypeError, r"row_weight is a list .*; a tensor is expected"),
    (
        GOOD,
        GOOD,
        {"row_weight": torch.ones(5)},
        ValueError,
        r"row_weight has shape \(5,\), which does not broadcast to \(4,\)",
    ),
    (
        GOOD,
        GOOD,
        {"row_weight": torch.ones(4, 1)},
        ValueError,
        r"row_weight has shape \(4, 1\), which does not broadcast",
    ),
    (
        GOOD,
        GOOD,
        {"row_weight": torch.ones(4, device="meta")},
        ValueError,
        r"row_weight is on meta and the logits on cpu",
    ),
    (
        GOOD,
        GOOD,
        {"row_weight": torch.ones(4).to(torch.complex64)},
        TypeError,
        r"row_weight has dtype torch.complex64",
    ),
    (
        GOOD,
        GOOD,
        {"row_weight": torch.ones(4, requires_grad=True)},
        ValueError,
        r"row_weight requires a gradient",
    ),
    (
        GOOD,
        GOOD,
        {"row_weight": torch.ones(4).to_sparse()},
        TypeError,
        r"row_weight has layout torch.sparse_coo; a dense tensor",
    ),
]
REDUCED = [
    (
        GOOD,
        GOOD,
        {"reduction": "max"},
        ValueError,
        r"reduction is 'max'; allowed: 'none', 'sum', 'mean', 'batchmean'",
    ),
    (GOOD, GOOD, {"reduction": None}, ValueError, r"reduction is None; allowed"),
    (
        GOOD[:0],
        GOOD[:0],
        {"reduction": "max", "labels": LABELS[:0]},
        ValueError,
        r"reduction is 'max'; allowed",
    ),
    (
        GOOD,
        GOOD,
        {"recompute": "yes"},
        TypeError,
        r"recompute is a str \('yes'\); allowed: True, False, None",
    ),
]
OWN = {
    "softmax_kl_div": [
        (
            GOOD,
            GOOD,
            {"divergence": "tv"},
            ValueError,
            r"divergence is 'tv'; allowed: 'kl', 'reverse_kl', 'jeffreys', 'js'",
        ),
        (
            GOOD,
            GOOD,
            {"divergence": "js", "beta": 0.0},
            ValueError,
            r"beta is 0.0; allowed: between 0 and 1, both excluded",
        ),
        (GOOD, GOOD, {"divergence": "js", "beta": 1}, ValueError, r"beta is 1; allowed: between 0 and 1"),
        (
            GOOD,
            GOOD,
            {"divergence": "js", "beta": "half"},
            TypeError,
            r"beta is a str \('half'\); a number is expected",
        ),
        (GOOD, GOOD, {"beta": "half"}, TypeError, r"beta is a str \('half'\); a number is expected"),
        # Equal to the number that is remembered.
        (GOOD, GOOD, {"temperature": Decimal(1)}, TypeError, r"temperature is a Decimal"),
        (
            GOOD,
            GOOD,
            {"scale_by_t2": "no"},
            TypeError,
            r"scale_by_t2 is a str \('no'\); allowed: True, False",
        ),
        # Equal to False, whose options are remembered.
        (GOOD, GOOD, {"scale_by_t2": 0}, TypeError, r"scale_by_t2 is a int \(0\); allowed: True, False"),
    ],
    "softmax_kl_div_grad": [
        (GOOD, GOOD, {"divergence": "tv"}, ValueError, r"divergence is 'tv'; allowed"),
        (GOOD, GOOD, {"wrt": ()}, ValueError, r"wrt is \(\); allowed: \('student', 'teacher'\)"),
        (GOOD, GOOD, {"wrt": "student"}, ValueError, r"wrt is 'student'; allowed"),
        (
            GOOD,
            GOOD,
            {"wrt": ("student", "student")},
            ValueError,
            r"wrt is \('student', 'student'\); allowed",
        ),
        (GOOD, GOOD, {"wrt": ("input",)}, ValueError, r"wrt is \('input',\); allowed"),
        (GOOD, GOOD, {"wrt": None}, ValueError, r"wrt is None; allowed"),
        (
            GOOD,
            GOOD,
            {"out": (torch.zeros(4, 5, dtype=torch.complex64).conj().imag, torch.zeros(4, 5))},
            ValueError,
            r"out for 'student' is a view whose negation is pending",
        ),
        (GOOD, GOOD, {"out": 1}, ValueError, r"out must hold one tensor for each side of wrt="),
        (GOOD, GOOD, {"out": GOOD}, ValueError, r"out must hold one tensor for each side of wrt="),
        (GOOD, GOOD, {"out": (GOOD,)}, ValueError, r"out must hold one tensor for each side of wrt="),
        (
            GOOD,
            GOOD,
            {"out": (GOOD.clone(), None)},
            TypeError,
            r"out for 'teacher' is a NoneType; a tensor is expected",
        ),
        (
            GOOD,
            GOOD,
            {"out": (GOOD.double(), GOOD)},
            ValueError,
            r"out for 'student' is \(4, 5\), torch.float64 on cpu; expected",
        ),
        (
            GOOD,
            GOOD,
            {"out": (GOOD.clone(), GOOD[:3])},
            ValueError,
            r"out for 'teacher' is \(3, 5\), torch.float32 on cpu",
        ),
        (
            GOOD,
            GOOD,
            {"out": (GOOD.clone().requires_grad_(), GOOD.clone())},
            ValueError,
            r"out for 'student' requires a gradient",
        ),
        (
            GOOD,
            GOOD,
            {"out": (GOOD[:1].clone().expand(4, 5), GOOD.clone())},
            ValueError,
            r"out for 'student' is expanded",
        ),
        (
            GOOD,
            GOOD,
            {"out": (SHARED[:4], SHARED[1:])},
            ValueError,
            r"out for 'student' and out for 'teacher' overlap in memory; they must be apart",
        ),
        (
            SHARED[:4],
            GOOD,
            {"out": (SHARED[1:], GOOD)},
            ValueError,
            r"out for 'student' and student_logits overlap in memory; they must be apart",
        ),
        (  # views that interleave: by address ranges, see Note [Tensors to write]
            GOOD,
            GOOD,
            {"out": (PAIRS[:, ::2], PAIRS[:, 1::2])},
            ValueError,
            r"out for 'student' and out for 'teacher' overlap in memory; they must be apart",
        ),
    ],
    "distillation_loss": [
        (GOOD, GOOD, {"alpha": 1.5}, ValueError, r"alpha is 1.5; allowed: from 0 to 1"),
        (GOOD, GOOD, {"alpha": None}, TypeError, r"alpha is a NoneType \(None\); a number is expected"),
        (GOOD, GOOD, {"label_smoothing": -0.1}, ValueError, r"label_smoothing is -0.1; allowed: from 0 to 1"),
        (
            GOOD,
            GOOD,
            {"label_smoothing": float("nan")},
            ValueError,
            r"label_smoothing is nan; allowed: from 0 to 1",
        ),
        (
            GOOD,
            GOOD,
            {"ignore_index": 1.5},
            TypeError,
            r"ignore_index is a float \(1.5\); an int is expected",
        ),
        (GOOD, GOOD, {"ignore_index": 2**70}, ValueError, r"ignore_index is \d+; an int64 is expected"),
        (
            GOOD,
            GOOD,
            {"labels": LABELS.to_sparse()},
            TypeError,
            r"labels has layout torch.sparse_coo; a dense tensor",
        ),
        (GOOD, GOOD, {"labels": [0] * 4}, TypeError, r"labels is a list; an integer tensor is expected"),
        (
            GOOD,
            GOOD,
            {"labels": LABELS.float()},
            TypeError,
            r"labels has dtype torch.float32; an integer tensor",
        ),
        (GOOD, GOOD, {"labels": LABELS.bool()}, TypeError, r"labels has dtype torch.bool; an integer tensor"),
        (
            GOOD,
            GOOD,
            {"labels": LABELS[:3]},
            ValueError,
            r"labels has shape \(3,\); expected that of the rows, \(4,\)",
        ),
        (GOOD, GOOD, {"labels": LABELS.to("meta")}, ValueError, r"labels is on meta and the logits on cpu"),
        (
            GOOD,
            GOOD,
            {"labels": LABELS - 1},
            ValueError,
            r"labels holds -1; allowed: 0 to 4, and ignore_index=-100",
        ),
        (GOOD, GOOD, {"labels": LABELS + 5}, ValueError, r"labels holds 5; allowed: 0 to 4"),
    ],
    "dkl_loss": [
        (GOOD, GOOD, {"symmetric": 1}, TypeError, r"symmetric is a int \(1\); allowed: True, False"),
        (
            GOOD,
            GOOD,
            {"alpha": -1.0},
            ValueError,
            r"alpha is -1.0; a finite number of at least 0 is expected",
        ),
        (
            GOOD,
            GOOD,
            {"beta": float("inf")},
            ValueError,
            r"beta is inf; a finite number of at least 0 is expected",
        ),
        (
            GOOD,
            GOOD,
            {"weight_temperature": 0.0},
            ValueError,
            r"weight_temperature is 0.0; a positive, finite number",
        ),
        (
            GOOD,
            GOOD,
            {"class_weight": torch.ones(4)},
            ValueError,
            r"class_weight has shape \(4,\), which does not broadcast",
        ),
        (
            GOOD,
            GOOD,
            {"class_weight": [1.0] * 5},
            TypeError,
            r"class_weight is a list .*; a tensor is expected",
        ),
        (
            GOOD,
            GOOD,
            {"class_weight": torch.ones(5, requires_grad=True)},
            ValueError,
            r"class_weight requires a gradient",
        ),
    ],
}

CASES = [
    (name, *case)
    for name in LOSSES
    for case in (*COMMON, *(REDUCED if name != "softmax_kl_div_grad" else ()), *OWN[name])
]


@pytest.mark.parametrize(("name", "student", "teacher", "arguments", "error", "sentence"), CASES)
def test_bad_argument(
    name: str,
    student: object,
    teacher: object,
    arguments: dict[str, object],
    error: type[Exception],
    sentence: str,
) -> None:
    arguments = dict(arguments)
    labels = arguments.pop("labels", None)
    if labels is not None and name == "distillation_loss":
        arguments["labels"] = labels
    with pytest.raises(error, match=sentence) as caught:
        LOSSES[name](student, teacher, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", [case for case in OWN["softmax_kl_div_grad"] if "out" in case[2]])
def test_out_is_refused_alike_where_python_looks_at_it_first(case: tuple) -> None:
    """The compiled CPU operator looks at ``out`` itself; see Note [Tensors to write]."""
    with use_backend("reference"):
        test_bad_argument("softmax_kl_div_grad", *case)


def test_labels_are_not_looked_at_without_a_cross_entropy() -> None:
    assert distillation(GOOD, GOOD, labels=LABELS + 99, alpha=1.0) == 0


def test_out_of_shapes_alone() -> None:
    """Meta tensors have no memory to share."""
    meta = GOOD.to("meta")
    to_student, _ = softmax_kl_div_grad(meta, meta, out=(torch.empty_like(meta), torch.empty_like(meta)))
    assert to_student.shape == GOOD.shape


def test_integers_of_numpy_are_integers() -> None:
    for dim in (np.int64(0), np.int32(-2)):
        assert torch.equal(softmax_kl_div(GOOD, PAIRS[:, :5], dim=dim), softmax_kl_div(GOOD, GOOD, dim=0))
        assert softmax_kl_div_grad(GOOD, GOOD, dim=dim)[0].shape == GOOD.shape
    distillation(GOOD, GOOD, ignore_index=np.int64(-1))


def test_a_wrong_name_of_an_argument_is_refused() -> None:
    for loss in LOSSES.values():
        with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
            loss(GOOD, GOOD, temprature=2.0)


def test_two_sides_of_different_dtypes_are_fine() -> None:
    assert softmax_kl_div(GOOD.bfloat16(), GOOD.double()).dtype == torch.float64
    assert softmax_kl_div(GOOD.bfloat16(), GOOD.half()).dtype == torch.float32


def test_compiled_operators_refuse_what_they_must_not_write() -> None:
    """Also where no Python looks first: see Note [Tensors to write]."""
    if "cpp" not in ops.TABLE["softmax_kl_grad_out", "cpu"]:
        pytest.skip("the compiled CPU module is not built")
    operators = torch.ops.afm_kernels
    student, teacher, out = torch.zeros(3, 4, 5)
    for bad in (student, teacher, out.double(), out[:3], out[:1].expand(4, 5), PAIRS[:, :5].flatten()):
        with pytest.raises(RuntimeError, match="a gradient is not like its logits, is expanded, or overlaps"):
            operators.softmax_kl_grad_out(student, teacher, None, 1.0, 0, 0.5, 1.0, bad, None)
    with pytest.raises(RuntimeError, match="the gradients overlap in memory"):
        operators.softmax_kl_grad_out(student, teacher, None, 1.0, 0, 0.5, 1.0, PAIRS[:, ::2], PAIRS[:, 1::2])
    with pytest.raises(RuntimeError, match="out is expanded, or overlaps an input that it is not itself"):
        operators.pgd_step_out(SHARED[:4], out, student, 0.1, 0.1, 0, None, None, SHARED[1:])
