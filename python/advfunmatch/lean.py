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

Gradients in float32 differ from the live network's where a pre-activation is within rounding of zero and a ReLU
flips; PyTorch's own float32 differs from float64 by the same mechanism and as much.
"""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from afm_kernels import ops, scale_shift_relu

__all__ = ["PreparedModel", "prepare_for_attack", "unwrap"]

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
            through. One that torch.fx cannot trace is served as an unfolded copy, with a warning.
        dtype: of the copy's weights, arithmetic and logits (None: the model's). Images are converted on entry.
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``.

    Returns:
        A ``PreparedModel``. After an update of the live weights, call its ``refresh_()``.

    Raises:
        TypeError: model is not a module, or dtype is not floating point.
        ValueError: another memory format.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> prepare_for_attack(net)
        PreparedModel(Sequential: 1 BatchNorm folded into a convolution, 0 into scale_shift_relu, nothing left)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(
            f"memory_format must be torch.channels_last or torch.contiguous_format, got {memory_format}"
        )
    # A copy made of inference tensors could not be differentiated later, where inference mode has ended.
    with torch.inference_mode(False):
        return PreparedModel(unwrap(model, compiled=True), dtype, memory_format)


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
    """

    def __init__(
        self, live: nn.Module, dtype: torch.dtype | None, memory_format: torch.memory_format
    ) -> None:
        super().__init__()
        self.memory_format = memory_format
        self.traced = True
        self.folded: list[str] = []
        self.fused: list[str] = []
        self.left: list[str] = []
        # In a tuple, so that the live network is no submodule of this one.
        self._live = (live,)
        self._folds: list[FoldedConv] = []
        self._scales: list[ScaleShiftReLU] = []
        network = copy.deepcopy(live).eval().requires_grad_(False)
        self.network: nn.Module
        try:
            graph_module, untraced = _trace(network)
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            self.traced = False
            self.network = network
            self.left.append(f"the whole network, which torch.fx cannot trace ({_first_line(error)})")
        else:
            self.left += [
                f"{name}, which torch.fx cannot trace ({reason})" for name, reason in untraced.items()
            ]
            _Rewriter(self, graph_module, live).run()
            self.network = graph_module
        if untraced_sentences := [sentence for sentence in self.left if "cannot trace" in sentence]:
            warnings.warn(
                f"prepare_for_attack({type(live).__name__}) left unfolded: {'; '.join(untraced_sentences)}",
                stacklevel=3,
            )
        if dtype is not None:
            self.network.to(dtype)
        floating = [
            t.dtype for t in (*self.network.parameters(), *self.network.buffers()) if t.is_floating_point()
        ]
        self.dtype = dtype or (floating[0] if floating else None)
        if self.dtype in (torch.float16, torch.bfloat16):
            for module in self.network.modules():
                for name in (
                    ("scale", "shift", "ones") if isinstance(module, (ScaleShiftReLU, FoldedConv)) else ()
                ):
                    if hasattr(module, name):  # a few vectors: their precision costs nothing
                        setattr(module, name, getattr(module, name).float())
        for module in self.network.modules():
            if isinstance(module, (FoldedConv, nn.Conv2d)) and isinstance(module.weight, Tensor):
                module.weight.data = _in_memory_format(module.weight.data, memory_format)
            if isinstance(module, FoldedConv) and memory_format == torch.channels_last:
                module.prepare_conv3x3()
        self._copies = self._pairs_to_copy()
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
        for layer in self._folds:
            layer.refresh_()
        for scale in self._scales:
            scale.refresh_()
        for destination, module, name in self._copies:
            destination.copy_(getattr(module, name))
        return self

    def train(self, mode: bool = True) -> PreparedModel:
        """Does nothing: a prepared network is in eval mode whatever its owner is in."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedModel:
        raise TypeError("a prepared network follows one live network; prepare a copy of that one instead")

    def __repr__(self) -> str:
        left = "; ".join(self.left) or "nothing"
        count = len(self.folded)
        return (
            f"PreparedModel({type(self._live[0]).__name__}: {count} BatchNorm{'s' * (count != 1)} folded into a "
            f"convolution, {len(self.fused)} into scale_shift_relu, {left} left)"
        )

    def _pairs_to_copy(self) -> list[tuple[Tensor, nn.Module, str]]:
        """The tensors that were not folded, with the live module and name that each follows."""
        live = self._live[0]
        folded = {id(t) for layer in (*self._folds, *self._scales) for t in layer.buffers()}
        pairs = []
        named = (*self.network.named_parameters(), *self.network.named_buffers())
        for path, tensor in named:
            if id(tensor) in folded:
                continue
            owner, _, name = path.rpartition(".")
            try:
                module = live.get_submodule(owner)
                getattr(module, name)
            except AttributeError:
                continue  # a constant of the traced code, which no update changes
            pairs.append((tensor, module, name))
        return pairs


class FoldedConv(nn.Module):
    """A convolution with the BatchNorm after it in its weights, an optional residual added, and an optional ReLU."""

    weight: Tensor
    bias: Tensor
    ones: Tensor
    shift: Tensor
    weight_dense_out: Tensor | None

    def __init__(self, conv: nn.Conv2d, live: nn.Conv2d, bn: _BatchNormSource | None, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        self.stride, self.padding, self.dilation = conv.stride, _padding(conv), conv.dilation
        self.groups = conv.groups
        self._live = (live,)
        self._bn = bn
        weight = conv.weight.detach()
        self.register_buffer("weight", torch.empty_like(weight))
        self.register_buffer("bias", weight.new_zeros(conv.out_channels))
        # For scale_shift_relu behind the convolution; these stay float32 in a network of lower precision.
        self.register_buffer("ones", _at_least_float32(weight.new_ones(conv.out_channels)))
        self.register_buffer("shift", _at_least_float32(weight.new_zeros(conv.out_channels)))
        self.register_buffer("weight_dense_out", None)

    def prepare_conv3x3(self) -> None:
        """Keep the weight in a second layout for ``conv3x3``, where that can serve this layer."""
        geometry = (self.weight.shape[2:], self.stride, self.padding, self.dilation, self.groups)
        if (
            geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
            and all(channels % 16 == 0 for channels in self.weight.shape[:2])
            and self.weight.dtype == torch.float32
            and self.weight.device.type == "cpu"
        ):
            out_channels, in_channels = self.weight.shape[:2]
            taps_first = self.weight.new_empty(3, 3, in_channels, out_channels)
            self.weight_dense_out = taps_first.permute(3, 2, 0, 1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fits = residual is None or self._same_shape(x, residual)
        if self.weight_dense_out is not None and fits and _conv3x3_serves(x):
            return _Conv3x3.apply(x, self.weight, self.weight_dense_out, self.bias, residual, self.relu)
        if not (self.relu or residual is not None):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if fits and _onednn_serves(x, self.weight):
            return _ConvEpilogue.apply(
                x,
                self.weight,
                self.bias,
                residual,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                self.relu,
            )
        if self.relu and (x.device.type == "cuda" or residual is not None):
            # One pass over the convolution's output, where bias, addition and ReLU would be three.
            out = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
            if residual is None or residual.shape == out.shape:
                return scale_shift_relu(out, self.ones, self.shift, residual)
            return F.relu(out + self.bias.view(-1, 1, 1) + residual)
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            out = out + residual
        return F.relu(out) if self.relu else out

    def _same_shape(self, x: Tensor, residual: Tensor) -> bool:
        """Whether the residual has the convolution's shape; anything else must broadcast, which oneDNN does not."""
        sizes = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                x.shape[2:], self.padding, self.dilation, self.weight.shape[2:], self.stride, strict=True
            )
        )
        return residual.shape == (x.shape[0], self.weight.shape[0], *sizes) and residual.dtype == x.dtype

    def refresh_(self) -> None:
        self._refresh_folded()
        if self.weight_dense_out is not None:
            self.weight_dense_out.copy_(self.weight)

    def _refresh_folded(self) -> None:
        conv = self._live[0]
        if self._bn is None:
            self.weight.copy_(conv.weight)
            if conv.bias is not None:
                self.bias.copy_(conv.bias)
                self.shift.copy_(conv.bias)
            return
        scale, shift = self._bn.scale_shift()
        if conv.bias is not None:
            shift = shift + conv.bias * scale
        self.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
        self.bias.copy_(shift)
        self.shift.copy_(shift)


