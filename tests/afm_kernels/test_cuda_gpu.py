"""What only a GPU can show: streams, devices, graphs, no synchronisation, more than 2^31 elements.

Values and gradients of every backend and dtype are in the suites that run once for each backend (``device`` fixture).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from afm_kernels import (
    APGDState,
    apgd_step,
    ops,
    pgd_step,
    scale_shift_relu,
    softmax_kl_div,
    softmax_kl_div_grad,
    use_backend,
)

pytestmark = pytest.mark.gpu

BACKENDS = [
    backend
    for backend in ("cuda", "triton")
    if torch.cuda.is_available() and backend in ops.TABLE["softmax_kl_forward", "cuda"]
]
if not BACKENDS:
    pytest.skip("no CUDA device, or no kernels for it", allow_module_level=True)

# One of every tier: sub-warp, warp, block, streamed, streamed and split.
SHAPES = [(128, 10), (64, 1000), (16, 4000), (400, 20000), (2, 50000)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def logits(*shape: int, device: str = "cuda", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    pair = (3 * torch.randn(2, *shape, device=device, generator=generator)).to(dtype)
    return pair[0], pair[1]


def truth(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    student, teacher = (each.detach().double().requires_grad_() for each in (student, teacher))
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum()
    return loss.detach(), *torch.autograd.grad(loss, (student, teacher))


def near(actual: Tensor, wanted: Tensor) -> bool:
    return bool((actual.double() - wanted).norm() <= 2e-5 * wanted.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_synchronises(backend: str, shape: tuple[int, int]) -> None:
    student, teacher = (each.requires_grad_() for each in logits(*shape))
    x = torch.rand(8, 3, 32, 32, device="cuda")
    vector = torch.rand(3, device="cuda")
    softmax_kl_div(student, teacher).backward()  # what is loaded or compiled at the first call may wait
    softmax_kl_div_grad(student.detach(), teacher.detach())
    state, wrong = APGDState.at(x, step_size=0.06), torch.zeros(8, dtype=torch.bool, device="cuda")
    for norm in ("linf", "l2"):
        pgd_step(x, x, x, step_size=0.01, eps=0.03, norm=norm)
        state = apgd_step(state, x.clone(), x, x[:, 0, 0, 0], wrong, eps=0.03, norm=norm, window=3)
    scale_shift_relu(x, vector, vector)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        softmax_kl_div(student, teacher, reduction="sum").backward()
        softmax_kl_div_grad(student.detach(), teacher.detach())
        for norm in ("linf", "l2"):
            pgd_step(x, x, x, step_size=0.01, eps=0.03, norm=norm)
            state = apgd_step(state, x.clone(), x, x[:, 0, 0, 0], wrong, eps=0.03, norm=norm, window=3)
        scale_shift_relu(x, vector, vector, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_current_stream_is_used(backend: str, shape: tuple[int, int]) -> None:
    """Work on a side stream waits for what is before it there: inputs are written behind a long spin."""
    student, teacher = logits(*shape)
    late_student, late_teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    softmax_kl_div_grad(late_student, late_teacher)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late_student.copy_(student)
        late_teacher.copy_(teacher)
        gradients = softmax_kl_div_grad(late_student, late_teacher)
    side.synchronize()
    for gradient, wanted in zip(gradients, truth(student, teacher)[1:], strict=True):
        assert near(gradient, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_device_that_is_not_current(backend: str, shape: tuple[int, int]) -> None:
    student, teacher = logits(*shape, device="cuda:1")
    assert torch.cuda.current_device() == 0
    gradients = softmax_kl_div_grad(student, teacher)
    assert torch.cuda.current_device() == 0
    for gradient, wanted in zip(gradients, truth(student, teacher)[1:], strict=True):
        assert gradient.device == student.device
        assert near(gradient, wanted)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_graph_replays_with_new_inputs(backend: str, shape: tuple[int, int], reduction: str) -> None:
    """A counter that is not reset, or a buffer that outlives the capture, shows at the second replay."""
    student, teacher = logits(*shape)
    inputs = [torch.zeros_like(each).requires_grad_() for each in (student, teacher)]

    def step() -> tuple[Tensor, ...]:
        loss = softmax_kl_div(*inputs, reduction=reduction).sum()
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for scale in (1.0, 0.5, 1.0):
        with torch.no_grad():
            inputs[0].copy_(student * scale)
            inputs[1].copy_(teacher)
        graph.replay()
        for result, wanted in zip(results, truth(student * scale, teacher), strict=True):
            assert near(result, wanted)


def test_capture_together_with_two_networks(backend: str) -> None:
    """An attack step: forward and input gradient of both networks, logit gradients, projected step."""
    torch.manual_seed(0)

    def network() -> nn.Module:
        layers = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2048, 10),
        )
        return nn.Sequential(*layers).cuda().eval().requires_grad_(False)

    student, teacher = network(), network()
    x = torch.rand(32, 3, 16, 16, device="cuda")
    x_adv = x + 0.001 * torch.randn_like(x)

    def step(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        z_s, z_t = student(at), teacher(at)
        gradients = softmax_kl_div_grad(z_s.detach(), z_t.detach())
        (grad,) = torch.autograd.grad((z_s, z_t), at, gradients)
        return pgd_step(at.detach(), grad, x, step_size=2 / 255, eps=8 / 255)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x_adv)
    torch.cuda.current_stream().wait_stream(side)
    expected = step(step(x_adv))
    graph = torch.cuda.CUDAGraph()
    static = x_adv.clone()
    with torch.cuda.graph(graph):
        result = step(static)
    graph.replay()
    static.copy_(result)
    graph.replay()
    # A sign that flips where the gradient is next to nothing moves a pixel by two steps: few may.
    assert ((result - expected).abs() > 1e-6).float().mean() < 1e-3


@pytest.mark.parametrize("shape", [(128, 10), (16, 4000)], ids=str)
def test_compiles_as_one_graph(backend: str, shape: tuple[int, int]) -> None:
    student, teacher = (each.requires_grad_() for each in logits(*shape))

    @torch.compile(fullgraph=True)
    def loss(s: Tensor, t: Tensor) -> Tensor:
        return softmax_kl_div(2 * s, 2 * t, reduction="sum")

    value = loss(student, teacher)
    gradients = torch.autograd.grad(value, (student, teacher))
    wanted = truth(2 * student, 2 * teacher)
    assert near(value, wanted[0])
    for gradient, right in zip(gradients, wanted[1:], strict=True):
        assert near(gradient, 2 * right)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_every_time(backend: str, shape: tuple[int, int]) -> None:
    student, teacher = logits(*shape)
    first = softmax_kl_div(student, teacher, reduction="sum"), *softmax_kl_div_grad(student, teacher)
    for _ in range(5):
        again = softmax_kl_div(student, teacher, reduction="sum"), *softmax_kl_div_grad(student, teacher)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("offset", [(0, 0), (1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_views_off_the_alignment(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, offset: tuple[int, int]
) -> None:
    rows, classes = shape
    values = logits(rows, classes + 2, dtype=dtype)
    student, teacher = (each[:, o : o + classes] for each, o in zip(values, offset, strict=True))
    gradients = softmax_kl_div_grad(student, teacher)
    for gradient, wanted in zip(gradients, truth(student, teacher)[1:], strict=True):
        error = (gradient.double() - wanted).norm() / wanted.norm()
        assert error <= (4e-3 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [((1 << 31) // 1000 + 5, 1000), (17000, 128256)], ids=str)
def test_more_elements_than_32_bits_count(backend: str, shape: tuple[int, int]) -> None:
    """The last rows are right, and the first are not written twice."""
    rows, classes = shape
    if torch.cuda.mem_get_info()[0] < 5 * rows * classes * 2:
        pytest.skip("needs 20 GB of free GPU memory")
    student = torch.empty(rows, classes, device="cuda", dtype=torch.bfloat16).normal_()
    teacher = torch.empty(rows, classes, device="cuda", dtype=torch.bfloat16).normal_()
    gradients = softmax_kl_div_grad(student, teacher)
    for part in (slice(0, 3), slice(rows - 3, rows)):
        wanted = truth(student[part], teacher[part])[1:]
        for gradient, right in zip(gradients, wanted, strict=True):
            assert (gradient[part].double() - right).norm() <= 4e-3 * right.norm()
