"""A prepared graph's own backward: the gradient by the images, without an autograd graph.

Note [Reverse program]
~~~~~~~~~~~~~~~~~~~~~~
Autograd has a graph built at every forward and a gradient made, gated by ReLU and added up in passes of their own. A
prepared graph is known beforehand, needs no gradient but the images', and its layers' kernels take those passes with
them. So it is compiled into steps, one a node. Forward they keep what their gradients read; backward each takes the
gradient by its output and hands its inputs theirs:

    FoldedConv               one kernel: the gradient that the input has got from its other readers is added, and the
                             gate of the ReLU that made the input applied, where the result is written
    ScaleShiftReLU, Linear   one kernel each
    reshape, flatten, ReLU, +   what they are
    pooling, activations     their node run again, with autograd

A gradient remembers whether the gate has been applied to it, so none is applied twice. Steps hold no tensors: what a
forward keeps belongs to its caller, so two threads, or two forwards before the first's gradient, do not meet.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from afm_kernels import ops

from .checks import require_branch, require_size
from .layers import AdaptivePool, FoldedConv, ScaleShift, ScaleShiftReLU, layout_of
from .nodes import NodeFacts

__all__ = ["ReverseProgram", "Unserved"]

# Pooling and activations: cheap enough to be run again for their gradient.
_AGAIN_MODULES = (
    AdaptivePool,
    ScaleShift,
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.ReLU6, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Softplus),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
)
_AGAIN_FUNCTIONS = (
    *(F.avg_pool2d, F.adaptive_avg_pool2d, F.max_pool2d, F.relu6, F.silu, F.gelu, F.leaky_relu, F.elu),
    *(F.hardswish, F.hardsigmoid, torch.sigmoid, torch.tanh, torch.cat, torch.mean, torch.squeeze),
    *(F.linear, F.normalize),
    *(operator.add, operator.mul, operator.sub, operator.truediv, torch.add, torch.mul, torch.sub, torch.div),
)
_AGAIN_METHODS = ("mean", "squeeze", "sigmoid", "tanh", "add", "mul", "sub", "div")
_RESHAPES = ("reshape", "view", "flatten")
# Of sizes, and of numbers made from them.
_OF_SIZES = ("size", "dim")
_ATTRIBUTES = ("shape", "dtype", "device", "ndim")
_ON_NUMBERS = (
    *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
    *(
        operator.mod,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
        operator.neg,
    ),
    *(int, len, math.prod, require_branch, require_size),
)

Values = list[Any]
# By node: the gradient, and whether the gate of the ReLU that made the node's value has been applied.
Grads = dict[int, tuple[Tensor, bool]]


class Unserved(Exception):
    """Says in a few words what the graph holds that a reverse program does not."""


class ReverseProgram:
    """The compiled steps of one prepared graph. See Note [Reverse program].

    Args:
        graph_module: rewritten, in eval mode.
        live: the network it was made from.

    Raises:
        Unserved: the graph holds something else.
    """

    def __init__(self, graph_module: fx.GraphModule, live: nn.Module) -> None:
        facts = NodeFacts(graph_module, live)
        nodes = list(graph_module.graph.nodes)
        self._index = {node: i for i, node in enumerate(nodes)}
        images = [node for node in nodes if node.op == "placeholder"]
        if len(images) != 1 or any(node.kwargs for node in images):
            raise Unserved("more than one input")
        moving = {images[0]}
        self._steps: list[_Step] = []
        self.layers: list[nn.Module] = []
        output = None
        for node in nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                output = node.args[0]
                continue
            step = self._step_of(node, facts, moving)
            step.index = self._index[node]
            step.note = step.index + len(nodes)
            self._steps.append(step)
            if (module := facts.module(node)) is not None:
                self.layers += list(module.modules())
            if step.moves:
                moving.add(node)
        if not isinstance(output, fx.Node) or output not in moving:
            raise Unserved("logits that are not one tensor")
        if not any(isinstance(step, _Conv | _ScaleShiftReLU) for step in self._steps):
            raise Unserved("no layer with a kernel of its own")
        self._images, self._output, self._count = self._index[images[0]], self._index[output], len(nodes)
        self._note_what_is_kept()

    def _note_what_is_kept(self) -> None:
        """Which values each step is the last to read, of those that no gradient reads."""
        kept = {self._images, self._output}.union(*(step.kept() for step in self._steps))
        last = {index: step for step in self._steps for index in (step.index, *step.reads)}
        for index, step in last.items():
            if index not in kept:
                step.frees.append(index)

    def _step_of(self, node: fx.Node, facts: NodeFacts, moving: set[fx.Node]) -> _Step:
        module, index = facts.module(node), self._index
        reads = [each for each in node.all_input_nodes if each in moving]
        if node.kwargs.get("out") is not None or facts.is_in_place(node) or facts.is_unknown(node):
            raise Unserved(f"{_name(node, module)}, which may change its inputs")
        plain = node.op != "call_module" or facts.is_plain(node)
        if not reads:
            return _Number(node, index, module, facts.graph_module)
        tensors = [index[each] for each in reads]
        gated = {index[each] for each in reads if _is_relus(each, facts)}
        if plain and isinstance(module, FoldedConv):
            return _Conv(module, [index[each] for each in node.args], gated)
        if plain and isinstance(module, ScaleShiftReLU):
            return _ScaleShiftReLU(module, [index[each] for each in node.args])
        if plain and type(module) is nn.Linear:
            return _Linear(module, tensors)
        if facts.is_relu(node) and len(tensors) == 1:
            return _ReLU(tensors)
        if facts.is_add(node) and len(tensors) == 2:
            return _Add(tensors)
        known_sizes = (node.op == "call_method" and node.target in _OF_SIZES) or (
            node.op == "call_function" and node.target is getattr and node.args[1] in _ATTRIBUTES
        )
        if known_sizes:
            return _Number(node, index, module, facts.graph_module)
        reshapes = (
            type(module) is nn.Flatten
            or (node.op == "call_method" and node.target in _RESHAPES)
            or (node.op == "call_function" and node.target in (torch.flatten, torch.reshape))
        )
        if reshapes and plain and len(tensors) == 1:
            return _Reshape(node, index, module, facts.graph_module, tensors)
        again = (
            (plain and isinstance(module, _AGAIN_MODULES))
            or (node.op == "call_function" and node.target in _AGAIN_FUNCTIONS)
            or (node.op == "call_method" and node.target in _AGAIN_METHODS)
        )
        if again:
            return _Again(node, index, module, facts.graph_module, tensors)
        raise Unserved(_name(node, module))

    def has_hooks(self) -> bool:
        """Whether somebody has put hooks on a layer since."""
        return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self.layers)

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Values]:
        """The logits, and what ``backward`` takes: a value and a note for each node, None where it is not needed."""
        values: Values = [None] * (2 * self._count)
        values[self._images] = x
        for step in self._steps:
            values[step.index] = step.forward(values)
            for index in step.frees:
                values[index] = None
        return values[self._output], values

    @torch.no_grad()
    def backward(self, values: Values, grad: Tensor) -> Tensor:
        """The gradient by the images from that by the logits; it may be ``grad`` itself. Changes none of ``values``."""
        grads: Grads = {self._output: (grad, False)}
        for step in reversed(self._steps):
            if step.moves and step.index in grads:
                step.backward(values, *grads.pop(step.index), grads)
        return grads[self._images][0]


class _Step:
    """One node: its value from others, and its inputs' gradients from its own."""

    moves = True
    index: int  # of its value
    note: int  # of what it writes down for its gradient besides: sizes

    def __init__(self, reads: list[int]) -> None:
        self.reads = reads
        self.frees: list[int] = []

    def kept(self) -> set[int]:
        """The values that ``backward`` reads."""
        return set()

    def forward(self, values: Values) -> Any:
        raise NotImplementedError

    def backward(self, values: Values, grad: Tensor, is_gated: bool, grads: Grads) -> None:
        raise NotImplementedError


