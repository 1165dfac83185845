"""The CPU kernels under AddressSanitizer and UBSan: no access outside a row, no undefined behaviour.

The kernels need no PyTorch, so the programs in tests/cpp call them directly, on buffers of the exact size with
sentinels between the rows. Each instruction set is built here and runs where the machine has it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PROGRAMS = {
    "losses": ("softmax_kl/softmax_kl", "dkl/dkl"),
    "images": ("images/pgd_step", "images/apgd_step", "images/scale_shift_relu", "images/conv3x3"),
}
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"]
CAPABILITIES = {"portable": [], "avx2": AVX2, "avx512": AVX512}  # as in setup.py
NOT_SUPPORTED = 77

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-O1", "-g1", f"-I{CSRC}", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [
    pytest.mark.slow,  # the compiler takes five minutes and more over the sanitizers' checks of a loss's unit
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
]


def compile_object(source: Path, target: Path, *flags: str) -> Path:
    subprocess.run([str(COMPILER), *FLAGS, *flags, "-c", str(source), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test program, with its kernels for every instruction set of this architecture."""
    folder = tmp_path_factory.mktemp("sanitizers")
    machine = os.uname().machine
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        compiled = []
        for name, flags in CAPABILITIES.items():
            if name != "portable" and machine != "x86_64":
                continue
            defines = [f"-DAFM_CAPABILITY={name}", f"-DAFM_CAPABILITY_{name.upper()}=1"]
            for kernel in PROGRAMS[request.param]:
                source = CSRC / "cpu" / f"{kernel}_kernel.cpp"
                unit = folder / f"{name}_{source.stem}.o"
                compiled.append(compilers.submit(compile_object, source, unit, *flags, *defines))
        main = compile_object(ROOT / f"tests/cpp/{request.param}_test.cpp", folder / "main.o")
    objects = [main, *(future.result() for future in compiled)]
    target = folder / f"{request.param}_test"
    subprocess.run([str(COMPILER), *FLAGS, *map(str, objects), "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_stay_within_their_buffers(program: Path, capability: str) -> None:
    done = subprocess.run([str(program), capability], capture_output=True, text=True, check=False)
    if done.returncode == NOT_SUPPORTED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
