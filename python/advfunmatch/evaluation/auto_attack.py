"""AutoAttack and its stages as attacks of `evaluate`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..attacks.attacked import AutoAttackWarning
from ..attacks.auto_attack import AutoAttack
from ..attacks.stages import settings_of, stage
from ..errors import InputError
from .attacks import Attacked


def auto_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None],
    state: Path | None,
    shared: bool,
    version: str = "standard",
) -> Attacked:
    """AutoAttack on the prepared network, each break verified on the network itself.

    Args:
        model, x, y, eps, norm, seed, batch_size, progress, state, shared: see Note [Attack functions].
        version: ``"standard"``, ``"plus"`` or ``"rand"``.
    """
    attack = _made("autoattack", lambda: AutoAttack(norm, eps, version, seed, batch_size=batch_size))
    return _run(attack, model, x, y, progress, state, shared)


def one_stage(name: str) -> Callable[..., Attacked]:
    """One stage of AutoAttack alone; its settings are the arguments of its class."""

    def run(
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        norm: str,
        seed: int,
        batch_size: int,
        progress: Callable[[int], None],
        state: Path | None,
        shared: bool,
        **settings: Any,
    ) -> Attacked:
        only = {name: _made(name, lambda: stage(name, norm, eps, **settings))}
        attack = AutoAttack(norm, eps, seed=seed, stages=only, batch_size=batch_size)
        return _run(attack, model, x, y, progress, state, shared)

    handed = list(inspect.signature(run, eval_str=True).parameters.values())[:-1]
    run.__signature__ = inspect.Signature([*handed, *settings_of(name)])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = (
        name,
        f"{name} of AutoAttack alone, each break verified on the network itself.",
    )
    return run


def _made(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise InputError(f"attack {name!r}: {error}") from error


def _run(
    attack: AutoAttack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    progress: Callable[[int], None],
    state: Path | None,
    shared: bool,
) -> Attacked:
    furthest = 0

    def tell(done: int, total: int) -> None:
        nonlocal furthest
        furthest = max(furthest, len(x) * done // max(total, 1))
        progress(furthest)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)  # they are the row's
        found = attack(model, x, y, state=state, progress=tell, shared=shared)
    return Attacked(found.x_adv, warnings=found.warnings, stages=[stage.to_dict() for stage in found.stages])
