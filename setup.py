"""Builds the two compiled modules; everything else about the distribution is in pyproject.toml.

``afm_kernels/_cpu.abi3.so``   from csrc/cpu: one file for every Python >= 3.10 and torch >= 2.10.
``afm_kernels/_cuda.abi3.so``  from csrc/cuda: where nvcc and a CUDA build of torch are found.

Note [Kernel units]
~~~~~~~~~~~~~~~~~~~
A source of csrc/cpu named ``*_kernel.cpp`` is compiled once for each instruction set of ``CAPABILITIES``, with
that set's flags and ``-DAFM_CAPABILITY=<name>``, and defines its functions in ``namespace
afm::cpu::AFM_CAPABILITY``. ``dispatch.h`` picks one of the copies at run time. Every other source is compiled
once, for the baseline of the architecture. No unit ever gets -march=native: a wheel built on one machine runs
on any.

A kernel unit must not emit an inline function under a shared name (from the standard library, say): the
linker keeps one copy of those, perhaps the AVX-512 one, for everybody. ``check_kernel_objects`` fails then.

Environment
~~~~~~~~~~~
AFM_BUILD_CPU, AFM_BUILD_CUDA  0 leaves the module out, 1 fails when it cannot be; unset builds what can be.
AFM_CUDA_ARCHS                 e.g. "80" or "80;90+PTX"; TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") works too.
MAX_JOBS, CXX, CUDA_HOME       as for any PyTorch extension.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

TORCH_TARGET = "0x020a000000000000"  # the oldest LibTorch the modules run on: 2.10
PYTHON_TARGET = "cp310"
CUDA_ARCHS = "80;90;100+PTX"

# See Note [Kernel units]. Order and names as in csrc/cpu/dispatch/dispatch.h.
CAPABILITIES = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mprfchw"]
    avx512 = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512cd",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
        "-Wno-maybe-uninitialized",  # GCC 12 says it of its own intrinsics
    ]
    CAPABILITIES |= {"avx2": avx2, "avx512": avx2 + avx512}

# Signalling NaNs and errno are the two things given up for vectorisation; the values of results are not. Products are
# fused with sums where the code says so, not where the compiler finds it convenient: a gradient has the same bits made
# in the forward or in the backward, by loops that are compiled apart.
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
CXX_FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += [f"-fmacro-prefix-map={ROOT}/="]  # error messages name csrc/..., not the folder of the build


def wanted(module: str) -> bool | None:
    """What AFM_BUILD_<module> asks for: True, False, or None for "if it can be built"."""
    value = os.environ.get(f"AFM_BUILD_{module}", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"AFM_BUILD_{module} is {value!r}; allowed: 0, 1, or unset")
    return None if value == "" else value == "1"


def leave_out(module: str, reason: str) -> None:
    """Goes on without a module, in plain sight; or stops, where AFM_BUILD_<module>=1 asked for it."""
    if wanted(module):
        raise SystemExit(f"AFM_BUILD_{module}=1, but {reason}")
    print(f"warning: afm_kernels is built without its {module} module: {reason}", file=sys.stderr)


def cpu_extension() -> Extension | None:
    if wanted("CPU") is False:
        return None
    try:
        from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths
    except ImportError as error:
        return leave_out("CPU", f"torch cannot be imported here ({error})")
    if shutil.which(get_cxx_compiler().split()[0]) is None:
        return leave_out("CPU", f"there is no C++ compiler ({get_cxx_compiler()!r} was not found)")
    return Extension(
        "afm_kernels._cpu",
        sorted(str(path) for path in Path("csrc/cpu").rglob("*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_compile_args=[*CXX_FLAGS, *(f"-isystem{path}" for path in include_paths())],
        extra_link_args=["-Wl,--no-undefined", "-Wl,--as-needed", "-pthread"]
        if sys.platform == "linux"
        else [],
        language="c++",
        py_limited_api=True,
    )


def cuda_archs() -> list[str]:
    """-gencode flags for AFM_CUDA_ARCHS, TORCH_CUDA_ARCH_LIST or the default list."""
    listed = os.environ.get("AFM_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS
    flags = []
    for arch in re.split(r"[;, ]+", listed.strip()):
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d[a-z]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(f"{arch!r} is not a CUDA architecture; allowed: 80, 9.0, sm_90a, 100+PTX")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Where nvcc itself would look for libcudart_static.a; it may be a wrapper script outside its toolkit."""
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    return [os.path.normpath(path) for path in re.findall(r'-L"?([^"\s]+)"?', dryrun.stderr)]


