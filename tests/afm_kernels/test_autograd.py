"""The losses under everything that differentiates, transforms, compiles, exports or copies them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from samples import draw
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from afm_kernels import (
    DistillationLoss,
    DKLLoss,
    SoftmaxKLDivLoss,
    distillation_loss,
    dkl_loss,
    ops,
    softmax_kl_div,
    softmax_kl_div_grad,
    use_backend,
)
from afm_kernels.autograd.expected import forget_gradients
from afm_kernels.autograd.fused import prefers_recompute

STEM = "softmax_kl"

Loss = Callable[..., Tensor]


def _distillation(student: Tensor, teacher: Tensor, **others: object) -> Tensor:
    labels = torch.arange(student.shape[0], device=student.device) % student.shape[-1]
    labels = labels.reshape(-1, *[1] * (student.dim() - 2)).expand(student.shape[:-1])
    return distillation_loss(
        student, teacher, labels, alpha=0.3, temperature=1.7, label_smoothing=0.1, **others
    )  # type: ignore[arg-type]


def _divergence(name: str) -> Loss:
    return lambda s, t, **others: softmax_kl_div(s, t, divergence=name, beta=0.3, temperature=1.7, **others)


LOSSES: dict[str, Loss] = {
    "kl": _divergence("kl"),
    "reverse_kl": _divergence("reverse_kl"),
    "jeffreys": _divergence("jeffreys"),
    "js": _divergence("js"),
    "distillation": _distillation,
    "dkl": lambda s, t, **others: dkl_loss(s, t, alpha=0.4, beta=1.3, temperature=1.7, **others),
}
# The gradients of dkl are not those of its value: its weights, and the target of its cross-entropy, are constants.
EXACT = [name for name in LOSSES if name != "dkl"]


def logits(
    device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(device, dtype).requires_grad_(), teacher.to(device, dtype).requires_grad_()


@pytest.mark.default_backend
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("name", EXACT)
def test_gradcheck(device: torch.device, name: str, reduction: str, recompute: bool) -> None:
    inputs = logits(device, 2, 5)
    assert torch.autograd.gradcheck(
        lambda s, t: LOSSES[name](s, t, reduction=reduction, recompute=recompute), inputs
    )


@pytest.mark.default_backend
@pytest.mark.parametrize("name", EXACT)
def test_gradgradcheck(device: torch.device, name: str) -> None:
    inputs = logits(device, 2, 4)
    weight = torch.tensor([0.7, 0.0], dtype=torch.float64, device=device)
    assert torch.autograd.gradgradcheck(lambda s, t: LOSSES[name](s, t), inputs)
    assert torch.autograd.gradgradcheck(
        lambda s, t: LOSSES[name](s, t, reduction="none", row_weight=weight, recompute=True), inputs
    )


def test_second_derivative_of_near_rows(device: torch.device) -> None:
    """The Hessian where student and teacher agree is (diag p - p pᵀ)/T², and the centred form still has it."""
    student = torch.tensor([[0.3, -1.0, 0.8]], dtype=torch.float64, device=device)
    p = (student / 2).softmax(-1)[0]
    hessian = torch.autograd.functional.hessian(
        lambda s: softmax_kl_div(s, student, temperature=2.0), student
    )
    torch.testing.assert_close(hessian[0, :, 0], (p.diag() - p.outer(p)) / 4)


@pytest.mark.default_backend
@pytest.mark.parametrize("name", LOSSES)
def test_create_graph_changes_no_gradient(device: torch.device, name: str) -> None:
    """A recorded backward runs other code; it must say the same."""
    student, teacher = logits(device, 6, 9)
    plain = torch.autograd.grad(LOSSES[name](student, teacher), (student, teacher))
    recorded = torch.autograd.grad(LOSSES[name](student, teacher), (student, teacher), create_graph=True)
    for a, b in zip(plain, recorded, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-13)
        assert b.requires_grad


@pytest.mark.default_backend
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
@pytest.mark.parametrize("name", LOSSES)
def test_func_transforms(device: torch.device, name: str, reduction: str) -> None:
    """grad, vmap, vmap of grad, grad of vmap, jacrev: against a loop of ordinary calls."""
    student, teacher = (x.detach() for x in logits(device, 3, 4, 5))
    loss = LOSSES[name]

    def total(s: Tensor, t: Tensor) -> Tensor:
        return loss(s, t, reduction=reduction).sum()

    expected, gradients = [], []
    for s, t in zip(student, teacher, strict=True):
        s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
        value = loss(s, t, reduction=reduction)
        expected.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), (s, t)))
    same = torch.testing.assert_close
    same(
        torch.func.vmap(lambda s, t: loss(s, t, reduction=reduction))(student, teacher), torch.stack(expected)
    )
    for index in (0, 1):
        wanted = torch.stack([g[index] for g in gradients])
        same(torch.func.grad(total, argnums=index)(student[0], teacher[0]), wanted[0])
        same(torch.func.vmap(torch.func.grad(total, argnums=index))(student, teacher), wanted)
        grad_of_vmap = torch.func.grad(lambda s, t: torch.func.vmap(total)(s, t).sum(), argnums=index)
        same(grad_of_vmap(student, teacher), wanted)
        same(torch.func.jacrev(total, argnums=index)(student[0], teacher[0]), wanted[0])
    # One teacher for all students, mapped over another dimension.
    shared = torch.func.vmap(lambda s: loss(s, teacher[0], reduction=reduction), in_dims=1)(
        student.transpose(0, 1)
    )
    same(shared, torch.stack([loss(s, teacher[0], reduction=reduction) for s in student]))


@pytest.mark.default_backend
@pytest.mark.parametrize("name", ["kl", "js", "dkl"])
def test_mapped_over_single_rows(device: torch.device, name: str) -> None:
    """Per-sample losses and gradients: under vmap, logits have one dimension."""
    student, teacher = (x.detach() for x in logits(device, 4, 5))
    loss = LOSSES[name]
    by_row = torch.func.vmap(loss)(student, teacher)
    torch.testing.assert_close(by_row, loss(student, teacher, reduction="none"))
    gradients = torch.func.vmap(torch.func.grad(loss))(student, teacher)
    whole = torch.func.grad(lambda s: loss(s, teacher, reduction="sum"))(student)
    torch.testing.assert_close(gradients, whole)


@pytest.mark.default_backend
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_batch_of_upstream_gradients(device: torch.device, name: str, recompute: bool) -> None:
    """autograd.grad(is_grads_batched=True), on which functional.jacobian(vectorize=True) is built."""
    student, teacher = logits(device, 4, 5)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64, device=device)
    rows = LOSSES[name](student, teacher, row_weight=weight, reduction="none", recompute=recompute)
    upstream = torch.eye(4, dtype=rows.dtype, device=device)
    one_by_one = [torch.autograd.grad(rows, student, each, retain_graph=True)[0] for each in upstream]
    (batched,) = torch.autograd.grad(rows, student, upstream, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(one_by_one))
    total = LOSSES[name](student, teacher, recompute=recompute)
    (scaled,) = torch.autograd.grad(total, student, upstream[0] + 1, is_grads_batched=True)
    torch.testing.assert_close(scaled[0], 2 * scaled[1])


@pytest.mark.default_backend
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_retained_graph_keeps_its_gradients(device: torch.device, name: str, recompute: bool) -> None:
    """What a backward returned is the caller's, who may zero it in place before the next one."""
    student, teacher = logits(device, 4, 5)
    loss = LOSSES[name](student, teacher, recompute=recompute)
    first = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    for again, before in zip(torch.autograd.grad(loss, (student, teacher)), kept, strict=True):
        assert torch.equal(again, before)


