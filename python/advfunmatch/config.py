"""The one configuration of a training run: its fields, their help, and the checks on each alone.

Note [Settings know no method]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
A method's defaults, and which settings go with which method, are the method table's business, which lies above this
file. ``methods.settings`` registers both here by `complete_with`, so that ``TrainConfig.resolve`` gives a whole
configuration while nothing here names a method.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral
from typing import Any, get_args, get_type_hints

from .attacks import BN_MODES, INITS, NORMS
from .data.augment import MIXING, ON_STORED, parse_augmentation
from .errors import InputError, one_of
from .models import NORMALIZATIONS, parse_normalization
from .plugins import load_plugins

REDUCTIONS = ("batchmean", "mean", "sum")

FRACTIONS = ("eps", "step_size")  # settings that are usually written as 8/255
PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("cosine", "one_cycle", "piecewise", "constant")

CHOICES = {
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "norm": NORMS,
    "attack_init": INITS,
    "attack_bn": BN_MODES,
    "reduction": REDUCTIONS,
    "teacher_input": ("adversarial", "clean"),
}
# What a setting must name, if it is given.
NAMED = {
    "out": "a folder",
    "teacher": "a checkpoint",
    "teacher_model": "an architecture",
    "teacher_normalize": "a normalisation",
    "teacher_weights_key": "a key of the teacher's file",
    "extra_data": "a data set",
    "data_cache": "a folder",
}
LEAST = {
    **dict.fromkeys(("epochs", "batch_size", "limit", "eval_limit", "accumulate"), 1),
    **dict.fromkeys(("resize", "crop", "epoch_images"), 1),
    **dict.fromkeys(("steps", "early_steps", "monitor_images", "validation"), 1),
    **dict.fromkeys(("eval_every", "save_every", "warmup_epochs", "begin_epoch", "awp_warmup"), 0),
}
POSITIVE = ("lr", "step_size", "temperature", "awp_gamma", "clip_grad")  # and finite


def _field(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


def _needed(help: str) -> Any:
    """A setting that must be there once the configuration is resolved; "" until it is given."""
    return field(default="", metadata={"help": help, "needed": True})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes.

    Settings whose default is the method's, and `step_size`, are None until `resolve` fills them in; their types are
    those of a resolved configuration, which is what everything but the command line works with. `data`, `model` and
    `method` stay "" where `train` is given them as objects.
    """

    data: str = _needed("digits, or FORM:PATH with a form such as folder, npz, cifar10 or imagenet")
    model: str = _needed("network to train, e.g. small_cnn, small_cnn-8, resnet18, wrn-34-10")
    method: str = _needed("row of the method table, e.g. advfunmatch")
    out: str = _needed("folder for checkpoint.pt, metrics.jsonl and result.json")
    teacher: str | None = _field("checkpoint of the teacher, for methods that match one")
    teacher_model: str | None = _field("its architecture, where --teacher is a state dict of another project")
    teacher_normalize: str | None = _field(
        "what such a teacher expects of images: " + NORMALIZATIONS + " [default: what its file holds]"
    )
    teacher_weights_key: str | None = _field("key of its weights, where its file holds several")
    epochs: int = _field("passes over the training images", 30)
    batch_size: int = _field("images a step", 128)
    limit: int | None = _field("train on this many images, drawn at random with a fixed seed")
    eval_limit: int | None = _field("final evaluation on this many test images instead of all")
    validation: int | None = _field(
        "hold out this many training images, to keep the best epoch by in DIR/best.pt"
    )
    resize: int | None = _field("scale images so that their shorter side has this many pixels")
    crop: int | None = _field("cut a square of this many pixels from the middle of each image")
    data_cache: str | None = _field(
        "folder for decoded training images, which are then read from it as needed instead of held in memory"
    )
    augment: str = _field("augmentations with commas: " + ", ".join([*ON_STORED, *MIXING]), "")
    extra_data: str | None = _field(
        "second source of training images, named like --data; its train split is used"
    )
    extra_ratio: float = _field("share of each batch that comes from it", 0.5)
    epoch_images: int | None = _field(
        "images that count as an epoch, extra ones included [default: until --data was seen once]"
    )
    seed: int = _field("fixes weights, order and attacks", 0)

    lr: float = _field("peak learning rate", 0.1)
    momentum: float = _field("SGD momentum", 0.9)
    nesterov: bool = _field("Nesterov's form of it", True)
    weight_decay: float = _field("weight decay of SGD", 5e-4)
    schedule: str = _field("learning-rate schedule: " + ", ".join(SCHEDULES), "cosine")
    milestones: str = _field("epochs at which the piecewise schedule divides by ten, e.g. 100,150", "")
    peak: float = _field("share of the run after which one_cycle turns", 0.25)
    warmup_epochs: int = _field("epochs of linear warm-up", 0)
    accumulate: int = _field("batches whose gradients make one step", 1)
    clip_grad: float | None = _field("largest norm of the gradient")
    ema: float = _field("decay of an exponential average of the weights, e.g. 0.995; 0 none", 0.0)
    swa_start: int | None = _field("epoch from which weights are averaged equally")
    precision: str = _field("fp32, bf16 or fp16", "fp32")
    channels_last: bool = _field("store images and weights channels-last", False)
    label_smoothing: float = _field("smoothing of the labels in cross-entropy terms", 0.0)

    eps: float = _field("radius of the attack ball, e.g. 8/255 or 0.15", 8 / 255)
    step_size: float = _field("step of the attack [default: eps/4]")
    steps: int = _field("steps of the attack", 10)
    early_steps: int | None = _field("steps of the attack in the first half of the run [default: all]")
    lean: bool = _field("attack copies with batch norm folded away, where attack_bn is eval", True)
    norm: str = _field("norm of the ball: " + ", ".join(NORMS), "linf")
    attack_init: str = _field("start of the attack: " + ", ".join(INITS) + " [default: the method's]")
    attack_bn: str = _field(
        "batch norm during the attack: " + ", ".join(BN_MODES) + " [default: the method's]"
    )

    alpha: float = _field("weight of the first of two matched terms [default: the method's]")
    beta: float = _field("weight or exponent in trades, mart and iad [default: the method's]")
    begin_epoch: int = _field("epoch from which iad trusts itself [default: the method's]")
    detach_target: bool = _field("no gradient through the clean target of trades [default: the method's]")
    temperature: float = _field("divides the logits that are matched [default: the method's]")
    reduction: str = _field("of the KL terms: " + ", ".join(REDUCTIONS) + " [default: the method's]")
    scale_by_t2: bool = _field("multiply matched terms by temperature² [default: the method's]")
    teacher_input: str = _field("the teacher sees adversarial or clean images [default: the method's]")
    teacher_gradient: bool = _field("attack through the teacher too [default: the method's]")
    settings: dict[str, Any] = field(
        default=None,  # type: ignore[arg-type]
        metadata={"help": "settings that the method itself brings, e.g. gamma=3 [default: its own]"},
    )

    awp: bool = _field("perturb the weights against each step too (Wu et al. 2020)", False)
    awp_gamma: float = _field("size of that, relative to each weight's norm", 5e-3)
    awp_warmup: int = _field("epochs before it starts", 10)

    eval_every: int = _field("monitor clean and PGD-10 accuracy every so many epochs; 0 never", 1)
    monitor_images: int = _field("training images used for that, where none are held out for validation", 500)
    imports: tuple[str, ...] = _field(
        "Python file or module that registers models, data sets, methods or attacks", ()
    )
    device: str = _field("cpu, cuda, or auto", "auto")
    save_every: int = _field("also save a checkpoint every so many steps; 0 only after epochs", 0)
    save_safetensors: bool = _field("write each checkpoint's weights as .safetensors as well", False)
    tensorboard: bool = _field("log to DIR/tensorboard as well", False)
    resume: bool = _field("continue the run in DIR, if it has a checkpoint", False)
    overwrite: bool = _field("replace a run that DIR already holds", False)

    def resolve(self) -> TrainConfig:
        """The configuration with every None that has a default filled in, after checking each value.

        Raises:
            InputError: naming the first setting that cannot be used, its value, and what is allowed.
        """
        types = get_type_hints(TrainConfig)
        config = replace(self, **{name: _typed(name, getattr(self, name), types[name]) for name in types})
        for setting in fields(TrainConfig):
            if (
                setting.metadata.get("needed")
                and not getattr(config, setting.name)
                and setting.name not in NAMED
            ):
                raise _missing(setting)
        config = replace(config, imports=load_plugins(config.imports))
        for fill_in, _ in _completions:
            config = fill_in(config)
        if config.step_size is None:
            config = replace(config, step_size=config.eps / 4)
        _check_numbers(config)
        _check_names(config)
        _check_schedule(config)
        _check_combinations(config)
        for _, check in _completions:
            check(config)
        return config

    @property
    def extra_images(self) -> int:
        """Images of each batch that come from `extra_data`."""
        return round(self.extra_ratio * self.batch_size) if self.extra_data else 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, such as JSON has."""
        values = {**asdict(self), "imports": list(self.imports)}
        for name, value in (values["settings"] or {}).items():
            values["settings"][name] = list(value) if isinstance(value, tuple) else value
        return values


FillIn = Callable[[TrainConfig], TrainConfig]
Check = Callable[[TrainConfig], None]
_completions: list[tuple[FillIn, Check]] = []
_FIELDS = {setting.name: setting for setting in fields(TrainConfig)}


def complete_with(fill_in: FillIn, check: Check) -> None:
    """Have every configuration completed by `fill_in`, and checked by `check` at the end; for ``methods.settings``."""
    _completions.append((fill_in, check))


def config_from(settings: Mapping[str, Any]) -> TrainConfig:
    """A configuration from names and values as a user writes them; InputError for a name or type that does not fit."""
    types = get_type_hints(TrainConfig)
    for name in settings:
        if name not in types:
            raise one_of("setting", name, types)
    for setting in fields(TrainConfig):
        if setting.metadata.get("needed") and setting.name not in settings:
            raise _missing(setting)
    return TrainConfig(**{name: _typed(name, value, types[name]) for name, value in settings.items()})


def default_settings() -> dict[str, Any]:
    """The value of each setting that is not given."""
    return {setting.name: setting.default for setting in fields(TrainConfig)}


def _missing(setting: Any) -> InputError:
    return InputError(f"{setting.name} is missing: {setting.metadata['help']} (--{setting.name})")


def _typed(name: str, value: Any, kind: Any) -> Any:
    if name == "settings" and value is not None:
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return dict(value)
        raise InputError(f"settings is {value!r}, but must be of type dict, such as {{'gamma': 3}}")
    if name == "imports":
        given = [value] if isinstance(value, str | os.PathLike) else value
        if isinstance(given, list | tuple) and all(isinstance(each, str | os.PathLike) for each in given):
            return tuple(os.fspath(each) for each in given)
        raise InputError(
            f"imports is {value!r}, but must be of type tuple, files and modules such as 'my.py'"
        )
    allowed = get_args(kind) or (kind,)
    if isinstance(value, os.PathLike) and str in allowed:
        return os.fspath(value)
    if float in allowed and isinstance(value, str | int) and not isinstance(value, bool):
        return parse_number(value, name)
    if name == "milestones" and isinstance(value, list):
        return ",".join(str(milestone) for milestone in value)
    if name == "augment" and isinstance(value, list):
        return ",".join(str(part) for part in value)
    if value is None and _FIELDS[name].default is None:  # which `resolve` fills in
        return value
    if isinstance(value, allowed) and isinstance(value, bool) == (bool in allowed):  # True is no number
        return value
    wanted = " or ".join(getattr(each, "__name__", str(each)) for each in allowed if each is not type(None))
    raise InputError(f"{name} is {value!r}, but must be of type {wanted}")


class SettingsFile(dict[str, Any]):
    """Settings as a file holds them, and the line that each is in."""

    def __init__(self, path: str, settings: Mapping[str, Any], lines: Mapping[str, int]) -> None:
        super().__init__(settings)
        self.path, self.lines = path, dict(lines)

    def located(self, error: InputError, others: Collection[str] = ()) -> InputError:
        """The error with the file and line of the setting that it names first, if that is one of the file's.

        Args:
            error: about a configuration that these settings went into.
            others: names of the settings that came from elsewhere.
        """
        sentence = str(error)
        for name, line in self.lines.items():
            if name not in others and sentence.startswith((f"{name} ", f"setting is {name!r},")):
                return InputError(f"{self.path}, line {line}: {sentence}")
        return error


def read_settings(path: str) -> SettingsFile:
    """The settings in a YAML file of names and values, or in the run.json of a run; InputError if it is neither."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            loader = yaml.SafeLoader(file)
            node = loader.get_single_node()
            settings = None if node is None else loader.construct_document(node)
    except (
        OSError,
        ValueError,
        TypeError,
        RecursionError,
        yaml.YAMLError,
    ) as error:  # 2026-13-01 is a ValueError
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise InputError(f"config {path!r} cannot be read as YAML: {reason}") from error
    if isinstance(settings, dict) and {"config", "environment"} <= set(settings):
        given = [name for name, origin in settings.get("origins", {}).items() if origin["kind"] == "given"]
        settings = {name: value for name, value in settings["config"].items() if name not in given}
        node = next(value for key, value in node.value if key.value == "config")
        for how_it_was_started in ("resume", "overwrite"):  # which is no part of what is to be repeated
            settings.pop(how_it_was_started, None)
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise InputError(f"config {path!r} must hold lines such as 'epochs: 30'")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise InputError(f"{path}, line {line}: {key.value} was given in line {lines[key.value]} already")
        lines[key.value] = line
    return SettingsFile(path, settings, lines)


