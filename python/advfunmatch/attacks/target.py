"""What is attacked: both networks, and what is known of the clean images.

Note [Rows]
~~~~~~~~~~~
An objective sees rows of logits (R, C). A classifier has one for each image; dense logits (N, C, ...), as of a
segmentation, have one for each pixel, in the order of the labels (N, ...). What an image is worth is then the sum over
its rows, and rows labelled `IGNORED` count nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..lean import PreparedModel, own_vjp
from ..models import logits_in

BN_MODES = ("eval", "batch", "train")
IGNORED = -100  # the label of a pixel that does not count, as in torch.nn.functional.cross_entropy


class Forward(NamedTuple):
    """What a step has of the networks at x_adv: a fresh leaf there, and both sides' logits (R, C), see Note [Rows].

    Logits that move with x_adv have a graph up to the leaf; or none, and a pullback, where the network is prepared and
    its backward its own: it takes their gradient to that by x_adv.
    """

    leaf: Tensor
    student: Tensor
    teacher: Tensor | None = None
    pull_student: Callable[[Tensor], Tensor] | None = None
    pull_teacher: Callable[[Tensor], Tensor] | None = None

    def known(self) -> tuple[Tensor, Tensor | None]:
        """Both sides' logits for an objective, which differentiates nothing."""
        return self.student.detach(), None if self.teacher is None else self.teacher.detach()


class Target(NamedTuple):
    """The networks, and what is known of the clean images: labels (R,) and logits (R, C), see Note [Rows]."""

    student: nn.Module
    teacher: nn.Module | None = None
    labels: Tensor | None = None
    teacher_logits: Tensor | None = None

    def rows(self, index: Tensor) -> Target:
        """The same for some of the images."""
        return self._replace(
            labels=None if self.labels is None else self.labels[index],
            teacher_logits=None if self.teacher_logits is None else self.teacher_logits[index],
        )

    def follow_(self) -> None:
        """Bring prepared networks up to date, also those in code that was compiled or captured, which cannot see it."""
        for network in (self.student, self.teacher):
            for module in () if network is None else network.modules():
                if isinstance(module, PreparedModel):
                    module.follow_()

    def in_its_format(self, x: Tensor) -> Tensor:
        """x in the memory format of the prepared networks, so that it is converted once and not at every step."""
        formats = {m.memory_format for m in (self.student, self.teacher) if isinstance(m, PreparedModel)}
        if x.dim() == 4 and torch.channels_last in formats:
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def forward(self, x_adv: Tensor, teacher_moves: bool, side: torch.cuda.Stream | None = None) -> Forward:
        """Both networks at x_adv, the teacher to be differentiated where it moves.

        ``side``: a stream for the teacher to run on.
        """
        leaf = x_adv.detach().requires_grad_(True)
        if self.teacher is None:
            z_s, pull_s = _moving_logits(self.student, leaf)
            return Forward(leaf, z_s, self.teacher_logits, pull_s)
        if side is None:
            z_s, pull_s = _moving_logits(self.student, leaf)
            if teacher_moves:
                z_t, pull_t = _moving_logits(self.teacher, leaf)
                return Forward(leaf, z_s, z_t, pull_s, pull_t)
            with torch.no_grad():
                return Forward(leaf, z_s, logits_of(self.teacher, leaf), pull_s)
        here = torch.cuda.current_stream(leaf.device)
        side.wait_stream(here)
        with torch.cuda.stream(side), torch.set_grad_enabled(teacher_moves):
            z_t = logits_of(self.teacher, leaf)
        z_s = logits_of(self.student, leaf)
        here.wait_stream(side)
        # Allocated on the side stream and used on this one: its memory must not be reused before this one is done.
        z_t.record_stream(here)
        leaf.record_stream(side)
        return Forward(leaf, z_s, z_t)


def _moving_logits(model: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    own = own_vjp(model, x)
    if own is None:
        return logits_of(model, x), None
    logits, pullback = own
    rows = _checked_rows(model, logits, x)
    if rows.shape == logits.shape:
        return rows, pullback
    shape = logits.shape
    by_pixel = shape[0], *shape[2:], shape[1]
    return rows, lambda grad: pullback(grad.view(by_pixel).movedim(-1, 1))


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The rows of the network's logits, or of those in the object that it returns; see Note [Rows]."""
    return _checked_rows(model, logits_in(model(x)), x)


def _checked_rows(model: nn.Module, logits: Any, x: Tensor) -> Tensor:
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{type(model).__name__} must return a tensor of logits, or an object with such logits, got "
            f"{type(logits).__name__}"
        )
    if logits.dim() < 2 or len(logits) != len(x):
        raise ValueError(
            f"{type(model).__name__} must return logits (N, C) or (N, C, ...) with N = {len(x)}, got "
            f"{tuple(logits.shape)}"
        )
    return rows_of(logits)


def rows_of(logits: Tensor) -> Tensor:
    """(R, C) from (N, C, ...)."""
    return logits if logits.dim() == 2 else logits.movedim(1, -1).reshape(-1, logits.shape[1])


def score_of(
    objective: Any, student: Tensor, teacher: Tensor | None, labels: Tensor | None, images: int
) -> Tensor:
    """The objective's score of each image, from rows of logits; see Note [Rows]."""
    if len(student) == images:
        return objective.score(student, teacher, labels)
    score = getattr(objective, "additive_score", objective.score)
    counted, labels = without_ignored(labels)
    scores: Tensor = score(student, teacher, labels)
    return (scores if counted is None else scores.masked_fill(~counted, 0)).view(images, -1).sum(1)


def without_ignored(labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Which rows count, and the labels with some class for the others, as an index needs; None without labels."""
    if labels is None:
        return None, None
    counted = labels != IGNORED
    return counted, labels.masked_fill(~counted, 0)


def in_format_of(result: Tensor, x: Tensor) -> Tensor:
    """The result with the strides of x."""
    if result.stride() == x.stride():
        return result
    return torch.empty_like(x).copy_(result)


def batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    """The BatchNorm modules of a network."""
    return (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


@contextlib.contextmanager
def eval_modes(student: nn.Module, teacher: nn.Module | None, bn: str) -> Iterator[None]:
    """Both networks in eval mode but for the student's BatchNorm as ``bn`` says; afterwards all is as it was."""
    changed: list[tuple[nn.Module, str, bool]] = []

    def switch(module: nn.Module, flag: str, value: bool) -> None:
        # What was frozen in TorchScript has no modes any more.
        if getattr(module, flag, value) != value:
            changed.append((module, flag, getattr(module, flag)))
            setattr(module, flag, value)

    try:
        for model, mode in ((student, bn), (teacher, "eval")):
            for module in () if model is None else model.modules():
                is_bn = isinstance(module, nn.modules.batchnorm._BatchNorm)
                switch(module, "training", is_bn and mode != "eval")
                if is_bn and mode == "batch":
                    # With nothing tracked, one in training mode neither reads nor writes running statistics.
                    switch(module, "track_running_stats", False)
        yield
    finally:
        for module, flag, value in reversed(changed):
            setattr(module, flag, value)
