"""What layers inside a network give, for losses that match more than logits.

Layers are named as ``named_modules`` names them, ``layer3`` or ``features.6``. Hooks are there only while a loss's own
forward runs: attacks, which run the same networks, pay nothing for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, one_of
from ..models import ClassesReordered, Normalized

Layers = Mapping[str, Sequence[str]]  # "student" and "teacher" to names of their modules


def find_layer(network: nn.Module, name: str, what: str) -> nn.Module:
    """The module of that name, behind what this package puts in front of a network too.

    Raises:
        InputError: there is none; `what` is the network's name, in the sentence.
    """
    inner = network
    while isinstance(inner, ClassesReordered | Normalized):
        inner = inner.network
    modules = dict(inner.named_modules())
    modules.pop("")
    if name not in modules:
        raise one_of(f"layer of {what}", name, modules)
    return modules[name]


def require_layers(layers: Layers, networks: Mapping[str, nn.Module | None]) -> None:
    """InputError unless each network, "student" and "teacher", has the layers that are named for it."""
    for side, names in layers.items():
        if side not in networks:
            raise one_of("features are of", side, networks)
        network = networks[side]
        for name in names:
            if network is None:
                raise InputError(f"features name the layer {name!r} of the {side}, but there is none")
            find_layer(network, name, side)


@contextmanager
def features_of(network: nn.Module | None, names: Sequence[str], what: str) -> Iterator[dict[str, Tensor]]:
    """The outputs of these layers, filled in by the one forward that runs in this block.

    Raises:
        InputError: at the end of the block: a layer ran not at all or several times, gives no tensor, or was changed in
            place by what follows it.
    """
    found: dict[str, Tensor] = {}
    if network is None or not names:
        yield found
        return
    seen: dict[str, list[Any]] = {name: [] for name in names}
    versions: dict[str, int] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name].append(output)
            versions[name] = output._version if isinstance(output, Tensor) else 0

        return hook

    handles = [
        find_layer(network, name, what).register_forward_hook(keep(name)) for name in dict.fromkeys(names)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, outputs in seen.items():
        if len(outputs) != 1:
            raise InputError(
                f"layer {name!r} of {what} ran {len(outputs)} times in one forward, and not once"
            )
        if not isinstance(outputs[0], Tensor):
            raise InputError(f"layer {name!r} of {what} gives {type(outputs[0]).__name__}, and no tensor")
        if outputs[0]._version != versions[name]:
            raise InputError(
                f"what layer {name!r} of {what} gives is changed in place by the layer after it; name that one"
            )
        found[name] = outputs[0]
