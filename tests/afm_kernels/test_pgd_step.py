"""pgd_step and pgd_start on every backend, against a float64 definition written out here in other words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afm_kernels import ops, pgd_start, pgd_step, use_backend

STEM = "pgd_step"
SEED = 20
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")

# One rounding of the result, half an ulp of a value up to 2, and as much again for the roundings of x ± eps and of
# the step in the compute type (float32 unless something is float64).
ROUNDING = {
    torch.float64: 2.0**-51,
    torch.float32: 2.0**-22,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def true_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, eps: float, norm: str, clip: tuple | None
) -> Tensor:
    """The step in float64, sample by sample, from the words of the documentation."""
    result = torch.empty(x.shape, dtype=torch.float64)
    for i in range(len(x)):
        a, g, c = (t[i].double().cpu() for t in (x_adv, grad, x))
        if norm == "linf":
            moved = a + step_size * g.sign()
            moved = c + (moved - c).clamp(-eps, eps)
        else:
            length = math.sqrt(sum(v * v for v in g.flatten().tolist()))
            moved = a + step_size * g / length if length > 0 else a
            away = math.sqrt(sum(v * v for v in (moved - c).flatten().tolist()))
            moved = c + (moved - c) * (eps / away) if away > eps else moved
        result[i] = moved if clip is None else moved.clamp(*clip)
    return result


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "contiguous", x.contiguous()
    if x.ndim == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "strided", torch.stack([x, torch.full_like(x, NAN)], -1)[..., 0]


def case(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.rand(shape, generator=generator)
    x_adv = (x + 0.1 * torch.rand(shape, generator=generator) - 0.05).clamp(0, 1)
    grad = torch.randn(shape, generator=generator) * 1e-3
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    return [x_adv.to(device, dtype), grad.to(device, grad_dtype), x.to(device, dtype)]


def assert_near(actual: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    error = (actual.double().cpu() - truth).abs().max().item() if truth.numel() else 0.0
    assert error <= ROUNDING[dtype], f"off by {error:.3g}, allowed {ROUNDING[dtype]:.3g}"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth(device: torch.device, dtype: torch.dtype, norm: str) -> None:
    """Values, for every dtype of the gradient, clips and sizes around the widths of vectors and blocks."""
    shapes = [(2, 3, 8, 8), (3, 1, 1, 1), (2, 517), (1, 3, 5, 7), (4, 1), (5,)]
    # One clip a pair, in turn: three clips over four dtypes, so that every shape and every dtype meets each of them.
    clips = itertools.cycle([(0.0, 1.0), None, (0.25, None)])
    for (shape, grad_dtype), clip in zip(itertools.product(shapes, DTYPES), clips, strict=False):
        x_adv, grad, x = case(device, shape, dtype, grad_dtype)
        actual = pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625, norm=norm, clip=clip)
        assert actual.dtype == dtype
        assert_near(actual, true_step(x_adv, grad, x, 0.02, 0.0625, norm, clip), dtype)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_truth_in_every_memory_format(device: torch.device, norm: str) -> None:
    """Operands of different strides meet element by element, and the result lies as ``empty_like(x_adv)``."""
    for shape in ((2, 3, 6, 5), (3, 40)):
        x_adv, grad, x = case(device, shape, torch.float32, torch.bfloat16)
        truth = true_step(x_adv, grad, x, 0.02, 0.0625, norm, (0.0, 1.0))
        for (_, a), (_, g), (_, c) in itertools.product(layouts(x_adv), layouts(grad), layouts(x)):
            actual = pgd_step(a, g, c, step_size=0.02, eps=0.0625, norm=norm)
            assert_near(actual, truth, torch.float32)
            assert actual.stride() == torch.empty_like(a).stride()


def test_large_samples_are_shared_between_threads(device: torch.device) -> None:
    """One sample of many chunks takes another path than many samples; both give the same."""
    x_adv, grad, x = case(device, (1, 3, 180, 171), torch.float32, torch.float32)
    alone = pgd_step(x_adv, grad, x, step_size=3.0, eps=2.0, norm="l2")
    assert_near(alone, true_step(x_adv, grad, x, 3.0, 2.0, "l2", (0.0, 1.0)), torch.float32)
    together = pgd_step(
        *(t.expand(16, -1, -1, -1) for t in (x_adv, grad, x)), step_size=3.0, eps=2.0, norm="l2"
    )
    assert_near(together, alone.expand(16, -1, -1, -1).double().cpu(), torch.float32)


@pytest.mark.default_backend
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_batches_are_their_parts(device: torch.device, dtype: torch.dtype, norm: str) -> None:
    """What outgrows the caches is stored past them, but for a step in place; an image at a time is not."""
    operands = case(device, (9, 3, 419, 417), dtype, dtype)
    assert operands[0].nbytes > 2**23 > operands[0][:1].nbytes
    step = {"step_size": 0.02, "eps": 0.0625, "norm": norm}
    parts = torch.cat([pgd_step(*one, **step) for one in zip(*(t.split(1) for t in operands), strict=True)])
    for out in (None, operands[0]):
        actual = pgd_step(*operands, **step, out=out)
        assert_near(actual, parts.double().cpu(), dtype)
        assert norm == "l2" or torch.equal(actual, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_out_at_an_odd_address(dtype: torch.dtype) -> None:
    """Where no vector is ever aligned, none is stored past the caches."""
    device = torch.device("cpu")
    x_adv, grad, x = case(device, (3, 3, 520, 1024), dtype, dtype)
    assert x.nbytes > 2**23
    out = torch.frombuffer(bytearray(x.nbytes + 1), dtype=dtype, count=x.numel(), offset=1).view(x.shape)
    step = {"step_size": 0.02, "eps": 0.0625}
    assert torch.equal(pgd_step(x_adv, grad, x, **step, out=out), pgd_step(x_adv, grad, x, **step))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(device: torch.device, dtype: torch.dtype, norm: str) -> None:
    """Many samples, each a thread's, and one large one that threads share."""
    threads = torch.get_num_threads()
    for shape in ((40, 3, 32, 32), (1, 3, 180, 171)):
        operands = case(device, shape, dtype, dtype)
        results = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(pgd_step(*operands, step_size=0.02, eps=0.0625, norm=norm))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*results)


