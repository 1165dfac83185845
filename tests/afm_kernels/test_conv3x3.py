"""3x3 convolution on every backend, against PyTorch's in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afm_kernels import ops

STEM = "conv3x3"
SEED = 31
# Relative to the largest value. In float32 the definition's own error is up to 3e-6 at 512 channels, Winograd's 5e-6.
ROUNDING = 1e-5

# (N, in, out, height, width): whole tiles of 4x4 and cut ones, one panel of channels and an odd number of them, few
# tiles and many, one slice of input channels and several with a short last one.
SHAPES = (
    (2, 16, 16, 8, 8),
    (3, 32, 48, 5, 7),
    (1, 16, 96, 1, 1),
    (5, 80, 32, 4, 4),
    (1, 144, 16, 13, 3),
    (40, 16, 16, 9, 8),
    (2, 512, 512, 4, 4),
    (9, 64, 64, 16, 16),
)


def dense_along(weight: Tensor, dim: int) -> Tensor:
    """The weight in memory as (3, 3, the other channels, the channels of ``dim``)."""
    order = (2, 3, 1 - dim, dim)
    back = sorted(range(4), key=order.__getitem__)
    return weight.permute(order).contiguous().permute(back)


def case(shape: tuple[int, ...]) -> dict[str, Tensor]:
    n, channels, out_channels, height, width = shape
    generator = torch.Generator().manual_seed(SEED)

    def image(channels: int) -> Tensor:
        x = torch.randn(n, channels, height, width, generator=generator)
        return x.contiguous(memory_format=torch.channels_last)

    weight = torch.randn(out_channels, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
    return {
        "x": image(channels),
        "weight": weight,
        "bias": torch.randn(out_channels, generator=generator),
        "residual": image(out_channels),
        "grad_output": image(out_channels),
        "added": image(channels),
    }


def run(op: str, device: torch.device, *args: object) -> Tensor:
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    result: Tensor = ops.kernel(op, device.type)(*moved)
    return result


def assert_near(actual: Tensor, truth: Tensor) -> None:
    assert actual.shape == truth.shape
    assert actual.dtype == torch.float32
    assert actual.is_contiguous(memory_format=torch.channels_last)
    error = float((actual.cpu().double() - truth).abs().max() / truth.abs().max())
    assert error <= ROUNDING, f"off by {error:.2g} of the largest value"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(device: torch.device, shape: tuple[int, ...]) -> None:
    t = case(shape)
    weight = dense_along(t["weight"], 0)
    plain = F.conv2d(t["x"].double(), t["weight"].double(), padding=1)
    with_bias = plain + t["bias"].double().view(-1, 1, 1)
    whole = (with_bias + t["residual"].double()).relu()
    assert_near(run("conv3x3_forward", device, t["x"], weight, None, None, False), plain)
    assert_near(run("conv3x3_forward", device, t["x"], weight, t["bias"], None, True), with_bias.relu())
    assert_near(run("conv3x3_forward", device, t["x"], weight, t["bias"], t["residual"], True), whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth_of_the_gradient(device: torch.device, shape: tuple[int, ...]) -> None:
    t = case(shape)
    x, weight = t["x"].double().requires_grad_(), t["weight"].double()
    out = F.conv2d(x, weight, padding=1)
    dense = dense_along(t["weight"], 1)
    (plain,) = torch.autograd.grad(out, x, t["grad_output"].double(), retain_graph=True)
    assert_near(run("conv3x3_input_grad", device, t["grad_output"], None, dense, None, None), plain)
    (gated,) = torch.autograd.grad(out.relu(), x, t["grad_output"].double())
    output = out.detach().relu().float().contiguous(memory_format=torch.channels_last)
    assert_near(run("conv3x3_input_grad", device, t["grad_output"], output, dense, None, None), gated)
    # Another gradient by x, and the gate of the ReLU that made x.
    added, image = t["added"].double(), t["x"]
    both = torch.where(image <= 0, 0, gated + added)
    assert_near(run("conv3x3_input_grad", device, t["grad_output"], output, dense, t["added"], image), both)


def test_truth_of_a_nan(device: torch.device) -> None:
    """It reaches every pixel that the definition says, survives ReLU and stays in its image."""
    t = case((3, 16, 16, 12, 12))
    t["x"][1, 5, 0, 11] = torch.nan
    out = run("conv3x3_forward", device, t["x"], dense_along(t["weight"], 0), None, None, True).isnan().cpu()
    assert out[1, :, :2, 10:].all()
    assert not out[[0, 2]].any()
    assert not out[1, :, 8:].any()


@pytest.mark.skipif("cpp" not in ops.TABLE["conv3x3_forward", "cpu"], reason="the CPU module is not built")
class TestCompiled:
    """What is said of the compiled kernel alone."""

    forward: Callable[..., Tensor] = staticmethod(torch.ops.afm_kernels.conv3x3_forward)
    input_grad: Callable[..., Tensor] = staticmethod(torch.ops.afm_kernels.conv3x3_input_grad)

    @pytest.mark.parametrize("shape", [(2, 512, 512, 4, 4), (7, 32, 64, 15, 16)], ids=str)
    def test_the_number_of_threads_changes_nothing(self, shape: tuple[int, ...]) -> None:
        t = case(shape)
        args = (t["x"], dense_along(t["weight"], 0), t["bias"], t["residual"], True)
        threads = torch.get_num_threads()
        try:
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(self.forward(*args))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    def test_opcheck(self) -> None:
        t = case((2, 16, 32, 5, 4))
        for bias, residual, relu in ((None, None, False), (t["bias"], t["residual"], True)):
            torch.library.opcheck(self.forward, (t["x"], dense_along(t["weight"], 0), bias, residual, relu))
        for output, added, image in ((None, None, None), (t["residual"], t["added"], t["x"])):
            weight = dense_along(t["weight"], 1)
            torch.library.opcheck(self.input_grad, (t["grad_output"], output, weight, added, image))

    def test_empty_batch(self) -> None:
        t = case((1, 16, 32, 5, 4))
        out = self.forward(t["x"][:0], dense_along(t["weight"], 0), t["bias"], None, True)
        assert out.shape == (0, 32, 5, 4)

    def test_refusals_are_one_sentence(self) -> None:
        t = case((2, 16, 32, 5, 4))
        x, weight = t["x"], dense_along(t["weight"], 0)
        for args, sentence in (
            ((x.double(), weight, None, None, False), "x must be a float32 image"),
            ((x.contiguous(), weight, None, None, False), "x must be dense in channels-last order"),
            ((x[:, :8], weight, None, None, False), "x has 8 channels; allowed: multiples of 16"),
            ((x, weight.contiguous(), None, None, False), "weight must be dense along dimension 0"),
            ((x, weight[:, :1], None, None, False), "weight must be float32 and of shape"),
            ((x, weight, t["bias"][:3], None, False), "bias must be float32 and contiguous"),
            ((x, weight, None, x, False), r"residual must have the shape \(2, 32, 5, 4\)"),
        ):
            with pytest.raises(RuntimeError, match=sentence):
                self.forward(*args)
