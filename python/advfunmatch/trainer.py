"""The training loop.

Note [Randomness]
~~~~~~~~~~~~~~~~~
Nothing random carries over from one step to the next. The order of an epoch is a function of (seed, epoch), and before
each step PyTorch's generators are seeded with a function of (seed, step), from which augmentation, dropout and the
attack's start draw. So a continued run needs no generator states, and a step can be repeated alone.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attack import PGDAttack
from .awp import perturbed_weights
from .checkpoint import model_of, read_checkpoint, require_fit, save_checkpoint
from .config import TrainConfig
from .data import ImageDataset, as_float, choose, load_dataset
from .errors import InputError, TrainingDiverged
from .evaluate import evaluate
from .files import make_folder, write_json, write_json_lines
from .methods import Logits, Method, get_method, make_attack
from .models import create_model
from .progress import TrainingProgress
from .schedule import learning_rate

CHECK_EVERY = 25  # steps between looks at the loss: each look waits for the device


def train(config: TrainConfig, *, label: str | None = None) -> dict[str, Any]:
    """Train one network, and write DIR/checkpoint.pt, DIR/metrics.jsonl and DIR/result.json.

    Everything that can be wrong with the configuration, the data and the teacher is found before DIR is touched.

    Args:
        config: what to train, on what and how; unset fields take the method's defaults.
        label: what the progress bar calls this run; the method and the model if not given.

    Returns:
        What result.json holds: accuracies in percent on the test split, fidelity to the teacher, and the time taken.

    Raises:
        InputError: a setting, the data, the teacher or DIR cannot be used.
        TrainingDiverged: the loss became NaN or infinite.
    """
    config = config.resolve()
    device = choose_device(config.device)
    method = get_method(config.method)
    train_set = load_dataset(config.data, split="train", limit=config.limit).to(device)
    test_set = load_dataset(config.data, split="test", limit=config.eval_limit).to(device)
    _require_same_kind(train_set, test_set)
    teacher = _load_teacher(config, train_set, device) if config.teacher else None
    torch.manual_seed(config.seed)
    student = create_model(config.model, num_classes=train_set.num_classes, in_channels=train_set.in_channels)
    student.to(device)
    _require_forward(student, train_set, config)
    out = Path(config.out)
    if (out / "checkpoint.pt").exists() and not config.overwrite:
        raise InputError(
            f"out {config.out!r} already holds a run; give another folder, or --overwrite to replace it"
        )
    make_folder(out, "out")

    attack = make_attack(config)
    optimizer = torch.optim.SGD(
        student.parameters(),
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    steps_per_epoch = math.ceil(len(train_set) / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    monitor_set = test_set.subset(choose(len(test_set), config.monitor_images))
    metrics: list[dict[str, Any]] = []
    seconds = 0.0

    label = label or f"{config.method} {config.model}"
    with TrainingProgress(label, config.epochs * len(train_set)) as progress:
        for epoch in range(config.epochs):
            started = time.perf_counter()
            student.train()
            losses: list[Tensor] = []
            for index, (x, labels) in enumerate(batches(train_set, config.batch_size, config.seed, epoch)):
                step = epoch * steps_per_epoch + index
                torch.manual_seed(derive_seed(config.seed, "step", step))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total_steps, config)
                logits = Logits(student, teacher, x, labels, epoch)
                if attack is not None:
                    logits.x_adv = run_attack(attack, method, logits)
                optimizer.zero_grad(set_to_none=True)
                with worst_weights(student, method, logits, config):
                    loss = method.loss(logits, config)
                    loss.backward()
                    optimizer.step()
                losses.append(loss.detach())
                progress.advance(len(x))
                if (index + 1) % CHECK_EVERY == 0 or index + 1 == steps_per_epoch:
                    _require_finite(losses[-CHECK_EVERY:], step, config, out / "checkpoint.pt", optimizer)
            seconds += time.perf_counter() - started

            row = {
                "epoch": epoch + 1,
                "step": (epoch + 1) * steps_per_epoch,
                "loss": float(torch.stack(losses).mean()),
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": round(seconds, 3),
                "images_per_second": round((epoch + 1) * len(train_set) / seconds, 1),
            }
            if config.eval_every and ((epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs):
                row |= evaluate(
                    student, monitor_set, ["clean", "pgd10"], eps=config.eps, norm=config.norm
                ).accuracies
                progress.say(f"clean {row['clean']:.1f} % · PGD-10 {row['pgd10']:.1f} %")
            metrics.append(row)
            write_json_lines(out / "metrics.jsonl", metrics)
            save_checkpoint(
                out / "checkpoint.pt",
                {
                    "model": config.model,
                    "num_classes": train_set.num_classes,
                    "in_channels": train_set.in_channels,
                    "image_size": list(train_set.image_size),
                    "class_names": list(train_set.class_names),
                    "state_dict": student.state_dict(),
                    "config": config.to_dict(),
                    "epoch": epoch + 1,
                    "step": (epoch + 1) * steps_per_epoch,
                    "training": {"optimizer": optimizer.state_dict()},
                },
            )

    final = evaluate(student, test_set, ["clean", "pgd20"], eps=config.eps, norm=config.norm, teacher=teacher)
    result = {
        **final.to_dict(),
        "method": config.method,
        "model": config.model,
        "data": config.data,
        "epochs": config.epochs,
        "train_images": len(train_set),
        "seconds": round(seconds, 2),
        "images_per_second": round(config.epochs * len(train_set) / seconds, 1),
        "config": config.to_dict(),
    }
    write_json(out / "result.json", result)
    return result


def run_attack(attack: PGDAttack, method: Method, logits: Logits) -> Tensor:
    """Adversarial examples of one batch; a teacher that the method does not match is only there to be compared with."""
    assert isinstance(logits.student, nn.Module)
    if not method.needs_teacher:
        return attack(logits.student, None, logits.x, logits.labels)
    assert isinstance(logits.teacher, nn.Module)
    # The loss needs the teacher's clean logits too where the attack does; they are computed once.
    known = logits.teacher_clean if method.objective == "fixed_teacher" else None
    return attack(logits.student, logits.teacher, logits.x, logits.labels, teacher_logits=known)


def worst_weights(
    student: nn.Module, method: Method, logits: Logits, config: TrainConfig
) -> AbstractContextManager[None]:
    """Where --awp is on and warmed up: the weights moved against this batch; otherwise nothing."""
    if not config.awp or logits.epoch < config.awp_warmup:
        return nullcontext()
    return perturbed_weights(
        student, lambda proxy: method.loss(logits.for_student(proxy), config), config.awp_gamma
    )


def batches(data: ImageDataset, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch: every image once, in an order that (seed, epoch) decides; the last may be short."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    order = torch.randperm(len(data), generator=generator).to(data.images.device)
    for indices in order.split(batch_size):
        yield as_float(data.images[indices]), data.labels[indices]


def derive_seed(seed: int, what: str, number: int) -> int:
    """A seed for the `number`-th of `what`, unrelated to its neighbours'. See Note [Randomness]."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {what} {number}".encode(), digest_size=7).digest(), "big")


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {name!r}, but it cannot be used here; use cpu, cuda or auto") from error
    return device


