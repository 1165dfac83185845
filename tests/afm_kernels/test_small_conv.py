"""Convolution of small images on every backend, against PyTorch's in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_conv3x3 import assert_near, dense_along, run
from torch import Tensor

from afm_kernels import ops

STEM = "small_conv"
SEED = 37

# (N, in, out, height, width, kernel, stride, padding): whole groups of eight images and rests, one vector of channels,
# an odd number of them, and parts of one, gradients of one to four channels, pixels that no tap reads, borders without
# any inside.
SHAPES = (
    (9, 1, 16, 8, 8, (3, 3), 1, 1),
    (8, 16, 32, 8, 8, (3, 3), 2, 1),
    (5, 32, 48, 5, 7, (3, 3), 2, 1),
    (3, 3, 32, 9, 6, (3, 5), 1, 2),
    (2, 2, 16, 4, 4, (2, 2), 3, 0),
    (17, 16, 16, 6, 7, (1, 1), 2, 0),
    (1, 4, 16, 11, 8, (7, 7), 2, 3),
    (11, 64, 16, 2, 2, (2, 2), 1, 0),
    (2, 16, 16, 1, 1, (3, 3), 1, 1),
    (9, 2, 24, 6, 6, (3, 3), 1, 1),
    (10, 24, 48, 6, 6, (3, 3), 2, 1),
    (3, 13, 37, 4, 3, (3, 3), 1, 1),
    (2, 5, 6, 4, 3, (3, 3), 1, 1),
)


def case(shape: tuple[int, ...]) -> dict[str, Tensor]:
    n, channels, out_channels, height, width, kernel, stride, padding = shape
    generator = torch.Generator().manual_seed(SEED)

    def image(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).contiguous(memory_format=torch.channels_last)

    sizes = [(s + 2 * padding - k) // stride + 1 for s, k in zip((height, width), kernel, strict=True)]
    weight = torch.randn(out_channels, channels, *kernel, generator=generator) / channels**0.5
    return {
        "x": image(n, channels, height, width),
        "added": image(n, channels, height, width),
        "weight": weight,
        "bias": torch.randn(out_channels, generator=generator),
        "residual": image(n, out_channels, *sizes),
        "grad_output": image(n, out_channels, *sizes),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(device: torch.device, shape: tuple[int, ...]) -> None:
    t, geometry = case(shape), shape[-2:]
    weight = dense_along(t["weight"], 0)
    plain = F.conv2d(t["x"].double(), t["weight"].double(), None, *geometry)
    whole = (plain + t["bias"].double().view(-1, 1, 1) + t["residual"].double()).relu()
    assert_near(run("small_conv_forward", device, t["x"], weight, None, None, False, *geometry), plain)
    given = t["x"], weight, t["bias"], t["residual"], True
    assert_near(run("small_conv_forward", device, *given, *geometry), whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth_of_the_gradient(device: torch.device, shape: tuple[int, ...]) -> None:
    t, geometry = case(shape), shape[-2:]
    x = t["x"].double().requires_grad_()
    out = F.conv2d(x, t["weight"].double(), None, *geometry)
    (plain,) = torch.autograd.grad(out, x, t["grad_output"].double())
    dense = dense_along(t["weight"], 0 if shape[1] <= 4 else 1)
    sizes = (*t["x"].shape[2:], *geometry)
    assert_near(run("small_conv_input_grad", device, t["grad_output"], dense, None, None, *sizes), plain)
    given = t["grad_output"], dense, t["added"], t["x"]
    gated = torch.where(t["x"] <= 0, 0, plain + t["added"].double())
    assert_near(run("small_conv_input_grad", device, *given, *sizes), gated)


def test_truth_of_a_nan(device: torch.device) -> None:
    """It reaches the pixels that the definition says, survives ReLU and stays in its image."""
    t = case(SHAPES[1])
    t["x"][1, 5, 0, 7] = torch.nan
    weight = dense_along(t["weight"], 0)
    out = run("small_conv_forward", device, t["x"], weight, None, None, True, 2, 1).isnan().cpu()
    assert out[1, :, 0, 3].all()
    assert int(out.sum()) == out.shape[1]


@pytest.mark.skipif("cpp" not in ops.TABLE["small_conv_forward", "cpu"], reason="the CPU module is not built")
class TestCompiled:
    """What is said of the compiled kernel alone."""

    forward: Callable[..., Tensor] = staticmethod(torch.ops.afm_kernels.small_conv_forward)
    input_grad: Callable[..., Tensor] = staticmethod(torch.ops.afm_kernels.small_conv_input_grad)

    def test_the_number_of_threads_changes_nothing(self) -> None:
        t = case((70, 16, 32, 8, 8, (3, 3), 2, 1))
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                weight = dense_along(t["weight"], 0)
                results.append(self.forward(t["x"], weight, t["bias"], None, True, 2, 1))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    def test_opcheck(self) -> None:
        t = case(SHAPES[2])
        given = t["x"], dense_along(t["weight"], 0), t["bias"], t["residual"], True, 2, 1
        torch.library.opcheck(self.forward, given)
        dense = dense_along(t["weight"], 1)
        torch.library.opcheck(self.input_grad, (t["grad_output"], dense, t["added"], t["x"], 5, 7, 2, 1))

    def test_empty_batch(self) -> None:
        t = case(SHAPES[1])
        out = self.forward(t["x"][:0], dense_along(t["weight"], 0), t["bias"], None, True, 2, 1)
        assert out.shape == (0, 32, 4, 4)

    def test_refusals_are_one_sentence(self) -> None:
        t = case(SHAPES[1])
        x, grad, forward, backward = t["x"], t["grad_output"], *(dense_along(t["weight"], d) for d in (0, 1))
        none, tiny = (None, None), case((1, 16, 16, 2, 2, (1, 1), 1, 0))["x"]
        for call, args, sentence in (
            (self.forward, (x.double(), forward, *none, False, 2, 1), "x must be a float32 image"),
            (self.forward, (x.contiguous(), forward, *none, False, 2, 1), "x must be dense in channels-last"),
            (
                self.forward,
                (x, backward, *none, False, 2, 1),
                "weight must be dense along its output channels",
            ),
            (self.forward, (x, forward[:, :8], *none, False, 2, 1), "weight is for 8 channels, and x has 16"),
            (self.forward, (x, forward, *none, False, 0, 1), "stride must be at least 1"),
            (
                self.forward,
                (x, forward, None, x, False, 2, 1),
                r"residual must have the shape \(8, 32, 4, 4\)",
            ),
            (self.forward, (tiny, forward, *none, False, 2, 0), "x is smaller than the weight"),
            (self.input_grad, (grad, backward, *none, 9, 8, 2, 1), "does not belong to an input of 9 x 8"),
            (self.input_grad, (grad, backward, grad, None, 8, 8, 2, 1), "added must have the shape"),
        ):
            with pytest.raises(RuntimeError, match=sentence):
                call(*args)
