"""The kernel parts of the suite: which cases run, and what is printed while they do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.kernels import images, losses
from benchmarks.kernels.case import Case, measure
from benchmarks.options import Options
from benchmarks.results import Record

SMOKE = re.compile(r"/(128x10|8x19x128x256-cl|512x1000|128x3x32x32|16x64x32x32-cl)/(float32|bfloat16)$")
"""Shapes small enough for two minutes that still take every code path: short rows, long rows, channels-last."""


def kernel_cases() -> Iterator[Case]:
    """Every case of every op."""
    yield from losses.cases()
    yield from images.cases()


def sweep_cases() -> Iterator[Case]:
    """softmax_kl over four decades of rows, and of classes."""
    for family, sizes in (
        ("rows", [(rows, 1000) for rows in (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)]),
        ("classes", [(64, classes) for classes in (10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)]),
    ):
        for rows, classes in sizes:
            label = f"{rows}x{classes}"
            shape = losses.Shape(label, (rows, classes), family)
            build = partial(losses.softmax_kl, shape, "float32", "both", "kl")
            yield Case("softmax_kl", "both", label, "float32", family, build, standard=False)


def selected(cases: Iterator[Case], options: Options) -> list[Case]:
    """The cases that the options ask for."""
    chosen = []
    for case in cases:
        if options.only is not None:
            wanted = re.search(options.only, case.name) is not None
        elif options.smoke:
            wanted = SMOKE.search(case.name) is not None
        else:
            wanted = options.full or case.standard
        if wanted:
            chosen.append(case)
    return chosen


def selected_sweep(options: Options) -> list[Case]:
    """The sweep's cases: all of them, every other one in ten minutes, three in a smoke run."""
    cases = list(sweep_cases())
    if options.only is not None:
        return [case for case in cases if re.search(options.only, case.name)]
    if options.smoke:
        return cases[:3]
    return cases if options.full else cases[::2]


def run(cases: list[Case], options: Options, limits: Any) -> list[Record]:
    """Measure the cases, printing a line for each of ours."""
    records: list[Record] = []
    print(f"{'case':<44} {'variant':<16} {'x eager':>9} {'x compile':>10} {'of limit':>9} {'error':>9}")
    for case in cases:
        without = ("compile", "compiled formula") if options.smoke else ()
        measured = measure(
            case,
            options.device,
            limits,
            budget=options.seconds,
            without=without,
            attempts=1 if options.smoke else 4,
        )
        records += measured
        for record in measured:
            if not record.peer:
                print(_line(case, record), flush=True)
    return records


def _line(case: Case, record: Record) -> str:
    def over(peer: str) -> str:
        return f"{record.speedup[peer]['median']:.2f}" if peer in record.speedup else "-"

    worst = max((error for error in record.error.values() if error is not None), default=float("nan"))
    bound = max(record.limits, key=lambda name: record.limits[name])
    assert record.time is not None
    share = record.limits[bound] / record.time["median"]
    limit = f"{share:.0%} {bound}"
    return f"{case.name:<44} {record.variant:<16} {over('eager'):>9} {over('compile'):>10} {limit:>9} {worst:>9.1e}"
