"""Everything that wants a GPU, in one command: ``make gpu``, or ``python -m benchmarks.gpu``.

    python -m benchmarks.gpu --list                 # the parts and what each takes; needs no GPU
    python -m benchmarks.gpu --part kernels         # one part, or several with commas
    python -m benchmarks.gpu                        # all of them, in under nine minutes

Builds in place and downloads nothing: it runs in the environment of the Python that starts it. Results go to
``benchmarks/results/gpu-*.json``; the last lines are a short table. Exit code 1 if a part failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """One part: what it does, about how long it takes, and when it is stopped."""

    name: str
    about: str
    seconds: int
    limit: int
    run: Callable[[Part], tuple[bool, str]]


def _call(part: Part, command: list[str], **environment: str) -> tuple[bool, str]:
    """Runs a command in the root of the repository, its output passed on; (whether it went well, a word on it)."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), **environment}
    try:
        done = subprocess.run(command, cwd=ROOT, env=settings, timeout=part.limit, check=False)
    except subprocess.TimeoutExpired:
        return False, f"stopped after {part.limit} s"
    return done.returncode == 0, "passed" if done.returncode == 0 else f"exit code {done.returncode}"


def _build(part: Part) -> tuple[bool, str]:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    major, minor = torch.cuda.get_device_capability()
    nvcc = CUDA_HOME is not None and shutil.which("nvcc", path=f"{CUDA_HOME}/bin") is not None
    if not nvcc:
        print("nvcc was not found: the CUDA module is left out, Triton serves")
    # For this GPU alone: all targets would take three times as long.
    good, word = _call(
        part,
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        AFM_BUILD_CUDA="1" if nvcc else "0",
        AFM_CUDA_ARCHS=f"{major}{minor}",
        MAX_JOBS=str(os.cpu_count()),
    )
    return good, word if nvcc else f"{word}, without nvcc"


def _pytest(backend: str) -> Callable[[Part], tuple[bool, str]]:
    def run(part: Part) -> tuple[bool, str]:
        # "cuda-cuda" is backend and device in the name of a test that every backend runs.
        chosen = "triton-cuda" if backend == "triton" else "cuda-cuda or test_cuda_gpu"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "-k", chosen]
        return _call(part, [*command, "-p", "no:cacheprovider", "--maxfail=20", "tests/afm_kernels"])

    return run


def _sanitizer(part: Part) -> tuple[bool, str]:
    tool = shutil.which("compute-sanitizer") or next(
        (
            str(path)
            for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
            if home and (path := Path(home) / "bin" / "compute-sanitizer").exists()
        ),
        None,
    )
    if tool is None:
        return True, "skipped: compute-sanitizer was not found"
    for check in ("memcheck", "racecheck"):
        good, word = _call(
            part,
            [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.small"],
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # or the allocator's blocks hide what lies beyond a tensor
        )
        if not good:
            return False, f"{check}: {word}"
    return True, "passed: memcheck, racecheck"


def _kernels(part: Part) -> tuple[bool, str]:
    return _call(part, [sys.executable, "-m", "benchmarks.gpu.kernels", "--budget", str(part.seconds)])


def _attack(part: Part) -> tuple[bool, str]:
    if not (ROOT / "benchmarks" / "attack" / "__main__.py").exists():
        return True, "skipped: benchmarks/attack is not there"
    return _call(
        part,
        [
            *(sys.executable, "-m", "benchmarks.attack", "--device", "cuda", "--case", "wrn-34-10/128x"),
            *("--no-compile", "--budget", "30", "--out", "benchmarks/results/gpu-attack.json"),
        ],
    )


PARTS = {
    part.name: part
    for part in (
        Part("build", "compile both modules in place, for this GPU", 90, 180, _build),
        Part(
            "correctness", "the tests of the CUDA kernels: dtypes, streams, graphs", 70, 120, _pytest("cuda")
        ),
        Part("triton", "the tests of the Triton kernels", 100, 130, _pytest("triton")),
        Part("sanitizer", "compute-sanitizer, where installed, over small calls", 40, 60, _sanitizer),
        Part("kernels", "against eager, torch.compile, Liger-Kernel and a copy", 110, 140, _kernels),
        Part("attack", "ten steps on WRN-34-10 and ResNet-18 against the official loop", 60, 90, _attack),
    )
}
TOTAL = 535  # seconds: a part that begins late gets what is left


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--part", default="all", help=f"{', '.join(PARTS)}, or several with commas")
    parser.add_argument(
        "--list", action="store_true", help="print the parts with an estimate of the time, and stop"
    )
    arguments = parser.parse_args(argv)
    names = list(PARTS) if arguments.part == "all" else arguments.part.split(",")
    for name in names:
        if name not in PARTS:
            parser.error(f"--part {name!r} is unknown; there are {', '.join(PARTS)} and all")
    chosen = [PARTS[name] for name in names]
    if arguments.list:
        for part in chosen:
            print(f"{part.name:12} about {part.seconds:3} s, at most {part.limit:3} s   {part.about}")
        print(f"{'all':12} about {sum(part.seconds for part in chosen):3} s")
        return 0

    try:
        import torch
    except ImportError:
        print("make gpu needs an environment with PyTorch, and this Python has none", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            "make gpu needs a CUDA device, and PyTorch finds none here (make gpu LIST=1 lists the parts)",
            file=sys.stderr,
        )
        return 2

    start = time.perf_counter()
    outcome = []
    for part in chosen:
        print(f"\n== {part.name}: {part.about}", flush=True)
        began = time.perf_counter()
        left = int(TOTAL - (began - start))
        if left < 5:
            outcome.append((part.name, False, "left out: the nine minutes were over", 0.0))
            continue
        good, word = part.run(replace(part, limit=min(part.limit, left)))
        outcome.append((part.name, good, word, time.perf_counter() - began))
    results = ROOT / "benchmarks" / "results" / "gpu-kernels.json"
    if "kernels" in names and results.exists():
        from benchmarks.gpu.kernels import table

        print(f"\n{table(results)}")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    for name, good, word, seconds in outcome:
        print(f"{'ok  ' if good else 'FAIL'} {name:12} {seconds:4.0f} s  {word}")
    return 0 if all(good for _, good, _, _ in outcome) else 1


if __name__ == "__main__":
    sys.exit(main())
