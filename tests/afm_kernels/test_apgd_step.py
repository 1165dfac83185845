"""apgd_step on every backend, against the published iteration written out image by image in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from afm_kernels import APGDState, apgd_step

STEM = "apgd_step"
SEED = 30
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")

# Of values up to 2: of the stored result half an ulp, and as much again for each of the four additions before it. The
# published 1e-12 in an l2 length moves a point that far at most, where that length is a difference of larger ones.
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 2.0**-21,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def true_project(z: Tensor, x: Tensor, eps: float, norm: str, clip: tuple | None) -> Tensor:
    d = z - x
    if norm == "linf":
        z = x + d.clamp(-eps, eps)
    else:
        length = d.square().sum().sqrt()
        z = x + d / (length + 1e-12) * min(eps, float(length))
    return z if clip is None else z.clamp(*clip)


def true_step(
    state: APGDState,
    grad: Tensor,
    x: Tensor,
    loss: Tensor,
    misclassified: Tensor,
    *,
    eps: float,
    norm: str,
    clip: tuple | None = (0.0, 1.0),
    window: int = 0,
    first: bool = False,
) -> APGDState:
    """The state after, whose next points are float64."""
    images = [t.double().cpu().clone() for t in state[:5]]
    numbers, counts = state.numbers.cpu().clone(), state.counts.cpu().clone()
    at, old, best, grad_best, hit = images
    after = torch.empty_like(at)
    grad, x = grad.double().cpu(), x.double().cpu()
    loss, misclassified = loss.to(numbers.dtype).cpu(), misclassified.cpu()
    for i in range(len(x)):
        g = grad[i]
        if first:
            numbers[0, i] = numbers[2, i] = loss[i]
            best[i], grad_best[i], hit[i] = at[i], g, at[i]
        else:
            counts[0, i] += int(loss[i] > numbers[1, i])
            numbers[1, i] = loss[i]
            if loss[i] > numbers[0, i]:
                best[i], grad_best[i], numbers[0, i] = at[i], g, loss[i]
        if misclassified[i]:
            hit[i], counts[2, i] = at[i], 1
        if window:
            stuck = counts[1, i] == 0 and numbers[2, i] >= numbers[0, i]
            counts[1, i] = bool(counts[0, i] <= 0.75 * window or stuck)
            counts[0, i], numbers[2, i] = 0, numbers[0, i]
            if counts[1, i]:
                numbers[3, i] /= 2
                at[i], g = best[i], grad_best[i]
        if norm == "linf":
            direction = torch.where(g.isnan(), 0, g).sign()
        else:
            largest = float(g.abs().max())
            unit = g / largest if 0 < largest < INF else torch.zeros_like(g)
            direction = unit / max(float(unit.square().sum().sqrt()), 0.5)
        moved = true_project(at[i] + float(numbers[3, i]) * direction, x[i], eps, norm, clip)
        share = 1.0 if first else 0.75
        mixed = at[i] + share * (moved - at[i]) + (1 - share) * (at[i] - old[i])
        after[i] = true_project(mixed, x[i], eps, norm, clip)
    return APGDState(after, at, best, grad_best, hit, numbers, counts)


def assert_is(actual: APGDState, truth: APGDState) -> None:
    for name in ("x_old", "x_best", "grad_best", "x_hit"):
        found = getattr(actual, name).double().cpu()
        assert torch.equal(found.nan_to_num(7.0), getattr(truth, name).nan_to_num(7.0)), name
    assert torch.equal(actual.numbers.cpu(), truth.numbers)
    assert torch.equal(actual.counts.cpu(), truth.counts)
    error = (actual.x_adv.double().cpu() - truth.x_adv).abs().max()
    assert error <= ROUNDING[actual.x_adv.dtype], f"off by {error:.3g}"


def case(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype | None = None
) -> tuple[Tensor, APGDState]:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.rand(shape, generator=generator)
    start = (x + 0.1 * torch.rand(shape, generator=generator) - 0.05).clamp(0, 1)
    return x.to(device, dtype), APGDState.at(start.to(device, dtype), step_size=0.125, grad_dtype=grad_dtype)


def evaluated(state: APGDState, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient, losses and flags: images by whether they rise always, never or at times, and are ever hit."""
    generator = torch.Generator().manual_seed(SEED + step)
    shape = state.x_adv.shape
    grad = torch.randn(shape, generator=generator) * 1e-3
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    kind = torch.arange(shape[0])
    rising = torch.where(kind % 3 == 0, step, torch.where(kind % 3 == 1, -step, (step * 7) % 5))
    misclassified = (kind % 2 == 1) & ((step + kind) % 3 == 0)
    device = state.x_adv.device
    return grad.to(device, state.grad_best.dtype), rising.float().to(device), misclassified.to(device)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth(device: torch.device, dtype: torch.dtype, norm: str) -> None:
    """Runs with three checkpoints, for every dtype of the gradient, clips and sizes around vectors and blocks."""
    shapes = [(6, 3, 8, 8), (4, 1, 1, 1), (3, 517), (1, 3, 5, 7), (3, 1)]
    # Twice each shape, whose gradients have another dtype then, and its clip is another one.
    turns = zip(
        shapes * 2, itertools.cycle(DTYPES), itertools.cycle([(0.0, 1.0), None, (0.25, None)]), strict=False
    )
    windows = {2: 2, 3: 1, 4: 1}
    went_back = set()
    for shape, grad_dtype, clip in turns:
        x, state = case(device, shape, dtype, grad_dtype)
        for step in range(5):
            given = evaluated(state, step)
            options = {"eps": 0.0625, "norm": norm, "clip": clip, "window": windows.get(step, 0)}
            truth = true_step(state, given[0], x, *given[1:], **options, first=step == 0)
            state = apgd_step(state, given[0], x, *given[1:], **options, first=step == 0)
            assert_is(state, truth)
            went_back |= set(state.counts[1].tolist()) if step in windows else set()
    assert went_back == {0, 1}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_memory_formats(device: torch.device, norm: str) -> None:
    """Images lie as the start does; a gradient or clean images of another layout are brought to it."""
    x, state = case(device, (3, 3, 6, 5), torch.float32)
    given = evaluated(state, 0)
    options = {"eps": 0.0625, "norm": norm, "first": True}
    truth = true_step(state, given[0], x, *given[1:], **options)
    last = torch.channels_last
    for start, by, centre in itertools.product((False, True), repeat=3):
        at = APGDState.at(
            state.x_adv.contiguous(memory_format=last) if start else state.x_adv, step_size=0.125
        )
        grad = given[0].contiguous(memory_format=last) if by else given[0]
        clean = x.contiguous(memory_format=last) if centre else torch.stack([x, x], -1)[..., 0]
        result = apgd_step(at, grad, clean, *given[1:], **options)
        assert_is(result, truth)
        assert result.x_adv.is_contiguous(memory_format=last) == start


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_threads_and_large_images_do_not_change_a_bit(device: torch.device, norm: str) -> None:
    threads = torch.get_num_threads()
    for shape in ((40, 3, 32, 32), (2, 3, 180, 171)):
        results = []
        for count in (1, 2):
            x, state = case(device, shape, torch.float32)
            try:
                torch.set_num_threads(count)
                for step in range(3):
                    grad, *given = evaluated(state, step)
                    state = apgd_step(
                        state, grad, x, *given, eps=0.5, norm=norm, window=step, first=step == 0
                    )
            finally:
                torch.set_num_threads(threads)
            results.append(state)
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_without_a_direction_leave_the_momentum(device: torch.device, norm: str) -> None:
    """Zero, NaN and infinity: points stay finite and in the ball, and what was hit before is kept."""
    x, state = case(device, (5, 37), torch.float32)
    for step in range(4):
        grad, *given = evaluated(state, step)
        grad[0], grad[1, 5], grad[2, 7], grad[3] = 0, NAN, INF, NAN
        options = {"eps": 0.0625, "norm": norm, "first": step == 0, "window": 2 * (step == 2)}
        truth = true_step(state, grad, x, *given, **options)
        state = apgd_step(state, grad, x, *given, **options)
        assert_is(state, truth)
        assert state.x_adv.isfinite().all()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30], ids=str)
