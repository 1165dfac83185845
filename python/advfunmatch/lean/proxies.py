"""The proxies that a network is traced with, and what of torch must know them. See Note [Tracing] in ``trace``."""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import importlib
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from .effects import TensorWritten, functions_of
from .functions import applied_function

__all__ = [
    "IN_PLACE_OPERATORS",
    "Proxy",
    "attribute_or_method",
    "is_tensor",
    "refuse_write",
    "torch_patched",
    "writes_to_its_first",
]

_AUGMENTED = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor")
_NO_TENSORS = (
    "shape",
    "size",
    "dim",
    "ndim",
    "numel",
    "dtype",
    "device",
    "requires_grad",
    "is_cuda",
    "stride",
    "item",
    "tolist",
)
# Whose code must know a proxy for what it is.
_ASKING_OF_PROXIES = ("torch.", __package__)
_FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "full", "empty", "arange", "linspace", "eye")
# Operations whose output is memory of its own; of another, an operation in place may be a write to its input.
# fmt: off
_FRESH = frozenset((
    "add", "sub", "mul", "div", "truediv", "pow", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "clamp",
    "matmul", "mm", "bmm", "einsum", "mean", "sum", "var", "std", "norm", "normalize", "clone",
    "zeros_like", "ones_like", "linear", "conv2d", "batch_norm", "relu", "sigmoid", "tanh", "softmax", "log_softmax",
))
# fmt: on


def _augmented(name: str) -> Callable[[Any, Any], Any]:
    """The operator as a function of its own: operator.iadd is written as ``x += y`` in the code of a graph, which for
    a number changes x."""
    target = getattr(operator, name)

    def assign(left: Any, right: Any) -> Any:
        return target(left, right)

    assign.__name__ = assign.__qualname__ = name
    return assign


IN_PLACE_OPERATORS = {name: _augmented(name) for name in _AUGMENTED}


class Proxy(fx.Proxy):
    """torch.fx's proxy, with augmented assignments: without, ``x += y`` would be x + y, which leaves the tensor x.

    And without assignments to its attributes, which would reach no tensor.
    """

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PROXYS_OWN:
            object.__setattr__(self, name, value)
        elif name == "data" and self.node.op == "get_attr" and _PLAIN_ISINSTANCE(value, fx.Proxy):
            self.tracer.assign(self.node, value)  # type: ignore[attr-defined]
        else:
            refuse_write(self.node)
            raise RuntimeError(f"it sets the attribute {name} of a tensor")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        length = self.tracer.length_of_shape(self.node)  # type: ignore[attr-defined]
        return super().__len__() if length is None else int(length)

    def __iter__(self) -> Iterator[fx.Proxy]:
        length = self.tracer.length_of_shape(self.node)  # type: ignore[attr-defined]
        if length is None and (length := _names_unpacked(sys._getframe(1))) is None:
            return self.tracer.iter(self)
        return iter([self[index] for index in range(length)])  # type: ignore[index]

    def __index__(self) -> int:
        if (known := self.tracer.known_size(self.node)) is None:  # type: ignore[attr-defined]
            raise TypeError("it needs a size of the images as a number")
        return int(known)

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        return _computed_or_recorded(
            orig_method,
            args or (),
            kwargs or {},
            lambda: super(Proxy, cls).__torch_function__(orig_method, types, args, kwargs),
        )


class _Attribute(Proxy, fx.proxy.Attribute):
    """``x.name``: a node of its own only where it is not called."""


_PROXYS_OWN = ("tracer", "node", "root", "attr", "_node")


