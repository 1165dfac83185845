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
    BN behind and before anything else         ->  ScaleShift
    everything else                            ->  as it was

Dropout and Identity are gone, and an in-place operation whose input has no other name is an ordinary one. The copy's
tensors need no gradient, so no weight-gradient graph is ever built. ``refresh_`` writes the live network's current
values into the same memory: a captured CUDA graph that reads it stays valid. A call does so itself where the live
network was seen to change: see ``sources`` for what is seen.

Hooks of the network itself, and a ``__call__`` of its class, run around the prepared graph; a submodule with hooks is
kept whole, with them. Where the activations' memory format would show (in code that is kept whole, or an in-place
operation on memory of several names) the network is served in contiguous format, whatever was asked for.

Note [Branches]
~~~~~~~~~~~~~~~
``if x.size(2) > 8: x = pool(x)`` and ``if x.requires_grad: ...`` ask what only images can answer. The graph takes the
side of False, and asks again at every call; the first images that take the other side have the network prepared once
more for them, and so on for every such question. The one that was right last is tried first.

Gradients in float32 differ from the live network's where a pre-activation is within rounding of zero and a ReLU
flips; PyTorch's own float32 differs from float64 by the same mechanism and as much.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from .checks import OtherBranch
from .copies import Uncopied, copy_of
from .layers import FoldedConv, ScaleShift, being_exported
from .reverse import ReverseProgram, Unserved
from .rewrite import Rewriter
from .sources import Sources
from .trace import first_line, has_own_call, hooks_of, trace
from .wrappers import unwrap, wrapped_network

__all__ = ["PreparedModel", "prepare_for_attack"]

# The prepared graph's name in the copy of a network that has hooks.
_GRAPH = "lean_graph"


