"""Adversarial distillation, lean: attacks, training, evaluation and the command line, on top of `afm_kernels`."""

from __future__ import annotations

from afm_kernels.version import __version__

from .attack import PGDAttack
from .checkpoint import load_model
from .config import TrainConfig
from .data import ImageDataset, load_dataset
from .errors import InputError, TrainingDiverged
from .evaluate import evaluate
from .lean import prepare_for_attack
from .models import create_model
from .trainer import train

__all__ = [
    "ImageDataset",
    "InputError",
    "PGDAttack",
    "TrainConfig",
    "TrainingDiverged",
    "__version__",
    "create_model",
    "evaluate",
    "load_dataset",
    "load_model",
    "prepare_for_attack",
    "train",
]
