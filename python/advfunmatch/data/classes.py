"""Class names: the order in which labels and logits count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError

SHOWN = 5  # class names in a sentence


def match_classes(
    have: Sequence[str], wanted: Sequence[str], *, of_have: str, of_wanted: str
) -> Tensor | None:
    """Where each of the classes `wanted` stands among those that there are, by name.

    Args:
        have: the names in the order that something counts in.
        wanted: the names in the order that it should.
        of_have, of_wanted: whose they are, for an error's sentence.

    Returns:
        Indices into `have`, one for each of `wanted`; None where the orders are one.

    Raises:
        InputError: the names are not the same.

    >>> match_classes(["cat", "dog"], ["dog", "cat"], of_have="checkpoint", of_wanted="data")
    tensor([1, 0])
    """
    if list(have) == list(wanted):
        return None
    places = {name: index for index, name in enumerate(have)}
    if len(places) != len(have) or sorted(have) != sorted(wanted):
        raise InputError(
            f"{of_have} has the classes {listed(have)}, but {of_wanted} has {listed(wanted)}; they must be the same, "
            "in whatever order (an .npz archive names its classes in an array class_names)"
        )
    return torch.tensor([places[name] for name in wanted])


def listed(names: Sequence[str]) -> str:
    """Class names for a sentence, the first few of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
