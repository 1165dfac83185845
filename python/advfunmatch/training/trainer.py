"""The training loop: attack a batch, step down the loss on what the attack found; measure and save each epoch.

Note [Randomness]
~~~~~~~~~~~~~~~~~
Nothing random carries over from one step to the next. The order of an epoch is a function of (seed, epoch), and before
each step PyTorch's generators are seeded with a function of (seed, step), from which augmentation, dropout and the
attack's start draw. So a continued run needs no generator states, and a step can be repeated alone.

Note [Accumulation]
~~~~~~~~~~~~~~~~~~~
``accumulate`` batches share one optimizer step, each with the weight of its images among theirs, so that the step is
that of one large batch even where an epoch ends with a short one. A run is only saved between such groups: gradients
are no part of a checkpoint.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attacks import PGDAttack
from ..config import TrainConfig
from ..data import ImageDataset, as_float
from ..errors import TrainingDiverged
from ..files import write_json_lines
from ..lean import PreparedModel
from ..methods import Logits, Method, Network
from ..models import save_checkpoint
from ..plugins import load_plugins
from .averaging import refresh_batch_norm
from .awp import perturbed_weights
from .board import Board
from .distributed import plain_batch_norm
from .given import Given, GivenNetwork, require_known
from .results import final_result, keep_best, monitor, sentence
from .run import Run, set_up
from .schedule import learning_rate

if TYPE_CHECKING:
    from ..progress import ProgressBar

CHECK_EVERY = 25  # steps between looks at the loss: each look waits for the device
LEAST_SCALE = (
    2.0**-14
)  # of fp16 losses, which halves at each overflow: below this a loss of 1 is not a normal number


def train(
    config: TrainConfig,
    *,
    model: GivenNetwork | None = None,
    teacher: GivenNetwork | None = None,
    data: Any = None,
    method: Method | None = None,
    label: str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Train one network, and write DIR/checkpoint.pt, DIR/metrics.jsonl and DIR/result.json; see Note [Splits].

    Everything that can be wrong with the configuration, the data and the teacher is found before DIR is touched. Under
    torchrun, the processes share each batch; see Note [Processes].

    Args:
        config: what to train, on what and how; unset fields take the method's defaults.
        model: the network to train, in place of the one that ``config.model`` names: an ``nn.Module``, which is trained
            in place, and left in eval mode on the run's device with the weights that the result is of; or a function
            of (num_classes, in_channels) that builds one. It takes images in [0, 1], (N, C, H, W), and returns logits
            (N, classes), or an object that has them as ``logits``. Parameters that need no gradient stay as they are.
        teacher: the network to match, likewise, in place of the file that ``config.teacher`` names. A module is copied,
            and stays as it is.
        data: in place of what ``config.data`` names: what `as_dataset` takes, for ``{"train": …, "test": …}`` or as a
            pair of the two; of one set alone a tenth is held out for the test split. It is read once, before training:
            what its transforms draw at random is the same in every epoch, and ``config.augment`` draws anew.
        method: a `Method` in place of the one that ``config.method`` names; it joins the table by its name.
        label: what the progress bar calls this run; the method and the model if not given.
        show: whether there is a progress bar.

    Returns:
        What result.json holds: accuracies in percent on the test split, fidelity to the teacher, and the time taken, of
        the weights after the last epoch; with validation images those of the best epoch too, under ``best``. Nothing
        in a process other than the first.

    Raises:
        InputError: a setting, the data, a network or DIR cannot be used, or is given twice.
        TrainingDiverged: the loss or a weight became NaN or infinite.
    """
    from ..progress import ProgressBar  # needs rich, which those who import only the attack may not have

    given = Given(model, teacher, data, method)
    config = given.complete(config)
    load_plugins(config.imports)
    require_known(config, given)
    run = set_up(config.resolve(), given)
    config, state, leads = run.config, run.state, run.world.leads
    for remark in run.remarks if show and leads else ():
        print(remark, file=sys.stderr)
    with run.world.together():
        if leads:
            save_best(run)  # where a run was stopped between its two files
    images = run.images_per_epoch
    progress = ProgressBar(
        label or f"{config.method} {config.model}",
        total=config.epochs * images,
        done=state.step * images // run.steps_per_epoch,
        show=show and leads,
    )
    with Board(run.out, state.metrics, wanted=config.tensorboard and leads) as board, progress:
        for epoch in range(run.epochs_done, config.epochs):
            train_epoch(run, epoch, progress)
            require_finite_weights(run)  # before an attack meets them
            measured = monitor(run, epoch)
            if measured:
                progress.say(sentence(run, measured))
                keep_best(run, epoch, measured)
            row = epoch_row(run, epoch) | measured
            board.show(row)
            state.metrics.append(row)
            state.loss_sum.zero_()
            save(run)
    if isinstance(model, nn.Module):
        plain_batch_norm(model)
        model.load_state_dict(state.evaluated.state_dict())
        model.eval()
    return final_result(run) if leads else {}