def cuda_extension() -> Extension | None:
    # Kernels in .cu files see no torch header, operators in .cpp files no kernel: both compile quickly.
    sources = sorted(str(path) for path in Path("csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp"))
    if wanted("CUDA") is False or not sources:
        return leave_out("CUDA", "csrc/cuda has no sources") if wanted("CUDA") else None
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths
    except ImportError as error:
        return leave_out("CUDA", f"torch cannot be imported here ({error})")
    if torch.version.cuda is None:
        return leave_out("CUDA", f"torch {torch.__version__} is not a CUDA build")
    nvcc = shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None
    if nvcc is None:
        return leave_out("CUDA", "nvcc was not found")
    return Extension(
        "afm_kernels._cuda",
        sources,
        include_dirs=[str(ROOT / "csrc"), *include_paths()],
        library_dirs=[*library_paths(), *cuda_library_dirs(nvcc)],
        libraries=["torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": CXX_FLAGS,
            "nvcc": [
                "-O3",
                "--threads=2",
                "--compress-mode=size",
                "-Xcompiler=-fvisibility=hidden",
                *cuda_archs(),
            ],
        },
        # Without --exclude-libs the static runtime's symbols would shadow those of the one torch has loaded.
        extra_link_args=["-Wl,--no-undefined", "-Wl,--as-needed", "-Wl,--exclude-libs,libcudart_static.a"],
        language="c++",
        py_limited_api=True,
    )


def check_kernel_objects(objects: list[str]) -> None:
    """Fails on a function that the linker would share between instruction sets. See Note [Kernel units]."""
    nm = shutil.which("nm")
    if nm is None:
        return
    for path in objects:
        listing = subprocess.run(
            [nm, "-C", "--defined-only", path], capture_output=True, text=True, check=True
        )
        shared = re.findall(r"^\S+ [WVu] (.*)$", listing.stdout, flags=re.MULTILINE)
        if shared:
            raise SystemExit(
                f"{path} emits inline functions that other units may be linked to: {', '.join(shared)}"
            )


def build_ext_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        """BuildExtension, which compiles with ninja, plus the kernel units with their own flags."""

        def finalize_options(self) -> None:
            super().finalize_options()
            if getattr(
                self, "editable_mode", False
            ):  # setuptools takes a fresh folder then: all is compiled again
                self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

        def build_extension(self, ext: Extension) -> None:
            # ninja keeps one build file a folder: every set of flags gets its own.
            build_temp, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            units = [source for source in ext.sources if source.endswith("_kernel.cpp")]
            ext.sources = [source for source in ext.sources if source not in units]
            for name, flags in CAPABILITIES.items() if units else ():
                objects = self.compiler.compile(
                    units,
                    output_dir=os.path.join(self.build_temp, name),
                    macros=[("AFM_CAPABILITY", name), (f"AFM_CAPABILITY_{name.upper()}", "1")],
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*ext.extra_compile_args, *flags],
                )
                check_kernel_objects(objects)
                ext.extra_objects = [*ext.extra_objects, *objects]
            super().build_extension(ext)
            self.build_temp = build_temp

    return BuildKernels


extensions = [extension for extension in (cpu_extension(), cuda_extension()) if extension is not None]

setup(
    version=re.search(r'__version__ = "(.+)"', Path("afm_kernels/version.py").read_text())[1],
    packages=[
        *find_packages(".", include=["afm_kernels", "afm_kernels.*"]),
        *find_packages("python", include=["advfunmatch", "advfunmatch.*"]),
    ],
    package_dir={"": "python", "afm_kernels": "afm_kernels"},
    package_data={"afm_kernels": ["py.typed"], "advfunmatch": ["py.typed"]},
    include_package_data=False,
    ext_modules=extensions,
    cmdclass={"build_ext": build_ext_command()} if extensions else {},
    options={"bdist_wheel": {"py_limited_api": PYTHON_TARGET}} if extensions else {},
)
