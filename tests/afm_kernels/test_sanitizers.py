"""The CPU kernels under AddressSanitizer and UBSan: no access outside a row, no undefined behaviour.

The kernels need no PyTorch, so tests/cpp/kernels_test.cpp calls them directly, on buffers of the exact size with
sentinels between the rows. Each instruction set is built here and runs where the machine has it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = ("softmax_kl_kernel.cpp", "dkl_kernel.cpp")
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"]
CAPABILITIES = {"portable": [], "avx2": AVX2, "avx512": AVX512}  # as in setup.py
NOT_SUPPORTED = 77

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-O1", "-g1", f"-I{CSRC}", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [
    pytest.mark.slow,  # the compiler takes a minute and a half over the sanitizers' checks
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
]


def compile_object(source: Path, target: Path, *flags: str) -> Path:
    subprocess.run([str(COMPILER), *FLAGS, *flags, "-c", str(source), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test program, with the kernels of every instruction set of this architecture."""
    folder = tmp_path_factory.mktemp("sanitizers")
    machine = os.uname().machine
    objects = [compile_object(ROOT / "tests/cpp/kernels_test.cpp", folder / "main.o")]
    for name, flags in CAPABILITIES.items():
        if name != "portable" and machine != "x86_64":
            continue
        defines = [f"-DAFM_CAPABILITY={name}", f"-DAFM_CAPABILITY_{name.upper()}=1"]
        for kernel in KERNELS:
            objects.append(
                compile_object(CSRC / "cpu" / kernel, folder / f"{name}_{kernel}.o", *flags, *defines)
            )
    target = folder / "kernels_test"
    subprocess.run([str(COMPILER), *FLAGS, *map(str, objects), "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_stay_within_their_rows(program: Path, capability: str) -> None:
    done = subprocess.run([str(program), capability], capture_output=True, text=True, check=False)
    if done.returncode == NOT_SUPPORTED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
