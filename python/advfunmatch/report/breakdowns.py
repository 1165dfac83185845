"""What an evaluation's JSON holds beside one accuracy for each attack: accuracy by radius, and by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..evaluation import Ball, Curve

CLASSES = 20  # of more, only those that are worst are shown
WORST = 10


class ByClass(NamedTuple):
    """Accuracies in percent by class, of one attack."""

    attack: str
    ball: Ball | None
    accuracies: dict[str, float]


def curves_of(stored: Mapping[str, Any]) -> list[Curve]:
    """Accuracy against the radius; KeyError, TypeError or ValueError for what is none."""
    curves = [Curve(**row) for row in stored.get("curves", [])]
    for curve in curves:
        for values in (curve.eps, curve.accuracy):
            [float(value) for value in values]
        if len(curve.eps) != len(curve.accuracy) or not curve.eps:
            raise ValueError("a curve has as many radii as accuracies")
    return curves


def classes_of(stored: Mapping[str, Any]) -> list[ByClass]:
    """Each row that has classes; none in a file of an earlier version. Errors are those of `curves_of`."""
    found = []
    for row in stored.get("results", []):
        ball = None if row["eps"] is None else Ball(row["norm"], row["eps"])
        accuracies = {str(name): float(value) for name, value in row["per_class"].items()}
        found.append(ByClass(str(row["attack"]), ball, accuracies))
    return found


def shown_classes(rows: list[ByClass]) -> list[str]:
    """The classes in their order; of many those that are worst, on average over the rows of attacks, worst first."""
    names = list(rows[0].accuracies)
    if len(names) <= CLASSES:
        return names
    counted = [row for row in rows if row.ball] or rows
    return sorted(names, key=lambda name: sum(row.accuracies[name] for row in counted))[:WORST]
