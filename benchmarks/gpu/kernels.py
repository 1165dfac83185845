"""softmax_kl on a GPU against eager PyTorch, torch.compile and Liger-Kernel, and against a copy of the least bytes.

Modes: "both", the loss and its gradients by both sides through autograd; "gradient", the gradients alone, as an attack
asks for them; "graph", the latter 100 times in one captured CUDA graph. Tiny shapes are timed by the wall clock too,
since that is what they cost where there is no graph. ``least`` counts 4Ne bytes where a row fits on chip (2 reads and
2 writes of N elements of e bytes) and 6Ne where it is streamed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results

TEMPERATURE = 4.0
GRAPH_CALLS = 100
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A batch of logits."""

    rows: int
    classes: int
    dtype: str
    streamed: bool = False  # longer than a row on chip, see csrc/cuda/softmax_kl_plan.h

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.classes}/{self.dtype}"

    @property
    def tiny(self) -> bool:
        return self.rows * self.classes < 1 << 16

    @property
    def least(self) -> int:
        element = 2 if self.dtype == "bfloat16" else 4
        return (6 if self.streamed else 4) * self.rows * self.classes * element


SHAPES = (
    Shape(128, 10, "float32"),
    Shape(256, 100, "float32"),
    Shape(1024, 1000, "float32"),
    Shape(32768, 1000, "float32"),
    Shape(4096, 21843, "float32", streamed=True),
    Shape(8192, 32000, "bfloat16", streamed=True),
    Shape(8192, 128256, "bfloat16", streamed=True),
)


def eager(student: Any, teacher: Any) -> Any:
    """The sum of KL(teacher || student) over the rows, as PyTorch has it."""
    from torch.nn import functional as F

    return F.kl_div(
        F.log_softmax(student / TEMPERATURE, -1),
        F.log_softmax(teacher / TEMPERATURE, -1),
        reduction="sum",
        log_target=True,
    )


def liger() -> Callable[[Any, Any], Any] | None:
    """Liger's KL, which takes log-probabilities and has no teacher gradient; None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerKLDIVLoss  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    from torch.nn import functional as F

    loss = LigerKLDIVLoss(reduction="sum", log_target=True)
    return lambda s, t: loss(F.log_softmax(s / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1))


def losses() -> dict[str, Callable[[Any, Any], Any]]:
    """Name -> loss of student and teacher logits."""
    import torch

    import afm_kernels
    from afm_kernels import ops

    def ours(backend: str) -> Callable[[Any, Any], Any]:
        def loss(student: Any, teacher: Any) -> Any:
            with afm_kernels.use_backend(backend):
                return afm_kernels.softmax_kl_div(student, teacher, temperature=TEMPERATURE, reduction="sum")

        return loss

    found: dict[str, Callable[[Any, Any], Any]] = {
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    if (theirs := liger()) is not None:
        found["liger"] = theirs
    for backend in ("cuda", "triton"):
        if backend in ops.TABLE["softmax_kl_grad", "cuda"]:
            found[backend] = ours(backend)
    return found


def gradient_calls(student: Any, teacher: Any) -> dict[str, Call]:
    """Name -> a call that returns both gradients and nothing else."""
    import torch

    import afm_kernels
    from afm_kernels import ops

    calls: dict[str, Call] = {
        "eager": lambda: torch.autograd.grad(eager(student, teacher), (student, teacher)),
    }
    plain = student.detach(), teacher.detach()

    def ours(backend: str) -> Call:
        def call() -> object:
            with afm_kernels.use_backend(backend):
                return afm_kernels.softmax_kl_div_grad(*plain, temperature=TEMPERATURE)

        return call

    for backend in ("cuda", "triton"):
        if backend in ops.TABLE["softmax_kl_grad", "cuda"]:
            calls[backend] = ours(backend)
    return calls


def captured(call: Call) -> Call:
    """The call GRAPH_CALLS times as one graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def relative_error(actual: Any, truth: Any) -> float | None:
    """The L2 norm of the error over that of the truth."""
    actual, truth = actual.double(), truth.double()
    return results.finite(float((actual - truth).norm() / truth.norm()))


