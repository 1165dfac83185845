"""checkpoint.pt: a network that knows what it is, and where its training stood.

Note [Checkpoint]
~~~~~~~~~~~~~~~~~
A dict of tensors and plain Python values, so that ``torch.load(path, weights_only=True)`` reads it:

* ``format``, ``version``: "advfunmatch" and 1.
* ``model``, ``num_classes``, ``in_channels``, ``image_size``, ``class_names``: what `create_model` needs, and the data.
* ``state_dict``: the weights that are evaluated.
* ``config``: the resolved `TrainConfig` as a dict.
* ``epoch``, ``step``: how many were completed.
* ``training``: what only a continued run needs (the optimizer's state).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import ImageDataset
from .errors import InputError
from .files import write_atomically
from .models import create_model, load_weights

FORMAT = "advfunmatch"
VERSION = 1
REQUIRED = {
    "model": str,
    "num_classes": int,
    "in_channels": int,
    "image_size": list,
    "class_names": list,
    "state_dict": dict,
    "config": dict,
}


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Replace `path` atomically; InputError if it cannot be written, and the old one then stays."""
    # Through memory: torch.save into a file reports a full disk as an assertion of its zip writer.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **checkpoint}, buffer)
    write_atomically(path, buffer.getvalue())


def read_checkpoint(path: str | Path, what: str = "checkpoint") -> dict[str, Any]:
    """The dict of Note [Checkpoint], on the CPU.

    Raises:
        InputError: if the file is missing, truncated, no checkpoint, or not one of this project's.
    """
    checkpoint = _load(path, what)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{what} {str(path)!r} was not written by advfunmatch train")
    missing = [name for name, kind in REQUIRED.items() if not isinstance(checkpoint.get(name), kind)]
    if missing or checkpoint.get("version") != VERSION:
        reason = f"lacks {missing[0]!r}" if missing else f"has format version {checkpoint.get('version')}"
        raise InputError(f"{what} {str(path)!r} {reason}, and cannot be read by this version of advfunmatch")
    return checkpoint


def _load(path: str | Path, what: str) -> Any:
    if not Path(path).is_file():
        raise InputError(f"{what} {str(path)!r} does not exist or is not a file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own for a file that is not one
        raise InputError(
            f"{what} {str(path)!r} is not a PyTorch checkpoint, or is truncated or damaged"
        ) from error


def model_of(checkpoint: dict[str, Any], path: str | Path, what: str = "checkpoint") -> nn.Module:
    """The network of a checkpoint that was read, in eval mode and frozen."""
    model = create_model(
        checkpoint["model"], num_classes=checkpoint["num_classes"], in_channels=checkpoint["in_channels"]
    )
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(
            f"{what} {str(path)!r} does not hold the weights of a {checkpoint['model']}"
        ) from error
    return model.eval().requires_grad_(False)


def load_model(checkpoint: str | Path) -> nn.Module:
    """The network stored in a checkpoint of `advfunmatch train`.

    Args:
        checkpoint: path of a ``checkpoint.pt``.

    Returns:
        The network on the CPU, in eval mode, its parameters frozen. It takes images in [0, 1] and returns logits.

    Raises:
        InputError: if the file is missing, damaged, or not a checkpoint of this project.
    """
    return model_of(read_checkpoint(checkpoint), checkpoint)


def load_foreign(path: str | Path, model: str, data: ImageDataset, what: str = "checkpoint") -> nn.Module:
    """A network from weights that this project did not write, in eval mode and frozen.

    Args:
        path: a file of ``torch.save`` with a state dict, alone or under a usual key, with or without prefixes.
        model: the name of its architecture, as for `create_model`.
        data: what it classifies, which gives its classes and channels.
        what: how to call the file in an error.
    """
    network = create_model(model, num_classes=data.num_classes, in_channels=data.in_channels)
    return load_weights(network, _load(path, what), f"{what} {str(path)!r}").eval().requires_grad_(False)


def require_fit(
    checkpoint: dict[str, Any], path: str | Path, data: ImageDataset, what: str = "checkpoint"
) -> None:
    """InputError unless the checkpoint's classes and channels are the data's."""
    for name, ours in (("num_classes", data.num_classes), ("in_channels", data.in_channels)):
        if checkpoint[name] != ours:
            raise InputError(
                f"{what} {str(path)!r} has {name} = {checkpoint[name]}, but data {data.name!r} has {ours}"
            )
