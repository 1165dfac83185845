"""Tracing a network into a graph that computes what it does, gradients included. See Note [Tracing].

Note [Tracing]
~~~~~~~~~~~~~~
torch.fx runs a network's Python once, on proxies, and records torch's operations. Whatever else the code does is lost
or frozen, without an error. So a submodule is kept whole, and called as it is, where torch.fx cannot follow it, and

    where it has hooks                                  they may do anything, at every call
    where it computes under no_grad or autocast         the graph has no such contexts
    where it draws random numbers outside the graph     one draw would be served for ever
    where it does more than compute                     Note [Side effects] in ``effects``
    where it is TorchScript or an exported program      their operators are no modules, so nothing could be folded

What is traced is a scratch copy: code that ran on proxies may leave some behind.

Buffers are read at every call, as parameters are, so that what the code computes from them follows ``refresh_``. An
augmented assignment is in place, as it is for a tensor. A torch.autograd.Function is called as it is. A module that
forward makes, such as a pooling, is traced into where it holds no tensors. Questions that the images' place and kind
answer (``x.is_cuda``, ``x.dim() == 4``) are answered; a prepared network asserts of its images what was taken for
granted. A check of sizes whose other outcome only raises is a check in the graph; of a branch on sizes, or on whether a
gradient is wanted, a graph holds one side, and checks that the images take it.

Note [Assigned parameters]
~~~~~~~~~~~~~~~~~~~~~~~~~~
``layer.weight.data = F.normalize(layer.weight)`` in a forward, as hypersphere heads have it, is a write. But where the
assigned value is computed from parameters alone and doing so again changes nothing, every call computes with that same
value, whether it was written back or not. So the graph computes it anew at each call and writes nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from .checks import outcome_that_goes_on, require_branch, require_size
from .effects import (
    COMPARISONS,
    Outside,
    TensorWritten,
    WriteWatch,
    attribute_states,
    changed_attributes,
    same_graph,
)
from .proxies import Proxy, attribute_or_method, is_tensor, refuse_write, torch_patched, writes_to_its_first
from .wrappers import wrapped_network

# What leaves the number of dimensions and of channels as they are.
_KEEPING_MODULES = (
    *(nn.ReLU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
# fmt: off
_KEEPING = frozenset((
    "relu", "relu_", "silu", "gelu", "leaky_relu", "elu", "softplus", "sigmoid", "tanh", "dropout", "contiguous",
    "clone", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d",
))
# fmt: on
_ARITHMETIC = frozenset(("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "div"))

__all__ = ["first_line", "has_own_call", "hooks_of", "runs_only_its_forward", "trace"]


class _Tracer(fx.Tracer):
    """torch.fx's tracer, keeping whole the submodules whose forward it cannot follow.

    Attributes:
        untraced: the submodules kept whole, with the reason.
        changes: the attributes that were changed, with the submodule that did.
        assumed: what was taken for granted of the images: "device", "dimensions".
        decided: the outcomes of the branches on sizes, in order: as they were given, and then False.
        assigned: the parameters to whose ``data`` the code assigned, with what; see Note [Assigned parameters].
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        whole: dict[str, str],
        device: torch.device | None,
        dtype: torch.dtype | None,
        decisions: tuple[bool, ...],
    ) -> None:
        super().__init__()
        self.given = decisions
        self.decided: list[bool] = []
        self.assigned: dict[str, fx.Proxy] = {}
        self.whole = whole
        self.device = device
        self.dtype = dtype
        self.untraced: dict[str, str] = {}
        self.changes: dict[str, str] = {}
        self.assumed: set[str] = set()
        self.attributes: dict[str, fx.Proxy] = {}
        # Why the module that is being run cannot be followed, where that was seen.
        self.refusal: str | None = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        self.attributes = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self.assigned_in(module_qualified_name) and (
            _asks_for_types(m) or super().is_leaf_module(m, module_qualified_name)
        )

    def assigned_in(self, path: str) -> str | None:
        """A parameter of the module at that path, or below, that was assigned to."""
        return next(
            (name for name in self.assigned if f"{name}.".startswith(f"{path}." if path else "")), None
        )

    def assign(self, node: fx.Node, value: fx.Proxy) -> None:
        """Have the rest of the graph read a parameter as what was assigned to it. See Note [Assigned parameters]."""
        path = str(node.target)
        made_of, others = (
            _inputs_of(value.node),
            [each for each in self.graph.nodes if each.target == node.target],
        )
        read_elsewhere = any(
            user not in made_of for each in others if each.op == "get_attr" for user in each.users
        )
        parameter = _tensor_at(self.root, path)
        with torch.no_grad():
            once = _value_of(value.node, {path: parameter}, self.root)
            twice = None if once is None else _value_of(value.node, {path: once}, self.root)
        settled = (
            once is not None
            and twice is not None
            and once.shape == parameter.shape
            and torch.allclose(once, twice, rtol=1e-6, atol=0)
        )
        if path in self.assigned or read_elsewhere or not settled:
            raise TensorWritten(path)
        self.assigned[path] = self.attributes[path] = value

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy) and a.tracer is not self:
            raise RuntimeError("it keeps an activation from one call to the next")
        return super().create_arg(a)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *rest: Any,
        **options: Any,
    ) -> fx.Node:
        if writes_to_its_first(kind, target, kwargs):
            refuse_write(args[0] if args else kwargs.get("input"))
        refuse_write(kwargs.get("out"))
        if kind.startswith("call"):
            # Not raised yet: the code may write to a tensor below, which decides what is kept whole.
            if not torch.is_grad_enabled():
                self.refusal = "it computes under torch.no_grad"
            elif any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
                self.refusal = "it computes under torch.autocast"
        return super().create_node(kind, target, args, kwargs, *rest, **options)

    def run(self, network: nn.Module) -> fx.Graph:
        """The graph of the network's forward."""
        parameters = list(inspect.signature(network.forward).parameters.values())
        # Options such as return_features=False are what they are by default; only the images are variable.
        concrete = {
            p.name: p.default
            for p in parameters[1:]
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.default is not p.empty
        }
        state = _random_state()
        before, outside = attribute_states(network, ""), Outside(network)
        try:
            with torch.enable_grad(), _without_autocast(), torch_patched(network, self), WriteWatch(network):
                graph = self.trace(network, concrete_args=concrete or None)
            self.require_followed(state)
            if (name := outside.changed) is not None:
                raise RuntimeError(f"it changes {name}, which is outside of the network")
        finally:
            _set_random_state(state)
            outside.restore()
        self.notice_changes(network, "", before)
        return graph

    def require_followed(self, random_state: tuple[Any, ...]) -> None:
        if self.refusal:
            raise RuntimeError(self.refusal)
        if _random_state() != random_state:
            raise RuntimeError("it draws random numbers")

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if m not in (self.submodule_paths or ()) and runs_only_its_forward(m) and not _has_tensors(m):
            if any(map(_asks_for_types, m.modules())):
                raise RuntimeError(f"it calls a {type(m).__name__} that is no submodule of it")
            return forward(*args, **kwargs)  # made in forward
        if (inner := wrapped_network(m, compiled=True)) is not None and not hooks_of(m):
            return inner(*args, **kwargs)
        if (written := self.assigned_in(self.path_of_module(m))) and self.path_of_module(m) in {
            *self.whole,
            *self.untraced,
        }:
            raise TensorWritten(written)
        nodes_before = len(self.graph.nodes)
        depth = len(self.module_stack)
        path = self.path_of_module(m)
        if (why := self.whole.get(path) or self.untraced.get(path)) is not None:
            self.untraced[path] = why
            return self.create_proxy("call_module", path, args, kwargs)
        state, decided = _random_state(), len(self.decided)
        leaf = self.is_leaf_module(m, path)
        refusal, self.refusal = self.refusal, None
        try:
            if not leaf:
                _require_followable(m)
                if hooks_of(m):
                    raise RuntimeError("it has hooks")
                before = attribute_states(m, path)
            value = super().call_module(m, forward, args, kwargs)
            self.require_followed(state)
            if not leaf:
                self.notice_changes(m, path, before)
            return value
        except Exception as error:  # the module's own code, on proxies: it may raise anything
            _set_random_state(state)
            del self.decided[decided:]
            if has_own_call(m):
                raise  # this runs inside of it; a node for the module would run it once more
            if isinstance(error, TensorWritten) and not f"{error.owner}.".startswith(f"{path}."):
                raise  # of a module that is not in this one, and must be kept whole with it
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            erased = list(self.graph.nodes)[nodes_before:]
            for name in [name for name, proxy in self.attributes.items() if proxy.node in erased]:
                del self.attributes[name]
            for node in reversed(erased):
                self.graph.erase_node(node)
            self.untraced = {n: why for n, why in self.untraced.items() if not n.startswith(path + ".")}
            self.changes = {n: by for n, by in self.changes.items() if not f"{by}.".startswith(f"{path}.")}
            self.untraced[path] = first_line(error)
            self.refusal = None
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self.refusal = self.refusal or refusal

    def notice_changes(self, module: nn.Module, path: str, before: dict[tuple[str, str], list[Any]]) -> None:
        """Record what the module's forward did to attributes; RuntimeError where it kept an activation in one."""
        for (owner, name), kept in changed_attributes(before, attribute_states(module, path)).items():
            if any(f"{owner}.".startswith(f"{whole}.") for whole in self.untraced):
                continue  # while that was tried
            attribute = f"{owner}.{name}".removeprefix(".")
            if kept:
                raise RuntimeError(f"it keeps an activation in {attribute}")
            if attribute not in self.changes and (owner != path or name == "training"):
                raise RuntimeError(f"it changes {attribute}")
            self.changes.setdefault(attribute, path)

    # -- questions that need no activation

    def to_bool(self, obj: fx.Proxy) -> bool:
        answer = self.answer(obj.node)
        if answer is None and not is_tensor(obj.node):
            asking = sys._getframe(2)  # of fx.Proxy.__bool__
            if (answer := outcome_that_goes_on(asking)) is not None:
                self.create_proxy("call_function", require_size, (obj, answer), {})
            else:
                answer = len(self.decided) < len(self.given) and self.given[len(self.decided)]
                self.decided.append(answer)
                self.create_proxy("call_function", require_branch, (obj, tuple(self.decided)), {})
        return super().to_bool(obj) if answer is None else bool(answer)

    def answer(self, node: Any) -> Any:
        """What a node is that depends on the images' place and kind alone; None for others."""
        if not isinstance(node, fx.Node):
            return node
        if (known := self.device_or_dtype(node)) is not None:
            return self.assume("device", known) if isinstance(known, torch.device) else known
        if node.op == "call_function" and node.target in COMPARISONS:
            values = [self.answer(argument) for argument in node.args]
            return None if any(value is None for value in values) else node.target(*values)
        if (channels := self.known_size(node)) is not None:
            return channels
        name, source = attribute_or_method(node)
        if name in ("dim", "ndim", "ndimension") and self.is_map(source):
            return self.assume("dimensions", 4)
        if name == "is_floating_point" and self.is_image(source):
            return True
        if self.device is None:
            return None
        if name in ("is_cuda", "is_cpu", "is_mps", "is_xpu"):
            return self.assume("device", name == f"is_{self.device.type}")
        if name == "get_device":
            return self.assume("device", -1 if self.device.index is None else self.device.index)
        if name in ("type", "index") and isinstance(device := self.answer(source), torch.device):
            return getattr(device, name)
        return None

    def device_or_dtype(self, node: Any) -> torch.device | torch.dtype | None:
        """The device of whatever tensor, or the dtype of the images, that the node asks for."""
        name, source = attribute_or_method(node)
        if name == "dtype" and self.is_image(source):
            return self.dtype
        return self.device if name == "device" else None

    def assume(self, what: str, value: Any) -> Any:
        self.assumed.add(what)
        return value

    def length_of_shape(self, node: fx.Node) -> int | None:
        """How many sizes the node holds, if it is the shape of a feature map, or a slice of one."""
        name, source = attribute_or_method(node)
        if name in ("shape", "size") and len(node.args) == 1 + (name == "shape") and not node.kwargs:
            return self.assume("dimensions", 4) if self.is_map(source) else None
        if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], slice):
            part, whole = node.args[1], self.length_of_shape(node.args[0])  # type: ignore[arg-type]
            bounds = (part.start, part.stop, part.step)
            if whole is not None and all(bound is None or isinstance(bound, int) for bound in bounds):
                return len(range(*part.indices(whole)))
        return None

    def known_size(self, node: Any) -> int | None:
        """The number of channels, where the node asks a feature map for it and the layer before shows it."""
        name, source = attribute_or_method(node)
        if name == "size" and len(node.args) == 2:
            place = node.args[1]
        elif (
            isinstance(node, fx.Node)
            and node.op == "call_function"
            and node.target is operator.getitem
            and isinstance(node.args[0], fx.Node)
        ):
            name, source = attribute_or_method(node.args[0])
            place = (
                node.args[1] if name == "shape" or (name == "size" and len(node.args[0].args) == 1) else None
            )
        else:
            return None
        return self.channels(source) if place in (1, -3) and isinstance(place, int) else None

    def channels(self, node: Any) -> int | None:
        """Of a feature map, as far as the layers that it comes from show it."""
        module = self.layer(node)
        if isinstance(module, nn.Conv2d):
            return module.out_channels
        if isinstance(module, nn.BatchNorm2d):
            return module.num_features
        if is_arithmetic(node):  # more than one channel is not broadcast
            return next((n for n in map(self.channels, node.args[:2]) if n is not None and n > 1), None)
        return self.channels(node.args[0]) if self.keeps_dimensions(node) else None

    def is_map(self, node: Any) -> bool:
        """Whether the node is the images, or has as many dimensions as they have."""
        return (
            self.is_image(node)
            or isinstance(self.layer(node), nn.Conv2d | nn.BatchNorm2d)
            or (self.keeps_dimensions(node) and self.is_map(node.args[0]))
            or (is_arithmetic(node) and any(map(self.is_map, node.args[:2])))
        )

    def layer(self, node: Any) -> nn.Module | None:
        """The module of the node's own kind, if it calls one."""
        called = isinstance(node, fx.Node) and node.op == "call_module"
        return self.root.get_submodule(str(node.target)) if called else None

    def keeps_dimensions(self, node: Any) -> bool:
        """Whether the node's result has as many dimensions and channels as its first argument."""
        if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if node.op == "call_module":
            return isinstance(self.layer(node), _KEEPING_MODULES)
        return node.op in ("call_function", "call_method") and (
            getattr(node.target, "__name__", node.target) in _KEEPING
        )

    def is_image(self, node: Any) -> bool:
        """Whether the node is the images, or they with statistics taken off."""
        if not isinstance(node, fx.Node):
            return False
        if node.op == "placeholder":
            return True
        names = ("sub", "add", "mul", "truediv", "div", "contiguous", "clone")
        return getattr(node.target, "__name__", node.target) in names and any(
            map(self.is_image, node.args[:2])
        )

    def computed(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The call's result where its arguments need no activation but for its device or dtype; else None.

        It is then a constant of the network, which moves with it.
        """
        like = getattr(function, "__name__", "") in ("to", "type_as") and not isinstance(args[0], fx.Proxy)
        unknown = False

        def value(argument: Any) -> Any:
            nonlocal unknown
            if not isinstance(argument, fx.Proxy):
                return argument
            known: Any = self.device_or_dtype(argument.node)
            if known is None and like and None not in (self.device, self.dtype):
                known = torch.empty(0, device=self.device, dtype=self.dtype)
            unknown = unknown or known is None
            return known

        args, kwargs = tree_map(value, (args, kwargs))
        return None if unknown else function(*args, **kwargs)


def _tensor_at(root: Any, path: str) -> Any:
    """The tensor itself; by its name alone a module under tracing would give a proxy."""
    owner, _, name = path.rpartition(".")
    module = root.get_submodule(owner)
    return next(place[name] for place in (module._parameters, module._buffers, vars(module)) if name in place)


def _inputs_of(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found, ahead = set(), [node]
    while ahead:
        each = ahead.pop()
        if each not in found:
            found.add(each)
            ahead += each.all_input_nodes
    return found


def _value_of(node: fx.Node, parameters: dict[str, Tensor], root: nn.Module) -> Tensor | None:
    """What a node is that is computed from tensors of the network alone; None for one that needs more."""
    values: dict[fx.Node, Any] = {}
    needed = _inputs_of(node)
    for each in node.graph.nodes:
        if each not in needed:
            continue
        args, kwargs = fx.map_arg((each.args, each.kwargs), values.get)
        if each.op == "get_attr":
            path = str(each.target)
            values[each] = parameters[path] if path in parameters else _tensor_at(root, path)
        elif each.op == "call_function":
            values[each] = each.target(*args, **kwargs)
        elif each.op == "call_method":
            values[each] = getattr(args[0], each.target)(*args[1:], **kwargs)
        else:
            return None
    return values[node] if isinstance(values[node], Tensor) else None


def is_arithmetic(node: Any) -> bool:
    called = isinstance(node, fx.Node) and node.op in ("call_function", "call_method")
    return called and getattr(node.target, "__name__", node.target) in _ARITHMETIC


class Traced(NamedTuple):
    """What ``trace`` found."""

    graph_module: fx.GraphModule
    untraced: dict[str, str]
    assumed: set[str]
    decided: tuple[bool, ...]


def trace(
    network: nn.Module,
    scratch_copy: Callable[[], nn.Module],
    device: torch.device | None,
    dtype: torch.dtype | None,
    decisions: tuple[bool, ...] = (),
) -> Traced:
    """The graph of a network's forward, its modules being those of ``network``.

    Args:
        network: whose modules are served.
        scratch_copy: makes a copy of it whose code may be run on proxies.
        device, dtype: of its images, as far as they are known.
        decisions: the outcomes of branches on sizes, in the order in which they come; False where none is given.

    Returns:
        The graph; the submodules in it that were kept whole, with the reason; what was assumed of the images; and the
        outcomes that it was traced with.

    Raises:
        Exception: torch.fx cannot follow the network's own forward.
    """
    _require_followable(network)
    if "forward" in vars(network):
        raise RuntimeError("its forward is an attribute of the instance")
    whole: dict[str, str] = {}
    while True:
        scratch = scratch_copy()
        tracer = _Tracer(whole, device, dtype, decisions)
        graph = tracer.run(scratch)
        if not tracer.changes:
            break
        # What the first call set, the second may find; see Note [Side effects].
        again = _Tracer(whole, device, dtype, decisions)
        second = again.run(scratch)
        if not again.changes and same_graph(graph, second, scratch):
            tracer, graph = again, second
            break
        changes = again.changes or tracer.changes
        whole |= {path: f"it changes {attribute}" for attribute, path in changes.items()}
        if "" in whole:
            raise RuntimeError(whole[""])
    _take_constants(network, scratch, graph)
    return Traced(fx.GraphModule(network, graph), tracer.untraced, tracer.assumed, tuple(tracer.decided))


def _take_constants(network: nn.Module, scratch: nn.Module, graph: fx.Graph) -> None:
    """Give the network the tensors of the graph that only the scratch copy has: constants in the code, and caches."""
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        owner, _, name = str(node.target).rpartition(".")
        place = network.get_submodule(owner)
        if getattr(place, name, None) is None:
            setattr(place, name, getattr(scratch.get_submodule(owner), name))


def _require_followable(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise RuntimeError("it is TorchScript")
    if isinstance(module, fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes
    ):
        raise RuntimeError("it is an exported program")


def _asks_for_types(module: nn.Module) -> bool:
    """Whether it is one of torchvision's v2 transforms: these return what is no tensor, and so a proxy, unchanged."""
    return any(kind.__module__.startswith("torchvision.transforms.v2") for kind in type(module).__mro__)


def _has_tensors(module: nn.Module) -> bool:
    return next(itertools.chain(module.parameters(), module.buffers()), None) is not None


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _random_state() -> tuple[Any, ...]:
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


def _set_random_state(state: tuple[Any, ...]) -> None:
    python, (name, keys, *rest), torch_state = state
    random.setstate(python)
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(torch_state), dtype=torch.uint8))


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    return [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]


def has_own_call(module: nn.Module) -> bool:
    """Whether its class does something around forward; those of torch.fx and torch.compile do not."""
    return (
        type(module).__call__ is not nn.Module.__call__
        and not isinstance(module, fx.GraphModule)
        and not hasattr(module, "_orig_mod")
    )


def runs_only_its_forward(module: nn.Module) -> bool:
    return not hooks_of(module) and "forward" not in vars(module) and not has_own_call(module)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
