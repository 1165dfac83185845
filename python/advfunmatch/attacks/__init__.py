"""Attacks: projected gradient ascent through one network or two, on any objective of their logits."""

from __future__ import annotations

from .objectives import OBJECTIVES, CrossEntropy, FixedTeacher, Margin, Mismatch, Objective, create_objective
from .pgd import BN_MODES, INITS, NORMS, PGDAttack, input_gradient

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
    "input_gradient",
]
