"""Builds the CUDA module for the CPU and, as a pytest plugin, lets it serve CPU tensors as backend "cuda".

The sources are those of ``csrc/cuda``, kernels and operators, compiled by the C++ compiler with the emulator in
``cuda_emulation.h``. The library is kept under ``build/`` and built again when a source changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FOLDER = ROOT / "build" / "cuda_emulated"
# The headers of the CUDA toolkit give half and bfloat16 arithmetic on the host too.
_HEADER = "cuda_bf16.h"


def missing() -> str | None:
    """Why the module cannot be built here, or None."""
    if shutil.which(_compiler()) is None:
        return f"there is no C++ compiler ({_compiler()!r} was not found)"
    if _toolkit() is None:
        return (
            f"there is no {_HEADER}: it comes with the CUDA toolkit and with CUDA builds of torch and Triton"
        )
    return None


def _compiler() -> str:
    return cpp_extension.get_cxx_compiler().split()[0]


def _toolkit() -> Path | None:
    packages = Path(torch.__file__).parents[1]
    homes = [Path(home) / "include" for home in (cpp_extension.CUDA_HOME, "/usr/local/cuda") if home]
    places = [
        *homes,
        *sorted(packages.glob("nvidia/cu*/include")),
        packages / "nvidia/cuda_runtime/include",
        packages / "triton/backends/nvidia/include",
    ]
    return next((place for place in places if (place / _HEADER).exists()), None)


def build() -> Path:
    """The library; compiled if it is not there yet for these sources."""
    sources = sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cpp"))
    headers = [
        *(ROOT / "csrc").glob("cuda/*.*h"),
        *(ROOT / "csrc").glob("common/*.h"),
        HERE / "cuda_emulation.h",
    ]
    state = hashlib.sha256(f"{torch.__version__} {_compiler()} {_toolkit()}".encode())
    for path in sorted([*sources, *headers, Path(__file__)]):
        state.update(path.read_bytes())
    library = FOLDER / f"emulated_{state.hexdigest()[:16]}.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that test at once build once
        if not library.exists():
            _compile(sources, library)
    return library


def _compile(sources: list[Path], library: Path) -> None:
    objects = FOLDER / f"objects_{os.getpid()}"
    objects.mkdir(parents=True)
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fno-strict-aliasing",
        "-Wno-unknown-pragmas",
        "-DAFM_CUDA_EMULATION",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{ROOT / 'csrc'}",
        f"-I{HERE}",
        f"-isystem{_toolkit()}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
    ]

    def compile_one(source: Path) -> str:
        target = str(objects / f"{source.name}.o")
        command = [_compiler(), *flags, "-x", "c++", "-c", str(source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for the emulator:\n{done.stderr}")
        return target

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, sources))
        partial = objects / library.name
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        subprocess.run(
            [_compiler(), "-shared", "-o", str(partial), *compiled, *libraries, "-ltorch_cpu"], check=True
        )
        for old in FOLDER.glob("emulated_*.so"):
            old.unlink(missing_ok=True)
        partial.replace(library)
    finally:
        shutil.rmtree(objects, ignore_errors=True)


def serve() -> list[str]:
    """Registers the emulated operators as backend "cuda" of CPU tensors, in this process; their names."""
    from afm_kernels import ops

    global _library
    _library = torch.library.Library("afm_kernels_emulated", "DEF")
    for name, signature in ops.SCHEMAS.items():
        _library.define(name + signature, tags=torch.Tag.pt2_compliant_tag)
    for name, fake in ops._FAKES.items():
        torch.library.register_fake(f"afm_kernels_emulated::{name}", fake, lib=_library)
    torch.ops.load_library(str(build()))
    served = []
    for name in ops._FAKES:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"afm_kernels_emulated::{name}", "CPU"):
            ops.TABLE[name, "cpu"]["cuda"] = getattr(torch.ops.afm_kernels_emulated, name).default
            served.append(name)
    return served


def pytest_configure() -> None:
    serve()
