"""What changes while a network is trained, and how it gets into a checkpoint and back."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig, default_settings
from ..errors import InputError
from ..models import read_checkpoint
from .averaging import WeightAverage

# Settings that may differ between a run and its continuation: they do not decide what is computed.
FREE_ON_RESUME = ("resume", "overwrite", "device", "save_every", "tensorboard", "out", "teacher", "imports")


@dataclass
class TrainingState:
    """Everything that a continued run needs, besides its configuration and data. See Note [Randomness] for what not.

    Attributes:
        student: the network that is trained.
        optimizer: its SGD.
        scaler: of fp16 gradients; disabled otherwise.
        average: EMA or SWA weights, or None.
        step: how many batches have been done.
        loss_sum: of the batches of the present epoch.
        metrics: the rows of metrics.jsonl.
        seconds: time spent in steps.
        best: of the epoch with the highest accuracy under attack on validation images: ``epoch``, ``step``, what was
            measured, and ``state_dict``, the weights that are evaluated. None without such images.
    """

    student: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    loss_sum: Tensor
    step: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    best: dict[str, Any] | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracies are reported: the averaged one, once there is an average."""
        return self.average.model if self.average and self.average.count else self.student

    def to_checkpoint(self) -> dict[str, Any]:
        """The changing part of Note [Checkpoint]."""
        training: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum,
            "metrics": copy.deepcopy(self.metrics),
            "seconds": self.seconds,
        }
        if self.best:
            training["best"] = self.best
        if self.average:
            training |= {"average": self.average.state_dict(), "student": self.student.state_dict()}
        return {"state_dict": self.evaluated.state_dict(), "step": self.step, "training": training}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from what `to_checkpoint` gave; InputError if something is not there or does not fit."""
        try:
            training = checkpoint["training"]
            self.student.load_state_dict(training.get("student", checkpoint["state_dict"]))
            if self.average:
                self.average.load_state_dict(training["average"], checkpoint["state_dict"])
            self.optimizer.load_state_dict(training["optimizer"])
            self.scaler.load_state_dict(training["scaler"])
            self.loss_sum.copy_(training["loss_sum"])
            self.step = checkpoint["step"]
            self.metrics, self.seconds = training["metrics"], training["seconds"]
            self.best = training.get("best")
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                f"checkpoint to resume lacks what a continued run needs, or it does not fit: {error}"
            ) from error


def checkpoint_to_resume(path: Any, config: TrainConfig, given: Collection[str]) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None where there is none yet; InputError if it is of another run.

    Of networks and data that are given as objects, or were, digests and weights decide, and not what they are called.
    """
    if not path.exists():
        return None
    checkpoint = read_checkpoint(path, "checkpoint to resume")
    stored, wanted = (
        default_settings() | {"settings": {}} | checkpoint["config"],
        config.to_dict(),
    )  # an older run has fewer settings
    origins = checkpoint.get("origins", {})
    objects = {*given, *(name for name, origin in origins.items() if origin["kind"] == "given")} - {"method"}
    for name, value in wanted.items():
        if name not in (*FREE_ON_RESUME, *objects) and stored[name] != value:
            raise InputError(
                f"{name} is {value!r}, but the run in {str(path.parent)!r} was started with {stored[name]!r}; "
                "a run can only be continued as it was started"
            )
    return checkpoint
