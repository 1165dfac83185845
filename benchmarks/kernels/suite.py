"""The kernels as a part of the suite: which cases run, and what is printed while they do."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.kernels import case, convolution, images, losses
from benchmarks.kernels.case import Case, wrong_answers
from benchmarks.options import Options
from benchmarks.results import Record

__all__ = ["HEAD", "cases", "lines", "measure", "wrong_answers"]

HEAD = f"{'case':<57} {'variant':<16} {'x eager':>8} {'x compile':>10} {'of limit':>10} {'error':>9}"
SMOKE = re.compile(
    r"/(128x10|8x19x128x256-cl|512x1000|128x3x32x32|16x64x32x32-cl|32x128x16x16-cl)/(float32|bfloat16)$"
)
"""Shapes small enough for two minutes that still take every code path: short rows, long rows, channels-last."""


def kernel_cases(device: str = "cpu") -> Iterator[Case]:
    """Every case of every op that there is for the device."""
    yield from losses.cases()
    yield from images.cases()
    if device == "cpu":
        yield from convolution.cases()


def cases(options: Options) -> list[Case]:
    """The cases that the options ask for, so ordered that what time may cut off leaves some of every op."""
    every = list(kernel_cases(options.device))
    chosen = options.named(every)
    if chosen is None and options.smoke:
        chosen = [case for case in every if case.standard and SMOKE.search(case.name)]
    if chosen is None:
        chosen = [case for case in every if options.full or case.standard]
    return with_peers(turn_by_turn(chosen), options)


def turn_by_turn(chosen: Iterable[Case]) -> list[Case]:
    """The first case of every op, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    numbered = []
    for each in chosen:
        numbered.append((seen[each.op], each))
        seen[each.op] += 1
    return [each for _, each in sorted(numbered, key=lambda pair: pair[0])]


def with_peers(chosen: list[Case], options: Options) -> list[Case]:
    """The cases without what torch.compile would make, where the options say so."""
    return chosen if options.compile else [replace(case, compiles=0) for case in chosen]


def measure(each: Case, seconds: float, options: Options, limits: Any) -> list[Record]:
    return case.measure(each, options.device, limits, budget=seconds, attempts=1 if options.smoke else 3)


def lines(records: list[Record]) -> Iterator[str]:
    """A line for each of our variants."""
    for record in records:
        if record.peer:
            continue
        over = [
            f"{record.speedup[peer]['median']:.2f}" if peer in record.speedup else "-"
            for peer in ("eager", "compile")
        ]
        worst = max((error for error in record.error.values() if error is not None), default=math.nan)
        bound, share = record.bound()
        yield (
            f"{record.group:<57} {record.variant:<16} {over[0]:>8} {over[1]:>10} "
            f"{f'{share:.0%} {bound}':>10} {worst:>9.1e}"
        )