def test_l2_step_back_to_the_image(device: torch.device) -> None:
    """Of the sums that give the new distance next to nothing is left: roundings of float32 sums would show."""
    x_adv, _, x = case(device, (3, 3, 8, 8), torch.float32, torch.float32)
    distance = (x_adv - x).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x_adv = x + (x_adv - x) / distance
    grad = 0.7 * (x - x_adv)  # so that its squares are rounded otherwise
    result = pgd_step(x_adv, grad, x, step_size=0.9999, eps=2e-5, norm="l2", clip=None)
    truth = true_step(x_adv, grad, x, 0.9999, 2e-5, "l2", None)
    assert_near(result, truth, torch.float32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    eps=st.floats(1e-6, 10),
    relative_step=st.floats(1e-3, 1e3),
    dtype=st.sampled_from(DTYPES),
    norm=st.sampled_from(["linf", "l2"]),
    seed=st.integers(0, 2**20),
)
def test_never_leaves_ball_or_clip(
    shape: tuple[int, ...], eps: float, relative_step: float, dtype: torch.dtype, norm: str, seed: int
) -> None:
    """Whatever the step: in the ball and the range, up to the rounding of each element."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator).to(dtype)
    x_adv = (x + eps * torch.randn(shape, generator=generator).to(dtype)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator).to(dtype)
    for backend in ops.TABLE["pgd_step", "cpu"]:
        with use_backend(backend):
            result = pgd_step(x_adv, grad, x, step_size=eps * relative_step, eps=eps, norm=norm)
        assert result.min() >= 0
        assert result.max() <= 1
        moved = (result.double() - x.double()).reshape(len(x), -1)
        slack = ROUNDING[dtype] / 2
        if norm == "linf":
            assert moved.abs().max() <= eps * (1 + 1e-6) + slack
        else:
            assert moved.norm(dim=1).max() <= eps * (1 + 1e-6) + slack * math.sqrt(moved.shape[1])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_special_gradients(device: torch.device, norm: str) -> None:
    """Zero gradients project but do not move; a NaN is loud and stays in its pixel (linf) or sample (l2)."""
    x_adv, grad, x = case(device, (4, 37), torch.float32, torch.float32)
    grad[0], grad[1, 5], grad[2, 7] = 0, NAN, INF
    result = pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625, norm=norm).cpu()
    truth = true_step(x_adv, grad, x, 0.02, 0.0625, norm, (0.0, 1.0))
    assert_near(result[[0, 3]], truth[[0, 3]], torch.float32)
    expected = torch.zeros(4, 37, dtype=torch.bool)
    if norm == "linf":
        expected[1, 5] = True  # and the infinite element has a sign
        assert_near(result[2], truth[2], torch.float32)
    else:
        expected[1:3] = True
    assert torch.equal(result.isnan(), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("broken", [0, 2], ids=["x_adv", "x"])
def test_nan_images_stay_nan(device: torch.device, norm: str, broken: int) -> None:
    operands = case(device, (3, 50), torch.float32, torch.float32)
    operands[broken][1, 4] = NAN
    result = pgd_step(*operands, step_size=0.02, eps=0.0625, norm=norm).cpu()
    assert result[1, 4].isnan()
    assert not result[[0, 2]].isnan().any()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30], ids=str)
def test_l2_direction_of_tiny_and_huge_gradients(device: torch.device, scale: float) -> None:
    """Squares of 1e-30 vanish in float32, and those of 1e30 overflow: the step must not."""
    x_adv, grad, x = case(device, (3, 3, 6, 6), torch.float32, torch.float32)
    # Small integers: scaling them is exact but for one rounding, even among subnormals.
    grad = (grad * 4000).round()
    plain = pgd_step(x_adv, grad, x, step_size=0.02, eps=1.0, norm="l2")
    scaled = pgd_step(x_adv, grad * scale, x, step_size=0.02, eps=1.0, norm="l2")
    assert (plain - x_adv).flatten(1).norm(dim=1).min() > 0.01
    assert_near(scaled, plain.double().cpu(), torch.float32)


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-200, 1e200], ids=str)
def test_l2_direction_of_extreme_float64_gradients(device: torch.device, scale: float) -> None:
    x_adv, grad, x = case(device, (3, 3, 6, 6), torch.float64, torch.float64)
    grad = (grad * 4000).round()
    plain = pgd_step(x_adv, grad, x, step_size=0.02, eps=1.0, norm="l2")
    scaled = pgd_step(x_adv, grad * scale, x, step_size=0.02, eps=1.0, norm="l2")
    assert (scaled - plain).abs().max() <= 1e-12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_out(device: torch.device, norm: str) -> None:
    """``out`` in another layout, between sentinels, or x_adv itself: the same values, and nothing else written."""
    x_adv, grad, x = case(device, (2, 3, 6, 6), torch.float32, torch.float32)
    expected = pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625, norm=norm)
    for _, template in layouts(x_adv):
        out = template.clone(memory_format=torch.preserve_format)
        assert pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625, norm=norm, out=out) is out
        assert torch.equal(out, expected)
    buffer = torch.full((4, 3, 6, 10), 7.0, device=device)
    pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625, norm=norm, out=buffer[1:3, :, :, 2:8])
    assert torch.equal(buffer[1:3, :, :, 2:8], expected)
    buffer[1:3, :, :, 2:8] = 7.0
    assert (buffer == 7.0).all()
    in_place = x_adv.clone()
    pgd_step(in_place, grad, x, step_size=0.02, eps=0.0625, norm=norm, out=in_place)
    assert torch.equal(in_place, expected)


def test_autograd_sees_what_is_written_in_place(device: torch.device) -> None:
    """A network's graph holds x_adv: its backward must be refused after the step, not run on other values."""
    x_adv, grad, x = case(device, (2, 3, 4, 4), torch.float32, torch.float32)
    loss = (x_adv * torch.ones_like(x, requires_grad=True)).sum()
    pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625, out=x_adv)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inputs_are_untouched_and_no_graph_grows(device: torch.device) -> None:
    operands = case(device, (2, 3, 4, 4), torch.float32, torch.float32)
    copies = [t.clone() for t in operands]
    operands[0].requires_grad_()
    result = pgd_step(*operands, step_size=0.02, eps=0.0625)
    assert not result.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(operands, copies, strict=True))
    assert not pgd_start(operands[0], eps=0.1).requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_empty_batch(device: torch.device, norm: str) -> None:
    x = torch.rand(0, 3, 4, 4, device=device)
    assert pgd_step(x, x, x, step_size=0.1, eps=0.1, norm=norm).shape == x.shape
    assert pgd_start(x, eps=0.1, init="uniform", norm=norm).shape == x.shape


