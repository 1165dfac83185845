"""What is tried before a run writes anything: the student on its smallest batch, and the teacher on some images."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..data import ImageDataset, as_float
from ..errors import InputError
from ..evaluation import evaluate
from ..models import logits_in
from .distributed import SYNCHRONISED, World

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CHANCE_DEVIATIONS = 2.0  # above chance, from which an accuracy is taken to be more than that


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic that `precision` asks for."""
    dtype = DTYPES[config.precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def require_trainable(student: nn.Module, data: ImageDataset, config: TrainConfig, world: World) -> None:
    """Try the student, in train mode, on as few images as the smallest batch has, and as a process gets of it.

    Raises:
        InputError: it cannot be trained on that; most often because its batch norm needs more than one value a channel.
    """
    own, size = config.batch_size - config.extra_images, len(data)
    if config.epoch_images and config.epoch_images <= size // own * config.batch_size:
        size = own  # an epoch ends before it comes to the last images
    last = (size % own or own) + config.extra_images
    trial = copy.deepcopy(student).train()
    _try(trial, last, last, data, config)
    if world.size > 1:
        # These normalise over all processes, so that only the rest of the network meets a share by itself.
        for module in trial.modules():
            if type(module) in SYNCHRONISED:
                module.eval()
        _try(trial, last // world.size or last, last, data, config)


def _try(trial: nn.Module, count: int, last: int, data: ImageDataset, config: TrainConfig) -> None:
    images = as_float(data.images[:1]).expand(min(count, 2), -1, -1, -1)
    try:
        with torch.no_grad(), autocast(config, images.device):
            trial(images)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        batch = "one" if last == 1 else str(last)
        share = "" if count == last else f", {count} of them in a process"
        raise InputError(
            f"batch_size is {config.batch_size}, which leaves a batch of {batch} of the {len(data)} images{share}, and "
            f"{config.model!r} cannot be trained on that ({reason}); choose another batch_size or limit"
        ) from error


def measure_teacher(teacher: nn.Module, data: ImageDataset, config: TrainConfig) -> dict[str, Any]:
    """How good a teacher is on some images, before it teaches.

    Returns:
        Accuracies in percent under ``clean`` and ``pgd10``, the ``norm`` and ``eps`` of that attack, on how many
        ``images`` of the training split, and ``warnings``.

    Raises:
        InputError: its logits are not finite.
    """
    what = f"teacher {config.teacher!r}"
    with torch.no_grad(), autocast(config, data.images.device):  # as it will answer when it teaches
        logits = torch.cat(
            [logits_in(teacher(as_float(images))) for images in data.images.split(config.batch_size)]
        )
    if broken := int((~logits.isfinite().all(1)).sum()):
        raise InputError(
            f"{what} answers {broken} of {len(data)} training images with logits that are not finite in "
            f"{config.precision}"
        )
    measured = evaluate(teacher, data, ["clean", "pgd10"], eps=config.eps, norm=config.norm)
    warnings = [f"{what}: {sentence}" for sentence in measured.warnings]
    if is_chance(list(measured.per_class["clean"].values()), data.labels):
        warnings.insert(
            0,
            f"{what} is right on {measured.accuracies['clean']:.1f} % of {len(data)} training images, which is no more "
            "than chance: are its weights, its architecture, and the order of its classes those that were meant?",
        )
    ball = {"norm": config.norm, "eps": config.eps}
    return {**measured.accuracies, **ball, "images": len(data), "warnings": warnings}


def is_chance(per_class: list[float], labels: Tensor) -> bool:
    """Whether accuracies in percent, one for each class that `labels` show, are on average what guessing gives.

    The average over classes, so that always answering the commonest one is chance however common it is.
    """
    counts = labels.bincount()
    counts = counts[counts > 0].double()
    classes = len(counts)
    if classes < 2:
        return False
    chance = 1 / classes
    deviation = math.sqrt(chance * (1 - chance) * float((1 / counts).sum())) / classes
    return sum(per_class) / 100 / classes <= chance + CHANCE_DEVIATIONS * deviation
