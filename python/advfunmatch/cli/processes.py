"""`--processes N` of train and evaluate: what torchrun does on one machine, without its forty lines about an error.

Every process runs the same command in a session of its own, so that Ctrl-C reaches this one alone, which passes it on
once. The first process speaks (see Note [Exit codes] in ``cli``); this one only says if one was killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from ..errors import InputError

PATIENCE = 10.0  # seconds for the first process to say what is wrong, after another has ended
STEP = 0.05


class ProcessesEnded(Exception):
    """What was asked for was done elsewhere, and everything about it has been said; `code` is how it ended."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def in_processes(count: int | None, arguments: Sequence[str]) -> bool:
    """Whether this is one of several processes; starts them first where it is not, and should be.

    Raises:
        InputError: a number of processes that cannot be.
        ProcessesEnded: as `run_in_processes`.
    """
    if count is not None and count < 1:
        raise InputError(f"processes is {count}, but must be at least 1")
    if count is not None and count > 1 and "WORLD_SIZE" not in os.environ:
        run_in_processes(count, arguments)
    return os.environ.get("WORLD_SIZE", "1") != "1"


def run_in_processes(count: int, arguments: Sequence[str]) -> NoReturn:
    """Run the command line with those arguments in `count` processes that find each other.

    Raises:
        ProcessesEnded: always, with 0 if all ended well, else the first process's exit code, or that of the one that
            failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "advfunmatch", *arguments],
            env=threads | os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(count)
    ]

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        raise ProcessesEnded(_wait(processes))
    finally:
        for process in processes:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all, or for one that fails and then for the first; the exit code."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if None not in codes or failed:
            break
        time.sleep(STEP)
    if not failed:
        return 0
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            print(f"error: process {rank} of {len(processes)} was ended by {name}", file=sys.stderr)
    deadline = time.monotonic() + PATIENCE
    while processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(STEP)
    code = processes[0].returncode or failed[0]
    return code if code > 0 else 128 - code
