"""Runs every test that asks for ``device`` once for each backend that serves the module's ``STEM``.

A GPU machine runs the same tests on the device: those carry the marker ``gpu``. Triton's backend appears on the CPU
where TRITON_INTERPRET=1, which has to be set before Python starts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # samples, tolerances, truth

from afm_kernels import ops, use_backend


def backends_of(stem: str) -> list[Any]:
    """The (backend, device) pairs that serve an operator of ``stem`` on this machine."""
    op = next(op for op in ops.SCHEMAS if op.startswith(stem))
    found = []
    for device in ops.DEVICES:
        if device == "cuda" and not torch.cuda.is_available():
            continue
        for backend in ops.TABLE[op, device]:
            marks = [pytest.mark.gpu] if device == "cuda" else []
            found.append(pytest.param((backend, device), id=f"{backend}-{device}", marks=marks))
    return found


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "default_backend: only for the backend that serves by default on each device; what it tests is above the "
        "backends, and the reference is slow",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        backends = backends_of(metafunc.module.STEM)
        if metafunc.definition.get_closest_marker("default_backend"):
            op = next(op for op in ops.SCHEMAS if op.startswith(metafunc.module.STEM))
            backends = [b for b in backends if b.values[0][0] == ops.backend_for(op, b.values[0][1])]
        metafunc.parametrize("device", backends, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device, with the backend of this run in charge."""
    backend, device_type = request.param
    with use_backend(backend):
        yield torch.device(device_type)
