"""The parts of the suite. Each is a module that offers what ``Suite`` asks for, imported when it is run or listed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.options import Options
from benchmarks.results import Record
from benchmarks.schedule import Costed


class Suite(Protocol):
    """What the module of a part defines."""

    HEAD: str
    """The head of the table that is printed while it runs."""

    def cases(self, options: Options) -> Sequence[Costed]:
        """What would run, the most telling first."""
        ...

    def measure(self, case: Any, seconds: float, options: Options, limits: Any) -> list[Record]:
        """One case; the timed rounds should take about ``seconds``."""
        ...

    def lines(self, records: list[Record]) -> Iterable[str]:
        """The lines of the table for what ``measure`` returned."""
        ...

    def wrong_answers(self, records: list[Record]) -> Iterable[str]:
        """Sentences about answers that are wrong, whatever they took."""
        ...


@dataclass(frozen=True)
class Part:
    """One part of the suite; its results are one file."""

    name: str
    about: str
    module: str
    share: float
    """Of the time that all parts have together."""
    rounds: float = 1.0
    """How many times as long as a kernel each of its cases is timed."""

    @property
    def suite(self) -> Suite:
        return importlib.import_module(self.module)  # type: ignore[return-value]


PARTS = {
    part.name: part
    for part in (
        Part(
            "kernels",
            "every op x shape family x dtype x mode, against eager, torch.compile and Liger-Kernel",
            "benchmarks.kernels.suite",
            0.5,
        ),
        Part(
            "sweep",
            "softmax_kl over four decades of rows and of classes, against the limits",
            "benchmarks.kernels.sweep",
            0.11,
        ),
        Part(
            "accuracy",
            "errors of KL and gradients against float64, for students far from and near their teacher",
            "benchmarks.kernels.accuracy",
            0.04,
            rounds=0,
        ),
        Part(
            "linear",
            "the loss fused with its projection: time, memory and their frontier, against eager and chunked peers",
            "benchmarks.linear.suite",
            0.03,
        ),
        Part(
            "attack",
            "the attack engine against the loops of AdaAD, RSLAD and TRADES",
            "benchmarks.attack.suite",
            0.15,
            rounds=4,
        ),
        Part(
            "training",
            "whole training steps against those of AdaAD, RSLAD and TRADES, and where their time goes",
            "benchmarks.training.step",
            0.17,
            rounds=4,
        ),
    )
}
