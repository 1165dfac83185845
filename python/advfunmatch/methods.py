"""The methods as a table: an attack, an outer loss, and defaults with their sources.

Note [Methods]
~~~~~~~~~~~~~~
A method is one `Method` in `METHODS`. Its attack says which objective `PGDAttack` maximises; its loss is a function of
the logits on clean and adversarial images (`Logits`) and of the settings. Nothing is computed that a loss does not ask
for, so a term of weight zero costs nothing. Settings that papers disagree about are fields of `TrainConfig`
(temperature, alpha, beta, reduction, ...) that are None until the method's default, with its source, fills them in.

S is the student, T the teacher, x the images, x' the adversarial ones, and KL(a‖b) the divergence between softmaxes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afm_kernels import softmax_kl_div

from .attack import PGDAttack
from .errors import one_of
from .objectives import FixedTeacher, Mismatch

if TYPE_CHECKING:
    from .config import TrainConfig

Network = Callable[[Tensor], Tensor]


class Logits:
    """What both networks say about one batch; each runs on each input once, when a loss first asks for it."""

    def __init__(
        self, student: Network, teacher: Network | None, x: Tensor, x_adv: Tensor, labels: Tensor, epoch: int
    ) -> None:
        self.student, self.teacher = student, teacher
        self.x, self.x_adv, self.labels, self.epoch = x, x_adv, labels, epoch

    @cached_property
    def student_clean(self) -> Tensor:
        return self.student(self.x)

    @cached_property
    def student_adv(self) -> Tensor:
        return self.student(self.x_adv)

    @cached_property
    def teacher_clean(self) -> Tensor:
        return self._teacher(self.x)

    @cached_property
    def teacher_adv(self) -> Tensor:
        return self._teacher(self.x_adv)

    @torch.no_grad()
    def _teacher(self, x: Tensor) -> Tensor:
        if self.teacher is None:
            raise RuntimeError("a loss that matches a teacher was called without one")
        return self.teacher(x)


@dataclass(frozen=True)
class Default:
    """The value of one setting, and where it comes from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Method:
    """One row of the table. See Note [Methods].

    Attributes:
        name: what ``--method`` takes.
        formula: the outer loss, as printed by ``advfunmatch methods``.
        objective: what the attack maximises; None trains on clean images.
        loss: the outer loss of one batch.
        needs_teacher: whether a teacher must be given.
        needs_labels: whether the labels of the training images are used.
        defaults: settings of `TrainConfig` that this method fills in.
        source: the paper, and the code that the defaults were read in.
    """

    name: str
    formula: str
    objective: str | None
    loss: Callable[[Logits, TrainConfig], Tensor]
    needs_teacher: bool
    needs_labels: bool
    source: str
    defaults: Mapping[str, Default] = field(default_factory=dict)


def _match(student: Tensor, target: Tensor, config: TrainConfig) -> Tensor:
    """KL(target ‖ student) with the settings' temperature, T² and reduction."""
    return softmax_kl_div(
        student,
        target,
        temperature=config.temperature,
        reduction=config.reduction,
        scale_by_t2=config.scale_by_t2,
    )


def _cross_entropy(logits: Tensor, labels: Tensor, config: TrainConfig) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)


def ce(logits: Logits, config: TrainConfig) -> Tensor:
    return _cross_entropy(logits.student_clean, logits.labels, config)


def funmatch(logits: Logits, config: TrainConfig) -> Tensor:
    return _match(logits.student_clean, logits.teacher_clean, config)


def pgd_at(logits: Logits, config: TrainConfig) -> Tensor:
    return _cross_entropy(logits.student_adv, logits.labels, config)


def advfunmatch(logits: Logits, config: TrainConfig) -> Tensor:
    target = logits.teacher_adv if config.teacher_input == "adversarial" else logits.teacher_clean
    return _match(logits.student_adv, target, config)


ABSTRACT_ONLY = "arXiv 2305.14700; not in its abstract, so this project's choice"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "ce",
            "CE(S(x), y)",
            None,
            ce,
            needs_teacher=False,
            needs_labels=True,
            source="ordinary training",
        ),
        Method(
            "funmatch",
            "T²·KL(T(x)‖S(x))",
            None,
            funmatch,
            needs_teacher=True,
            needs_labels=False,
            source="Beyer et al. 2022; google-research/big_vision",
            defaults={
                "temperature": Default(1.0, "big_vision configs/proj/distill/bit_i1k.py"),
                "reduction": Default("batchmean", "big_vision: mean over the batch"),
                "scale_by_t2": Default(True, "Hinton et al. 2015; no effect at T = 1"),
            },
        ),
        Method(
            "pgd_at",
            "CE(S(x'), y)",
            "cross_entropy",
            pgd_at,
            needs_teacher=False,
            needs_labels=True,
            source="Madry et al. 2018",
            defaults={
                "attack_init": Default("uniform", "Madry et al. 2018"),
                "attack_bn": Default("eval", "as TRADES and AdaAD attack; Fast-AT's code uses train"),
            },
        ),
        Method(
            "advfunmatch",
            "T²·KL(T(x')‖S(x'))",
            "mismatch",
            advfunmatch,
            needs_teacher=True,
            needs_labels=False,
            source="AdvFunMatch, arXiv 2305.14700 (abstract)",
            defaults={
                "temperature": Default(1.0, ABSTRACT_ONLY),
                "reduction": Default("batchmean", ABSTRACT_ONLY),
                "scale_by_t2": Default(True, ABSTRACT_ONLY),
                "teacher_input": Default(
                    "adversarial", "arXiv 2305.14700: matches on the mismatched examples"
                ),
                "teacher_gradient": Default(True, ABSTRACT_ONLY + " (as AdaAD)"),
                "attack_init": Default("gaussian", ABSTRACT_ONLY + " (as AdaAD)"),
                "attack_bn": Default("eval", ABSTRACT_ONLY + " (as AdaAD)"),
            },
        ),
    )
}


def get_method(name: str) -> Method:
    """The method of that name; InputError lists the names if there is none."""
    if name not in METHODS:
        raise one_of("method", name, METHODS)
    return METHODS[name]


def make_attack(config: TrainConfig) -> PGDAttack | None:
    """The training attack of a resolved configuration, or None for a method that trains on clean images."""
    objective: Any = get_method(config.method).objective
    if objective is None:
        return None
    if objective == "mismatch":
        objective = Mismatch(config.temperature, config.teacher_gradient)
    elif objective == "fixed_teacher":
        objective = FixedTeacher(config.temperature)
    return PGDAttack(
        objective=objective,
        norm=config.norm,
        eps=config.eps,
        step_size=config.step_size,
        steps=config.steps,
        init=config.attack_init,
        bn=config.attack_bn,
        clip=(0.0, 1.0),
    )