@pytest.mark.default_backend
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_teacher_from_inference_mode(device: torch.device, name: str, recompute: bool) -> None:
    student, teacher = logits(device, 4, 5)
    with torch.inference_mode():
        inferred = teacher * 1
    (gradient,) = torch.autograd.grad(LOSSES[name](student, inferred, recompute=recompute), student)
    (wanted,) = torch.autograd.grad(LOSSES[name](student, teacher, recompute=recompute), student)
    assert torch.equal(gradient, wanted)


def test_weights_from_inference_mode(device: torch.device) -> None:
    """As those are that a teacher's confidence makes."""
    student, teacher = logits(device, 4, 5)
    with torch.inference_mode():
        weight = teacher.softmax(-1).amax(-1)
    by_inferred, by_clone = (
        torch.autograd.grad(softmax_kl_div(student, teacher, row_weight=each), (student, teacher))
        for each in (weight, weight.clone())
    )
    assert all(map(torch.equal, by_inferred, by_clone))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_from_above_reaches_a_row_of_weight_0(
    device: torch.device, name: str, reduction: str, recompute: bool
) -> None:
    """NaN times 0 would be NaN: a row that is switched off stays so whatever comes after the loss."""
    student, teacher = logits(device, 4, 5)
    weight = torch.tensor([0.5, 0.0, 2.0, 0.0], dtype=torch.float64, device=device)
    loss = LOSSES[name](student, teacher, row_weight=weight, reduction=reduction, recompute=recompute)
    for gradient in torch.autograd.grad(loss, (student, teacher), torch.full_like(loss, torch.nan)):
        assert gradient[weight == 0].eq(0).all()
        assert gradient[weight != 0].isnan().all()


