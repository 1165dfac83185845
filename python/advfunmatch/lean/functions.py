"""torch.autograd.Functions in a graph: called as they are, forward and backward. See Note [Tracing] in ``trace``."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["applied_function", "is_elementwise"]

# Attributes of tensors, of torch and of a Function's context that neither change a tensor nor know how it is laid out.
# fmt: off
_ELEMENTWISE = frozenset((
    "save_for_backward", "saved_tensors", "saved_variables", "needs_input_grad", "mark_non_differentiable", "detach",
    "abs", "add", "ceil", "clamp", "clamp_max", "clamp_min", "clone", "cos", "div", "erf", "exp", "floor", "log",
    "log1p", "maximum", "minimum", "mul", "neg", "pow", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sign",
    "silu", "sin", "softplus", "sqrt", "square", "sub", "tanh", "where", "zeros_like", "ones_like", "eq", "ne", "lt",
    "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "float", "double", "half", "to", "type_as", "dtype",
    "functional", "nn",
))
# fmt: on
# Instructions that change something, or bring in code that is not looked at.
_MORE = ("STORE_SUBSCR", "STORE_ATTR", "INPLACE_", "MAKE_FUNCTION", "IMPORT_")


@functools.cache
def applied_function(cls: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``cls.apply`` as a function that the code of a graph can name."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    apply.__name__ = apply.__qualname__ = f"{cls.__name__}_apply"
    apply.__module__ = cls.__module__
    apply.of_class = cls  # type: ignore[attr-defined]
    return apply


def is_elementwise(target: Any) -> bool:
    """Whether it applies a Function whose code, as far as its names show, changes no input and reads no strides."""
    cls = getattr(target, "of_class", None)
    return cls is not None and all(_only_computes(getattr(cls, name)) for name in ("forward", "backward"))


def _only_computes(function: Any) -> bool:
    if not isinstance(function, types.FunctionType) or function.__closure__:
        return False
    for instruction in dis.get_instructions(function):
        name, argument = instruction.opname, instruction.argval
        if name == "LOAD_GLOBAL":
            value = function.__globals__.get(argument)
            if not (isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] == "torch"):
                return False
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            if argument not in _ELEMENTWISE:
                return False
        elif name.startswith(_MORE) or (name == "BINARY_OP" and instruction.argrepr.endswith("=")):
            return False
    return True
