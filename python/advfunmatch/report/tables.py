"""What the tables of `advfunmatch report` say, as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluation import ATTACKS, Ball, Curve
from ..evaluation.balls import short_number
from ..models import read_checkpoint
from ..models.digest import digest_of_weights
from .breakdowns import ByClass, classes_of, curves_of, shown_classes

# One colour a run, readable in print and by the colour-blind (Okabe and Ito, but for
# their yellow, which is lost on white).
COLOURS = ("#444444", "#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#8C6D1F")
# (key of result.json, title, format)
COLUMNS = (
    ("method", "method", "{}"),
    ("model", "model", "{}"),
    ("data", "data", "{}"),
    ("ball", "ε", "{}"),
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
    "cw_pgd": "margin PGD",
    "cw": "C&W",
    "carlini_wagner": "Carlini-Wagner",
    "lbfgs": "L-BFGS",
    "autoattack": "AutoAttack",
}
# Where the accuracies of metrics.jsonl were measured, by the prefix of their names; "" in runs of version 0.1.
MONITORED = {"validation_": "validation images", "train_": "training images", "": "test images"}
FIDELITY = {"agreement": "agreement", "agreement_mismatched": "agreement, mismatched"}


@dataclass(frozen=True)
class Run:
    """A folder that `advfunmatch train` wrote, as read back, and what `advfunmatch evaluate` wrote into it, by file."""

    name: str
    folder: Path
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    colour: str
    evaluations: dict[str, dict[str, Any]]
    suffix: str = ""  # which of its checkpoints a row is of

    @property
    def ball(self) -> Ball:
        """What it was attacked in, while it was trained and afterwards: runs that differ in it share nothing."""
        return Ball(self.result["config"]["norm"], self.result["config"]["eps"])

    @property
    def images(self) -> tuple[str, Ball]:
        """What is attacked and how: runs that agree in it can be compared."""
        return self.result["config"]["data"], self.ball

    @property
    def monitored(self) -> str:
        """The key of `MONITORED` under which metrics.jsonl has accuracies."""
        names = {name for row in self.metrics for name in row}
        return next((prefix for prefix in MONITORED if f"{prefix}pgd10" in names), "train_")


@dataclass(frozen=True)
class Table:
    """The figures of one ball.

    Attributes:
        ball: that all the robust figures are of; None where there are none.
        words: how many columns, from the first, hold words.
        head: titles, the first of which is the run's.
        rows: the runs, with their other cells.
        note: what else is to be said of it.
    """

    ball: Ball | None
    words: int
    head: list[str]
    rows: list[tuple[Run, list[str]]]
    note: str = ""


def by_ball(runs: Sequence[Run]) -> dict[Ball, list[Run]]:
    """The runs that were attacked in each ball, as they come."""
    groups: dict[Ball, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.ball, []).append(run)
    return groups


def figures(runs: Sequence[Run]) -> Table:
    """What result.json says of runs of one ball: of the last epoch, and of the best where validation images told it."""
    rows = []
    for run in runs:
        shown = [run]
        if best := run.result.get("best"):
            shown = [
                replace(run, suffix=", last epoch"),
                replace(run, suffix=f", best epoch: {best['epoch']}", result={**run.result, **best}),
            ]
        for each in shown:
            values = {**each.result, "ball": each.ball}
            rows.append(
                (each, [form.format(values[key]) if key in values else "–" for key, _, form in COLUMNS])
            )
    return Table(runs[0].ball, 4, ["run", *(title for _, title, _ in COLUMNS)], rows)


def evaluations(runs: Sequence[Run]) -> list[Table]:
    """For each ball a row for each evaluation in it, with the attacks that any of them has."""
    found = [
        (run, file, stored, ball, cells)
        for run in runs
        for file, stored in run.evaluations.items()
        for ball, cells in _by_ball(stored).items()
    ]
    tables = []
    for ball in dict.fromkeys(ball for _, _, _, ball, _ in found):
        here = [(run, file, stored, cells) for run, file, stored, its, cells in found if its == ball]
        names = dict.fromkeys(name for _, _, _, cells in here for name in cells if name not in FIDELITY)
        order = [
            *(name for name in ATTACKS if name in names),
            *(name for name in names if name not in ATTACKS),
        ]
        columns = {name: TITLES.get(name, name) for name in order}
        columns |= {key: FIDELITY[key] for key in FIDELITY if any(key in cells for _, _, _, cells in here)}
        rows = []
        for run, file, stored, cells in here:
            shown = [f"{cells[name]:.2f}" if name in cells else "–" for name in columns]
            rows.append((run, [file, str(stored["images"]), str(ball or "–"), *shown]))
        titles = (f"{title}, %" for title in columns.values())
        tables.append(Table(ball, 2, ["run", "file", "images", "ε", *titles], rows))
    return tables


def drawn_curves(runs: Sequence[Run]) -> dict[str, list[tuple[Run, str, Curve]]]:
    """Accuracy against the radius by norm: of which run, of which file, and the curve."""
    found: dict[str, list[tuple[Run, str, Curve]]] = {}
    for run in runs:
        for file, stored in run.evaluations.items():
            for curve in curves_of(stored):
                found.setdefault(curve.norm, []).append((run, file, curve))
    return found


def radii(curves: Sequence[tuple[Run, str, Curve]]) -> list[Table]:
    """For each set of radii a row for each curve."""
    tables = []
    for eps in dict.fromkeys(tuple(curve.eps) for _, _, curve in curves):
        rows = [
            (
                run,
                [file, TITLES.get(curve.attack, curve.attack), *(f"{value:.2f}" for value in curve.accuracy)],
            )
            for run, file, curve in curves
            if tuple(curve.eps) == eps
        ]
        head = ["run", "file", "attack", *map(short_number, eps)]
        tables.append(
            Table(None, 4, head, rows, "Percent by radius; what breaks in a ball is broken in larger ones.")
        )
    return tables


def classes(runs: Sequence[Run]) -> list[Table]:
    """For each set of classes a row for each attack in each ball; of many classes those that are worst."""
    found: dict[tuple[str, ...], list[tuple[Run, str, ByClass]]] = {}
    for run in runs:
        for file, stored in {"result.json": run.result, **run.evaluations}.items():
            for row in classes_of(stored):
                found.setdefault(tuple(row.accuracies), []).append((run, file, row))
    tables = []
    for rows in found.values():
        names = shown_classes([row for _, _, row in rows])
        cells = [
            (run, [file.partition(",")[0], _in_ball(row), *(f"{row.accuracies[name]:.1f}" for name in names)])
            for run, file, row in rows
        ]
        left_out = len(rows[0][2].accuracies) - len(names)
        note = (
            f"The {len(names)} classes that are worst under attack, of {len(names) + left_out}."
            if left_out
            else ""
        )
        tables.append(Table(None, 4, ["run", "file", "attack", *names], cells, note))
    return tables


def _in_ball(row: ByClass) -> str:
    title = TITLES.get(row.attack, row.attack)
    return f"{title}, {row.ball}" if row.ball else title


def _by_ball(stored: dict[str, Any]) -> dict[Ball | None, dict[str, float]]:
    """An evaluation's accuracies and agreement by ball; those on clean images stand with each."""
    if "results" not in stored:  # a file of an earlier version, which has one ball
        settings = stored["settings"]
        names = [name for name in (*settings["attacks"], *FIDELITY) if name in stored]
        return {Ball(settings["norm"], settings["eps"]): {name: stored[name] for name in names}}
    found: dict[Ball | None, dict[str, float]] = {}
    for row in stored["results"]:
        found.setdefault(_ball_of(row), {})[row["attack"]] = row["accuracy"]
    for row in stored["fidelity"]:
        key = "agreement" if row["images"] == "clean" else "agreement_mismatched"
        found.setdefault(_ball_of(row), {})[key] = row["agreement"]
    clean = found.pop(None, {})
    return {ball: clean | cells for ball, cells in found.items()} or {None: clean}


