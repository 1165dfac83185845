"""What `evaluate` can attack with: a table of names, each with settings, that a program of one's own adds rows to.

Note [Attack functions]
~~~~~~~~~~~~~~~~~~~~~~~
An attack is a function ``(model, x, y, ...) -> x_adv`` of a network in eval mode, float32 images (N, C, H, W) in
[0, 1] and int64 labels (N,). Of what follows ``y`` it is handed what it names:

* ``eps``, ``norm``: the ball that its images must stay in, which is checked.
* ``seed``: one for each batch. PyTorch's generators are seeded with it too, and given back as they were.
* ``teacher``: the network to compare with; None without one, if it has a default.
* ``batch_size``: it is then handed all images at once, and splits them itself; otherwise a batch at a time.
* ``progress``: to be called with the number of images done, of those that it was handed.
* ``state``: a path, or None, of a file of its own in which it may keep what is done, to go on from after a stop; of
  attacks that take ``batch_size``.
* ``shared``: whether other processes of the run do the same meanwhile, so that it may share the images out.

The other parameters are its settings: ``pgd(steps=40)`` in text and in Python. Their types come from their
annotations, else from their defaults. It returns the images, or `Attacked`, which says more of them.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from ..attacks import PGDAttack
from ..config import parse_number
from ..errors import InputError, one_of
from ..methods.own import SIMPLE, parse_simple
from ..plugins import Registry, caller
from .balls import short_number

HANDED = ("eps", "norm", "seed", "teacher", "batch_size", "progress", "state", "shared")
Function = TypeVar("Function", bound=Callable[..., Any])


class Attacked(NamedTuple):
    """What an attack made of the images.

    Attributes:
        images: (N, C, H, W), in the ball.
        zero_gradients: of how many it never had a gradient.
        distances: (N,), where it looks for the nearest adversarial image: how far that is in the ball's norm, whatever
            the radius; 0 of an image that is misclassified as it is, infinite where none was found.
        warnings: what there is to say of the figure, a sentence each.
        stages: what each of its stages did, where it has some, as plain values.
    """

    images: Tensor
    zero_gradients: int = 0
    distances: Tensor | None = None
    warnings: Sequence[str] = ()
    stages: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Attack:
    """An attack with its settings. Called with more of them, it returns another: ``pgd(steps=40, restarts=5)``.

    Attributes:
        name: what it is registered as, or was called by its user.
        function: see Note [Attack functions].
        settings: those that were given.
        eps, norm: of a ball of its own, whatever the others' is.
        source: what the network is called that its images are made on; empty for that which is measured.
        network: that network.
    """

    name: str
    function: Callable[..., Tensor | Attacked]
    settings: Mapping[str, Any] = field(default_factory=dict)
    eps: float | None = None
    norm: str | None = None
    source: str = ""
    network: nn.Module | None = None

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """What the function takes beside the network, the images and the labels."""
        return _parameters(self.function)

    @property
    def needs_teacher(self) -> bool:
        """Whether it cannot do without a teacher: it looks for a mismatch, or its ``teacher`` has no default."""
        if isinstance(self.function, partial) and self.function.func is _run_instance:
            return getattr(self.function.args[0].objective, "teacher", "none") != "none"
        own = self.parameters.get("teacher")
        return own is not None and own.default is inspect.Parameter.empty

    @property
    def label(self) -> str:
        """The name with the settings that were given, by which results go.

        >>> Attack("noise", lambda model, x, y, tries=1: x, {"tries": 3}).label
        'noise(tries=3)'
        """
        given = _said(self.settings)
        own = f"{self.name}({given})" if given else self.name
        return f"{own} from {self.source}" if self.source else own

    @property
    def about(self) -> str:
        """What it does: the first line of its documentation, and every setting it runs with."""
        documented = (inspect.getdoc(_unwrapped(self.function)) or "").partition("\n")[0].rstrip(".")
        values = {name: each.default for name, each in self.parameters.items() if name not in HANDED}
        return "; ".join(filter(None, (documented, _said(values | dict(self.settings))))) or self.name

    def __call__(self, **settings: Any) -> Attack:
        """The same attack with these settings; ``eps`` and ``norm`` give it a ball of its own."""
        ball: dict[str, Any] = {name: settings.pop(name) for name in ("eps", "norm") if name in settings}
        if "eps" in ball:
            ball["eps"] = parse_number(ball["eps"], f"eps of attack {self.name!r}")
        known = {name: each for name, each in self.parameters.items() if name not in HANDED}
        for name in ball:
            if name not in self.parameters:
                raise InputError(f"attack {self.name!r} takes no {name}, so it cannot be given one")
        typed = {}
        for name, value in settings.items():
            if name not in known:
                raise one_of(f"setting of attack {self.name!r}", name, [*known, *ball_settings(self)])
            typed[name] = _typed(value, known[name], f"{name} of attack {self.name!r}")
        return replace(self, settings={**self.settings, **typed}, **ball)

    def require_settings(self) -> None:
        """InputError for a setting that has no default and was not given."""
        for name, each in self.parameters.items():
            if name not in HANDED and name not in self.settings and each.default is inspect.Parameter.empty:
                raise InputError(f"attack {self.name!r} needs {name}, as in {self.name}({name}=...)")


def ball_settings(attack: Attack) -> list[str]:
    """The settings that give an attack a ball of its own."""
    return [name for name in ("eps", "norm") if name in attack.parameters]


ATTACKS: Registry[Attack] = Registry("attack")


def register_attack(name: str) -> Callable[[Function], Function]:
    """Add a function to the attacks that `evaluate` and the command line know by name; see Note [Attack functions].

    Raises:
        InputError: the name is taken, or is none; or the function does not take a network, images and labels.

    Example:
        >>> @register_attack("grey")
        ... def grey(model, x, y, *, eps, share: float = 1.0):
        ...     "Every pixel towards grey."
        ...     return x + (0.5 - x).clamp(-share * eps, share * eps)
        >>> ATTACKS["grey"].about
        'Every pixel towards grey; share=1'
    """
    origin = caller()

    def register(function: Function) -> Function:
        _parameters(function)
        ATTACKS.add(name, Attack(name, function), origin)
        return function

    return register


def attacks_of(given: Iterable[Any]) -> list[Attack]:
    """Attacks from what a user gives: see `evaluate`; InputError for one that is none, or that comes twice."""
    if isinstance(given, Mapping):
        given = list(given.items())
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"attacks is {given!r}, but must be a list of names, PGDAttacks or functions")
    attacks = [attack_of(each) for each in given]
    if not attacks:
        raise InputError(f"attacks is empty, but must name one or more of: {', '.join(ATTACKS)}")
    seen: set[tuple[str, float | None, str | None]] = set()
    for attack in attacks:
        key = attack.label, attack.eps, attack.norm
        if key in seen:
            raise InputError(
                f"attack {attack.label!r} is given twice; two of one name need names of their own, as in "
                "{'first': ..., 'second': ...}"
            )
        seen.add(key)
        attack.require_settings()
    return attacks


def attack_of(given: Any, name: str = "") -> Attack:
    """One attack from its name, text such as ``"pgd(steps=40)"``, a `PGDAttack`, a function, or a pair (name, any of
    these); `name` goes over its own."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str):
        return attack_of(given[1], given[0])
    attack = _attack_of(given, name)
    return replace(attack, name=name or attack.name)


