"""topk_kl_div: KL from k kept classes and their tail, against the formulas in float64, on every backend."""

from __future__ import annotations

import pytest
import torch
from tolerances import GRADIENT, relative_l2, same_specials
from torch import Tensor

from afm_kernels import TopK, ops, softmax_kl_div, topk_kl_div

STEM = "topk_kl"
NAN, INF = float("nan"), float("inf")
MODES = ops.TOPK_MODES


def drawn(
    device: torch.device,
    shape: tuple[int, ...],
    k: int,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    dim: int = -1,
    apart: float | None = None,
) -> tuple[Tensor, TopK]:
    """Student logits, and a teacher's top k; one row keeps a class fewer. ``apart``: how far the sides differ."""
    generator = torch.Generator().manual_seed(len(shape) * shape[-1])
    teacher = 3 * torch.randn(shape, generator=generator)
    student = 3 * torch.randn(shape, generator=generator)
    if apart is not None:
        student = teacher + apart * torch.randn(shape, generator=generator)
    topk = TopK.from_logits(teacher.to(dtype), k, temperature=temperature, dim=dim)
    if k > 1:
        topk.indices.view(-1, k)[0, k // 2] = -1
        topk.log_probs.view(-1, k)[0, k // 2] = NAN  # padding may hold anything
    return student.to(dtype).to(device).requires_grad_(), topk.to(device)


def plain(student: Tensor, teacher: TopK, dim: int = -1) -> Tensor:
    """The row values as the docstring has them, in float64."""
    log_q = (student.double().movedim(dim, -1) / teacher.temperature).log_softmax(-1)
    padding = teacher.indices < 0
    at = teacher.indices.long().clamp(min=0)
    log_p = teacher.log_probs.double().masked_fill(padding, -INF)
    kept = torch.zeros_like(log_q).scatter_add(-1, at, (~padding).double()) > 0
    rest = log_q.masked_fill(kept, -INF).logsumexp(-1, keepdim=True)
    log_q = log_q.gather(-1, at).masked_fill(padding, -INF)
    if teacher.mode == "tail":
        assert teacher.log_tail is not None
        log_p = torch.cat((log_p, teacher.log_tail.double().unsqueeze(-1)), -1)
        log_q = torch.cat((log_q, rest), -1)
    if teacher.mode != "truncate":
        log_p = log_p.log_softmax(-1)
    if teacher.mode == "both":
        log_q = log_q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -INF, 0).sum(-1)


def assert_is_plain(
    student: Tensor, teacher: TopK, dim: int, weight: Tensor | None = None, loss_error: float = 1e-5
) -> None:
    rows = topk_kl_div(
        student, teacher, temperature=teacher.temperature, reduction="none", dim=dim, row_weight=weight
    )
    truth = plain(student, teacher, dim)
    if weight is not None:
        truth = truth * weight
    own, true = (torch.autograd.grad(r.sum() * 1.5, student, retain_graph=True)[0] for r in (rows, truth))
    error = 1e-9 if rows.dtype == torch.float64 else loss_error
    torch.testing.assert_close(rows.double(), truth, rtol=error, atol=error)
    assert own.dtype == student.dtype
    assert own.stride() == student.stride()
    assert relative_l2(own.cpu(), true.cpu().double()) <= max(GRADIENT[student.dtype].relative, 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "k", "dim", "dtype", "temperature"),
    [
        ((7, 10), 4, -1, torch.float64, 1.0),
        ((3, 2, 300), 7, -1, torch.float32, 2.5),
        ((5, 4100), 33, -1, torch.bfloat16, 1.0),
        ((2, 19, 3, 4), 5, 1, torch.float16, 0.5),
        ((4, 9), 9, -1, torch.float32, 1.0),
    ],
)
def test_truth(
    device: torch.device,
    shape: tuple[int, ...],
    k: int,
    dim: int,
    dtype: torch.dtype,
    temperature: float,
    mode: str,
) -> None:
    """Values and gradients, of any dtype, with the classes anywhere, a padded row and a masked one."""
    student, teacher = drawn(device, shape, k, dtype, temperature, dim)
    weight = torch.rand(teacher.rows, dtype=torch.float64, device=device)
    weight.view(-1)[-1] = 0
    if k == shape[dim] and mode in ("tail", "renormalise"):  # the padded class has no tail to be in
        teacher = teacher[1:]
        student = student[1:].detach().requires_grad_()
        weight = weight[1:]
    assert_is_plain(student, teacher.with_mode(mode), dim, weight)


