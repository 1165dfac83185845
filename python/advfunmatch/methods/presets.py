"""Published recipes by name: `--preset adaad-cifar10`. Flags and --config override them.

A preset fixes what its source fixes: the method, the schedule, the optimizer and the attack. Data, teacher and folder
are the user's. Sources are the official code's training scripts, in the repositories that `advfunmatch methods` lists
(for pgd_at: Rice et al. 2020, which AdaAD's script follows), but for the two of AdvFunMatch: of its paper only the
abstract is known, which fixes the loss, that both sides see the same images, and strong augmentations. `NOTES` says
what of `advfunmatch-cifar10` is this project's choice, and `speedrun` is its own.

Milestones count completed epochs. The scripts of TRADES and MART count epochs from one and divide the learning rate at
the start of epoch 75, which is after 74. Those of ARD and IAD mean to divide twice but divide the first rate again, so
that it stays at 0.01 from epoch 100 on; the presets divide twice, as the papers do.
"""

from __future__ import annotations

import json
from typing import Any

from ..config import FRACTIONS
from ..errors import one_of

_CIFAR = {"batch_size": 128, "momentum": 0.9, "nesterov": False, "augment": "crop,flip", "steps": 10}
_EPS8 = {"eps": 8 / 255, "step_size": 2 / 255}
_200 = {"epochs": 200, "lr": 0.1, "schedule": "piecewise", "milestones": "100,150"}

PRESETS: dict[str, dict[str, Any]] = {
    "pgd_at-cifar10": {
        **_CIFAR,
        **_EPS8,
        **_200,
        "method": "pgd_at",
        "model": "resnet18",
        "weight_decay": 5e-4,
    },
    "trades-cifar10": {
        **_CIFAR,
        "method": "trades",
        "model": "wrn-34-10",
        "epochs": 76,
        "lr": 0.1,
        "schedule": "piecewise",
        "milestones": "74",
        "weight_decay": 2e-4,
        "eps": 0.031,
        "step_size": 0.007,
    },
    "mart-cifar10": {
        **_CIFAR,
        "method": "mart",
        "model": "resnet18",
        "epochs": 120,
        "lr": 0.01,
        "schedule": "piecewise",
        "milestones": "74,89,99",
        "weight_decay": 3.5e-3,
        "beta": 5.0,
        "eps": 0.031,
        "step_size": 0.007,
    },
    "ard-cifar10": {**_CIFAR, **_EPS8, **_200, "method": "ard", "model": "resnet18", "weight_decay": 2e-4},
    "iad-cifar10": {**_CIFAR, **_EPS8, **_200, "method": "iad", "model": "resnet18", "weight_decay": 2e-4},
    "rslad-cifar10": {
        **_CIFAR,
        **_EPS8,
        "method": "rslad",
        "model": "resnet18",
        "epochs": 300,
        "lr": 0.1,
        "schedule": "piecewise",
        "milestones": "215,260,285",
        "weight_decay": 2e-4,
    },
    "adaad-cifar10": {
        **_CIFAR,
        **_EPS8,
        **_200,
        "method": "adaad",
        "model": "resnet18",
        "weight_decay": 5e-4,
    },
    "advfunmatch-cifar10": {
        **_CIFAR,
        **_EPS8,
        **_200,
        "method": "advfunmatch",
        "model": "resnet18",
        "weight_decay": 5e-4,
        "augment": "crop,flip,autoaugment",
    },
    # Not from a paper: large batches and a one-cycle schedule as in cifar10-airbench, AdvFunMatch's loss, EMA weights,
    # and half the attack steps in the first half of the run. Meant for one large GPU.
    "speedrun": {
        "method": "advfunmatch",
        "model": "resnet18",
        "epochs": 30,
        "batch_size": 512,
        "lr": 0.4,
        "schedule": "one_cycle",
        "peak": 0.25,
        "weight_decay": 5e-4,
        "augment": "crop,flip",
        "eps": 8 / 255,
        "step_size": 2 / 255,
        "steps": 10,
        "early_steps": 5,
        "ema": 0.995,
        "precision": "bf16",
        "channels_last": True,
        "eval_every": 5,
    },
}

# Where each is from, in the words of `advfunmatch presets`.
NOTES = {
    "pgd_at-cifar10": "Rice et al. 2020, which AdaAD's script follows",
    "trades-cifar10": "the official code's script; epochs counted from one there",
    "mart-cifar10": "the official code's script; epochs counted from one there",
    "ard-cifar10": "the official code's script, but divided twice, as in the paper",
    "iad-cifar10": "the official code's script, but divided twice, as in the paper",
    "rslad-cifar10": "the official code's script",
    "adaad-cifar10": "the official code's script",
    "advfunmatch-cifar10": "the loss, the same images on both sides and AutoAugment are from the paper's abstract; "
    "this project's choice are schedule, optimizer and attack: AdaAD's, whose inner loss is the same",
    "speedrun": "this project's own, for one large GPU: one-cycle and large batches as in cifar10-airbench",
}


def presets_text(name: str | None = None) -> str:
    """The presets with their sources, or one as a file for --config."""
    if name is None:
        width = max(map(len, PRESETS))
        return "\n".join(f"{each:<{width}}  {NOTES[each]}" for each in PRESETS)
    lines = [f"# {name}: {NOTES[name]}"] if name in NOTES else []
    return "\n".join(
        lines + [f"{setting}: {_as_written(setting, value)}" for setting, value in preset(name).items()]
    )


def _as_written(setting: str, value: Any) -> str:
    """The value as YAML, a radius of whole pixel values as a fraction."""
    levels = round(255 * value) if setting in FRACTIONS else 0
    return f"{levels}/255" if levels and value == levels / 255 else json.dumps(value)


def preset(name: str) -> dict[str, Any]:
    """The settings of that recipe; InputError lists the names if there is none."""
    if name not in PRESETS:
        raise one_of("preset", name, PRESETS)
    return dict(PRESETS[name])
