"""`advfunmatch attack`: adversarial examples as an archive."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from ..config import check_teacher_settings
from ..data import as_float, load_dataset
from ..errors import InputError, one_of
from ..evaluation import ATTACKS, attack_images, attack_settings, mismatched_examples
from ..files import prepare_file, write_atomically
from ..training.run import choose_device
from .networks import load
from .options import Ball, Checkpoint, Data, Foreign, Images, Plugins, with_groups


@with_groups
def attack(
    checkpoint: Checkpoint,
    data: Data,
    out: Annotated[Path, typer.Option(help=".npz file to write: x_test, y_test, x_clean, class_names, axes")],
    attack: Annotated[str, typer.Option(help="one of: mismatch, " + ", ".join(ATTACKS))] = "pgd20",
    *,
    ball: Ball,
    teacher: Annotated[str | None, typer.Option(help="checkpoint, for mismatch")] = None,
    foreign: Foreign,
    images: Images,
    plugins: Plugins,
) -> None:
    """Write adversarial examples as .npz.

    The archive can be read with --data npz:FILE.
    """
    if attack != "mismatch" and attack not in ATTACKS:
        raise one_of("attack", attack, ["mismatch", *ATTACKS])
    if attack == "mismatch" and teacher is None:
        raise InputError("attack 'mismatch' needs --teacher, a checkpoint to differ from")
    if attack != "mismatch" and teacher is not None:
        raise InputError(f"teacher is {teacher!r}, but attack {attack!r} uses none; mismatch does")
    check_teacher_settings(teacher, *foreign.teacher)
    settings = dataclasses.asdict(attack_settings(ball.eps, ball.norm, images.seed, images.batch_size))
    test_set = load_dataset(data, split="test", **images.loading).to(choose_device(images.device))
    network, _ = load(checkpoint, foreign.checkpoint, test_set)
    x = as_float(test_set.images)
    if attack == "mismatch":
        assert teacher is not None
        other, _ = load(teacher, foreign.teacher, test_set, "teacher")
        prepare_file(out, "out")
        x_adv = mismatched_examples(network, other, x, **settings)
    else:
        prepare_file(out, "out")
        x_adv = attack_images(attack, network, test_set, **settings)
    with torch.no_grad():
        predicted = torch.cat([network(part).argmax(1) for part in x_adv.split(images.batch_size)])
    correct = predicted == test_set.labels
    buffer = io.BytesIO()
    tensors = {"x_test": x_adv, "y_test": test_set.labels, "x_clean": x}
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    arrays["class_names"] = np.array(test_set.class_names)  # for a class that no image kept
    arrays["axes"] = np.array("NCHW")  # which few pixels, or many channels, would not show
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(out, buffer.getvalue())
    print(f"{attack}: accuracy {100 * correct.double().mean():.2f} % on {len(test_set)} images; {out}")
