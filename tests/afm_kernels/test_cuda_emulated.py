"""The CUDA module on the CPU: its kernels, lane by lane, and its operators pass the tests of every backend.

See Note [Emulation] in csrc/cuda/platform.cuh. The suites run in processes of their own, where the emulated operators
are backend "cuda" of CPU tensors. What is particular to these kernels is tested here: every tier of the plan at its
borders, rows that are split over blocks, views off the 16-byte alignment, and that a missing lane is noticed at all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulator"))
import cuda_emulator

reason = cuda_emulator.missing()
if reason is not None:
    pytest.skip(reason, allow_module_level=True)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    cuda_emulator.build()
    paths = [str(HERE / "cuda_emulator"), str(cuda_emulator.ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


SUITES = ("test_softmax_kl.py", "test_distillation.py", "test_pgd_step.py", "test_scale_shift_relu.py")


def test_suites_of_every_backend(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "cuda_emulator", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", "cuda-cpu", *(str(HERE / suite) for suite in SUITES)],
        env=environment,
        cwd=cuda_emulator.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-1000:]
    assert int(passed[1]) >= 1000  # that the emulated backend was among those tested


def test_tiers_and_splits(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "cuda_emulator" / "check_tiers.py")],
        env=environment,
        cwd=cuda_emulator.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "checked" in done.stdout