@pytest.mark.parametrize(("apart", "loss_error"), [(0.3, 1e-5), (0.03, 1e-5), (0.003, 1e-4)])
def test_truth_of_small_divergences(device: torch.device, apart: float, loss_error: float) -> None:
    """KL of 4e-2, 4e-4 and 4e-6: the digits that the plain formula loses in float32 (1e-6, 1e-4 and 1e-2)."""
    student, teacher = drawn(device, (16, 5000), 64, apart=apart)
    rows = topk_kl_div(student, teacher, reduction="none")
    truth = plain(student, teacher)
    assert ((rows.double() - truth).abs() / truth).median() <= loss_error
    assert (rows >= 0).all()
    own, true = (torch.autograd.grad(r.sum(), student, retain_graph=True)[0] for r in (rows, truth))
    assert relative_l2(own.cpu(), true.cpu().double()) <= 10 * loss_error


def test_truth_of_tiny_tails(device: torch.device) -> None:
    """A tail of 1e-9 of the mass, which one minus the kept probabilities has lost in float32."""
    student, teacher = (torch.randn(8, 500, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    student[:, :20] += 25
    teacher[:, :20] += 25
    topk = TopK.from_logits(teacher, 20)
    exact = TopK.from_logits(teacher.double(), 20)
    assert topk.log_tail is not None
    assert exact.log_tail is not None
    torch.testing.assert_close(topk.log_tail.double(), exact.log_tail, rtol=0, atol=2e-6)
    x = student.to(device).requires_grad_()
    (grad,) = torch.autograd.grad(topk_kl_div(x, topk.to(device), reduction="sum"), x)
    y = student.double().requires_grad_()
    (truth,) = torch.autograd.grad(plain(y, exact).sum(), y)
    assert relative_l2(grad.cpu()[:, 20:], truth[:, 20:]) <= 1e-5


def test_all_classes_kept_is_softmax_kl(device: torch.device) -> None:
    student, _ = drawn(device, (6, 50), 1)
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(5)).to(device)
    torch.testing.assert_close(
        topk_kl_div(student, TopK.from_logits(logits, 50)), softmax_kl_div(student, logits)
    )


def test_never_negative_and_at_most_the_whole(device: torch.device) -> None:
    """Stored in bfloat16, log-probabilities do not add up to 1 any more; the loss stays a divergence."""
    student, teacher = drawn(device, (64, 200), 8, apart=0.01)
    rounded = TopK(
        teacher.indices,
        teacher.log_probs.nan_to_num(0).bfloat16(),
        teacher.log_tail,
        num_classes=200,
    )
    assert (topk_kl_div(student, rounded, reduction="none") >= 0).all()
    logits = 3 * torch.randn(64, 200, generator=torch.Generator().manual_seed(9)).to(device)
    whole = softmax_kl_div(student, logits, reduction="none")
    assert (topk_kl_div(student, TopK.from_logits(logits, 8), reduction="none") <= whole * (1 + 1e-5)).all()


HARD = [  # student, kept ids, log_probs, log_tail, by mode: the value's kind, and the gradient's
    ("kept class lost by the student", [-INF, 0, 1, 2], [0, 1], [-1.0, -1.0], -1.0, [INF, INF, INF, INF]),
    ("kept class lost by both", [-INF, 0, 1, 2], [0, 1], [-INF, -1.0], -0.5, [0, 0, 0, 0]),
    ("kept class lost by the teacher", [0, 0, 1, 2], [0, 1], [-INF, -1.0], -0.5, [0, 0, 0, 0]),
    ("tail lost by the student", [0, 0, -INF, -INF], [0, 1], [-1.0, -1.0], -1.0, [INF, 0, 0, 0]),
    ("one of the tail lost", [0, 0, -INF, 2], [0, 1], [-1.0, -1.0], -1.0, [0, 0, 0, 0]),
    ("no tail", [0, 0, 1, 2], [0, 1], [-0.7, -0.7], -INF, [0, 0, 0, 0]),
    ("student NaN in the tail", [0, 0, 1, NAN], [0, 1], [-1.0, -1.0], -1.0, [NAN, NAN, 0, NAN]),
    ("student inf where kept", [INF, 0, 1, 2], [0, 1], [-1.0, -1.0], -1.0, [NAN, NAN, NAN, NAN]),
    ("student nowhere", [-INF, -INF, -INF, -INF], [0, 1], [-1.0, -1.0], -1.0, [NAN, NAN, NAN, NAN]),
    ("teacher NaN", [0, 0, 1, 2], [0, 1], [NAN, -1.0], -1.0, [NAN, NAN, NAN, NAN]),
    ("nothing kept", [0, 0, 1, 2], [-1, -1], [-1.0, -1.0], -0.1, [0, NAN, NAN, 0]),
    ("far apart", [1e4, 0, 0, -1e4], [3, 1], [-1.0, -1.0], -1.0, [0, 0, 0, 0]),
]


@pytest.mark.parametrize("mode", MODES)
def test_hard_rows(device: torch.device, mode: str) -> None:
    """The table of Note [Hard rows of topk_kl]: one row each, between ordinary ones that have to stay as they are."""
    kinds = [wanted[MODES.index(mode)] for *_, wanted in HARD]
    student = torch.tensor([row for _, row, *_ in HARD], device=device).repeat_interleave(2, 0)
    ids = torch.tensor([ids for _, _, ids, *_ in HARD], device=device).repeat_interleave(2, 0)
    log_probs = torch.tensor([p for _, _, _, p, *_ in HARD], device=device).repeat_interleave(2, 0)
    tail = torch.tensor([tail for *_, tail, _ in HARD], device=device).repeat_interleave(2)
    ordinary = torch.tensor([1.0, 0.5, 0.0, 2.0], device=device)
    student[1::2], ids[1::2], log_probs[1::2], tail[1::2] = ordinary, ids[0], -1.0, -1.0
    student.requires_grad_()
    teacher = TopK(ids, log_probs, tail, mode)
    rows = topk_kl_div(student, teacher, reduction="none")
    (grad,) = torch.autograd.grad(rows.sum(), student)
    finite = torch.tensor([kind == 0 for kind in kinds], device=device)
    wanted = torch.where(finite, rows[::2].detach(), torch.tensor(kinds, device=device))
    assert same_specials(rows[::2].detach(), wanted), [name for name, *_ in HARD]
    assert (grad[::2].isnan().all(-1) == ~finite).all()
    assert (grad[::2].isnan().any(-1) == ~finite).all()
    assert (rows[1::2] == rows[1]).all()
    assert (grad[1::2] == grad[1]).all()
    weight = torch.ones(len(rows), device=device)
    weight[::2] = 0
    masked = topk_kl_div(student, teacher, reduction="sum", row_weight=weight)
    torch.testing.assert_close(masked, rows[1::2].sum())
    assert (torch.autograd.grad(masked, student)[0][::2] == 0).all()


def test_gradients_of_hard_rows(device: torch.device) -> None:
    """Where the teacher has nothing the gradient is q; a class at -inf that is not kept has none."""
    student = torch.tensor([[0.0, 0.0, -INF, 1.0]], device=device, requires_grad=True)
    ids = torch.tensor([[0, 1]], device=device)
    teacher = TopK(
        ids, torch.tensor([[-INF, -0.5]], device=device), torch.tensor([-0.9327521], device=device)
    )
    topk_kl_div(student, teacher).backward()
    q = student.detach().softmax(-1)
    assert student.grad is not None
    torch.testing.assert_close(student.grad[0, 0], q[0, 0])
    assert student.grad[0, 2] == 0
    torch.testing.assert_close(student.grad.sum().cpu(), torch.zeros(()), rtol=0, atol=1e-6)


def test_overwriting_the_logits(device: torch.device) -> None:
    """The gradient in the student's own memory has the bits of one elsewhere."""
    student, teacher = drawn(device, (3, 5000), 9)
    loss = topk_kl_div(student, teacher, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), student)
    own = student.detach().clone()
    written = ops.kernel("topk_kl_forward_grad_out", device.type)(
        own, teacher.log_probs, teacher.indices, teacher.log_tail, None, 1.0, 0, 0, 1.0, own
    )
    assert torch.equal(written, loss)
    assert torch.equal(own, grad)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(device: torch.device, mode: str) -> None:
    student, teacher = drawn(device, (3, 12), 4, torch.float64, 1.3)
    teacher = teacher.with_mode(mode)

    def loss(x: Tensor) -> Tensor:
        return topk_kl_div(x, teacher, temperature=1.3, reduction="none")

    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


