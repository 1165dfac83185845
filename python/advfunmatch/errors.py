"""The errors that a user can cause, each carrying one sentence that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sized


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what it was and what is allowed."""


class TrainingDiverged(RuntimeError):
    """A training loss stopped being finite; the message names the step, the last good checkpoint and the cause."""


class ProcessLost(RuntimeError):
    """Another process of a run has ended, and has itself said why."""


def one_of(what: str, given: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not in a list, with the nearest that is.

    >>> one_of("norm", "L2", ["linf", "l2"])
    InputError("norm is 'L2', but must be one of: linf, l2. Did you mean 'l2'?")
    """
    names = list(allowed)
    return InputError(
        f"{what} is {given!r}, but must be one of: {', '.join(names)}{did_you_mean(given, names)}"
    )


def and_more(names: Sized) -> str:
    """What follows the first of several names.

    >>> and_more(["a", "b", "c"]), and_more(["a"])
    (' and 2 more', '')
    """
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def did_you_mean(given: object, names: Iterable[str]) -> str:
    """`. Did you mean 'NAME'?` for the name that is spelt most like what was given, or nothing.

    >>> did_you_mean("adad", ["ce", "adaad"]), did_you_mean("vgg", ["small_cnn"])
    (". Did you mean 'adaad'?", '')
    """
    by_spelling = {_spelling(name): name for name in names}
    near = difflib.get_close_matches(_spelling(str(given)), by_spelling, n=1)
    return f". Did you mean {by_spelling[near[0]]!r}?" if near else ""


def _spelling(name: str) -> str:
    """Without what nobody means: capitals, and which of - and _ it is."""
    return name.lower().replace("_", "-")
