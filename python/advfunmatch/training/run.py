"""One training run: its data, networks and attack, checked and put together before anything is written."""

from __future__ import annotations

import importlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import PGDAttack
from ..config import TrainConfig
from ..data import ImageDataset
from ..data.augment import augmented, parse_augmentation
from ..environment import environment
from ..errors import InputError, one_of
from ..evaluation import Ball
from ..files import make_folder, remove_partial_files, write_json
from ..lean import PreparedModel, prepare_for_attack
from ..methods import Method, get_method, make_attack, require_layers, unused_settings
from ..models import ClassesReordered, create_model, load_network, require_forward
from .averaging import WeightAverage
from .digests import Digests, digest_of_network, digests_of, require_same
from .distributed import World, join_world, synchronise_batch_norm
from .given import Given, Origins, origins_of, student_of, teacher_of
from .splits import Splits, load_splits
from .state import TrainingState, checkpoint_to_resume
from .trials import DTYPES, autocast, measure_teacher, require_trainable


@dataclass(frozen=True)
class Run:
    """Everything that a training run consists of; only `state` and what it holds changes.

    Attributes:
        config: the resolved configuration.
        method: what is trained for.
        world: the processes that share each batch.
        device: this process's.
        splits: the data, on the device.
        state: the student and whatever else changes.
        teacher: the network to match, or None.
        attack: finds the adversarial examples; None where the method trains on clean images.
        lean_student, lean_teacher: copies of the networks that only the attack uses, where it can.
        made_with: versions, device and commit.
        digests: of the teacher and the data, which a continued run must have too.
        origins: where things that are not the package's own came from, by setting.
        teacher_accuracy: how good the teacher is on a few images; None without one, and in processes that only follow.
        remarks: what the user should know before training starts.
    """

    config: TrainConfig
    method: Method
    world: World
    device: torch.device
    splits: Splits
    state: TrainingState
    teacher: nn.Module | None
    attack: PGDAttack | None
    lean_student: PreparedModel | None
    lean_teacher: PreparedModel | None
    made_with: dict[str, Any]
    digests: Digests = field(default_factory=dict)
    origins: Origins = field(default_factory=dict)
    teacher_accuracy: dict[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def train_set(self) -> ImageDataset:
        """The images that are trained on."""
        return self.splits.train

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.state.student

    @property
    def out(self) -> Path:
        """The folder that the run writes."""
        return Path(self.config.out)

    @property
    def checkpoint_path(self) -> Path:
        """Where the run can be continued from."""
        return self.out / "checkpoint.pt"

    @property
    def best_path(self) -> Path:
        """Where the weights of the best epoch go, if there are validation images to tell it by."""
        return self.out / "best.pt"

    @property
    def batch_size(self) -> int:
        """Images of the training set in a batch; extra ones fill it up."""
        return self.config.batch_size - self.config.extra_images

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch: those that show every training image once, or `epoch_images` with extra ones."""
        if self.config.epoch_images is not None:
            return math.ceil(self.config.epoch_images / self.config.batch_size)
        return self._steps_per_pass

    @property
    def _steps_per_pass(self) -> int:
        return math.ceil(len(self.train_set) / self.batch_size)

    @property
    def epochs_done(self) -> int:
        """How many epochs are complete."""
        return self.state.step // self.steps_per_epoch

    def group(self, index: int) -> range:
        """The batches of an epoch that share one optimizer step with batch `index`."""
        first = index - index % self.config.accumulate
        return range(first, min(first + self.config.accumulate, self.steps_per_epoch))

    def images_in(self, batches: range) -> int:
        """How many images those batches of an epoch have, extra ones included."""
        return self._own_images_in(batches) + len(batches) * self.config.extra_images

    def counted_in(self, batches: range) -> int:
        """How many images count towards the epoch: all of them where `epoch_images` does, and else none but its own."""
        if self.config.epoch_images is not None:
            return self.images_in(batches)
        return self._own_images_in(batches)

    def _own_images_in(self, batches: range) -> int:
        in_pass = (index % self._steps_per_pass for index in batches)
        return sum(min(self.batch_size, len(self.train_set) - index * self.batch_size) for index in in_pass)

    @property
    def images_per_epoch(self) -> int:
        """How many images count in a whole epoch."""
        return self.counted_in(range(self.steps_per_epoch))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Augmented images and labels of one batch, extra images included."""
        indices = indices.to(self.device)
        images, labels = self.train_set.images[indices], self.train_set.labels[indices]
        if extra := self.splits.extra:
            drawn = torch.randint(len(extra), (self.config.extra_images,), device=images.device)
            images = torch.cat([images, extra.images[drawn]])
            labels = torch.cat([labels, extra.labels[drawn]])
        x = augmented(images, parse_augmentation(self.config.augment))
        return (x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x), labels

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic that `precision` asks for."""
        return autocast(self.config, self.device)


def set_up(config: TrainConfig, given: Given) -> Run:
    """Put a run together from a resolved configuration, continue it if asked to, and open its folder.

    Args:
        config: what to train, resolved.
        given: things that it does not name, but that were given as objects.

    Raises:
        InputError: a setting, the data, the teacher or the folder cannot be used; nothing was written then.
    """
    world, device = join_world(choose_device(config.device))
    with world.together():
        run = _put_together(config, world, device, given)
    if world.size > 1:
        world.require_alike({**run.digests, "model": digest_of_network(run.student, config.model)})
    with world.together():
        if world.leads:
            make_folder(run.out, "out")
            remove_partial_files(run.out)
            if run.state.best is None:  # and none of a run that this one replaces
                run.best_path.unlink(missing_ok=True)
                run.best_path.with_suffix(".safetensors").unlink(missing_ok=True)
            record: dict[str, Any] = {
                "config": config.to_dict(),
                "environment": run.made_with,
                "digests": run.digests,
            }
            record |= {"origins": run.origins, "teacher_accuracy": run.teacher_accuracy}
            write_json(run.out / "run.json", record)
    return run


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {name!r}, but it cannot be used here; use cpu, cuda or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise one_of("device", name, ("cpu", "cuda", "auto"))
    return device


def _put_together(config: TrainConfig, world: World, device: torch.device, given: Given) -> Run:
    if world.size > 1 and config.reduction == "sum":
        raise InputError("reduction is 'sum', but several processes need a mean: batchmean or mean")
    if config.tensorboard:
        importlib.import_module("torch.utils.tensorboard")
    if config.save_safetensors:
        importlib.import_module("safetensors")
    splits, read = load_splits(config, device, given.data)
    teacher, teacher_model = None, ""
    if given.teacher is not None:
        teacher, teacher_model = teacher_of(given.teacher, splits.train, device), config.teacher or ""
    elif config.teacher:
        teacher, stored = load_network(
            config.teacher,
            config.teacher_model,
            splits.train,
            "teacher",
            normalize=config.teacher_normalize,
            weights_key=config.teacher_weights_key,
        )
        teacher_model = stored["model"]
    if teacher is not None and config.channels_last:
        teacher.to(memory_format=torch.channels_last)
    student = _new_student(config, splits.train, device, world, given)
    require_layers(get_method(config.method).layers(config), {"student": student, "teacher": teacher})
    if teacher is not None:
        _require_as_many_logits(student, teacher, splits.train, config)
    state = new_state(config, student, device)
    digests = digests_of(read, teacher, teacher_model)
    resumed = _continue_or_begin(config, state, digests, splits.train, given)
    known = resumed.get("teacher_accuracy")
    if teacher is not None and known is None and world.leads:
        known = measure_teacher(teacher, splits.for_teacher(), config)
    return replace(
        assemble(config, world, device, splits, state, teacher),
        digests=digests,
        origins=origins_of(config, given),
        teacher_accuracy=known,
        remarks=_remarks(config, resumed, teacher, known),
    )


def _remarks(
    config: TrainConfig, resumed: dict[str, Any], teacher: nn.Module | None, accuracy: dict[str, Any] | None
) -> list[str]:
    """Sentences for the user, before training starts."""
    said = []
    if unused := unused_settings(config):
        given = ", ".join(f"{name} = {getattr(config, name)}" for name in unused)
        said.append(f"warning: method {config.method!r} does not use {given}")
    if resumed and "digests" not in resumed:
        said.append(
            f"warning: the run in {config.out!r} does not record which teacher and data it was started with; these are "
            "taken to be the same"
        )
    if isinstance(teacher, ClassesReordered):
        said.append(
            f"note: teacher {config.teacher!r} counts its classes in another order than data {config.data!r}; "
            "matched by name"
        )
    if accuracy:
        said.append(
            f"teacher: clean {accuracy['clean']:.1f} %, PGD-10, {Ball(config.norm, config.eps)}, "
            f"{accuracy['pgd10']:.1f} % on {accuracy['images']} training images"
        )
        said += [f"warning: {sentence}" for sentence in accuracy["warnings"]]
    return said


def assemble(
    config: TrainConfig,
    world: World,
    device: torch.device,
    splits: Splits,
    state: TrainingState,
    teacher: nn.Module | None,
) -> Run:
    """A run of networks and data that are there: the attack and the copies that it uses are made here."""
    method = get_method(config.method)
    lean_student, lean_teacher = _prepare(config, method, state.student, teacher)
    if world.size > 1:  # after the attack's copies were made, which fold batch norm away
        synchronise_batch_norm(state.student, config.model)
    return Run(
        config=config,
        method=method,
        world=world,
        device=device,
        splits=splits,
        state=state,
        teacher=teacher,
        attack=make_attack(config),
        lean_student=lean_student,
        lean_teacher=lean_teacher,
        made_with={**environment(device), "processes": world.size},
    )


def _new_student(
    config: TrainConfig, data: ImageDataset, device: torch.device, world: World, given: Given
) -> nn.Module:
    torch.manual_seed(config.seed)
    if given.model is not None:
        student = student_of(given.model, data)
    else:
        student = create_model(config.model, num_classes=data.num_classes, in_channels=data.in_channels)
    student.to(device)
    require_forward(student.eval(), data, f"model {config.model!r}")
    require_trainable(student, data, config, world)
    return student.to(memory_format=torch.channels_last) if config.channels_last else student


def _require_as_many_logits(
    student: nn.Module, teacher: nn.Module, data: ImageDataset, config: TrainConfig
) -> None:
    """InputError unless the networks can be compared."""
    ours = require_forward(student, data, f"model {config.model!r}")
    theirs = require_forward(teacher, data, f"teacher {config.teacher!r}")
    if ours != theirs:
        raise InputError(
            f"teacher {config.teacher!r} returns {theirs} logits, but model {config.model!r} {ours}, and only equal "
            "numbers can be matched"
        )


def new_state(config: TrainConfig, student: nn.Module, device: torch.device) -> TrainingState:
    """Where the training of a student begins: its optimizer, and the averages and the scaler that are asked for."""
    optimizer = torch.optim.SGD(
        student.parameters(),
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov and config.momentum > 0,
    )
    averages = config.ema or config.swa_start is not None
    average = WeightAverage(student, config.ema or None) if averages else None
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    return TrainingState(student, optimizer, scaler, average, loss_sum)


def _continue_or_begin(
    config: TrainConfig, state: TrainingState, digests: Digests, data: ImageDataset, given: Given
) -> dict[str, Any]:
    """Restore the state of an interrupted run if that is wanted, and return its checkpoint; {} where a run begins.

    Raises:
        InputError: a finished run would be lost, or the run to continue was started otherwise.
    """
    path = Path(config.out) / "checkpoint.pt"
    if config.resume and (stored := checkpoint_to_resume(path, config, given.names)):
        if "digests" in stored:
            require_same(stored, config, digests, data.class_names)
        state.restore(stored)
        return stored
    if path.exists() and not config.overwrite:
        raise InputError(
            f"out {config.out!r} already holds a run; --resume continues it, and --overwrite replaces it"
        )
    return {}


def _prepare(
    config: TrainConfig, method: Method, student: nn.Module, teacher: nn.Module | None
) -> tuple[PreparedModel | None, PreparedModel | None]:
    """Copies of both networks that only the attack uses; none where it needs live batch statistics."""
    if method.objective is None or not config.lean or config.attack_bn != "eval":
        return None, None
    dtype = DTYPES[config.precision]
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    lean_teacher = prepare_for_attack(teacher, dtype, layout) if teacher is not None else None
    return prepare_for_attack(student, dtype, layout), lean_teacher