def parse_number(text: str | float, name: str) -> float:
    """A number, or a fraction such as 8/255, for the setting of that name.

    >>> parse_number("8/255", "eps") == 8 / 255
    True
    """
    try:
        if isinstance(text, bool):
            raise TypeError  # True is no number
        numerator, slash, denominator = str(text).partition("/")
        return float(numerator) / float(denominator) if slash else float(text)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise InputError(f"{name} is {text!r}, but must be a number or a fraction such as 8/255") from None


def parse_milestones(text: str) -> list[float]:
    """Epochs from text such as "100,150"; ValueError for anything else.

    >>> parse_milestones("100,150")
    [100.0, 150.0]
    """
    return [float(part) for part in text.split(",") if part.strip()]


def parse_integer(value: int, name: str) -> int:
    """A whole number, NumPy's too, for the setting of that name."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} is {value!r}, but must be of type int")
    return int(value)


def check_radius(eps: float, norm: str) -> None:
    """InputError for a radius that no attack on images in [0, 1] can have."""
    if not (math.isfinite(eps) and eps > 0):
        raise InputError(f"eps is {eps:g}, but must be positive and finite")
    if norm == "linf" and eps > 1:
        raise InputError(f"eps is {eps:g}, but images lie in [0, 1], so it must be at most 1 (try 8/255)")


def check_seed(seed: int) -> None:
    """InputError for a seed that PyTorch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}, but must be at least 0 and below 2^63")


