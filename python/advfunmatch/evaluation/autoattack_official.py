"""The official AutoAttack, through `pyautoattack`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LOGGER = "auto-attack"  # pyautoattack's


def autoattack_official(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> Tensor:
    """AutoAttack, standard version, by pyautoattack on the network as it is."""
    from pyautoattack import AutoAttack

    kwargs: dict[str, Any] = {"version": "standard"}
    with torch.no_grad():
        num_classes = len(model(x[:1])[0])
    if num_classes < 4:
        # The targeted DLR loss needs the third and fourth largest logit.
        kwargs = {"version": "custom", "attacks": ["apgd-ce", "fab", "square"]}
    adversary = AutoAttack(
        model, device=x.device, eps=eps, norm={"linf": "Linf", "l2": "L2"}[norm], seed=seed, **kwargs
    )
    targets = min(9, num_classes - 1)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    with _stages(adversary.attacks_to_run, len(x), progress):
        x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=batch_size)
    return x_adv


@contextmanager
def _stages(attacks: list[str], images: int, progress: Callable[[int], None]) -> Iterator[None]:
    """Progress from what it logs of its batches, as if each of its attacks had an equal share of the images."""

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = re.match(r"(\S+) - (\d+)/(\d+) - ", record.getMessage())
            if found and found[1] in attacks:
                done = attacks.index(found[1]) + int(found[2]) / int(found[3])
                progress(int(images * done / len(attacks)))

    logger, handler = logging.getLogger(LOGGER), Reader(logging.DEBUG)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def warnings_of_autoattack(into: list[str]) -> Iterator[None]:
    """Collect what AutoAttack warns about (masked gradients, randomised outputs) instead of printing it."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            into.append(record.getMessage())

    logger, handler = logging.getLogger(LOGGER), Collector(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
