"""`advfunmatch attack`: adversarial examples as an archive."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from ..config import check_teacher_settings
from ..data import as_float, load_dataset
from ..errors import InputError, one_of
from ..evaluation import ATTACKS, Attack, Ball, attack_images, attacks_of, balls_of, mismatched_examples
from ..files import prepare_file, write_atomically
from ..models import logits_in, require_known_data
from ..training.run import choose_device
from .networks import load
from .options import BallOptions, Checkpoint, Data, Foreign, Images, Plugins, with_groups


@with_groups
def attack(
    checkpoint: Checkpoint,
    data: Data,
    out: Annotated[Path, typer.Option(help=".npz file to write: x_test, y_test, x_clean, class_names, axes")],
    attack: Annotated[str, typer.Option(help="one of: mismatch, " + ", ".join(ATTACKS))] = "pgd20",
    *,
    ball: BallOptions,
    teacher: Annotated[str | None, typer.Option(help="checkpoint, for mismatch")] = None,
    foreign: Foreign,
    images: Images,
    plugins: Plugins,
) -> None:
    """Write adversarial examples as .npz.

    The archive can be read with --data npz:FILE.
    """
    if attack != "mismatch" and attack.partition("(")[0].strip() not in ATTACKS:
        raise one_of("attack", attack, ["mismatch", *ATTACKS])
    if attack == "mismatch" and teacher is None:
        raise InputError("attack 'mismatch' needs --teacher, a checkpoint to differ from")
    if attack != "mismatch" and teacher is not None:
        raise InputError(f"teacher is {teacher!r}, but attack {attack!r} uses none; mismatch does")
    (chosen,) = [None] if attack == "mismatch" else attacks_of([attack])
    check_teacher_settings(teacher, *foreign.teacher)
    require_known_data(checkpoint, data)
    test_set = load_dataset(data, split="test", **images.loading).to(choose_device(images.device))
    network, stored = load(checkpoint, foreign.checkpoint, test_set)
    found = ball_of(chosen, **ball.of(checkpoint, stored["config"]))
    settings: dict[str, Any] = {"seed": images.seed, "batch_size": images.batch_size}
    settings |= {"eps": found.eps, "norm": found.norm} if found else {}
    x = as_float(test_set.images)
    if chosen is None:
        assert teacher is not None
        other, _ = load(teacher, foreign.teacher, test_set, "teacher")
        prepare_file(out, "out")
        x_adv = mismatched_examples(network, other, x, **settings)
    else:
        prepare_file(out, "out")
        x_adv = attack_images(chosen, network, test_set, **settings, progress=True)
    with torch.no_grad():
        predicted = torch.cat([logits_in(network(part)).argmax(1) for part in x_adv.split(images.batch_size)])
    correct = predicted == test_set.labels
    buffer = io.BytesIO()
    tensors = {"x_test": x_adv, "y_test": test_set.labels, "x_clean": x}
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    arrays["class_names"] = np.array(test_set.class_names)  # for a class that no image kept
    arrays["axes"] = np.array("NCHW")  # which few pixels, or many channels, would not show
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(out, buffer.getvalue())
    accuracy = f"accuracy {100 * correct.double().mean():.2f} % on {len(test_set)} images"
    own = " (the checkpoint's)" if found and ball.eps is None and not (chosen and chosen.eps) else ""
    print(f"{attack}{f', eps {found}{own}' if found else ''}: {accuracy}; {out}")


def ball_of(attack: Attack | None, eps: float | str | None, norm: str) -> Ball | None:
    """The one ball to attack in: the attack's own, or that of the options; None where there is no attack."""
    if attack is not None and attack.name == "clean":
        return None
    if attack is not None and attack.eps is not None:
        return Ball(attack.norm or norm, attack.eps)
    if eps is None:
        raise InputError("eps is missing, but the attack needs the radius of its ball, such as 8/255")
    balls = balls_of(eps, (attack.norm if attack else None) or norm)
    if len(balls) != 1:
        raise InputError(f"eps is {eps!r}, but an archive holds the images of one ball")
    return balls[0]
