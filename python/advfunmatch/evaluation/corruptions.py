"""Accuracy on corrupted images by corruption and severity, with the means that the benchmark reports.

Source: Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..data import Cell, corruption_cells, load_dataset, missing_of_benchmark
from ..errors import InputError
from .attacks import attacks_of
from .balls import balls_of
from .evaluate import BATCH_SIZE, measure_into
from .results import Evaluation
from .stored import EvaluationFile


@dataclass(frozen=True)
class CorruptionEvaluation:
    """What was measured, cell by cell.

    Attributes:
        cells: each severity of each corruption, and what was measured on it.
        complete: False while cells are still missing.
    """

    cells: list[tuple[Cell, Evaluation]]
    complete: bool = True

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

    @property
    def warnings(self) -> list[str]:
        """What was said of single cells; and that the mean is not the benchmark's, where corruptions are missing."""
        said = list(dict.fromkeys(text for _, measured in self.cells for text in measured.warnings))
        corruptions = {cell.corruption for cell, _ in self.cells}
        missing = missing_of_benchmark(corruptions)
        if missing and self.complete and len(corruptions) > 1:
            said.append(
                f"the mean is not the benchmark's, which is over fifteen corruptions: {', '.join(missing)} are missing"
            )
        return said

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
            "cells": [
                {"corruption": cell.corruption, "severity": cell.severity, **measured.to_dict()}
                for cell, measured in self.cells
            ],
            "images": self.cells[0][1].images,
            "settings": self.cells[0][1].settings,
            "complete": self.complete,
            "warnings": self.warnings,
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
        ball = self.cells[0][1].once[attack].ball
        title = f"{attack}, {ball}, %" if ball else f"{attack}, %"
        lines = [f"{title:<22}" + "".join(f"{head:>8}" for head in heads)]
        lines += [
            f"{name:<22}" + "".join(f"{value:8.2f}" for value in values) for name, values in rows.items()
        ]
        return "\n".join(lines)


def evaluate_corruptions(
    model: nn.Module,
    name: str,
    attacks: Iterable[Any] = ("clean",),
    *,
    eps: float | str | None = None,
    norm: str = "linf",
    seed: int = 0,
    limit: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool | Callable[[str, int, int], None] = False,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
) -> CorruptionEvaluation:
    """Measure a model on each severity of each corruption.

    Args:
        model: as for `evaluate`.
        name: a corrupted set, such as ``"cifar10c:PATH"``, or a part of it, such as ``"cifar10c:PATH@fog"``.
        attacks: as for `evaluate`; ``"clean"`` measures the corrupted images as they are.
        eps: one radius; None where no attack needs one.
        norm, seed, batch_size, resume, overwrite, about: as for `evaluate`.
        limit: how many images of each cell, the same ones of each; None for all.
        resize, crop: as for `load_dataset`.
        progress: True shows a bar for each cell; a function is called as by `evaluate`.
        out: JSON file that is written after each cell.

    Raises:
        InputError: as `evaluate` and `load_dataset` raise it.
    """
    attacks = attacks_of(attacks)
    if eps is not None and len(balls_of(eps, norm)) > 1:
        raise InputError(f"eps is {eps!r}, but corrupted sets are measured in one ball at a time")
    file = EvaluationFile(out, resume=resume, overwrite=overwrite, about=about)
    before = _cells_of(file)
    file.prepare()
    cells = corruption_cells(name)
    whole = CorruptionEvaluation([], complete=False)
    for cell in cells:
        data = load_dataset(cell.name, split="test", limit=limit, resize=resize, crop=crop)
        into = _CellFile(file, before.get((cell.corruption, cell.severity)))
        found = measure_into(
            into,
            model,
            data,
            attacks,
            eps=eps,
            norm=norm,
            seed=seed,
            teacher=None,
            size=batch_size,
            tell=_of_cell(progress, cell),
        )
        whole.cells.append((cell, found))
        whole = CorruptionEvaluation(whole.cells, complete=len(whole.cells) == len(cells))
        file.write(whole.to_dict())
    return whole


class _CellFile(EvaluationFile):
    """The part of a file that one cell has, and that is only written with the whole of it."""

    def __init__(self, file: EvaluationFile, stored: Mapping[str, Any] | None) -> None:
        self.path, self.about, self.stored = file.path, file.about, stored

    def read(self) -> dict[str, Any] | None:
        return None if self.stored is None else dict(self.stored)

    def write(self, measured: Mapping[str, Any]) -> None:
        """Nothing: cells are written whole."""

    def prepare(self) -> None:
        """Nothing: the whole file is prepared once."""

    def state_of(self, row: str) -> None:
        """Nothing: a cell is measured again."""


def _cells_of(file: EvaluationFile) -> dict[tuple[str, int], Mapping[str, Any]]:
    """What a file that is to be continued says of each cell."""
    if (stored := file.read()) is None:
        return {}
    try:
        return {
            (cell["corruption"], cell["severity"]): {
                name: value for name, value in cell.items() if name not in ("corruption", "severity")
            }
            for cell in stored["cells"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise file.unusable() from error


def _of_cell(
    progress: bool | Callable[[str, int, int], None], cell: Cell
) -> bool | Callable[[str, int, int], None]:
    """Progress that says which cell it is of."""
    if callable(progress):
        return lambda what, done, total: progress(f"{cell.corruption} {cell.severity}: {what}", done, total)
    return progress
