"""The suite on each instruction set of this processor, one after the other: `make test-capabilities`.

    python tests/capabilities.py [default] [avx2] [avx512] [-- ARGUMENTS OF PYTEST]

No test may depend on which processor it meets. The kernels, PyTorch's own and those of the libraries under PyTorch
are told what to keep to, so one machine stands for those that have less.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

# Set by set, the least first; oneDNN and MKL know more sets than PyTorch does, and are left alone at the last.
ENVIRONMENTS = {
    "default": {
        "AFM_CPU_CAPABILITY": "portable",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "AFM_CPU_CAPABILITY": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"AFM_CPU_CAPABILITY": "avx512", "ATEN_CPU_CAPABILITY": "avx512"},
}
CHOSEN = (
    "import torch, afm_kernels;"
    "print(torch.ops.afm_kernels.cpu_capability(), torch.backends.cpu.get_cpu_capability().lower())"
)


def chosen(**environment: str) -> list[str]:
    """What the kernels and PyTorch choose in this environment, by name."""
    command, variables = [sys.executable, "-c", CHOSEN], {**os.environ, **environment}
    return subprocess.run(
        command, env=variables, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()


def run_suite(name: str, arguments: list[str]) -> tuple[int, str]:
    """Its exit status, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", *arguments]
    environment = {**os.environ, **ENVIRONMENTS[name]}
    last = ""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last.strip("= ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}; all")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    names = parser.parse_args(sys.argv[1:split]).names or list(ENVIRONMENTS)
    if unknown := [name for name in names if name not in ENVIRONMENTS]:
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(ENVIRONMENTS)}")

    # The kernels look at the processor; PyTorch believes what it is told, and would run into missing instructions.
    best, _ = chosen(AFM_CPU_CAPABILITY="")
    known = list(ENVIRONMENTS)
    runs = known.index("default" if best == "portable" else best)
    told, failed = [], False
    for name in names:
        if known.index(name) > runs:
            told.append(f"{name:<8} skipped: this processor runs no more than {best}")
            continue
        used, wanted = chosen(**ENVIRONMENTS[name]), ENVIRONMENTS[name]
        if used != [wanted["AFM_CPU_CAPABILITY"], wanted["ATEN_CPU_CAPABILITY"]]:
            raise SystemExit(f"{name} was asked for, but the kernels and PyTorch chose {' and '.join(used)}")
        print(f"== {name}", flush=True)
        start = time.monotonic()
        status, last = run_suite(name, sys.argv[split + 1 :])
        failed |= status != 0
        word = "passed" if status == 0 else f"FAILED ({status})"
        told.append(f"{name:<8} {word} after {time.monotonic() - start:.0f} s: {last}")
    print("== instruction sets", *told, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
