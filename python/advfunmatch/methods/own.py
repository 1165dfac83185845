"""Settings that a method brings: typed names with defaults, read from text, from YAML or from Python."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from ..config import parse_number
from ..errors import InputError, one_of

MISSING = inspect.Parameter.empty
SIMPLE = (bool, int, float, str)


@dataclass(frozen=True)
class OwnSetting:
    """One of a method's own settings: its name, type, and default, which is `MISSING` where it must be given."""

    name: str
    kind: Any
    default: Any = MISSING


def settings_of(source: Callable[..., Any] | type, what: str) -> tuple[OwnSetting, ...]:
    """The settings that a dataclass has as fields, or a loss as keyword arguments after ``*``.

    Raises:
        InputError: one of them has a type that no text can be read as; `what` says whose it is.
    """
    if isinstance(source, type):
        found = [
            (field.name, MISSING if _must_be_given(field) else _default_of(field))
            for field in dataclasses.fields(source)
            if field.init
        ]
    else:
        found = [
            (name, parameter.default)
            for name, parameter in inspect.signature(source).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
    hints = _hints(source, what) if found else {}
    settings = tuple(OwnSetting(name, hints.get(name, type(default)), default) for name, default in found)
    for setting in settings:
        if not _is_known(setting.kind):
            raise InputError(
                f"{what} has a setting {setting.name!r} of type {_named(setting.kind)}, but it must be bool, int, "
                "float, str, a Literal, a tuple or list of these with any length, or one of them or None"
            )
        if setting.default is not MISSING:
            _parse(setting.kind, setting.default, f"the default of setting {setting.name!r} of {what}")
    return settings


def parse_settings(declared: tuple[OwnSetting, ...], given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A value for each of a method's settings, of its type.

    Args:
        declared: the settings that there are.
        given: values by name, as text or as Python's.
        method: whose they are, for an error.

    Raises:
        InputError: a name that is none of them, a value of another type, or one missing that has no default.
    """
    names = [setting.name for setting in declared]
    for name in given:
        if not names:
            raise InputError(f"setting {name!r} is given, but method {method!r} has none of its own")
        if name not in names:
            raise one_of(f"setting of method {method!r}", name, names)
    values = {}
    for setting in declared:
        value = given.get(setting.name, setting.default)
        if value is MISSING:
            raise InputError(
                f"setting {setting.name!r} of method {method!r} is missing: --set {setting.name}=…"
            )
        values[setting.name] = _parse(setting.kind, value, f"setting {setting.name!r} of method {method!r}")
    return values


def _hints(source: Any, what: str) -> dict[str, Any]:
    while isinstance(source, functools.partial):
        source = source.func
    if not isinstance(source, type) and not hasattr(source, "__code__"):
        source = type(source).__call__
    try:
        return typing.get_type_hints(source)
    except (NameError, TypeError) as error:
        raise InputError(f"the types of the settings of {what} cannot be read: {error}") from error


def _must_be_given(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _alternatives(kind: Any) -> list[Any]:
    """The types of a union, or the one type; None is NoneType."""
    return list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]


def _is_known(kind: Any) -> bool:
    parts = [part for part in _alternatives(kind) if part is not type(None)]
    return len(parts) == 1 and (
        parts[0] in SIMPLE or get_origin(parts[0]) is Literal or _element(parts[0]) in SIMPLE
    )


def _element(kind: Any) -> Any:
    """What a sequence of any length is of; None for what is none."""
    args = get_args(kind)
    if get_origin(kind) is list:
        return args[0]
    return args[0] if get_origin(kind) is tuple and len(args) == 2 and args[1] is ... else None


def _parse(kind: Any, value: Any, what: str) -> Any:
    alternatives = _alternatives(kind)
    if type(None) in alternatives and (value is None or value == "none"):
        return None
    (kind,) = (part for part in alternatives if part is not type(None))
    if get_origin(kind) is Literal:
        for allowed in get_args(kind):
            if value == allowed or (isinstance(value, str) and value == str(allowed)):
                return allowed
        raise one_of(what, value, map(str, get_args(kind)))
    if (element := _element(kind)) is not None:
        parts = (
            [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        )
        if not isinstance(parts, list | tuple):
            raise InputError(f"{what} is {value!r}, but must be values with commas between")
        return get_origin(kind)(parse_simple(element, part, what) for part in parts)
    return parse_simple(kind, value, what)


def parse_simple(kind: type, value: Any, what: str) -> Any:
    """A value of one of the `SIMPLE` types, from text or from Python; InputError, about `what`, where it is none."""
    if kind is str and isinstance(value, str):
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif kind is int and not isinstance(value, bool | float):
        try:
            return int(value)
        except (TypeError, ValueError):
            pass
    elif kind is float:
        number = parse_number(value, what)
        if math.isfinite(number):
            return number
    wanted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[kind]
    raise InputError(f"{what} is {value!r}, but must be {wanted}")


def _named(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
