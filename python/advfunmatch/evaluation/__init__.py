"""Evaluation: accuracy under attack, and how far a student is from its teacher."""

from __future__ import annotations

from .corruptions import CorruptionEvaluation, evaluate_corruptions
from .evaluate import (
    ATTACKS,
    AttackSettings,
    Evaluation,
    attack_images,
    attack_settings,
    check_attacks,
    evaluate,
    masking_warnings,
    mismatched_examples,
)

__all__ = [
    "ATTACKS",
    "AttackSettings",
    "CorruptionEvaluation",
    "Evaluation",
    "attack_images",
    "attack_settings",
    "check_attacks",
    "evaluate",
    "evaluate_corruptions",
    "masking_warnings",
    "mismatched_examples",
]
