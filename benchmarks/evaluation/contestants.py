"""The programs that evaluate: each says which images are robust, and how long its stages took."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from advfunmatch import AutoAttack, prepare_for_attack
from advfunmatch.attacks.stages import stage
from torch import Tensor, nn

STANDARD = ("apgd_ce", "apgd_t", "fab_t", "square")


@dataclass
class Evaluated:
    """What one program found.

    Attributes:
        robust: (N,) bool.
        seconds: of each stage, and "all" of them with what is around them.
        left: how many images each stage was given.
        forwards, backwards: images, by stage, where the program counts them.
    """

    robust: Tensor
    seconds: dict[str, float]
    left: dict[str, int] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)
    backwards: dict[str, int] = field(default_factory=dict)
    unverified: int = 0


Contestant = Callable[[Tensor, Tensor, float, str, int, int, float], Evaluated]
"""Images, labels, eps, norm, seed, batch size, and the share of all steps and queries that is made."""


def ours(model: nn.Module, names: tuple[str, ...] = STANDARD) -> Contestant:
    def run(x: Tensor, y: Tensor, eps: float, norm: str, seed: int, batch: int, share: float) -> Evaluated:
        settings = {name: {"steps": round(100 * share)} for name in names}
        if "square" in names:
            settings["square"] = {"queries": round(5000 * share)}
        stages = {name: stage(name, norm, eps, **settings[name]) for name in names}
        started = time.perf_counter()
        found = AutoAttack(norm, eps, seed=seed, stages=stages, batch_size=batch)(model, x, y)
        seconds = {each.name: each.seconds for each in found.stages}
        seconds["all"] = time.perf_counter() - started
        return Evaluated(
            found.robust,
            seconds,
            {each.name: each.images for each in found.stages},
            {each.name: each.forwards for each in found.stages},
            {each.name: each.backwards for each in found.stages},
            sum(each.unverified for each in found.stages),
        )

    return run


def official(model: nn.Module, names: tuple[str, ...] = STANDARD, prepared: bool = False) -> Contestant:
    """pyautoattack, its parameters frozen, on the network as it is or on a prepared one."""
    network = prepare_for_attack(model) if prepared else model

    def run(x: Tensor, y: Tensor, eps: float, norm: str, seed: int, batch: int, share: float) -> Evaluated:
        from pyautoattack import AutoAttack as Official

        adversary = Official(network, eps=eps, norm={"linf": "Linf", "l2": "L2"}[norm], seed=seed)
        for attack in (adversary.apgd, adversary.apgd_targeted, adversary.fab):
            attack.n_iter = round(100 * share)
        adversary.square.n_queries = round(5000 * share)
        adversary.attacks_to_run = [name.replace("_", "-") for name in names]
        started = time.perf_counter()
        with _stage_times() as said:
            x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=batch)
        seconds = said()
        seconds["all"] = time.perf_counter() - started
        with torch.no_grad():
            robust = torch.cat([model(part) for part in x_adv.split(batch)]).argmax(1) == y
        return Evaluated(robust, seconds)

    return run


class _stage_times:
    """When pyautoattack begins and ends its stages, from what it logs."""

    def __enter__(self) -> Callable[[], dict[str, float]]:
        self.marks: list[tuple[str, float]] = []
        outer = self

        class Reader(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                text = record.getMessage()
                if text.startswith("running "):
                    outer.marks.append((text.removeprefix("running ").replace("-", "_"), time.perf_counter()))
                elif text.startswith("robust accuracy after"):
                    outer.marks.append(("", time.perf_counter()))

        self.logger, self.handler = logging.getLogger("auto-attack"), Reader(logging.DEBUG)
        self.before = self.logger.level, self.logger.propagate
        self.logger.addHandler(self.handler)
        self.logger.setLevel(logging.DEBUG)
        self.logger.propagate = False
        return self.times

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self.handler)
        self.logger.level, self.logger.propagate = self.before

    def times(self) -> dict[str, float]:
        found = {}
        for (name, begun), (_, ended) in zip(self.marks, self.marks[1:], strict=False):
            if name:
                found[name] = ended - begun
        return found


def torchattacks_autoattack(model: nn.Module) -> Contestant:
    """torchattacks' AutoAttack, which takes 10 steps where the protocol takes 100; the share is none of its own."""

    def run(x: Tensor, y: Tensor, eps: float, norm: str, seed: int, batch: int, share: float) -> Evaluated:
        import torchattacks

        attack = torchattacks.AutoAttack(
            model,
            norm={"linf": "Linf", "l2": "L2"}[norm],
            eps=eps,
            version="standard",
            n_classes=10,
            seed=seed,
        )
        started = time.perf_counter()
        x_adv = torch.cat([attack(a, b) for a, b in zip(x.split(batch), y.split(batch), strict=True)])
        seconds = {"all": time.perf_counter() - started}
        with torch.no_grad():
            return Evaluated(model(x_adv).argmax(1) == y, seconds)

    return run


def adv_lib_apgd(model: nn.Module) -> Contestant:
    """adv-lib's APGD-CE and APGD-T, one after the other on what is left; it has no FAB-T or Square."""

    def run(x: Tensor, y: Tensor, eps: float, norm: str, seed: int, batch: int, share: float) -> Evaluated:
        from adv_lib.attacks import apgd, apgd_targeted

        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "norm": {"linf": float("inf"), "l2": 2}[norm],
            "n_iter": round(100 * share),
        }
        started = time.perf_counter()
        robust, seconds, left = torch.ones(len(x), dtype=torch.bool), {}, {}
        for name, attack in (("apgd_ce", apgd), ("apgd_t", apgd_targeted)):
            begun = time.perf_counter()
            rows = robust.nonzero().flatten()
            left[name] = len(rows)
            for part in rows.split(batch):
                x_adv = attack(model, x[part], y[part], eps=eps, **settings)
                with torch.no_grad():
                    robust[part] &= model(x_adv).argmax(1) == y[part]
            seconds[name] = time.perf_counter() - begun
        seconds["all"] = time.perf_counter() - started
        return Evaluated(robust, seconds, left)

    return run


def contestants(model: nn.Module, names: tuple[str, ...]) -> dict[str, Contestant]:
    """All that are installed."""
    found = {
        "ours": ours(model, names),
        "official": official(model, names),
        "official, prepared": official(model, names, prepared=True),
    }
    if importlib.util.find_spec("torchattacks"):
        found["torchattacks"] = torchattacks_autoattack(model)
    if importlib.util.find_spec("adv_lib"):
        found["adv-lib, APGD only"] = adv_lib_apgd(model)
    return found
