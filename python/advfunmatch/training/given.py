"""What `train` is given as objects rather than by name, and what a run remembers of where its things came from.

Note [Given in Python]
~~~~~~~~~~~~~~~~~~~~~~
* A given student is trained in place: it is moved to the run's device, and left there in eval mode with the weights
  that the result is of: the averaged ones with ``ema`` or ``swa_start``, else the last. It begins with the weights that
  it has. Parameters that need no gradient stay as they are. A function that builds one is called with the run's seed.
* A given teacher is copied, so that it stays as it is, on its device, in its mode; even where it is the student.
* Data is read as Note [Given data] says.

A run's settings hold the names of these; its ``origins`` say that they were given, and what came from which plugin.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..data import DATASETS, ImageDataset, name_of
from ..errors import InputError
from ..methods import METHODS, Method, register_method
from ..models import MODELS, ClassesReordered, Normalized, find_family
from ..plugins import how_to_supply

Origins = dict[str, dict[str, str]]
# A network, or a function of (num_classes, in_channels) that builds one.
GivenNetwork = nn.Module | Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class Given:
    """The arguments of `train`, each None where its setting names it."""

    model: GivenNetwork | None = None
    teacher: GivenNetwork | None = None
    data: Any = None
    method: Method | None = None

    def __post_init__(self) -> None:
        for what in ("model", "teacher"):
            network = getattr(self, what)
            if not (network is None or isinstance(network, nn.Module) or callable(network)):
                raise InputError(
                    f"{what} is of type {type(network).__name__}, but must be a torch.nn.Module or a function of "
                    "(num_classes, in_channels) that builds one; the settings name a network or a file"
                )
        if not isinstance(self.method, Method | None):
            raise InputError(
                f"method is of type {type(self.method).__name__}, but must be a Method; the settings name one"
            )

    @property
    def names(self) -> dict[str, Any]:
        """What the given things are called, by setting."""
        found = {}
        if self.model is not None:
            found["model"] = name_of_network(self.model)
        if self.teacher is not None:
            found["teacher"] = name_of_network(self.teacher)
        if self.data is not None:
            found["data"] = name_of(self.data)
        if self.method is not None:
            found["method"] = self.method.name
        return found

    def complete(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the names of what is given; a given method joins the table.

        Raises:
            InputError: a setting names another, or says something of what is not read from a file.
        """
        if not isinstance(config, TrainConfig):
            raise InputError(
                f"config is of type {type(config).__name__}, but must be a TrainConfig, such as "
                "TrainConfig(method='pgd_at', eps=0.1, out='runs/first')"
            )
        for setting, name in self.names.items():
            named = getattr(config, setting)
            if named and named != name:
                raise InputError(f"{setting} is given twice: {named!r} in the settings, and as {setting}=")
        of_files = {
            "teacher": ("teacher_model", "teacher_normalize", "teacher_weights_key"),
            "data": ("data_cache",),
        }
        for what, settings in of_files.items():
            for setting in settings if getattr(self, what) is not None else ():
                if (value := getattr(config, setting)) is not None:
                    raise InputError(
                        f"{setting} is {value!r}, but {what} is given as {what}=, and not by name"
                    )
        if self.method is not None and METHODS.get(self.method.name) is not self.method:
            register_method(self.method)
        names: dict[str, Any] = self.names
        return replace(config, **names)


def name_of_network(network: GivenNetwork) -> str:
    """What a given network is called: the name that `create_model` or `register_model` gave it, or its type's.

    >>> name_of_network(nn.Flatten())
    'Flatten'
    """
    if not isinstance(network, nn.Module):
        for spelling, family in MODELS.items():
            if family.build is network and "<" not in spelling:
                return spelling
        return getattr(network, "__qualname__", type(network).__qualname__)
    while isinstance(network, ClassesReordered | Normalized):
        network = network.network
    return str(getattr(network, "model_name", type(network).__qualname__))


def student_of(given: GivenNetwork, data: ImageDataset) -> nn.Module:
    """The network to train: the given one itself, or what the function builds.

    Raises:
        InputError: it is none, is frozen, or holds what no checkpoint can.
    """
    student = _built(given, data, "model")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise InputError(
            f"model {name_of_network(given)!r} has no parameter that needs a gradient; of one that was frozen, as "
            "load_model does, model.requires_grad_(True) thaws all"
        )
    for name, value in student.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"model {name_of_network(given)!r} has {name!r} of type {type(value).__name__} in its state dict, but "
                "a checkpoint holds tensors alone"
            )
    return student


def teacher_of(given: GivenNetwork, data: ImageDataset, device: torch.device) -> nn.Module:
    """A copy of the given teacher, or what the function builds, frozen in eval mode on the device."""
    teacher = _built(given, data, "teacher")
    if teacher is given:
        try:
            teacher = copy.deepcopy(teacher)
        except (RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"teacher {name_of_network(given)!r} cannot be copied: {reason}") from error
    return teacher.to(device).eval().requires_grad_(False)


def _built(given: GivenNetwork, data: ImageDataset, what: str) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    try:
        with contextlib.suppress(ValueError):  # of what is built in, whose arguments nothing says
            inspect.signature(given).bind(data.num_classes, data.in_channels)
    except TypeError as error:
        raise InputError(
            f"{what} {name_of_network(given)!r} is a function that cannot be called as (num_classes, in_channels): "
            f"{error}"
        ) from error
    network = given(data.num_classes, data.in_channels)
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{what} is built by {name_of_network(given)} as a {type(network).__name__}, but must be a torch.nn.Module"
        )
    return network


# ---- what a run remembers --------------------------------------------------------------------------------------------


def origins_of(config: TrainConfig, given: Given) -> Origins:
    """Where each thing that is not the package's own came from, by setting: what a checkpoint keeps."""
    found = {setting: {"kind": "given", "name": name} for setting, name in given.names.items()}
    for setting in ("model", "method", "data", "extra_data"):
        if setting not in found and (origin := _origin(setting, getattr(config, setting))):
            found[setting] = origin
    return found


def require_known(config: TrainConfig, given: Given) -> None:
    """InputError where a run is to be continued that had something which is not there now: it says what to add."""
    path = Path(config.out) / "run.json"
    if not config.resume or not path.is_file():
        return
    try:
        origins: Mapping[str, Any] = json.loads(path.read_text()).get("origins", {})
    except (OSError, ValueError, AttributeError):
        return  # the checkpoint is what a run is continued from
    for setting, origin in origins.items():
        name = getattr(config, setting)
        if setting in given.names or not name or _is_there(setting, name):
            continue
        raise InputError(
            f"{setting} is {name!r}, which the run in {config.out!r} had from elsewhere: "
            f"{how_to_supply(origin, setting)}"
        )


def _origin(setting: str, name: str | None) -> dict[str, str] | None:
    if not name:
        return None
    if setting == "model":
        if (found := find_family(name)) is None:
            return None
        origin = MODELS.origin(found[0].spelling)
    elif setting == "method":
        origin = METHODS.origin(name)
    else:
        kind = name.partition(":")[0]
        if kind not in DATASETS:
            return None
        origin = DATASETS.origin(kind)
    return None if origin.kind == "built in" else origin.to_dict()


def _is_there(setting: str, name: str) -> bool:
    if setting == "model":
        return find_family(name) is not None
    if setting == "teacher":
        return Path(name).exists()
    return name in METHODS if setting == "method" else name.partition(":")[0] in DATASETS