def errors(call: Callable[[Any, Any], Any], student: Any, teacher: Any) -> dict[str, float | None]:
    """Errors of loss and gradients of the first rows against float64."""
    import torch

    rows = min(student.shape[0], 64)
    parts = [each.detach()[:rows].clone().requires_grad_() for each in (student, teacher)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    loss, truth = call(*parts), eager(*exact)
    found = {"loss": relative_error(loss.detach(), truth.detach())}
    wanted = torch.autograd.grad(truth, exact)
    given = torch.autograd.grad(loss, parts, allow_unused=True)
    for side, gradient, right in zip(("student", "teacher"), given, wanted, strict=True):
        if gradient is not None:
            found[side] = relative_error(gradient, right)
    return found


def measure(shape: Shape, seconds: float) -> list[results.Record]:
    """Every mode of one shape."""
    import torch

    from benchmarks.limits import copy_call
    from benchmarks.timing import interleave, peak_memory

    generator = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def logits() -> Any:
        return (3 * torch.randn(shape.rows, shape.classes, device="cuda", generator=generator)).to(dtype)

    student, teacher = logits().requires_grad_(), logits().requires_grad_()
    known = losses()

    def differentiated(loss: Callable[[Any, Any], Any]) -> Call:
        return lambda: torch.autograd.grad(loss(student, teacher), (student, teacher), allow_unused=True)

    both = {name: differentiated(loss) for name, loss in known.items()}
    modes = {"both": both, "gradient": gradient_calls(student, teacher)}
    if shape.tiny:
        modes["graph"] = {name: captured(call) for name, call in modes["gradient"].items()}
    peers = ("eager", "compile", "liger")
    records: list[results.Record] = []
    for mode, calls in modes.items():
        timed = {**calls, "copy": copy_call(shape.least, "cuda")}
        clocks = ["events", "wall"] if shape.tiny and mode != "graph" else ["events"]
        for clock in clocks:
            times = interleave(timed, budget=seconds, device="cuda", clock=clock)
            label = mode if clock == "events" else f"{mode}_wall"
            made = results.records_of(f"softmax_kl/{label}/{shape.name}", times, peers=peers)
            for name, record in made.items():
                record.bytes = shape.least
                record.limits = {"copy": times["copy"].median}
                record.details = {"calls": GRAPH_CALLS if mode == "graph" else 1}
                if mode != "graph":
                    record.peak_bytes = peak_memory(calls[name], "cuda")
                if mode == "both" and clock == "events":
                    record.error = errors(known[name], student, teacher)
            records += made.values()
    return records


def table(path: Path) -> str:
    """The short table of a results file."""
    lines = [
        "| what | variant | µs a call | of copy bandwidth | × eager | × compile | peak MiB | error of loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in results.records(results.load(path)):
        if record.time is None:
            continue
        each = record.time["median"] / record.details.get("calls", 1)
        share = record.limits["copy"] / each if record.limits else None
        cells = [
            record.group.removeprefix("softmax_kl/"),
            record.variant,
            f"{each * 1e6:.1f}",
            f"{share:.0%}" if share is not None else "",
            *(
                f"{record.speedup[p]['median']:.2f}" if p in record.speedup else ""
                for p in ("eager", "compile")
            ),
            f"{record.peak_bytes / 2**20:.1f}" if record.peak_bytes is not None else "",
            f"{record.error['loss']:.0e}" if record.error.get("loss") is not None else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.kernels", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--budget", type=float, default=110.0, help="seconds; shapes that do not fit are left out"
    )
    parser.add_argument("--out", type=Path, default=results.FOLDER / "gpu-kernels.json")
    parser.add_argument("--only", default="", help="shapes whose name holds this")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.gpu.kernels needs a CUDA device\n")
    from benchmarks import limits

    start = time.perf_counter()
    chosen = [shape for shape in SHAPES if arguments.only in shape.name]
    measured = limits.measure("cuda", budget=4.0)
    records: list[results.Record] = []
    for index, shape in enumerate(chosen):
        left = arguments.budget - (time.perf_counter() - start)
        if index > 0 and left < 8:
            print(f"left out for lack of time: {', '.join(s.name for s in chosen[index:])}")
            break
        # Half of what is left for this shape goes into compilation and warming up.
        records += measure(shape, min(2.0, max(0.3, left / (len(chosen) - index) / 6)))
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        run = results.new_run(measured, records, temperature=TEMPERATURE, device=torch.cuda.get_device_name())
        results.save(arguments.out, "gpu-kernels", run)
        print(f"{shape.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