def _add_to(grads: Grads, index: int, grad: Tensor, is_gated: bool = False) -> None:
    if index in grads:
        other, other_gated = grads[index]
        grad, is_gated = other + grad, is_gated and other_gated
    grads[index] = grad, is_gated


class _Conv(_Step):
    """A FoldedConv. The value of a node that no tensor depends on counts too: its kernel is chosen by what comes in."""

    def __init__(self, layer: FoldedConv, reads: list[int], gated: set[int]) -> None:
        super().__init__(reads)
        self.layer = layer
        self.x_gates = reads[0] in gated

    def kept(self) -> set[int]:
        return {self.reads[0], *([self.index] if self.layer.relu else [])}

    def forward(self, values: Values) -> Tensor:
        x = values[self.reads[0]]
        residual = values[self.reads[1]] if len(self.reads) > 1 else None
        values[self.note] = None if residual is None else _like(residual)
        kernel = self.layer.kernel_for(x, residual)
        return self.layer(x, residual) if kernel is None else self.layer.compute(kernel, x, residual)

    def backward(self, values: Values, grad: Tensor, is_gated: bool, grads: Grads) -> None:
        layer, x = self.layer, values[self.reads[0]]
        gate = values[self.index] if layer.relu and not is_gated else None
        like = x if gate is None else gate
        grad = grad.contiguous(memory_format=layout_of(like))
        kernel = layer.kernel_for(x, None)
        if len(self.reads) > 1:
            if gate is not None:
                grad, gate = torch.ops.aten.threshold_backward(grad, gate, 0), None
            _add_to(grads, self.reads[1], _summed_to(grad, values[self.note]))
        added, _ = grads.pop(self.reads[0], (None, False))
        if added is not None:
            added = added.contiguous(memory_format=layout_of(x))
        grad_x = layer.input_grad(kernel, grad, x, gate, added, self.x_gates)
        grads[self.reads[0]] = grad_x, self.x_gates


