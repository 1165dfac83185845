"""How many adversarial examples the engine finds, beside torchattacks and foolbox, and in bf16 beside fp32.

    python -m benchmarks.attack.quality

One adversarially trained network on digits; PGD-20 and PGD-100 on cross-entropy, the same eps, step and uniform start,
over several seeds. Every x_adv is judged by the same float32 network. torchattacks and foolbox take part where they
are installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from advfunmatch import ImageDataset, PGDAttack, create_model, load_dataset, prepare_for_attack
from advfunmatch.data import as_float
from torch import Tensor, nn

from benchmarks import results

EPS = 0.15
TRAINING_STEPS = 10

Finder = Callable[[Tensor, Tensor, int, int], Tensor]  # images, labels, steps, seed


def trained_network(
    epochs: int,
    seed: int = 0,
    *,
    name: str = "small_cnn",
    data: ImageDataset | None = None,
    eps: float = EPS,
    steps: int = TRAINING_STEPS,
) -> nn.Module:
    """A network by PGD adversarial training, by default small_cnn on the digits' training split."""
    torch.manual_seed(seed)
    data = load_dataset("digits", split="train") if data is None else data
    images, labels = as_float(data.images), data.labels
    model = create_model(name, num_classes=data.num_classes, in_channels=images.shape[1])
    attack = PGDAttack("cross_entropy", eps=eps, step_size=eps / 4, steps=steps, init="uniform", seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    batches = len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, epochs * batches)
    prepared = prepare_for_attack(model)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: batches * 128].split(128):
            x, y = images[rows], labels[rows]
            x_adv = attack(prepared.refresh_(), None, x, y)
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x_adv), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def finders(model: nn.Module) -> dict[str, Finder]:
    """The attacks to compare, each from images to adversarial images."""

    def engine(network: nn.Module, objective: str = "cross_entropy") -> Finder:
        def find(x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
            attack = PGDAttack(objective, eps=EPS, step_size=EPS / 4, steps=steps, init="uniform", seed=seed)
            return attack(network, None, x, y)

        return find

    found = {
        "engine, live fp32": engine(model),
        "engine, prepared fp32": engine(prepare_for_attack(model)),
        "engine, prepared bf16": engine(prepare_for_attack(model, torch.bfloat16)),
        "engine, margin": engine(prepare_for_attack(model), "margin"),
    }
    try:
        import torchattacks
    except ImportError:
        pass
    else:

        def by_torchattacks(x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
            torch.manual_seed(seed)
            attack = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps, random_start=True)
            return attack(x, y)

        found["torchattacks"] = by_torchattacks
    try:
        import foolbox
    except ImportError:
        pass
    else:

        def by_foolbox(x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
            torch.manual_seed(seed)
            attack = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=steps, random_start=True)
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
            return attack(wrapped, x, foolbox.criteria.Misclassification(y), epsilons=[EPS])[1][0]

        found["foolbox"] = by_foolbox
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--out", type=Path, default=results.FOLDER / "attack-quality.json")
    arguments = parser.parse_args()
    model = trained_network(arguments.epochs)
    test = load_dataset("digits", split="test")
    x, y = as_float(test.images), test.labels
    with torch.no_grad():
        clean = float((model(x).argmax(1) == y).float().mean()) * 100
    print(
        f"{len(x)} digits, eps {EPS}, clean accuracy {clean:.1f} %; robust accuracy over {arguments.seeds} seeds"
    )
    rows = []
    for steps in arguments.steps:
        print(f"PGD-{steps}")
        for name, find in finders(model).items():
            accuracies = []
            for seed in range(arguments.seeds):
                x_adv = find(x, y, steps, seed)
                assert float((x_adv - x).abs().max()) <= EPS + 1e-6
                with torch.no_grad():
                    accuracies.append(float((model(x_adv).argmax(1) == y).float().mean()) * 100)
            mean = statistics.mean(accuracies)
            rows.append({"steps": steps, "attack": name, "robust_accuracy": accuracies, "mean": mean})
            print(f"  {name:<24}{mean:6.2f} %   ({min(accuracies):.2f} to {max(accuracies):.2f})")
    content = {
        "eps": EPS,
        "clean_accuracy": clean,
        "images": len(x),
        "commit": results.commit(),
        "versions": results.versions(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
