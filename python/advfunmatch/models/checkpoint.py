"""checkpoint.pt: a network that knows what it is, and where its training stood.

Note [Checkpoint]
~~~~~~~~~~~~~~~~~
A dict of tensors and plain Python values, so that ``torch.load(path, weights_only=True)`` reads it:

* ``format``, ``version``: "advfunmatch" and 1.
* ``model``, ``num_classes``, ``in_channels``, ``image_size``, ``class_names``: what `create_model` needs, and the data.
* ``state_dict``: the weights that are evaluated.
* ``config``: the resolved `TrainConfig` as a dict.
* ``epoch``, ``step``: how many were completed.
* ``origins``: of what is not the package's own, by setting: ``{"model": {"kind": "import", "name": "/PATH/my.py"}}``;
  of what was given to `train` as an object, ``{"kind": "given", "name": its type}``. `how_to_supply` says it in words.
* ``digests``, ``teacher_accuracy``: of the data and the teacher (absent in files of earlier versions).
* ``training``: what only a continued run needs (the optimizer's state, the best epoch so far); not in best.pt.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import DATASETS, ImageDataset, as_float
from ..errors import InputError
from ..files import write_atomically
from ..plugins import how_to_supply
from .fit import ClassesReordered, class_order
from .outputs import logits_in
from .reparametrized import with_plain_weights
from .state_dicts import agreement, align, load_weights, state_dicts_of
from .weight_files import read_weight_file, write_safetensors
from .zoo import create_model, find_family

FORMAT = "advfunmatch"
Build = Callable[[int, int], nn.Module]
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


def save_checkpoint(path: Path, checkpoint: dict[str, Any], safetensors: bool = False) -> None:
    """Replace `path` atomically; InputError if it cannot be written, and the old one then stays.

    With `safetensors` the weights go into a file of that ending beside it, with all that Note [Checkpoint] has at the
    file's head but for what a continued run needs. Without, such a file of earlier weights is removed.
    """
    # Through memory: torch.save into a file reports a full disk as an assertion of its zip writer.
    buffer = io.BytesIO()
    whole = {"format": FORMAT, "version": VERSION, **checkpoint}
    torch.save(whole, buffer)
    write_atomically(path, buffer.getvalue())
    if safetensors:
        about = {name: value for name, value in whole.items() if name not in ("state_dict", "training")}
        write_safetensors(path.with_suffix(".safetensors"), checkpoint["state_dict"], about)
    else:
        path.with_suffix(".safetensors").unlink(missing_ok=True)


def read_checkpoint(path: str | Path, what: str = "checkpoint") -> dict[str, Any]:
    """The dict of Note [Checkpoint], on the CPU.

    Raises:
        InputError: if the file is missing, truncated, no checkpoint, or not one of this project's.
    """
    return _own(read_weight_file(path, what), path, what)


def _own(checkpoint: Any, path: str | Path, what: str) -> dict[str, Any]:
    if not _is_own(checkpoint):
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


def _is_own(stored: Any) -> bool:
    return isinstance(stored, dict) and stored.get("format") == FORMAT


def model_of(
    checkpoint: dict[str, Any],
    path: str | Path,
    what: str = "checkpoint",
    model: str | nn.Module | Build | None = None,
) -> nn.Module:
    """The network of a checkpoint that was read, in eval mode and frozen.

    Args:
        checkpoint: the dict of Note [Checkpoint].
        path, what: how to call the file in an error.
        model: the network or its name, where the checkpoint's own does not say enough; see `load_model`.
    """
    name, origin = checkpoint["model"], checkpoint.get("origins", {}).get("model")
    if model is None and origin and (origin["kind"] == "given" or find_family(name) is None):
        given = origin["kind"] == "given"
        held = "a network that train was given in Python as model=" if given else "a network that is not here"
        here = (
            "load_model(path, model=…) takes such a network, or a function that builds one; " if given else ""
        )
        raise InputError(
            f"{what} {str(path)!r} holds the weights of a {name!r}, {held}: {here}{how_to_supply(origin, 'model')}"
        )
    network = _builder(name if model is None else model)(checkpoint["num_classes"], checkpoint["in_channels"])
    try:
        network.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(
            f"{what} {str(path)!r} does not hold the weights of a {_called(name, model)}"
        ) from error
    return network.eval().requires_grad_(False)


def _builder(model: str | nn.Module | Build) -> Build:
    """A function of (num_classes, in_channels) that gives the network."""
    if isinstance(model, str):
        return lambda num_classes, in_channels: create_model(
            model, num_classes=num_classes, in_channels=in_channels
        )
    if isinstance(model, nn.Module):
        return lambda num_classes, in_channels: model
    if not callable(model):
        raise InputError(
            f"model is of type {type(model).__name__}, but must be a name, a torch.nn.Module, or a function of "
            "(num_classes, in_channels) that builds one"
        )
    return model


def _called(name: str, model: str | nn.Module | Build | None) -> str:
    if model is None or isinstance(model, str):
        return model or name
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__qualname__", "network")


def load_model(
    path: str | Path,
    *,
    model: str | nn.Module | Build | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    normalize: str | None = None,
    weights_key: str | None = None,
) -> nn.Module:
    """The network stored in a file, this project's or another's. Nothing in the file is run.

    Args:
        path: a ``checkpoint.pt`` of `advfunmatch train`; or, where `model` is given, another project's: a file of
            ``torch.save`` or of safetensors with a state dict, alone or under a key, with or without prefixes.
        model: the architecture, as for `create_model`; `advfunmatch models` says whose code each is equal to. Or the
            network itself, which the weights are put into, or a function of (num_classes, in_channels) that builds it;
            a checkpoint of a network that `train` was given in Python needs one.
        num_classes: number of logits [default: the file's].
        in_channels: channels of the images [default: the file's].
        normalize: what another project's network expects to be done to images in [0, 1]: ``cifar10``, ``cifar100``,
            ``svhn``, ``imagenet``, MEAN/STD such as ``0.5,0.5,0.5/0.25,0.25,0.25``, or ``none``
            [default: what the file holds].
        weights_key: which state dict of several, by its key, or keys with dots between.

    Returns:
        The network on the CPU, in eval mode, its parameters frozen. It takes images in [0, 1] and returns logits.

    Warns:
        UserWarning: the file leaves open what the network computes: it holds several sets of weights that fit, they fit
            several architectures, or it does not show whether the images were normalised.

    Raises:
        InputError: the file is missing, damaged or something else, or its weights are another network's.
    """
    stored = read_weight_file(path, "checkpoint")
    if not _is_foreign(stored, path, model, normalize, weights_key, "checkpoint"):
        checkpoint = _own(stored, path, "checkpoint")
        for name, given in (("num_classes", num_classes), ("in_channels", in_channels)):
            if given is not None and given != checkpoint[name]:
                raise InputError(f"checkpoint {str(path)!r} has {name} = {checkpoint[name]}, and not {given}")
        return model_of(checkpoint, path, model=model)
    assert model is not None
    return _foreign(stored, path, model, num_classes, in_channels, normalize, weights_key, "checkpoint")


def load_network(
    path: str | Path,
    model: str | None,
    data: ImageDataset,
    what: str = "checkpoint",
    *,
    normalize: str | None = None,
    weights_key: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network in a file, ready to classify `data` on its device, and what the file says of it.

    What the file leaves open is warned of, and stands in that dict under ``doubts``.

    Where the file names the same classes in another order, the logits come in the order of the data's.

    Args:
        path, model, normalize, weights_key: as for `load_model`, which says what is warned of.
        data: what it is to classify.
        what: how to call the file in an error: checkpoint or teacher.

    Raises:
        InputError: the file cannot be read, or its network is another one, was made for other classes or sizes, or does
            not take these images.
    """
    stored = read_weight_file(path, what)
    doubts: list[warnings.WarningMessage] = []
    if _is_foreign(stored, path, model, normalize, weights_key, what):
        assert model is not None
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always")
            network = _foreign(
                stored, path, model, data.num_classes, data.in_channels, normalize, weights_key, what
            )
        stored = {"model": model, "config": {}}
    else:
        stored = _own(stored, path, what)
        order = class_order(stored, data, f"{what} {str(path)!r}")
        network = model_of(stored, path, what, model)
        network = network if order is None else ClassesReordered(network, order)
    network.to(data.images.device)
    require_forward(network, data, f"{what} {str(path)!r}")
    for doubt in doubts:  # of a network that is refused nobody needs to know them
        warnings.warn(doubt.message, stacklevel=2)
    return network, stored | {"doubts": [str(doubt.message) for doubt in doubts]}


def require_known_data(checkpoint: str | Path, data: str) -> None:
    """InputError for data that only a plugin reads, which is not here: the checkpoint trained on it says which."""
    if data.partition(":")[0] in DATASETS:
        return
    stored: dict[str, Any] = {}
    with contextlib.suppress(InputError):  # the file's own faults are said when its network is loaded
        stored = read_checkpoint(checkpoint)
    origin = stored.get("origins", {}).get("data")
    if origin and stored["config"]["data"] == data:
        raise InputError(
            f"data is {data!r}, which {str(checkpoint)!r} was trained on, and which is not here: "
            f"{how_to_supply(origin, 'data')}"
        )


def _is_foreign(
    stored: Any,
    path: str | Path,
    model: str | nn.Module | Build | None,
    normalize: str | None,
    weights_key: str | None,
    what: str,
) -> bool:
    """Whether a file is to be read as another project's; InputError for settings that its kind does not take."""
    prefix = "teacher_" if what == "teacher" else ""
    if _is_own(stored):
        origin = stored.get("origins", {}).get("model", {"kind": "built in"})
        is_known = isinstance(model, str) and origin["kind"] not in ("given", "script")
        if is_known and model != stored.get("model"):
            raise InputError(
                f"{prefix}model is {model!r}, but {what} {str(path)!r} was written by advfunmatch train, and is a "
                f"{stored.get('model')!r}"
            )
        for name, value in (("normalize", normalize), ("weights_key", weights_key)):
            if value is not None:
                raise InputError(
                    f"{prefix}{name} is {value!r}, but {what} {str(path)!r} was written by advfunmatch train, and "
                    "needs none"
                )
        return False
    return model is not None


def _foreign(
    stored: Any,
    path: str | Path,
    model: str | nn.Module | Build,
    num_classes: int | None,
    in_channels: int | None,
    normalize: str | None,
    weights_key: str | None,
    what: str,
) -> nn.Module:
    """Another project's network, in eval mode and frozen."""
    settings = "teacher_" if what == "teacher" else ""
    build = _builder(model)
    if not isinstance(model, nn.Module) and (num_classes is None or in_channels is None):
        classes, channels = _sizes(stored, build, weights_key)
        num_classes = num_classes or classes
        in_channels = in_channels or channels
    network = build(num_classes or 0, in_channels or 0)
    network = load_weights(
        network,
        stored,
        f"{what} {str(path)!r}",
        normalize=normalize,
        weights_key=weights_key,
        settings=settings,
    )
    return network.eval().requires_grad_(False)


def _sizes(stored: Any, build: Build, weights_key: str | None) -> tuple[int, int]:
    """The numbers of classes and channels that stored weights are for: the sizes of the entries that depend on them."""

    def shapes(num_classes: int, in_channels: int) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            network = build(num_classes, in_channels)
        return {name: tuple(value.shape) for name, value in network.state_dict().items()}

    classes, channels = 10, 3
    plain = shapes(classes, channels)
    more = shapes(classes + 1, channels)
    try:
        wider = shapes(classes, channels + 1)
    except InputError:  # it takes these channels only
        wider = plain
    holders = state_dicts_of(stored)
    holders = {weights_key: holders[weights_key]} if weights_key in holders else holders
    for weights in sorted(holders.values(), key=lambda weights: -agreement(weights, plain)):
        with contextlib.suppress(InputError):  # whose sentence is for `load_weights` to say
            weights = with_plain_weights(dict(weights), "")[0]
        for place in list(align(weights, plain).values())[:1]:
            for name, shape in plain.items():
                found = tuple(weights[place[name]].shape) if name in place else ()
                if found and len(found) == len(shape) and more[name] != shape:
                    classes = found[0]
                if len(found) > 1 and len(found) == len(shape) and wider[name] != shape:
                    channels = found[1]
            return max(classes, 2), max(channels, 1)
    return classes, channels


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
            logits = logits_in(network(images))
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
