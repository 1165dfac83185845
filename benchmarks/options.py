"""What a run of the suite was asked to do."""

from __future__ import annotations

from dataclasses import dataclass


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
    seconds: float = 2.0
    """What one interleaved measurement may take."""
