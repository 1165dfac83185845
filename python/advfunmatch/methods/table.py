"""The methods that the package brings: an attack, an outer loss, and defaults with their sources."""

from __future__ import annotations

from typing import Any

from ..attacks import FixedTeacher, Mismatch, PGDAttack
from ..config import TrainConfig
from .method import MATCHING, METHODS, Default, Method, get_method, register_method
from .terms import (
    cross_entropy_adversarial,
    cross_entropy_clean,
    iad,
    mart,
    match_adversarial,
    match_clean,
    mixed,
    trades,
)

__all__ = ["METHODS", "make_attack"]

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

ROWS = (
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
        mixed(match_clean, cross_entropy_clean),
        needs_teacher=True,
        needs_labels=True,
        source="Hinton et al. 2015",
        reads=("alpha", "label_smoothing", *MATCHING),
        defaults={
            "alpha": Default(0.9, REPDISTILLER),
            "temperature": Default(4.0, REPDISTILLER),
            "reduction": Default("batchmean", "Hinton et al. 2015"),
            "scale_by_t2": Default(True, "Hinton et al. 2015"),
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
        keep="last",  # as its code does
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
            "teacher_input": Default("adversarial", "arXiv 2305.14700: matches on the mismatched examples"),
            "teacher_gradient": Default(True, ABSTRACT_ONLY + " (as AdaAD)"),
            "attack_init": Default("gaussian", ABSTRACT_ONLY + " (as AdaAD)"),
            "attack_bn": Default("eval", ABSTRACT_ONLY + " (as AdaAD)"),
        },
    ),
)
for _row in ROWS:
    register_method(_row)


def make_attack(config: TrainConfig) -> PGDAttack | None:
    """The training attack of a resolved configuration, or None for a method that trains on clean images."""
    method = get_method(config.method)
    objective: Any = method.objective
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
        keep=method.keep,
    )
