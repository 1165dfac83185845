"""CUDA graphs of whole attacks: captured once for each kind of input, then replayed.

Note [Captured attack]
~~~~~~~~~~~~~~~~~~~~~~
A CUDA graph replays kernels on fixed addresses. So the images, labels and given teacher logits are copied into static
buffers, the networks must keep their parameters where they were (``prepare_for_attack(...).refresh_()`` writes in
place; an address that changed is part of the key, so it captures anew instead of reading freed memory), and noise
comes from a generator registered with the graph, which advances on each replay. Shapes, dtypes and layouts are in the
key too: a short last batch is simply one more graph. The least recently used graph beyond ``max_graphs`` is dropped.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..lean import PreparedModel

__all__ = ["CapturedAttack", "GraphCache", "capture_graph", "capture_key", "is_captured"]


class GraphCache:
    """The captured attacks of one ``PGDAttack``, at most ``max_graphs``, the least recently used dropped first."""

    def __init__(self, max_graphs: int) -> None:
        self.max_graphs = max_graphs
        self._entries: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, capture: Callable[[], Any]) -> Any:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        # Dropped before the capture, so that its memory is free for it.
        while len(self._entries) >= self.max_graphs:
            self._entries.popitem(last=False)
        self._entries[key] = capture()
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)


def is_captured(cuda_graph: bool | None, networks: tuple[nn.Module | None, ...], x: Tensor) -> bool:
    """Whether an attack on these networks is captured, as ``cuda_graph`` says; None: where all are prepared."""
    if cuda_graph is None:
        prepared = all(
            model is None or (isinstance(model, PreparedModel) and model.capturable) for model in networks
        )
        return x.is_cuda and prepared
    if cuda_graph and not x.is_cuda:
        raise ValueError(f"cuda_graph=True needs images on a CUDA device, got {x.device}")
    return cuda_graph


def capture_key(networks: tuple[nn.Module | None, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """What a captured attack holds fixed: the networks at their places in memory, layouts, and autocast's state."""
    x = inputs[0]
    assert x is not None
    autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
    return (*map(_addresses, networks), *map(_layout, inputs), *autocast)


def _addresses(model: nn.Module | None) -> tuple[int, ...]:
    """What tells one network, at its place in memory, from another."""
    if model is None:
        return ()
    return (id(model), *(t.data_ptr() for t in (*model.parameters(), *model.buffers())))


def _layout(t: Tensor | None) -> Any:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


class CapturedAttack:
    """One attack on static buffers as a CUDA graph: copy in, replay, copy out. See Note [Captured attack]."""

    def __init__(
        self,
        attack: Callable[..., Tensor],
        networks: tuple[nn.Module | None, ...],
        inputs: tuple[Tensor | None, ...],
        generator: torch.Generator | None,
    ) -> None:
        # The networks are held, so that no address in the key is freed and used again by another network.
        self.networks = networks
        self.static_inputs = tuple(None if t is None else t.clone() for t in inputs)
        device = next(t.device for t in inputs if t is not None)
        self.static_output, self.replay = capture_graph(
            lambda: attack(*self.static_inputs), device, generator
        )

    def __call__(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        for static, given in zip(self.static_inputs, inputs, strict=True):
            if static is not None and given is not None:
                static.copy_(given)
        self.replay()
        return self.static_output.clone()


def capture_graph(
    run: Callable[[], Tensor], device: torch.device, generator: torch.Generator | None
) -> tuple[Tensor, Callable[[], None]]:
    """Capture ``run`` as a CUDA graph: its output's static buffer, and the call that replays it.

    The random state is as if the warm-up had not happened.
    """
    # The graph's stream belongs to the device that is current, and the workspaces of cuBLAS to the stream.
    with torch.cuda.device(device), _no_autocast_cache():
        noise = generator or torch.cuda.default_generators[torch.cuda.current_device()]
        state = noise.get_state()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):  # cuDNN and cuBLAS choose their kernels and allocate their workspaces here
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        noise.set_state(state)
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=side):
                output = run()
        except RuntimeError as error:
            raise RuntimeError(
                "the attack could not be captured as a CUDA graph: a network or the objective reads the device or "
                "allocates by its data; pass cuda_graph=False to run it eagerly"
            ) from error
        return output, graph.replay


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Weights that autocast has converted live in its cache: a graph must neither read one from there, which an update
    would not reach, nor leave one there, in memory that its replays write again."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
