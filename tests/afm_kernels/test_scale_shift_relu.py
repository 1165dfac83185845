"""scale_shift_relu on every backend, against a float64 definition, and against the layers that it stands for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from afm_kernels import ops, scale_shift_relu, use_backend

STEM = "scale_shift_relu"
SEED = 30
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")

# Relative to the largest term of a sum: one rounding of the result, and three of the compute type.
ROUNDING = {
    torch.float64: 2.0**-51,
    torch.float32: 2.0**-22,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
SHAPES = (
    (2, 3, 8, 8),
    (3, 16, 5, 7),
    (4, 33),
    (5, 1),
    (2, 600, 2, 3),
    (1, 5, 1, 1),
    (2, 3, 2, 3, 4),
    (3, 2, 521),
)


def layouts(x: Tensor) -> Iterator[Tensor]:
    yield x.contiguous()
    if x.ndim == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    yield torch.stack([x, torch.full_like(x, NAN)], -1)[..., 0]


def case(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, vectors: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    x, residual = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    scale, shift = (torch.randn(shape[1], generator=generator).to(device, vectors) for _ in range(2))
    return x, scale, shift, residual


def exact(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The value in float64, and the size of the largest term behind each element."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    x, a, b = x.double().cpu(), scale.double().cpu().view(shape), shift.double().cpu().view(shape)
    r = torch.zeros_like(x) if residual is None else residual.double().cpu()
    value = x * a + b + r
    return torch.where(value < 0, 0.0, value), (x * a).abs().maximum(b.abs()).maximum(r.abs())


def assert_near(actual: Tensor, truth: Tensor, terms: Tensor, dtype: torch.dtype) -> None:
    excess = (actual.double().cpu() - truth).abs() - 2 * ROUNDING[dtype] * terms
    worst = excess.max().item() if truth.numel() else 0.0
    assert worst <= 1e-7 * (dtype == torch.float16), (
        f"off by {worst:.3g} more than allowed"
    )  # subnormal halves


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_truth(device: torch.device, dtype: torch.dtype, with_residual: bool) -> None:
    for shape, vectors in itertools.product(SHAPES, (torch.float32, dtype)):
        x, scale, shift, residual = case(device, shape, dtype, vectors)
        added = residual if with_residual else None
        truth, terms = exact(x, scale, shift, added)
        for layout in layouts(x):
            actual = scale_shift_relu(layout, scale, shift, added)
            assert actual.dtype == dtype
            assert actual.stride() == torch.empty_like(layout).stride()
            assert_near(actual, truth, terms, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth_of_gradients(device: torch.device, dtype: torch.dtype) -> None:
    """To x and residual, each alone and together, upstream gradients of any strides; dtype and layout of x."""
    for shape in SHAPES:
        x0, scale, shift, residual0 = case(device, shape, dtype)
        upstream0 = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(device, dtype)
        upstreams = (*layouts(upstream0), upstream0[:1].expand(shape))
        pairs: Iterable[tuple[Tensor, Tensor]] = itertools.product(layouts(x0), upstreams)
        wanted = [(True, True), (True, False), (False, True)]
        if shape not in SHAPES[1:3]:
            # These are there for their sizes, around the widths of vectors and blocks: each layout once will do.
            pairs, wanted = zip(layouts(x0), upstreams, strict=False), wanted[:1]
        for x, upstream in pairs:
            for wrt_x, wrt_residual in wanted:
                leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(wrt_x)
                added = residual0.clone().requires_grad_(wrt_residual)
                output = scale_shift_relu(leaf, scale, shift, added)
                output.backward(upstream)
                passed = torch.where(output > 0, upstream, 0).double().cpu()
                if wrt_x:
                    assert leaf.grad is not None
                    assert leaf.grad.dtype == dtype
                    truth = passed * scale.double().cpu().view(-1, *[1] * (x.ndim - 2))
                    assert_near(leaf.grad, truth, truth.abs(), dtype)
                if wrt_residual:
                    assert added.grad is not None
                    assert torch.equal(added.grad.double().cpu(), passed)


@pytest.mark.default_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_large_results_are_those_of_the_parts(
    device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Results that outgrow the caches are stored past them; those of an image at a time are not."""
    x, scale, shift, residual = case(device, (9, 37, 113, 127), dtype)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED)).to(device, dtype)
    x, residual, upstream = (t.contiguous(memory_format=memory_format) for t in (x, residual, upstream))
    assert x.nbytes > 2**23 > x[:1].nbytes

    def all_of(x: Tensor, residual: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        alone, both = scale_shift_relu(x, scale, shift), scale_shift_relu(x, scale, shift, residual)
        gradients = torch.autograd.grad(both, (x, residual), upstream)
        return alone, both, *torch.autograd.grad(alone, x, upstream), *gradients

    parts = [all_of(*one) for one in zip(x.split(1), residual.split(1), upstream.split(1), strict=True)]
    for whole, pieces in zip(all_of(x, residual, upstream), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    dtype=st.sampled_from(DTYPES),
    order=st.randoms(use_true_random=False),
    residual_dtype=st.sampled_from([None, *DTYPES]),
    seed=st.integers(0, 2**20),
)
def test_any_permutation_of_dimensions(shape, dtype, order, residual_dtype, seed) -> None:  # type: ignore[no-untyped-def]
    """Dense in any order of dimensions, residual in another; mixed dtypes promote as an addition does."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dtype: torch.dtype) -> Tensor:
        permutation = list(range(len(shape)))
        order.shuffle(permutation)
        dense = torch.randn([shape[d] for d in permutation], generator=generator).to(dtype)
        return dense.permute([permutation.index(d) for d in range(len(shape))])

    x, residual = draw(dtype), None if residual_dtype is None else draw(residual_dtype)
    scale, shift = (torch.randn(shape[1], generator=generator) for _ in range(2))
    truth, terms = exact(x, scale, shift, residual)
    promoted = dtype if residual is None else torch.promote_types(dtype, residual_dtype)
    for backend in ops.TABLE["scale_shift_relu_forward", "cpu"]:
        with use_backend(backend):
            actual = scale_shift_relu(x, scale, shift, residual)
        assert actual.dtype == promoted
        assert_near(actual, truth, terms, promoted)


def test_is_batch_norm_and_add(device: torch.device) -> None:
    """What it is for: BatchNorm2d in eval mode, the addition and ReLU of a residual block, gradients included."""
    torch.manual_seed(SEED)
    bn = nn.BatchNorm2d(6).double().to(device)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    bn.eval()
    x, residual = (
        torch.randn(3, 6, 5, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)
    )
    expected = (bn(x) + residual).relu()
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    actual = scale_shift_relu(x, scale, bn.bias - bn.running_mean * scale, residual)
    assert torch.allclose(actual, expected, atol=1e-12)
    upstream = torch.randn_like(actual)
    wrt = (x, residual, bn.weight, bn.bias)
    for ours, theirs in zip(
        torch.autograd.grad(actual, wrt, upstream), torch.autograd.grad(expected, wrt, upstream), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_specials_as_torch(device: torch.device) -> None:
    """NaN and infinities are torch.relu's, and so are the gradients there."""
    values = torch.tensor([[NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0]], device=device)
    one, zero = torch.ones(7, device=device), torch.zeros(7, device=device)
    for residual in (None, torch.zeros(1, 7, device=device)):
        x, y = values.clone().requires_grad_(), values.clone().requires_grad_()
        actual, expected = scale_shift_relu(x, one, zero, residual), y.relu()
        actual.backward(torch.full_like(values, 3.0))
        expected.backward(torch.full_like(values, 3.0))
        assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(x.grad, y.grad)


def test_gradcheck_and_gradgradcheck(device: torch.device) -> None:
    x, scale, shift, residual = (
        t.double().requires_grad_() for t in case(device, (2, 3, 2, 3), torch.float64, torch.float64)
    )
    assert torch.autograd.gradcheck(scale_shift_relu, (x, scale, shift, residual))
    assert torch.autograd.gradgradcheck(scale_shift_relu, (x, scale, shift, residual))
    assert torch.autograd.gradcheck(scale_shift_relu, (x, scale.detach(), shift, None))


def test_transforms(device: torch.device) -> None:
    """torch.func: grad, vmap of grad, jvp, and forward-mode AD, all equal to plain autograd or its formula."""
    x, scale, shift, residual = case(device, (2, 3, 2, 3), torch.float64, torch.float64)

    def total(x: Tensor) -> Tensor:
        return scale_shift_relu(x, scale, shift, residual).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    assert torch.allclose(torch.func.grad(total)(x), expected)
    batched = torch.func.vmap(torch.func.grad(total))(torch.stack([x, x]))
    assert torch.allclose(batched, torch.stack([expected, expected]))
    tangent = torch.randn_like(x)
    assert torch.allclose(torch.func.jvp(total, (x,), (tangent,))[1], (expected * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        assert torch.allclose(
            torch.autograd.forward_ad.unpack_dual(total(dual)).tangent, (expected * tangent).sum()
        )


def test_compiles_to_one_graph(device: torch.device) -> None:
    """Fullgraph forward and backward, eager's values, at most one recompilation for other batch sizes."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(scale_shift_relu, fullgraph=True, backend=counter)
    for batch in (2, 5, 7):
        x, scale, shift, residual = case(device, (batch, 3, 4, 4), torch.float32)
        x = x.to(memory_format=torch.channels_last)
        leaves = [[t.clone().requires_grad_() for t in (x, residual)] for _ in range(2)]
        outputs = [
            f(a, scale, shift, b) for f, (a, b) in zip((compiled, scale_shift_relu), leaves, strict=True)
        ]
        # torch 2.11 traces the reference to other rounding than it has in eager mode.
        rounding = 1e-5 if ops.served_by("scale_shift_relu_forward", device.type) == "reference" else 0
        torch.testing.assert_close(*outputs, rtol=rounding, atol=rounding)
        for output in outputs:
            output.square().sum().backward()
        for ours, theirs in zip(*leaves, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=rounding, atol=rounding)
    assert counter.frame_count <= 2


def test_autocast_leaves_dtypes_alone(device: torch.device) -> None:
    x, scale, shift, residual = case(device, (2, 3, 4, 4), torch.bfloat16)
    plain = scale_shift_relu(x, scale, shift, residual)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(scale_shift_relu(x, scale, shift, residual), plain)
        assert scale_shift_relu(x.float(), scale, shift).dtype == torch.float32


def test_opcheck(device: torch.device) -> None:
    """Schema and fakes of the operators, where an operator serves."""
    backend = ops.backend_for("scale_shift_relu_forward", device.type)
    if backend == "reference":
        assert (
            ops.kernel("scale_shift_relu_forward", device.type) is not None
        )  # plain PyTorch has no schema to check
        return
    forward, backward = (ops.kernel(f"scale_shift_relu_{d}", device.type) for d in ("forward", "backward"))
    x, scale, shift, residual = case(device, (2, 3, 4, 5), torch.bfloat16)
    for layout, added in itertools.product(layouts(x), (None, residual)):
        torch.library.opcheck(forward, (layout, scale, shift, added))
    output = forward(x, scale, shift, residual)
    for wrt_x, wrt_residual in ((True, True), (True, False), (False, True), (False, False)):
        torch.library.opcheck(backward, (residual, output, scale, wrt_x, wrt_residual))


def test_empty_batch(device: torch.device) -> None:
    x = torch.rand(0, 3, 4, 4, device=device, requires_grad=True)
    vector = torch.ones(3, device=device)
    output = scale_shift_relu(x, vector, vector, x)
    assert output.shape == x.shape
    output.sum().backward()
    assert x.grad.shape == x.shape


X, V = torch.rand(2, 3, 4), torch.rand(3)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: scale_shift_relu(X.int(), V, V), TypeError, "x has dtype torch.int32"),
        (lambda: scale_shift_relu(V, V, V), ValueError, r"x has shape \(3,\); channels are dimension 1"),
        (lambda: scale_shift_relu(X, V[:2], V), ValueError, r"scale has shape \(2,\); allowed for x"),
        (lambda: scale_shift_relu(X, V, 1.0), TypeError, "shift is a float"),
        (lambda: scale_shift_relu(X, V, V.to("meta")), ValueError, "shift is on meta"),
        (lambda: scale_shift_relu(X, V, V, X[:1]), ValueError, r"residual has shape \(1, 3, 4\)"),
        (lambda: scale_shift_relu(X, V, V, X.bool()), TypeError, "residual has dtype torch.bool"),
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)
