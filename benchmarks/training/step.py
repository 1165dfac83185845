"""Training steps in turns: the trainer's own, and AdaAD's, RSLAD's and TRADES' as the official code runs them.

Variants: "official" (fp32, NCHW), "official autocast" (bf16 autocast, channels-last), "official compile" (both networks
through torch.compile), "ours" (fp32: the trainer's step with its default settings) and "ours bf16".

Where ours spends its time is measured by timing its parts alone, in the same rounds: the teacher's forwards and input
gradients, the student's with its outer backward, the losses, the steps (of the attack, the optimizer, and copying the
new weights into the attack's network) and the batch. Their sum need not be the step; ``rest`` is what is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from advfunmatch import create_model
from advfunmatch.config import TrainConfig
from advfunmatch.data.augment import augmented, parse_augmentation
from advfunmatch.lean import prepare_for_attack
from advfunmatch.methods import Logits, get_method, make_attack
from advfunmatch.trainer import run_attack
from torch import Tensor, nn

import afm_kernels
from benchmarks.options import Options
from benchmarks.results import Record, records_of
from benchmarks.timing import OtherLoad, interleave, peak_memory
from benchmarks.training.official import PerImageData
from benchmarks.training.official import step as official_step

PEERS = ("official", "official autocast", "official compile")
EPS, STEP_SIZE = 8 / 255, 2 / 255
CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """One training step: method, networks, images, attack steps."""

    method: str
    student: str
    teacher: str
    batch: int
    channels: int
    size: int
    steps: int
    standard: bool = True

    @property
    def name(self) -> str:
        pair = self.student if self.method == "trades" else f"{self.student}<-{self.teacher}"
        shape = f"{self.batch}x{self.channels}x{self.size}x{self.size}"
        return f"{self.method}/{pair}/{shape}/{self.steps}steps"


SETTINGS = (
    Setting("adaad", "small_cnn-8", "small_cnn-32", 128, 1, 8, 10),
    Setting("rslad", "small_cnn-8", "small_cnn-32", 128, 1, 8, 10),
    Setting("trades", "small_cnn-32", "small_cnn-32", 128, 1, 8, 10),
    # Steps of an attack are alike: two are enough where one takes a second.
    Setting("adaad", "resnet18", "wrn-16-2", 32, 3, 32, 2, standard=False),
)


def chosen(options: Options) -> list[Setting]:
    """What the options ask for."""
    import re

    if options.only is not None:
        return [s for s in SETTINGS if re.search(options.only, s.name)]
    if options.smoke:
        return [s for s in SETTINGS if s.size == 8 and s.method != "rslad"]
    return [s for s in SETTINGS if options.full or s.standard]


class OurStep:
    """The step of ``advfunmatch.trainer``, made of the trainer's own pieces, and those pieces alone."""

    def __init__(
        self,
        setting: Setting,
        student: nn.Module,
        teacher: nn.Module,
        data: tuple[Tensor, Tensor],
        precision: str,
    ) -> None:
        self.setting = setting
        self.config = TrainConfig(
            data="digits",
            model=setting.student,
            method=setting.method,
            out="-",
            teacher="-",
            eps=EPS,
            step_size=STEP_SIZE,
            steps=setting.steps,
            batch_size=setting.batch,
            augment="crop,flip",
            lr=0.01,
            precision=precision,
            reduction="batchmean",
        ).resolve()
        self.method = get_method(setting.method)
        self.attack = make_attack(self.config)
        assert self.attack is not None
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.student, self.teacher = student, teacher
        self.lean_student = prepare_for_attack(student, self.dtype, torch.contiguous_format)
        self.lean_teacher = prepare_for_attack(teacher, self.dtype, torch.contiguous_format)
        self.optimizer = torch.optim.SGD(
            student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.images, self.labels = data

    def batch(self) -> tuple[Tensor, Tensor]:
        indices = torch.randint(len(self.images), (self.setting.batch,))
        x = augmented(self.images[indices], parse_augmentation(self.config.augment))
        return x, self.labels[indices]

    def __call__(self) -> Tensor:
        x, labels = self.batch()
        self.student.train()
        logits = Logits(self.student, self.teacher, x, labels, 0)
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            assert self.attack is not None
            logits.x_adv = run_attack(
                self.attack, self.method, logits, self.lean_student, self.lean_teacher
            ).to(x.dtype)
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.method.loss(logits, self.config)
        loss.backward()
        self.optimizer.step()
        self.lean_student.refresh_()
        return loss.detach()

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Each part of the step alone, as often as the step does it."""
        x, _ = self.batch()
        steps = self.setting.steps
        method = self.setting.method
        with_teacher = method != "trades"

        def walk(model: nn.Module, backward: bool) -> None:
            images = x.detach().requires_grad_(backward)
            z = model(images)
            if backward:
                torch.autograd.grad(z, images, torch.ones_like(z))

        def teacher() -> None:
            # AdaAD differentiates through the teacher at each step and asks once more; RSLAD asks once.
            for _ in range(steps if method == "adaad" else 0):
                walk(self.lean_teacher, True)
            if with_teacher:
                with torch.no_grad():
                    self.teacher(x)

        def student() -> None:
            for _ in range(steps):
                walk(self.lean_student, True)
            if method == "trades":  # the clean target of the attack
                with torch.no_grad():
                    walk(self.lean_student, False)
            self.student.train()
            outputs = [self.student(x) for _ in range(1 if method == "adaad" else 2)]
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(outputs, [torch.ones_like(z) for z in outputs])

        z = torch.randn(self.setting.batch, CLASSES)
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
            self.optimizer.step()
            self.lean_student.refresh_()

        return {"teacher": teacher, "student": student, "loss": loss, "step": step, "data": self.batch}


def build(setting: Setting, smoke: bool) -> tuple[dict[str, Callable[[], Any]], OurStep]:
    """Every variant on networks of its own, of the same initial weights, and our fp32 step."""
    torch.manual_seed(0)
    teacher = create_model(setting.teacher, num_classes=CLASSES, in_channels=setting.channels).eval()
    student = create_model(setting.student, num_classes=CLASSES, in_channels=setting.channels)
    count = 4 * setting.batch
    images = torch.randint(256, (count, setting.channels, setting.size, setting.size), dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,))
    loader = torch.utils.data.DataLoader(
        PerImageData(images, labels), setting.batch, shuffle=True, drop_last=True
    )

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    def pair(channels_last: bool = False) -> tuple[nn.Module, nn.Module]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        made = [copy.deepcopy(model).to(memory_format=layout) for model in (student, teacher)]
        return made[0], made[1].eval()

    settings = (EPS, STEP_SIZE, setting.steps)
    official = partial(official_step, setting.method, settings=settings)
    ours = OurStep(setting, *pair(), (images, labels), "fp32")
    calls: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "ours bf16": OurStep(setting, *pair(), (images, labels), "bf16"),
        "official": official(*pair(), partial(next, endless())),
        "official autocast": official(
            *pair(True), partial(next, endless()), autocast=True, channels_last=True
        ),
    }
    if not smoke:
        networks = pair()
        compiled = (torch.compile(networks[0]), torch.compile(networks[1]))
        calls["official compile"] = official(*networks, partial(next, endless()), attacked=compiled)
    return calls, ours


def run(settings: list[Setting], options: Options, limits: Any) -> list[Record]:
    """Measure every setting, printing a line for each of our variants."""
    records: list[Record] = []
    print(f"{'training step':<58} {'variant':<10}" + "".join(f"{peer:>20}" for peer in PEERS))
    for setting in settings:
        torch._dynamo.reset()
        calls, ours = build(setting, options.smoke)
        losses = {name: float(call()) for name, call in calls.items()}
        parts = {f"part {name}": call for name, call in ours.parts().items()}
        with OtherLoad() as load:
            rounds = {"min_rounds": 1, "warmup": 0} if options.smoke else {"min_rounds": 5, "warmup": 2}
            times = interleave({**calls, **parts}, budget=options.seconds * 4, **rounds)
        found = records_of(setting.name, times, peers=PEERS, skip=tuple(parts))
        whole = times["ours"].median
        share = {name.removeprefix("part "): times[name].median / whole for name in parts}
        for name, record in found.items():
            record.peak_bytes = peak_memory(calls[name])
            record.details = {
                "first_loss": losses[name],
                "images_per_second": setting.batch / times[name].median,
                "other_load": load.fraction,
            }
        found["ours"].details["share"] = {**share, "rest": 1 - sum(share.values())}
        records += found.values()
        for name in ("ours", "ours bf16"):
            over = "".join(
                f"{found[name].speedup[p]['median']:>20.2f}" if p in found[name].speedup else f"{'-':>20}"
                for p in PEERS
            )
            print(f"{setting.name:<58} {name:<10}{over}", flush=True)
    return records


def wrong_answers(records: list[Record]) -> Iterator[str]:
    """A sentence for every first loss that is not the official step's.

    The batches differ (each variant draws its own), the networks and the objective do not: a loss of a fresh network
    that is off by half its size is another loss.
    """
    official = {r.group: r.details["first_loss"] for r in records if r.variant == "official"}
    for record in records:
        first, expected = record.details["first_loss"], official[record.group]
        if not abs(first - expected) <= 0.5 * abs(expected) + 1e-3:
            yield f"{record.name}: the first loss is {first:g}, the official step's {expected:g}"