def _recorded(target: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name, _operator in IN_PLACE_OPERATORS.items():
    setattr(Proxy, f"__{_name}__", _recorded(_operator))


def _names_unpacked(frame: types.FrameType) -> int | None:
    """How many names are to be assigned to where the frame is, as in ``a, b = x``; None where it unpacks nothing."""
    here = next(each for each in dis.get_instructions(frame.f_code) if each.offset >= frame.f_lasti)
    return here.argval if here.opname == "UNPACK_SEQUENCE" else None


def is_grad_enabled() -> bool:
    """torch's own, under a name that is not replaced while a network is traced."""
    return torch.is_grad_enabled()


def is_tensor(node: fx.Node) -> bool:
    """Whether the node is a tensor, rather than a size, a dtype or what is computed from those."""
    name, owner = attribute_or_method(node)
    if owner is not None:
        return name not in _NO_TENSORS
    if node.target is is_grad_enabled:
        return False
    if node.op == "call_function" and getattr(node.target, "__module__", None) in ("_operator", "builtins"):
        return any(is_tensor(argument) for argument in node.args if isinstance(argument, fx.Node))
    return True


def attribute_or_method(node: Any) -> tuple[str, Any]:
    """The name and the owner, if the node is ``owner.name`` or ``owner.name(...)``."""
    if not isinstance(node, fx.Node) or not node.args:
        return "", None
    if node.op == "call_method":
        return str(node.target), node.args[0]
    if node.op == "call_function" and node.target is getattr:
        return str(node.args[1]), node.args[0]
    return "", None


def writes_to_its_first(kind: str, target: Any, kwargs: dict[str, Any]) -> bool:
    if kind not in ("call_method", "call_function"):
        return False
    name = getattr(target, "__name__", str(target))
    return (
        (name.endswith("_") and not name.endswith("__"))
        or target in (*IN_PLACE_OPERATORS.values(), operator.setitem)
        or kwargs.get("inplace") is True
    )


def refuse_write(node: Any) -> None:
    """TensorWritten if the node may be a tensor of the network, or a view of one, or several of which one is."""
    if isinstance(node, list | tuple):
        for each in node:
            refuse_write(each)
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            raise TensorWritten(str(node.target))
        name = getattr(node.target, "__name__", node.target)
        if node.op not in ("call_function", "call_method") or name in _FRESH or not node.args:
            return
        node = node.args[0]


@contextlib.contextmanager
def torch_patched(network: nn.Module, tracer: Any) -> Iterator[None]:
    """For as long as it is open, a torch.autograd.Function that is applied to a proxy is recorded, the functions that
    make tensors of sizes, devices and dtypes take proxies for these, as do len, min, max, int and float, and isinstance
    tells a network's code that a proxy is a tensor. (By its __class__ it must not be one: C++ would read its memory as
    a tensor's.)

    What the network's code holds under a name, of Functions and of Tensor's methods, is seen through there. Whether
    gradients are enabled is a question to the graph's own caller.
    """
    # torch.compile notes the ids of builtins as it is imported, which the first call of many a function does: it would
    # take what stands in their place here for them, and break at every len and isinstance afterwards.
    importlib.import_module("torch._dynamo")
    Function = torch.autograd.Function
    original = vars(Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        for argument in tree_leaves((args, kwargs)):
            if isinstance(argument, fx.Proxy):
                return argument.tracer.create_proxy("call_function", applied_function(cls), args, kwargs)
        return original.__get__(None, cls)(*args, **kwargs)

    grad_enabled = torch.is_grad_enabled

    def asked() -> Any:
        if str(sys._getframe(1).f_globals.get("__name__")).startswith(_ASKING_OF_PROXIES):
            return grad_enabled()
        return tracer.create_proxy("call_function", is_grad_enabled, (), {})

    places = [
        (place, key, _seen_through(value, apply) if replacement is None else replacement)
        for place, key, value, replacement in _names_in_reach(network)
    ]
    factories = {name: getattr(torch, name) for name in _FACTORIES}
    builtins.isinstance = _isinstance
    for name in _OF_SIZES:
        setattr(builtins, name, _taking_sizes(_PLAIN[name]))
    torch.is_grad_enabled = asked
    before = [_put(place, key, new) for place, key, new in places if new is not None]
    Function.apply = classmethod(apply)
    for name, factory in factories.items():
        setattr(torch, name, _taking_proxies(factory))
    try:
        yield
    finally:
        builtins.isinstance = _PLAIN_ISINSTANCE
        for name in _OF_SIZES:
            setattr(builtins, name, _PLAIN[name])
        for place, key, old in reversed(before):
            _put(place, key, old)
        torch.is_grad_enabled = grad_enabled
        Function.apply = original
        for name, factory in factories.items():
            setattr(torch, name, factory)


_PLAIN_ISINSTANCE = isinstance
_OF_SIZES = ("len", "min", "max")
_PLAIN = {name: getattr(builtins, name) for name in _OF_SIZES}


def _taking_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A builtin that records what it does to sizes; len of a tensor is its first one."""

    def take(*args: Any, **kwargs: Any) -> Any:
        found = next((each for each in args if issubclass(type(each), Proxy)), None)
        if found is None or str(sys._getframe(1).f_globals.get("__name__")).startswith(_ASKING_OF_PROXIES):
            return function(*args, **kwargs)
        if function is _PLAIN["len"]:
            return found.shape[0] if is_tensor(found.node) else function(found)
        if any(issubclass(type(each), Proxy) and is_tensor(each.node) for each in args):
            return function(*args, **kwargs)
        return found.tracer.create_proxy("call_function", function, args, kwargs)

    return take


class _Number(type):
    """int or float for a network's code: of a size it is recorded."""

    real: type

    def __call__(cls, *args: Any) -> Any:
        if args and issubclass(type(args[0]), Proxy) and not is_tensor(args[0].node):
            known = args[0].tracer.known_size(args[0].node)
            return (
                cls.real(known)
                if known is not None
                else args[0].tracer.create_proxy("call_function", cls.real, args, {})
            )
        return cls.real(*args)

    def __instancecheck__(cls, value: Any) -> bool:
        return _PLAIN_ISINSTANCE(value, cls.real)


_NUMBERS = {kind.__name__: _Number(kind.__name__, (), {"real": kind}) for kind in (int, float)}


def _names_in_reach(network: nn.Module) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Where a network's code keeps what it calls: the place, the key there, the value, and what replaces any."""
    seen: set[int] = set()
    for function in {f for module in network.modules() for f in functions_of(module)}:
        for name, kind in _NUMBERS.items():
            if name in function.__code__.co_names and name not in function.__globals__:
                yield function.__globals__, name, None, kind
        named = (
            (function.__globals__, name)
            for name in function.__code__.co_names
            if name in function.__globals__
        )
        cells = ((cell, None) for cell in function.__closure__ or ())
        defaults = ((function.__kwdefaults__ or {}, name) for name in function.__kwdefaults__ or {})
        for place, key in (*named, *cells, *defaults):
            yield from _below(place, key, seen)
    for module in network.modules():
        for key in vars(module):
            if not key.startswith("_"):
                yield from _below(vars(module), key, seen)


def _below(place: Any, key: Any, seen: set[int]) -> Iterator[tuple[Any, Any, Any, Any]]:
    try:
        value = place.cell_contents if _PLAIN_ISINSTANCE(place, types.CellType) else place[key]
    except ValueError:  # an empty cell
        return
    yield place, key, value, None
    if _PLAIN_ISINSTANCE(value, dict) and id(value) not in seen and len(value) < _FEW:
        seen.add(id(value))
        yield from ((value, name, each, None) for name, each in value.items())


_FEW = 100  # entries of a table of functions
_ABSENT = object()


def _put(place: Any, key: Any, new: Any) -> tuple[Any, Any, Any]:
    """Replace what is there; returns how to undo that."""
    if _PLAIN_ISINSTANCE(place, types.CellType):
        old, place.cell_contents = place.cell_contents, new
    else:
        old = place.get(key, _ABSENT)
        if new is _ABSENT:
            del place[key]
        else:
            place[key] = new
    return place, key, old


def _seen_through(value: Any, apply: Callable[..., Any]) -> Any:
    """A Function's ``apply`` or a method of Tensor, in a form that takes proxies; None for anything else."""
    owner = getattr(value, "__self__", None)
    if (
        _PLAIN_ISINSTANCE(value, types.MethodType | types.BuiltinMethodType)
        and _PLAIN_ISINSTANCE(owner, type)
        and issubclass(owner, torch.autograd.Function)  # type: ignore[arg-type]
        and value.__name__ == "apply"
    ):
        return functools.partial(apply, owner)
    if _PLAIN_ISINSTANCE(value, types.MethodDescriptorType) and value.__objclass__ in torch.Tensor.__mro__:
        name = value.__name__
        return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)
    return None


def _isinstance(value: Any, classes: Any) -> bool:
    if _PLAIN_ISINSTANCE(value, classes):
        return True
    if not issubclass(type(value), Proxy):
        return False
    module = str(sys._getframe(1).f_globals.get("__name__"))
    wanted = classes if _PLAIN_ISINSTANCE(classes, tuple) else get_args(classes) or (classes,)
    return torch.Tensor in wanted and not module.startswith(_ASKING_OF_PROXIES) and is_tensor(value.node)


def _taking_proxies(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return _computed_or_recorded(factory, args, kwargs, None)

    return make


def _computed_or_recorded(
    function: Callable[..., Any], args: Any, kwargs: Any, record: Callable[[], Any] | None
) -> Any:
    """The call's result, where its proxies stand for what is known; else the proxy of a node for it."""
    tracer: Any = next((a.tracer for a in tree_leaves((args, kwargs)) if isinstance(a, fx.Proxy)), None)
    if tracer is None:
        return function(*args, **kwargs)
    if (value := tracer.computed(function, args, kwargs)) is not None:
        return value
    return record() if record else tracer.create_proxy("call_function", function, args, kwargs)
