"""What it costs a training step on small_cnn that its images stay in a file, against the same images in memory.

    python -m benchmarks.training.mapped --images 200000 --folder DIR

A batch is fetched from memory, from a map whose pages the page cache holds, and from one whose pages have been put out
of it, as where a set is larger than memory: with the time of asking for the next batch, and with a step between asking
and fetching, as the trainer has it. What is printed is the time beyond memory's as a share of the step.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from advfunmatch import PGDAttack, create_model, prepare_for_attack
from advfunmatch.data.augment import augmented
from advfunmatch.data.mapped import MappedFile, MappedImages
from torch import Tensor, nn

SHAPE = (3, 32, 32)
BATCH = 128
EPS = 8 / 255
PART = 10_000


def write(path: Path, images: int) -> None:
    """Random images as the cache stores them."""
    generator = np.random.default_rng(0)
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (images, *SHAPE)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, images, PART):
            count = min(PART, images - start)
            file.write(generator.integers(0, 256, (count, *SHAPE), dtype=np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Put a file out of the page cache; pages that a process has touched through a map stay."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def make_step(steps: int) -> Callable[[Tensor], None]:
    """A training step on small_cnn: `pgd_at` with that many steps, or plain cross-entropy for none."""
    torch.manual_seed(0)
    model = create_model("small_cnn", num_classes=10, in_channels=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    lean = prepare_for_attack(model)
    attack = PGDAttack("cross_entropy", eps=EPS, step_size=EPS / 4, steps=steps) if steps else None
    labels = torch.randint(10, (BATCH,))

    def step(images: Tensor) -> None:
        x = augmented(images, ["crop", "flip"])
        if attack is not None:
            x = attack(lean, None, x, labels)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lean.refresh_()

    return step


def measure(path: Path, images: int, steps: int, rounds: int) -> dict[str, float]:
    """Medians over rounds, in seconds: a step, and fetching a batch in each way."""
    step, in_memory = make_step(steps), torch.from_numpy(np.load(path))
    # Pages that were touched through a map stay in the page cache, so what is to be put out of it is another file.
    cold_path = path.with_name("cold.npy")
    shutil.copyfile(path, cold_path)
    warm = MappedImages(MappedFile(path))
    warm[:]
    times: dict[str, list[float]] = {}

    def clock(name: str, started: float) -> None:
        times.setdefault(name, []).append(time.perf_counter() - started)

    for _ in range(rounds):
        now, following = torch.randint(images, (2, BATCH))
        started = time.perf_counter()
        x = in_memory[now]
        clock("memory", started)

        started = time.perf_counter()
        warm.ask_for(following)
        x = warm[now]
        clock("mapped", started)

        forget(cold_path)
        cold = MappedImages(MappedFile(cold_path))
        started = time.perf_counter()
        cold[following]
        clock("not read ahead", started)
        cold.ask_for(now)
        started = time.perf_counter()
        step(x)
        clock("step", started)
        started = time.perf_counter()
        cold.ask_for(following)
        cold[now]
        clock("cold", started)
        del cold
    cold_path.unlink()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--folder", type=Path, help="where the file is written, on the disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "images.npy"
        write(path, options.images)
        for name, steps in (("cross-entropy", 0), ("pgd_at, 10 steps", 10)):
            found = measure(path, options.images, steps, options.rounds)
            shares = ", ".join(
                f"{key} {1e3 * found[key]:.2f} ms ({100 * (found[key] - found['memory']) / found['step']:+.2f} %)"
                for key in ("mapped", "cold", "not read ahead")
            )
            step, memory = 1e3 * found["step"], 1e3 * found["memory"]
            print(f"{name}: a step takes {step:.0f} ms; a batch: memory {memory:.2f} ms, {shares}")


if __name__ == "__main__":
    main()
