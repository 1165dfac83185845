"""`advfunmatch evaluate`: the figures of a checkpoint."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import check_teacher_settings
from ..data import corruption_cells, is_corrupted_set, load_dataset
from ..environment import environment
from ..errors import InputError
from ..evaluation import ATTACKS, attack_settings, check_attacks, evaluate_corruptions
from ..evaluation import evaluate as evaluate_model
from ..files import prepare_file, write_json
from ..training.digests import digest_of_network
from ..training.run import choose_device
from .networks import load, remembered_teacher
from .options import Ball, Checkpoint, Data, Foreign, Images, Plugins, with_groups


@with_groups
def evaluate(
    checkpoint: Checkpoint,
    data: Data,
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    attacks: Annotated[
        str | None,
        typer.Option(
            help="names with commas: "
            + ", ".join(ATTACKS)
            + " [default: clean,pgd20; of corrupted sets clean]",
            show_default=False,
        ),
    ] = None,
    *,
    ball: Ball,
    teacher: Annotated[
        str | None, typer.Option(help="checkpoint to measure agreement and KL against")
    ] = None,
    foreign: Foreign,
    images: Images,
    plugins: Plugins,
) -> None:
    """Measure a checkpoint on the test split.

    Writes the figures as JSON, under "warnings" what the files of weights leave open too. A student is compared with
    its teacher, if that is where it was. Of a corrupted set, such as cifar10c:PATH, each corruption and severity is
    measured, and their means.
    """
    corrupted = is_corrupted_set(data)
    attacks = ("clean" if corrupted else "clean,pgd20") if attacks is None else attacks
    names = check_attacks(name.strip() for name in attacks.split(",") if name.strip())
    if "autoattack" in names:
        importlib.import_module("pyautoattack")  # before the other attacks have taken their time
    settings = dataclasses.asdict(attack_settings(ball.eps, ball.norm, images.seed, images.batch_size))
    theirs = foreign.teacher
    check_teacher_settings(teacher, *theirs)
    if corrupted and teacher is not None:
        raise InputError(f"teacher is {teacher!r}, but corrupted sets measure no fidelity")
    one = corruption_cells(data)[0].name if corrupted else data
    test_set = load_dataset(one, split="test", **images.loading).to(choose_device(images.device))
    network, stored = load(checkpoint, foreign.checkpoint, test_set)
    if corrupted:
        prepare_file(out, "out")
        measured = evaluate_corruptions(network, data, names, **images.loading, **settings)
        figures = measured.to_dict()
        figures["warnings"] = stored["doubts"] + figures["warnings"]
        about = {"checkpoint": checkpoint, "model": stored["model"], "data": data}
        write_json(out, figures | about | {"environment": environment(test_set.images.device)})
        print("\n".join(measured.to_text(name) for name in names))
        return
    digest = None
    if teacher is None:
        teacher, theirs = remembered_teacher(stored)
        digest = stored.get("digests", {}).get("teacher")
    teacher_network, doubts, said = None, [], stored["doubts"]
    if teacher is not None:
        teacher_network, known = load(teacher, theirs, test_set, "teacher")
        said += known["doubts"]
        if digest is not None and digest != digest_of_network(teacher_network, known["model"]):
            doubts.append(f"teacher {teacher!r} is no longer the network that this student was trained with")
    prepare_file(out, "out")
    result = evaluate_model(network, test_set, names, teacher=teacher_network, **settings).to_dict()
    result["warnings"] = doubts + result["warnings"]
    result |= {"checkpoint": checkpoint, "model": stored["model"], "data": data, "teacher": teacher}
    about = {"environment": environment(test_set.images.device)}
    write_json(
        out, result | about | {"warnings": said + result["warnings"]}
    )  # what was said is not printed again
    _print_figures(result, names)


def _print_figures(result: dict[str, Any], attacks: Sequence[str]) -> None:
    for name in attacks:
        print(f"{name:<22} {result[name]:6.2f} %")
    for suffix, where in (("", "clean"), ("_mismatched", "mismatched")):
        if f"agreement{suffix}" in result:
            agreement, kl = result[f"agreement{suffix}"], result[f"kl_{where}"]
            print(f"{f'agreement, {where}':<22} {agreement:6.2f} %, KL {kl:.4g}")
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
