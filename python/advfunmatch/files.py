"""Files that are either whole or as they were before, and one sentence when they cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from .errors import InputError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; on any failure, and at a kill at any moment, the old file stays as it was.

    Raises:
        InputError: with the system's reason (disk full, no permission, no such folder).
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)  # a pipe or a device has no old content to keep
            return
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        kept = "; what it held before is untouched" if path.is_file() else ""
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}{kept}") from error


def remove_partial_files(folder: Path) -> None:
    """Remove what `write_atomically` was writing into a folder when its process was killed."""
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, atomically."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def prepare_file(path: Path, what: str) -> None:
    """Create the folder of a file that is to be written, before work is spent on what goes into it.

    Raises:
        InputError: it cannot be, or `path` is a folder itself.
    """
    if path.is_dir():
        raise InputError(f"{what} is {str(path)!r}, which is a folder, but must be a file to write")
    make_folder(path.parent, f"the folder of {what}")


def make_folder(path: Path, what: str) -> None:
    """Create a folder and its parents; InputError says why it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what} {str(path)!r} cannot be created: {error.strerror}") from error
