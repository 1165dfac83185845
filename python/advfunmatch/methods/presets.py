"""Published recipes by name: `--preset adaad-cifar10`. Flags and --config override them.

A preset fixes what its source fixes: the method, the schedule, the optimizer and the attack. Data, teacher and folder
are the user's. Sources are the official code's training scripts, in the repositories that `advfunmatch methods` lists
(for pgd_at: Rice et al. 2020, which AdaAD's script follows); `speedrun` is this project's own.

Milestones count completed epochs. The scripts of TRADES and MART count epochs from one and divide the learning rate at
the start of epoch 75, which is after 74. Those of ARD and IAD mean to divide twice but divide the first rate again, so
that it stays at 0.01 from epoch 100 on; the presets divide twice, as the papers do.
"""

from __future__ import annotations

from typing import Any

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


def preset(name: str) -> dict[str, Any]:
    """The settings of that recipe; InputError lists the names if there is none."""
    if name not in PRESETS:
        raise one_of("preset", name, PRESETS)
    return dict(PRESETS[name])
