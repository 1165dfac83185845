"""The demo: a robust teacher and three students of one smaller architecture, on digits, in a few minutes on a CPU."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig
from .data import load_dataset
from .evaluation import evaluate
from .files import write_json
from .models import load_model
from .report import draw_demo
from .training import train

DATA = "digits"
EPS = 0.15  # on digits; strokes are still legible to a person at this radius
EPOCHS = 30
TEACHER_MODEL = "small_cnn-24"
STUDENT_MODEL = "small_cnn-8"
STUDENT_METHODS = ("ce", "funmatch", "advfunmatch")
ATTACKS = ("clean", "pgd20", "autoattack")


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
    importlib.import_module("matplotlib")  # needed after the training
    started = time.perf_counter()
    teacher_checkpoint = out / "teacher" / "checkpoint.pt"
    runs = {}
    for name in ("teacher", *STUDENT_METHODS):
        config = TrainConfig(
            data=DATA,
            model=TEACHER_MODEL if name == "teacher" else STUDENT_MODEL,
            method="pgd_at" if name == "teacher" else name,
            teacher=None if name == "teacher" else str(teacher_checkpoint),
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
    for name, measured in _measure_all(out, list(runs), teacher_checkpoint, seed).items():
        runs[name] |= measured
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


def _measure_all(out: Path, names: Sequence[str], teacher: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Each network's figures. One process a core: AutoAttack on networks this small keeps one core busy."""
    with ProcessPoolExecutor(torch.get_num_threads(), mp_context=get_context("spawn")) as pool:
        futures = {name: pool.submit(_measure, out / name / "checkpoint.pt", teacher, seed) for name in names}
        return {name: future.result() for name, future in futures.items()}


def _measure(checkpoint: Path, teacher_checkpoint: Path, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    teacher = None if checkpoint == teacher_checkpoint else load_model(teacher_checkpoint)
    test_set = load_dataset(DATA, split="test")
    return evaluate(load_model(checkpoint), test_set, ATTACKS, eps=EPS, seed=seed, teacher=teacher).to_dict()
