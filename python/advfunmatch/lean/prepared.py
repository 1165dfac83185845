"""Prepared networks: an eval-mode copy of a network in the form in which an attack runs fastest.

Note [Folding]
~~~~~~~~~~~~~~
In eval mode a BatchNorm is ``x * scale + shift`` per channel, with scale = weight / sqrt(var + eps) and
shift = bias − mean · scale. A convolution whose only reader is a BatchNorm takes the scale into its weights and the
shift into its bias, exactly (up to rounding). A BatchNorm behind anything else (an addition, in every
pre-activation network) cannot go there: the ReLU after it takes it instead, as one ``scale_shift_relu``. What the
traced graph then holds:

    convolution [+ BN] [+ residual] [+ ReLU]   ->  FoldedConv; on CPUs one primitive, 3x3 ones by Winograd
    BN [+ residual] + ReLU                     ->  ScaleShiftReLU
    everything else                            ->  as it was

Dropout and Identity are gone, and an in-place operation whose input has no other name is an ordinary one. The copy's
tensors need no gradient, so no weight-gradient graph is ever built. ``refresh_`` writes the live network's current
values into the same memory: a captured CUDA graph that reads it stays valid.

Hooks of the network itself, and a ``__call__`` of its class, run around the prepared graph; a submodule with hooks is
kept whole, with them. Where the activations' memory format would show (in code that is kept whole, or an in-place
operation on memory of several names) the network is served in contiguous format, whatever was asked for.

Gradients in float32 differ from the live network's where a pre-activation is within rounding of zero and a ReLU
flips; PyTorch's own float32 differs from float64 by the same mechanism and as much.
"""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from .layers import FoldedConv, ScaleShiftReLU
from .rewrite import Rewriter
from .trace import first_line, has_own_call, hooks_of, trace

__all__ = ["PreparedModel", "prepare_for_attack", "unwrap"]

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
# The prepared graph's name in the copy of a network that has hooks.
_GRAPH = "lean_graph"
_WRAPPERS = (
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
)


