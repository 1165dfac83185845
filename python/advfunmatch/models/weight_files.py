"""Files of weights, read without running anything in them: those of ``torch.save``, and safetensors.

Note [Nothing in a file is run]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
``torch.load(weights_only=True)`` makes tensors, containers and numbers, and refuses every other type. Types that hold
values and do nothing, which training code stores beside its weights (its options, NumPy's numbers, paths), are let
through. A whole module is a reference to its class, whose code would be run: it is refused, as is whatever else a file
turns out to be, by a sentence that says what it is.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import pickletools
import re
import tarfile
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import write_atomically

BEGINNINGS = {
    b"\x89HDF": "an HDF5 file, as Keras writes them",
    b"version https://git-lfs": "a pointer of Git LFS, not the file it stands for (git lfs pull fetches that)",
    b"<!DOCTYPE": "a web page: the download has failed",
    b"<html": "a web page: the download has failed",
    b"<!doctype": "a web page: the download has failed",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a rar archive: unpack it first",
    b"\x93NUMPY": "a NumPy array",
}
OF_A_RUN = "checkpoint.pt"  # what stands for the folder of a run
ABOUT = "advfunmatch"  # the entry in the head of our files of safetensors
FACTORIES = (list, dict, set, int, float, str, tuple, bool)  # what a defaultdict is made with
MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # with which the older files of torch.save begin, within a pickle
NO_SUCH_TYPE = re.compile(r"(?:Unsupported (?:global: GLOBAL|class)|GLOBAL) ([\w.]+)")


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _plain_list(*_: Any) -> list[Any]:
    return []


def _values_only() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """See Note [Nothing in a file is run]."""
    kinds: list[Any] = [argparse.Namespace, np.ndarray, np.dtype]
    kinds += [pathlib.PurePosixPath, pathlib.PureWindowsPath]
    # A path of the other system cannot be made here; its pure form can.
    kinds += [(pathlib.PurePosixPath, "pathlib.PosixPath"), (pathlib.PureWindowsPath, "pathlib.WindowsPath")]
    kinds += [datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone, types.SimpleNamespace]
    kinds += [frozenset, range, slice]
    # A dict that makes what is missing by calling something becomes one that does not.
    kinds += [(_plain_dict, "collections.defaultdict")]
    kinds += [(_plain_list, "collections.deque")]  # for which torch.load has no appending
    kinds += [
        (kind, f"{module}.{kind.__name__}") for module in ("builtins", "__builtin__") for kind in FACTORIES
    ]
    kinds += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
    reconstruct, (scalar, *_) = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since NumPy 2
        kinds += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return kinds


def read_weight_file(path: str | Path, what: str) -> Any:
    """What a file holds, on the CPU: of safetensors a dict of tensors, else what ``torch.save`` was given.

    Args:
        path: the file, or the folder of a run, for its checkpoint.pt.
        what: how to call it in an error.

    Raises:
        InputError: it is missing, truncated, damaged, something else, or needs code to be run.
    """
    what = f"{what} {str(path)!r}"
    if os.path.isdir(path):
        if not os.path.isfile(path := Path(path, OF_A_RUN)):
            raise InputError(f"{what} is not a file, and as a folder it holds no {OF_A_RUN}")
    elif not os.path.isfile(path):
        raise InputError(f"{what} does not exist or is not a file")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror}") from error
    if not start:
        raise InputError(f"{what} is empty")
    for beginning, kind in BEGINNINGS.items():
        if start.startswith(beginning):
            raise InputError(f"{what} is {kind}")
    if str(path).endswith(".safetensors") or start[8:10] == b'{"':
        return _read_safetensors(path, what)
    if start.startswith(b"PK"):
        _require_whole_archive(path, what)
    elif start.startswith(b"\x80") and MAGIC not in start:
        raise InputError(
            f"{what} is a pickle, but not one of torch.save; where it is trusted, its weights alone: "
            f"stored = pickle.load(open({str(path)!r}, 'rb')); torch.save(dict(stored), 'weights.pt')"
        )
    elif tarfile.is_tarfile(path):
        raise InputError(f"{what} is a tar archive: unpack it first")
    elif not start.startswith(b"\x80"):
        raise InputError(f"{what} is not a PyTorch checkpoint: neither a file of torch.save nor safetensors")
    try:
        # The pickle's own classes only, under names that no file can change.
        with torch.serialization.safe_globals(_values_only()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own for a file that is not one
        raise _refusal(path, what, error) from error


def write_safetensors(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Replace a file of safetensors atomically.

    Args:
        path: the file.
        weights: the tensors; they are stored contiguous, whatever their memory format, and each for itself.
        about: plain values, which go as JSON into the file's head, where `read_weight_file` finds them.

    Raises:
        InputError: it cannot be written; the old one then stays.
    """
    import safetensors.torch

    kept = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    head = {"format": "pt", ABOUT: json.dumps(about)}
    write_atomically(path, safetensors.torch.save(kept, head))


