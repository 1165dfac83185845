"""What the nodes of a traced network's graph are, and which of them share memory.

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

from .functions import is_elementwise
from .layers import BatchNormSource, FoldedConv, ScaleShift, symmetric_padding
from .proxies import IN_PLACE_OPERATORS
from .trace import hooks_of, runs_only_its_forward

__all__ = ["ADD_FUNCTIONS", "FRESH_MODULES", "RELU_FUNCTIONS", "NodeFacts"]


RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
ADD_FUNCTIONS = (operator.add, IN_PLACE_OPERATORS["iadd"], torch.add)
# Modules and functions whose output is memory of its own, so that an in-place operation on it changes nothing else.
FRESH_MODULES = (
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
    ScaleShift,
)
_FRESH_FUNCTIONS = (
    *RELU_FUNCTIONS,
    *(F.relu6, F.silu, F.gelu, F.leaky_relu, F.elu, F.hardswish),
    *(F.conv2d, F.batch_norm, F.avg_pool2d, torch.cat),
)
# Fresh where an operand is a tensor; sizes are added and multiplied too.
_ARITHMETIC = (
    *ADD_FUNCTIONS,
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


class NodeFacts:
    """Answers about the nodes of one traced graph, whose modules are copies of those of ``live``."""

    def __init__(self, graph_module: fx.GraphModule, live: nn.Module) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.live = live
        self.modules = dict(graph_module.named_modules(remove_duplicate=False))

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def is_plain(self, node: fx.Node) -> bool:
        """Whether the node runs the forward of one of torch's modules, or of this package's layers, and no more."""
        module = self.module(node)
        return (
            module is not None
            and type(module).__module__.startswith(_OWN_CODE)
            and runs_only_its_forward(module)
        )

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU and self.is_plain(node) and len(node.args) == 1
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in RELU_FUNCTIONS and len(node.args) > 0

    def is_add(self, node: fx.Node) -> bool:
        if len(node.args) != 2 or node.kwargs:
            return False
        if node.op == "call_method":
            return node.target in ("add", "add_")
        return node.op == "call_function" and node.target in ADD_FUNCTIONS

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

    def zeros_around(self, node: fx.Node) -> tuple[int, int] | None:
        """How many zeros the node adds above and below, and left and right, if it does no more."""
        if node.op == "call_function" and node.target is F.pad and node.args:
            given = inspect.signature(_pad).bind(*node.args, **node.kwargs)
            sizes, mode, value = (given.arguments.get(name) for name in ("pad", "mode", "value"))
            if mode not in (None, "constant") or value not in (None, 0):
                return None
        elif (
            type(module := self.module(node)) is nn.ZeroPad2d and self.is_plain(node) and len(node.args) == 1
        ):
            sizes = module.padding
        else:
            return None
        if not isinstance(sizes, tuple | list) or len(sizes) != 4 or not all(type(n) is int for n in sizes):
            return None
        left, right, above, below = sizes
        return (above, left) if left == right >= 0 and above == below >= 0 else None

    def pooled_size(self, node: fx.Node) -> Any:
        """The output size of adaptive average pooling, by a module or a function."""
        if isinstance(pool := self.module(node), nn.AdaptiveAvgPool2d):
            return pool.output_size if self.is_plain(node) and len(node.args) == 1 else None
        if node.op != "call_function" or node.target is not F.adaptive_avg_pool2d or not node.args:
            return None
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        sizes = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
        return size if all(type(n) is int or n is None for n in sizes) else None

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
            return self.is_plain(node) and isinstance(self.module(node), FRESH_MODULES)
        if node.kwargs.get("out") is not None:
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
        if node.target is operator.setitem or node.kwargs.get("out") is not None:
            return True
        if is_elementwise(node.target):
            return False
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


def _pad(input: Any, pad: Any, mode: str = "constant", value: Any = None) -> None:
    """F.pad's parameters; in C it has no signature."""
