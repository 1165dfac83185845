"""Where a step's time goes: every operator of one attack step against the two lines it cannot cross.

Each operator is timed alone, synchronised, many times, with what it really gets as input. A point's place on the
horizontal axis is its arithmetic intensity (operations over the fewest bytes it must move); the roof is the machine's
copy bandwidth to the left and its matrix rate to the right, both measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from advfunmatch.attack import PGDAttack
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CONVOLUTIONS = dict.fromkeys(("convolution", "mkldnn_convolution", "_convolution_pointwise"), "convolution")
GROUPS = {
    **CONVOLUTIONS,
    "convolution_backward": "convolution's input gradient",
    "conv3x3_forward": "3×3 convolution (Winograd)",
    "conv3x3_input_grad": "its input gradient (Winograd)",
    "addmm": "linear",
    "mm": "linear",
    "softmax_kl_grad": "objective",
    "pgd_step": "step",
    "scale_shift_relu_forward": "scale_shift_relu",
    "scale_shift_relu_backward": "scale_shift_relu",
}
OTHER = "other elementwise, pooling"


@dataclass
class Part:
    """One kind of operator at one shape."""

    group: str
    flops: float
    bytes: float
    seconds: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return statistics.median(self.seconds) * self.calls_a_step

    calls_a_step: int = 0


class FlopCounter(TorchDispatchMode):
    """Adds up what PyTorch's own formulas say of every operator below it; elementwise work counts nothing.

    PyTorch's FlopCounterMode also tracks modules, which ``torch.autograd.grad`` of one leaf does not allow.
    """

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class StepTimer(TorchDispatchMode):
    """Times every operator that runs below it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.parts: dict[Any, Part] = {}
        self.steps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        self._synchronise()
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self._synchronise()
        seconds = time.perf_counter() - start
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
        key = (name, tuple(tuple(t.shape) for t in tensors), str(args[3:7]) if "conv" in name else "")
        if key not in self.parts:
            self.parts[key] = Part(GROUPS.get(name, OTHER), _flops(name, args, out), _bytes(name, args, out))
        self.parts[key].seconds.append(seconds)
        return out

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _flops(name: str, args: Any, out: Any) -> float:
    if name in ("conv3x3_forward", "conv3x3_input_grad"):
        # What Winograd's products do: 36 for each tile of 4x4 pixels and pair of channels.
        n, channels, height, width = out.shape
        tiles = n * -(-height // 4) * -(-width // 4)
        return 2.0 * 36 * tiles * channels * args[0].shape[1]
    if name in CONVOLUTIONS:
        # A fused residual is an image too: the weight is the one whose batch is the output's channels.
        images = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.dim() == 4]
        weight = next(t for t in images[1:] if t.shape[0] == out.shape[1] and t.shape != out.shape)
        return 2.0 * out.numel() * weight[0].numel()
    if name == "convolution_backward":
        return 2.0 * args[0].numel() * args[2][0].numel()
    if name in ("addmm", "mm"):
        left = args[-2]
        return 2.0 * out.numel() * left.shape[1]
    return float(sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)))


def _bytes(name: str, args: Any, out: Any) -> float:
    if name == "convolution_backward":
        # The input takes part by its shape alone where only its gradient is asked for.
        tensors = [args[0], args[2], out[0]]
    else:
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
    return float(sum(t.numel() * t.element_size() for t in tensors)) or 1.0


def profile_step(student: nn.Module, teacher: nn.Module, x: Tensor, repeats: int = 8) -> list[Part]:
    """The parts of one step of the mismatch attack."""
    attack = PGDAttack("mismatch", eps=8 / 255, step_size=2 / 255, steps=1, cuda_graph=False)
    x = x.contiguous(memory_format=torch.channels_last)
    timer = StepTimer(x.device)

    def step() -> None:
        attack._step(x, attack._input_gradient(student, teacher, x, None, None), x)

    for _ in range(2):
        step()
    for _ in range(repeats):
        with timer:
            step()
    for part in timer.parts.values():
        part.calls_a_step = round(len(part.seconds) / repeats)
    return [part for part in timer.parts.values() if part.calls_a_step]


def plot_step(
    student: nn.Module, teacher: nn.Module, x: Tensor, rates: Any, path: Path, title: str
) -> dict[str, float]:
    """Draw the roofline and the bar of shares; returns each group's share of the step's time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = profile_step(student, teacher, x)
    dtype = "bfloat16" if getattr(student, "dtype", None) == torch.bfloat16 else "float32"
    matmul = rates[f"matmul_{dtype}_per_second"]["median"]
    copy = max(row["bytes_per_second"]["median"] for row in rates["copy"])
    shares: dict[str, float] = defaultdict(float)
    for part in parts:
        shares[part.group] += part.total
    whole = sum(shares.values())
    shares = {group: seconds / whole for group, seconds in sorted(shares.items(), key=lambda item: -item[1])}
    colours = dict(zip(shares, plt.get_cmap("tab10").colors, strict=False))

    figure, (roof, bar) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=(3, 1.3), layout="constrained")
    intensity = [part.flops / part.bytes for part in parts]
    low, high = min(intensity) / 2, max(*intensity, matmul / copy) * 4
    ridge = matmul / copy
    roof.plot([low, ridge, high], [low * copy, matmul, matmul], color="black", linewidth=1.2)
    roof.annotate(
        f"{dtype} matrix rate, {matmul / 1e9:.0f} Gflop/s",
        (high, matmul),
        ha="right",
        va="bottom",
        fontsize=8,
    )
    roof.annotate(
        f"copy, {copy / 1e9:.0f} GB/s",
        (low * 1.5, low * 1.5 * copy),
        ha="left",
        va="bottom",
        fontsize=8,
        rotation=35,
    )
    for group in shares:
        mine = [part for part in parts if part.group == group]
        roof.scatter(
            [part.flops / part.bytes for part in mine],
            [part.flops / statistics.median(part.seconds) for part in mine],
            s=[20 + 2500 * part.total / whole for part in mine],
            color=colours[group],
            alpha=0.55,
            edgecolor="none",
            label=f"{group}, {shares[group]:.1%}",
        )
    roof.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte moved at least",
        ylabel="operations per second",
    )
    roof.legend(fontsize=8, loc="lower right", title="share of the step (area of a circle)", title_fontsize=8)
    roof.set_title(title, fontsize=9)
    names = list(shares)[::-1]
    bar.barh(names, [shares[n] * 100 for n in names], color=[colours[n] for n in names])
    bar.set(xlabel="% of the step's time")
    bar.tick_params(axis="y", labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return shares
