"""Accuracy under attack, and fidelity: how far a student is from its teacher, on clean and on mismatched examples.

Every figure is a percentage of, or a mean over, all the images it was given; attacks are the same for every model.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..attacks import radius_warnings
from ..attacks.processes import ALONE, Processes, joined
from ..config import NORMS, check_seed, parse_integer
from ..data import ImageDataset, as_dataset, as_float
from ..data.digest import digest_of_data
from ..errors import InputError, one_of
from ..models import require_forward
from ..models.digest import digest_of_network
from ..models.frozen import frozen
from .attacks import ATTACKS, Attack, attacks_of
from .autoattack_official import autoattack_official, warnings_of_autoattack
from .balls import Ball, balls_of
from .curves import curve_attacks, curve_radii, measure_curve
from .doubts import margin_warnings, masking_warnings
from .fidelity import ABOUT, Compared, clean_fidelity, compare, mismatched_fidelity
from .measuring import Measuring, label_in, measure, run
from .networks import device_of, returning_logits
from .results import Evaluation, Fidelity
from .rows import clean
from .shown import Shown
from .stored import EvaluationFile
from .transfer import digests_of_sources, ready_sources, transfer_warnings, transferred

__all__ = ["ATTACKS", "attack_images", "evaluate", "margin_warnings", "masking_warnings"]

BATCH_SIZE = 500


def evaluate(
    model: nn.Module,
    data: Any,
    attacks: Iterable[Any],
    *,
    eps: float | str | Iterable[float | str] | None = None,
    norm: str = "linf",
    seed: int = 0,
    teacher: nn.Module | None = None,
    transfer_from: Mapping[str, nn.Module] | None = None,
    curve: Any = None,
    batch_size: int = BATCH_SIZE,
    progress: bool | Callable[[str, int, int], None] = False,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    shared: bool = False,
) -> Evaluation:
    """Measure a model on every image of `data`.

    Args:
        model: maps images in [0, 1] to logits (N, C), or an object with ``.logits``, C at least the classes of `data`;
            it is put into eval mode meanwhile.
        data: the images and labels: whatever `as_dataset` takes.
        attacks: any of names in `ATTACKS`, also with settings (``"pgd(steps=40, restarts=5)"``, or in Python
            ``pgd(steps=40, restarts=5)``); `PGDAttack`s, which keep their own ball; and functions
            ``(model, x, y) -> x_adv``, see Note [Attack functions] in ``attacks``. A mapping gives them names.
        eps: radius of the ball, or several; each attack is measured in each. None where no attack needs one.
        norm: ``"linf"`` or ``"l2"``.
        seed: seeds every attack, so that the same call gives the same figures.
        teacher: measures fidelity to this network too, which has as many logits.
        transfer_from: other networks by name; each attack is also made on each of these, as rows ``"pgd20 from NAME"``
            that say what its images do to the model. That they do more than the model's own is said.
        curve: an attack, or several, to measure accuracy against the radius with, from 0 to twice the largest ``eps``.
        batch_size: images attacked at a time.
        progress: True shows a bar for each attack; a function is called with what is measured, how many of its images
            are done, and of how many.
        out: JSON file that is written after each attack, with all there is so far.
        resume: go on with what `out` holds, if it is there: of the same model, data, seed and balls.
        overwrite: replace what `out` holds.
        about: what `out` says beside the figures.
        shared: whether all processes that torchrun started make this call, so that attacks that can, as AutoAttack,
            share the images out; the first alone writes `out`.

    Returns:
        A row for each attack in each ball, fidelity where there is a teacher, settings and times.

    Raises:
        InputError: for an unknown attack, a setting that cannot be, data without images or with labels that are no
            classes, or a network that does not take these images or does not return such logits; an attack whose images
            leave its ball; and a file that is there, or whose evaluation was another.
    """
    with joined(shared) as processes:
        if processes.rank:
            out, resume, overwrite, progress = None, False, False, False
        return measure_into(
            EvaluationFile(out, resume=resume, overwrite=overwrite, about=about),
            model,
            data,
            attacks,
            eps=eps,
            norm=norm,
            seed=seed,
            teacher=teacher,
            size=batch_size,
            tell=progress,
            transfer_from=transfer_from,
            processes=processes,
            curve=curve,
        )


def measure_into(
    file: EvaluationFile,
    model: nn.Module,
    data: Any,
    attacks: Iterable[Any],
    *,
    eps: float | str | Iterable[float | str] | None,
    norm: str,
    seed: int,
    teacher: nn.Module | None,
    size: int,
    tell: bool | Callable[[str, int, int], None],
    transfer_from: Mapping[str, nn.Module] | None = None,
    processes: Processes = ALONE,
    curve: Any = None,
) -> Evaluation:
    """What `evaluate` does, going on from what a file holds and writing into it, if that is the first process's."""
    attacks = attacks_of(attacks)
    attacks += transferred(attacks, transfer_from)
    drawn = curve_attacks(curve)
    seed, size = _checked(seed, size)
    if norm not in NORMS:
        raise one_of("norm", norm, NORMS)
    balls = [] if eps is None else balls_of(eps, norm)
    _plan(attacks, balls, norm)
    data = data if isinstance(data, ImageDataset) else as_dataset(data)
    _check_arguments(model, data, teacher)
    _require_teacher([*attacks, *drawn], teacher)
    if drawn and not balls:
        raise InputError("eps is missing, but a curve goes from 0 to twice the radius, such as 8/255")
    if teacher is not None and not balls:
        raise InputError("eps is missing, but mismatched examples are sought within a radius, such as 8/255")
    if any(attack.function is autoattack_official for attack in attacks):
        importlib.import_module("pyautoattack")  # before the other attacks have taken their time
    data = data.to(device_of(model, data))
    result = Evaluation(
        [], len(data), _settings([*attacks, *drawn], balls, norm, seed, teacher), complete=False
    )
    if file.path is not None:
        result.digests = _digests(model, data, teacher, file.about) | digests_of_sources(transfer_from)
    stored = file.read()
    done = None if stored is None else file.continued(stored, result)
    done = processes.gathered(done)[0]
    with (
        frozen(model),
        frozen(teacher),
        ready_sources(attacks, data) as ready,
        warnings_of_autoattack([]),
        _radius_is_said(),
        Shown(tell) as shown,
    ):
        _require_comparable(model, teacher, data)
        model = returning_logits(model, data)
        teacher = None if teacher is None else returning_logits(teacher, data)
        measuring = Measuring(
            model, teacher, data, as_float(data.images), seed, size, processes.size > 1, file
        )
        file.prepare()
        for _ in _fill(result, done, _plan(ready, balls, norm), balls, measuring, shown):
            file.write(result.to_dict())
        for _ in _curves(result, done, drawn, balls, measuring, shown):
            file.write(result.to_dict())
    if done:
        result.settings["attacks"] = done.settings["attacks"] | result.settings["attacks"]
        result.digests = done.digests | result.digests
    result.warnings = _warnings(result, balls)
    result.complete = True
    file.write(result.to_dict())
    return result