@pytest.mark.default_backend
def test_transforms(device: torch.device) -> None:
    """torch.func, autocast, and a compiled call, as the library's other losses."""
    student, teacher = drawn(device, (4, 30), 5)
    (wanted,) = torch.autograd.grad(topk_kl_div(student, teacher), student)
    got = torch.func.grad(lambda x: topk_kl_div(x, teacher))(student.detach())
    torch.testing.assert_close(got, wanted)
    with torch.autocast(device.type, torch.bfloat16):
        (half,) = torch.autograd.grad(topk_kl_div(student * 1, teacher), student)
    assert torch.equal(half, wanted)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: topk_kl_div(x, teacher), (student.detach(),), (student.detach(),))
    compiled = torch.compile(
        lambda x, ids, p, tail: topk_kl_div(x, TopK(ids, p, tail)), fullgraph=True, backend="aot_eager"
    )
    loss = compiled(student, teacher.indices, teacher.log_probs, teacher.log_tail)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], wanted)


@pytest.mark.default_backend
def test_reductions_and_no_rows(device: torch.device) -> None:
    student, teacher = drawn(device, (4, 30), 5)
    rows = topk_kl_div(student, teacher, reduction="none")
    for reduction, wanted in (("sum", rows.sum()), ("mean", rows.sum() / 120), ("batchmean", rows.mean())):
        torch.testing.assert_close(topk_kl_div(student, teacher, reduction=reduction), wanted)
    empty = topk_kl_div(student[:0], teacher[:0], reduction="sum")
    assert empty == 0
    assert torch.autograd.grad(empty, student)[0].abs().sum() == 0


