"""Attacks: projected gradient ascent on any objective of the logits of one network or two, and the nearest adversarial
image."""

from __future__ import annotations

from .arguments import INITS, NORMS, radius_warnings
from .carlini_wagner import carlini_wagner, carlini_wagner_linf
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
from .target import BN_MODES

__all__ = [
    "BN_MODES",
    "INITS",
    "NORMS",
    "OBJECTIVES",
    "CrossEntropy",
    "FixedTeacher",
    "Margin",
    "Mismatch",
    "Nearest",
    "Objective",
    "PGDAttack",
    "carlini_wagner",
    "carlini_wagner_linf",
    "create_objective",
    "divergence_score",
    "input_gradient",
    "lbfgs",
    "radius_warnings",
]
