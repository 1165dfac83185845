"""Training steps in turns: the trainer's own, and AdaAD's, RSLAD's and TRADES' as the official code runs them.

Variants: "official" (fp32, NCHW), "official autocast" (bf16 autocast, channels-last), "official compile" (both networks
through torch.compile), "ours" (fp32: the trainer's step with its default settings) and "ours bf16".

All begin with the same weights, the trainer's first batch and its start of the attack: the loss of this first step is
the ``objective``, what the attack reached by the outer loss's measure. Then each draws batches in its own way:
officially image by image, ours for the whole batch.

Where ours spends its time is measured by timing its parts alone, in the same rounds: the teacher's forwards and input
gradients, the student's with its outer backward, the losses, the steps (of the attack, the optimizer, and copying the
new weights into the attack's network) and the batch. Their sum need not be the step; ``rest`` is what is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from advfunmatch.config import TrainConfig
from advfunmatch.data import ImageDataset
from advfunmatch.training.distributed import join_world
from advfunmatch.training.run import assemble, new_state
from advfunmatch.training.splits import Splits
from advfunmatch.training.trainer import derive_seed, train_step
from torch import Tensor, nn

import afm_kernels
from benchmarks.attack.__main__ import EPS, SEED, STEP_SIZE, Case, network
from benchmarks.options import Options
from benchmarks.results import Record, records_of
from benchmarks.timing import OtherLoad, interleave, peak_memory
from benchmarks.training.official import PerImageData
from benchmarks.training.official import step as official_step

Call = Callable[[], Any]
PEERS = ("official", "official autocast", "official compile")
CLASSES = 10
HEAD = (
    f"{'training step':<66} {'variant':<10}"
    + "".join(f"{'x ' + peer:>20}" for peer in PEERS)
    + f"{'objective':>11}"
)


@dataclass(frozen=True)
class Setting(Case):
    """The attack benchmark's case, whose loop is the method here, as a whole training step."""

    standard: bool = False
    """Whether `make bench` has time for it."""
    compiled: bool = True
    """Whether torch.compile of both networks is among the peers: minutes for a ResNet."""

    def __post_init__(self) -> None:
        images = (self.steps + 1) * self.batch
        small = 1 + 2e-3 * images + 15 * self.compiled
        large = 5 + 0.6 * images + 150 * self.compiled
        object.__setattr__(self, "cost", small if self.size == 8 else large)  # the class is frozen


DIGITS = Setting("small_cnn-8", "small_cnn-32", size=8, channels=1, batch=128)
CIFAR = Setting("resnet18", "resnet18", size=32, channels=3, batch=32, steps=2, compiled=False)
SETTINGS = (
    replace(DIGITS, standard=True),
    replace(DIGITS, loop="rslad", standard=True),
    replace(DIGITS, student="small_cnn-32", loop="trades", standard=True),
    replace(CIFAR, steps=1, batch=16, standard=True),
    *(replace(DIGITS, steps=steps) for steps in (1, 2, 5, 20)),
    *(replace(DIGITS, batch=batch) for batch in (32, 512)),
    # Steps of an attack are alike: a few are enough where one takes a second.
    *(replace(CIFAR, loop=loop) for loop in ("adaad", "rslad", "trades")),
    replace(CIFAR, student="preactresnet18", teacher="wrn-16-2"),
    replace(CIFAR, student="resnet18", teacher="wrn-16-2", compiled=True),
    replace(CIFAR, batch=128),
    replace(CIFAR, steps=10),
)


def cases(options: Options) -> list[Setting]:
    """What the options ask for."""
    chosen = options.named(SETTINGS)
    if chosen is None:
        small = [setting for setting in SETTINGS if setting.standard and setting.size == 8]
        standard = [setting for setting in SETTINGS if setting.standard]
        chosen = small if options.smoke else list(SETTINGS) if options.full else standard
    return chosen if options.compile else [replace(setting, compiled=False) for setting in chosen]


