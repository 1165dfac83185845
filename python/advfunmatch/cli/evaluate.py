"""`advfunmatch evaluate`: the figures of a checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ..config import check_teacher_settings
from ..data import ImageDataset, corruption_cells, is_corrupted_set, load_dataset
from ..environment import environment
from ..errors import InputError
from ..evaluation import ATTACKS, Evaluation, attacks_of, evaluate_corruptions, split_attacks
from ..evaluation import evaluate as evaluate_model
from ..models import require_known_data
from ..models.digest import digest_of_network
from ..training.run import choose_device
from .figures import print_classes, print_curves
from .networks import ForeignWeights, load, remembered_teacher
from .options import BallOptions, Checkpoint, Data, Foreign, Images, Plugins, with_groups
from .processes import in_processes


@with_groups
def evaluate(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: Data,
    out: Annotated[Path, typer.Option(help="JSON file to write, after each attack")],
    attacks: Annotated[
        str | None,
        typer.Option(
            help="names with commas: "
            + ", ".join(ATTACKS)
            + "; with settings as in 'pgd(steps=40,restarts=5)' [default: clean,pgd20; of corrupted sets clean]",
            show_default=False,
        ),
    ] = None,
    *,
    ball: BallOptions,
    teacher: Annotated[
        str | None, typer.Option(help="checkpoint to measure fidelity (agreement and KL) against")
    ] = None,
    transfer_from: Annotated[
        str | None,
        typer.Option(
            help="checkpoints, with commas, that the attacks are also made on, to see what their images do to this one",
            metavar="CKPT,...",
            show_default=False,
        ),
    ] = None,
    curve: Annotated[
        str | None,
        typer.Option(
            help="attacks, such as pgd20, to measure accuracy against eps with, from 0 to twice the radius",
            metavar="ATTACK,...",
            show_default=False,
        ),
    ] = None,
    fidelity: Annotated[
        bool | None,
        typer.Option(
            help="measure fidelity to the teacher that the checkpoint remembers; or say that none is wanted",
            show_default=False,
        ),
    ] = None,
    foreign: Foreign,
    images: Images,
    plugins: Plugins,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what --out holds")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what --out holds")] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            help="processes on this machine among which AutoAttack shares the images out", show_default=False
        ),
    ] = None,
) -> None:
    """Measure a checkpoint on the test split.

    Writes the figures as JSON, one for each attack and radius, and under "warnings" what the files of weights leave
    open too. Stopped, it keeps what is done, and --resume goes on. Of a corrupted set, such as cifar10c:PATH, each
    corruption and severity is measured, and their means.
    """
    shared = in_processes(processes, context.obj)
    corrupted = is_corrupted_set(data)
    attacks = ("clean" if corrupted else "clean,pgd20") if attacks is None else attacks
    chosen = attacks_of(split_attacks(attacks))
    check_teacher_settings(teacher, *foreign.teacher)
    wants_fidelity = fidelity or teacher is not None
    if fidelity is False and teacher is not None:
        raise InputError(f"teacher is {teacher!r}, but --no-fidelity says that none is wanted")
    if corrupted and wants_fidelity:
        raise InputError(f"teacher is {teacher!r}, but corrupted sets measure no fidelity")
    if corrupted and transfer_from is not None:
        raise InputError(f"transfer_from is {transfer_from!r}, but corrupted sets measure no transfer")
    if corrupted and shared:
        raise InputError("processes is more than 1, but corrupted sets are measured in one")
    if corrupted and curve is not None:
        raise InputError(f"curve is {curve!r}, but corrupted sets are measured in one ball")
    one = corruption_cells(data)[0].name if corrupted else data
    require_known_data(checkpoint, one)
    test_set = load_dataset(one, split="test", **images.loading).to(choose_device(images.device))
    network, stored = load(checkpoint, foreign.checkpoint, test_set)
    where = ball.of(checkpoint, stored["config"])
    about = {
        "checkpoint": checkpoint,
        "model": stored["model"],
        "data": data,
        "eps_is": "given" if ball.eps else "the checkpoint's" if where["eps"] else None,
        "environment": environment(test_set.images.device),
        "warnings": list(stored["doubts"]),  # what was said is not printed again
    }
    settings: dict[str, Any] = {"seed": images.seed, "batch_size": images.batch_size, **where}
    settings |= {"progress": True, "out": out, "resume": resume, "overwrite": overwrite}
    if corrupted:
        measured = evaluate_corruptions(network, data, chosen, **images.loading, **settings, about=about)
        print("\n".join(measured.to_text(attack.label) for attack in chosen))
        for warning in measured.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return
    teacher_network = None
    if wants_fidelity:
        teacher, teacher_network, known = _teacher(teacher, foreign.teacher, stored, test_set)
        about["warnings"] += known["doubts"]
        about["teacher_model"] = known["model"]
    about["teacher"] = teacher
    if transfer_from is not None:
        sources = _sources(transfer_from, test_set)
        settings["transfer_from"] = {name: other for name, (other, _) in sources.items()}
        about["warnings"] += [doubt for _, known in sources.values() for doubt in known["doubts"]]
    settings |= {"shared": shared, "about": about, "curve": None if curve is None else split_attacks(curve)}
    result = evaluate_model(network, test_set, chosen, teacher=teacher_network, **settings)
    if os.environ.get("RANK", "0") != "0":  # the first process reports
        return
    print(f"{ball.said(**where)}; {len(test_set)} images of {data}")
    _print_figures(result)
    print_classes(result)
    print_curves(result)
    if not result.fidelity and fidelity is None:
        remembered, _ = remembered_teacher(stored)
        known_as = "--fidelity" if remembered else "--teacher FILE"
        print(f"fidelity was not measured ({known_as} does; --no-fidelity if none is wanted)")


def _teacher(
    path: str | None, foreign: ForeignWeights, student: dict[str, Any], data: ImageDataset
) -> tuple[str, nn.Module, dict[str, Any]]:
    """The teacher that was named, or that the student remembers, and what is known of it, doubts included."""
    digest = None
    if path is None:
        path, foreign = remembered_teacher(student)
        digest = student.get("digests", {}).get("teacher")
    if path is None:
        was = student["config"].get("teacher")
        reason = f"its teacher {was!r} is no longer there" if was else "the checkpoint remembers no teacher"
        raise InputError(f"fidelity is asked for, but {reason}; --teacher names one")
    network, known = load(path, foreign, data, "teacher")
    if digest is not None and digest != digest_of_network(network, known["model"]):
        doubt = f"teacher {path!r} is no longer the network that this student was trained with"
        print(f"warning: {doubt}", file=sys.stderr)
        known["doubts"] = [*known["doubts"], doubt]
    return path, network, known


def _sources(text: str, data: ImageDataset) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """The networks of --transfer-from by the names of their files, and what is known of each."""
    paths = [path.strip() for path in text.split(",") if path.strip()]
    if not paths:
        raise InputError(f"transfer_from is {text!r}, but must be one checkpoint or several, with commas")
    return {path: load(path, ForeignWeights(), data, "transfer_from") for path in paths}


def _print_figures(result: Evaluation) -> None:
    rows = [(f"{row.attack}, {row.ball}" if row.ball else row.attack, row) for row in result.results]
    near = [
        (f"agreement, {row.images}, {row.ball}" if row.ball else f"agreement, {row.images}", row)
        for row in result.fidelity
    ]
    width = max(22, *(len(name) for name, _ in (*rows, *near)))
    for name, figure in rows:
        print(f"{name:<{width}} {figure.accuracy:6.2f} %" + (f", {figure.nearest}" if figure.nearest else ""))
        for stage in figure.stages:
            print(
                f"  {stage['name']:<{width - 2}} {stage['accuracy']:6.2f} %, {stage['broken']} of {stage['images']} "
                f"broken, {stage['seconds']:.1f} s, {stage['forwards']} forwards, {stage['backwards']} backwards"
            )
    for name, fidelity in near:
        print(f"{name:<{width}} {fidelity.agreement:6.2f} %, KL {fidelity.kl:.4g}")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