def test_l2_direction_of_tiny_and_huge_gradients(device: torch.device, scale: float) -> None:
    after = []
    for factor in (1.0, scale):
        x, state = case(device, (3, 3, 6, 6), torch.float32)
        grad, *given = evaluated(state, 0)
        grad = (grad * 4000).round() * factor  # small integers: exact but among subnormals, and there nearly
        after.append(apgd_step(state, grad, x, *given, eps=1.0, norm="l2", first=True))
    moved = (after[0].x_adv - after[0].x_old).flatten(1).norm(dim=1)
    assert moved.min() > 0.05
    assert (after[0].x_adv - after[1].x_adv).abs().max() <= ROUNDING[torch.float32]


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-200, 1e200], ids=str)
def test_l2_direction_of_extreme_float64_gradients(device: torch.device, scale: float) -> None:
    after = []
    for factor in (1.0, scale):
        x, state = case(device, (3, 3, 6, 6), torch.float64)
        grad, *given = evaluated(state, 0)
        after.append(
            apgd_step(state, (grad * 4000).round() * factor, x, *given, eps=1.0, norm="l2", first=True)
        )
    assert (after[0].x_adv - after[1].x_adv).abs().max() <= 1e-12


def test_no_images(device: torch.device) -> None:
    x, state = case(device, (0, 3, 4, 4), torch.float32)
    grad, *given = evaluated(state, 0)
    assert apgd_step(state, grad, x, *given, eps=0.1).x_adv.shape == x.shape


