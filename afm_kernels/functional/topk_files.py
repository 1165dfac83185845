"""Files of a teacher's top k: safetensors, with a head that says what they are, so that a teacher is run once.

A file holds ``indices`` (rows, k) int32, ``log_probs`` (rows, k) and ``log_tail`` (rows), and in its head the version
of this format, the number of classes, k, temperature, dtype and mode. Files are not appended to: a long run of a
teacher writes one for every so many batches, each whole or not there at all, and ``load_topk`` reads a folder of
them as one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from afm_kernels.functional.checks import DTYPES
from afm_kernels.functional.topk import TopK

_FORMAT, _VERSION = "afm_kernels.TopK", "1"


def save_topk(
    path: str | os.PathLike[str],
    topk: TopK,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a TopK as a file of safetensors; it is there whole, or not at all.

    Args:
        path: the file. Of a long run write one for every so many batches, named in their order
            (``teacher/00042.safetensors``), into a folder of their own.
        topk: what to write, with its ``num_classes``. Rows of any shape come back as they are.
        dtype: what to round the log-probabilities to; float16 and int32 ids are 6 bytes a class. None keeps theirs.
        overwrite: whether a file of that name may be replaced.

    Raises:
        FileExistsError: there is a file of that name.
        ImportError: safetensors is not installed.
        ValueError, TypeError: ``topk`` knows no ``num_classes``, or an argument is not as above.

    >>> import tempfile, torch
    >>> from afm_kernels import TopK, load_topk, save_topk
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(2):
    ...         save_topk(f"{folder}/{i:05}.safetensors", TopK.from_logits(torch.randn(4, 100), 8))
    ...     print(load_topk(folder, rows=slice(3, 6)))
    TopK(rows=(3,), k=8, mode='tail', temperature=1.0, num_classes=100, log_probs=torch.float32)
    """
    safetensors_torch = _safetensors("torch")
    if not isinstance(topk, TopK):
        raise TypeError(f"topk is a {type(topk).__name__}; a TopK is expected")
    if topk.num_classes is None:
        raise ValueError(
            "topk has num_classes=None; a file says of how many classes its ids are: give TopK that"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; allowed: float16, bfloat16, float32, float64")
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; overwrite=True replaces it")
    log_probs = topk.log_probs if dtype is None else topk.log_probs.to(dtype)
    tensors = {"indices": topk.indices.int(), "log_probs": log_probs}
    if topk.log_tail is not None:
        tensors["log_tail"] = topk.log_tail
    head = {
        "format": _FORMAT,
        "version": _VERSION,
        "num_classes": str(topk.num_classes),
        "k": str(topk.k),
        "temperature": repr(topk.temperature),
        "dtype": str(log_probs.dtype).removeprefix("torch."),
        "mode": topk.mode,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        safetensors_torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, head
        )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_topk(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, rows: slice | None = None
) -> TopK:
    """Reads what ``save_topk`` wrote: a file, several, or a folder's ``*.safetensors`` in the order of their names.

    Args:
        path: a file, a folder, or a sequence of files. Rows of several are joined along their first dimension.
        rows: which rows to read, of all together and without a step; only theirs are read from the disk. None: all.

    Returns:
        A TopK on the CPU.

    Raises:
        FileNotFoundError: there is no such file, or no file of safetensors in the folder.
        ImportError: safetensors is not installed.
        ValueError: a file is cut short or another program's, files do not go together, or ``rows`` has a step.

    >>> import tempfile, torch
    >>> from afm_kernels import TopK, load_topk, save_topk
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_topk(f"{folder}/teacher.safetensors", TopK.from_logits(torch.randn(4, 100), 8))
    ...     load_topk(f"{folder}/teacher.safetensors").rows
    torch.Size([4])
    """
    files = _files(path)
    if rows is None:
        return TopK.cat([_read(file) for file in files]) if len(files) > 1 else _read(files[0])
    if rows.step not in (None, 1):
        raise ValueError(f"rows has a step of {rows.step}; allowed: 1")
    lengths = [_length(file) for file in files]
    start, stop, _ = rows.indices(sum(lengths))
    parts, before = [], 0
    for file, length in zip(files, lengths, strict=True):
        low, high = max(start - before, 0), min(stop - before, length)
        if low < high:
            parts.append(_read(file, slice(low, high)))
        before += length
    return TopK.cat(parts) if parts else _read(files[0], slice(0, 0))


def _safetensors(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"safetensors.{module}") if module else import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            "save_topk and load_topk need safetensors, which is not installed: pip install safetensors"
        ) from error


def _files(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    if not isinstance(path, (str, os.PathLike)):
        files = [Path(file) for file in path]
    elif Path(path).is_dir():
        files = sorted(Path(path).glob("*.safetensors"))
    else:
        files = [Path(path)]
    if not files:
        raise FileNotFoundError(f"{path} holds no file of safetensors")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there")
    return files


class _Opened:
    """A file of ours; whatever is wrong with it is one sentence that names it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.tensors = _safetensors("").safe_open(file, framework="pt")
        except ImportError:
            raise
        except Exception as error:  # what safetensors raises, by its version
            raise ValueError(f"{file} is no file of safetensors, or is cut short: {error}") from error
        head = self.tensors.metadata() or {}
        if head.get("format") != _FORMAT:
            raise ValueError(f"{file} was not written by save_topk: its head does not say {_FORMAT}")
        if head.get("version") != _VERSION:
            raise ValueError(
                f"{file} has version {head.get('version')!r} of the format; this library reads {_VERSION!r}"
            )
        self.head, self.names = head, list(self.tensors.keys())
        if not {"indices", "log_probs"} <= {*self.names} <= {"indices", "log_probs", "log_tail"}:
            raise ValueError(f"{file} does not hold what its head says: it has {sorted(self.names)}")

    def read(self, rows: slice | None) -> TopK:
        head = self.head
        try:
            parts = {
                name: self.tensors.get_tensor(name) if rows is None else self.tensors.get_slice(name)[rows]
                for name in self.names
            }
            topk = TopK(
                parts["indices"],
                parts["log_probs"],
                parts.get("log_tail"),
                head["mode"],
                float(head["temperature"]),
                num_classes=int(head["num_classes"]),
            )
            if str(topk.k) != head["k"] or f"torch.{head['dtype']}" != str(topk.log_probs.dtype):
                raise ValueError(f"k={head['k']} and {head['dtype']} are not what {topk} has")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.file} does not hold what its head says: {error}") from error
        return topk


def _read(file: Path, rows: slice | None = None) -> TopK:
    return _Opened(file).read(rows)


def _length(file: Path) -> int:
    return int(_Opened(file).tensors.get_slice("indices").get_shape()[0])
