"""The stages of AutoAttack by version, and what each may cost."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from .apgd import APGD
from .draws import Draws
from .fab import FAB
from .searched import Searched
from .square import Square

__all__ = ["STAGES", "VERSIONS", "SearchAttack", "passes", "settings_of", "stage", "stages_of"]

VERSIONS = ("standard", "plus", "rand")
EOT = 20  # forwards to a gradient of a network that answers at random


class SearchAttack(Protocol):
    """An attack that AutoAttack can run as a stage.

    It takes a `Searched` network, images (N, C, H, W) in [0, 1] that are classified correctly, labels (N,) and the
    images' `Draws`, and returns the images that it would count as broken, and whatever else it likes for the others.
    It may call ``progress`` with the number of images done.
    """

    def __call__(
        self,
        searched: Searched,
        x: Tensor,
        y: Tensor,
        draws: Draws,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor: ...


# What makes each, and how the standard version does: its settings there, and those that may be given beside them.
_MADE: dict[str, tuple[Callable[..., SearchAttack], dict[str, Any], tuple[str, ...]]] = {
    "apgd_ce": (APGD, {"loss": "ce"}, ("steps", "restarts", "eot")),
    "apgd_dlr": (APGD, {"loss": "dlr"}, ("steps", "restarts", "eot")),
    "apgd_t": (APGD, {"loss": "dlr_targeted"}, ("steps", "restarts", "targets", "eot")),
    "fab": (FAB, {"targeted": False}, ("steps", "restarts")),
    "fab_t": (FAB, {"targeted": True}, ("steps", "restarts", "targets")),
    "square": (Square, {}, ("queries", "restarts")),
}
STAGES = tuple(_MADE)


def stage(name: str, norm: str, eps: float, **given: Any) -> SearchAttack:
    """The attack of one stage, as in the standard version but for what is given."""
    make, settings, _ = _MADE[name]
    return make(norm, eps, **settings, **given)


def settings_of(name: str) -> list[inspect.Parameter]:
    """What may be given to a stage, with the standard version's values."""
    make, _, names = _MADE[name]
    known = inspect.signature(make, eval_str=True).parameters
    return [known[each].replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in names]


_OF_VERSION: dict[str, dict[str, dict[str, Any]]] = {
    "standard": {"apgd_ce": {}, "apgd_t": {}, "fab_t": {}, "square": {}},
    "plus": {
        "apgd_ce": {"restarts": 5},
        "apgd_dlr": {"restarts": 5},
        "fab": {"restarts": 5},
        "square": {},
        "apgd_t": {},
        "fab_t": {},
    },
    "rand": {"apgd_ce": {"eot": EOT}, "apgd_dlr": {"eot": EOT}},
}


def stages_of(version: str, norm: str, eps: float) -> dict[str, SearchAttack]:
    """The stages of a version, in their order."""
    return {name: stage(name, norm, eps, **given) for name, given in _OF_VERSION[version].items()}


def passes(attack: SearchAttack, num_classes: int) -> int:
    """How many forwards and backwards of an image an attack takes at most, about."""
    known = vars(attack) if hasattr(attack, "__dict__") else {}
    restarts, steps, others = known.get("restarts", 1), known.get("steps", 100), num_classes - 1
    if "queries" in known:
        return int(restarts * known["queries"])
    if "targeted" in known:  # FAB: all classes at once, or one after the other
        each = 3 * min(known["targets"], others) if known["targeted"] else 2 + num_classes
        return int(restarts * steps * each)
    targets = min(known["targets"], others) if known.get("loss") == "dlr_targeted" else 1
    return int(2 * restarts * (steps + 1) * targets * known.get("eot", 1))