def train_epoch(run: Run, epoch: int, progress: ProgressBar) -> None:
    """Every training image once, or as many as an interrupted run has left of this epoch."""
    config, state = run.config, run.state
    started = time.perf_counter()
    run.student.train()
    if run.attack is not None:
        run.attack.steps = attack_steps(config, epoch)
    order = batches(len(run.train_set), run.batch_size, config.seed, epoch, run.steps_per_epoch)
    order = reading_ahead(order, run.train_set)
    unread: list[Tensor] = []
    for index, indices in islice(enumerate(order), state.step % run.steps_per_epoch, None):
        loss = train_step(run, epoch, index, indices)
        state.loss_sum += loss
        unread.append(loss)
        progress.advance(run.counted_in(range(index, index + 1)))
        ends = index + 1 == run.steps_per_epoch
        saves = not ends and saves_after(run, index)
        if ends or saves or state.step % CHECK_EVERY == 0:
            require_finite(unread, run)
            unread = []
        if saves:
            state.seconds += time.perf_counter() - started
            save(run)
            started = time.perf_counter()
    if config.swa_start is not None and epoch >= config.swa_start and state.average:
        state.average.update(run.student)
        # In parts none of which is shorter than a batch: batch norm cannot be refreshed on one image.
        parts = torch.arange(len(run.train_set)).tensor_split(max(1, len(run.train_set) // config.batch_size))
        refresh_batch_norm(state.average.model, (as_float(run.train_set.images[part]) for part in parts))
    state.seconds += time.perf_counter() - started


def train_step(run: Run, epoch: int, index: int, indices: Tensor) -> Tensor:
    """Attack batch `index` of an epoch, and add its gradients to those of its group, which may make a step.

    Returns:
        The loss of the whole batch, over all processes.
    """
    config, state, world = run.config, run.state, run.world
    torch.manual_seed(derive_seed(config.seed, "step", state.step))
    x, labels = run.batch(indices)
    group = run.group(index)
    share_of_group = len(x) / run.images_in(group)
    x_start, weight = None, 1.0
    if world.size > 1:
        x_start = run.attack.draw_start(x) if run.attack else x
        (x, labels, x_start), weight = world.share(x, labels, x_start)

    logits = Logits(run.student, run.teacher, x, labels, epoch, run.method.layers(config))
    if run.attack is not None:
        with run.autocast():
            x_adv = run_attack(run.attack, run.method, logits, run.lean_student, run.lean_teacher, x_start)
        logits.x_adv = x_adv.to(x.dtype)

    for parameters in state.optimizer.param_groups:
        parameters["lr"] = learning_rate(state.step, run.steps_per_epoch, config)
    if index == group[0]:
        state.optimizer.zero_grad(set_to_none=True)
    with worst_weights(run, logits, weight):
        with run.autocast():
            loss = weight * run.method.outer_loss(logits, config)
        state.scaler.scale(loss * share_of_group).backward()
        if index == group[-1]:
            step_optimizer(run)
    if index == group[-1]:
        if run.lean_student is not None:
            run.lean_student.refresh_()
        if state.average and config.ema:
            state.average.update(run.student)
    state.step += 1
    loss = loss.detach()
    world.sum_([loss])
    return loss


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


def worst_weights(run: Run, logits: Logits, weight: float) -> AbstractContextManager[None]:
    """Where --awp is on and warmed up: the weights moved against this batch; otherwise nothing."""
    config = run.config
    if not config.awp or logits.epoch < config.awp_warmup:
        return nullcontext()

    def loss_of(proxy: Network) -> Tensor:
        # fp16 gradients would need a scale of their own, so these are float32 there.
        with nullcontext() if config.precision == "fp16" else run.autocast():
            return weight * run.method.outer_loss(logits.for_student(proxy), config)

    return perturbed_weights(run.student, loss_of, config.awp_gamma, run.world)


def step_optimizer(run: Run) -> None:
    """Sum the gradients of all processes, clip them, and step; fp16 gradients that overflowed make no step."""
    state, parameters = run.state, list(run.student.parameters())
    run.world.sum_([p.grad for p in parameters if p.grad is not None])
    if run.config.clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(parameters, run.config.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def attack_steps(config: TrainConfig, epoch: int) -> int:
    """Steps of the attack in that epoch: `early_steps` in the first half of the run, if they are set."""
    early = config.early_steps is not None and epoch < config.epochs // 2
    return config.early_steps if early and config.early_steps else config.steps


def batches(
    images: int, batch_size: int, seed: int, epoch: int, steps: int | None = None
) -> Iterator[Tensor]:
    """Indices of one epoch's batches, in an order that (seed, epoch) decides: every image once, or pass after pass
    until there are `steps` of them."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    passes = (torch.randperm(images, generator=generator).split(batch_size) for _ in count())
    yield from next(passes) if steps is None else islice(chain.from_iterable(passes), steps)


def reading_ahead(order: Iterator[Tensor], data: ImageDataset) -> Iterator[Tensor]:
    """The same batches, each handed out when the next one's images were asked for, where they stay in a file."""
    indices = next(order)
    for following in order:
        data.ask_for(following)
        yield indices
        indices = following
    yield indices


def derive_seed(seed: int, what: str, number: int) -> int:
    """A seed for the `number`-th of `what`, unrelated to its neighbours'. See Note [Randomness]."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {what} {number}".encode(), digest_size=7).digest(), "big")


def saves_after(run: Run, index: int) -> bool:
    """Whether `save_every` asks for a checkpoint now; it comes where a group ends. See Note [Accumulation]."""
    group = run.group(index)
    every = run.config.save_every
    return every > 0 and index == group[-1] and run.state.step % every < len(group)


def require_finite(losses: list[Tensor], run: Run) -> None:
    """Stop a run whose losses since the last look are not all finite, or whose fp16 gradients never are.

    Raises:
        TrainingDiverged: it names the step, what came before it, and the checkpoint that was kept.
    """
    values = torch.stack(losses)
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0])
        step = run.state.step - len(losses) + index + 1
        before = (
            f"after {float(values[index - 1]):g} one step before" if index else "all before it were finite"
        )
        raise _diverged(run, f"the loss became {float(values[index])} at step {step} ({before})")
    scaler = run.state.scaler
    if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
        raise _diverged(run, f"fp16 gradients overflow whatever their scale, at step {run.state.step} too")


def require_finite_weights(run: Run) -> None:
    """Stop a run before it measures or saves weights that are not finite, which the losses so far need not show."""
    for name, value in run.student.state_dict().items():
        if not value.isfinite().all():
            raise _diverged(
                run, f"{name} is no longer finite after step {run.state.step}, though the loss was"
            )


def _diverged(run: Run, what: str) -> TrainingDiverged:
    path = run.checkpoint_path
    kept = f"the last good checkpoint is {str(path)!r}" if path.is_file() else "no checkpoint was saved yet"
    lr = run.state.optimizer.param_groups[0]["lr"]
    advice = "bf16 or fp32" if run.state.scaler.is_enabled() else "a smaller lr"
    return TrainingDiverged(f"{what} at learning rate {lr:g}; {kept}; {advice} usually helps")


def epoch_row(run: Run, epoch: int) -> dict[str, Any]:
    """What metrics.jsonl says of an epoch, but for accuracies."""
    state = run.state
    return {
        "epoch": epoch + 1,
        "step": state.step,
        "loss": float(state.loss_sum) / run.steps_per_epoch,
        "lr": state.optimizer.param_groups[0]["lr"],
        "seconds": round(state.seconds, 3),
        "images_per_second": round((epoch + 1) * run.images_per_epoch / state.seconds, 1),
    }


def save(run: Run) -> None:
    """Replace metrics.jsonl and checkpoint.pt, unless the weights are no good. See Note [Checkpoint]."""
    require_finite_weights(run)
    with run.world.together():
        if not run.world.leads:
            return
        write_json_lines(run.out / "metrics.jsonl", run.state.metrics)
        checkpoint = described(run) | {"epoch": run.epochs_done, **run.state.to_checkpoint()}
        save_checkpoint(run.checkpoint_path, checkpoint, run.config.save_safetensors)
        if run.state.best and run.state.best["step"] == run.state.step:
            save_best(run)


def save_best(run: Run) -> None:
    """Replace best.pt by the best epoch's weights, which checkpoint.pt holds too, so that the two cannot disagree."""
    if run.state.best:
        save_checkpoint(run.best_path, described(run) | run.state.best, run.config.save_safetensors)


def described(run: Run) -> dict[str, Any]:
    """What a checkpoint says of its network, its data and its run."""
    data = run.train_set
    return {
        "model": run.config.model,
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "image_size": list(data.image_size),
        "class_names": list(data.class_names),
        "config": run.config.to_dict(),
        "environment": run.made_with,
        "digests": run.digests,
        "origins": run.origins,
        "teacher_accuracy": run.teacher_accuracy,
    }