@pytest.mark.default_backend
@pytest.mark.parametrize("name", EXACT)
def test_func_hessian_in_reverse_mode(device: torch.device, name: str) -> None:
    student, teacher = (x.detach() for x in logits(device, 2, 3))
    by_func = torch.func.jacrev(torch.func.grad(lambda s: LOSSES[name](s, teacher)))(student)
    by_autograd = torch.autograd.functional.hessian(lambda s: LOSSES[name](s, teacher), student)
    torch.testing.assert_close(by_func, by_autograd)


@pytest.mark.default_backend
@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused(device: torch.device, name: str) -> None:
    student, teacher = (x.detach() for x in logits(device, 2, 3))
    sentence = r"forward-mode derivatives .* are not supported; use reverse mode"
    tangent = torch.ones_like(student)
    with pytest.raises(RuntimeError, match=sentence):
        torch.func.jvp(lambda s: LOSSES[name](s, teacher), (student,), (tangent,))
    with pytest.raises(RuntimeError, match=sentence):
        torch.func.jacfwd(lambda s: LOSSES[name](s, teacher))(student)
    with pytest.raises(RuntimeError, match=sentence):
        torch.func.jvp(
            torch.func.vmap(LOSSES[name]), (student[None], teacher[None]), (tangent[None], tangent[None])
        )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student, tangent)
        with pytest.raises(RuntimeError, match=sentence):
            LOSSES[name](dual, teacher)
        weights = torch.autograd.forward_ad.make_dual(
            torch.ones(2, device=device), torch.ones(2, device=device)
        )
        with pytest.raises(RuntimeError, match=sentence):
            LOSSES[name](student, teacher, row_weight=weights)


@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("name", ["kl", "distillation", "dkl"])
def test_traced_and_of_shapes_alone(device: torch.device, name: str, recompute: bool | None) -> None:
    """A backward looks at no number where somebody traces it, nor where there are no numbers."""
    student, teacher = (x.detach() for x in logits(device, 4, 10))

    def by_student(s: Tensor, t: Tensor) -> Tensor:
        s = s.detach().requires_grad_()
        return torch.autograd.grad(3 * LOSSES[name](s, t, recompute=recompute), s)[0]

    for mode in ("real", "symbolic"):
        traced = make_fx(by_student, tracing_mode=mode)(student, teacher)
        assert torch.equal(traced(teacher, student), by_student(teacher, student))
    with FakeTensorMode():
        shapes = (torch.empty(4, 10, device=device) for _ in range(2))
        assert by_student(*shapes).shape == (4, 10)


def test_tensors_that_hooks_hold_are_left_alone(device: torch.device) -> None:
    """What was saved is scaled in place, but not where it is somebody else's."""
    student, teacher = logits(device, 6, 20)
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = [LOSSES[name](student, teacher, recompute=False) for name in LOSSES]
    before = [tensor.clone() for tensor in held]
    torch.autograd.grad([3 * loss for loss in losses], (student, teacher))
    assert all(map(torch.equal, held, before))


# torch.compile ---------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., object], **others: object) -> Callable[..., object]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **others)  # type: ignore[call-overload, no-any-return]


@pytest.mark.default_backend
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_compile(device: torch.device, name: str, recompute: bool) -> None:
    """One graph, the same loss and gradients, with an upstream gradient inside and outside of it."""
    run = compiled(lambda s, t: 2 * LOSSES[name](s, t, recompute=recompute))
    student, teacher = logits(device, 6, 9)
    for upstream in (1.0, 0.5):
        wanted = torch.autograd.grad(2 * upstream * LOSSES[name](student, teacher), (student, teacher))
        got = torch.autograd.grad(upstream * run(student, teacher), (student, teacher))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.default_backend