@pytest.mark.default_backend
def test_rows_of_a_topk(device: torch.device) -> None:
    """Indexing, joining and reshaping keep rows together; a shorter part is padded."""
    _, teacher = drawn(device, (6, 4, 50), 5)
    assert teacher.rows == (6, 4)
    assert len(teacher) == 6
    for rows in (2, slice(1, 4), [0, 3], (slice(None), 1), torch.tensor([True, False] * 3), (..., 0)):
        part = teacher[rows]
        assert teacher.log_tail is not None
        assert part.log_tail is not None
        assert part.rows == teacher.log_tail[rows].shape
        assert torch.equal(part.log_tail, teacher.log_tail[rows])
    flat = teacher.reshape(24)
    narrow = TopK(
        flat.indices[:2, :2].contiguous(), flat.log_probs[:2, :2], flat.log_tail[:2], num_classes=50
    )  # type: ignore[index]
    joined = TopK.cat([flat, narrow])
    assert joined.rows == (26,)
    assert joined.k == 5
    assert (joined.indices[24:, 2:] == -1).all()
    with pytest.raises(ValueError, match=r"parts\[1\] has mode='both'"):
        TopK.cat([flat, flat.with_mode("both")])


IDS, LOG_P = torch.tensor([[0, 1]]), torch.tensor([[-1.0, -2.0]])
TAIL = torch.tensor([-0.5])


@pytest.mark.default_backend
@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: TopK(torch.tensor([[1, 1]]), LOG_P, TAIL), ValueError, "class 1 twice"),
        (lambda: TopK(torch.tensor([[0, -2]]), LOG_P, TAIL), ValueError, "holds -2"),
        (lambda: TopK(IDS, LOG_P), ValueError, "log_tail is None"),
        (lambda: TopK(IDS, LOG_P.exp(), TAIL), ValueError, "at most 0"),
        (lambda: TopK(IDS.float(), LOG_P, TAIL), TypeError, "allowed: int32, int64"),
        (lambda: TopK(IDS, LOG_P[:, :1], TAIL), ValueError, r"\(1, 1\)"),
        (lambda: TopK(IDS, LOG_P, TAIL[:0]), ValueError, "log_tail has shape"),
        (lambda: TopK(IDS, LOG_P, TAIL, "rest"), ValueError, "mode is 'rest'"),
        (lambda: TopK(IDS, LOG_P, TAIL, temperature=0), ValueError, "temperature is 0"),
        (lambda: TopK(IDS, LOG_P.clone().requires_grad_(), TAIL), ValueError, "requires a gradient"),
        (lambda: TopK.from_logits(torch.zeros(1, 3), 4), ValueError, "k is 4; allowed: 1 to 3"),
        (lambda: topk_kl_div(torch.zeros(1, 3), LOG_P), TypeError, "a TopK is expected"),  # type: ignore[arg-type]
        (
            lambda: topk_kl_div(torch.zeros(1, 3), TopK(IDS, LOG_P, TAIL), temperature=2),
            ValueError,
            "temperature is 2.0, but",
        ),
        (lambda: topk_kl_div(torch.zeros(1, 1), TopK(IDS, LOG_P, TAIL)), ValueError, "indices holds 1"),
        (lambda: topk_kl_div(torch.zeros(2, 3), TopK(IDS, LOG_P, TAIL)), ValueError, "rows of shape"),
        (
            lambda: topk_kl_div(torch.zeros(1, 3), TopK.from_logits(torch.zeros(1, 4), 2)),
            ValueError,
            "4 classes and student_logits 3",
        ),
    ],
)
def test_errors(device: torch.device, make: object, error: type[Exception], sentence: str) -> None:
    del device
    with pytest.raises(error, match=sentence):
        make()  # type: ignore[operator]