class ScaleShiftReLU(nn.Module):
    """An eval-mode BatchNorm that no convolution could take, an optional residual added, and the ReLU after it."""

    scale: Tensor
    shift: Tensor

    def __init__(self, bn: _BatchNormSource) -> None:
        super().__init__()
        self._bn = bn
        scale, shift = bn.scale_shift()
        self.register_buffer("scale", torch.empty_like(scale))
        self.register_buffer("shift", torch.empty_like(shift))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None and residual.shape != x.shape:
            per_channel = (-1, *[1] * (x.dim() - 2))
            return F.relu(x * self.scale.view(per_channel) + self.shift.view(per_channel) + residual)
        return scale_shift_relu(x, self.scale, self.shift, residual)

    def refresh_(self) -> None:
        scale, shift = self._bn.scale_shift()
        self.scale.copy_(scale)
        self.shift.copy_(shift)


class AdaptivePool(nn.Module):
    """Adaptive average pooling by the quickest operator that is the same at the size at hand.

    PyTorch's own takes half a millisecond for 128×64×2×2 to 2×2, where nothing is to be done, and as much again for its
    gradient: longer than either convolution before it in ``small_cnn``.
    """

    def __init__(self, output_size: Any) -> None:
        super().__init__()
        pair = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        self.output_size = tuple(pair)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        out_height, out_width = (
            have if want is None else want
            for want, have in zip(self.output_size, (height, width), strict=True)
        )
        if (height, width) == (out_height, out_width):
            return x
        if (out_height, out_width) == (1, 1):
            return x.mean((-2, -1), keepdim=True)
        if height % out_height == 0 and width % out_width == 0:
            return F.avg_pool2d(x, (height // out_height, width // out_width))
        return F.adaptive_avg_pool2d(x, self.output_size)


class _ConvEpilogue(torch.autograd.Function):
    """Convolution + bias (+ residual) (+ ReLU) as one oneDNN primitive, with the input gradient only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        relu: bool,
    ) -> Tensor:
        post = "relu" if relu else None
        if residual is None:
            out = torch.ops.mkldnn._convolution_pointwise(
                x, weight, bias, padding, stride, dilation, groups, post or "none", [], ""
            )
        else:
            out = torch.ops.mkldnn._convolution_pointwise.binary(
                x, residual, weight, bias, padding, stride, dilation, groups, "add", None, post, [], None
            )
        ctx.save_for_backward(x, weight, out if relu else None)
        ctx.geometry = (stride, padding, dilation, groups)
        ctx.relu = relu
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        if ctx.relu:
            if grad.stride() != out.stride():
                # As a copy of its own: an elementwise loop over two layouts takes several times as long.
                grad = torch.empty_like(out).copy_(grad)
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
            )[0]
        return grad_x, None, None, grad if ctx.needs_input_grad[3] else None, None, None, None, None, None


class _Conv3x3(torch.autograd.Function):
    """3x3 convolution + bias (+ residual) (+ ReLU) through ``conv3x3``, with the input gradient only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_dense_out: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        relu: bool,
    ) -> Tensor:
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        out = ops.kernel("conv3x3_forward", "cpu", "cpp")(x, weight_dense_out, bias, residual, relu)
        ctx.save_for_backward(weight, out if relu else None)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gate = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        wrt_x, wrt_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        if gate is not None and wrt_residual:
            # The residual's gradient is the gated one, so it is made once for both.
            grad, gate = torch.ops.aten.threshold_backward(grad, gate, 0), None
        grad_x = ops.kernel("conv3x3_input_grad", "cpu", "cpp")(grad, gate, weight) if wrt_x else None
        return grad_x, None, None, None, grad if wrt_residual else None, None


def _conv3x3_serves(x: Tensor) -> bool:
    """Whether ``conv3x3`` takes this image, and is the faster one: from 8 tiles of 4x4 pixels up, it was for 16 to
    512 channels and every size from 4x4 to 56x56; below, reading the weights is all there is to do."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    tiles = x.shape[0] * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
    return tiles >= 8 and ops.served_by("conv3x3_forward", "cpu") == "cpp"


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # inductor fuses the plain form itself
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32 == weight.dtype
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


class _BatchNormSource:
    """Where the live values of one BatchNorm are: its module and the names of its four tensors."""

    def __init__(self, places: Sequence[tuple[nn.Module, str] | None], eps: float) -> None:
        self.places = places  # mean, variance, weight, bias
        self.eps = eps

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        mean, variance, weight, bias = (
            None if place is None else _at_least_float32(getattr(*place)) for place in self.places
        )
        assert mean is not None
        assert variance is not None
        scale = torch.rsqrt(variance + self.eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale
        return scale, shift if bias is None else shift + bias


# ---- tracing -----------------------------------------------------------------------------------------------------


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
            self.untraced[path] = _first_line(error)
            return self.create_proxy("call_module", path, args, kwargs)


def _trace(network: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
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


# ---- rewriting ---------------------------------------------------------------------------------------------------

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


class _Rewriter:
    """Applies Note [Folding] to one traced graph."""

    def __init__(self, prepared: PreparedModel, graph_module: fx.GraphModule, live: nn.Module) -> None:
        self.prepared = prepared
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
                self.prepared.left.append(
                    f"BatchNorm {self.name_of(node)}, which no convolution or ReLU could take"
                )
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
            unknown = module is not None and not type(module).__module__.startswith(("torch.nn", __name__))
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
            self.prepared._scales.append(replacement)
            self.prepared.fused.append(self.name_of(main))
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
        self.prepared._folds.append(layer)
        if source is not None:
            self.prepared.folded.append(self.name_of(node))
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
            and not (isinstance(module.padding, str) and _padding(module) is None)
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

    def batch_norm_source(self, node: fx.Node) -> _BatchNormSource:
        module = self.module(node)
        if module is not None:
            live = self.live.get_submodule(str(node.target))
            names = ("running_mean", "running_var", "weight", "bias")
            places = [None if getattr(live, name) is None else (live, name) for name in names]
            return _BatchNormSource(places, module.eps)  # type: ignore[arg-type]
        values = self.batch_norm_arguments(node)
        assert values is not None
        places = []
        for name in ("running_mean", "running_var", "weight", "bias"):
            if values[name] is None:
                places.append(None)
                continue
            owner, _, attribute = str(values[name].target).rpartition(".")
            places.append((self.live.get_submodule(owner), attribute))
        return _BatchNormSource(places, values["eps"])

    def name_of(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        values = self.batch_norm_arguments(node)
        assert values is not None
        return str(values["running_mean"].target).rpartition(".")[0]


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


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _padding(conv: nn.Conv2d) -> Any:
    """The padding as two numbers; None for a "same" padding that is not symmetric."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    return conv.padding


def _at_least_float32(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