@pytest.mark.parametrize(
    ("init", "norm"), list(itertools.product(["gaussian", "uniform", "zero"], ["linf", "l2"]))
)
def test_start(device: torch.device, init: str, norm: str) -> None:
    """In the ball, of the promised distribution, and the same again for the same seed."""
    # A layout changes no arithmetic: one a dtype, in turn.
    for dtype, layout in zip(DTYPES, (torch.contiguous_format, torch.channels_last) * 2, strict=True):
        x = torch.full((64, 3, 4, 5), 0.5, dtype=dtype, device=device).to(memory_format=layout)

        def draw(seed: int, x: Tensor = x) -> Tensor:
            generator = torch.Generator(device).manual_seed(seed)
            return pgd_start(x, eps=0.25, init=init, norm=norm, generator=generator)

        start = draw(SEED)
        assert start.stride() == x.stride()
        assert start.dtype == dtype
        assert start is not x
        assert torch.equal(start, draw(SEED))
        moved = (start.double() - x.double()).flatten(1).cpu()
        size = moved.abs() if norm == "linf" else moved.norm(dim=1)
        assert size.max() <= 0.25 + ROUNDING[dtype] * 4
        if init == "zero":
            assert moved.abs().max() == 0
            continue
        assert not torch.equal(start, draw(SEED + 1))
        if dtype in (torch.float16, torch.bfloat16):
            continue
        if init == "gaussian":
            assert 0.0009 < moved.std() < 0.0011
        elif norm == "linf":  # uniform in (-0.25, 0.25): std 0.25 / sqrt(3)
            assert abs(moved.std() - 0.25 / math.sqrt(3)) < 0.005
        else:  # E[r^d] of a uniform volume is half; the mean over 64 samples has std 0.036
            assert abs(((size / 0.25) ** moved.shape[1]).mean() - 0.5) < 0.15


