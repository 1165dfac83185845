"""Tracing a copied network into a graph that computes what it does, gradients included. See Note [Tracing].

Note [Tracing]
~~~~~~~~~~~~~~
torch.fx runs a network's Python once, on proxies, and records torch's operations. Whatever else the code does is lost
or frozen, without an error. So a submodule is kept whole, and called as it is, where torch.fx cannot follow it, and

    where it has hooks                                  they may do anything, at every call
    where it computes under no_grad or autocast         the graph has no such contexts
    where it applies a torch.autograd.Function          its forward would be traced, its backward lost
    where it draws random numbers outside the graph     one draw would be served for ever

Buffers are read at every call, as parameters are, so that what the code computes from them follows ``refresh_``. An
augmented assignment is in place, as it is for a tensor.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

__all__ = ["IN_PLACE_OPERATORS", "first_line", "has_own_call", "hooks_of", "runs_only_its_forward", "trace"]

_AUGMENTED = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor")


def _augmented(name: str) -> Callable[[Any, Any], Any]:
    """The operator as a function of its own: operator.iadd is written as ``x += y`` in the code of a graph, which for
    a number changes x."""
    target = getattr(operator, name)

    def assign(left: Any, right: Any) -> Any:
        return target(left, right)

    assign.__name__ = assign.__qualname__ = name
    return assign


IN_PLACE_OPERATORS = {name: _augmented(name) for name in _AUGMENTED}


class _Proxy(fx.Proxy):
    """torch.fx's proxy, with augmented assignments: without, ``x += y`` would be x + y, which leaves the tensor x."""


def _recorded(target: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name, _operator in IN_PLACE_OPERATORS.items():
    setattr(_Proxy, f"__{_name}__", _recorded(_operator))


class _Tracer(fx.Tracer):
    """torch.fx's tracer, keeping whole the submodules whose forward it cannot follow."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.untraced: dict[str, str] = {}
        self.attributes: dict[str, fx.Proxy] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        self.attributes = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise RuntimeError("it computes under torch.no_grad")
        if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
            raise RuntimeError("it computes under torch.autocast")
        return super().create_node(*args, **kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        nodes_before = len(self.graph.nodes)
        depth = len(self.module_stack)
        path = self.path_of_module(m)
        state = _random_state()
        try:
            if hooks_of(m) and not self.is_leaf_module(m, path):
                raise RuntimeError("it has hooks")
            value = super().call_module(m, forward, args, kwargs)
            if _random_state() != state:
                raise RuntimeError("it draws random numbers")
            return value
        except Exception as error:  # the module's own code, on proxies: it may raise anything
            _set_random_state(state)
            if has_own_call(m):
                raise  # this runs inside of it; a node for the module would run it once more
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            erased = list(self.graph.nodes)[nodes_before:]
            for name in [name for name, proxy in self.attributes.items() if proxy.node in erased]:
                del self.attributes[name]
            for node in reversed(erased):
                self.graph.erase_node(node)
            self.untraced = {
                name: why for name, why in self.untraced.items() if not name.startswith(path + ".")
            }
            self.untraced[path] = first_line(error)
            return self.create_proxy("call_module", path, args, kwargs)


def trace(network: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph of the network's forward, and the submodules in it that were kept whole, with the reason."""
    if "forward" in vars(network):
        raise RuntimeError("its forward is an attribute of the instance")
    tracer = _Tracer()
    parameters = list(inspect.signature(network.forward).parameters.values())
    # Options such as return_features=False are what they are by default; only the images are variable.
    concrete = {
        p.name: p.default
        for p in parameters[1:]
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.default is not p.empty
    }
    state = _random_state()
    try:
        with torch.enable_grad(), _without_autocast(), _functions_refused():
            graph = tracer.trace(network, concrete_args=concrete or None)
        if _random_state() != state:
            raise RuntimeError("it draws random numbers")
    finally:
        _set_random_state(state)
    return fx.GraphModule(network, graph), tracer.untraced


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def _functions_refused() -> Iterator[None]:
    """For as long as it is open, a torch.autograd.Function raises when it is applied to a proxy."""
    Function = torch.autograd.Function
    original = vars(Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values())):
            raise RuntimeError(f"it applies the torch.autograd.Function {cls.__name__}")
        return original.__get__(None, cls)(*args, **kwargs)

    Function.apply = classmethod(apply)
    try:
        yield
    finally:
        Function.apply = original


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
