"""Accuracy on corrupted images by corruption and severity, with the means that the benchmark reports.

Source: Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data import Cell, corruption_cells, load_dataset
from .evaluate import BATCH_SIZE, Evaluation, check_attacks, evaluate


@dataclass(frozen=True)
class CorruptionEvaluation:
    """What was measured, cell by cell.

    Attributes:
        cells: each severity of each corruption, and what was measured on it.
    """

    cells: list[tuple[Cell, Evaluation]]

    @property
    def attacks(self) -> list[str]:
        """The attacks that were measured."""
        return list(self.cells[0][1].accuracies)

    def mean(
        self, attack: str = "clean", *, corruption: str | None = None, severity: int | None = None
    ) -> float:
        """Mean accuracy in percent over the cells of one corruption, of one severity, or of all.

        Means over corruptions are over the benchmark's fifteen: the four published beside them count only where there
        are no others.
        """
        chosen = [
            (cell, measured.accuracies[attack])
            for cell, measured in self.cells
            if corruption in (None, cell.corruption) and severity in (None, cell.severity)
        ]
        counted = [accuracy for cell, accuracy in chosen if cell.in_mean] or [
            accuracy for _, accuracy in chosen
        ]
        return round(sum(counted) / len(counted), 2)

    def by_corruption(self, attack: str = "clean") -> dict[str, dict[int, float]]:
        """Accuracy in percent by corruption and severity."""
        table: dict[str, dict[int, float]] = {}
        for cell, measured in self.cells:
            table.setdefault(cell.corruption, {})[cell.severity] = measured.accuracies[attack]
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the means over both under ``corrupted``, every cell under ``corruptions``."""
        severities = sorted({cell.severity for cell, _ in self.cells})
        return {
            "corrupted": {attack: self.mean(attack) for attack in self.attacks},
            "by_severity": {
                attack: {severity: self.mean(attack, severity=severity) for severity in severities}
                for attack in self.attacks
            },
            "corruptions": {attack: self.by_corruption(attack) for attack in self.attacks},
            "images": self.cells[0][1].images,
            "settings": self.cells[0][1].settings,
            "warnings": list(dict.fromkeys(text for _, measured in self.cells for text in measured.warnings)),
        }

    def to_text(self, attack: str = "clean") -> str:
        """A table: a row for each corruption, a column for each severity, the means last."""
        severities = sorted({cell.severity for cell, _ in self.cells})
        rows = {
            corruption: [*values.values(), self.mean(attack, corruption=corruption)]
            for corruption, values in self.by_corruption(attack).items()
        }
        rows["mean"] = [*(self.mean(attack, severity=severity) for severity in severities), self.mean(attack)]
        heads = [*(f"{severity}" for severity in severities), "mean"]
        lines = [f"{attack + ', %':<22}" + "".join(f"{head:>8}" for head in heads)]
        lines += [
            f"{name:<22}" + "".join(f"{value:8.2f}" for value in values) for name, values in rows.items()
        ]
        return "\n".join(lines)


def evaluate_corruptions(
    model: nn.Module,
    name: str,
    attacks: Iterable[str] = ("clean",),
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    limit: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> CorruptionEvaluation:
    """Measure a model on each severity of each corruption.

    Args:
        model: as for `evaluate`.
        name: a corrupted set, such as ``"cifar10c:PATH"``, or a part of it, such as ``"cifar10c:PATH@fog"``.
        attacks: as for `evaluate`; ``"clean"`` measures the corrupted images as they are.
        eps, norm, seed, batch_size: as for `evaluate`.
        limit: how many images of each cell, the same ones of each; None for all.
        resize, crop: as for `load_dataset`.

    Raises:
        InputError: as `evaluate` and `load_dataset` raise it.
    """
    attacks = check_attacks(attacks)
    measured = []
    for cell in corruption_cells(name):
        data = load_dataset(cell.name, split="test", limit=limit, resize=resize, crop=crop)
        measured.append(
            (cell, evaluate(model, data, attacks, eps=eps, norm=norm, seed=seed, batch_size=batch_size))
        )
    return CorruptionEvaluation(measured)
