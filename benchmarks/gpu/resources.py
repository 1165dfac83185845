"""Registers, shared memory, spills and access widths of the CUDA kernels, read from the built module.

    python -m benchmarks.gpu.resources                                  # the table, in Markdown
    python -m benchmarks.gpu.resources --write docs/gpu-resources-cuda.md    # between the document's markers

Needs ``afm_kernels/_cuda.abi3.so`` and cuobjdump, which comes with the CUDA toolkit and with Triton; no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODULE = Path(__file__).resolve().parents[2] / "afm_kernels" / "_cuda.abi3.so"
_BEGIN, _END = "<!-- cuda: begin -->", "<!-- cuda: end -->"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

_VARIANTS = {"0": "KL", "1": "Jeffreys, JS", "2": "distillation"}
_PAIRS = {
    "__half": "float16",
    "__nv_bfloat16": "bfloat16",
    "float": "float32",
    "double": "float64",
    "AnyOf<float>": "mixed",
    "AnyOf<double>": "mixed with float64",
}

# Bytes a row of C classes of e bytes moves through global memory, in units of C·e, and the least there is.
# Rows: read once, whatever is asked for. Streamed rows are read again for gradients, and once more for the terms of
# Jeffreys and JS; what of it the caches serve is for a measurement to say.
BYTES = (
    ("loss, KL, reverse KL, distillation", "2", "2", "2"),
    ("loss, Jeffreys and JS", "2", "4", "2"),
    ("loss and both gradients in one call", "4", "6 (8)", "4"),
    ("both gradients alone", "4", "6 (8)", "4"),
    ("backward from row statistics", "4", "4", "4"),
    ("forward, then backward", "6", "6 (8)", "4"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target."""

    target: str
    symbol: str
    name: str
    registers: int
    stack: int
    shared: int
    local: int


def cuobjdump() -> str | None:
    """The disassembler, or None."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    places = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for place in places:
        if (place / "cuobjdump").exists():
            return str(place / "cuobjdump")
    return None


def _run(*arguments: str) -> str:
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump was not found: it comes with the CUDA toolkit and with Triton")
    environment = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}  # it calls nvdisasm
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def readable(symbol: str) -> str:
    """``rows_kernel<float32, 32 threads x 8 vectors, KL>`` for the mangled name."""
    done = subprocess.run(["c++filt", "-p", symbol], capture_output=True, text=True, check=True)
    name = re.sub(r"afm::cuda::|\(anonymous namespace\)::", "", done.stdout.strip())
    name = re.sub(r"\((?:Variant|int|bool)\)", "", name)
    match = re.fullmatch(r"(\w+)<Pair<(.+?), (\S+?(?:<\w+>)?), (?:float|double), \d>(.*)>", name)
    if match is None:
        return re.sub(r"^void |\(.*\)$", "", name)
    kernel, dtype = match[1], _PAIRS[match[2]]
    rest = [part.strip() for part in match[4].split(",") if part.strip()]
    words = [dtype]
    if len(rest) == 3:
        words.append(f"{rest[0]} threads x {rest[1]} vectors")
    if rest:
        words.append(_VARIANTS[rest[-1]])
    return f"{kernel}<{', '.join(words)}>"


def kernels(module: Path = MODULE) -> list[Kernel]:
    """Every kernel of the module for every target it was compiled for."""
    found, target, symbol = [], "", ""
    for line in _run("-res-usage", str(module)).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            target = match[1]
        elif match := re.search(r"Function (\S+):", line):
            symbol = match[1]
        elif match := _RESOURCES.search(line):
            registers, stack, shared, local = map(int, match.groups())
            found.append(Kernel(target, symbol, readable(symbol), registers, stack, shared, local))
    return found


def access_widths(kernel: Kernel, module: Path = MODULE) -> tuple[int, int]:
    """Bits of the widest load from and store to global memory in the machine code of a kernel."""
    code = _run("-sass", "-arch", kernel.target, "-fun", kernel.symbol, str(module))

    def widest(instruction: str) -> int:
        found = {
            part for each in re.findall(rf"\b{instruction}((?:\.\w+)+)", code) for part in each.split(".")
        }
        return 128 if "128" in found else 64 if "64" in found else 32 if found else 0

    return widest("LDG"), widest("STG")


def table(module: Path = MODULE) -> str:
    """The tables of ``docs/gpu-resources-cuda.md``."""
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels(module):
        by_name.setdefault(kernel.name, {})[kernel.target] = kernel
    targets = sorted({t for row in by_name.values() for t in row}, key=lambda t: int(t.removeprefix("sm_")))
    lines = [
        "Registers / bytes of stack (spills) / bytes of shared memory, for each target.",
        "",
        "| kernel | " + " | ".join(targets) + " |",
        "|---|" + "---|" * len(targets),
    ]
    for name in sorted(by_name):
        cells = []
        for target in targets:
            k = by_name[name].get(target)
            cells.append(f"{k.registers} / {k.stack + k.local} / {k.shared}" if k else "-")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Bytes moved a row, in units of C·e (C classes of e bytes), by design; in brackets Jeffreys and JS:",
        "",
        "| call | row on chip | row streamed | the least |",
        "|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in BYTES]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the section of this document")
    path = parser.parse_args().write
    text = table()
    print(text)
    if path is not None:
        document = path.read_text() if path.exists() else ""
        if _BEGIN not in document:
            document = document.rstrip() + f"\n\n{_BEGIN}\n{_END}\n"
        before, rest = document.split(_BEGIN)
        path.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{rest.split(_END)[1]}".lstrip("\n"))


if __name__ == "__main__":
    main()
