"""Gradients of a side that puts nearly all its mass on one class: small in all classes, and right in each.

The entry of the peak is a difference of numbers near 1, or near the divergence. Taken as such it is noise, as large as
all that is left of the gradient. See Note [Certain rows] in afm_kernels/reference/softmax_kl.py.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from truth import (
    certain_distillation,
    certain_divergence,
    certain_dkl,
    certain_value,
    truth_divergence,
)

from afm_kernels import distillation_loss, dkl_loss, softmax_kl_div, softmax_kl_div_grad
from afm_kernels.ops import DIVERGENCES, backend_for

STEM = "softmax_kl"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # a call takes a second then: the two gaps take turns
ROWS = 3 if INTERPRETED else 7
GAPS = (14.0, 85.0) if INTERPRETED else (5.0, 14.0, 30.0, 60.0, 85.0)
CLASSES = (10, 128, 129, 1000, 32000)
WHO = ("student", "teacher", "both", "apart")
BETA = 0.3
ALLOWED = 1e-4  # of the gradient's norm, in the median of the rows


def certain_rows(
    classes: int, gap: float, who: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Random logits with one class ``gap`` above the rest: of a side, of both, or another of each ("apart")."""
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, ROWS, classes, generator=generator, dtype=dtype)
    rows, first = torch.arange(ROWS), torch.randint(classes, (ROWS,), generator=generator)
    second = (first + classes // 2) % classes if who == "apart" else first
    if who != "teacher":
        student[rows, second] = student.amax(1) + gap
    if who != "student":
        teacher[rows, first] = teacher.amax(1) + gap
    return student, teacher


def assert_median(gradients: tuple[Tensor, ...], truth: tuple[Tensor, ...], *case: object) -> None:
    for side, gradient, wanted in zip(("student", "teacher"), gradients, truth, strict=True):
        if not wanted.any():  # a term without a share
            assert not gradient.any()
            continue
        error = (gradient.detach().cpu().double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert error.median() <= ALLOWED, f"{error.median():.1e} of the gradient by the {side}: {case}"


def recompute_modes(device: torch.device) -> tuple[bool, ...]:
    if backend_for("softmax_kl_forward", device.type) == "reference":
        return (False,)
    return (True,) if INTERPRETED else (False, True)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_softmax_kl(device: torch.device, divergence: str, classes: int) -> None:
    for turn, who in enumerate(WHO):
        for gap in GAPS[turn % 2 :: 2] if INTERPRETED else GAPS:
            student, teacher = certain_rows(classes, gap, who)
            truth = certain_divergence(student, teacher, 1.0, divergence, BETA)
            for recompute in recompute_modes(device):
                own = [x.to(device).requires_grad_() for x in (student, teacher)]
                loss = softmax_kl_div(
                    *own, divergence=divergence, beta=BETA, reduction="sum", recompute=recompute
                )
                assert_median(torch.autograd.grad(loss, own), truth, who, gap, recompute)


@pytest.mark.parametrize("classes", [10, 129, 32000])
def test_float64_and_temperature(device: torch.device, classes: int) -> None:
    for divergence in DIVERGENCES:
        for who in WHO:
            student, teacher = certain_rows(classes, 80.0, who, torch.float64)
            own = [x.to(device).requires_grad_() for x in (student, teacher)]
            loss = softmax_kl_div(*own, temperature=1.7, divergence=divergence, beta=BETA, reduction="sum")
            truth = certain_divergence(student, teacher, 1.7, divergence, BETA)
            assert_median(torch.autograd.grad(loss, own), truth, divergence, who)


@pytest.mark.parametrize("classes", [129, 5000])
def test_values(device: torch.device, classes: int) -> None:
    """Of sides close to each other, which are all as small as the classes beside the peak: nothing of it is lost."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(ROWS)
    for temperature in (1.0, 1.7):
        for gap, noise in ((14.0, 0.3), (60.0, 0.3), (60.0, 3.0), (80.0, 0.3)):
            teacher = torch.randn(ROWS, classes, generator=generator)
            student = teacher + noise * (2 * torch.rand(ROWS, classes, generator=generator) - 1)
            peak = torch.randint(classes, (ROWS,), generator=generator)
            for side in (student, teacher):
                side[rows, peak] = side.amax(1) + gap * temperature
            for divergence in ("kl", "jeffreys"):
                value = softmax_kl_div(
                    student.to(device),
                    teacher.to(device),
                    temperature=temperature,
                    divergence=divergence,
                    reduction="none",
                )
                wanted = certain_value(student, teacher, temperature, divergence)
                error = (value.cpu().double() - wanted).abs() / wanted
                assert error.max() <= 1e-5, f"{error.max():.1e} of {divergence} at {gap}, {temperature}"


@pytest.mark.default_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_outgrow_the_caches(device: torch.device, dtype: torch.dtype) -> None:
    """They go past the caches, peaks as well: the same bits as those of a few rows."""
    few = [x.to(device, dtype) for x in certain_rows(32000, 30.0, "apart")]
    many = [x.repeat(7, 1) for x in few]
    for alone, among_others in zip(softmax_kl_div_grad(*few), softmax_kl_div_grad(*many), strict=True):
        assert torch.equal(alone.repeat(7, 1), among_others)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("classes", [10, 129, 32000])
def test_distillation(device: torch.device, classes: int, alpha: float) -> None:
    """The label is the student's peak: with another nothing is small."""
    for who in WHO:
        for gap in (14.0, 60.0):
            student, teacher = certain_rows(classes, gap, who)
            labels = student.argmax(1)
            own = [x.to(device).requires_grad_() for x in (student, teacher)]
            loss = distillation_loss(*own, labels.to(device), alpha=alpha, temperature=2.0, reduction="sum")
            truth = certain_distillation(student, teacher, labels, 2.0, alpha)
            assert_median(torch.autograd.grad(loss, own), truth, who, gap)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
@pytest.mark.parametrize("classes", [10, 129, 32000])
def test_dkl(device: torch.device, classes: int, alpha: float) -> None:
    for who in WHO:
        for gap in (14.0, 60.0):
            student, teacher = certain_rows(classes, gap, who)
            own = [x.to(device).requires_grad_() for x in (student, teacher)]
            loss = dkl_loss(*own, alpha=alpha, beta=2.0, reduction="sum")
            truth = certain_dkl(student, teacher, alpha, 2.0)
            assert_median(torch.autograd.grad(loss, own), truth, who, gap)


def test_dkl_far_from_zero(device: torch.device) -> None:
    """Where float32 has multiples of 8 alone: less than that below the largest logit is that logit again."""
    student, teacher = (1e8 + 8 * x.round() for x in certain_rows(129, 2.0, "both"))
    own = [x.to(device).requires_grad_() for x in (student, teacher)]
    loss = dkl_loss(*own, alpha=1.0, beta=2.0, reduction="sum")
    assert_median(torch.autograd.grad(loss, own), certain_dkl(student, teacher, 1.0, 2.0))


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("classes", [10, 129, 32000])
def test_js_near_the_ends_of_beta(device: torch.device, classes: int, scale: float) -> None:
    """Values and gradients of the size of β, or 1 - β, are not differences of larger numbers."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = scale**0.5 * torch.randn(2, ROWS, classes, generator=generator)
    for beta in (1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6):
        value, *by_logits = truth_divergence(student, teacher, 1.0, "js", beta)
        for recompute in recompute_modes(device):
            own = [x.to(device).requires_grad_() for x in (student, teacher)]
            rows = softmax_kl_div(*own, divergence="js", beta=beta, reduction="none", recompute=recompute)
            error = (rows.detach().cpu().double() - value).abs() / value
            assert error.max() <= 3e-6, f"{error.max():.1e} of the value at {beta}"
            for gradient, wanted in zip(torch.autograd.grad(rows.sum(), own), by_logits, strict=True):
                error = (gradient.cpu().double() - wanted).norm(dim=1) / wanted.norm(dim=1)
                assert error.median() <= 1e-5, f"{error.median():.1e} of a gradient at {beta}"
