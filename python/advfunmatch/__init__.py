"""Adversarial distillation, lean: attacks, training, evaluation and the command line, on top of `afm_kernels`.

Public are the names in ``__all__`` here and in the packages below, and nothing else:

* ``attacks``: `PGDAttack`, its objectives, and attacks that look for the nearest adversarial image.
* ``lean``: `prepare_for_attack`, eval-mode copies of networks for attacks.
* ``models``, ``data``: networks, checkpoints and data sets by name.
* ``methods``: the table of distillation methods and their settings.
* ``training``, ``evaluation``, ``report``: `train`, `evaluate`, and what they found as tables and pages.

One's own networks, data, methods and attacks come in as arguments of `train` and `evaluate`, or by `register_model`,
`register_dataset`, `register_method` and `register_attack`, in files that ``--import`` names or in installed packages
(see ``plugins``).

Imports run one way, from the bottom of that list to the top.
"""

from __future__ import annotations

import sys

from afm_kernels.version import __version__

from .attacks import AutoAttack, PGDAttack
from .config import TrainConfig
from .data import ImageDataset, as_dataset, load_dataset, register_dataset
from .errors import InputError, TrainingDiverged
from .evaluation import evaluate, register_attack
from .lean import prepare_for_attack
from .methods import Method, register_method
from .models import create_model, load_model, register_model
from .plugins import load_plugins
from .training import train

__all__ = [
    "AutoAttack",
    "ImageDataset",
    "InputError",
    "Method",
    "PGDAttack",
    "TrainConfig",
    "TrainingDiverged",
    "__version__",
    "as_dataset",
    "create_model",
    "evaluate",
    "load_dataset",
    "load_model",
    "load_plugins",
    "prepare_for_attack",
    "register_attack",
    "register_dataset",
    "register_method",
    "register_model",
    "train",
]

# Modules that lay beside this file in 0.1, where programs may still import them.
for _old, _new in {
    "attack": "attacks.pgd",
    "checkpoint": "models.checkpoint",
    "evaluate": "evaluation.evaluate",
    "objectives": "attacks.objectives",
    "presets": "methods.presets",
    "trainer": "training.trainer",
}.items():
    sys.modules[f"{__name__}.{_old}"] = sys.modules[f"{__name__}.{_new}"]
