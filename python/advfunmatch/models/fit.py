"""Whether a checkpoint's network goes with the data: what is stored beside the weights, compared with the images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..data import ImageDataset
from ..data.classes import match_classes
from ..errors import InputError
from .outputs import logits_in


class ClassesReordered(nn.Module):
    """A network whose logits are put into another order of classes.

    Args:
        network: maps images to logits (N, C).
        order: (C,), int64: where each logit is taken from.
    """

    order: Tensor

    def __init__(self, network: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("order", order)
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        return logits_in(self.network(x)).index_select(1, self.order)


def class_order(checkpoint: dict[str, Any], data: ImageDataset, what: str) -> Tensor | None:
    """Where the data's classes stand among a checkpoint's; None where both count alike.

    Args:
        checkpoint: the dict of Note [Checkpoint].
        data: what its network is to classify.
        what: how to call the file in an error.

    Raises:
        InputError: the classes, the channels or the sizes of its images are not the data's.
    """
    for name, stored, ours in (
        ("num_classes", checkpoint["num_classes"], data.num_classes),
        ("in_channels", checkpoint["in_channels"], data.in_channels),
        ("image_size", "×".join(map(str, checkpoint["image_size"])), "×".join(map(str, data.image_size))),
    ):
        if stored != ours:
            raise InputError(f"{what} has {name} = {stored}, but data {data.name!r} has {ours}")
    names = [str(name) for name in checkpoint["class_names"]]
    return match_classes(names, data.class_names, of_have=what, of_wanted=f"data {data.name!r}")
