"""Whether the tensors of a live network have changed since a prepared copy last read them.

Asked at every call, so it reads no values and waits for no device: a tensor is as it was if it is the same object, at
the same place in memory, PyTorch's version counter of in-place operations has not moved, and no optimizer that holds it
has made a step (the fused ones move no counter). So optimizers, ``load_state_dict``, BatchNorm's running statistics,
new parameters, ``.to(...)`` and ``p.data = ...`` all show. What writes *through* ``.data`` or a NumPy view
(``p.data.mul_(2)``), or replays a CUDA graph, moves nothing that could be seen.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# The last step that any optimizer made, and the last that one made with a tensor of that id.
_steps = count(1)
_last_step = 0
_stepped: dict[int, int] = {}
_watching: list[Any] = []


class Sources:
    """The tensors of a network's modules, and how they were at the last `note`."""

    def __init__(self, live: nn.Module) -> None:
        if not _watching:
            _watching.append(register_optimizer_step_post_hook(_count_step))
        self._live = live
        self._places = self._find()
        self._seen: list[tuple[Tensor, int | None, int]] = []
        self._step = 0

    def note(self) -> None:
        """Take the tensors as they are now for known."""
        self._step = _last_step
        try:
            self._seen = [_mark(holder[name]) for holder, name in self._places]
        except KeyError:  # one has gone, as where a parametrization took its place
            self._places = self._find()
            self._seen = [_mark(holder[name]) for holder, name in self._places]

    def have_changed(self) -> bool:
        """Whether one is not as it was at the last `note`."""
        try:
            for (holder, name), (tensor, version, address) in zip(self._places, self._seen, strict=True):
                now = holder[name]
                if now is not tensor or now.data_ptr() != address:
                    return True
                if version is not None and now._version != version:
                    return True
        except KeyError:
            return True
        if self._step == _last_step:
            return False
        step, self._step = self._step, _last_step
        return any(_stepped.get(id(tensor), 0) > step for tensor, _, _ in self._seen)

    def _find(self) -> list[tuple[Any, str]]:
        """Each tensor's name and the dictionary that holds it, so that one that is replaced is seen."""
        return [
            (holder, name)
            for module in self._live.modules()
            for holder in (module._parameters, module._buffers, vars(module))
            for name, value in holder.items()
            if isinstance(value, Tensor)
        ]


def _mark(tensor: Tensor) -> tuple[Tensor, int | None, int]:
    return tensor, None if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    global _last_step
    if torch.compiler.is_compiling():
        return
    _last_step = next(_steps)
    for group in optimizer.param_groups:
        _stepped.update(dict.fromkeys(map(id, group["params"]), _last_step))
