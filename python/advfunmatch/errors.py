"""The errors that a user can cause, each carrying one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what it was and what is allowed."""


class TrainingDiverged(RuntimeError):
    """A training loss stopped being finite; the message names the step, the last good checkpoint and the cause."""


class ProcessLost(RuntimeError):
    """Another process of a run has ended, and has itself said why."""


def one_of(what: str, given: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not in a list."""
    return InputError(f"{what} is {given!r}, but must be one of: {', '.join(allowed)}")
