"""What an attack leaves standing as the unit of the logits grows, beside pyautoattack, torchattacks and foolbox.

    python -m benchmarks.attack.units

Two adversarially trained networks on digits, whose last layer is multiplied by 1, 10, ... 10⁶: the same decisions in
another unit, so that the same images can be broken. Twenty steps of every objective in float32, bfloat16 and float16,
and of the other libraries' cross-entropy attacks on the same network in the same dtype. Every x_adv is judged by the
float32 network in the unit of 1. Libraries that are not installed are left out, and said to be.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from advfunmatch import PGDAttack, load_dataset, prepare_for_attack
from advfunmatch.data import as_float
from torch import Tensor, nn

from benchmarks import results
from benchmarks.attack.quality import EPS, trained_network

UNITS = [10.0**power for power in range(7)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = 20
# objective -> what is counted as left
OBJECTIVES = {
    "cross_entropy": "labels",
    "margin": "labels",
    "mismatch": "agreement with the teacher",
    "fixed_teacher": "the teacher's clean classes",
}

Finder = Callable[[nn.Module, Tensor, Tensor], Tensor]


class InDtype(nn.Module):
    """A network in another dtype, for images in float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.to(self.dtype))
        return logits


def in_unit(model: nn.Module, unit: float, dtype: torch.dtype) -> nn.Module:
    """The network with logits ``unit`` times as large."""
    scaled = copy.deepcopy(model)
    last = [module for module in scaled.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(unit)
    return scaled.to(dtype).requires_grad_(False)


def peers() -> tuple[dict[str, Finder], list[str]]:
    """Other libraries' cross-entropy attacks, and the names of those that are not installed."""
    found: dict[str, Finder] = {}
    missing = []
    try:
        from pyautoattack.autopgd_base import APGDAttack
    except ImportError:
        missing.append("pyautoattack")
    else:

        def apgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            attack = APGDAttack(model, n_iter=STEPS, norm="Linf", eps=EPS, seed=0, loss="ce", device=x.device)
            return attack.perturb(x, y)

        found["pyautoattack, APGD-CE"] = apgd
    try:
        import torchattacks
    except ImportError:
        missing.append("torchattacks")
    else:

        def by_torchattacks(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            torch.manual_seed(0)
            return torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=STEPS, random_start=True)(x, y)

        found["torchattacks, PGD"] = by_torchattacks
    try:
        import foolbox
    except ImportError:
        missing.append("foolbox")
    else:

        def by_foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            torch.manual_seed(0)
            attack = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=STEPS, random_start=True)
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
            return attack(wrapped, x, foolbox.criteria.Misclassification(y), epsilons=[EPS])[1][0]

        found["foolbox, LinfPGD"] = by_foolbox
    return found, missing


def ours(
    objective: str, student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype
) -> tuple[Tensor, int]:
    """x_adv of our attack on prepared networks, and how many images it had no gradient for."""
    attack = PGDAttack(objective, eps=EPS, step_size=EPS / 4, steps=STEPS, init="uniform", seed=0)
    labelled = OBJECTIVES[objective] == "labels"
    other = None if labelled else prepare_for_attack(teacher, dtype)
    x_adv = attack(prepare_for_attack(student, dtype), other, x, y if labelled else None)
    assert attack.zero_gradients is not None
    return x_adv, int(attack.zero_gradients)


@torch.no_grad()
def left(
    objective: str, student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor
) -> float:
    """The percentage of images on which the attack has not reached its goal."""
    goal = {"mismatch": teacher(x_adv).argmax(1), "fixed_teacher": teacher(x).argmax(1)}.get(objective, y)
    return 100 * float((student(x_adv).argmax(1) == goal).float().mean())


def measure(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> tuple[list[dict], list[str]]:
    others, missing = peers()
    rows = []
    for name, dtype in DTYPES.items():
        for unit in UNITS:
            pair = [in_unit(model, unit, dtype) for model in (student, teacher)]
            with torch.no_grad():
                fits = all(bool(model(x.to(dtype)).isfinite().all()) for model in pair)
            if not fits:
                continue  # the logits themselves overflow
            for objective in OBJECTIVES:
                x_adv, zero = ours(objective, *pair, x, y, dtype)
                value = left(objective, student, teacher, x, x_adv, y)
                rows.append({"attack": objective, "dtype": name, "unit": unit, "left": value, "zero": zero})
            for peer, find in others.items():
                x_adv = find(InDtype(pair[0], dtype).eval(), x, y).float()
                value = left("cross_entropy", student, teacher, x, x_adv, y)
                rows.append({"attack": peer, "dtype": name, "unit": unit, "left": value})
            print(
                name,
                unit,
                {row["attack"]: round(row["left"], 1) for row in rows if row["unit"] == unit},
                flush=True,
            )
    return rows, missing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=results.FOLDER / "attack-units.json")
    arguments = parser.parse_args()
    student, teacher = (trained_network(arguments.epochs, seed).requires_grad_(False) for seed in (0, 1))
    test = load_dataset("digits", split="test")
    x, y = as_float(test.images), test.labels
    rows, missing = measure(student, teacher, x, y)
    if missing:
        print(f"not installed, and left out: {', '.join(missing)}")
    content = {
        "eps": EPS,
        "steps": STEPS,
        "images": len(x),
        "missing": missing,
        "commit": results.commit(),
        "versions": results.versions(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
