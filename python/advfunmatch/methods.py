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
from torch import Tensor

from afm_kernels import distillation_loss, softmax_kl_div

from .attack import PGDAttack
from .errors import one_of
from .objectives import FixedTeacher, Mismatch

if TYPE_CHECKING:
    from .config import TrainConfig

Network = Callable[[Tensor], Tensor]


class Logits:
    """What both networks say about one batch; each runs on each input once, when a loss first asks for it."""

    def __init__(
        self, student: Network, teacher: Network | None, x: Tensor, labels: Tensor, epoch: int
    ) -> None:
        self.student, self.teacher = student, teacher
        self.x, self.x_adv, self.labels, self.epoch = x, x, labels, epoch

    def for_student(self, student: Network) -> Logits:
        """The same batch for another student; what the teacher said is kept."""
        other = Logits(student, self.teacher, self.x, self.labels, self.epoch)
        other.x_adv = self.x_adv
        kept = ("teacher_clean", "teacher_adv")
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name in kept})
        return other

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


Loss = Callable[[Logits, "TrainConfig"], Tensor]

# Settings that an attack on each objective looks at, besides eps and norm, with which every run is evaluated.
ANY_ATTACK = ("steps", "early_steps", "step_size", "attack_init", "attack_bn", "lean")
ATTACK_READS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "cross_entropy": ANY_ATTACK,
    "fixed_teacher": (*ANY_ATTACK, "temperature"),
    "mismatch": (*ANY_ATTACK, "temperature", "teacher_gradient"),
}
MATCHING = ("temperature", "reduction", "scale_by_t2")
LOSS_READS = ("alpha", "beta", "begin_epoch", "detach_target", "label_smoothing", "teacher_input", *MATCHING)
SETTINGS = (*ANY_ATTACK, "teacher_gradient", *LOSS_READS)  # that not every method uses


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
        source: the paper, and the code that the defaults were read in.
        reads: those of `SETTINGS` that the loss looks at; None does not say.
        defaults: settings that this method fills in.
    """

    name: str
    formula: str
    objective: str | None
    loss: Loss
    needs_teacher: bool
    needs_labels: bool
    source: str
    reads: tuple[str, ...] | None = None
    defaults: Mapping[str, Default] = field(default_factory=dict)

    @property
    def unused(self) -> tuple[str, ...]:
        """Settings that neither the loss nor the attack looks at."""
        if self.reads is None:
            return ()
        return tuple(name for name in SETTINGS if name not in (*self.reads, *ATTACK_READS[self.objective]))


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
    # With alpha = 0 the fused loss is the cross-entropy alone, and looks at no teacher.
    return distillation_loss(
        logits, logits.detach(), labels, alpha=0.0, temperature=1.0, label_smoothing=config.label_smoothing
    )


def cross_entropy_clean(logits: Logits, config: TrainConfig) -> Tensor:
    """CE(S(x), y)."""
    return _cross_entropy(logits.student_clean, logits.labels, config)


def cross_entropy_adversarial(logits: Logits, config: TrainConfig) -> Tensor:
    """CE(S(x'), y)."""
    return _cross_entropy(logits.student_adv, logits.labels, config)


def match_clean(logits: Logits, config: TrainConfig) -> Tensor:
    """KL(T(x) ‖ S(x))."""
    return _match(logits.student_clean, logits.teacher_clean, config)


def match_adversarial(logits: Logits, config: TrainConfig) -> Tensor:
    """KL(T(x') ‖ S(x')), or KL(T(x) ‖ S(x')) where `teacher_input` is clean."""
    adversarial = config.teacher_input == "adversarial"
    target = logits.teacher_adv if adversarial else logits.teacher_clean
    return _match(logits.student_adv, target, config)


def mixed(first: Loss, second: Loss) -> Loss:
    """α of one loss and 1 − α of another; what has no weight is not computed."""

    def loss(logits: Logits, config: TrainConfig) -> Tensor:
        weights = ((config.alpha, first), (1 - config.alpha, second))
        terms = [weight * term(logits, config) for weight, term in weights if weight]
        return sum(terms[1:], terms[0])

    return loss


def kd(logits: Logits, config: TrainConfig) -> Tensor:
    """(1-α)·CE(S(x), y) + α·T²·KL(T(x) ‖ S(x)), in one pass over the logits."""
    return distillation_loss(
        logits.student_clean,
        logits.teacher_clean,
        logits.labels,
        alpha=config.alpha,
        temperature=config.temperature,
        label_smoothing=config.label_smoothing,
        reduction=config.reduction,
    )


def trades(logits: Logits, config: TrainConfig) -> Tensor:
    """CE(S(x), y) + β·KL(S(x) ‖ S(x')), with a gradient through both sides of the divergence."""
    clean = logits.student_clean
    robust = _match(logits.student_adv, clean.detach() if config.detach_target else clean, config)
    return cross_entropy_clean(logits, config) + config.beta * robust


def mart(logits: Logits, config: TrainConfig) -> Tensor:
    """Cross-entropy and a margin on x', and the divergence from x where the student is unsure of the label there."""
    labels = logits.labels[:, None]
    adversarial = logits.student_adv.softmax(1)
    # The largest probability of a wrong class; the constants inside the logarithms are the official code's.
    wrong = adversarial.scatter(1, labels, -1.0).amax(1)
    boosted = cross_entropy_adversarial(logits, config) - (1.0001 - wrong + 1e-12).log().mean()
    unsure = 1.0000001 - logits.student_clean.softmax(1).gather(1, labels).squeeze(1)
    rows = softmax_kl_div(logits.student_adv, logits.student_clean, reduction="none")
    return boosted + config.beta * (rows * unsure).mean()


def iad(logits: Logits, config: TrainConfig) -> Tensor:
    """The match on x', and from `begin_epoch` on the student's own clean outputs where the teacher is not trusted."""
    loss = match_adversarial(logits, config)
    if logits.epoch < config.begin_epoch:
        return loss
    # How far the teacher is to be trusted on x': its probability of the label there, to the power β.
    trust = logits.teacher_adv.softmax(1).gather(1, logits.labels[:, None]).squeeze(1) ** config.beta
    own = softmax_kl_div(logits.student_adv, logits.student_clean, reduction="none")
    return loss + (own * (1 - trust)).mean()


ABSTRACT_ONLY = "arXiv 2305.14700; not in its abstract, so this project's choice"
ARD_CODE = "goldblum/AdversariallyRobustDistillation main.py"
RSLAD_LOSS = "zibojia/RSLAD resnet18_rslad_cifar10.py"
RSLAD_ATTACK = "zibojia/RSLAD rslad_loss.py"
ADAAD_LOSS = "boyellow/AdaAD main.py"
ADAAD_ATTACK = "boyellow/AdaAD AT_helper.py"
IAD_CODE = "ZFancy/IAD IAD-I.py"
TRADES_CODE = "yaodongyu/TRADES trades.py"
MART_CODE = "YisenWang/MART mart.py"
REPDISTILLER = "HobbitLong/RepDistiller (Tian et al. 2020)"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "ce",
            "CE(S(x), y)",
            None,
            cross_entropy_clean,
            needs_teacher=False,
            needs_labels=True,
            source="ordinary training",
            reads=("label_smoothing",),
        ),
        Method(
            "kd",
            "(1-α)·CE(S(x), y) + α·T²·KL(T(x)‖S(x))",
            None,
            kd,
            needs_teacher=True,
            needs_labels=True,
            source="Hinton et al. 2015",
            reads=("alpha", "temperature", "reduction", "label_smoothing"),
            defaults={
                "alpha": Default(0.9, REPDISTILLER),
                "temperature": Default(4.0, REPDISTILLER),
                "reduction": Default("batchmean", "Hinton et al. 2015"),
                "scale_by_t2": Default(True, "Hinton et al. 2015; always on for kd"),
            },
        ),
        Method(
            "funmatch",
            "T²·KL(T(x)‖S(x))",
            None,
            match_clean,
            needs_teacher=True,
            needs_labels=False,
            source="Beyer et al. 2022",
            reads=MATCHING,
            defaults={
                "temperature": Default(1.0, "google-research/big_vision configs/proj/distill/bit_i1k.py"),
                "reduction": Default("batchmean", "google-research/big_vision"),
                "scale_by_t2": Default(True, "Hinton et al. 2015; no effect at T = 1"),
            },
        ),
        Method(
            "pgd_at",
            "CE(S(x'), y)",
            "cross_entropy",
            cross_entropy_adversarial,
            needs_teacher=False,
            needs_labels=True,
            source="Madry et al. 2018",
            reads=("label_smoothing",),
            defaults={
                "attack_init": Default("uniform", "Madry et al. 2018"),
                "attack_bn": Default("eval", "as TRADES and AdaAD attack; Fast-AT's code uses train"),
            },
        ),
        Method(
            "trades",
            "CE(S(x), y) + β·KL(S(x)‖S(x'))",
            "fixed_teacher",
            trades,
            needs_teacher=False,
            needs_labels=True,
            source="Zhang et al. 2019",
            reads=("beta", "detach_target", "label_smoothing", *MATCHING),
            defaults={
                "beta": Default(6.0, "yaodongyu/TRADES train_trades_cifar10.py"),
                "reduction": Default("batchmean", TRADES_CODE),
                "detach_target": Default(False, TRADES_CODE),
                "attack_init": Default("gaussian", TRADES_CODE),
                "attack_bn": Default("eval", TRADES_CODE),
            },
        ),
        Method(
            "mart",
            "BCE(S(x'), y) + β·(1-p_S(y|x))·KL(S(x)‖S(x'))",
            "cross_entropy",
            mart,
            needs_teacher=False,
            needs_labels=True,
            source="Wang et al. 2020",
            reads=("beta", "label_smoothing"),
            defaults={
                "beta": Default(6.0, MART_CODE + " (its function's default; its script passes 5)"),
                "attack_init": Default("gaussian", MART_CODE),
                "attack_bn": Default("eval", MART_CODE),
            },
        ),
        Method(
            "ard",
            "α·T²·KL(T(x)‖S(x')) + (1-α)·CE(S(x), y)",
            "cross_entropy",
            mixed(match_adversarial, cross_entropy_clean),
            needs_teacher=True,
            needs_labels=True,
            source="Goldblum et al. 2020",
            reads=("alpha", "teacher_input", "label_smoothing", *MATCHING),
            defaults={
                "alpha": Default(1.0, ARD_CODE),
                "temperature": Default(30.0, ARD_CODE),
                "scale_by_t2": Default(True, ARD_CODE),
                "reduction": Default("mean", ARD_CODE + ": nn.KLDivLoss() divides by classes too"),
                "teacher_input": Default("clean", ARD_CODE),
                "attack_init": Default("uniform", ARD_CODE),
                "attack_bn": Default("train", ARD_CODE + ": the network stays in train mode"),
            },
        ),
        Method(
            "rslad",
            "α·KL(T(x)‖S(x')) + (1-α)·KL(T(x)‖S(x))",
            "fixed_teacher",
            mixed(match_adversarial, match_clean),
            needs_teacher=True,
            needs_labels=False,
            source="Zi et al. 2021",
            reads=("alpha", "teacher_input", *MATCHING),
            defaults={
                "alpha": Default(5 / 6, RSLAD_LOSS),
                "temperature": Default(1.0, RSLAD_LOSS),
                "reduction": Default("mean", RSLAD_LOSS + ": torch.mean over classes too"),
                "teacher_input": Default("clean", RSLAD_LOSS),
                "attack_init": Default("gaussian", RSLAD_ATTACK),
                "attack_bn": Default("eval", RSLAD_ATTACK),
            },
        ),
        Method(
            "iad",
            "T²·KL(T(x)‖S(x')) + [epoch ≥ begin]·(1-p_T(y|x')^β)·KL(S(x)‖S(x'))",
            "cross_entropy",
            iad,
            needs_teacher=True,
            needs_labels=True,
            source="Zhu et al. 2022",
            reads=("beta", "begin_epoch", "teacher_input", *MATCHING),
            defaults={
                "beta": Default(0.1, IAD_CODE),
                "begin_epoch": Default(60, IAD_CODE),
                "temperature": Default(1.0, IAD_CODE),
                "scale_by_t2": Default(True, IAD_CODE),
                "reduction": Default("batchmean", IAD_CODE),
                "teacher_input": Default("clean", IAD_CODE),
                "attack_init": Default("uniform", IAD_CODE),
                "attack_bn": Default("train", IAD_CODE + ": the network stays in train mode"),
            },
        ),
        Method(
            "adaad",
            "α·KL(T(x')‖S(x')) + (1-α)·KL(T(x)‖S(x))",
            "mismatch",
            mixed(match_adversarial, match_clean),
            needs_teacher=True,
            needs_labels=False,
            source="Huang et al. 2023",
            reads=("alpha", "teacher_input", *MATCHING),
            defaults={
                "alpha": Default(1.0, ADAAD_LOSS),
                "temperature": Default(1.0, ADAAD_LOSS),
                "reduction": Default("mean", ADAAD_LOSS + " on CIFAR-10; batchmean on CIFAR-100"),
                "teacher_input": Default("adversarial", ADAAD_LOSS),
                "teacher_gradient": Default(True, ADAAD_ATTACK),
                "attack_init": Default("gaussian", ADAAD_ATTACK),
                "attack_bn": Default("eval", ADAAD_ATTACK),
            },
        ),
        Method(
            "advfunmatch",
            "T²·KL(T(x')‖S(x'))",
            "mismatch",
            match_adversarial,
            needs_teacher=True,
            needs_labels=False,
            source="AdvFunMatch, arXiv 2305.14700 (abstract)",
            reads=("teacher_input", *MATCHING),
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


def methods_text() -> str:
    """The table as text, for `advfunmatch methods`."""
    attacks = {
        None: "none: clean images",
        "cross_entropy": "max CE(S(x'), y)",
        "mismatch": "max KL(T(x')‖S(x')), through both networks",
    }
    lines = ["S student, T teacher, x images, x' adversarial images, y labels; every method takes --awp", ""]
    for method in METHODS.values():
        fixed = "T" if method.needs_teacher else "S"
        attack = attacks.get(method.objective, f"max KL({fixed}(x)‖S(x')), {fixed}(x) fixed")
        needs = [
            name
            for name, needed in (("teacher", method.needs_teacher), ("labels", method.needs_labels))
            if needed
        ]
        lines += [
            f"{method.name}  ({method.source})",
            f"  loss    {method.formula}",
            f"  attack  {attack}",
            f"  needs   {' and '.join(needs)}",
        ]
        for name, default in method.defaults.items():
            lines.append(f"  {_as_flag(name, default.value)}".ljust(34) + default.source)
        lines.append("")
    return "\n".join(lines).rstrip()


def _as_flag(name: str, value: Any) -> str:
    """A setting as it is typed on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value:.4g}" if isinstance(value, float) else f"--{name} {value}"
