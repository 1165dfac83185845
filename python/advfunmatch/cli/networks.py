"""The networks that a command is told of by files, and what is said of the files of other projects."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

from torch import nn

from ..data import ImageDataset
from ..errors import InputError
from ..models import ClassesReordered, load_network


class ForeignWeights(NamedTuple):
    """What a file of another project leaves open: architecture, normalisation, key of the weights."""

    model: str | None = None
    normalize: str | None = None
    weights_key: str | None = None


def load(
    path: str, foreign: ForeignWeights, data: ImageDataset, what: str = "checkpoint"
) -> tuple[nn.Module, dict[str, Any]]:
    """`load_network`, which says so where classes were put into another order.

    Under ``doubts`` the dict has all that was said.
    """
    if foreign.model is None:
        prefix = "teacher_" if what == "teacher" else ""
        for name, value in foreign._asdict().items():
            if value is not None:
                raise InputError(
                    f"{prefix}{name} is {value!r}, which needs {prefix}model, the architecture of the weights"
                )
    network, stored = load_network(
        path, foreign.model, data, what, normalize=foreign.normalize, weights_key=foreign.weights_key
    )
    if isinstance(network, ClassesReordered):
        note = f"{what} {path!r} counts its classes in another order than data {data.name!r}; matched by name"
        print(f"note: {note}", file=sys.stderr)
        stored["doubts"].append(note)
    return network, stored


def remembered_teacher(stored: dict[str, Any]) -> tuple[str | None, ForeignWeights]:
    """The teacher that a student was trained with and what else was said of it, if the file is still there."""
    known = stored["config"].get
    path = known("teacher")
    if path is None or not os.path.exists(path):
        return None, ForeignWeights()
    return path, ForeignWeights(
        known("teacher_model"), known("teacher_normalize"), known("teacher_weights_key")
    )