def test_start_clips(device: torch.device) -> None:
    x = torch.ones(4, 50, device=device)
    for init in ("gaussian", "uniform", "zero"):
        assert pgd_start(x, eps=0.25, init=init).max() <= 1
    assert pgd_start(2 * x, eps=0.25, init="zero").max() == 1
    assert pgd_start(x, eps=0.25, init="uniform", clip=None).max() > 1
    assert pgd_start(2 * x, eps=0.25, init="zero", clip=[None, None]).max() == 2  # type: ignore[arg-type]


def test_compiles_to_one_graph(device: torch.device) -> None:
    """Fullgraph, eager's values, and no more than one recompilation for other batch sizes."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    norms = ("linf", "l2")

    def step(x_adv: Tensor, grad: Tensor, x: Tensor) -> list[Tensor]:
        return [pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625, norm=norm) for norm in norms]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for batch in (2, 5, 7, 11):
        operands = case(device, (batch, 3, 4, 4), torch.float32, torch.float32)
        for actual, expected in zip(compiled(*operands), step(*operands), strict=True):
            # A traced reference may take a sample's norm in another order of summation.
            rounding = 1e-6 if ops.served_by("pgd_step", device.type) == "reference" else 0
            torch.testing.assert_close(actual, expected, rtol=rounding, atol=0)
    assert counter.frame_count <= 2

    def in_place(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        return pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625, out=x_adv)

    operands = case(device, (2, 3, 4, 4), torch.float32, torch.float32)
    expected = step(*operands)[0]
    torch.compile(in_place, fullgraph=True, backend="aot_eager")(*operands)
    assert torch.equal(operands[0], expected)


def test_opcheck(device: torch.device) -> None:
    """Schema, aliasing and fakes of the operators, where an operator serves."""
    backend = ops.backend_for("pgd_step", device.type)
    if backend == "reference":
        assert ops.kernel("pgd_step", device.type) is not None  # plain PyTorch has no schema to check
        return
    for norm in (0, 1):
        x_adv, grad, x = case(device, (2, 3, 4, 5), torch.float32, torch.bfloat16)
        x_adv = x_adv.to(memory_format=torch.channels_last)
        constants = (0.02, 0.0625, norm, 0.0, None)
        torch.library.opcheck(ops.kernel("pgd_step", device.type), (x_adv, grad, x, *constants))
        torch.library.opcheck(ops.kernel("pgd_start", device.type), (x_adv, grad, *constants))
        out = torch.empty_like(x)
        torch.library.opcheck(ops.kernel("pgd_step_out", device.type), (x_adv, grad, x, *constants, out))


X = torch.rand(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: pgd_step([1.0], X, X, step_size=1, eps=1), TypeError, "x_adv is a list"),
        (lambda: pgd_step(X.long(), X, X, step_size=1, eps=1), TypeError, "x_adv has dtype torch.int64"),
        (lambda: pgd_step(X, X.to(torch.complex64), X, step_size=1, eps=1), TypeError, "grad has dtype"),
        (lambda: pgd_step(X, X[:1], X, step_size=1, eps=1), ValueError, r"grad has shape \(1, 3\)"),
        (lambda: pgd_step(X, X, X.double(), step_size=1, eps=1), TypeError, "x has dtype torch.float64"),
        (lambda: pgd_step(X, X.to("meta"), X, step_size=1, eps=1), ValueError, "grad is on meta"),
        (lambda: pgd_step(X, X, X, step_size=0, eps=1), ValueError, "step_size is 0"),
        (lambda: pgd_step(X, X, X, step_size=1, eps=-1), ValueError, "eps is -1"),
        (lambda: pgd_step(X, X, X, step_size=1, eps=INF), ValueError, "eps is inf"),
        (lambda: pgd_step(X, X, X, step_size=NAN, eps=1), ValueError, "step_size is nan"),
        (lambda: pgd_step(X, X, X, step_size="1", eps=1), TypeError, "step_size is a str"),
        (
            lambda: pgd_step(X, X, X, step_size=1, eps=1, norm="l1"),
            ValueError,
            "norm is 'l1'; allowed: 'linf', 'l2'",
        ),
        (lambda: pgd_step(X, X, X, step_size=1, eps=1, clip=1.0), TypeError, "clip is 1.0"),
        (lambda: pgd_step(X, X, X, step_size=1, eps=1, clip=(1, 0)), ValueError, "minimum must not exceed"),
        (lambda: pgd_step(X, X, X, step_size=1, eps=1, clip=(NAN, 1)), ValueError, "must not be NaN"),
        (
            lambda: pgd_step(X[0, 0], X[0, 0], X[0, 0], step_size=1, eps=1, norm="l2"),
            ValueError,
            "a first dimension",
        ),
        (lambda: pgd_step(X, X, X, step_size=1, eps=1, out=X.double()), TypeError, "out has dtype"),
        (
            lambda: pgd_step(X, X, X, step_size=1, eps=1, out=X[:1].expand(2, 3)),
            ValueError,
            "out is expanded",
        ),
        (lambda: pgd_start(X, eps=0), ValueError, "eps is 0"),
        (lambda: pgd_start(X, eps=1, init="normal"), ValueError, "init is 'normal'; allowed"),
        (lambda: pgd_start(X, eps=1, generator=7), TypeError, "generator is a int"),
        (
            lambda: pgd_step(X, X.to_sparse(), X, step_size=1, eps=1),
            TypeError,
            "grad has layout torch.sparse_coo",
        ),
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_out_must_not_overlap_an_input_halfway(device: torch.device) -> None:
    buffer = torch.rand(5, 3, device=device)
    with pytest.raises(ValueError, match="out overlaps x_adv in memory"):
        pgd_step(buffer[:4], buffer[:4].clone(), buffer[:4].clone(), step_size=1, eps=1, out=buffer[1:])


def test_out_is_recorded_by_no_graph(device: torch.device) -> None:
    """As PyTorch's own out=: a tensor that requires a gradient is written under no_grad alone."""
    x_adv, grad, x = case(device, (2, 3, 4, 4), torch.float32, torch.float32)
    expected = pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625)
    x_adv.requires_grad_()
    with pytest.raises(ValueError, match="out requires a gradient"):
        pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625, out=x_adv)
    with torch.no_grad():
        pgd_step(x_adv, grad, x, step_size=0.02, eps=0.0625, out=x_adv)
    assert torch.equal(x_adv, expected)