class OurStep:
    """The step of ``advfunmatch.trainer`` on a run of its own, and the parts of that step alone."""

    def __init__(
        self, setting: Setting, student: nn.Module, teacher: nn.Module, data: ImageDataset, precision: str
    ) -> None:
        config = TrainConfig(
            data=data.name,
            model=setting.student,
            method=setting.loop,
            out="-",
            teacher="-",
            eps=EPS,
            step_size=STEP_SIZE,
            steps=setting.steps,
            batch_size=setting.batch,
            lr=0.01,
            schedule="constant",
            augment="crop,flip",
            seed=SEED,
            precision=precision,
            reduction="batchmean",
        ).resolve()
        world, device = join_world(torch.device("cpu"))
        state = new_state(config, student, device)
        self.run = assemble(config, world, device, Splits(data, data), state, teacher)
        self.steps, self.method = setting.steps, setting.loop
        self.indices = torch.arange(len(data)).split(setting.batch)
        student.train()

    def __call__(self) -> Tensor:
        index = self.run.state.step % len(self.indices)
        return train_step(self.run, 0, index, self.indices[index])

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """What the first step attacks, with PyTorch's generators left as that step leaves them."""
        torch.manual_seed(derive_seed(SEED, "step", 0))
        return self.run.batch(self.indices[0])

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Each part of the step alone, as often as the step does it."""
        x, _ = self.first_batch()
        run, steps, method = self.run, self.steps, self.method
        assert run.lean_student is not None
        assert run.lean_teacher is not None
        lean_student, lean_teacher, optimizer = run.lean_student, run.lean_teacher, run.state.optimizer

        def walk(model: nn.Module, backward: bool) -> None:
            images = x.detach().requires_grad_(backward)
            z = model(images)
            if backward:
                torch.autograd.grad(z, images, torch.ones_like(z))

        def teacher() -> None:
            # AdaAD differentiates through the teacher at each step and asks once more; RSLAD asks once.
            for _ in range(steps if method == "adaad" else 0):
                walk(lean_teacher, True)
            if method != "trades":
                with torch.no_grad():
                    run.teacher(x)

        def student() -> None:
            for _ in range(steps):
                walk(lean_student, True)
            if method == "trades":  # the clean target of the attack
                with torch.no_grad():
                    walk(lean_student, False)
            outputs = [run.student(x) for _ in range(1 if method == "adaad" else 2)]
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(outputs, [torch.ones_like(z) for z in outputs])

        z = torch.randn(len(x), CLASSES)
        a, b = z + torch.randn_like(z), z.clone().requires_grad_()
        wrt = ("student", "teacher") if method == "adaad" else ("student",)

        def loss() -> None:
            for _ in range(steps):
                afm_kernels.softmax_kl_div_grad(z, a, wrt=wrt)
            for _ in range(1 if method == "adaad" else 2):
                torch.autograd.grad(afm_kernels.softmax_kl_div(b, a), b)

        grad = torch.randn_like(x)

        def step() -> None:
            for _ in range(steps):
                afm_kernels.pgd_step(x, grad, x, step_size=STEP_SIZE, eps=EPS)
            optimizer.step()
            lean_student.refresh_()

        return {
            "teacher": teacher,
            "student": student,
            "loss": loss,
            "step": step,
            "data": self.first_batch,
        }


def build(setting: Setting) -> tuple[dict[str, Call], OurStep]:
    """Every variant on networks of its own, of the same weights and with the same first batch; and our fp32 step."""
    student = network(setting.student, setting, "cpu", SEED)
    teacher = network(setting.teacher, setting, "cpu", SEED + 1)
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = (
                0.1  # training's; the average over batches that settled it would break compiled graphs
            )
    shape = (4 * setting.batch, setting.channels, setting.size, setting.size)
    images, labels = torch.randint(256, shape, dtype=torch.uint8), torch.randint(CLASSES, shape[:1])
    classes = tuple(map(str, range(CLASSES)))
    data = ImageDataset("random images", "train", images, labels, classes)

    def per_image() -> Iterator[tuple[Tensor, Tensor]]:
        yield ours.first_batch()
        loader = torch.utils.data.DataLoader(
            PerImageData(images, labels), setting.batch, shuffle=True, drop_last=True
        )
        while True:
            yield from loader

    def pair(channels_last: bool = False) -> tuple[nn.Module, nn.Module]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        made = [copy.deepcopy(model).to(memory_format=layout) for model in (student, teacher)]
        return made[0], made[1]

    def official(models: tuple[nn.Module, nn.Module], **options: Any) -> Call:
        return official_step(
            setting.loop, *models, partial(next, per_image()), (EPS, STEP_SIZE, setting.steps), **options
        )

    ours, ours_bf16 = (OurStep(setting, *pair(), data, precision) for precision in ("fp32", "bf16"))
    calls: dict[str, Call] = {
        "ours": ours,
        "ours bf16": ours_bf16,
        "official": official(pair()),
        "official autocast": official(pair(True), autocast=True, channels_last=True),
    }
    if setting.compiled:
        networks = pair()
        compiled = (torch.compile(networks[0]), torch.compile(networks[1]))
        calls["official compile"] = official(networks, attacked=compiled)
    return calls, ours


def measure(setting: Setting, seconds: float, options: Options, limits: Any) -> list[Record]:
    """Every variant of one step in turns, with the parts of ours among them."""
    torch._dynamo.reset()
    calls, ours = build(setting)
    objectives = {name: float(call()) for name, call in calls.items()}
    parts = {f"part {name}": call for name, call in ours.parts().items()}
    with OtherLoad() as load:
        rounds = {"min_rounds": 1, "warmup": 0} if options.smoke else {"min_rounds": 3, "warmup": 1}
        times = interleave({**calls, **parts}, budget=seconds, **rounds)
    found = records_of(setting.name, times, peers=PEERS, skip=tuple(parts))
    for name, record in found.items():
        record.peak_bytes = peak_memory(calls[name])
        record.details = {
            "objective": objectives[name],
            "images_per_second": setting.batch / times[name].median,
            "other_load": load.fraction,
        }
    whole = times["ours"].median
    share = {name.removeprefix("part "): times[name].median / whole for name in parts}
    found["ours"].details["share"] = {**share, "rest": 1 - sum(share.values())}
    return list(found.values())


def lines(records: list[Record]) -> Iterator[str]:
    """A line for each of our variants."""
    official = next(record for record in records if record.variant == "official")
    for record in records:
        if not record.peer:
            over = [f"{record.speedup[p]['median']:.2f}" if p in record.speedup else "-" for p in PEERS]
            reached = record.details["objective"] / official.details["objective"]
            columns = "".join(f"{each:>20}" for each in over)
            yield f"{record.group:<66} {record.variant:<10}{columns}{reached:>11.1%}"


OFF = {"ours": 0.02, "ours bf16": 0.1}
"""How far an objective may be from the official step's: signs of gradients flip with the rounding."""


def wrong_answers(records: list[Record]) -> Iterator[str]:
    """A sentence for every first loss that is not the official step's, of the same weights, batch and start."""
    official = {r.group: r.details["objective"] for r in records if r.variant == "official"}
    for record in records:
        if not record.peer:
            reached, expected = record.details["objective"], official[record.group]
            if not abs(reached - expected) <= OFF[record.variant] * abs(expected):
                yield f"{record.name}: the first step's loss is {reached:g}, the official one's {expected:g}"