def prepare_for_attack(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> PreparedModel:
    """An eval-mode copy of ``model`` with BatchNorm folded away, for attacks; the model itself is not touched.

    Args:
        model: any network of images (N, C, H, W) to logits. DDP, DataParallel and torch.compile wrappers are looked
            through. One that torch.fx cannot trace is served as an unfolded copy, with a warning, and so is a part
            that it cannot, or that has hooks. Hooks of the network itself run as they are now.
        dtype: of the copy's weights, arithmetic and logits (None: the model's). Images are converted on entry.
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``. The latter is taken anyway where the
            format could change the logits.

    Returns:
        A ``PreparedModel``. After an update of the live weights, call its ``refresh_()``.

    Raises:
        TypeError: model is not a module, or dtype is not a floating-point torch.dtype.
        ValueError: another memory format; or hooks on a wrapper that is looked through, which would be lost.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> prepare_for_attack(net)
        PreparedModel(Sequential: 1 BatchNorm folded into a convolution, 0 into scale_shift_relu, nothing left)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"dtype must be a floating-point dtype such as torch.bfloat16, or None; got {dtype!r}"
        )
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(
            f"memory_format must be torch.channels_last or torch.contiguous_format, got {memory_format!r}"
        )
    network = unwrap(model, compiled=True)
    wrapper: Any = model
    while wrapper is not network:
        if hooks_of(wrapper):
            raise ValueError(
                f"model is a {type(wrapper).__name__} with hooks, which a prepared network would lose: "
                f"register them on the {type(network).__name__} in it"
            )
        wrapper = wrapper.module if isinstance(wrapper, _WRAPPERS) else wrapper._orig_mod
    # A copy made of inference tensors could not be differentiated later, where inference mode has ended.
    with torch.inference_mode(False):
        return PreparedModel(network, dtype, memory_format)


def unwrap(model: nn.Module, compiled: bool = False) -> nn.Module:
    """The network inside DDP, DataParallel or ``torch.optim.swa_utils.AveragedModel``; and, with ``compiled``, inside
    torch.compile's wrapper.

    A DDP forward prepares a gradient exchange that an input gradient never completes, so attacks go around it.
    """
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif compiled and isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            return model


class PreparedModel(nn.Module):
    """What ``prepare_for_attack`` returns: always in eval mode, without parameters that need gradients.

    Attributes:
        traced: whether torch.fx could trace the network.
        folded: the names of the BatchNorms that went into a convolution.
        fused: the names of those that went into a scale_shift_relu.
        left: what stayed as it was, a sentence each.
        memory_format: of the images on entry, and of the convolutions.
    """

    def __init__(
        self, live: nn.Module, dtype: torch.dtype | None, memory_format: torch.memory_format
    ) -> None:
        super().__init__()
        self.traced = True
        self.folded: list[str] = []
        self.fused: list[str] = []
        self.left: list[str] = []
        # In a tuple, so that the live network is no submodule of this one.
        self._live = (live,)
        network = _copy_of(live)
        self.network: nn.Module
        try:
            graph_module, untraced = trace(network)
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            self.traced = False
            self.network = _copy_of(live)  # tracing may have left proxies in the other
            memory_format = torch.contiguous_format
            self.left.append(f"the whole network, which torch.fx cannot trace ({first_line(error)})")
        else:
            rewriter = Rewriter(graph_module, live)
            rewriter.run()
            self.network = graph_module
            if hooks_of(network) or has_own_call(network):
                # The copy itself, whose forward is the graph.
                network.add_module(_GRAPH, graph_module)
                vars(network)["forward"] = graph_module.forward
                self.network = network
            if rewriter.needs_contiguous:
                memory_format = torch.contiguous_format
            self.folded, self.fused = rewriter.folded, rewriter.fused
            self.left += [
                f"{name}, which torch.fx cannot trace ({reason})" for name, reason in untraced.items()
            ]
            self.left += rewriter.left
        if untraced_sentences := [sentence for sentence in self.left if "cannot trace" in sentence]:
            warnings.warn(
                f"prepare_for_attack({type(live).__name__}) left unfolded: {'; '.join(untraced_sentences)}",
                stacklevel=3,
            )
        self.memory_format = memory_format
        if dtype is not None:
            self.network.to(dtype)
        self.dtype = dtype or self._dtype_of_weights()
        self._layers = [m for m in self.network.modules() if isinstance(m, FoldedConv | ScaleShiftReLU)]
        if self.dtype in (torch.float16, torch.bfloat16):
            for layer in self._layers:
                for name in ("scale", "shift", "ones"):
                    if hasattr(layer, name):  # a few vectors: their precision costs nothing
                        setattr(layer, name, getattr(layer, name).float())
        for module in self.network.modules():
            if isinstance(module, (FoldedConv, nn.Conv2d)) and isinstance(module.weight, Tensor):
                module.weight.data = _in_memory_format(module.weight.data, memory_format)
            if isinstance(module, FoldedConv) and memory_format == torch.channels_last:
                module.prepare_conv3x3()
        self._copies = self._pairs_to_copy()
        self._parametrizations = [m for m in live.modules() if isinstance(m, ParametrizationList)]
        self.train(False)
        self.refresh_()

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(dtype=self.dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.memory_format)
        if torch.is_autocast_enabled(x.device.type):
            # The precision was chosen in prepare_for_attack.
            with torch.autocast(x.device.type, enabled=False):
                logits: Tensor = self.network(x)
                return logits
        logits = self.network(x)
        return logits

    @torch.no_grad()
    def refresh_(self) -> PreparedModel:
        """Follow the live network's parameters and buffers as they are now, in place."""
        with _in_eval_mode(self._parametrizations):
            for layer in self._layers:
                layer.refresh_()
            for copied, live, name in self._copies:
                getattr(copied, name).copy_(getattr(live, name))
        return self

    def train(self, mode: bool = True) -> PreparedModel:
        """Does nothing: a prepared network is in eval mode whatever its owner is in."""
        return super().train(False)

    def _apply(self, function: Callable[..., Any], recurse: bool = True) -> PreparedModel:
        super()._apply(function, recurse)
        self.dtype = self._dtype_of_weights()
        return self

    def _dtype_of_weights(self) -> torch.dtype | None:
        tensors = (*self.network.parameters(), *self.network.buffers())
        return next((t.dtype for t in tensors if t.is_floating_point()), None)

    def __reduce__(self) -> Any:
        raise TypeError("a prepared network follows one live network; save that one instead")

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedModel:
        raise TypeError("a prepared network follows one live network; prepare a copy of that one instead")

    def __repr__(self) -> str:
        left = "; ".join(self.left) or "nothing"
        count = len(self.folded)
        return (
            f"PreparedModel({type(self._live[0]).__name__}: {count} BatchNorm{'s' * (count != 1)} folded into a "
            f"convolution, {len(self.fused)} into scale_shift_relu, {left} left)"
        )

    def _pairs_to_copy(self) -> list[tuple[nn.Module, nn.Module, str]]:
        """The tensors that were not folded: their module here, the live one, and their name in both."""
        live = self._live[0]
        folded = {id(t) for layer in self._layers for t in layer.buffers()}
        pairs = []
        named = (*self.network.named_parameters(), *self.network.named_buffers())
        for path, tensor in named:
            if id(tensor) in folded:
                continue
            owner, _, name = path.rpartition(".")
            try:
                module = live.get_submodule(owner.removeprefix(_GRAPH).removeprefix("."))
                getattr(module, name)
            except AttributeError:
                continue  # a constant of the traced code, which no update changes
            pairs.append((self.network.get_submodule(owner), module, name))
        return pairs


def _in_memory_format(weight: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The weight with that format's strides, also where one input channel makes both formats the same memory.

    A convolution takes its output's format from its weight's strides: with (9, 9, 3, 1) instead of (9, 1, 3, 1) the
    first of a network on grey images would hand NCHW on, to be converted at every step.
    """
    if memory_format != torch.channels_last:
        return weight.contiguous()
    _, channels, height, width = weight.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device).copy_(weight)


def _copy_of(live: nn.Module) -> nn.Module:
    """A deep copy, also where pruning or an old weight norm has left a tensor with a graph, which deepcopy refuses."""
    computed = {
        id(t): t.detach().clone()
        for module in live.modules()
        for t in vars(module).values()
        if isinstance(t, Tensor) and not t.is_leaf
    }
    network = copy.deepcopy(live, computed)
    copies = {id(module): computed[id(module)] for module in live.modules() if id(module) in computed}
    for module in live.modules():
        if isinstance(module, fx.GraphModule):  # its own deepcopy leaves them out
            for name in _HOOKS:
                vars(copies[id(module)])[name] = copy.deepcopy(vars(module)[name], computed)
    for module in network.modules():
        if "forward" in vars(module):
            vars(module)["forward"] = _of_the_copy(vars(module)["forward"], copies)
        for name in _HOOKS:
            hooks = getattr(module, name)
            if isinstance(hooks, dict):
                hooks.update({key: _of_the_copy(hook, copies) for key, hook in hooks.items()})
    return network.eval().requires_grad_(False)


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


@contextlib.contextmanager
def _in_eval_mode(parametrizations: Sequence[ParametrizationList]) -> Iterator[None]:
    """Read in training mode, a spectral norm's weight would cost the live network a step of its power iteration."""
    changed = [module for each in parametrizations for module in each.modules() if module.training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True