def _fill(
    result: Evaluation,
    done: Evaluation | None,
    wanted: list[tuple[Attack, Ball | None]],
    balls: list[Ball],
    measuring: Measuring,
    shown: Shown,
) -> Iterator[None]:
    """Measure row after row, each followed by a pause; what is `done` is taken over."""
    known = {(row.attack, row.ball): row for row in done.results} if done else {}
    for attack, ball in wanted:
        if (attack.label, ball) not in known:
            what = label_in(attack, ball)
            known[attack.label, ball] = measure(attack, ball, measuring, shown.bar(what, result.images))
        result.results.append(known.pop((attack.label, ball)))
        yield
        if measuring.file and (state := measuring.file.state_of(label_in(attack, ball))):
            state.unlink(missing_ok=True)  # now that the row is written
    result.results += known.values()  # what an earlier call measured, and this one did not ask for
    near = {row.ball: row for row in done.fidelity} if done else {}
    if (teacher := measuring.teacher) is not None:
        # Every row asks for it.
        on_clean = cache(partial(compare, measuring.model, teacher, measuring.images, measuring.batch_size))
        for place in (None, *balls):
            if place not in near:
                near[place] = _fidelity(measuring, teacher, place, shown, on_clean)
            result.fidelity.append(near.pop(place))
            yield
    result.fidelity += near.values()


