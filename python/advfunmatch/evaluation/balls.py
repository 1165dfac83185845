"""The ball that an attack stays in: a norm and a radius, without which no robust accuracy says anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import NORMS, check_radius, parse_number
from ..errors import InputError, one_of


@dataclass(frozen=True)
class Ball:
    """Images within `eps` of one, in a norm; InputError names a value that cannot be.

    >>> str(Ball("linf", 8 / 255)), str(Ball("linf", 0.2)), str(Ball("l2", 0.5))
    ('8/255 (linf)', '0.2 (linf)', '0.5 (l2)')
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise one_of("norm", self.norm, NORMS)
        check_radius(self.eps, self.norm)

    @property
    def radius(self) -> str:
        """As it is usually written."""
        return short_number(self.eps)

    def __str__(self) -> str:
        return f"{self.radius} ({self.norm})"


def short_number(value: float) -> str:
    """A number of few digits as it is, and a whole number of grey levels as their fraction."""
    if float(f"{value:.3g}") == value:
        return f"{value:g}"
    levels = round(255 * value)
    return f"{levels}/255" if levels > 0 and abs(255 * value - levels) < 1e-6 else f"{value:.6g}"


def balls_of(eps: float | str | Iterable[float | str], norm: str) -> list[Ball]:
    """One ball for each radius: a number, text such as ``"4/255,8/255"``, or several of either.

    >>> [str(ball) for ball in balls_of("4/255,8/255", "linf")]
    ['4/255 (linf)', '8/255 (linf)']
    """
    if isinstance(eps, str):
        radii: list[float | str] = [part.strip() for part in eps.split(",")]
    else:
        radii = list(eps) if isinstance(eps, Iterable) else [eps]
    if not radii:
        raise InputError("eps is empty, but must be one radius or several, such as 8/255")
    return list(dict.fromkeys(Ball(norm, parse_number(radius, "eps")) for radius in radii))
