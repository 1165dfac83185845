"""`advfunmatch methods` and `models`: the tables of what goes by a name."""

from __future__ import annotations

from ..methods import methods_text
from ..models import models_text


def methods() -> None:
    """Print the table of methods.

    What each attack maximises, its loss, and its defaults with their sources.
    """
    print(methods_text())


def models() -> None:
    """Print the table of networks.

    The names that --model takes, whose code each network is equal to, and which share one state dict.
    """
    print(models_text())
