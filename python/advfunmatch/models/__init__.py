"""Networks by name, and their checkpoints."""

from __future__ import annotations

from .checkpoint import (
    load_model,
    load_network,
    model_of,
    read_checkpoint,
    require_forward,
    require_known_data,
    save_checkpoint,
)
from .fit import ClassesReordered
from .normalization import NORMALIZATIONS, Normalized, parse_normalization
from .outputs import logits_in
from .state_dicts import load_weights
from .zoo import FAMILIES, MODELS, create_model, find_family, models_text, register_model, same_weights

__all__ = [
    "FAMILIES",
    "MODELS",
    "NORMALIZATIONS",
    "ClassesReordered",
    "Normalized",
    "create_model",
    "find_family",
    "load_model",
    "load_network",
    "load_weights",
    "logits_in",
    "model_of",
    "models_text",
    "parse_normalization",
    "read_checkpoint",
    "register_model",
    "require_forward",
    "require_known_data",
    "same_weights",
    "save_checkpoint",
]
