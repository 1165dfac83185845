"""Evaluation: accuracy under attack, and how far a student is from its teacher."""

from __future__ import annotations

from .attacks import ATTACKS, Attack, Attacked, attack_of, attacks_of, register_attack, split_attacks
from .balls import Ball, balls_of
from .corruptions import CorruptionEvaluation, evaluate_corruptions
from .doubts import margin_warnings, masking_warnings
from .evaluate import attack_images, evaluate
from .fidelity import mismatched_examples
from .results import Curve, Evaluation, Fidelity, Figure

pgd = ATTACKS["pgd"]

__all__ = [
    "ATTACKS",
    "Attack",
    "Attacked",
    "Ball",
    "CorruptionEvaluation",
    "Curve",
    "Evaluation",
    "Fidelity",
    "Figure",
    "attack_images",
    "attack_of",
    "attacks_of",
    "balls_of",
    "evaluate",
    "evaluate_corruptions",
    "margin_warnings",
    "masking_warnings",
    "mismatched_examples",
    "pgd",
    "register_attack",
    "split_attacks",
]
