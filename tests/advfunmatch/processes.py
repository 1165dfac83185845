"""Processes that start with everything imported: forks of a server that did it once, a tenth of a second each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["advfunmatch.cli", "advfunmatch.progress", "torch._dynamo", "sklearn.datasets"]
)


def start(
    arguments: list[str],
    said: Path,
    *,
    environment: dict[str, str] | None = None,
    dies: tuple[str, int] | None = None,
) -> ForkServerProcess:
    """`advfunmatch ARGUMENTS` in a process of its own.

    Args:
        arguments: of the command line.
        said: a file for what it writes to stdout and stderr.
        environment: variables on top of this process's.
        dies: a function such as "os.replace", and at which of its calls the process sends itself SIGKILL.
    """
    process = SERVER.Process(target=_work, args=(arguments, said, environment or {}, dies))
    process.start()
    return process


def _work(
    arguments: list[str], said: Path, environment: dict[str, str], dies: tuple[str, int] | None
) -> None:
    import torch
    from advfunmatch.cli import main

    os.environ.update(environment)
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    if dies:
        _die_in(*dies)
    main(arguments)


def _die_in(name: str, call: int) -> None:
    module, _, function = name.rpartition(".")
    owner = sys.modules[module]
    real: Callable[..., object] = getattr(owner, function)
    calls: list[int] = []

    def last(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(owner, function, last)
