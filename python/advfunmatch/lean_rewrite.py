"""Tracing a network, and rewriting its graph into prepared layers. See Note [Folding] in ``lean``."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .lean_layers import AdaptivePool, BatchNormSource, FoldedConv, ScaleShiftReLU, symmetric_padding

__all__ = ["Rewriter", "first_line", "trace"]


_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ipow")
# Modules whose output is memory of its own, so that an in-place operation on it changes nothing else.
_FRESH_MODULES = (
    nn.Conv2d,
    nn.modules.batchnorm._BatchNorm,
    nn.Linear,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)


class _Tracer(fx.Tracer):
    """torch.fx's tracer, keeping whole the submodules whose forward it cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.untraced: dict[str, str] = {}

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        nodes_before = len(self.graph.nodes)
        depth = len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # the module's own code, on proxies: it may raise anything
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            for node in reversed(list(self.graph.nodes)[nodes_before:]):
                self.graph.erase_node(node)
            path = self.path_of_module(m)
            self.untraced = {
                name: why for name, why in self.untraced.items() if not name.startswith(path + ".")
            }
            self.untraced[path] = first_line(error)
            return self.create_proxy("call_module", path, args, kwargs)


def trace(network: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    tracer = _Tracer()
    parameters = list(inspect.signature(network.forward).parameters.values())
    # Options such as return_features=False are what they are by default; only the images are variable.
    concrete = {
        p.name: p.default
        for p in parameters[1:]
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.default is not p.empty
    }
    graph = tracer.trace(network, concrete_args=concrete or None)
    return fx.GraphModule(network, graph), tracer.untraced


class Rewriter:
    """Applies Note [Folding] to one traced graph.

    Attributes:
        folded: the names of the BatchNorms that went into a convolution.
        fused: the names of those that went into a scale_shift_relu.
        left: what stayed as it was, a sentence each.
    """

    def __init__(self, graph_module: fx.GraphModule, live: nn.Module) -> None:
        self.folded: list[str] = []
        self.fused: list[str] = []
        self.left: list[str] = []
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.live = live
        self.modules = dict(graph_module.named_modules(remove_duplicate=False))

    def run(self) -> None:
        self.drop_what_eval_mode_ignores()
        self.make_in_place_operations_ordinary()
        for node in list(self.graph.nodes):
            if self.is_relu(node):
                self.fuse_relu(node)
        for node in list(self.graph.nodes):
            if self.is_add(node):
                self.fuse_add(node)
        for node in list(self.graph.nodes):
            conv = self.conv_below(node)
            if conv is not None and conv is not node:
                self.replace(node, self.folded_conv(node, relu=False), (conv.args[0],))
            elif (
                isinstance(pool := self.module(node), nn.AdaptiveAvgPool2d)
                and len(node.args) == 1
                # Where it has nothing to do it hands on its input, which must not be changed in place then.
                and not any(self.is_in_place(user) for user in node.users)
            ):
                self.replace(node, AdaptivePool(pool.output_size), node.args)
        self.remove_dead_code()
        for node in self.graph.nodes:
            if self.is_batch_norm(node):
                self.left.append(f"BatchNorm {self.name_of(node)}, which no convolution or ReLU could take")
        self.graph_module.delete_all_unused_submodules()
        self.graph_module.recompile()

    # -- making the graph simpler without changing it

    def drop_what_eval_mode_ignores(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target is torch._assert:
                self.graph.erase_node(node)
            elif (
                isinstance(self.module(node), (nn.Identity, nn.modules.dropout._DropoutNd))
                or self.is_idle_dropout(node)
            ) and isinstance(node.args[0] if node.args else None, fx.Node):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        self.remove_dead_code()

    @staticmethod
    def is_idle_dropout(node: fx.Node) -> bool:
        return (
            node.op == "call_function"
            and node.target in (F.dropout, F.dropout2d)
            and (node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)) is False
        )

    def make_in_place_operations_ordinary(self) -> None:
        """Later readers of what an in-place operation changed read its result, which is the same tensor.

        Where that tensor has memory of its own, a ReLU or an addition then need not be in place any more.
        """
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        for node in list(self.graph.nodes):
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or not self.is_in_place(node):
                continue
            for user in list(source.users):
                if order[user] > order[node]:
                    user.replace_input_with(source, node)
            if not self.owns_its_memory(source):
                continue
            if self.is_relu(node):
                node.op, node.target, node.args, node.kwargs = "call_function", F.relu, (source,), {}
            elif self.is_add(node):
                node.op, node.target, node.kwargs = "call_function", operator.add, {}

    def is_in_place(self, node: fx.Node) -> bool:
        """Whether the operation changes its first argument and returns it."""
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_") and not str(node.target).endswith("__")
        if node.op != "call_function":
            return False
        name = getattr(node.target, "__name__", "")
        if node.target in _RELU_FUNCTIONS and len(node.args) > 1 and node.args[1] is True:
            return True
        return name in _IN_PLACE_OPERATORS or name.endswith("_") or node.kwargs.get("inplace") is True

    def remove_dead_code(self) -> None:
        """What nothing reads and nothing feels: not an in-place operation on a view, nor a module of unknown code."""

        def is_impure(node: fx.Node) -> bool:
            module = self.module(node)
            unknown = module is not None and not type(module).__module__.startswith(
                ("torch.nn", FoldedConv.__module__)
            )
            return node.is_impure() or unknown or self.is_in_place(node) or node.target is operator.setitem

        self.graph.eliminate_dead_code(is_impure)

    def owns_its_memory(self, node: Any) -> bool:
        if not isinstance(node, fx.Node) or self.is_relu(node) or self.is_add(node):
            return isinstance(node, fx.Node)
        return isinstance(self.module(node), _FRESH_MODULES) or (
            node.op == "call_function" and node.target in (F.conv2d, F.batch_norm, torch.cat)
        )

    # -- the three rules of Note [Folding]

    def fuse_relu(self, relu: fx.Node) -> None:
        source = relu.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            return
        main, residual = self.split_add(source) if self.is_add(source) else (source, None)
        conv = self.conv_below(main)
        if main is not None and conv is not None:
            replacement: nn.Module = self.folded_conv(main, relu=True)
            inputs = (conv.args[0],)
        elif main is not None and self.is_batch_norm(main) and len(main.users) == 1:
            replacement = ScaleShiftReLU(self.batch_norm_source(main))
            self.fused.append(self.name_of(main))
            inputs = (main.args[0],)
        else:
            return
        self.replace(relu, replacement, inputs if residual is None else (*inputs, residual))

    def fuse_add(self, add: fx.Node) -> None:
        main, residual = self.split_add(add)
        conv = self.conv_below(main)
        if main is not None and conv is not None:
            self.replace(add, self.folded_conv(main, relu=False), (conv.args[0], residual))

    def split_add(self, add: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The operand that ends in a foldable chain, and the other. Of two, the one computed last."""
        left, right = add.args[:2]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
            return None, None
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        candidates = [
            node
            for node in (left, right)
            if len(node.users) == 1 and (self.conv_below(node) is not None or self.is_batch_norm(node))
        ]
        # A convolution before a lone BatchNorm: it takes its own BatchNorm along.
        candidates.sort(key=lambda node: (self.conv_below(node) is not None, order[node]))
        if not candidates:
            return None, None
        main = candidates[-1]
        return main, right if main is left else left

    def conv_below(self, node: fx.Node | None) -> fx.Node | None:
        """The convolution that ``node`` is, or that the BatchNorm ``node`` can be folded into."""
        if node is None:
            return None
        if self.is_conv(node):
            return node
        if self.is_batch_norm(node):
            below = node.args[0]
            if isinstance(below, fx.Node) and self.is_conv(below) and len(below.users) == 1:
                return below
        return None

    def folded_conv(self, node: fx.Node, relu: bool) -> FoldedConv:
        conv = self.conv_below(node)
        assert conv is not None
        source = self.batch_norm_source(node) if node is not conv else None
        live = self.live.get_submodule(str(conv.target))
        layer = FoldedConv(self.modules[str(conv.target)], live, source, relu)  # type: ignore[arg-type]
        if source is not None:
            self.folded.append(self.name_of(node))
        return layer

    def replace(self, node: fx.Node, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        name = f"lean_{sum(1 for _ in self.graph_module.children())}"
        self.graph_module.add_submodule(name, module)
        self.modules[name] = module
        with self.graph.inserting_before(node):
            new = self.graph.call_module(name, inputs)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.remove_dead_code()

    # -- what a node is

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in _RELU_FUNCTIONS

    def is_add(self, node: fx.Node) -> bool:
        if len(node.args) != 2 or node.kwargs:
            return False
        if node.op == "call_method":
            return node.target in ("add", "add_")
        return node.op == "call_function" and node.target in _ADD_FUNCTIONS

    def is_conv(self, node: fx.Node) -> bool:
        module = self.module(node)
        return (
            isinstance(module, nn.Conv2d)
            and type(module).forward is nn.Conv2d.forward
            and module.padding_mode == "zeros"
            and not _has_hooks(module)
            and len(node.args) == 1
            and not (isinstance(module.padding, str) and symmetric_padding(module) is None)
        )

    def is_batch_norm(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return (
                isinstance(module, nn.modules.batchnorm._BatchNorm)
                and type(module).forward is nn.modules.batchnorm._BatchNorm.forward
                and module.running_mean is not None
                and not _has_hooks(module)
            )
        return (
            node.op == "call_function"
            and node.target is F.batch_norm
            and self.batch_norm_arguments(node) is not None
        )

    def batch_norm_arguments(self, node: fx.Node) -> dict[str, Any] | None:
        """F.batch_norm's arguments by name, where its tensors are attributes and its mode is eval."""
        arguments = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        arguments.apply_defaults()
        values = arguments.arguments
        for name in ("running_mean", "running_var", "weight", "bias"):
            value = values[name]
            optional = name in ("weight", "bias")
            if not ((value is None and optional) or (isinstance(value, fx.Node) and value.op == "get_attr")):
                return None
        return None if values["training"] is not False or values["input"] is not node.args[0] else values

    def batch_norm_source(self, node: fx.Node) -> BatchNormSource:
        module = self.module(node)
        if module is not None:
            live = self.live.get_submodule(str(node.target))
            names = ("running_mean", "running_var", "weight", "bias")
            places = [None if getattr(live, name) is None else (live, name) for name in names]
            return BatchNormSource(places, module.eps)  # type: ignore[arg-type]
        values = self.batch_norm_arguments(node)
        assert values is not None
        places = []
        for name in ("running_mean", "running_var", "weight", "bias"):
            if values[name] is None:
                places.append(None)
                continue
            owner, _, attribute = str(values[name].target).rpartition(".")
            places.append((self.live.get_submodule(owner), attribute))
        return BatchNormSource(places, values["eps"])

    def name_of(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        values = self.batch_norm_arguments(node)
        assert values is not None
        return str(values["running_mean"].target).rpartition(".")[0]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
