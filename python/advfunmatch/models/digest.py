"""Digests of networks, by which one is known again wherever its file lies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..data.digest import add_tensor
from .fit import ClassesReordered


def digest_of_network(network: nn.Module, name: str) -> str:
    """Of a network's architecture and weights, as hexadecimal digits.

    The order into which its classes were put for some data does not count.
    """
    network = network.network if isinstance(network, ClassesReordered) else network
    return digest_of_weights(network.state_dict(), name)


def digest_of_weights(weights: Mapping[str, Any], name: str) -> str:
    """The same of the state dict alone."""
    found = hashlib.blake2b(name.encode(), digest_size=16)
    for key, value in sorted(weights.items()):
        if isinstance(value, Tensor):  # and no extra state, which modules may make of anything
            found.update(key.encode())
            add_tensor(found, value)
    return found.hexdigest()
