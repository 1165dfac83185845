"""Runs of pytest, and of programs, that start with everything imported: forks of a process that did it once.

Importing PyTorch takes seconds, a fork a tenth of one. What is decided at an import (TRITON_INTERPRET) goes into the
environment of the ``Host``; what is decided later (AFM_CPU_CAPABILITY, which the first operator reads) into that of a
run.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    returncode: int
    said: str  # on stdout and stderr


class Host:
    """The process whose forks run. A context manager, because it waits for work until its stdin is closed."""

    def __init__(self, **environment: str) -> None:
        paths = [
            str(Path(__file__).parent),
            str(ROOT),
            str(ROOT / "python"),
            os.environ.get("PYTHONPATH", ""),
        ]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.communicate(timeout=300)

    def pytest(self, *arguments: str, **environment: str) -> Done:
        """``python -m pytest ARGUMENTS``, quiet, up to the first failure, and without a cache."""
        return self._run(["pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments], environment)

    def program(self, path: Path, **environment: str) -> Done:
        """``python PATH``"""
        return self._run([str(path)], environment)

    def _run(self, command: list[str], environment: dict[str, str]) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as said:
            job = {"command": command, "environment": environment, "said": said.name}
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            status = self._process.stdout.readline()
            assert status, "the host of the runs has ended"
            return Done(int(status), said.read())


def _serve() -> None:
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo
    import torch._inductor  # noqa: F401

    import afm_kernels  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _work(**job)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)  # without the seconds that the modules' own ends take


def _work(command: list[str], environment: dict[str, str], said: str) -> None:
    """Ends the process."""
    file, nothing = os.open(said, os.O_WRONLY), os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, file), (2, file)):
        os.dup2(source, target)
    os.environ.update(environment)
    status = 1
    try:
        if command[0] == "pytest":
            import pytest

            status = int(pytest.main(command[1:]))
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