def _load_teacher(config: TrainConfig, data: ImageDataset, device: torch.device) -> nn.Module:
    assert config.teacher is not None
    checkpoint = read_checkpoint(config.teacher, "teacher")
    require_fit(checkpoint, config.teacher, data, "teacher")
    return model_of(checkpoint, config.teacher, "teacher").to(device)


def _require_same_kind(train_set: ImageDataset, test_set: ImageDataset) -> None:
    if train_set.images.shape[1:] != test_set.images.shape[1:]:
        ours, theirs = tuple(train_set.images.shape[1:]), tuple(test_set.images.shape[1:])
        raise InputError(
            f"data {train_set.name!r} has training images of shape {ours} and test images of shape {theirs}"
        )


def _require_forward(model: nn.Module, data: ImageDataset, config: TrainConfig) -> None:
    try:
        with torch.no_grad():
            model.eval()(as_float(data.images[:1]))
    except RuntimeError as error:
        height, width = data.image_size
        raise InputError(f"model {config.model!r} cannot take images of {height}×{width} pixels") from error


def _require_finite(
    recent: list[Tensor],
    last_step: int,
    config: TrainConfig,
    checkpoint: Path,
    optimizer: torch.optim.Optimizer,
) -> None:
    losses = torch.stack(recent)
    bad = (~losses.isfinite()).nonzero()
    if not len(bad):
        return
    index = int(bad[0])
    step = last_step - len(recent) + 1 + index
    kept = (
        f"the last good checkpoint is {str(checkpoint)!r}"
        if checkpoint.is_file()
        else "no checkpoint was saved yet"
    )
    before = (
        f"after {float(losses[index - 1]):g} one step before" if index else "without a finite loss before it"
    )
    raise TrainingDiverged(
        f"the loss became {float(losses[index])} at step {step + 1} ({before}) at learning rate "
        f"{optimizer.param_groups[0]['lr']:g}; {kept}; a smaller lr usually helps"
    )