def _read_safetensors(path: str | Path, what: str) -> dict[str, Any]:
    """Its tensors; of a file with a head of `write_safetensors` that head, and the tensors as ``state_dict``."""
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(f"{what} needs the package safetensors: pip install safetensors") from None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "null"))
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError) as error:
        damage = "truncated" if _ends_early(path) else "damaged, or not a file of safetensors"
        raise InputError(f"{what} is {damage}: {error}") from error
    return {**about, "state_dict": tensors} if isinstance(about, dict) else tensors


def _ends_early(path: str | Path) -> bool:
    """Whether a file of safetensors is shorter than its head says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file.read(1) != b"{":
            return False
        file.seek(8)
        size = os.path.getsize(path)
        if size < 8 + length:
            return True
        try:
            head = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError):
            return False
    return size < 8 + length + max(ends, default=0)


def _require_whole_archive(path: str | Path, what: str) -> None:
    """InputError for a zip archive that has no end, or is none of ``torch.save``."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            names = [name.partition("/")[2] for name in members]
    except (zipfile.BadZipFile, OSError):
        raise InputError(
            f"{what} is truncated: it begins as an archive of torch.save, but lacks its end"
        ) from None
    if "constants.pkl" in names:
        raise InputError(
            f"{what} is a TorchScript program, whose code would be run; where it is trusted, its weights alone: "
            f"network = torch.jit.load({str(path)!r}); torch.save(network.state_dict(), 'weights.pt')"
        )
    if "data.pkl" not in names:
        if any(name.startswith("models/") for name in names):
            raise InputError(f"{what} is a program of torch.export, and holds no file of torch.save")
        if all(name.endswith(".npy") for name in members):
            raise InputError(
                f"{what} is an archive of NumPy arrays; if they are a state dict: "
                f"torch.save(dict(numpy.load({str(path)!r})), 'weights.pt')"
            )
        raise InputError(
            f"{what} is a zip archive of {', '.join(members[:3]) or 'nothing'}, and no file of torch.save: unpack it "
            "first"
        )


def _refusal(path: str | Path, what: str, error: Exception) -> InputError:
    text = str(error)
    if match := NO_SUCH_TYPE.search(text):
        return _needs_code(path, what, match[1])
    if "unexpected EOF" in text or "Ran out of input" in text or (isinstance(error, EOFError)):
        return InputError(f"{what} is truncated: {text.partition('.')[0] or 'its end is missing'}")
    if "WeightsUnpickler error: " in text:
        return _needs_code(path, what, "part that torch.load(weights_only=True) cannot make")
    if zipfile.is_zipfile(path):
        return InputError(f"{what} is damaged: {text.strip().partition(chr(10))[0]}")
    return InputError(f"{what} is not a PyTorch checkpoint: neither a file of torch.save nor safetensors")


def _needs_code(path: str | Path, what: str, kind: str) -> InputError:
    """The refusal of a type that torch.load does not make of itself."""
    kinds = [kind, *_types_in(path)]
    lines = f"stored = torch.load({str(path)!r}, weights_only=False)"
    if any(each.startswith("torch.nn.modules.") for each in kinds):
        own = next((each for each in kinds if not each.startswith(("torch.", "numpy.", "argparse."))), kind)
        return InputError(
            f"{what} holds a whole module, of type {own}, whose code would be run; where it is trusted, its weights "
            f"alone: {lines}; torch.save(stored.state_dict(), 'weights.pt'), or stored['net'].state_dict() of a dict"
        )
    return InputError(
        f"{what} holds a {kind}, whose code would be run, beside or in place of weights; where it is trusted, the "
        f"weights alone: {lines}; torch.save(dict(stored['state_dict']), 'weights.pt'), with the key that they have"
    )


def _types_in(path: str | Path) -> list[str]:
    """The types that a file's pickles name, found without making any of them."""
    if zipfile.is_zipfile(path):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    found = []
    with open(path, "rb") as file, contextlib.suppress(ValueError):  # where the tensors' bytes begin
        while True:
            for code, value, _ in pickletools.genops(file):
                if code.name == "GLOBAL":
                    found.append(str(value).replace(" ", "."))
    return found