def check_teacher_settings(
    teacher: str | None, model: str | None, normalize: str | None, weights_key: str | None
) -> None:
    """InputError for what is said of a teacher without there being one, or a normalisation that cannot be."""
    given = {"teacher_model": model, "teacher_normalize": normalize, "teacher_weights_key": weights_key}
    for name, value in given.items():
        if value is not None and teacher is None:
            raise InputError(f"{name} is {value!r}, but teacher names no file of its weights")
        if value is not None and model is None:
            raise InputError(
                f"{name} is {value!r}, which needs teacher_model, the architecture of its weights"
            )
    if normalize is not None:
        parse_normalization(normalize, "teacher_normalize")


def _check_numbers(config: TrainConfig) -> None:
    """Each number alone."""
    for name, lowest in LEAST.items():
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise InputError(f"{name} is {value}, but must be at least {lowest}")
    check_seed(config.seed)
    check_radius(config.eps, config.norm)
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value:g}, but must be positive and finite")
    for name in ("momentum", "weight_decay", "label_smoothing", "ema"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value:g}, but must be at least 0 and below 1")
    if not 0 <= config.alpha <= 1:
        raise InputError(f"alpha is {config.alpha:g}, but must be between 0 and 1")
    if not (math.isfinite(config.beta) and config.beta >= 0):
        raise InputError(f"beta is {config.beta:g}, but must be at least 0 and finite")
    for name in ("peak", "extra_ratio"):
        if not 0 < getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name):g}, but must be between 0 and 1")


