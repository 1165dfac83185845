"""What a forward does beside returning its result, seen while torch.fx runs it. See Note [Side effects].

Note [Side effects]
~~~~~~~~~~~~~~~~~~~
A graph holds operations, and nothing else that the code did. So the module whose forward does one of these is called
as it is, and nothing of it is folded:

    it writes to one of the network's tensors      ``p.data = ...``, ``self.weight.mul_(2)``, ``p.data.clamp_()``; a
                                                   folded layer has its weight in other memory
    it keeps an activation                         the attribute would hold a proxy, once
    it changes an attribute at every call          a counter, a list that grows
    it changes another module's attribute          its mode, a layer's stride: the other is served as it was
    it changes what is outside of the network      a list of features in the same file, or in a closure

An attribute of its own that the first call sets and the second leaves alone is a cache, such as statistics moved to the
image's device: the graph of the second call is taken, if it computes what the first did.
"""

from __future__ import annotations

import operator
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "COMPARISONS",
    "Outside",
    "TensorWritten",
    "WriteWatch",
    "attribute_states",
    "changed_attributes",
    "functions_of",
    "same_graph",
]

# The operators of questions, such as ``x.device == ...``.
COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.is_)
# How deep into lists, dicts and objects of a module's attributes a change is looked for.
_DEPTH = 4
# A container outside of the network with more items is looked at by its length.
_MANY = 1000
# torch.fx stores a traced constant under such a name in the root.
_CONSTANTS = ("_tensor_constant", "_torchbind_obj", "_tree_spec_constant", "_opaque")


class TensorWritten(RuntimeError):
    """A forward writes to a tensor of the network; ``owner`` is the path of the module that has it."""

    def __init__(self, path: str) -> None:
        self.owner = path.rpartition(".")[0]
        super().__init__(f"it writes to {path}")


