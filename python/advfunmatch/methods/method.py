"""What a method is, and the table that one's own join.

Note [Methods]
~~~~~~~~~~~~~~
A method is one `Method` in `METHODS`. Its attack says which objective `PGDAttack` maximises; its loss is a function of
the logits on clean and adversarial images (`Logits`) and of the settings. Settings that papers disagree about are
fields of `TrainConfig` (temperature, alpha, beta, reduction, ...) that are None until the method's default, with its
source, fills them in: see ``settings``. What only one method has is a setting of its own: ``own``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from torch import Tensor

from ..attacks import OBJECTIVES, Objective
from ..config import TrainConfig
from ..errors import InputError, one_of
from ..plugins import Origin, Registry, caller
from .features import Layers
from .own import OwnSetting, parse_settings, settings_of
from .terms import Logits, Loss

# Settings that an attack on each objective looks at, besides eps and norm, with which every run is evaluated.
ANY_ATTACK = ("steps", "early_steps", "step_size", "attack_init", "attack_bn", "lean")
ATTACK_READS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "cross_entropy": ANY_ATTACK,
    "margin": ANY_ATTACK,
    "fixed_teacher": (*ANY_ATTACK, "temperature"),
    "mismatch": (*ANY_ATTACK, "temperature", "teacher_gradient"),
}
MATCHING = ("temperature", "reduction", "scale_by_t2")
LOSS_READS = ("alpha", "beta", "begin_epoch", "detach_target", "label_smoothing", "teacher_input", *MATCHING)
SETTINGS = (*ANY_ATTACK, "teacher_gradient", *LOSS_READS)  # that not every method uses

# What a setting is when neither the user nor the method says.
FALLBACKS: dict[str, Any] = {
    "alpha": 1.0,
    "beta": 1.0,
    "begin_epoch": 0,
    "detach_target": False,
    "temperature": 1.0,
    "reduction": "batchmean",
    "scale_by_t2": False,
    "teacher_input": "adversarial",
    "teacher_gradient": True,
    "attack_init": "gaussian",
    "attack_bn": "eval",
}


@dataclass(frozen=True)
class Default:
    """The value of one setting, and where it comes from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Method:
    """One row of the table. See Note [Methods].

    Attributes:
        name: what ``--method`` takes.
        formula: the outer loss, as printed by ``advfunmatch methods``.
        objective: what the attack maximises: a name in `OBJECTIVES`, or a callable as `PGDAttack` takes it; None trains
            on clean images.
        loss: the outer loss of one batch, a tensor of shape (): a function of `Logits` and the resolved `TrainConfig`,
            and of the method's own settings: as keyword arguments, whose types and defaults it then declares itself
            (``def loss(logits, config, *, gamma: float = 2.0)``), or as one object of the dataclass `settings`.
        needs_teacher: whether a teacher must be given.
        needs_labels: whether the labels of the training images are used.
        source: the paper, and the code that the defaults were read in.
        reads: those of `SETTINGS` that the loss looks at; None does not say.
        defaults: settings of `TrainConfig` that this method fills in, each with a `Default`, or a value alone.
        keep: which iterate its attack returns, as `PGDAttack` takes it; None: what the objective says.
        settings: a dataclass of its own settings; None where the loss declares them, or there are none.
        own: what its own settings are; made, not given.
        features: layers whose outputs ``logits.features(...)`` gives, as ``{"student": names, "teacher": names}``, or a
            function of (config, own settings) that returns that.

    Raises:
        InputError: at the making: an objective, a setting or a default that there is not.
    """

    name: str
    formula: str
    objective: str | Objective | None
    loss: Loss
    needs_teacher: bool
    needs_labels: bool
    source: str
    reads: tuple[str, ...] | None = None
    defaults: Mapping[str, Default] = field(default_factory=dict)
    keep: str | None = None
    settings: type | None = None
    features: Layers | Callable[..., Layers] | None = None
    own: tuple[OwnSetting, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        what = f"method {self.name!r}"
        if isinstance(self.objective, str) and self.objective not in OBJECTIVES:
            raise one_of(f"objective of {what}", self.objective, OBJECTIVES)
        if self.objective == "mismatch" and not self.needs_teacher:
            raise InputError(f"{what} attacks the mismatch with a teacher, so needs_teacher must be True")
        for name in self.reads or ():
            if name not in SETTINGS:
                raise one_of(f"what {what} reads", name, SETTINGS)
        given = {}
        for name, default in self.defaults.items():
            if name not in FALLBACKS:
                raise one_of(f"default of {what}", name, FALLBACKS)
            given[name] = default if isinstance(default, Default) else Default(default, self.source)
        object.__setattr__(self, "defaults", given)
        if self.settings is not None and not dataclasses.is_dataclass(self.settings):
            raise InputError(f"settings of {what} are {self.settings!r}, but must be a dataclass")
        object.__setattr__(self, "own", settings_of(self.settings or self.loss, what))

    @property
    def attacks_labels(self) -> bool:
        """Whether the attack moves away from the labels, so that no image can be without."""
        objective: Any = OBJECTIVES[self.objective] if isinstance(self.objective, str) else self.objective
        return bool(getattr(objective, "needs_labels", False))

    @property
    def unused(self) -> tuple[str, ...]:
        """Settings that neither the loss nor the attack looks at."""
        if self.reads is None:
            return ()
        by_attack: tuple[str, ...] = ANY_ATTACK
        if self.objective is None or isinstance(self.objective, str):
            by_attack = ATTACK_READS[self.objective]
        return tuple(name for name in SETTINGS if name not in (*self.reads, *by_attack))

    def own_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A value for each setting of the method's own; InputError for one that cannot be."""
        values = parse_settings(self.own, given, self.name)
        if self.settings is not None:
            try:
                self.settings(**values)
            except InputError:
                raise
            except (ValueError, TypeError) as error:
                raise InputError(f"settings of method {self.name!r} cannot be: {error}") from error
        return values

    def outer_loss(self, logits: Logits, config: TrainConfig) -> Tensor:
        """The loss of one batch, with the method's own settings."""
        if self.settings is not None:
            return self.loss(logits, config, self.settings(**(config.settings or {})))
        return self.loss(logits, config, **(config.settings or {}))

    def layers(self, config: TrainConfig) -> Layers:
        """The layers whose outputs the loss wants."""
        if not callable(self.features):
            return self.features or {}
        if self.settings is not None:
            return self.features(config, self.settings(**config.settings))
        return self.features(config, **config.settings)


METHODS: Registry[Method] = Registry("method")


@overload
def register_method(name: Method) -> Method: ...
@overload
def register_method(name: str, **row: Any) -> Callable[[Loss], Loss]: ...


def register_method(name: str | Method, **row: Any) -> Method | Callable[[Loss], Loss]:
    """Add a method to the table, by which ``--method NAME`` and ``TrainConfig(method=...)`` find it.

    Decorates a loss, or takes a whole `Method`.

    Args:
        name: what ``--method`` takes, or the `Method`.
        row: the other attributes of `Method`, but for the loss: ``objective`` (default: None, clean images),
            ``needs_teacher`` (default: whether the objective is the mismatch with one), ``needs_labels`` (default:
            True), ``formula`` (default: the first line of the loss's docstring), ``source`` (default: where it was
            written), ``reads``, ``defaults``, ``keep``, ``settings``, ``features``.

    Raises:
        InputError: the name is taken, or an attribute is none or cannot be.

    Example:
        >>> @register_method("doctest_sharp_kd", objective="mismatch", needs_labels=False)
        ... def sharp_kd(logits, config, *, gamma: float = 2.0):
        ...     "KL(T(x')‖S(x'))^γ"
        ...     from afm_kernels import softmax_kl_div
        ...     rows = softmax_kl_div(logits.student_adv, logits.teacher_adv, reduction="none")
        ...     return (rows**gamma).mean()
        >>> METHODS["doctest_sharp_kd"].own_settings({"gamma": "3"})
        {'gamma': 3.0}
    """
    origin = caller()
    if isinstance(name, Method):
        if row:
            raise InputError(f"register_method was given a whole method and {', '.join(row)}")
        METHODS.add(name.name, name, origin)
        return name

    def register(loss: Loss) -> Loss:
        METHODS.add(name, _made(name, loss, row, origin), origin)
        return loss

    return register


def _made(name: str, loss: Loss, row: dict[str, Any], origin: Origin) -> Method:
    attributes = [each.name for each in dataclasses.fields(Method) if each.init]
    for attribute in row:
        if attribute not in attributes or attribute in ("name", "loss"):
            raise one_of(f"attribute of method {name!r}", attribute, attributes)
    described = (inspect.getdoc(loss) or "").partition("\n")[0]
    usual: dict[str, Any] = {
        "formula": described or getattr(loss, "__qualname__", "a loss"),
        "objective": None,
        "needs_teacher": row.get("objective") == "mismatch",
        "needs_labels": True,
        "source": str(origin),
    }
    return Method(name=name, loss=loss, **(usual | row))


def get_method(name: str) -> Method:
    """The method of that name; InputError lists the names if there is none."""
    return METHODS.find(name)
