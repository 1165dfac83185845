"""softmax_kl over four decades of rows, and of classes: where calls, exponentials and memory bind."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.kernels import losses
from benchmarks.kernels.case import Case
from benchmarks.kernels.suite import HEAD, lines, measure, with_peers, wrong_answers
from benchmarks.options import Options

__all__ = ["HEAD", "cases", "lines", "measure", "wrong_answers"]

ROWS = tuple((rows, 1000) for rows in (1, 3, 10, 30, 100, 300, 1000, 3000, 10000))
CLASSES = tuple((64, classes) for classes in (10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000))


def sweep_cases() -> Iterator[Case]:
    """The two lines of the plot, as cases of the families "rows" and "classes"."""
    for family, sizes in (("rows", ROWS), ("classes", CLASSES)):
        for rows, classes in sizes:
            shape = losses.Shape(f"{rows}x{classes}", (rows, classes), family)
            build = partial(losses.softmax_kl, shape, "float32", "both", divergence="kl")
            yield Case("softmax_kl", "both", shape.label, "float32", family, build, elements=rows * classes)


def cases(options: Options) -> list[Case]:
    """All with ``--full``; every other one in ten minutes, which still spans the decades; three in a smoke run."""
    every = list(sweep_cases())
    chosen = options.named(every)
    if chosen is None:
        chosen = every[:3] if options.smoke else every if options.full else every[::2]
    return with_peers(chosen, options)
