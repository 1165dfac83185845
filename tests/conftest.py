"""One thread for every test, and a line that says what the processor is asked to be.

The tests' tensors are small: threads that wait for one another would be most of the time, and what two processes of
pytest-xdist need is a core each. Tests of threads set their number themselves.
"""

from __future__ import annotations

import os
import signal

# Before torch is imported: children that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# torch.jit.script asks for builtins by id(). The operators that torch.compile registers a second time are freed, but
# their ids stay in the table, where a list that comes to lie at one passes for a builtin: findings/
# torch-jit-takes-a-freed-operators-address-for-a-builtin.sh. So none is freed here.
_registered = []
_register_builtin = torch.jit._builtins._register_builtin


def _register_and_keep(function: object, operator: str) -> None:
    _registered.append(function)
    _register_builtin(function, operator)


torch.jit._builtins._register_builtin = _register_and_keep


def pytest_configure(config: pytest.Config) -> None:
    # A shell ignores it for what runs in its background, and so would the children that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_report_header(config: pytest.Config) -> str:
    from afm_kernels import backend_info

    kernels = backend_info()["cpu_capability"]
    return f"instruction sets: torch {torch.backends.cpu.get_cpu_capability()}, kernels {kernels}"
