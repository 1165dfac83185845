"""Attacks: projected gradient ascent on any objective of the logits of one network or two, and the nearest adversarial
image; and AutoAttack."""

from __future__ import annotations

from .apgd import APGD
from .arguments import INITS, NORMS, radius_warnings
from .attacked import AutoAttacked, AutoAttackWarning, Stage
from .auto_attack import AutoAttack
from .carlini_wagner import carlini_wagner, carlini_wagner_linf
from .draws import Draws, image_keys
from .fab import FAB
from .lbfgs import lbfgs
from .nearest import Nearest
from .objectives import (
    OBJECTIVES,
    CrossEntropy,
    FixedTeacher,
    Margin,
    Mismatch,
    Objective,
    create_objective,
    divergence_score,
)
from .pgd import PGDAttack, input_gradient
from .searched import Searched
from .square import Square
from .target import BN_MODES

__all__ = [
    "APGD",
    "BN_MODES",
    "FAB",
    "INITS",
    "NORMS",
    "OBJECTIVES",
    "AutoAttack",
    "AutoAttackWarning",
    "AutoAttacked",
    "CrossEntropy",
    "Draws",
    "FixedTeacher",
    "Margin",
    "Mismatch",
    "Nearest",
    "Objective",
    "PGDAttack",
    "Searched",
    "Square",
    "Stage",
    "carlini_wagner",
    "carlini_wagner_linf",
    "create_objective",
    "divergence_score",
    "image_keys",
    "input_gradient",
    "lbfgs",
    "radius_warnings",
]
