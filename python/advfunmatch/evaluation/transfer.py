"""Attacks whose images are made on another network than the one that is measured (Papernot et al. 2016).

They should find less than the same attack on the network itself, which sees its gradients. Where they find more, these
are masked (Athalye et al. 2018).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..data import ImageDataset
from ..errors import InputError
from ..models import require_forward
from ..models.digest import digest_of_network
from ..models.frozen import frozen
from .attacks import Attack
from .networks import returning_logits
from .results import Figure
from .rows import clean

MARGIN = 1.0  # percentage points by which transfer may beat the network's own gradients by chance


def transferred(attacks: list[Attack], sources: Mapping[str, nn.Module] | None) -> list[Attack]:
    """Each attack on each of the networks, by name; InputError for what is no network, or for no attack."""
    if sources is None:
        return []
    if not isinstance(sources, Mapping) or not sources:
        raise InputError(
            f"transfer_from is {sources!r}, but must be networks by name, as in {{'other': network}}"
        )
    for name, network in sources.items():
        if not isinstance(network, nn.Module):
            raise InputError(
                f"transfer_from[{name!r}] is of type {type(network).__name__}, but must be a torch.nn.Module"
            )
    movable = [attack for attack in attacks if attack.function is not clean]
    if not movable:
        raise InputError("transfer_from is given, but attacks names none that makes images, such as pgd20")
    return [
        replace(attack, source=str(name), network=network)
        for name, network in sources.items()
        for attack in movable
    ]


@contextmanager
def ready_sources(attacks: Iterable[Attack], data: ImageDataset) -> Iterator[list[Attack]]:
    """The attacks for a while with their networks in eval mode, frozen, and known to take the images."""
    with ExitStack() as stack:
        ready = []
        for attack in attacks:
            if attack.network is not None:
                stack.enter_context(frozen(attack.network))
                require_forward(attack.network, data, f"transfer_from {attack.source!r}")
                attack = replace(attack, network=returning_logits(attack.network, data))
            ready.append(attack)
        yield ready


def digests_of_sources(sources: Mapping[str, nn.Module] | None) -> dict[str, str]:
    """Under ``transfer_from NAME`` the digest of each."""
    return {
        f"transfer_from {name}": digest_of_network(network, type(network).__name__)
        for name, network in (sources or {}).items()
    }


def transfer_warnings(rows: Iterable[Figure]) -> list[str]:
    """Sentences about images of another network that break more than the same attack on the network itself."""
    rows = list(rows)
    own: dict[Any, Figure] = {(row.attack, row.ball): row for row in rows}
    found = []
    for row in rows:
        if row.source is None:
            continue
        white = own.get((row.attack.removesuffix(f" from {row.source}"), row.ball))
        if white is not None and row.accuracy < white.accuracy - MARGIN:
            found.append(
                f"{row.attack} leaves {row.accuracy:g} % but {white.attack} on the network itself "
                f"{white.accuracy:g} %: another network's gradients find more than its own, so these may be masked; "
                f"{row.ball}"
            )
    return found
