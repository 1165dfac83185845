"""A kernel benchmark: what is compared, on what, what bounds it, and how wrong each answer is.

A case is one op in one mode on one shape and dtype. ``build`` makes its tensors and its candidates: callables without
arguments that return the tensors named by ``outputs``. ``measure`` times them in turns together with a copy of the
fewest bytes the op can move, and compares what they return with float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.limits import copy_call
from benchmarks.results import Record, finite, records_of
from benchmarks.timing import QUIET, OtherLoad, Samples, interleave, peak_memory

PEERS = ("eager", "eager float32", "compile", "formula", "compiled formula", "published", "liger")
"""What the project is compared with; each case has those that exist for it. The first is the baseline of tables.

eager: what people write, in the dtype of the inputs; "eager float32": the same after upcasting, as autocast does;
compile: torch.compile of eager, static shapes; formula: the gradients written out by hand, without autograd;
published: a paper's own code, where it differs from eager; liger: Liger-Kernel, which has no CPU path.
"""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Call = Callable[[], Any]


@dataclass
class Built:
    """A case with its tensors made."""

    candidates: dict[str, Call]
    outputs: tuple[str, ...]
    truth: tuple[Tensor, ...]
    bytes: int
    exps: int = 0
    products: int = 0
    """Multiply-adds, where they are what the limit "matmul" counts."""
    autograd: bool = False
    """Whether the project's candidates go through the autograd engine, whose cost is then a limit."""


@dataclass(frozen=True)
class Case:
    """One op, mode, shape and dtype."""

    op: str
    mode: str
    shape: str
    dtype: str
    family: str
    build: Callable[[str], Built] = field(repr=False, compare=False)
    standard: bool = True
    """Whether `make bench` has time for it; ``--full`` runs all."""
    elements: int = 0
    """Of one tensor: what making them and checking the answers in float64 takes."""
    compiles: int = 1
    """How many of its peers torch.compile makes."""

    @property
    def name(self) -> str:
        return f"{self.op}/{self.mode}/{self.shape}/{self.dtype}"

    @property
    def cost(self) -> float:
        """Seconds beside the timed rounds, roughly, on two cores."""
        return 0.2 + 4.0 * self.compiles + 6e-7 * self.elements


def measure(case: Case, device: str, limits: Any, *, budget: float, attempts: int = 1) -> list[Record]:
    """Time a case's candidates in turns and compare their answers with float64.

    Where other programs were busy meanwhile, it is timed again, up to ``attempts`` times; the quietest counts.
    """
    torch._dynamo.reset()  # one case's compiled code must not count towards the next one's recompile limit
    built = case.build(device)
    if not case.compiles:
        built.candidates = {name: call for name, call in built.candidates.items() if "compile" not in name}
    errors = {name: errors_of(call(), built) for name, call in built.candidates.items()}
    copy = copy_call(built.bytes, device)
    load, times = _undisturbed({**built.candidates, "copy": copy}, budget, device, attempts)
    records = records_of(case.name, times, peers=PEERS)
    bounds = _bounds(built, limits, times["copy"].median)
    for variant, record in records.items():
        record.error = errors[variant]
        record.bytes = built.bytes
        record.limits = bounds
        record.details = {"family": case.family, "other_load": load}
        record.peak_bytes = peak_memory(built.candidates[variant], device)
    return list(records.values())


def _undisturbed(
    candidates: dict[str, Call], budget: float, device: str, attempts: int
) -> tuple[float | None, dict[str, Samples]]:
    """The load by other programs and the times of the quietest attempt; the first quiet one is enough."""
    tried = []
    for attempt in range(attempts):
        with OtherLoad() as load:
            times = interleave(candidates, budget=budget, device=device, seed=attempt)
        tried.append((load.fraction, times))
        if load.fraction is None or load.fraction < QUIET:
            break
    return min(tried, key=lambda pair: pair[0] or 0.0)


def _bounds(built: Built, limits: Any, copy_seconds: float) -> dict[str, float]:
    bounds = {"copy": copy_seconds}
    if built.exps:
        bounds["exp"] = built.exps / limits["exp_per_second"]["median"]
    if built.products:
        bounds["matmul"] = 2 * built.products / limits["matmul_float32_per_second"]["median"]
    bounds["call"] = limits["call_seconds"]["autograd" if built.autograd else "op"]
    return bounds


def errors_of(outputs: Any, built: Built) -> dict[str, float | None]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    if len(outputs) != len(built.outputs):
        raise ValueError(f"a candidate returned {len(outputs)} tensors for {built.outputs}")
    named = zip(built.outputs, outputs, built.truth, strict=True)
    return {name: finite(relative_error(got, true)) for name, got, true in named}


def relative_error(got: Tensor, true: Tensor) -> float:
    """‖got − true‖₂ / ‖true‖₂ in float64; infinite where only the truth vanishes."""
    difference = torch.linalg.vector_norm(got.detach().double() - true)
    size = torch.linalg.vector_norm(true).item()
    if size == 0:
        return 0.0 if difference.item() == 0 else math.inf
    return difference.item() / size


WRONG = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Above this relative error an answer of ours is wrong, not rounded: what the smoke run fails on.

Generous on purpose: the tests hold each op to its own tolerance, this catches a wrong formula at full size.
"""


def wrong_answers(records: Sequence[Record]) -> Iterator[str]:
    """A sentence for every record of ours whose error is beyond ``WRONG``."""
    for record in records:
        if record.peer:
            continue
        dtype = record.group.rpartition("/")[2]
        for output, error in record.error.items():
            if error is None or error > WRONG[dtype]:
                yield f"{record.name}: {output} is off by {error}, allowed {WRONG[dtype]}"
