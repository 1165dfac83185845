"""The CPU kernels compiled for processors that are not here: ARM, where the portable code becomes NEON, and by clang.

Needs a cross-compiler: ``pip install ziglang`` brings clang with the headers of every target.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ziglang") is None, reason="no cross-compiler: pip install ziglang"),
]

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "csrc" / "cpu").rglob("*_kernel.cpp"))
# capability -> flags, and an instruction that its vector loops cannot do without
TARGETS = {
    "portable": (["-target", "aarch64-linux-gnu"], r"\bfml[as]\s+v\d+\.(4s|2d)"),
    "avx2": (["-target", "x86_64-linux-gnu", "-mcpu=x86_64_v3"], r"vfmadd\w+p[sd]\s.*%ymm"),
    "avx512": (["-target", "x86_64-linux-gnu", "-mcpu=x86_64_v4"], r"vfmadd\w+p[sd]\s.*%zmm"),
}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
@pytest.mark.parametrize("capability", TARGETS)
def test_kernels_compile(capability: str, unit: Path, tmp_path: Path) -> None:
    flags, instruction = TARGETS[capability]
    assembly = tmp_path / "unit.s"
    defines = [f"-DAFM_CAPABILITY={capability}", f"-DAFM_CAPABILITY_{capability.upper()}=1"]
    options = [
        *flags,
        *defines,
        "-std=c++20",
        "-O2",
        "-fno-math-errno",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
    ]
    options += ["-Werror", "-Wno-unused-command-line-argument"]  # zig adds -c beside -S
    files = [f"-I{ROOT / 'csrc'}", "-S", str(unit), "-o", str(assembly)]
    command = [sys.executable, "-m", "ziglang", "c++", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(instruction, assembly.read_text(errors="replace"))
