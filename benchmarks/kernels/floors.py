"""``softmax_kl_div`` on CPUs beside the speed it is held to, shape by shape: ``python -m benchmarks.kernels.floors``.

Two threads, public API, forward and both gradients, interleaved with PyTorch eager and ``torch.compile`` of the
log-space form. Columns: the default mode; ``recompute=True``; the share of the default's speed over eager that is kept
where the loss is multiplied afterwards, so that the upstream gradient is not 1 (at least three quarters are asked); and
``softmax_kl_div_grad``, which needs no autograd engine, also as a multiple of an interleaved copy of the same bytes.
What is asked stands in brackets; what is missed is bold. Each upstream gradient is timed in turns of its own, since a
training run has one: what the default mode does for long rows depends on the last ones (Note [Expected gradients] in
afm_kernels/autograd/expected.py).

    python -m benchmarks.kernels.floors                    # three minutes; --only 512x1000 for one shape
    AFM_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 python -m benchmarks.kernels.floors --no-compile
    python -m benchmarks.kernels.floors --fresh-pages

The second line takes another instruction set, for the kernels and for PyTorch. The third leaves the allocator as it
comes: large blocks go back to the system when they are freed, and come with pages to be cleared. That is what a program
that sets nothing runs, but varies more. The errors of the answers are those of
``python -m benchmarks --part accuracy``, whose short form is printed last.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import afm_kernels
from benchmarks import results
from benchmarks.kernels import accuracy
from benchmarks.kernels.case import DTYPES
from benchmarks.kernels.losses import compiled, eager_divergence, logits
from benchmarks.limits import copy_call
from benchmarks.markdown import markdown
from benchmarks.results import Record, records_of
from benchmarks.timing import ALLOCATOR_SETTINGS, OtherLoad, Samples, interleave, ratio, settle_allocator

FRESH_PAGES = "--fresh-pages"
KEPT = 0.75
"""The share of the default's speed over eager that is asked where the upstream gradient is not 1."""
COPIES = 2.0
"""The most that ``softmax_kl_div_grad`` may take, in copies of its bytes, where main memory binds."""


class Floor(NamedTuple):
    """A shape and the ratios that are asked of it, as (× eager, × compile)."""

    rows: int
    classes: int
    dtype: str
    default: tuple[float, float]
    recompute: tuple[float, float]
    grad: float

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.classes}/{self.dtype}"


FLOORS = (
    Floor(128, 10, "float32", (1.8, 2.5), (1.5, 2.2), 8),
    Floor(256, 100, "float32", (2.3, 3.0), (1.8, 2.4), 8),
    Floor(512, 1000, "float32", (7.0, 3.8), (4.0, 2.4), 8),
    Floor(96, 21841, "float32", (6.0, 3.2), (4.0, 2.2), 8),
    Floor(256, 32000, "float32", (6.0, 3.3), (4.0, 2.2), 6),
    Floor(64, 128256, "float32", (6.5, 3.7), (4.0, 2.2), 6),
    Floor(256, 32000, "bfloat16", (4.5, 5.0), (3.5, 4.0), 6),
)


def differentiate(
    loss: Tensor, wrt: tuple[Tensor, Tensor], upstream: Tensor | None = None
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, wrt, upstream)


def measure(floor: Floor, seconds: float, with_compile: bool) -> list[Record]:
    """Everything about one shape, timed in turns."""
    torch._dynamo.reset()
    dtype = DTYPES[floor.dtype]
    student, teacher = logits((floor.rows, floor.classes), dtype, "cpu")
    # The same memory for all: a tensor that one candidate alone reads would have left the caches in between.
    wrt = (student.detach().requires_grad_(), teacher.detach().requires_grad_())
    eager = partial(eager_divergence, divergence="kl", dim=-1)
    three = torch.tensor(3.0)
    candidates = {
        "eager": lambda: differentiate(eager(*wrt) / floor.rows, wrt),
        "default": lambda: differentiate(afm_kernels.softmax_kl_div(*wrt), wrt),
        "recompute": lambda: differentiate(afm_kernels.softmax_kl_div(*wrt, recompute=True), wrt),
        "grad": lambda: afm_kernels.softmax_kl_div_grad(student, teacher),
        "copy": copy_call(4 * student.numel() * dtype.itemsize),
    }
    multiplied = {
        "eager": lambda: differentiate(eager(*wrt) / floor.rows, wrt, three),
        "upstream": lambda: differentiate(afm_kernels.softmax_kl_div(*wrt), wrt, three),
        "upstream recompute": lambda: differentiate(
            afm_kernels.softmax_kl_div(*wrt, recompute=True), wrt, three
        ),
    }
    if with_compile:
        fast = compiled(eager)
        candidates["compile"] = lambda: differentiate(fast(*wrt) / floor.rows, wrt)
        multiplied["compile"] = lambda: differentiate(fast(*wrt) / floor.rows, wrt, three)
    name, peers = f"floors/{floor.name}", ("eager", "compile")
    busy, times = quietest(candidates, seconds)
    records = records_of(name, times, peers=peers)
    busy_multiplied, times_multiplied = quietest(multiplied, seconds / 2)
    records |= records_of(name, times_multiplied, peers=peers, skip=peers)
    for record in records.values():
        record.details = {"other_load": max(busy, busy_multiplied)}
    records["grad"].details["copies"] = ratio(times, "grad", "copy").median
    records["upstream"].details["kept"] = (
        ratio(times_multiplied, "eager", "upstream").median / ratio(times, "eager", "default").median
    )
    return list(records.values())


