"""What a run of the suite was asked to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.schedule import Costed

C = TypeVar("C", bound=Costed)


@dataclass(frozen=True)
class Options:
    """Choices of the command line that every part understands."""

    device: str = "cpu"
    full: bool = False
    """Everything, rather than what fits ten minutes."""
    smoke: bool = False
    """Seconds, not minutes: answers are checked, times are not worth reading."""
    only: str | None = None
    """A regular expression that names of cases must match."""
    compile: bool = True
    """Whether torch.compile is among the peers; it takes most of the time."""

    def named(self, cases: Iterable[C]) -> list[C] | None:
        """The cases that ``only`` asks for by name; None where it is not given."""
        if self.only is None:
            return None
        return [case for case in cases if re.search(self.only, case.name)]
