"""What the tables of `advfunmatch report` say, as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..evaluation import ATTACKS

# One colour a run, readable in print and by the colour-blind (Okabe and Ito, but for
# their yellow, which is lost on white).
COLOURS = ("#444444", "#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#8C6D1F")
# (key of result.json, title, format)
COLUMNS = (
    ("method", "method", "{}"),
    ("model", "model", "{}"),
    ("data", "data", "{}"),
    ("clean", "clean, %", "{:.2f}"),
    ("pgd20", "PGD-20, %", "{:.2f}"),
    ("agreement", "agreement, %", "{:.2f}"),
    ("kl_clean", "KL clean", "{:.4f}"),
    ("kl_mismatched", "KL mismatched", "{:.4f}"),
    ("images_per_second", "images/s", "{:,.0f}"),
    ("seconds", "seconds", "{:,.0f}"),
)


TITLES = {
    "fgsm": "FGSM",
    "pgd10": "PGD-10",
    "pgd20": "PGD-20",
    "pgd100": "PGD-100",
    "cw": "C&W",
    "autoattack": "AutoAttack",
}
# Where the accuracies of metrics.jsonl were measured, by the prefix of their names; "" in runs of version 0.1.
MONITORED = {"validation_": "validation images", "train_": "training images", "": "test images"}
FIDELITY = (("agreement", "agreement"), ("agreement_mismatched", "agreement, mismatched"))


@dataclass(frozen=True)
class Run:
    """A folder that `advfunmatch train` wrote, as read back, and what `advfunmatch evaluate` wrote into it, by file."""

    name: str
    folder: Path
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    colour: str
    evaluations: dict[str, dict[str, Any]]

    @property
    def images(self) -> tuple[str, float, str]:
        """What is attacked and how: runs that agree in it share a picture."""
        config = self.result["config"]
        return config["data"], config["eps"], config["norm"]

    @property
    def monitored(self) -> str:
        """The key of `MONITORED` under which metrics.jsonl has accuracies."""
        names = {name for row in self.metrics for name in row}
        return next((prefix for prefix in MONITORED if f"{prefix}pgd10" in names), "train_")


@dataclass(frozen=True)
class Table:
    """Titles, the first of which is the run's, and the runs with their other cells."""

    head: list[str]
    rows: list[tuple[Run, list[str]]]


def figures(runs: Sequence[Run]) -> Table:
    """What result.json says of each run: of its last epoch, and of its best where validation images told it."""
    rows = []
    for run in runs:
        shown = [run]
        if best := run.result.get("best"):
            shown = [
                replace(run, name=f"{run.name}, last epoch"),
                replace(run, name=f"{run.name}, best epoch: {best['epoch']}", result={**run.result, **best}),
            ]
        for each in shown:
            cells = [form.format(each.result[key]) if key in each.result else "–" for key, _, form in COLUMNS]
            rows.append((each, cells))
    return Table(["run", *(title for _, title, _ in COLUMNS)], rows)


def evaluations(runs: Sequence[Run]) -> Table | None:
    """A row for each evaluation of a run, with the attacks that any of them has; None if there is none."""
    found = [(run, file, stored) for run in runs for file, stored in run.evaluations.items()]
    names = [name for name in ATTACKS if any(name in stored for _, _, stored in found)]
    columns = [(name, f"{TITLES.get(name, name)}, %") for name in names]
    columns += [(key, f"{title}, %") for key, title in FIDELITY if any(key in each for _, _, each in found)]
    rows = []
    for run, file, stored in found:
        settings = stored["settings"]
        accuracies = [f"{stored[key]:.2f}" if key in stored else "–" for key, _ in columns]
        rows.append(
            (run, [file, str(stored["images"]), ball(settings["eps"], settings["norm"]), *accuracies])
        )
    return Table(["run", "file", "images", "ε", *(title for _, title in columns)], rows) if rows else None


def ball(eps: float, norm: str) -> str:
    """A radius as it is usually written, and its norm.

    >>> ball(8 / 255, "linf"), ball(0.15, "linf")
    ('8/255 (linf)', '0.15 (linf)')
    """
    grey_levels = round(255 * eps)
    fraction = norm == "linf" and grey_levels > 0 and abs(255 * eps - grey_levels) < 1e-6
    return f"{grey_levels}/255 ({norm})" if fraction else f"{eps:.4g} ({norm})"


def read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of `advfunmatch evaluate` in a run's folder, by name; marked if the run was trained since."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            stored = json.loads(path.read_text())
            made_by_evaluate = "checkpoint" in stored and {*stored["settings"]["attacks"]} <= {*stored}
            since = path.stat().st_mtime < (folder / "checkpoint.pt").stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if made_by_evaluate:
            found[f"{path.name}, before this training" if since else path.name] = stored
    return found