class _ScaleShiftReLU(_Step):
    def __init__(self, layer: ScaleShiftReLU, reads: list[int]) -> None:
        super().__init__(reads)
        self.layer = layer

    def kept(self) -> set[int]:
        return {self.index}

    def forward(self, values: Values) -> Tensor:
        return self.layer(*(values[i] for i in self.reads))

    def backward(self, values: Values, grad: Tensor, is_gated: bool, grads: Grads) -> None:
        output = values[self.index]
        wrt_residual = len(self.reads) > 1
        backward = ops.kernel("scale_shift_relu_backward", output.device.type)
        grad_x, grad_residual = backward(grad, output, self.layer.scale, True, wrt_residual)
        if wrt_residual:
            _add_to(grads, self.reads[1], grad_residual)
        if self.reads[0] in grads:
            other, _ = grads.pop(self.reads[0])
            grad_x.add_(other)
        grads[self.reads[0]] = grad_x, False


class _Linear(_Step):
    def __init__(self, layer: nn.Linear, reads: list[int]) -> None:
        super().__init__(reads)
        self.layer = layer

    def forward(self, values: Values) -> Tensor:
        return self.layer(values[self.reads[0]])

    def backward(self, values: Values, grad: Tensor, is_gated: bool, grads: Grads) -> None:
        _add_to(grads, self.reads[0], grad @ self.layer.weight)


class _ReLU(_Step):
    def kept(self) -> set[int]:
        return {self.index}

    def forward(self, values: Values) -> Tensor:
        return F.relu(values[self.reads[0]])

    def backward(self, values: Values, grad: Tensor, is_gated: bool, grads: Grads) -> None:
        if not is_gated:
            grad = torch.ops.aten.threshold_backward(grad, values[self.index], 0)
        _add_to(grads, self.reads[0], grad)


