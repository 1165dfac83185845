"""`advfunmatch methods`, `models` and `presets`: the tables of what goes by a name."""

from __future__ import annotations

from typing import Annotated

import typer

from ..methods import methods_text, presets_text
from ..models import models_text
from .options import Plugins, with_groups


@with_groups
def methods(*, plugins: Plugins) -> None:
    """Print the table of methods.

    What each attack maximises, its loss, and its defaults with their sources.
    """
    print(methods_text())


@with_groups
def models(*, plugins: Plugins) -> None:
    """Print the table of networks.

    The names that --model takes, whose code each network is equal to, and which share one state dict.
    """
    print(models_text())


def presets(
    name: Annotated[str | None, typer.Argument(help="print this one, as a file for train --config")] = None,
) -> None:
    """Print the table of presets, or one of them.

    The published recipes that train --preset takes, and where each is from.
    """
    print(presets_text(name))