def quietest(candidates: dict[str, Callable[[], object]], seconds: float) -> tuple[float, dict[str, Samples]]:
    """The load by other programs and the times, of the quietest of up to three attempts."""
    attempts = []
    for attempt in range(3):
        with OtherLoad() as load:
            times = interleave(candidates, budget=seconds, seed=attempt)
        attempts.append((load.fraction or 0.0, times))
        if attempts[-1][0] < 0.1:
            break
    return min(attempts, key=lambda busy_and_times: busy_and_times[0])


def rows(by_name: dict[str, Record]) -> Iterator[list[str]]:
    """The lines of the table, for the shapes that were measured."""
    for floor in FLOORS:
        ours = {
            v: by_name.get(f"floors/{floor.name}/{v}") for v in ("default", "recompute", "upstream", "grad")
        }
        if None in ours.values():
            continue

        def cell(variant: str, eager: float, compile_: float | None, ours: dict = ours) -> str:
            speedup = ours[variant].speedup
            text = [_beside(speedup["eager"]["median"], eager)]
            if compile_ is not None and "compile" in speedup:
                text.append(_beside(speedup["compile"]["median"], compile_))
            return " / ".join(text)

        copies = ours["grad"].details["copies"]
        yield [
            f"{floor.rows} × {floor.classes}" + ("" if floor.dtype == "float32" else f" {floor.dtype}"),
            cell("default", *floor.default),
            cell("recompute", *floor.recompute),
            _beside(ours["upstream"].details["kept"], KEPT),
            cell("grad", floor.grad, None),
            _beside(copies, COPIES, most=True) if floor.rows * floor.classes > 2**22 else f"{copies:.1f}",
        ]


def _beside(value: float, asked: float, most: bool = False) -> str:
    """The value, bold where it is not what is asked, and what is asked."""
    digits = 1 if asked >= 1 else 2
    text = f"{value:.{digits}f}"
    misses = float(text) > asked if most else float(text) < asked
    return f"{f'**{text}**' if misses else text} ({'≤ ' if most else ''}{asked:g})"


HEAD = (
    "rows × classes",
    "× eager / × compile (asked)",
    "recompute=True",
    "kept with upstream ≠ 1",
    "_grad × eager",
    "_grad in copies",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.floors", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--only", metavar="REGEX", default="", help="only shapes whose ROWSxCLASSES/DTYPE matches"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of each interleaved measurement (default 4)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default 2)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument(FRESH_PAGES, action="store_true", help="with the allocator as it comes")
    parser.add_argument("--out", type=Path, help="a results file to write, keeping other shapes' records")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    ours, eager = afm_kernels.backend_info()["cpu_capability"], torch.backends.cpu.get_cpu_capability()
    pages = "fresh" if args.fresh_pages else "kept"
    print(f"kernels: {ours}; PyTorch: {eager}; {args.threads} threads; pages {pages}", flush=True)
    records = []
    for floor in FLOORS:
        if re.search(args.only, floor.name):
            print(f"{floor.name} ...", flush=True)
            records += measure(floor, args.seconds, args.compile)
    if not records:
        parser.error(f"--only {args.only!r} matches none of {', '.join(floor.name for floor in FLOORS)}")
    print("\n" + markdown(HEAD, list(rows({record.name: record for record in records}))))
    worst = max(record.details["other_load"] for record in records)
    print(f"\nother programs used up to {worst:.0%} of the processors")
    if args.out is not None:
        run = results.new_run({}, records, cpu_capability=ours, seconds=args.seconds)
        results.save(args.out, "floors", run, append=True)
    print("\nmedian relative error of a row's KL over 1000 classes, against float64 (eager's)")
    for setting in (
        accuracy.Setting(1000, delta, offset) for delta in accuracy.DELTAS for offset in accuracy.OFFSETS
    ):
        own, theirs = (accuracy.errors(setting, variant) for variant in ("ours", "eager"))
        print(
            f"KL {own['kl']:.0e}, offset {setting.offset:4g}: {own['row_median']:.0e} ({theirs['row_median']:.0e})"
        )
    return 0


if __name__ == "__main__":
    if FRESH_PAGES not in sys.argv:
        settle_allocator()
    elif any(name in os.environ for name in ALLOCATOR_SETTINGS):
        sys.exit(f"{FRESH_PAGES} is at odds with the environment: unset {', '.join(ALLOCATOR_SETTINGS)}")
    raise SystemExit(main())
