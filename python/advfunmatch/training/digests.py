"""What a run depends on beside its settings, as digests: a run is only continued with the same teacher and data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..data import ImageDataset, choose
from ..data.classes import listed
from ..errors import InputError
from ..models import ClassesReordered

Digests = dict[str, str]

SAMPLE = 4096  # images


def digest_of_network(network: nn.Module, name: str) -> str:
    """Of a network's architecture and weights, as hexadecimal digits.

    The order into which its classes were put for some data does not count.
    """
    network = network.network if isinstance(network, ClassesReordered) else network
    found = hashlib.blake2b(name.encode(), digest_size=16)
    for key, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):  # and no extra state, which modules may make of anything
            found.update(key.encode())
            _add(found, value)
    return found.hexdigest()


def digest_of_data(data: ImageDataset) -> str:
    """Of images and labels; of a set that stays in its file, which may be hundreds of gigabytes, of `SAMPLE` images."""
    found = hashlib.blake2b(str(tuple(data.images.shape)).encode(), digest_size=16)
    images = data.images
    _add(found, images if isinstance(images, Tensor) else images[choose(len(images), SAMPLE)])
    _add(found, data.labels)
    return found.hexdigest()


def digests_of(read: Mapping[str, ImageDataset], teacher: nn.Module | None, teacher_model: str) -> Digests:
    """Digests of a run's data, by what they are called, and of its teacher, if there is one."""
    digests = {name: digest_of_data(data) for name, data in read.items()}
    if teacher is not None:
        digests["teacher"] = digest_of_network(teacher, teacher_model)
    return digests


def require_same(
    checkpoint: Mapping[str, Any], config: TrainConfig, digests: Digests, class_names: Sequence[str]
) -> None:
    """InputError if the run of a checkpoint was started with another teacher, other data or other classes.

    Args:
        checkpoint: the dict of Note [Checkpoint], with digests.
        config: what the run is to be continued with.
        digests: of what that names.
        class_names: of the data, in order.
    """
    ending = f"the run in {config.out!r} was started with; a run can only be continued as it was started"
    if checkpoint["class_names"] != list(class_names):
        raise InputError(
            f"data {config.data!r} has the classes {listed(class_names)}, in this order, and not "
            f"{listed(checkpoint['class_names'])}, which {ending}"
        )
    stored = checkpoint["digests"]
    for name in (*stored, *digests):
        if stored.get(name) == digests.get(name):
            continue
        if name == "teacher":
            raise InputError(f"teacher {config.teacher!r} is not the network that {ending}")
        source = config.extra_data if name.startswith("extra") else config.data
        raise InputError(f"{name} of {source!r} are not those that {ending}")


def _add(found: Any, tensor: Tensor) -> None:
    found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
