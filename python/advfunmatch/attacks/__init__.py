"""Attacks: projected gradient ascent through one network or two, on any objective of their logits."""

from __future__ import annotations

from .arguments import INITS, NORMS, radius_warnings
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
    "Objective",
    "PGDAttack",
    "create_objective",
    "divergence_score",
    "input_gradient",
    "radius_warnings",
]