def test_compile_by_inductor(device: torch.device) -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda s, t: softmax_kl_div(s, t, temperature=2.0), fullgraph=True)
    student, teacher = logits(device, 6, 9, dtype=torch.float32)
    wanted = torch.autograd.grad(softmax_kl_div(student, teacher, temperature=2.0), (student, teacher))
    # Not what it takes to look for the widest vectors, and to prepare for many kernels.
    with torch._inductor.config.patch({"cpp.simdlen": 1, "cpp_cache_precompile_headers": False}):
        got = torch.autograd.grad(run(student, teacher), (student, teacher))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.default_backend
@pytest.mark.parametrize("reduction", ["none", "batchmean"])  # the others divide by another number
@pytest.mark.parametrize("name", ["kl", "distillation", "dkl"])
def test_changing_batches_recompile_once(device: torch.device, name: str, reduction: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    run = torch.compile(lambda s, t: LOSSES[name](s, t, reduction=reduction), fullgraph=True, backend=counter)
    for rows in (8, 12, 5, 31, 64):
        student, teacher = logits(device, rows, 7)
        loss = run(student, teacher)
        torch.testing.assert_close(loss, LOSSES[name](student, teacher, reduction=reduction))
        loss.sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.default_backend
@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap_grad", "jacrev"])
# One a Function: the divergences share theirs, and differ in a number that it is given.
@pytest.mark.parametrize("name", ["kl", "distillation", "dkl"])
def test_compiled_func_transforms_equal_eager(device: torch.device, name: str, transform: str) -> None:
    """torch.compile of torch.func.grad around an operator's Function has been seen to return zeros."""
    student, teacher = (x.detach() for x in logits(device, 3, 4, 5))

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return LOSSES[name](s, t)

    function = {
        "grad": torch.func.grad(loss, argnums=(0, 1)),
        "vmap": torch.func.vmap(loss),
        "vmap_grad": torch.func.vmap(torch.func.grad(loss, argnums=(0, 1))),
        "jacrev": torch.func.jacrev(loss, argnums=(0, 1)),
    }[transform]
    inputs = (student[0], teacher[0]) if transform in ("grad", "jacrev") else (student, teacher)
    wanted = function(*inputs)
    got = compiled(lambda *args: function(*args))(*inputs)
    torch.testing.assert_close(got, wanted)


def test_grad_function_compiled_and_mapped(device: torch.device) -> None:
    """softmax_kl_div_grad has no graph, but it may stand in one, and under vmap."""
    student, teacher = logits(device, 3, 4, 5)
    wanted = softmax_kl_div_grad(student, teacher)
    got = compiled(lambda s, t: softmax_kl_div_grad(s, t, temperature=1.0))(student, teacher)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.func.vmap(softmax_kl_div_grad)(student, teacher), wanted)
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="temperature"):
        softmax_kl_div_grad(student, teacher, temperature=0.0)
    assert torch.is_grad_enabled()


