"""The demo: a robust teacher and three students of one smaller architecture, on digits, in a few minutes on a CPU."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_model
from .config import TrainConfig
from .data import load_dataset
from .evaluate import evaluate
from .files import write_json
from .report import draw_demo
from .trainer import train

DATA = "digits"
EPS = 0.15  # on digits; strokes are still legible to a person at this radius
EPOCHS = 30
TEACHER_MODEL = "small_cnn-24"
STUDENT_MODEL = "small_cnn-8"
STUDENT_METHODS = ("ce", "funmatch", "advfunmatch")
ATTACKS = ("clean", "pgd20", "autoattack")


def _measure(checkpoint: Path, teacher_checkpoint: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    teacher = None if str(checkpoint) == teacher_checkpoint else load_model(teacher_checkpoint)
    test_set = load_dataset(DATA, split="test")
    return evaluate(load_model(checkpoint), test_set, ATTACKS, eps=EPS, seed=seed, teacher=teacher).to_dict()


def run_demo(out: Path, *, seed: int = 0, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train the teacher and the students, evaluate all four alike, and write the picture and the figures.

    Every student gets the same epochs, batches, optimizer and learning rates, and every network is measured on the
    whole test split with the same attacks; its weights are those after the last epoch.

    Args:
        out: folder for ``demo.json``, ``demo.png`` and one folder a run.
        seed: of all four runs.
        epochs: of all four runs.

    Returns:
        What ``demo.json`` holds.
    """
    started = time.perf_counter()
    teacher_checkpoint = str(out / "teacher" / "checkpoint.pt")
    runs: dict[str, dict[str, Any]] = {}
    for name in ("teacher", *STUDENT_METHODS):
        is_teacher = name == "teacher"
        config = TrainConfig(
            data=DATA,
            model=TEACHER_MODEL if is_teacher else STUDENT_MODEL,
            method="pgd_at" if is_teacher else name,
            teacher=None if is_teacher else teacher_checkpoint,
            out=str(out / name),
            epochs=epochs,
            eps=EPS,
            seed=seed,
            overwrite=True,
        )
        trained = train(config, label=f"{name:<12}")
        runs[name] = {
            "method": config.method,
            "model": config.model,
            "train_seconds": trained["seconds"],
            "images_per_second": trained["images_per_second"],
        }

    print("evaluating all four with the same attacks", file=sys.stderr)
    cores = torch.get_num_threads()
    # One process a core: AutoAttack on networks this small keeps one core busy, and two together slow each other.
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        measured = {
            name: pool.submit(_measure, out / name / "checkpoint.pt", teacher_checkpoint, seed)
            for name in runs
        }
        for name, run in runs.items():
            run |= measured[name].result()
    result = {
        "data": DATA,
        "test_images": runs["teacher"]["images"],
        "eps": EPS,
        "epochs": epochs,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "runs": runs,
    }
    write_json(out / "demo.json", result)
    draw_demo(out, result)
    return result
