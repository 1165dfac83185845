"""Copies of networks in eval mode, whatever they are made of."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["Uncopied", "copy_of"]

# Functions, and which of them are called how.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
# An exported program's, which only refuse.
_MODE_SETTERS = ("train", "eval")


class Uncopied(nn.Module):
    """A network that cannot be copied, called as it is, in eval mode for as long as that takes."""

    def __init__(self, live: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that the live network is no submodule of this one.
        self._live = (live,)

    def forward(self, x: Tensor) -> Any:
        training = [m for m in self._live[0].modules() if getattr(m, "training", False)]
        for module in training:
            module.training = False
        try:
            return self._live[0](x)
        finally:
            for module in training:
                module.training = True


def copy_of(live: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose parameters need no gradient.

    Also where pruning or an old weight norm has left a tensor with a graph, which deepcopy refuses, and of TorchScript
    and exported programs, which have no ``eval`` or no ``requires_grad_``.
    """
    computed = {
        id(t): t.detach().clone()
        for module in live.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for t in vars(module).values()
        if isinstance(t, Tensor) and not t.is_leaf
    }
    with torch.no_grad():  # the copies that C++ makes of TorchScript's would have a graph
        network = copy.deepcopy(live, computed)
    copies = {id(module): computed[id(module)] for module in live.modules() if id(module) in computed}
    for module in live.modules():
        if isinstance(module, fx.GraphModule):  # its own deepcopy leaves them out
            mine = vars(copies[id(module)])
            mine.update({name: copy.deepcopy(vars(module)[name], computed) for name in _HOOKS})
            left_out = vars(module).keys() - mine.keys() - set(_MODE_SETTERS)
            mine.update({name: vars(module)[name] for name in left_out})
    for module in network.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if "forward" in vars(module):
            vars(module)["forward"] = _of_the_copy(vars(module)["forward"], copies)
        for name in _HOOKS:
            hooks = getattr(module, name)
            if isinstance(hooks, dict):
                hooks.update({key: _of_the_copy(hook, copies) for key, hook in hooks.items()})
    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def _of_the_copy(function: Any, copies: dict[int, Any]) -> Any:
    """The function with the copies in place of the live modules, and their methods, that it holds or names.

    deepcopy hands a function on as it is: ``forward = net.forward; net.forward = lambda x: forward((x - mean) / std)``
    would run the live network, in its own mode.
    """
    if not isinstance(function, types.FunctionType):
        return function

    def copied(value: Any) -> Any:
        if isinstance(value, types.MethodType) and id(value.__self__) in copies:
            return types.MethodType(value.__func__, copies[id(value.__self__)])
        return copies.get(id(value), value) if isinstance(value, nn.Module) else value

    def copied_cell(cell: types.CellType) -> types.CellType:
        try:
            value = cell.cell_contents
        except ValueError:  # an empty one
            return cell
        return cell if (new := copied(value)) is value else types.CellType(new)

    named = {
        name: function.__globals__[name]
        for name in function.__code__.co_names
        if name in function.__globals__
    }
    changed = {name: new for name, value in named.items() if (new := copied(value)) is not value}
    result = types.FunctionType(
        function.__code__,
        {**function.__globals__, **changed} if changed else function.__globals__,
        function.__name__,
        tuple(map(copied, function.__defaults__ or ())),
        tuple(map(copied_cell, function.__closure__ or ())),
    )
    result.__kwdefaults__ = {name: copied(v) for name, v in (function.__kwdefaults__ or {}).items()}
    vars(result).update(vars(function))
    return result
