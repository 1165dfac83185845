"""linear_kl_div as a part of the suite: time in turns, memory in processes of their own, and the frontier of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.case import relative_error, wrong_answers
from benchmarks.linear import memory
from benchmarks.linear.heads import Heads, Shape, losses, truth, with_gradients
from benchmarks.options import Options
from benchmarks.results import Record, finite, records_of
from benchmarks.timing import OtherLoad, interleave

__all__ = ["HEAD", "cases", "lines", "measure", "wrong_answers"]

PEERS = ("eager", "compile", "checkpoint", "torch", "liger")
CHUNKED = ("checkpoint", "torch", "liger", "compile")
"""The peers that the best is taken of, beside eager."""
HEAD = (
    f"{'hidden states to gradients':<42} {'variant':<15} {'seconds':>8} {'x eager':>8} {'of floor':>9} "
    f"{'peak MiB':>9} {'error':>9}"
)


@dataclass(frozen=True)
class HeadCase:
    """One shape: the peers and ours as it comes ("peers"), or ours with chunks of every size ("frontier")."""

    shape: Shape
    kind: str
    cost: float
    compiles: bool = True

    @property
    def name(self) -> str:
        return f"linear_kl/{self.kind}/{self.shape.label}/float32"

    @property
    def variants(self) -> list[str]:
        names = list(losses(self.compiles))
        if self.kind == "frontier":
            return ["eager", *(name for name in names if name.startswith("ours"))]
        return [name for name in names if name in PEERS or name in ("ours", "ours recompute")]


SMALL = Shape(64, 16, 24, 1000)
MIDDLE = Shape(1024, 256, 384, 16000)
SHAPES = (Shape(2048, 512, 768, 32000), Shape(1024, 1024, 1024, 128256))


def cases(options: Options) -> list[HeadCase]:
    """A shape of a second in ten minutes, without what takes a minute to compile; --full has the large ones."""
    every = [
        HeadCase(shape, kind, 90.0 if shape.classes < 1e5 else 300.0, options.compile)
        for kind in ("peers", "frontier")
        for shape in SHAPES
    ]
    chosen = options.named(every)
    if chosen is not None:
        return chosen
    if options.smoke:
        return [HeadCase(SMALL, "peers", 5.0, compiles=False)]
    return every if options.full else [HeadCase(MIDDLE, "peers", 15.0, compiles=False)]


def measure(each: HeadCase, seconds: float, options: Options, limits: Any) -> list[Record]:
    if options.device != "cpu":
        raise ValueError(f"the part linear measures CPUs; --device is {options.device}")
    heads = Heads.draw(each.shape)
    made = losses(each.compiles)
    calls = {name: partial(with_gradients, partial(made[name], heads), heads) for name in each.variants}
    exact = truth(each.shape)
    error = {}
    for name, call in calls.items():
        got = call()  # the warm-up, compilation included
        named = zip(("loss", "hidden", "weight"), got, exact, strict=True)
        error[name] = {output: finite(relative_error(g, t)) for output, g, t in named}
        del got
    del exact
    with OtherLoad() as load:
        times = interleave(calls, budget=seconds, min_rounds=2 if options.smoke else 3, warmup=0)
    del calls, heads
    found = records_of(each.name, times, peers=PEERS)
    for name, record in found.items():
        record.error = error[name]
        flops = 2 * each.shape.products
        record.limits = {"matmul": flops / limits["matmul_float32_per_second"]["median"]}
        record.details["other_load"] = load.fraction
        if memory.can_measure():
            record.peak_bytes = memory.peak_of(name, each.shape, torch.get_num_threads())
    return list(found.values())


def lines(records: list[Record]) -> Iterator[str]:
    """A line for each way, and last how ours compares with the best of those that chunk."""
    for record in sorted(records, key=lambda record: record.time["median"] if record.time else 0):
        assert record.time is not None
        over = record.speedup.get("eager")
        times = f"{over['median']:.2f}" if over else "-"
        peak = "-" if record.peak_bytes is None else f"{record.peak_bytes / 2**20:.0f}"
        worst = max((e for e in record.error.values() if e is not None), default=float("nan"))
        yield (
            f"{record.group:<42} {record.variant:<15} {record.time['median']:>8.3f} "
            f"{times:>8} {record.bound()[1]:>9.0%} {peak:>9} {worst:>9.1e}"
        )
    by_name = {record.variant: record for record in records}
    ours, eager = by_name["ours"], by_name["eager"]
    chunked = [by_name[name] for name in CHUNKED if name in by_name]
    if not chunked or not ours.peak_bytes or not eager.peak_bytes:
        return
    fastest = max(chunked, key=lambda r: r.speedup["eager"]["median"])
    leanest = min(chunked, key=lambda r: r.peak_bytes or 0)
    saved, saved_of_leanest = eager.peak_bytes / ours.peak_bytes, (leanest.peak_bytes or 0) / ours.peak_bytes
    yield (
        f"  ours: {ours.speedup[fastest.variant]['median']:.2f} times as fast as {fastest.variant}; memory "
        f"1/{saved:.1f} of eager's, 1/{saved_of_leanest:.1f} of {leanest.variant}'s"
    )