def test_compiled_double_backward_is_refused(device: torch.device) -> None:
    run = compiled(lambda s, t: softmax_kl_div(s, t))
    student, teacher = logits(device, 2, 3)
    (gradient,) = torch.autograd.grad(run(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_use_backend_around_and_inside_a_compiled_function(device: torch.device) -> None:
    """A graph compiled for one backend must not serve another."""
    from afm_kernels import ops

    seen: list[set[str]] = []

    def spy(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        seen.append({target for target in targets if target.startswith("afm_kernels")})
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(lambda s, t: softmax_kl_div(s, t), fullgraph=True, backend=spy)
    student, teacher = (x.detach() for x in logits(device, 4, 5))
    served = ops.backend_for("softmax_kl_forward", device.type)
    wanted = run(student, teacher)
    with use_backend("reference"):
        torch.testing.assert_close(run(student, teacher), wanted)
    assert seen[-1] == set()
    assert (seen[0] == set()) == (served == "reference")
    count = len(seen)
    run(student, teacher)
    with use_backend("reference"):
        run(student, teacher)
    assert len(seen) == count  # both graphs are kept

    def inside(s: Tensor, t: Tensor) -> Tensor:
        with use_backend("reference"):
            return softmax_kl_div(s, t)

    torch.compile(inside, fullgraph=True, backend=spy)(student, teacher)
    assert seen[-1] == set()
    assert ops.backend_for("softmax_kl_forward", device.type) == served


# torch.export, autocast, copies -----------------------------------------------------------------------------------


class Distiller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(6, 5), nn.Linear(6, 5)
        self.loss = SoftmaxKLDivLoss(temperature=2.0, scale_by_t2=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.student(x), self.teacher(x))


@pytest.mark.default_backend
def test_export(device: torch.device) -> None:
    """A model with the loss exports with a free batch size, and saves and loads."""
    model = Distiller().to(device).eval()
    batch = torch.export.Dim("batch", min=2, max=1024)
    x = torch.randn(4, 6, device=device)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer)
        for rows in (4, 9):
            x = torch.randn(rows, 6, device=device)
            torch.testing.assert_close(loaded.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: torch.device, dtype: torch.dtype) -> None:
    """Logits as they come, the loss in float32, gradients in the dtype of the logits; the same as without autocast."""
    model = Distiller().to(device)
    x = torch.randn(8, 6, device=device)
    with torch.autocast(device.type, dtype=dtype):
        student, teacher = model.student(x), model.teacher(x)
        assert student.dtype == dtype
        student.retain_grad()
        loss = model.loss(student, teacher)
        mixed = softmax_kl_div(student, teacher.float())
    assert loss.dtype == mixed.dtype == torch.float32
    torch.testing.assert_close(loss, model.loss(student, teacher))
    loss.backward()
    assert student.grad.dtype == dtype
    assert model.student.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "module", [SoftmaxKLDivLoss(4.0, "sum", True), DistillationLoss(0.9, 4.0), DKLLoss(2.0, 3.0)]
)
def test_modules_copy_and_pickle(device: torch.device, module: nn.Module) -> None:
    student, teacher = (x.detach() for x in logits(device, 4, 5))
    labels = (torch.tensor([0, 4, 2, 1], device=device),) if isinstance(module, DistillationLoss) else ()
    wanted = module(student, teacher, *labels)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(student, teacher, *labels), wanted)
        assert repr(twin) == repr(module)


def test_backward_uses_the_backend_of_its_forward(device: torch.device) -> None:
    """Row statistics belong to the backend that made them."""
    sample = draw("classes_33", device=device)
    student, teacher = sample.student.requires_grad_(), sample.teacher.requires_grad_()
    wanted = torch.autograd.grad(softmax_kl_div(student, teacher, recompute=True), (student, teacher))
    loss = softmax_kl_div(student, teacher, recompute=True)
    with use_backend("reference"):
        got = torch.autograd.grad(loss, (student, teacher))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_saved_memory(device: torch.device) -> None:
    """recompute=True holds O(rows) beside the logits; gradients made in the forward hold no more than two of them."""
    student, teacher = logits(device, 64, 500)

    def held(recompute: bool) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in (
                student.untyped_storage().data_ptr(),
                teacher.untyped_storage().data_ptr(),
            ):
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            softmax_kl_div(student, teacher, recompute=recompute)
        return sum(sizes)

    assert held(True) <= 64 * 8
    assert held(False) == 2 * student.numel()


def test_default_recomputes_both_gradients_of_vocabularies() -> None:
    """Scaling made gradients by an upstream one would cost as much as making them did."""
    longest, long, short = (torch.zeros(2, n, requires_grad=True) for n in (128256, 32000, 1000))
    assert prefers_recompute("softmax_kl", long, long, "cpp")
    assert not prefers_recompute("softmax_kl", short, short, "cpp")
    assert not prefers_recompute("softmax_kl", long, long.detach(), "cpp")
    assert prefers_recompute("dkl", long, long, "cpp")
    assert not prefers_recompute("distillation", long, long, "cpp")
    assert prefers_recompute("distillation", longest, longest, "cpp")
    assert prefers_recompute(
        "softmax_kl", short.half(), short, "cpp"
    )  # would underflow before the loss scale


@pytest.mark.skipif(
    "cpp" not in ops.TABLE["softmax_kl_forward", "cpu"], reason="the C++ kernels are not built"
)
def test_default_of_vocabularies_keeps_rows_only() -> None:
    """Until it knows what to expect."""
    forget_gradients()
    student, teacher = (torch.randn(2, 32000, requires_grad=True) for _ in range(2))
    saved = softmax_kl_div(student, teacher).grad_fn.saved_tensors
    assert sum(tensor.numel() for tensor in saved[2:] if tensor is not None) <= 2 * ops.ROW_STATS
