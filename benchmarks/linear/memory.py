"""Peak memory of one candidate, beyond inputs and returned gradients, measured by the system in a process of its own.

    python -m benchmarks.linear.memory VARIANT ROWS HIDDEN TEACHER_HIDDEN CLASSES THREADS

The first call compiles, loads libraries and packs; what the second adds to the process at its highest, VmHWM of /proc
from which it is reset beforehand, is printed in bytes, less the two gradients. glibc gives every freed block of 128 KiB
back at once: what it kept would be there already, and not be counted.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.linear.heads import Heads, Shape, losses, with_gradients
from benchmarks.results import ROOT
from benchmarks.timing import ALLOCATOR_SETTINGS

_STATUS = Path("/proc/self/status")


def can_measure() -> bool:
    return Path("/proc/self/clear_refs").exists()


def peak_of(variant: str, shape: Shape, threads: int) -> int:
    """Bytes, by a process of its own."""
    sizes = (shape.rows, shape.hidden, shape.teacher_hidden, shape.classes, threads)
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.linear.memory", variant, *map(str, sizes)],
        cwd=ROOT,
        env=environment
        | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        | {"PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), *sys.path) if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the memory of {variant} could not be measured:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _kilobytes(field: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def main() -> None:
    import torch

    variant, *sizes = sys.argv[1:]
    *dimensions, threads = map(int, sizes)
    torch.set_num_threads(threads)
    shape = Shape(*dimensions)
    heads = Heads.draw(shape)
    loss = losses(compiles=variant in ("compile", "liger"))[variant]
    with_gradients(lambda: loss(heads), heads)
    gc.collect()
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    returned = with_gradients(lambda: loss(heads), heads)
    peak = _kilobytes("VmHWM")
    gradients = sum(t.numel() * t.element_size() for t in returned[1:])
    print(max(0, 1024 * (peak - before) - gradients))


if __name__ == "__main__":
    main()