def prepare_for_attack(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> PreparedModel:
    """An eval-mode copy of ``model`` with BatchNorm folded away, for attacks; the model itself is not touched.

    Args:
        model: any network of images (N, C, H, W) to logits. DDP, DataParallel and torch.compile wrappers are looked
            through. One that torch.fx cannot trace, such as TorchScript or an exported program, is served as an
            unfolded copy, with a warning, and so is a part that it cannot, that has hooks, or whose forward does more
            than compute, such as to write to its weights. Hooks of the network itself run as they are now. What
            cannot even be copied is called as it is, in eval mode meanwhile. A prepared network is returned as it is.
        dtype: of the copy's weights, arithmetic and logits (None: the model's). Images are converted on entry.
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``. The latter is taken anyway where the
            format could change the logits.

    Returns:
        A ``PreparedModel``. It follows an update of the live weights at its next call, or where ``refresh_()`` is
        called. That is needed after writes through ``.data`` or NumPy, which leave no trace, and inside what was
        compiled or captured by the caller.

    Raises:
        TypeError: model is not a module, or dtype is not a floating-point torch.dtype.
        ValueError: another memory format; hooks on a wrapper that is looked through, which would be lost; parameters
            that are not there yet, or not whole (lazy modules, FSDP); or a dtype for what cannot be converted.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> prepare_for_attack(net)
        PreparedModel(Sequential: 1 BatchNorm folded into a convolution, 0 into a scale and shift, nothing left)
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
    if isinstance(model, PreparedModel) and dtype in (None, model.dtype):
        return model
    network = unwrap(model, compiled=True)
    wrapper: Any = model
    while wrapper is not network:
        if hooks_of(wrapper):
            raise ValueError(
                f"model is a {type(wrapper).__name__} with hooks, which a prepared network would lose: "
                f"register them on the {type(network).__name__} in it"
            )
        wrapper = wrapped_network(wrapper, compiled=True)
    _require_whole_parameters(network)
    # A copy made of inference tensors could not be differentiated later, where inference mode has ended.
    with torch.inference_mode(False):
        return PreparedModel(network, dtype, memory_format)


class PreparedModel(nn.Module):
    """What ``prepare_for_attack`` returns: always in eval mode, without parameters that need gradients.

    Attributes:
        traced: whether torch.fx could trace the network.
        folded: the names of the BatchNorms that went into a convolution.
        fused: the names of those that became a scale and shift, with the ReLU after them where there is one.
        left: what stayed as it was, a sentence each.
        capturable: whether all of it is operations of a graph, so that a CUDA graph can hold it.
        memory_format: of the images on entry, and of the convolutions.
        program: what makes the images' gradients without an autograd graph, or None: autograd does.
        backward: which of the two, and why.
    """

    def __init__(
        self,
        live: nn.Module,
        dtype: torch.dtype | None,
        memory_format: torch.memory_format,
        decisions: tuple[bool, ...] = (),
    ) -> None:
        super().__init__()
        self._asked = dtype, memory_format
        self._decisions = decisions
        self.traced = self.capturable = True
        self.folded: list[str] = []
        self.fused: list[str] = []
        self.left: list[str] = []
        # In a tuple, so that the live network is no submodule of this one.
        self._live = (live,)
        # What tracing took for granted of the images, and where they were then.
        self._assumed: set[str] = set()
        devices = {t.device for t in (*live.parameters(), *live.buffers())}
        self._device = devices.pop() if len(devices) == 1 else None
        self._needs_contiguous = False
        self.network: nn.Module = self._made_from(live, dtype)
        # One prepared network for each way through the branches that images have taken, this one among them; what
        # serves is the one that was right last. See Note [Branches].
        self._ways = {self._decisions: self}
        self._way = self._decisions
        self._taken: set[tuple[bool, ...]] = set()
        if not decisions and (sentences := [each for each in self.left if " cannot " in each]):
            warnings.warn(
                f"prepare_for_attack({type(live).__name__}) left unfolded: {'; '.join(sentences)}",
                stacklevel=3,
            )
        if not self.traced or self._needs_contiguous:
            memory_format = torch.contiguous_format
        self.memory_format = memory_format
        if dtype is not None:
            self.network.to(dtype)
        self.dtype = dtype or _dtype_of(self.network) or _dtype_of(live)
        self._layers = [m for m in self.network.modules() if isinstance(m, FoldedConv | ScaleShift)]
        if self.dtype in (torch.float16, torch.bfloat16):
            for layer in self._layers:
                for name in ("scale", "shift", "ones"):
                    if hasattr(layer, name):  # a few vectors: their precision costs nothing
                        setattr(layer, name, getattr(layer, name).float())
        for module in self.network.modules():
            if isinstance(module, (FoldedConv, nn.Conv2d)) and isinstance(module.weight, Tensor):
                module.weight.data = _in_memory_format(module.weight.data, memory_format)
            if isinstance(module, FoldedConv) and memory_format == torch.channels_last:
                module.prepare_kernels()
        self.program, self.backward = self._reverse_program(live)
        self._refreshes = 0
        self._copies = self._pairs_to_copy()
        self._parametrizations = [m for m in live.modules() if isinstance(m, ParametrizationList)]
        self._sources = Sources(live)
        self.train(False)
        self.refresh_()

    def _made_from(self, live: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        """The copy of the network, folded as far as it can be; ``left`` says what is not."""
        try:
            network = copy_of(live)
        except Exception as error:  # of whatever the network holds
            reason = f"which cannot be copied ({first_line(error)}), so that it is called as it is"
            if dtype not in (None, _dtype_of(live)):
                raise ValueError(
                    f"dtype is {dtype}, but model is a {type(live).__name__}, {reason}"
                ) from error
            self.traced = self.capturable = False
            self.left.append(f"the whole network, {reason}")
            return Uncopied(live)
        try:
            traced = trace(network, lambda: copy_of(live), self._device, _dtype_of(live), self._decisions)
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            if isinstance(live, torch.jit.ScriptModule) and dtype is not None and _dtype_of(live) is None:
                raise ValueError(
                    f"dtype is {dtype}, but model is TorchScript that was frozen, and cannot be converted any more"
                ) from error
            self.traced = self.capturable = False
            self.left.append(f"the whole network, which torch.fx cannot trace ({first_line(error)})")
            return network
        self._assumed, self._decisions = traced.assumed, traced.decided
        rewriter = Rewriter(traced.graph_module, live)
        rewriter.run()
        self.folded, self.fused = rewriter.folded, rewriter.fused
        self._needs_contiguous = rewriter.needs_contiguous
        self.capturable = not traced.untraced
        self.left += [f"{name}, which torch.fx cannot trace ({why})" for name, why in traced.untraced.items()]
        if not (hooks_of(network) or has_own_call(network)):
            return traced.graph_module
        # The copy itself, whose forward is the graph.
        network.add_module(_GRAPH, traced.graph_module)
        vars(network)["forward"] = traced.graph_module.forward
        return network

    def _reverse_program(self, live: nn.Module) -> tuple[ReverseProgram | None, str]:
        if not isinstance(self.network, fx.GraphModule):
            return None, "autograd's: the prepared graph has hooks or other code around it, or there is none"
        try:
            return ReverseProgram(self.network, live), "its own"
        except Unserved as reason:
            return None, f"autograd's: the graph holds {reason}"

    def _own_backward_serves(self, x: Tensor) -> bool:
        """Whether the reverse program, rather than autograd, is used on such images, converted to ``dtype``."""
        return (
            self.program is not None
            and x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not being_exported()
            and not self.program.has_hooks()
        )

    @staticmethod
    def _is_once_differentiable(x: Tensor) -> bool:
        """Whether the layers' own kernels are so anyway; in float64, say, a second derivative can be asked for."""
        return x.dtype == torch.float32

    def program_weights(self) -> list[Tensor]:
        """What an update of the network writes to."""
        return [next(layer.buffers()) for layer in self._layers]

    def vjp(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        """Logits and pullback as ``lean.vjp`` returns them, by the reverse program; None where it cannot serve."""
        made: list[tuple[ReverseProgram, Any]] = []

        def run(way: PreparedModel, given: Tensor) -> Tensor:
            if not way._own_backward_serves(given):
                raise Unserved
            assert way.program is not None
            logits, values = way.program.forward(given)
            made.append((way.program, values))
            return logits

        try:
            with torch.inference_mode(False), torch.no_grad():
                logits = self._called(x.clone() if x.is_inference() else x.detach(), run)
        except Unserved:
            return None
        ((program, values),), refreshes = made, self._refreshes

        def pullback(grad_logits: Tensor) -> Tensor:
            if self._refreshes != refreshes:
                raise RuntimeError("the network's weights have changed since these logits: call vjp again")
            with torch.inference_mode(False):
                given = grad_logits.clone() if grad_logits.is_inference() else grad_logits.detach()
                grad = program.backward(values, given.to(logits.dtype)).to(x.dtype)
                # Where no layer stands between, it is the caller's own tensor.
                return grad.clone() if grad.data_ptr() == grad_logits.data_ptr() else grad

        return logits.clone(), pullback

    def forward(self, x: Tensor) -> Tensor:
        return self._called(x, _forward)

    def _called(self, x: Tensor, run: Callable[[PreparedModel, Tensor], Tensor]) -> Tensor:
        if not torch.compiler.is_compiling():
            self.follow_()
        self._require_assumed(x)
        x = x.to(dtype=self.dtype)
        if torch.is_autocast_enabled(x.device.type):
            # The precision was chosen in prepare_for_attack.
            with torch.autocast(x.device.type, enabled=False):
                return self._served(x, run)
        return self._served(x, run)

    def _served(self, x: Tensor, run: Callable[[PreparedModel, Tensor], Tensor]) -> Tensor:
        while True:
            way = self._ways[self._way]
            given = x if x.dim() != 4 or being_exported() else x.contiguous(memory_format=way.memory_format)
            if not way._decisions:
                return run(way, given)
            try:
                logits = run(way, given)
            except OtherBranch as other:
                self._way = self._found(other.decisions)
                continue
            self._taken.add(self._way)
            return logits

    def _found(self, decisions: tuple[bool, ...]) -> tuple[bool, ...]:
        """The way that begins with these outcomes, prepared if it has not been taken before. See Note [Branches]."""
        for known in self._ways:
            if known[: len(decisions)] == decisions:
                return known
        dtype, memory_format = self._asked
        if self._way not in self._taken and self._ways[self._way] is not self:
            del self._ways[self._way]  # prepared on the way to this one
        with torch.inference_mode(False):
            way = PreparedModel(self._live[0], dtype, memory_format, decisions)
        device = next((t.device for t in self.network.buffers()), None)
        self._ways[way._decisions] = way.to(device) if device is not None else way
        return way._decisions

    @torch.no_grad()
    def refresh_(self) -> PreparedModel:
        """Follow the live network's parameters and buffers as they are now, in place."""
        with _in_eval_mode(self._parametrizations):
            for layer in self._layers:
                layer.refresh_()
            for copied, live, name in self._copies:
                getattr(copied, name).copy_(getattr(live, name))
        self._refreshes += 1
        self._sources.note()
        for way in self._ways.values():
            if way is not self:
                way.refresh_()
        return self

    def follow_(self) -> None:
        """``refresh_``, if the live network was seen to change since the last time; reads nothing from the device."""
        if self._sources.have_changed():
            self.refresh_()

    def train(self, mode: bool = True) -> PreparedModel:
        """Does nothing: a prepared network is in eval mode whatever its owner is in."""
        return super().train(False)

    def _apply(self, function: Callable[..., Any], recurse: bool = True) -> PreparedModel:
        super()._apply(function, recurse)
        for way in self._ways.values():
            if way is not self:
                way._apply(function, recurse)
        self.dtype = _dtype_of(self.network) or self.dtype
        return self

    def _require_assumed(self, x: Tensor) -> None:
        if "dimensions" in self._assumed and x.dim() != 4:
            raise ValueError(
                f"x must be images (N, C, H, W), which this network's code asks for, got {tuple(x.shape)}"
            )
        if "device" in self._assumed and x.device.type != self._device.type:  # type: ignore[union-attr]
            raise ValueError(
                f"x is on {x.device}, but the network was on {self._device} when it was prepared, and its code "
                "asks where it is: prepare it again where it is now"
            )

    def __reduce__(self) -> Any:
        raise TypeError("a prepared network follows one live network; save that one instead")

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedModel:
        raise TypeError("a prepared network follows one live network; prepare a copy of that one instead")

    def __repr__(self) -> str:
        left = "; ".join(self.left) or "nothing"
        count = len(self.folded)
        return (
            f"PreparedModel({type(self._live[0]).__name__}: {count} BatchNorm{'s' * (count != 1)} folded into a "
            f"convolution, {len(self.fused)} into a scale and shift, {left} left; backward {self.backward})"
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
                module = _submodule(live, owner.removeprefix(_GRAPH).removeprefix("."))
                followed = isinstance(getattr(module, name), Tensor)
            except AttributeError:
                followed = False
            if not followed:
                continue  # a constant of the traced code, which no update changes
            pairs.append((_submodule(self.network, owner), module, name))
        return pairs


def _forward(way: PreparedModel, x: Tensor) -> Tensor:
    """The logits; where a gradient by the images may be asked for, by the reverse program if it can serve."""
    if (
        torch.is_grad_enabled()
        and x.requires_grad
        and way._own_backward_serves(x)
        and way._is_once_differentiable(x)
    ):
        return _Reversed.apply(x, way.program, *way.program_weights())
    logits: Tensor = way.network(x)
    return logits


class _Reversed(torch.autograd.Function):
    """A whole reverse program as one node of an autograd graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, program: ReverseProgram, *weights: Tensor) -> Tensor:
        logits, values = program.forward(x)
        tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(values[i] for i in tensors), *weights)
        ctx.program, ctx.tensors = program, tensors
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in values]
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values = list(ctx.numbers)
        for i, value in zip(ctx.tensors, ctx.saved_tensors, strict=False):
            values[i] = value
        return ctx.program.backward(values, grad), *[None] * (len(ctx.needs_input_grad) - 1)


def _submodule(network: nn.Module, path: str) -> nn.Module:
    """As get_submodule, which TorchScript does not have."""
    for name in path.split(".") if path else ():
        network = getattr(network, name)
    return network


def _require_whole_parameters(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"model has parameters without a shape yet ({name}): pass images through it once before this"
            )
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"model has parameters that are spread over processes ({name} is a {type(parameter).__name__}): "
                "gather them in a network of one process and prepare that"
            )
    for module in network.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "model has parameters that are spread over processes by FullyShardedDataParallel: gather them "
                "in a network of one process and prepare that"
            )


def _dtype_of(network: nn.Module) -> torch.dtype | None:
    tensors = (*network.parameters(), *network.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), None)


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