def _curves(
    result: Evaluation,
    done: Evaluation | None,
    attacks: list[Attack],
    balls: list[Ball],
    measuring: Measuring,
    shown: Shown,
) -> Iterator[None]:
    """Measure curve after curve, as `_fill` does rows."""
    known = {(row.attack, row.norm, *row.eps): row for row in done.curves} if done else {}
    for attack in attacks:
        norm, radii = attack.norm or balls[0].norm, curve_radii(balls)
        key = (attack.label, norm, *radii)
        if key not in known:
            bar = shown.bar(f"{attack.label}, {len(radii)} radii ({norm})", result.images)
            rows = [row for row in result.results if (row.attack, row.norm) == (attack.label, norm)]
            # Of an attack that finds distances, no row is needed.
            stood = {row.eps: row.stood(result.images) for row in rows if row.eps and row.found is None}
            known[key] = measure_curve(attack, norm, radii, measuring, stood, bar)
        result.curves.append(known.pop(key))
        yield
    result.curves += known.values()


def attack_images(
    attack: Any,
    model: nn.Module,
    data: Any,
    *,
    eps: float | str | None = None,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    teacher: nn.Module | None = None,
    progress: bool | Callable[[str, int, int], None] = False,
) -> Tensor:
    """The images of `data` after one attack, float32 in [0, 1]; arguments and errors are those of `evaluate`."""
    attack = attacks_of([attack])[0]
    seed, batch_size = _checked(seed, batch_size)
    plan = _plan([attack], [] if eps is None else balls_of(eps, norm), norm)
    if len(plan) != 1:
        raise InputError(f"eps is {eps!r}, but images are attacked in one ball at a time")
    _, ball = plan[0]
    data = data if isinstance(data, ImageDataset) else as_dataset(data)
    _check_arguments(model, data, teacher)
    _require_teacher([attack], teacher)
    data = data.to(device_of(model, data))
    with frozen(model), frozen(teacher), warnings_of_autoattack([]), Shown(progress) as shown:
        require_forward(model, data, "model")
        model = returning_logits(model, data)
        measuring = Measuring(model, teacher, data, as_float(data.images), seed, batch_size)
        return run(attack, ball, measuring, shown.bar(attack.label, len(data))).images


def _plan(attacks: list[Attack], balls: list[Ball], norm: str) -> list[tuple[Attack, Ball | None]]:
    """Each attack with each ball that it is to be measured in; InputError where there is none."""
    plan: list[tuple[Attack, Ball | None]] = []
    for attack in attacks:
        if attack.function is clean:
            plan.append((attack, None))
        elif attack.eps is not None:
            plan.append((attack, Ball(attack.norm or norm, attack.eps)))
        elif not balls:
            raise InputError(
                f"eps is missing, but attack {attack.label!r} needs the radius of its ball, such as 8/255"
            )
        elif len(balls) > 1 and "eps" not in attack.parameters:
            raise InputError(
                f"attack {attack.label!r} takes no eps, so it cannot be measured in {len(balls)} balls; let it "
                "take eps, or give one radius"
            )
        else:
            plan += [(attack, Ball(attack.norm or ball.norm, ball.eps)) for ball in balls]
    keys = [(attack.label, ball) for attack, ball in plan]
    for label, ball in keys:
        if keys.count((label, ball)) > 1:
            raise InputError(f"attack {label!r} would be measured twice within {ball}")
    return plan


def _fidelity(
    measuring: Measuring,
    teacher: nn.Module,
    ball: Ball | None,
    shown: Shown,
    on_clean: Callable[[], Compared],
) -> Fidelity:
    """On clean images, or on mismatched ones of a ball."""
    if ball is None:
        return clean_fidelity(on_clean)
    model, images, size = measuring.model, measuring.images, measuring.batch_size
    bar = shown.bar(f"mismatched, {ball}", len(images))
    return mismatched_fidelity(model, teacher, images, ball, measuring.seed, size, bar, on_clean)


