"""`advfunmatch train`: its options are the fields of `TrainConfig`."""

from __future__ import annotations

import os
from typing import Any

import typer

from ..config import config_from, read_settings
from ..errors import InputError
from ..evaluation import Ball
from ..methods import preset as make_preset
from ..training import train as train_model
from ..training.distributed import leave_world
from .options import with_settings
from .processes import in_processes


@with_settings
def train(
    context: typer.Context, preset: str | None, config: str | None, processes: int | None, **flags: Any
) -> None:
    """Train a network.

    Writes checkpoint.pt, metrics.jsonl (a row an epoch), result.json and run.json into --out, and with --validation
    best.pt, the best epoch. A setting comes from its
    flag, else from --config, else from --preset, else from the method (see `advfunmatch methods`). Several machines:
    torchrun ... -m advfunmatch train ...
    """
    in_processes(processes, context.obj)
    settings = make_preset(preset) if preset else {}
    file = read_settings(config) if config else None
    settings |= file or {}
    own = flags.pop("settings")
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    settings |= given
    if own:
        settings["settings"] = {**settings.get("settings", {}), **parse_own(own)}
    try:
        resolved = config_from(settings)
        result = train_model(resolved)
    except InputError as error:
        raise file.located(error, given) if file else error from None
    finally:
        leave_world()
    if not result:  # the first process reports
        return
    print(f"{_line(result)}   {result['seconds']:.1f} s   {resolved.out}")
    if best := result.get("best"):
        print(
            f"{_line(best)}   best epoch, {best['epoch']}   {os.path.join(resolved.out, best['checkpoint'])}"
        )


def parse_own(given: list[str]) -> dict[str, str]:
    """Names and values from what --set was given."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"set is {text!r}, but must be NAME=VALUE, such as gamma=3")
        found[name.strip().replace("-", "_")] = value.strip()
    return found


def _line(result: dict[str, Any]) -> str:
    """The figures of one network after training."""
    ball = Ball(result["settings"]["norm"], result["settings"]["eps"])
    line = f"clean {result['clean']:.2f} %   PGD-20, {ball}, {result['pgd20']:.2f} %"
    return line + (f"   agreement {result['agreement']:.2f} %" if "agreement" in result else "")
