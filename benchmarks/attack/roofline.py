"""Where a step's time goes: every operator of one attack step, its work and the fewest bytes that it must move.

Each operator is timed alone, synchronised, many times, with what it really gets as input. ``benchmarks.figures`` draws
them under the machine's roof: the copy bandwidth and the matrix rate of the same run.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from advfunmatch.attacks.gradient import ScaledBackward
from advfunmatch.attacks.pgd import PGDAttack
from advfunmatch.attacks.target import Target
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CONVOLUTIONS = dict.fromkeys(("convolution", "mkldnn_convolution", "_convolution_pointwise"), "convolution")
GROUPS = {
    **CONVOLUTIONS,
    "convolution_backward": "convolution, input gradient",
    "conv3x3_forward": "3×3 Winograd",
    "conv3x3_input_grad": "3×3 Winograd, input gradient",
    "small_conv_forward": "small images",
    "small_conv_input_grad": "small images, input gradient",
    "addmm": "linear",
    "mm": "linear",
    "softmax_kl_direction": "objective and update",
    "pgd_step": "objective and update",
}
OTHER = "ReLU, pooling, copies"


@dataclass
class Part:
    """One kind of operator at one shape."""

    group: str
    flops: float
    bytes: float
    seconds: list[float] = field(default_factory=list)


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
    if name == "small_conv_forward":
        return 2.0 * out.numel() * args[1][0].numel()
    if name == "small_conv_input_grad":
        return 2.0 * args[0].numel() * args[1][0].numel()
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


def profile_step(student: nn.Module, teacher: nn.Module, x: Tensor, repeats: int = 8) -> list[dict[str, Any]]:
    """The parts of one step of the mismatch attack: for each, its group, FLOPs and bytes of a call, median seconds of a
    call, and calls a step."""
    attack = PGDAttack("mismatch", eps=8 / 255, step_size=2 / 255, steps=1, cuda_graph=False)
    x = x.contiguous(memory_format=torch.channels_last)
    target, timer = Target(student, teacher), StepTimer(x.device)

    def step() -> None:
        forward = target.forward(x, teacher_moves=True)
        attack._step(x, ScaledBackward(forward.leaf, attack.objective)(forward, None), x)

    for _ in range(2):
        step()
    for _ in range(repeats):
        with timer:
            step()
    return [
        {
            "group": part.group,
            "flops": part.flops,
            "bytes": part.bytes,
            "seconds": statistics.median(part.seconds),
            "calls": calls,
        }
        for part in timer.parts.values()
        if (calls := round(len(part.seconds) / repeats))
    ]
