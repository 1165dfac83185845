"""Rewriting a traced network's graph into prepared layers. See Note [Folding] in ``lean``.

Note [Names of memory]
~~~~~~~~~~~~~~~~~~~~~~
An operation in place changes every tensor that shares its memory, and a prepared layer reads its inputs where the
last of the layers it stands for did. So a write decides what may be rewritten:

    to memory that is only read under the one name      an ordinary operation, or harmless
    to an input of a layer, before a layer after it     the two are not fused
    to memory that may have other names, or by code     the network stays in contiguous format, where a reshape
    that is not torch's and may do anything             shares memory exactly where the live network's does
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .layers import AdaptivePool, BatchNormSource, FoldedConv, ScaleShiftReLU, symmetric_padding
from .proxies import IN_PLACE_OPERATORS
from .trace import hooks_of, runs_only_its_forward

__all__ = ["Rewriter"]


_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
_ADD_FUNCTIONS = (operator.add, IN_PLACE_OPERATORS["iadd"], torch.add)
# Modules and functions whose output is memory of its own, so that an in-place operation on it changes nothing else.
_FRESH_MODULES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Linear,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.LeakyReLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    FoldedConv,
    ScaleShiftReLU,
)
_FRESH_FUNCTIONS = (
    *_RELU_FUNCTIONS,
    *(F.relu6, F.silu, F.gelu, F.leaky_relu, F.elu, F.hardswish),
    *(F.conv2d, F.batch_norm, F.avg_pool2d, torch.cat),
)
# Fresh where an operand is a tensor; sizes are added and multiplied too.
_ARITHMETIC = (
    *_ADD_FUNCTIONS,
    *(operator.sub, operator.mul, operator.truediv, torch.sub, torch.mul, torch.div),
)
_IDLE_IN_EVAL_MODE = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_OWN_CODE = ("torch.nn.", FoldedConv.__module__)
_KNOWN_FUNCTIONS = ("torch", "torchvision", "_operator", "builtins", "math", __package__.partition(".")[0])
# Methods whose answer depends on the strides of an activation.
_LAYOUT_METHODS = ("as_strided", "as_strided_", "stride", "is_contiguous", "untyped_storage", "data_ptr")


class Rewriter:
    """Applies Note [Folding] to one traced graph.

    Attributes:
        folded: the names of the BatchNorms that went into a convolution.
        fused: the names of those that went into a scale_shift_relu.
        left: what stayed as it was, a sentence each.
        needs_contiguous: whether something in the graph depends on the memory format of the activations.
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
        self.make_keyword_inputs_positional()
        self.drop_what_eval_mode_ignores()
        self.make_in_place_operations_ordinary()
        self.make_views_reshapes()
        writes = any(self.writes_shared_memory(node) for node in self.graph.nodes)
        self.needs_contiguous = writes or any(self.depends_on_layout(node) for node in self.graph.nodes)
        for node in list(self.graph.nodes):
            if self.is_relu(node):
                self.fuse_relu(node)
        for node in list(self.graph.nodes):
            if self.is_add(node):
                self.fuse_add(node)
        for node in list(self.graph.nodes):
            conv = self.conv_below(node)
            if conv is not None and conv is not node:
                if self.nothing_writes_between(conv, node, conv.args[0]):
                    self.replace(node, self.folded_conv(node, relu=False), (conv.args[0],))
            elif (
                isinstance(pool := self.module(node), nn.AdaptiveAvgPool2d)
                and self.is_plain(node)
                and len(node.args) == 1
                # Where it has nothing to do it hands on its input, which must not be changed in place then.
                and not writes
                and not any(self.is_in_place(user) for user in (*node.users, *_users(node.args[0])))
            ):
                self.replace(node, AdaptivePool(pool.output_size), node.args)
        self.remove_dead_code()
        for node in self.graph.nodes:
            if self.is_batch_norm(node):
                self.left.append(f"BatchNorm {self.name_of(node)}, which no convolution or ReLU could take")
        self.graph_module.delete_all_unused_submodules()
        self.graph_module.recompile()
        # torch.fx's own __call__ prints a traceback to stderr before an error leaves the network.
        type(self.graph_module).__call__ = nn.Module.__call__  # type: ignore[method-assign]

    # -- making the graph simpler without changing it

    def make_keyword_inputs_positional(self) -> None:
        """``relu(input=x)`` as ``relu(x)``, of what the rules below look at."""
        known = (*_RELU_FUNCTIONS, *_ADD_FUNCTIONS, F.batch_norm, F.dropout, F.dropout2d)
        for node in self.graph.nodes:
            if not (
                (node.op == "call_function" and node.target in known)
                or (self.is_plain(node) and isinstance(self.module(node), _FRESH_MODULES))
            ):
                continue
            names = ("input", "other") if node.target in _ADD_FUNCTIONS else ("input",)
            kwargs = dict(node.kwargs)
            for position, name in enumerate(names):
                if len(node.args) == position and name in kwargs:
                    node.args = (*node.args, kwargs.pop(name))
            node.kwargs = kwargs

    def make_views_reshapes(self) -> None:
        """A view of a channels-last activation is mostly impossible; where it is possible, a reshape is that view."""
        for node in self.graph.nodes:
            if node.op != "call_method" or node.target not in ("view", "view_as"):
                continue
            if node.target == "view_as":
                node.target = "reshape_as"
                continue
            sizes = (*node.args[1:], *node.kwargs.values())
            if not any(isinstance(size, torch.dtype) or _is_a_dtype(size) for size in sizes):
                node.target, node.args, node.kwargs = "reshape", (node.args[0], *sizes), {}

    def drop_what_eval_mode_ignores(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target is torch._assert:
                self.graph.erase_node(node)
            elif (self.is_idle_module(node) or self.is_idle_dropout(node)) and isinstance(
                node.args[0] if node.args else None, fx.Node
            ):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        self.remove_dead_code()

    def is_idle_module(self, node: fx.Node) -> bool:
        module = self.module(node)
        return type(module) in _IDLE_IN_EVAL_MODE and self.is_plain(node) and len(node.args) == 1

    @staticmethod
    def is_idle_dropout(node: fx.Node) -> bool:
        if node.op != "call_function":
            return False
        if node.target in (F.dropout, F.dropout2d):
            position = 2
        elif getattr(node.target, "__module__", None) == "torchvision.ops.stochastic_depth":
            position = 3
        else:
            return False
        training = node.args[position] if len(node.args) > position else node.kwargs.get("training", True)
        return training is False

    def make_in_place_operations_ordinary(self) -> None:
        """Later readers of what an in-place operation changed read its result, which is the same tensor.

        Where that tensor has memory of its own, a ReLU or an addition then need not be in place any more.
        """
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        for node in list(self.graph.nodes):
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or not self.is_in_place(node):
                continue
            owned = self.owns_its_memory(source)
            if not owned and node.target in IN_PLACE_OPERATORS.values():
                continue  # of numbers, perhaps, where the name left of the operator alone changes
            for user in list(source.users):
                if order[user] > order[node]:
                    user.replace_input_with(source, node)
            if not owned or self.has_other_names(source, node):
                continue
            if self.is_relu(node):
                node.op, node.target, node.args, node.kwargs = "call_function", F.relu, (source,), {}
            elif self.is_add(node):
                node.op, node.target, node.kwargs = "call_function", operator.add, {}

    def is_in_place(self, node: fx.Node) -> bool:
        """Whether the operation changes its first argument and returns it."""
        if node.op == "call_module":
            return self.is_plain(node) and bool(getattr(self.module(node), "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_") and not str(node.target).endswith("__")
        if node.op != "call_function":
            return False
        if node.target in IN_PLACE_OPERATORS.values():
            return True
        name = getattr(node.target, "__name__", "")
        return name.endswith("_") or _argument(node, "inplace") is True

    def remove_dead_code(self) -> None:
        """What nothing reads and nothing feels: not an in-place operation on a view, nor a module of unknown code."""

        def is_impure(node: fx.Node) -> bool:
            return node.is_impure() or self.is_unknown(node) or self.is_in_place(node)

        self.graph.eliminate_dead_code(is_impure)

    # -- what shares memory, see Note [Names of memory]

    def owns_its_memory(self, node: Any) -> bool:
        """Whether the node is a tensor in memory that no node before it has a name for."""
        if not isinstance(node, fx.Node):
            return False
        if self.is_in_place(node):
            source = node.args[0] if node.args else None
            return (
                isinstance(source, fx.Node)
                and self.owns_its_memory(source)
                and not self.has_other_names(source, node)
            )
        if node.op == "call_module":
            return self.is_plain(node) and isinstance(self.module(node), _FRESH_MODULES)
        if "out" in node.kwargs:
            return False
        if node.op == "call_method":
            return node.target in ("relu", "add", "sub", "mul", "div")
        if node.op != "call_function":
            return False
        if node.target in _ARITHMETIC:
            return any(self.is_tensor(operand) for operand in node.args)
        return node.target in _FRESH_FUNCTIONS

    def has_other_names(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether the memory of ``source``, which ``node`` changes, may be read through a node other than those two."""
        return any(
            self.is_in_place(user) or not self.owns_its_memory(user)
            for user in source.users
            if user is not node
        )

    def is_tensor(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and (
            node.op in ("placeholder", "get_attr") or self.owns_its_memory(node)
        )

    def writes_shared_memory(self, node: fx.Node) -> bool:
        if self.is_unknown(node):
            return True
        return self.is_in_place(node) and not self.owns_its_memory(node)

    def is_unknown(self, node: fx.Node) -> bool:
        """Whether the node is code that may change its inputs, or read their strides: a user's, or a hook's."""
        if node.op == "call_module":
            module = self.module(node)
            known = module is None or self.is_conv(node) or self.is_batch_norm(node)
            return not known and not all(map(_is_torchs_own, module.modules()))  # type: ignore[union-attr]
        if node.target is operator.setitem or "out" in node.kwargs:
            return True
        defined_in = getattr(node.target, "__module__", None) or "torch"
        return node.op == "call_function" and defined_in.partition(".")[0] not in _KNOWN_FUNCTIONS

    def nothing_writes_between(self, first: fx.Node, last: fx.Node, *inputs: Any) -> bool:
        """Whether a layer at the place of ``last`` reads what ``first`` and those after it read."""
        node = first.next
        while node is not last:
            if self.writes_shared_memory(node) or (self.is_in_place(node) and node.args[0] in inputs):
                return False
            node = node.next
        return True

    @staticmethod
    def depends_on_layout(node: fx.Node) -> bool:
        return (node.op == "call_method" and node.target in _LAYOUT_METHODS) or (
            node.op == "call_function" and node.target is torch.as_strided
        )

    # -- the three rules of Note [Folding]

    def fuse_relu(self, relu: fx.Node) -> None:
        source = relu.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1 or self.is_in_place(relu):
            return
        main, residual = self.split_add(source) if self.is_add(source) else (source, None)
        conv = self.conv_below(main)
        first = conv or main
        if first is None or not self.nothing_writes_between(
            first, relu, first.args[0] if first.args else None, residual
        ):
            return
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
        if conv is not None and self.nothing_writes_between(conv, add, conv.args[0], residual):
            assert main is not None
            self.replace(add, self.folded_conv(main, relu=False), (conv.args[0], residual))

    def split_add(self, add: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The operand that ends in a foldable chain, and the other. Of two, the one computed last."""
        left, right = add.args[:2]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
            return None, None
        if self.is_in_place(add):
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
            return type(self.module(node)) is nn.ReLU and self.is_plain(node) and len(node.args) == 1
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in _RELU_FUNCTIONS and len(node.args) > 0

    def is_plain(self, node: fx.Node) -> bool:
        """Whether the node runs the forward of one of torch's modules, or of this package's layers, and no more."""
        module = self.module(node)
        return (
            module is not None
            and type(module).__module__.startswith(_OWN_CODE)
            and runs_only_its_forward(module)
        )

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
            and type(module)._conv_forward is nn.Conv2d._conv_forward
            and module.padding_mode == "zeros"
            and runs_only_its_forward(module)
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
                and not module.training
                and runs_only_its_forward(module)
                and len(node.args) == 1
            )
        return (
            node.op == "call_function"
            and node.target is F.batch_norm
            and len(node.args) > 0
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


def _is_torchs_own(module: nn.Module) -> bool:
    """Also where it has hooks of torch's: pruning and the older weight and spectral norms compute weights in them."""
    return (
        type(module).__module__.startswith(_OWN_CODE)
        and "forward" not in vars(module)
        and all(type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks_of(module))
    )


def _argument(node: fx.Node, name: str) -> Any:
    """What a call of a Python function gives for that parameter, by keyword or position."""
    if name not in node.kwargs and inspect.isfunction(node.target):
        parameters = list(inspect.signature(node.target).parameters)
        if name in parameters and parameters.index(name) < len(node.args):
            return node.args[parameters.index(name)]
    return node.kwargs.get(name)


def _is_a_dtype(size: Any) -> bool:
    return isinstance(size, fx.Node) and size.target is getattr and size.args[1:] == ("dtype",)


def _users(node: Any) -> tuple[fx.Node, ...]:
    return tuple(node.users) if isinstance(node, fx.Node) else ()
