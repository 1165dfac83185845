"""The training loop.

Note [Randomness]
~~~~~~~~~~~~~~~~~
Nothing random carries over from one step to the next. The order of an epoch is a function of (seed, epoch), and before
each step PyTorch's generators are seeded with a function of (seed, step), from which augmentation, dropout and the
attack's start draw. So a continued run needs no generator states, and a step can be repeated alone.
"""

from __future__ import annotations

import copy
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
from .averaging import WeightAverage, refresh_batch_norm
from .awp import perturbed_weights
from .checkpoint import load_foreign, model_of, read_checkpoint, require_fit, save_checkpoint
from .config import TrainConfig
from .data import ImageDataset, as_float, choose, load_dataset
from .data.augment import augmented, parse_augmentation
from .distributed import World, join_world, synchronise_batch_norm
from .environment import environment
from .errors import InputError, TrainingDiverged, one_of
from .evaluate import evaluate
from .files import make_folder, remove_partial_files, write_json, write_json_lines
from .lean import PreparedModel, prepare_for_attack
from .methods import Logits, Method, get_method, make_attack
from .models import create_model
from .schedule import learning_rate
from .state import TrainingState, checkpoint_to_resume

CHECK_EVERY = 25  # steps between looks at the loss: each look waits for the device
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: TrainConfig, *, label: str | None = None, show: bool = True) -> dict[str, Any]:
    """Train one network, and write DIR/checkpoint.pt, DIR/metrics.jsonl and DIR/result.json.

    Everything that can be wrong with the configuration, the data and the teacher is found before DIR is touched. Under
    torchrun, the processes share each batch; see Note [Processes].

    Args:
        config: what to train, on what and how; unset fields take the method's defaults.
        label: what the progress bar calls this run; the method and the model if not given.
        show: whether there is a progress bar.

    Returns:
        What result.json holds: accuracies in percent on the test split, fidelity to the teacher, and the time taken.
        Nothing in a process other than the first.

    Raises:
        InputError: a setting, the data, the teacher or DIR cannot be used.
        TrainingDiverged: the loss became NaN or infinite.
    """
    from .progress import TrainingProgress  # needs rich, which those who import only the attack may not have

    config = config.resolve()
    world, device = join_world(choose_device(config.device))
    out = Path(config.out)
    checkpoint_path = out / "checkpoint.pt"
    method = get_method(config.method)
    with world.together():
        if world.size > 1 and config.reduction == "sum":
            raise InputError("reduction is 'sum', but several processes need a mean: batchmean or mean")
        train_set = load_dataset(config.data, split="train", limit=config.limit).to(device)
        test_set = load_dataset(config.data, split="test", limit=config.eval_limit).to(device)
        extra_set = (
            load_dataset(config.extra_data, split="train", what="extra_data").to(device)
            if config.extra_data
            else None
        )
        for other in (test_set, extra_set):
            _require_same_kind(train_set, other)
        teacher = _load_teacher(config, train_set, device) if config.teacher else None
        torch.manual_seed(config.seed)
        student = create_model(
            config.model, num_classes=train_set.num_classes, in_channels=train_set.in_channels
        )
        student.to(device)
        _require_forward(student, train_set, config)
        if config.channels_last:
            student.to(memory_format=torch.channels_last)
        state = _new_state(config, student, device)
        if config.resume:
            if stored := checkpoint_to_resume(checkpoint_path, config):
                state.restore(stored)
        elif checkpoint_path.exists() and not config.overwrite:
            raise InputError(
                f"out {config.out!r} already holds a run; --resume continues it, and --overwrite replaces it"
            )
        lean_student, lean_teacher = _prepare(config, method, student, teacher)
        if world.size > 1:  # after the attack's copies were made, which fold batch norm away
            synchronise_batch_norm(student, config.model)
    made_with = {**environment(device), "processes": world.size}
    with world.together():
        if world.leads:
            make_folder(out, "out")
            remove_partial_files(out)
            write_json(out / "run.json", {"config": config.to_dict(), "environment": made_with})

    attack = make_attack(config)
    batch_size = config.batch_size - (round(config.extra_ratio * config.batch_size) if extra_set else 0)
    steps_per_epoch = math.ceil(len(train_set) / max(batch_size, 1))
    monitor_set = test_set.subset(choose(len(test_set), config.monitor_images))
    autocast_dtype = DTYPES[config.precision]

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, autocast_dtype) if autocast_dtype else nullcontext()

    def save() -> None:
        fixed = {
            "model": config.model,
            "num_classes": train_set.num_classes,
            "in_channels": train_set.in_channels,
            "image_size": list(train_set.image_size),
            "class_names": list(train_set.class_names),
            "config": config.to_dict(),
            "environment": made_with,
            "epoch": state.step // steps_per_epoch,
        }
        with world.together():
            if world.leads:
                write_json_lines(out / "metrics.jsonl", state.metrics)
                save_checkpoint(checkpoint_path, {**fixed, **state.to_checkpoint()})

    label = label or f"{config.method} {config.model}"
    images_in_run, images_done = (
        config.epochs * len(train_set),
        state.step * len(train_set) // steps_per_epoch,
    )
    with (
        _board(config, out, world, state.metrics) as board,
        TrainingProgress(label, images_in_run, images_done, show=show and world.leads) as progress,
    ):
        for epoch in range(state.step // steps_per_epoch, config.epochs):
            started = time.perf_counter()
            student.train()
            if attack is not None:
                early = config.early_steps is not None and epoch < config.epochs // 2
                attack.steps = config.early_steps if early and config.early_steps else config.steps
            recent: list[Tensor] = []
            first = state.step % steps_per_epoch
            for index, indices in enumerate(batches(len(train_set), batch_size, config.seed, epoch)):
                if index < first:
                    continue
                torch.manual_seed(derive_seed(config.seed, "step", state.step))
                x, labels = _batch(train_set, indices.to(device), extra_set, config)
                x_start, weight = None, 1.0
                if world.size > 1:
                    x_start = attack.draw_start(x) if attack else x
                    (x, labels, x_start), weight = world.share(x, labels, x_start)
                for group in state.optimizer.param_groups:
                    group["lr"] = learning_rate(state.step, steps_per_epoch, config)
                logits = Logits(student, teacher, x, labels, epoch)
                if attack is not None:
                    with autocast():
                        x_adv = run_attack(attack, method, logits, lean_student, lean_teacher, x_start)
                    logits.x_adv = x_adv.to(x.dtype)

                # Batches index - index % accumulate ... of this epoch share one optimizer step.
                opens = index % config.accumulate == 0
                closes = (index + 1) % config.accumulate == 0 or index + 1 == steps_per_epoch
                shared_by = min(config.accumulate, steps_per_epoch - (index - index % config.accumulate))
                if opens:
                    state.optimizer.zero_grad(set_to_none=True)
                with worst_weights(student, method, logits, config, world, weight):
                    with autocast():
                        loss = weight * method.loss(logits, config)
                    state.scaler.scale(loss / shared_by).backward()
                    if closes:
                        _optimizer_step(state, config, world)
                if closes:
                    if lean_student is not None:
                        lean_student.refresh_()
                    if state.average and config.ema:
                        state.average.update(student)
                loss = loss.detach()
                world.sum_([loss])
                state.loss_sum += loss
                recent.append(loss)
                state.step += 1
                progress.advance(len(indices))
                last = index + 1 == steps_per_epoch
                saves = closes and not last and config.save_every and state.step % config.save_every == 0
                if last or saves or state.step % CHECK_EVERY == 0:
                    _require_finite(recent, state, config, checkpoint_path)
                    recent = []
                if saves:
                    state.seconds += time.perf_counter() - started
                    save()
                    started = time.perf_counter()
            if config.swa_start is not None and epoch >= config.swa_start and state.average:
                state.average.update(student)
                _refresh_average(state.average, train_set, config)
            state.seconds += time.perf_counter() - started

            row = {
                "epoch": epoch + 1,
                "step": state.step,
                "loss": float(state.loss_sum) / steps_per_epoch,
                "lr": state.optimizer.param_groups[0]["lr"],
                "seconds": round(state.seconds, 3),
                "images_per_second": round((epoch + 1) * len(train_set) / state.seconds, 1),
            }
            if (
                world.leads
                and config.eval_every
                and ((epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs)
            ):
                measured = evaluate(
                    state.evaluated, monitor_set, ["clean", "pgd10"], eps=config.eps, norm=config.norm
                )
                row |= measured.accuracies
                progress.say(f"clean {row['clean']:.1f} % · PGD-10 {row['pgd10']:.1f} %")
            if board is not None:
                _show_on_board(board, row)
            state.metrics.append(row)
            state.loss_sum.zero_()
            save()

    if not world.leads:
        return {}
    final = evaluate(
        state.evaluated, test_set, ["clean", "pgd20"], eps=config.eps, norm=config.norm, teacher=teacher
    )
    result = {
        **final.to_dict(),
        "method": config.method,
        "model": config.model,
        "data": config.data,
        "epochs": config.epochs,
        "train_images": len(train_set),
        "seconds": round(state.seconds, 2),
        "images_per_second": round(config.epochs * len(train_set) / state.seconds, 1),
        "config": config.to_dict(),
        "environment": made_with,
    }
    write_json(out / "result.json", result)
    return result


def run_attack(
    attack: PGDAttack,
    method: Method,
    logits: Logits,
    lean_student: PreparedModel | None = None,
    lean_teacher: PreparedModel | None = None,
    x_start: Tensor | None = None,
) -> Tensor:
    """Adversarial examples of one batch, found on the prepared copies of the networks where there are any."""
    student = lean_student or logits.student
    assert isinstance(student, nn.Module)
    if not method.needs_teacher:  # a teacher that the method does not match is only there to be compared with
        return attack(student, None, logits.x, logits.labels, x_start=x_start)
    teacher = lean_teacher or logits.teacher
    assert isinstance(teacher, nn.Module)
    # The loss needs the teacher's clean logits too where the attack does; they are computed once.
    known = logits.teacher_clean if method.objective == "fixed_teacher" else None
    return attack(student, teacher, logits.x, logits.labels, teacher_logits=known, x_start=x_start)


def worst_weights(
    student: nn.Module, method: Method, logits: Logits, config: TrainConfig, world: World, weight: float
) -> AbstractContextManager[None]:
    """Where --awp is on and warmed up: the weights moved against this batch; otherwise nothing."""
    if not config.awp or logits.epoch < config.awp_warmup:
        return nullcontext()
    return perturbed_weights(
        student,
        lambda proxy: weight * method.loss(logits.for_student(proxy), config),
        config.awp_gamma,
        world,
    )


def batches(images: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Indices of one epoch's batches: every image once, in an order that (seed, epoch) decides."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    yield from torch.randperm(images, generator=generator).split(batch_size)


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
    if device.type not in ("cpu", "cuda"):
        raise one_of("device", name, ("cpu", "cuda", "auto"))
    return device


def _new_state(config: TrainConfig, student: nn.Module, device: torch.device) -> TrainingState:
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
    return TrainingState(
        student, optimizer, scaler, average, torch.zeros((), dtype=torch.float64, device=device)
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


def _batch(
    train_set: ImageDataset, indices: Tensor, extra_set: ImageDataset | None, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Augmented images and labels of one batch, extra images included."""
    images, labels = train_set.images[indices], train_set.labels[indices]
    if extra_set:
        count = round(config.extra_ratio * config.batch_size)
        drawn = torch.randint(len(extra_set), (count,), device=images.device)
        images = torch.cat([images, extra_set.images[drawn]])
        labels = torch.cat([labels, extra_set.labels[drawn]])
    x = augmented(images, parse_augmentation(config.augment))
    return (x.contiguous(memory_format=torch.channels_last) if config.channels_last else x), labels


def _optimizer_step(state: TrainingState, config: TrainConfig, world: World) -> None:
    world.sum_([p.grad for p in state.student.parameters() if p.grad is not None])
    if config.clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.student.parameters(), config.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def _refresh_average(average: WeightAverage, data: ImageDataset, config: TrainConfig) -> None:
    refresh_batch_norm(average.model, [as_float(images) for images in data.images.split(config.batch_size)])


def _board(
    config: TrainConfig, out: Path, world: World, metrics: list[dict[str, Any]]
) -> AbstractContextManager[Any]:
    """TensorBoard's log of this run: what an earlier run left is replaced by the rows that this one continues from."""
    if not (config.tensorboard and world.leads):
        return nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    folder = out / "tensorboard"
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    board = SummaryWriter(str(folder))
    for row in metrics:
        _show_on_board(board, row)
    return board


def _show_on_board(board: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if name not in ("epoch", "step"):
            board.add_scalar(name, value, row["epoch"])


def _load_teacher(config: TrainConfig, data: ImageDataset, device: torch.device) -> nn.Module:
    assert config.teacher is not None
    if config.teacher_model:
        teacher = load_foreign(config.teacher, config.teacher_model, data, "teacher").to(device)
    else:
        checkpoint = read_checkpoint(config.teacher, "teacher")
        require_fit(checkpoint, config.teacher, data, "teacher")
        teacher = model_of(checkpoint, config.teacher, "teacher").to(device)
    return teacher.to(memory_format=torch.channels_last) if config.channels_last else teacher


def _require_same_kind(train_set: ImageDataset, other: ImageDataset | None) -> None:
    if other is None:
        return
    for what, ours, theirs in (
        ("images of shape", tuple(train_set.images.shape[1:]), tuple(other.images.shape[1:])),
        ("values of type", train_set.images.dtype, other.images.dtype),
        ("number of classes", train_set.num_classes, other.num_classes),
    ):
        if ours != theirs:
            raise InputError(
                f"data {train_set.name!r} has {what} {ours}, but {other.name!r} ({other.split}) has {theirs}"
            )


def _require_forward(model: nn.Module, data: ImageDataset, config: TrainConfig) -> None:
    try:
        with torch.no_grad():
            model.eval()(as_float(data.images[:1]))
    except RuntimeError as error:
        height, width = data.image_size
        raise InputError(f"model {config.model!r} cannot take images of {height}×{width} pixels") from error
    if config.extra_data is None and (len(data) % config.batch_size == 1 or config.batch_size == 1):
        try:
            copy.deepcopy(model).train()(as_float(data.images[:1]))
        except ValueError as error:
            raise InputError(
                f"batch_size is {config.batch_size}, which leaves a batch of one of the {len(data)} images, and the "
                f"batch norm of {config.model!r} cannot be trained on that; choose another batch_size or limit"
            ) from error


def _require_finite(
    recent: list[Tensor], state: TrainingState, config: TrainConfig, checkpoint: Path
) -> None:
    losses = torch.stack(recent)
    bad = (~losses.isfinite()).nonzero()
    if not len(bad):
        return
    index = int(bad[0])
    step = state.step - len(recent) + index + 1
    kept = (
        f"the last good checkpoint is {str(checkpoint)!r}"
        if checkpoint.is_file()
        else "no checkpoint was saved yet"
    )
    before = (
        f"after {float(losses[index - 1]):g} one step before" if index else "without a finite loss before it"
    )
    raise TrainingDiverged(
        f"the loss became {float(losses[index])} at step {step} ({before}) at learning rate "
        f"{state.optimizer.param_groups[0]['lr']:g}; {kept}; a smaller lr usually helps"
    )
