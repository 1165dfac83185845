"""A teacher of whom the k likeliest classes are kept, and the mass of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afm_kernels import ops
from afm_kernels.functional.checks import (
    check_choice,
    check_dense,
    check_floating,
    check_integer,
    check_positive,
)

_CHUNK_ELEMENTS = 1 << 24  # of teacher logits that from_logits copies at a time: 64 MiB in float32


def can_be_looked_at(tensor: Tensor) -> bool:
    """Whether an answer about its numbers waits for no device, and nobody traces."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and type(tensor) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
    )


class TopK:
    """The log-probabilities of k classes for each row, and the log of what all other classes have together.

    Args:
        indices: (..., k) int32 or int64, the kept classes of each row, in any order. -1 is padding, for rows that keep
            fewer. A class that comes twice in a row is an error; on devices other than the CPU, where the answer would
            have to be waited for, and in compiled calls, nobody looks, and it counts twice among the kept classes.
        log_probs: (..., k) floating point, log softmax(teacher_logits / temperature) at ``indices``, normalised over
            all classes. At padding it may hold anything.
        log_tail: (...), the log of the sum of softmax over the classes that are not kept; ``mode="tail"`` needs it.
            Take it where all logits are at hand, as ``from_logits`` does: one minus the kept probabilities has lost
            most of its digits where the tail is small.
        mode: what the loss makes of the classes that are not kept. "tail": they are one class more, whose mass the
            student has to match. "renormalise": the teacher has nothing there, its kept probabilities are divided by
            their sum. "both": so are the student's, whose other logits have no part. "truncate": the plain sum over
            the kept classes, which may be negative, since what it is taken from is no distribution.
        temperature: the one of the softmax. Another one cannot be had of k log-probabilities.
        num_classes: the size of the vocabulary, where it is known; student logits of another size are refused then.

    ``topk[rows]`` takes rows, as of a tensor of theirs, ``TopK.cat`` joins them, ``save_topk`` and ``load_topk`` keep
    them.

    Raises:
        ValueError, TypeError: an argument is not as above.

    >>> import torch
    >>> from afm_kernels import TopK, topk_kl_div
    >>> teacher = TopK.from_logits(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2)
    >>> teacher.indices.tolist(), [round(p, 4) for p in teacher.log_probs.exp()[0].tolist()]
    ([[0, 2]], [0.6439, 0.2369])
    >>> round(topk_kl_div(torch.zeros(1, 4), teacher).item(), 4)
    0.4255
    """

    def __init__(
        self,
        indices: Tensor,
        log_probs: Tensor,
        log_tail: Tensor | None = None,
        mode: str = "tail",
        temperature: float = 1.0,
        *,
        num_classes: int | None = None,
    ) -> None:
        self.indices = indices
        self.log_probs = log_probs
        self.log_tail = log_tail
        self.mode = mode
        self.temperature = check_positive("temperature", temperature)
        self.num_classes = None if num_classes is None else check_integer("num_classes", num_classes)
        #: up to which number of classes the ids were found to be fit; None: nobody has looked yet
        self._fit_for: int | None = None
        check_choice("mode", mode, ops.TOPK_MODES)
        _check_tensors(indices, log_probs, log_tail, mode)
        if can_be_looked_at(log_probs):
            _check_log_probs(log_probs, indices)
            _check_no_duplicates(indices)
        if self.num_classes is not None:
            self.check_ids(self.num_classes)

    @staticmethod
    def from_logits(teacher_logits: Tensor, k: int, *, temperature: float = 1.0, dim: int = -1) -> TopK:
        """Keeps the k likeliest classes of each row, in ``mode="tail"``; the tail is summed over the others.

        Args:
            teacher_logits: any shape, floating point. No gradient flows into what is kept of them.
            k: how many classes to keep, at most as many as there are. With all of them the tail is -inf, and the loss
                is ``softmax_kl_div``'s.
            temperature: T, positive.
            dim: the class dimension. In the result k comes last, wherever the classes were.

        Returns:
            A TopK with int32 ids, most likely first, and float32 logarithms (float64 of float64 logits).

        Raises:
            ValueError, TypeError: an argument is not as above.

        >>> import torch
        >>> from afm_kernels import TopK
        >>> TopK.from_logits(torch.randn(8, 100), 5, temperature=2.0)
        TopK(rows=(8,), k=5, mode='tail', temperature=2.0, num_classes=100, log_probs=torch.float32)
        """
        check_floating("teacher_logits", teacher_logits)
        temperature = check_positive("temperature", temperature)
        k = check_integer("k", k)
        dim = check_integer("dim", dim)
        if not -teacher_logits.dim() <= dim < teacher_logits.dim():
            raise ValueError(f"dim is {dim}, but teacher_logits has shape {tuple(teacher_logits.shape)}")
        logits = teacher_logits.detach().movedim(dim, -1)
        num_classes = logits.shape[-1]
        if not 1 <= k <= num_classes:
            raise ValueError(f"k is {k}; allowed: 1 to {num_classes}, the number of classes")
        rows = logits.shape[:-1]
        logits = logits.reshape(-1, num_classes)
        step = max(1, _CHUNK_ELEMENTS // num_classes)
        with torch.no_grad():
            parts = [_largest(chunk, k, temperature) for chunk in logits.split(step)]
        ids, log_probs, log_tail = (torch.cat(part) for part in zip(*parts, strict=True))
        made = TopK._made(
            ids.reshape(*rows, k), log_probs.reshape(*rows, k), log_tail.reshape(rows), "tail", temperature
        )
        made.num_classes = made._fit_for = num_classes
        return made

    @staticmethod
    def cat(parts: Sequence[TopK]) -> TopK:
        """Joins the rows of several, along their first dimension; one that keeps fewer classes is padded.

        Raises:
            ValueError: there are none, or they differ in mode, temperature, vocabulary or the shape of their rows.
        """
        if not parts:
            raise ValueError("parts is empty; at least one TopK is expected")
        first = parts[0]
        for i, part in enumerate(parts):
            for name in ("mode", "temperature", "num_classes"):
                if getattr(part, name) != getattr(first, name):
                    raise ValueError(
                        f"parts[{i}] has {name}={getattr(part, name)!r} and parts[0] {name}={getattr(first, name)!r}; "
                        "they must be equal"
                    )
            if not part.rows or part.rows[1:] != first.rows[1:]:
                raise ValueError(
                    f"parts[{i}] has rows of shape {tuple(part.rows)} and parts[0] {tuple(first.rows)}; they must be "
                    "equal but for the first dimension"
                )
            if (part.log_tail is None) != (first.log_tail is None):
                raise ValueError(f"of parts[{i}] and parts[0] only one has a log_tail")
        tails = [part.log_tail for part in parts if part.log_tail is not None]
        k = max(part.k for part in parts)

        def padded(tensor: Tensor, fill: float) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, k - tensor.shape[-1]), value=fill)

        made = TopK._made(
            torch.cat([padded(part.indices, -1) for part in parts]),
            torch.cat([padded(part.log_probs, -torch.inf) for part in parts]),
            torch.cat(tails) if tails else None,
            first.mode,
            first.temperature,
        )
        made.num_classes = first.num_classes
        if all(part._fit_for == first._fit_for for part in parts):
            made._fit_for = first._fit_for
        return made

    @property
    def rows(self) -> torch.Size:
        """The shape of the rows."""
        return self.indices.shape[:-1]

    @property
    def k(self) -> int:
        """How many classes a row keeps at most."""
        return self.indices.shape[-1]

    def __len__(self) -> int:
        return self.indices.shape[0]

    def __getitem__(self, rows: Any) -> TopK:
        """The rows that a tensor of one number a row would give for this index: a number, a slice, a mask, or ids."""
        return self._with(lambda tensor: tensor[rows], lambda tensor: tensor[_with_all_of_last(rows)])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TopK:
        """On another device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TopK:
        """In page-locked memory, as ``torch.utils.data.DataLoader`` asks for."""
        return self._with(lambda tensor: tensor.pin_memory())

    def reshape(self, *rows: int) -> TopK:
        """With rows of another shape: (batch, length), say, of those of a flat file."""
        return self._with(lambda tensor: tensor.reshape(*rows), lambda tensor: tensor.reshape(*rows, self.k))

    def with_mode(self, mode: str) -> TopK:
        """The same numbers under another ``mode``."""
        check_choice("mode", mode, ops.TOPK_MODES)
        _check_tensors(self.indices, self.log_probs, self.log_tail, mode)
        made = self._with(lambda tensor: tensor)
        made.mode = mode
        return made

    def check_ids(self, num_classes: int) -> None:
        """Raises where an id is no class of ``num_classes``, and the answer waits for no device."""
        indices = self.indices
        if self._fit_for == num_classes or not can_be_looked_at(indices):
            return
        if indices.numel() > 0:
            lowest, highest = (bound.item() for bound in indices.aminmax())
            if lowest < -1 or highest >= num_classes:
                strange = lowest if lowest < -1 else highest
                raise ValueError(
                    f"indices holds {strange}; allowed: 0 to {num_classes - 1}, and -1 for padding"
                )
        self._fit_for = num_classes

    def __repr__(self) -> str:
        return (
            f"TopK(rows={tuple(self.rows)}, k={self.k}, mode={self.mode!r}, temperature={self.temperature}, "
            f"num_classes={self.num_classes}, log_probs={self.log_probs.dtype})"
        )

    @classmethod
    def _made(
        cls, indices: Tensor, log_probs: Tensor, log_tail: Tensor | None, mode: str, temperature: float
    ) -> TopK:
        """Of parts of what has been checked."""
        made = cls.__new__(cls)
        made.indices, made.log_probs, made.log_tail = indices, log_probs, log_tail
        made.mode, made.temperature = mode, temperature
        made.num_classes = made._fit_for = None
        return made

    def _with(self, of_rows: Any, of_classes: Any = None) -> TopK:
        of_classes = of_rows if of_classes is None else of_classes
        tail = None if self.log_tail is None else of_rows(self.log_tail)
        made = TopK._made(
            of_classes(self.indices), of_classes(self.log_probs), tail, self.mode, self.temperature
        )
        made.num_classes, made._fit_for = self.num_classes, self._fit_for
        return made


def _with_all_of_last(rows: Any) -> tuple[Any, ...]:
    rows = rows if isinstance(rows, tuple) else (rows,)
    return (*rows, slice(None)) if Ellipsis in [r for r in rows if not isinstance(r, Tensor)] else rows


def _largest(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and log of the tail of rows (N, C), in float64 beyond the exponentials."""
    dtype = ops.accumulation_dtype(logits)
    logits = logits.to(dtype)
    top, ids = logits.topk(k)
    peak = top[:, :1]
    rest = ((logits - peak) / temperature).scatter_(-1, ids, -torch.inf)
    log_rest = rest.logsumexp(-1).double()
    kept = (top.double() - peak.double()) / temperature
    log_sum = torch.logaddexp(kept.logsumexp(-1), log_rest)
    return ids.int(), (kept - log_sum.unsqueeze(-1)).to(dtype), (log_rest - log_sum).to(dtype)