def test_a_state_of_some_images_goes_on_as_they_would(device: torch.device) -> None:
    x, state = case(device, (6, 3, 4, 4), torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    state = APGDState.at(state.x_adv.contiguous(memory_format=torch.channels_last), step_size=0.125)
    state = apgd_step(state, *_in_order(state, x, 0), eps=0.0625, first=True)
    kept = torch.tensor([4, 1], device=x.device)
    some = state.rows(kept)
    grad, clean, *given = _in_order(state, x, 1)
    part = apgd_step(some, grad[kept], clean[kept], *(g[kept] for g in given), eps=0.0625, window=1)
    whole = apgd_step(state, grad, clean, *given, eps=0.0625, window=1)
    assert all(torch.equal(a, b) for a, b in zip(part, whole.rows(kept), strict=True))


def _in_order(state: APGDState, x: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, *given = evaluated(state, step)
    return grad, x, *given


@pytest.mark.default_backend
def test_errors_name_the_argument(device: torch.device) -> None:
    x, state = case(device, (2, 3, 4, 4), torch.float32)
    grad, loss, flags = evaluated(state, 0)
    fit = {"state": state, "grad": grad, "x": x, "loss": loss, "misclassified": flags, "eps": 0.1}
    for changed, message in (
        ({"grad": grad[:1]}, r"grad has shape \(1, 3, 4, 4\) and state.grad_best"),
        ({"grad": grad.double()}, "grad has dtype torch.float64 and state.grad_best torch.float32"),
        ({"x": x.double()}, "x has dtype"),
        ({"loss": loss[:1]}, r"loss has shape \(1,\)"),
        ({"misclassified": flags.int()}, "misclassified has dtype torch.int32; allowed: torch.bool"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"norm": "l1"}, "norm is 'l1'"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"window": -1}, "window is -1"),
        ({"first": 1}, "first is"),
        ({"state": state._replace(x_old=state.x_adv)}, "state.x_adv and state.x_old overlap"),
        ({"x": state.x_best}, "state.x_best and x overlap"),
        ({"state": state._replace(x_hit=state.x_hit.transpose(2, 3))}, "state.x_hit has strides"),
        ({"state": state._replace(counts=state.counts.long())}, "state.counts has dtype torch.int64"),
    ):
        before = [t.clone() for t in state]
        with pytest.raises((ValueError, TypeError), match=message):
            apgd_step(**(fit | changed))
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.default_backend
def test_compiled_and_seen_by_autograd(device: torch.device) -> None:
    """The same in a compiled graph; and a graph that saved a point refuses its backward once that is written."""
    results = []
    for step in (apgd_step, torch.compile(apgd_step, fullgraph=True, backend="aot_eager")):
        x, state = case(device, (3, 3, 4, 4), torch.float32)
        grad, *given = evaluated(state, 0)
        results.append(step(state, grad, x, *given, eps=0.0625, first=True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    loss = (results[0].x_old * torch.ones_like(x, requires_grad=True)).sum()
    grad, *given = evaluated(results[0], 1)
    apgd_step(results[0], grad, x, *given, eps=0.0625)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
