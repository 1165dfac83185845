"""checkpoint.pt: a network that knows what it is, and where its training stood.

Note [Checkpoint]
~~~~~~~~~~~~~~~~~
A dict of tensors and plain Python values, so that ``torch.load(path, weights_only=True)`` reads it:

* ``format``, ``version``: "advfunmatch" and 1.
* ``model``, ``num_classes``, ``in_channels``, ``image_size``, ``class_names``: what `create_model` needs, and the data.
* ``state_dict``: the weights that are evaluated.
* ``config``: the resolved `TrainConfig` as a dict.
* ``epoch``, ``step``: how many were completed.
* ``digests``, ``teacher_accuracy``: of the data and the teacher (absent in files of earlier versions).
* ``training``: what only a continued run needs (the optimizer's state, the best epoch so far); not in best.pt.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageDataset, as_float
from ..errors import InputError
from ..files import write_atomically
from .fit import ClassesReordered, class_order
from .outside import load_weights
from .zoo import create_model

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
        architecture = {"checkpoint": "; if it is another project's, model must name its architecture"}
        architecture["teacher"] = "; if it is another project's, teacher_model must name its architecture"
        raise InputError(
            f"{what} {str(path)!r} was not written by advfunmatch train{architecture.get(what, '')}"
        )
    missing = [name for name, kind in REQUIRED.items() if not isinstance(checkpoint.get(name), kind)]
    if missing or checkpoint.get("version") != VERSION:
        reason = f"lacks {missing[0]!r}" if missing else f"has format version {checkpoint.get('version')}"
        raise InputError(f"{what} {str(path)!r} {reason}, and cannot be read by this version of advfunmatch")
    return checkpoint


def _load(path: str | Path, what: str) -> Any:
    if not os.path.isfile(path):
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


def load_network(
    path: str | Path, model: str | None, data: ImageDataset, what: str = "checkpoint"
) -> tuple[nn.Module, dict[str, Any]]:
    """The network in a file, ready to classify `data` on its device, and what the file says of it.

    Where the file names the same classes in another order, the logits come in the order of the data's.

    Args:
        path: a checkpoint of `advfunmatch train`; or, where `model` is given, another project's: a file of
            ``torch.save`` with a state dict, alone or under a usual key, with or without prefixes.
        model: the architecture of another project's network, as for `create_model`.
        data: what it is to classify.
        what: how to call the file in an error.

    Raises:
        InputError: the file cannot be read, or its network is another one, was made for other classes or sizes, or does
            not take these images.
    """
    stored: dict[str, Any]
    if model:
        network = create_model(model, num_classes=data.num_classes, in_channels=data.in_channels)
        network = load_weights(network, _load(path, what), f"{what} {str(path)!r}")
        network.eval().requires_grad_(False)
        stored = {"model": model, "config": {}}
    else:
        stored = read_checkpoint(path, what)
        order = class_order(stored, data, f"{what} {str(path)!r}")
        network = model_of(stored, path, what)
        network = network if order is None else ClassesReordered(network, order)
    network.to(data.images.device)
    require_forward(network, data, f"{what} {str(path)!r}")
    return network, stored


def require_forward(network: nn.Module, data: ImageDataset, what: str) -> int:
    """Try the network, in eval mode, on images of the data.

    Returns:
        The number of its logits.

    Raises:
        InputError: it does not take these images, or does not return logits (N, C) with C at least their classes
            and 2.
    """
    # Two images, so that one row for a whole batch is not taken for one an image.
    images = as_float(data.images[:2])
    try:
        with torch.no_grad():
            logits = network(images)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        height, width = data.image_size
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{what} cannot take images of {height}×{width} pixels: {reason}") from error
    wanted = f"a floating-point tensor of logits (N, C), here ({len(images)}, {data.num_classes})"
    if not isinstance(logits, Tensor):
        raise InputError(f"{what} returns {type(logits).__name__}, but must return {wanted}")
    if logits.dim() != 2 or len(logits) != len(images) or not logits.is_floating_point():
        got = f"{logits.dtype} of shape {tuple(logits.shape)}"
        raise InputError(f"{what} returns {got}, but must return {wanted}")
    count = logits.shape[1]
    if count < max(2, data.num_classes):
        needed = (
            f"data {data.name!r} has {data.num_classes} classes" if count > 1 else "at least 2 are needed"
        )
        raise InputError(f"{what} returns {count} logit{'s' if count > 1 else ''}, but {needed}")
    return count