class WriteWatch(TorchDispatchMode):
    """Raises TensorWritten at an operation on tensors, rather than proxies, that would change one of the network's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.paths: dict[int, str] = {}
        for module_path, module in network.named_modules():
            own = (vars(module), module._parameters, module._buffers)
            for name, tensor in ((n, t) for place in own for n, t in place.items()):
                if isinstance(tensor, Tensor) and (key := _memory(tensor)) is not None:
                    self.paths.setdefault(key, f"{module_path}.{name}".removeprefix("."))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(tensor, Tensor) and (path := self.paths.get(_memory(tensor) or 0)):
                        raise TensorWritten(path)
        return func(*args, **kwargs)


def _memory(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except RuntimeError:  # a tensor without storage: sparse, opaque, a subclass's own
        return None


def attribute_states(network: nn.Module, path: str) -> dict[tuple[str, str], list[Any]]:
    """What the attributes of the network and its submodules hold: by module path and name, a list to be compared."""
    states = {}
    for below, module in network.named_modules():
        where = f"{path}.{below}".strip(".")
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in vars(module).items():
            if not name.startswith(_CONSTANTS):
                states[where, name] = list(_held(value, _DEPTH))
    return states


def _held(value: Any, depth: int) -> Iterator[Any]:
    yield value
    if isinstance(value, Tensor):
        if not is_lazy(value):
            yield from (_memory(value), None if value.is_inference() else value._version)
    elif depth == 0 or isinstance(value, fx.Proxy | nn.Module | type):
        return
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _held(item, depth - 1)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for item in value:
            yield from _held(item, depth - 1)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _held(vars(value), depth - 1)


class Outside:
    """What the functions of a network's classes can reach beside it: global variables that they name, and closures.

    Attributes:
        changed: the name of one that is not as it was when this was made; None if all are.
    """

    def __init__(self, network: nn.Module) -> None:
        self._places: dict[tuple[int, str], tuple[Any, str]] = {}
        for function in {f for module in network.modules() for f in functions_of(module)}:
            for name in function.__code__.co_names:
                self._add(function.__globals__, name)
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                self._add(cell, name)
        self._before = {key: self._state(*place) for key, place in self._places.items()}
        self._contents = {key: _copied(_value(*place)) for key, place in self._places.items()}

    @property
    def changed(self) -> str | None:
        for key, place in self._places.items():
            if not _same_state(self._before[key], self._state(*place)):
                return key[1]
        return None

    def restore(self) -> None:
        """Undo what running the code on proxies did."""
        for key, (place, name) in self._places.items():
            value = self._before[key][0]
            if isinstance(value, dict | set):
                value.clear()
                value.update(self._contents[key])
            elif isinstance(value, list | deque):
                value.clear()
                value.extend(self._contents[key])
            if isinstance(place, dict):
                place[name] = value
            else:
                place.cell_contents = value

    def _add(self, place: Any, name: str) -> None:
        kinds = int | float | str | list | dict | set | deque | Tensor | None
        there = not isinstance(place, dict) or name in place
        if there and isinstance(_value(place, name), kinds):
            self._places[id(place), name] = place, name

    @staticmethod
    def _state(place: Any, name: str) -> list[Any]:
        value = _value(place, name)
        large = isinstance(value, list | dict | set | deque) and len(value) > _MANY
        return [value, len(value)] if large else list(_held(value, 2))


def _value(place: Any, name: str) -> Any:
    try:
        return place.get(name) if isinstance(place, dict) else place.cell_contents
    except ValueError:  # an empty cell
        return ...


def _copied(value: Any) -> Any:
    return type(value)(value) if isinstance(value, list | dict | set | deque) else None


def functions_of(module: nn.Module) -> Iterator[types.FunctionType]:
    """The module's forward and the methods of its classes, but for torch's own, and functions among its attributes."""
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] != "torch" and cls is not object:
            yield from (f for f in vars(cls).values() if isinstance(f, types.FunctionType))
    yield from (f for f in vars(module).values() if isinstance(f, types.FunctionType))


def changed_attributes(
    before: dict[tuple[str, str], list[Any]], after: dict[tuple[str, str], list[Any]]
) -> dict[tuple[str, str], bool]:
    """The attributes whose states differ, and whether each holds an activation now."""
    return {
        key: any(isinstance(value, fx.Proxy) for value in after.get(key, ()))
        for key in (*after, *(before.keys() - after.keys()))
        if not _same_state(before.get(key), after.get(key))
    }


def _same_state(before: list[Any] | None, after: list[Any] | None) -> bool:
    if before is None or after is None or len(before) != len(after):
        return False
    plain = (int, float, str, bytes)
    return all(
        a is b or (isinstance(a, plain) and type(a) is type(b) and (a == b or a != a != b))
        for a, b in zip(before, after, strict=True)
    )


def same_graph(first: fx.Graph, second: fx.Graph, root: nn.Module) -> bool:
    """Whether two graphs of one network hold the same operations on tensors of the same values."""
    ours, theirs = _nodes_with_effect(first), _nodes_with_effect(second)
    if len(ours) != len(theirs):
        return False
    places: dict[fx.Node, int] = {}
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        places[a] = places[b] = index
        if a.op != b.op or (a.op != "get_attr" and a.target != b.target):
            return False
        if a.op == "get_attr" and a.target != b.target:
            one, other = (_attribute(root, str(node.target)) for node in (a, b))
            if not (isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)):
                return False
        arguments = [fx.map_arg((node.args, node.kwargs), places.__getitem__) for node in (a, b)]
        if repr(arguments[0]) != repr(arguments[1]):
            return False
    return True


def _nodes_with_effect(graph: fx.Graph) -> list[fx.Node]:
    """Without attributes that were looked up for a question alone."""
    unread: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        looked_up = node.op == "get_attr" or node.target is getattr or node.target in COMPARISONS
        if looked_up and not node.users.keys() - unread:
            unread.add(node)
    return [node for node in graph.nodes if node not in unread]


def _attribute(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)