def _attack_of(given: Any, name: str) -> Attack:
    if isinstance(given, Attack):
        return given
    if isinstance(given, str):
        return _from_text(given)
    if isinstance(given, PGDAttack):
        return Attack(_describe(given), partial(_run_instance, given), eps=given.eps, norm=given.norm)
    if callable(given):
        own = _unwrapped(given)
        name = name or getattr(own, "__name__", type(own).__name__)
        if isinstance(given, type):
            raise InputError(
                f"attack is the class {name}, but must be one of its instances, as in {name}(...)"
            )
        if name == "<lambda>":
            raise InputError("attack is a lambda, which has no name; give it one, as in {'name': lambda ...}")
        _parameters(given)
        return Attack(name, given)
    raise one_of("attack", given, ATTACKS)


def split_attacks(text: str) -> list[str]:
    """Text with commas, but for those between parentheses.

    >>> split_attacks("clean, pgd(steps=40, restarts=5)")
    ['clean', 'pgd(steps=40, restarts=5)']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _from_text(text: str) -> Attack:
    name, parenthesis, inside = text.strip().partition("(")
    name = name.strip()
    attack = ATTACKS.find(name)
    if not parenthesis:
        return attack
    if not inside.rstrip().endswith(")"):
        raise InputError(f"attack is {text!r}, but settings must end with a parenthesis, as in pgd(steps=40)")
    settings = {}
    for part in split_attacks(inside.rstrip()[:-1]):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"attack is {text!r}, but {part!r} must be NAME=VALUE, as in pgd(steps=40)")
        if key.strip() in settings:
            raise InputError(f"attack is {text!r}, which gives {key.strip()} twice")
        settings[key.strip()] = value.strip().strip("'\"")
    return attack(**settings)


def _run_instance(attack: PGDAttack, model: Any, x: Tensor, y: Tensor, *, teacher: Any) -> Attacked:
    x_adv = attack(model, teacher, x, y)
    return Attacked(x_adv, int(attack.zero_gradients))  # type: ignore[arg-type]


def _describe(attack: PGDAttack) -> str:
    """A name for a PGDAttack that was given without one, in which its ball does not stand."""
    size = f"step_size={attack.step_size:.5g}"
    restarts = f", restarts={attack.restarts}" if attack.restarts > 1 else ""
    return f"PGDAttack({type(attack.objective).__name__}, steps={attack.steps}, {size}{restarts})"


def _said(settings: Mapping[str, Any]) -> str:
    """Settings as they are written, numbers as the fraction of 255 that they may be."""

    def shown(value: Any) -> str:
        return short_number(value) if isinstance(value, float) else str(value)

    return ", ".join(f"{name}={shown(value)}" for name, value in settings.items())


def _unwrapped(function: Any) -> Any:
    return _unwrapped(function.func) if isinstance(function, partial) else function


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Those after the network, the images and the labels; InputError for a function without these three."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # an annotation that only a type checker can read
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise InputError(f"attack {function!r} does not say what it takes: {error}") from error
    kinds = inspect.Parameter
    parameters = list(signature.parameters.values())
    places = [
        each for each in parameters if each.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    if len(places) < 3 or any(each.name in HANDED for each in places[:3]):
        raise InputError(f"attack {function!r} takes {signature}, but must take (model, x, y, ...)")
    rest = [each for each in parameters if each not in places[:3]]
    return {each.name: each for each in rest if each.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)}


def _typed(value: Any, parameter: inspect.Parameter, what: str) -> Any:
    """A setting's value as its parameter wants it, from text or from Python; InputError where it does not fit."""
    allowed = _kinds(parameter)
    if not allowed:
        return value
    if type(None) in allowed and (value is None or value == "none"):
        return None
    for kind in SIMPLE:  # text last, which any of the others may be written as
        if kind in allowed:
            with suppress(InputError):
                return parse_simple(kind, value, what)
    if isinstance(value, tuple(allowed)) and not isinstance(value, bool):
        return value
    wanted = " or ".join(kind.__name__ for kind in allowed if kind is not type(None))
    raise InputError(f"{what} is {value!r}, but must be of type {wanted}")


def _kinds(parameter: inspect.Parameter) -> list[type]:
    """The types that a parameter takes; none where it does not say."""
    empty = inspect.Parameter.empty
    annotation = parameter.annotation
    if annotation is empty and parameter.default not in (empty, None):
        annotation = type(parameter.default)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
    else:
        members = (annotation,)
    return (
        list(members) if annotation is not empty and all(isinstance(kind, type) for kind in members) else []
    )
