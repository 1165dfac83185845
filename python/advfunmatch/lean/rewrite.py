"""Rewriting a traced network's graph into prepared layers. See Note [Folding] in ``prepared``."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .checks import require_branch, require_size
from .layers import AdaptivePool, FoldedConv, ScaleShift, ScaleShiftReLU
from .nodes import ADD_FUNCTIONS, FRESH_MODULES, RELU_FUNCTIONS, NodeFacts
from .proxies import IN_PLACE_OPERATORS

__all__ = ["Rewriter"]


class Rewriter(NodeFacts):
    """Applies Note [Folding] to one traced graph.

    Attributes:
        folded: the names of the BatchNorms that went into a convolution.
        fused: the names of those that became one scale and shift, with the ReLU after them where there is one.
        needs_contiguous: whether something in the graph depends on the memory format of the activations.
    """

    def __init__(self, graph_module: fx.GraphModule, live: nn.Module) -> None:
        super().__init__(graph_module, live)
        self.folded: list[str] = []
        self.fused: list[str] = []
        # What a convolution pads beyond its module's own padding: zeros above and below, left and right.
        self.padding: dict[fx.Node, tuple[int, int]] = {}

    def run(self) -> None:
        self.make_keyword_inputs_positional()
        self.drop_what_eval_mode_ignores()
        self.make_in_place_operations_ordinary()
        self.make_views_reshapes()
        writes = any(self.writes_shared_memory(node) for node in self.graph.nodes)
        self.needs_contiguous = writes or any(self.depends_on_layout(node) for node in self.graph.nodes)
        for node in list(self.graph.nodes):
            self.take_padding(node)
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
                (size := self.pooled_size(node)) is not None
                # Where it has nothing to do it hands on its input, which must not be changed in place then.
                and not writes
                and not any(self.is_in_place(user) for user in (*node.users, *_users(node.args[0])))
            ):
                self.replace(node, AdaptivePool(size), node.args[:1])
        for node in list(self.graph.nodes):
            if self.is_conv(node):
                self.replace(node, self.folded_conv(node, relu=False), node.args)
        self.remove_dead_code()
        for node in list(self.graph.nodes):
            if self.is_batch_norm(node):
                self.fused.append(self.name_of(node))
                self.replace(node, ScaleShift(self.batch_norm_source(node)), node.args[:1])
        self.graph_module.delete_all_unused_submodules()
        self.graph_module.recompile()
        # torch.fx's own __call__ prints a traceback to stderr before an error leaves the network.
        type(self.graph_module).__call__ = nn.Module.__call__  # type: ignore[method-assign]

    # -- making the graph simpler without changing it

    def make_keyword_inputs_positional(self) -> None:
        """``relu(input=x)`` as ``relu(x)``, of what the rules below look at."""
        known = (
            *RELU_FUNCTIONS,
            *ADD_FUNCTIONS,
            F.batch_norm,
            F.dropout,
            F.dropout2d,
            F.adaptive_avg_pool2d,
        )
        for node in self.graph.nodes:
            if not (
                (node.op == "call_function" and node.target in known)
                or (self.is_plain(node) and isinstance(self.module(node), FRESH_MODULES))
            ):
                continue
            names = ("input", "other") if node.target in ADD_FUNCTIONS else ("input",)
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

    def remove_dead_code(self) -> None:
        """What nothing reads and nothing feels: not an in-place operation on a view, nor a module of unknown code."""

        def is_impure(node: fx.Node) -> bool:
            checks = node.target in (require_size, require_branch)
            return node.is_impure() or self.is_unknown(node) or self.is_in_place(node) or checks

        self.graph.eliminate_dead_code(is_impure)

    # -- the rules of Note [Folding]

    def take_padding(self, node: fx.Node) -> None:
        """Zeros around the only input of a convolution as the convolution's own."""
        pad = node.args[0] if self.is_conv(node) else None
        if (
            isinstance(pad, fx.Node)
            and len(pad.users) == 1
            and (zeros := self.zeros_around(pad)) is not None
            and self.nothing_writes_between(pad, node, pad.args[0])
        ):
            node.args = (pad.args[0],)
            self.graph.erase_node(pad)
            self.padding[node] = zeros

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
        module, more = self.modules[str(conv.target)], self.padding.pop(conv, (0, 0))
        layer = FoldedConv(module, live, source, relu, more)  # type: ignore[arg-type]
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


def _is_a_dtype(size: Any) -> bool:
    return isinstance(size, fx.Node) and size.target is getattr and size.args[1:] == ("dtype",)


def _users(node: Any) -> tuple[fx.Node, ...]:
    return tuple(node.users) if isinstance(node, fx.Node) else ()
