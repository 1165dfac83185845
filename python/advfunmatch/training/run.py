"""One training run: its data, networks and attack, checked and put together before anything is written."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import PGDAttack
from ..config import TrainConfig
from ..data import ImageDataset, as_extra_images, as_float, load_dataset, require_labels
from ..data.augment import augmented, parse_augmentation
from ..environment import environment
from ..errors import InputError, one_of
from ..files import make_folder, remove_partial_files, write_json
from ..lean import PreparedModel, prepare_for_attack
from ..methods import Method, get_method, make_attack
from ..models import create_model, load_network, require_forward
from .averaging import WeightAverage
from .distributed import World, join_world, synchronise_batch_norm
from .state import TrainingState, checkpoint_to_resume

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Run:
    """Everything that a training run consists of; only `state` and what it holds changes.

    Attributes:
        config: the resolved configuration.
        method: what is trained for.
        world: the processes that share each batch.
        device: this process's.
        train_set, test_set: the data, on the device.
        extra_set: images that are mixed into each batch, or None.
        state: the student and whatever else changes.
        teacher: the network to match, or None.
        attack: finds the adversarial examples; None where the method trains on clean images.
        lean_student, lean_teacher: copies of the networks that only the attack uses, where it can.
        made_with: versions, device and commit.
    """

    config: TrainConfig
    method: Method
    world: World
    device: torch.device
    train_set: ImageDataset
    test_set: ImageDataset
    extra_set: ImageDataset | None
    state: TrainingState
    teacher: nn.Module | None
    attack: PGDAttack | None
    lean_student: PreparedModel | None
    lean_teacher: PreparedModel | None
    made_with: dict[str, Any]

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
        if self.extra_set:
            drawn = torch.randint(len(self.extra_set), (self.config.extra_images,), device=images.device)
            images = torch.cat([images, self.extra_set.images[drawn]])
            labels = torch.cat([labels, self.extra_set.labels[drawn]])
        x = augmented(images, parse_augmentation(self.config.augment))
        return (x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x), labels

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic that `precision` asks for."""
        dtype = DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


def set_up(config: TrainConfig) -> Run:
    """Put a run together from a resolved configuration, continue it if asked to, and open its folder.

    Raises:
        InputError: a setting, the data, the teacher or the folder cannot be used; nothing was written then.
    """
    world, device = join_world(choose_device(config.device))
    with world.together():
        run = _put_together(config, world, device)
    with world.together():
        if world.leads:
            make_folder(run.out, "out")
            remove_partial_files(run.out)
            write_json(run.out / "run.json", {"config": config.to_dict(), "environment": run.made_with})
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


def _put_together(config: TrainConfig, world: World, device: torch.device) -> Run:
    if world.size > 1 and config.reduction == "sum":
        raise InputError("reduction is 'sum', but several processes need a mean: batchmean or mean")
    train_set, test_set, extra_set = _load_data(config, device)
    teacher = None
    if config.teacher:
        teacher, _ = load_network(config.teacher, config.teacher_model, train_set, "teacher")
        if config.channels_last:
            teacher.to(memory_format=torch.channels_last)
    student = _new_student(config, train_set, device)
    state = new_state(config, student, device)
    _continue_or_begin(config, state)
    return assemble(config, world, device, (train_set, test_set, extra_set), state, teacher)


def assemble(
    config: TrainConfig,
    world: World,
    device: torch.device,
    data: tuple[ImageDataset, ImageDataset, ImageDataset | None],
    state: TrainingState,
    teacher: nn.Module | None,
) -> Run:
    """A run of networks and data that are there: the attack and the copies that it uses are made here."""
    method = get_method(config.method)
    lean_student, lean_teacher = _prepare(config, method, state.student, teacher)
    if world.size > 1:  # after the attack's copies were made, which fold batch norm away
        synchronise_batch_norm(state.student, config.model)
    train_set, test_set, extra_set = data
    return Run(
        config=config,
        method=method,
        world=world,
        device=device,
        train_set=train_set,
        test_set=test_set,
        extra_set=extra_set,
        state=state,
        teacher=teacher,
        attack=make_attack(config),
        lean_student=lean_student,
        lean_teacher=lean_teacher,
        made_with={**environment(device), "processes": world.size},
    )


def _load_data(
    config: TrainConfig, device: torch.device
) -> tuple[ImageDataset, ImageDataset, ImageDataset | None]:
    """The training, test and extra images, which must be of one kind."""
    read = partial(load_dataset, resize=config.resize, crop=config.crop)
    train_set = read(config.data, split="train", limit=config.limit, cache=config.data_cache).to(device)
    test_set = read(config.data, split="test", limit=config.eval_limit).to(device)
    _require_same_images(train_set, test_set)
    test_set = test_set.with_classes_of(train_set)
    if not config.extra_data:
        return train_set, test_set, None
    extra_set = read(
        config.extra_data, split="train", cache=config.data_cache, unlabelled=True, what="extra_data"
    ).to(device)
    _require_same_images(train_set, extra_set)
    method = get_method(config.method)
    if method.needs_labels:
        extra_set = as_extra_images(extra_set, train_set)
    if method.attacks_labels:
        require_labels(extra_set, f"method {config.method!r}")
    return train_set, test_set, extra_set


def _require_same_images(train_set: ImageDataset, other: ImageDataset) -> None:
    for what, ours, theirs in (
        ("images of shape", tuple(train_set.images.shape[1:]), tuple(other.images.shape[1:])),
        ("values of type", train_set.images.dtype, other.images.dtype),
    ):
        if ours != theirs:
            raise InputError(
                f"data {train_set.name!r} has {what} {ours}, but {other.name!r} ({other.split}) has {theirs}"
            )


def _new_student(config: TrainConfig, data: ImageDataset, device: torch.device) -> nn.Module:
    torch.manual_seed(config.seed)
    student = create_model(config.model, num_classes=data.num_classes, in_channels=data.in_channels)
    student.to(device)
    require_forward(student.eval(), data, f"model {config.model!r}")
    _require_batches(student, data, config)
    return student.to(memory_format=torch.channels_last) if config.channels_last else student


def _require_batches(student: nn.Module, data: ImageDataset, config: TrainConfig) -> None:
    """InputError if an epoch has a batch of one image and the student's batch norm cannot be trained on that."""
    if config.extra_data or (len(data) % config.batch_size != 1 and config.batch_size != 1):
        return
    try:
        copy.deepcopy(student).train()(as_float(data.images[:1]))
    except ValueError as error:
        raise InputError(
            f"batch_size is {config.batch_size}, which leaves a batch of one of the {len(data)} images, and the "
            f"batch norm of {config.model!r} cannot be trained on that; choose another batch_size or limit"
        ) from error


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


def _continue_or_begin(config: TrainConfig, state: TrainingState) -> None:
    """Restore the state of an interrupted run if that is wanted; InputError if a finished one would be lost."""
    path = Path(config.out) / "checkpoint.pt"
    if config.resume:
        if stored := checkpoint_to_resume(path, config):
            state.restore(stored)
    elif path.exists() and not config.overwrite:
        raise InputError(
            f"out {config.out!r} already holds a run; --resume continues it, and --overwrite replaces it"
        )


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
