"""What a run depends on beside its settings, as digests: a run is only continued with the same teacher and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..config import TrainConfig
from ..data import ImageDataset
from ..data.classes import listed
from ..data.digest import digest_of_data
from ..errors import InputError
from ..models.digest import digest_of_network

Digests = dict[str, str]


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
