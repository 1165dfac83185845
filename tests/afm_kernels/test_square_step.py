"""square_step on every backend, against its rule written out pixel by pixel: right to the bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import afm_kernels
from afm_kernels import SquareState, square_step

STEM = "square_step"
SEED = 31
NAN, INF = float("nan"), float("inf")


def true_step(state: SquareState, given: dict[str, Any]) -> SquareState:
    x_adv, best, margin, last = (each.cpu().clone() for each in state[:4])
    on_cpu = {name: each.cpu() if isinstance(each, Tensor) else each for name, each in given.items()}
    for i, z in enumerate(on_cpu["logits"].double().tolist()):
        label = z.pop(int(on_cpu["labels"][i]))
        found = NAN if NAN in [each if each == each else NAN for each in z] else label - max(z, default=-INF)
        kept = found < float(margin[i]) and float(margin[i]) > 0
        if kept:
            margin[i] = found
        for c in range(x_adv.shape[1]):
            edge = on_cpu["high" if on_cpu["is_high"][i, c] else "low"][i, c]
            for row, column in itertools.product(range(state.side), repeat=2):
                at = (i, c, int(last[i, 0]) + row, int(last[i, 1]) + column)
                (best if kept else x_adv)[at] = (x_adv if kept else best)[at]
            for row, column in itertools.product(range(given["side"]), repeat=2):
                h, w = int(on_cpu["corners"][i, 0]) + row, int(on_cpu["corners"][i, 1]) + column
                x_adv[i, c, h, w] = edge[h, w]
    return SquareState(x_adv, best, margin, on_cpu["corners"], given["side"])


def drawn(state: SquareState, step: int, classes: int, logits_dtype: torch.dtype) -> dict[str, Any]:
    """What a step is given: logits of coarse steps, with ties and margins of 0 among them."""
    generator = torch.Generator().manual_seed(SEED + step)
    images, channels, height, width = state.x_adv.shape
    side = step % (min(height, width) + 1)
    device, dtype = state.x_adv.device, state.x_adv.dtype

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator).to(device)

    labels = torch.arange(images, device=device) % classes
    logits = integers(5, images, classes).to(logits_dtype) * 0.25
    logits[torch.arange(images), labels] += 0.5
    return {
        "logits": logits,
        "labels": labels,
        "high": torch.rand(state.x_adv.shape, generator=generator).to(device, dtype) + 1,
        "low": torch.rand(state.x_adv.shape, generator=generator).to(device, dtype) - 1,
        "corners": torch.stack([integers(height - side + 1, images), integers(width - side + 1, images)], 1),
        "is_high": integers(2, images, channels) > 0,
        "side": side,
    }


def assert_is(found: SquareState, truth: SquareState) -> None:
    for name, each, true in zip(SquareState._fields[:4], found[:4], truth[:4], strict=True):
        assert torch.equal(each.cpu(), true), name
    assert found.side == truth.side


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "classes", "logits_dtype"),
    [
        ((9, 3, 6, 5), 10, torch.float32),
        ((40, 1, 4, 7), 2, torch.float64),
        ((3, 2, 1, 1), 3, torch.bfloat16),
        ((2, 4, 3, 3), 1, torch.float16),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_truth(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    classes: int,
    logits_dtype: torch.dtype,
    channels_last: bool,
) -> None:
    start = torch.rand(shape, generator=torch.Generator().manual_seed(SEED)).to(device, dtype)
    if channels_last:
        start = start.contiguous(memory_format=torch.channels_last)
    state = SquareState.at(start)
    kept = set()
    for step in range(12):
        given = drawn(state, step, classes, logits_dtype)
        truth = true_step(state, given)
        kept |= set((truth.margin < state.margin.cpu()).tolist())
        state = square_step(state, **given)
        assert_is(state, truth)
    assert kept == {False, True} or classes == 1


def test_margins_without_a_value(device: torch.device) -> None:
    """A NaN keeps nothing; -inf is a logit like others; an image that is done with keeps its point."""
    start = torch.rand(5, 1, 3, 3, device=device)
    given = drawn(SquareState.at(start), 2, 3, torch.float32)
    given["labels"] = torch.zeros(5, dtype=torch.int64, device=device)
    given["logits"] = torch.tensor(
        [[NAN, 0, 0], [1, NAN, 0], [1, -INF, -INF], [-INF, 0, 0], [0.5, 0, 0.5]], device=device
    )
    truth = true_step(SquareState.at(start), given)
    state = square_step(SquareState.at(start), **given)
    assert_is(state, truth)
    assert state.margin.tolist() == [INF, INF, INF, -INF, 0.0]
    given["logits"] = given["logits"].nan_to_num(0.0, 0.0, 0.0) - torch.tensor([9.0, 0, 0], device=device)
    truth = true_step(state, given)
    state = square_step(state, **given)
    assert_is(state, truth)
    assert state.margin[3:].tolist() == [-INF, 0.0]


def test_nothing_else_is_touched(device: torch.device) -> None:
    """Pixels outside both squares keep what is there, even where x_adv and x_best differ."""
    state = SquareState.at(torch.rand(4, 2, 5, 5, device=device))
    state.x_best.add_(7)
    given = drawn(state, 2, 3, torch.float32)
    before = state.x_adv.clone()
    after = square_step(state, **given)
    changed = (after.x_adv != before).flatten(1).sum(1)
    assert changed.tolist() == [2 * 2 * 2] * 4
    assert bool((after.x_best > 6).all())


def test_bad_arguments_are_named() -> None:
    state = SquareState.at(torch.rand(4, 2, 5, 6))
    given = drawn(state, 3, 3, torch.float32)
    bad: dict[str, tuple[Any, str]] = {
        "logits": (torch.zeros(3, 3), "logits has shape"),
        "labels": (torch.zeros(4), "labels has dtype"),
        "high": (torch.zeros(4, 2, 5, 5), "high has shape"),
        "low": (torch.zeros(4, 2, 5, 6).double(), "low has dtype"),
        "corners": (torch.zeros(4, 3, dtype=torch.int64), "corners has shape"),
        "is_high": (torch.zeros(4, 2), "is_high has dtype"),
        "side": (6, "side is 6"),
    }
    for name, (value, message) in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            square_step(state, **(given | {name: value}))
    with pytest.raises(ValueError, match="overlap"):
        square_step(state._replace(x_best=state.x_adv), **given)
    last = state._replace(x_best=state.x_best.contiguous(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match=r"state\.x_best has strides"):
        square_step(last, **given)
    with pytest.raises(ValueError, match="images"):
        SquareState.at(torch.rand(4, 3))


@pytest.mark.skipif(
    "square_step/cpu" not in afm_kernels.backend_info()["serves"], reason="the CPU operators are not built"
)
def test_indices_out_of_range_raise_before_anything_is_written() -> None:
    state = SquareState.at(torch.rand(2, 1, 4, 4))
    given = drawn(state, 2, 3, torch.float32)
    before = state.x_adv.clone()
    for name, value in (("labels", torch.tensor([0, 3])), ("corners", torch.tensor([[0, 0], [0, 3]]))):
        with pytest.raises(RuntimeError, match=name):
            square_step(state, **(given | {name: value}))
    assert torch.equal(state.x_adv, before)