def _ball_of(row: dict[str, Any]) -> Ball | None:
    return None if row["eps"] is None else Ball(row["norm"], row["eps"])


def read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of `advfunmatch evaluate` in a run's folder, by name, which says if other weights were measured.

    Whether they were is told by digests: times change when a folder is copied.
    """
    found = {}
    weights: set[str] | None = None
    for path in sorted(folder.glob("*.json")):
        try:
            stored = json.loads(path.read_text())
            made_by_evaluate = "checkpoint" in stored and (
                "results" in stored or {*stored["settings"]["attacks"]} <= {*stored}
            )
            if not made_by_evaluate:
                continue
            # Which read all that is shown of it.
            _by_ball(stored), curves_of(stored), classes_of(stored)
            digest = stored.get("digests", {}).get("model")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        weights = _digests_in(folder) if weights is None else weights
        name = path.name
        if digest is None:
            name += ", which does not say of what weights"
        elif weights and digest not in weights:
            name += ", before this training or of another network"
        if not stored.get("complete", True):
            name += ", not complete"
        found[name] = stored
    return found


def _digests_in(folder: Path) -> set[str]:
    """Digests of the weights that a run left; none where they cannot be read."""
    digests = set()
    for path in (folder / "checkpoint.pt", folder / "best.pt"):
        try:
            stored = read_checkpoint(path)
        except InputError:
            continue
        digests.add(digest_of_weights(stored["state_dict"], stored["model"]))
    return digests