def _check_names(config: TrainConfig) -> None:
    """Each setting that names something."""
    for name, kind in NAMED.items():
        if getattr(config, name) == "":
            raise InputError(f"{name} is empty, but must name {kind}")
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise one_of(name, getattr(config, name), allowed)


def _check_schedule(config: TrainConfig) -> None:
    """Epochs at which something changes."""
    if config.warmup_epochs > config.epochs:
        raise InputError(
            f"warmup_epochs is {config.warmup_epochs}, but must be from 0 to epochs = {config.epochs}"
        )
    if config.swa_start is not None and not 0 <= config.swa_start < config.epochs:
        raise InputError(
            f"swa_start is {config.swa_start}, but must be from 0 to epochs - 1 = {config.epochs - 1}"
        )
    try:
        milestones = parse_milestones(config.milestones)
    except ValueError:
        milestones = [math.nan]
    if not all(0 < milestone < math.inf for milestone in milestones):
        raise InputError(f"milestones is {config.milestones!r}, but must be epochs such as 100,150")
    if config.schedule == "piecewise" and not milestones:
        raise InputError("milestones is empty, but the piecewise schedule needs epochs such as 100,150")


def _check_combinations(config: TrainConfig) -> None:
    """Settings that do not go together, whatever the method."""
    if config.swa_start is not None and config.ema:
        raise InputError("ema and swa_start are both given, but only one average of the weights can be kept")
    if config.awp and config.accumulate > 1:
        raise InputError(f"awp goes with accumulate = 1 only, but accumulate is {config.accumulate}")
    if config.awp and config.awp_warmup >= config.epochs:
        raise InputError(
            f"awp_warmup is {config.awp_warmup}, but must be from 0 to epochs - 1 = {config.epochs - 1}"
        )
    if config.validation is not None and not config.eval_every:
        raise InputError(
            f"validation is {config.validation}, but eval_every is 0, so no epoch would be measured on those images"
        )
    if config.resume and config.overwrite:
        raise InputError("resume and overwrite are both given, but a run can only be continued or replaced")
    if config.extra_data and not 0 < config.extra_images < config.batch_size:
        raise InputError(
            f"extra_ratio is {config.extra_ratio:g}, which is {config.extra_images} of batch_size = "
            f"{config.batch_size} images, but each batch needs images of data and of extra_data"
        )
    parse_augmentation(config.augment)
    check_teacher_settings(
        config.teacher, config.teacher_model, config.teacher_normalize, config.teacher_weights_key
    )
