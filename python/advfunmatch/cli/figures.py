"""What `evaluate` prints beside each accuracy: classes, and accuracy against the radius."""

from __future__ import annotations

from ..evaluation import Evaluation
from ..evaluation.balls import short_number

CLASSES = 20  # of more, only the worst are printed
WORST = 10


def print_classes(result: Evaluation) -> None:
    """A row for each class, a column for each attack; of many classes those that are worst under the last attack."""
    figures = [row for row in result.results if row.per_class]
    if not figures:
        return
    names = list(figures[-1].per_class)
    said = "per class, %"
    if len(names) > CLASSES:
        names = sorted(names, key=lambda name: figures[-1].per_class[name])[:WORST]
        said = f"the {WORST} worst classes, %"
    heads = [f"{row.attack}, {row.ball}" if row.ball else row.attack for row in figures]
    first = max(map(len, (said, *names)))
    print("  ".join((f"{said:<{first}}", *(f"{head:>7}" for head in heads))))
    for name in names:
        cells = (
            f"{row.per_class[name]:{max(7, len(head))}.2f}" for row, head in zip(figures, heads, strict=True)
        )
        print("  ".join((f"{name:<{first}}", *cells)))


def print_curves(result: Evaluation) -> None:
    """Radii above accuracies, for each attack."""
    for curve in result.curves:
        radii = [short_number(eps) for eps in curve.eps]
        widths = [max(6, len(radius)) for radius in radii]
        first = f"{curve.attack}, %"
        second = f"eps ({curve.norm})"
        width = max(len(first), len(second))
        print("  ".join((f"{second:<{width}}", *(f"{r:>{w}}" for r, w in zip(radii, widths, strict=True)))))
        cells = (f"{a:{w}.2f}" for a, w in zip(curve.accuracy, widths, strict=True))
        print("  ".join((f"{first:<{width}}", *cells)))
