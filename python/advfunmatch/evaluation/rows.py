"""The attacks that are there from the start. Each is registered by the same means as one of another's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..attacks import PGDAttack
from ..attacks.stages import STAGES
from ..config import parse_number
from ..errors import InputError, one_of
from ..lean import prepare_for_attack
from .attacks import Attacked, register_attack
from .auto_attack import auto_attack, one_stage
from .autoattack_official import autoattack_official
from .minimum_norm import carlini_wagner_row, lbfgs_row

Progress = Callable[[int], None]


@register_attack("clean")
def clean(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """No attack."""
    return x


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str,
    seed: int,
    batch_size: int,
    progress: Progress,
    objective: str = "cross_entropy",
    steps: int = 20,
    step_size: float | str = "eps/4",
    init: str = "uniform",
    restarts: int = 1,
) -> Attacked:
    """PGD on cross-entropy or on the margin of Carlini and Wagner.

    Args:
        model, x, y, eps, norm, seed, batch_size, progress: see Note [Attack functions].
        objective: ``"cross_entropy"`` or ``"margin"``.
        steps, init, restarts: as for `PGDAttack`.
        step_size: in the norm's unit, or a share of the radius such as ``"eps/4"``.
    """
    if objective not in ("cross_entropy", "margin"):
        raise one_of("objective of attack 'pgd'", objective, ("cross_entropy", "margin"))
    try:
        attack = PGDAttack(
            objective,
            norm=norm,
            eps=eps,
            step_size=length_of(step_size, eps),
            steps=steps,
            init=init,
            restarts=restarts,
            seed=seed,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"attack 'pgd': {error}") from error
    return run_in_batches(attack, (prepare_for_attack(model), None), (x, y), batch_size, progress)


def run_in_batches(
    attack: PGDAttack,
    networks: tuple[nn.Module, nn.Module | None],
    tensors: tuple[Tensor, ...],
    batch_size: int,
    progress: Progress,
) -> Attacked:
    """Images, and labels where the attack needs them, a batch at a time."""
    x_adv, zero_gradients, done = [], [], 0
    for part in zip(*(tensor.split(batch_size) for tensor in tensors), strict=True):
        x_adv.append(attack(*networks, *part))
        zero_gradients.append(attack.zero_gradients)
        done += len(part[0])
        progress(done)
    return Attacked(torch.cat(x_adv), int(torch.stack(zero_gradients).sum()))  # type: ignore[arg-type]


def length_of(step_size: float | str, eps: float) -> float:
    """A step's length: a number, or ``"eps"`` or ``"eps/N"`` of the radius.

    >>> length_of("eps/4", 0.2), length_of(0.01, 0.2)
    (0.05, 0.01)
    """
    if isinstance(step_size, str):
        numerator, slash, divisor = step_size.replace(" ", "").partition("/")
        parts = parse_number(divisor, "step_size") if slash else 1.0
        if numerator != "eps" or not parts > 0:
            raise InputError(f"step_size is {step_size!r}, but must be a number such as 2/255, or eps/4")
        return eps / parts
    return step_size


register_attack("fgsm")(partial(pgd, steps=1, step_size="eps", init="zero"))
register_attack("pgd10")(partial(pgd, steps=10))
register_attack("pgd20")(partial(pgd, steps=20))
register_attack("pgd100")(partial(pgd, steps=100, step_size="eps/10", restarts=5))
margin_pgd = partial(pgd, objective="margin", steps=100, step_size="eps/10")
register_attack("cw_pgd")(margin_pgd)
register_attack("cw")(margin_pgd)  # as it was called before there was carlini_wagner
register_attack("carlini_wagner")(carlini_wagner_row)
register_attack("lbfgs")(lbfgs_row)
register_attack("pgd")(pgd)
register_attack("autoattack")(auto_attack)
register_attack("autoattack_official")(autoattack_official)
for _name in STAGES:
    register_attack(_name)(one_stage(_name))
