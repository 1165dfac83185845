"""Distillation methods as data: what each trains on, what it minimises, and its defaults with their sources."""

from __future__ import annotations

from .features import require_layers
from .listing import methods_text
from .method import ATTACK_READS, METHODS, SETTINGS, Default, Method, get_method, register_method
from .presets import PRESETS, preset, presets_text
from .settings import unused_settings
from .table import make_attack
from .terms import Logits, Loss, Network

__all__ = [
    "ATTACK_READS",
    "METHODS",
    "PRESETS",
    "SETTINGS",
    "Default",
    "Logits",
    "Loss",
    "Method",
    "Network",
    "get_method",
    "make_attack",
    "methods_text",
    "preset",
    "presets_text",
    "register_method",
    "require_layers",
    "unused_settings",
]
