"""Networks by name, and their checkpoints."""

from __future__ import annotations

from .checkpoint import load_model, load_network, model_of, read_checkpoint, require_forward, save_checkpoint
from .fit import ClassesReordered
from .normalization import NORMALIZATIONS, parse_normalization
from .state_dicts import load_weights
from .zoo import FAMILIES, create_model, models_text, same_weights

__all__ = [
    "FAMILIES",
    "NORMALIZATIONS",
    "ClassesReordered",
    "create_model",
    "load_model",
    "load_network",
    "load_weights",
    "model_of",
    "models_text",
    "parse_normalization",
    "read_checkpoint",
    "require_forward",
    "same_weights",
    "save_checkpoint",
]
