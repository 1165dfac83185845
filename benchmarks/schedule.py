"""Fitting cases into the time there is: repetitions are trimmed first, and a case that is left out is named.

    schedule = Schedule(budget=240.0, seconds=2.0)
    for case, seconds in schedule.turns(cases):
        ...                                    # measure for ``seconds``; what else it takes is ``case.cost``
    print(schedule.left_out)

A case takes ``cost`` seconds whatever is timed (its tensors, torch.compile, warming up, the answers in float64), and
then the rounds. Costs are rough and those of one machine, so they are scaled by what the cases so far have taken.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

LEAST = 0.25
"""Rounds are trimmed down to this share of what was asked for; below it a case is left out."""


class Costed(Protocol):
    """A case of any part."""

    @property
    def name(self) -> str: ...

    @property
    def cost(self) -> float:
        """Seconds beside the timed rounds, roughly, on two cores."""
        ...


C = TypeVar("C", bound=Costed)


class Schedule:
    """Hands out cases with the seconds that each may be timed for, and says how far it is."""

    def __init__(
        self,
        budget: float | None,
        seconds: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.budget = budget
        """Seconds for all cases together; None for as long as it takes."""
        self.seconds = seconds
        """Of timed rounds for each case, where there is time."""
        self.left_out: list[str] = []
        self._clock = clock
        self._expected = self._taken = 0.0

    @property
    def pace(self) -> float:
        """How many times longer than expected the cases so far took; moves from 1 as there is evidence."""
        believed = 20.0  # seconds of cases as expected
        return (self._taken + believed) / (self._expected + believed)

    def turns(self, cases: Sequence[C]) -> Iterator[tuple[C, float]]:
        """Every case that fits, with its seconds of timed rounds; what the caller does between two is its time."""
        start = self._clock()
        for place, case in enumerate(cases):
            begun = self._clock()
            waiting = cases[place:]
            seconds = self.seconds
            if self.budget is not None:
                left = self.budget - (begun - start)
                # Every case that waits gets its cost, and an equal share of what then remains.
                spare = left / self.pace - sum(other.cost for other in waiting)
                seconds = min(seconds, max(LEAST * seconds, spare / len(waiting)))
                if self.pace * (case.cost + seconds) > left:
                    self.left_out.append(case.name)
                    continue
            expected = case.cost + seconds
            coming = self.pace * sum(other.cost + seconds for other in waiting)
            if self.budget is not None:
                coming = min(coming, left)
            _progress(
                f"[{place + 1}/{len(cases)}, {_clock_time(begun - start)}, {_clock_time(coming)} left] {case.name}"
            )
            yield case, seconds
            self._taken += self._clock() - begun
            self._expected += expected


def _progress(line: str) -> None:
    """On a terminal one line that changes; in a log a line each. Never among the results on the standard output."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}\r", end="", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


def _clock_time(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
