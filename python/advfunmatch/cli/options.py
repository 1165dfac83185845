"""Options of several commands, each written once.

A command names a group of options by a parameter whose type is one of the dataclasses here; `with_groups` puts an
option for each of their fields in that parameter's place. The options of `train` are the fields of `TrainConfig`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..config import FRACTIONS, TrainConfig
from ..errors import InputError
from ..evaluation import balls_of
from ..methods import PRESETS
from ..models import NORMALIZATIONS
from ..plugins import load_plugins
from .networks import ForeignWeights

# Other names of train's options: there only a teacher's file can hold several sets of weights.
ALIASES = {"teacher_weights_key": ("--teacher-weights-key", "--weights-key")}

Checkpoint = Annotated[str, typer.Option(help="checkpoint.pt of advfunmatch train, or its folder")]
Data = Annotated[str, typer.Option(help="as for train; its test split is used")]


@dataclass(frozen=True, kw_only=True)
class BallOptions:
    """Where an attack may go: what is given, else what the checkpoint was trained and measured with."""

    eps: Annotated[
        str | None,
        typer.Option(
            help="radius of the attack ball, e.g. 8/255; of evaluate also several, as in 4/255,8/255 "
            "[default: the checkpoint's own]",
            metavar="NUMBER",
            show_default=False,
        ),
    ] = None
    norm: Annotated[
        str | None,
        typer.Option(
            help="norm of the ball: linf or l2 [default: the checkpoint's own, else linf]", show_default=False
        ),
    ] = None

    def of(self, checkpoint: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments ``eps`` and ``norm`` of `evaluate`, given the configuration in a checkpoint.

        Raises:
            InputError: the checkpoint's radius is one of another norm than is asked for.
        """
        norm = self.norm or config.get("norm") or "linf"
        eps = self.eps or config.get("eps")
        if self.eps is None and eps is not None and norm != config.get("norm"):
            raise InputError(
                f"eps is missing: norm is {norm!r}, but the radius that checkpoint {checkpoint!r} knows, {eps:g}, is "
                f"one of {config.get('norm')!r}"
            )
        return {"eps": eps, "norm": norm}

    def said(self, eps: float | str | None, norm: str) -> str:
        """What `of` gave, and what of it is the checkpoint's."""
        if eps is None:
            return "no eps"
        radii = ", ".join(ball.radius for ball in balls_of(eps, norm))
        own = " (the checkpoint's)" if self.eps is None else ""
        return f"eps {radii}{own}, norm {norm}"


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What is said of checkpoints that another project wrote."""

    model: Annotated[str | None, typer.Option(help="architecture, if --checkpoint is another project's")] = (
        None
    )
    normalize: Annotated[
        str | None,
        typer.Option(help="what such a checkpoint expects of images: " + NORMALIZATIONS, metavar="HOW"),
    ] = None
    weights_key: Annotated[
        str | None, typer.Option(help="key of the weights, where --checkpoint holds several", metavar="KEY")
    ] = None
    teacher_model: Annotated[
        str | None, typer.Option(help="architecture, if --teacher is another project's")
    ] = None
    teacher_normalize: Annotated[
        str | None, typer.Option(help="what such a teacher expects, likewise", metavar="HOW")
    ] = None
    teacher_weights_key: Annotated[
        str | None, typer.Option(help="key of the weights, where --teacher holds several", metavar="KEY")
    ] = None

    @property
    def checkpoint(self) -> ForeignWeights:
        """What was said of --checkpoint."""
        return ForeignWeights(self.model, self.normalize, self.weights_key)

    @property
    def teacher(self) -> ForeignWeights:
        """What was said of --teacher."""
        return ForeignWeights(self.teacher_model, self.teacher_normalize, self.teacher_weights_key)


@dataclass(frozen=True, kw_only=True)
class Images:
    """Which images are attacked, and how."""

    limit: Annotated[int | None, typer.Option(help="use this many test images instead of all")] = None
    resize: Annotated[
        int | None, typer.Option(help="scale images so that their shorter side has this many pixels")
    ] = None
    crop: Annotated[
        int | None, typer.Option(help="cut a square of this many pixels from the middle of each image")
    ] = None
    batch_size: Annotated[int, typer.Option(help="images attacked at a time")] = 500
    seed: Annotated[int, typer.Option(help="seeds the attacks")] = 0
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto")] = "auto"

    @property
    def loading(self) -> dict[str, Any]:
        """The keyword arguments of `load_dataset`."""
        return {"limit": self.limit, "resize": self.resize, "crop": self.crop}


def _import_option(**more: Any) -> Any:
    return typer.Option(
        "--import",
        help="Python file or module that registers models, data sets, methods or attacks; repeatable",
        metavar="FILE|MODULE",
        **more,
    )


# Settings of `TrainConfig` that are given piece by piece.
REPEATED = {
    "settings": Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="a setting that the method itself brings; repeatable", metavar="NAME=VALUE"
        ),
    ],
    "imports": Annotated[
        list[str] | None,
        _import_option(),
    ],
}


def _load(imports: list[str] | None) -> list[str] | None:
    load_plugins(imports or ())
    return imports


@dataclass(frozen=True, kw_only=True)
class Plugins:
    """What is to be loaded before the other options are looked at, because it registers what they name."""

    imports: Annotated[
        list[str] | None,
        _import_option(callback=_load, is_eager=True),
    ] = None


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Put one option for each field of a group into the place of a parameter whose type is a dataclass."""
    types = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = types[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(
                parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=types[parameter.name])
            )
            continue
        assert isinstance(kind, type)
        groups[parameter.name] = kind
        options = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            parameters.append(_option(field.name, options[field.name], field.default))

    @functools.wraps(command)
    def called(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        command(**given)

    return _with_signature(called, parameters)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of `TrainConfig`, so that flags and configuration cannot differ.

    Every option is None unless it is given, so that --preset and --config can be told from flags.
    """
    types = typing.get_type_hints(TrainConfig)
    options: dict[str, tuple[Any, str]] = {
        "preset": (str, "start from a published recipe: " + ", ".join(PRESETS)),
        "config": (str, "YAML file of settings, or the run.json of a run to repeat; flags override it"),
        "processes": (int, "processes on this machine that share each batch; with GPUs, one for each"),
    }
    for setting in dataclasses.fields(TrainConfig):
        text = setting.metadata["help"]
        if setting.name in REPEATED:
            continue
        if setting.metadata.get("needed"):
            text += " [required]"
        elif setting.default is not None and setting.default is not False and setting.default != "":
            text += f" [default: {'8/255' if setting.name == 'eps' else setting.default}]"
        options[setting.name] = (str if setting.name in FRACTIONS else types[setting.name], text)
    return _with_signature(
        command,
        [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        + [
            _option(
                name,
                Annotated[kind | None, typer.Option(*ALIASES.get(name, ()), help=text, show_default=False)],
                None,
            )
            for name, (kind, text) in options.items()
        ]
        + [_option(name, annotation, None) for name, annotation in REPEATED.items()],
    )


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_signature(command: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