def _check_tensors(indices: Tensor, log_probs: Tensor, log_tail: Tensor | None, mode: str) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices is a {type(indices).__name__}; an int32 or int64 tensor is expected")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices has dtype {indices.dtype}; allowed: int32, int64")
    check_dense("indices", indices)
    check_floating("log_probs", log_probs)
    if indices.dim() == 0 or indices.shape != log_probs.shape:
        raise ValueError(
            f"log_probs has shape {tuple(log_probs.shape)} and indices {tuple(indices.shape)}; they must be equal, "
            "the rows' and k"
        )
    if log_tail is None:
        if mode == "tail":
            raise ValueError(
                "log_tail is None, but mode='tail' needs the log of the mass of the classes that are not kept: take it "
                "from all logits, as TopK.from_logits does, or choose mode='renormalise', 'both' or 'truncate'"
            )
    else:
        check_floating("log_tail", log_tail)
        if log_tail.shape != indices.shape[:-1]:
            raise ValueError(
                f"log_tail has shape {tuple(log_tail.shape)}; expected that of the rows, {tuple(indices.shape[:-1])}"
            )
    for name, tensor in (("log_probs", log_probs), ("log_tail", log_tail)):
        if tensor is None:
            continue
        if tensor.device != indices.device:
            raise ValueError(
                f"{name} is on {tensor.device} and indices on {indices.device}; they must be on one device"
            )
        if tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, but a TopK is a constant of the loss: pass {name}.detach()"
            )


def _check_log_probs(log_probs: Tensor, indices: Tensor) -> None:
    if log_probs.numel() == 0 or not (log_probs > 1e-3).any().item():  # what arithmetic made of 0 is let pass
        return
    strange = (log_probs > 1e-3) & (indices >= 0)
    if strange.any().item():
        raise ValueError(
            f"log_probs holds {log_probs[strange][0].item():g}; logarithms of probabilities are at most 0"
        )


def _check_no_duplicates(indices: Tensor) -> None:
    ordered = indices.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any().item():
        raise ValueError(
            f"indices holds class {ordered[..., 1:][twice][0].item()} twice in a row; a row keeps each class once"
        )
    if indices.numel() > 0 and ordered[..., 0].min().item() < -1:
        raise ValueError(f"indices holds {ordered.min().item()}; allowed: classes, and -1 for padding")