def _warnings(result: Evaluation, balls: list[Ball]) -> list[str]:
    """What there is to say of the figures, each sentence once; those that compare figures name their ball."""
    said = [text for ball in balls for text in radius_warnings(ball.norm, ball.eps)]
    said += [text for row in result.results for text in row.warnings]
    said += [text for row in result.fidelity for text in row.warnings]
    said += transfer_warnings(result.results)
    for ball in dict.fromkeys(row.ball for row in result.results if row.ball):
        rows = [row for row in result.results if row.ball in (None, ball)]
        compared = masking_warnings({row.attack: row.accuracy for row in rows})
        compared += margin_warnings({row.attack: row.stood(result.images) for row in rows})
        said += [f"{text}; {ball}" for text in compared]
    return list(dict.fromkeys(said))


def _settings(
    attacks: list[Attack], balls: list[Ball], norm: str, seed: int, teacher: nn.Module | None
) -> dict[str, Any]:
    radii = [ball.eps for ball in balls]
    settings: dict[str, Any] = {
        "eps": radii[0] if len(radii) == 1 else radii or None,
        "norm": norm,
        "seed": seed,
        "attacks": {attack.label: attack.about for attack in attacks},
    }
    return settings | ({"mismatched": ABOUT} if teacher is not None else {})


def _digests(
    model: nn.Module, data: ImageDataset, teacher: nn.Module | None, about: Mapping[str, Any]
) -> dict[str, str]:
    """Digests of what is measured; `about` may name the architectures."""
    digests = {"model": digest_of_network(model, about.get("model") or type(model).__name__)}
    digests["data"] = digest_of_data(data)
    if teacher is not None:
        digests["teacher"] = digest_of_network(teacher, about.get("teacher_model") or type(teacher).__name__)
    return digests


@contextmanager
def _radius_is_said() -> Iterator[None]:
    """The attacks' own warnings about their radius are among the result's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="eps=.* is a radius of linf attacks")
        yield


def _checked(seed: int, batch_size: int) -> tuple[int, int]:
    """Whole numbers that can be; InputError names one that cannot."""
    seed, batch_size = parse_integer(seed, "seed"), parse_integer(batch_size, "batch_size")
    check_seed(seed)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, but must be at least 1")
    return seed, batch_size


def _check_arguments(model: nn.Module, data: ImageDataset, teacher: nn.Module | None = None) -> None:
    """InputError for what is no network, and for data that nothing can be measured on."""
    for what, network in (("model", model), ("teacher", teacher)):
        if not isinstance(network, nn.Module) and (what == "model" or network is not None):
            raise InputError(f"{what} is of type {type(network).__name__}, but must be a torch.nn.Module")
    if not len(data):
        raise InputError(f"data {data.name!r} has no images")
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= data.num_classes:
        raise InputError(
            f"data {data.name!r} has labels from {low} to {high}, but only {data.num_classes} class names"
        )


def _require_teacher(attacks: list[Attack], teacher: nn.Module | None) -> None:
    """InputError for an attack that cannot do without a teacher where there is none."""
    for attack in attacks if teacher is None else ():
        if attack.needs_teacher:
            raise InputError(
                f"attack {attack.label!r} needs a teacher, which is missing: name one (--teacher FILE, in Python "
                "teacher=NETWORK), or attack the network alone, as PGDAttack(objective='cross_entropy', ...) does"
            )


def _require_comparable(model: nn.Module, teacher: nn.Module | None, data: ImageDataset) -> None:
    """InputError unless both networks take the images and return as many logits."""
    ours = require_forward(model, data, "model")
    if teacher is not None and (theirs := require_forward(teacher, data, "teacher")) != ours:
        raise InputError(
            f"teacher returns {theirs} logits, but model {ours}, and only equal numbers can be compared"
        )
