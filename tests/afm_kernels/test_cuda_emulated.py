"""The CUDA module on the CPU: its kernels, lane by lane, and its operators pass the tests of every backend.

See Note [Emulation] in csrc/cuda/platform.cuh. The suites run in processes of their own, where the emulated operators
are backend "cuda" of CPU tensors. What is particular to these kernels is tested here: every tier of the plan at its
borders, rows that are split over blocks, views off the 16-byte alignment, and that a missing lane is noticed at all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulator"))
import cuda_emulator
from forks import Host

reason = cuda_emulator.missing()
if reason is not None:
    pytest.skip(reason, allow_module_level=True)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    cuda_emulator.build()
    with Host() as host:
        yield host


# dkl has no CUDA kernel; certain rows of 32000 classes take half of their time, and go the way of those of 5000.
CHOSEN = "cuda-cpu and not (test_certain_rows and (test_dkl or 32000))"
SUITES = (
    "test_softmax_kl.py",
    "test_softmax_kl_direction.py",
    "test_certain_rows.py",
    "test_distillation.py",
    "test_pgd_step.py",
    "test_apgd_step.py",
    "test_scale_shift_relu.py",
)


def test_suites_of_every_backend(host: Host) -> None:
    done = host.pytest(
        *("-p", "cuda_emulator.cuda_emulator", "-k", CHOSEN), *(str(HERE / suite) for suite in SUITES)
    )
    assert done.returncode == 0, done.said[-5000:]
    passed = re.search(r"(\d+) passed", done.said)
    assert passed is not None, done.said[-1000:]
    assert int(passed[1]) >= 1000  # that the emulated backend was among those tested


def test_tiers_and_splits(host: Host) -> None:
    done = host.program(HERE / "cuda_emulator" / "check_tiers.py")
    assert done.returncode == 0, done.said[-6000:]
    assert "checked" in done.said