class _Add(_Step):
    def forward(self, values: Values) -> Tensor:
        left, right = (values[i] for i in self.reads)
        values[self.note] = _like(left), _like(right)
        return left + right

    def backward(self, values: Values, grad: Tensor, is_gated: bool, grads: Grads) -> None:
        for index, like in zip(self.reads, values[self.note], strict=True):
            _add_to(grads, index, _summed_to(grad, like))


class _Called(_Step):
    """A node as its graph calls it."""

    def __init__(
        self,
        node: fx.Node,
        index: dict[fx.Node, int],
        module: nn.Module | None,
        owner: nn.Module,
        reads: list[int] | None = None,
    ) -> None:
        super().__init__([index[each] for each in node.all_input_nodes])
        self.tensors = reads or []
        self.args, self.kwargs = _mapped((node.args, node.kwargs), fx.Node, lambda each: _Value(index[each]))
        self.function: Any = module if module is not None else node.target
        if node.op == "call_method":
            self.function = _method(str(node.target))
        if node.op == "get_attr":
            self.function, self.args = operator.attrgetter(str(node.target)), (owner,)

    def call(self, values: Values) -> Any:
        args, kwargs = _mapped((self.args, self.kwargs), _Value, lambda each: values[each.index])
        return self.function(*args, **kwargs)

    def forward(self, values: Values) -> Any:
        return self.call(values)


class _Number(_Called):
    """What no gradient goes through: sizes, numbers made of them, and the network's constants."""

    moves = False


class _Reshape(_Called):
    def forward(self, values: Values) -> Tensor:
        values[self.note] = values[self.tensors[0]].shape
        return self.call(values)

    def backward(self, values: Values, grad: Tensor, is_gated: bool, grads: Grads) -> None:
        _add_to(grads, self.tensors[0], grad.reshape(values[self.note]))


class _Again(_Called):
    """Run again for its gradient, with autograd."""

    def kept(self) -> set[int]:
        return set(self.reads)

    def backward(self, values: Values, grad: Tensor, is_gated: bool, grads: Grads) -> None:
        leaves = {i: values[i].detach().requires_grad_(True) for i in self.tensors}
        given = [leaves.get(i, value) for i, value in enumerate(values)]
        with torch.enable_grad():
            out = self.call(given)
        if len(leaves) == 1 and out is leaves[self.tensors[0]]:  # a pooling that has nothing to do
            return _add_to(grads, self.tensors[0], grad)
        for index, grad_x in zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True):
            _add_to(grads, index, grad_x)


class _Value:
    """The place of a node's value among a call's arguments."""

    def __init__(self, index: int) -> None:
        self.index = index


def _mapped(argument: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The arguments of a call with all that is of a kind replaced, in tuples, lists, dictionaries and slices too."""
    if isinstance(argument, kind):
        return function(argument)
    if isinstance(argument, list):
        return [_mapped(each, kind, function) for each in argument]
    if isinstance(argument, tuple):
        return tuple(_mapped(each, kind, function) for each in argument)
    if isinstance(argument, dict):
        return {key: _mapped(each, kind, function) for key, each in argument.items()}
    if isinstance(argument, slice):
        return slice(
            *(_mapped(each, kind, function) for each in (argument.start, argument.stop, argument.step))
        )
    return argument


def _method(name: str) -> Callable[..., Any]:
    def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor, name)(*args, **kwargs)

    return call


def _is_relus(node: fx.Node, facts: NodeFacts) -> bool:
    """Whether the node's value is a ReLU's output."""
    module = facts.module(node)
    if isinstance(module, FoldedConv):
        return module.relu
    return isinstance(module, ScaleShiftReLU) or facts.is_relu(node)


def _like(t: Tensor) -> tuple[torch.Size, torch.dtype]:
    return t.shape, t.dtype


def _summed_to(grad: Tensor, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    """The gradient of what was broadcast in an addition."""
    shape, dtype = like
    return (grad if grad.shape == shape else grad.sum_to_size(shape)).to(dtype)


def _name(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return type(module).__name__
    return str(getattr(node.target, "__name__", node.target))
