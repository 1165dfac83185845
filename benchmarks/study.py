"""A small study of the methods: same data, teacher, attack and budget for all, over several seeds.

    python -m benchmarks.study digits
    python -m benchmarks.study cifar10 --images folder:PATH

First a robust teacher, then every row of `ROWS` for every seed. A run lies in OUT/DATA/ROW-SEED, as `advfunmatch train`
writes it. A finished run is skipped and an interrupted one continued, so the command can be stopped and
repeated; at the end it writes study-DATA-cpu.json, of which the tables of docs/study.md are made.

Every row has its method's official defaults, and shares everything else: epochs, batches, learning rate, attack radius
and steps. Nothing was tuned for any of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from advfunmatch import InputError, TrainConfig, evaluate, load_dataset, load_model, train
from advfunmatch.evaluation import Ball
from advfunmatch.files import write_json

from benchmarks import results
from benchmarks.results import Json, Record

FIGURES = (
    "clean",
    "pgd20",
    "autoattack",
    "agreement",
    "agreement_mismatched",
    "kl_clean",
    "kl_mismatched",
    "seconds",
)


@dataclass(frozen=True)
class Study:
    """What the runs on one data set share.

    Attributes:
        images: the data, spelled as for `advfunmatch train --data`; None where the user has to say.
        shared: settings of teacher and students.
        teacher: settings of the teacher alone.
        student: settings of the students alone.
        augment: augmentation of every row.
        attacked: test images that AutoAttack is run on; None for all.
    """

    images: str | None
    shared: Json
    teacher: Json
    student: Json
    augment: str
    attacked: int | None


STUDIES = {
    "digits": Study(
        images="digits",
        shared={"eps": 0.15, "epochs": 30, "steps": 10},
        teacher={"model": "small_cnn-24", "method": "pgd_at"},
        student={"model": "small_cnn-8"},
        augment="",
        attacked=None,
    ),
    # At 8/255 the small student hardly learns in this budget (21 % under PGD-20), and rows would not differ.
    "cifar10": Study(
        images=None,
        shared={
            "eps": 4 / 255,
            "step_size": 2 / 255,
            "steps": 3,
            "epochs": 8,
            "channels_last": True,
            "eval_limit": 1000,
            "monitor_images": 200,
            "eval_every": 2,
        },
        teacher={"model": "small_cnn-24", "method": "pgd_at", "limit": 20000},
        student={"model": "small_cnn-8", "limit": 6000},
        augment="crop,flip",
        attacked=200,
    ),
}

# name of a row -> what it does differently from the rest
ROWS: dict[str, Json] = {
    "ce": {"method": "ce"},
    "kd": {"method": "kd"},
    "funmatch": {"method": "funmatch"},
    "pgd_at": {"method": "pgd_at"},
    "pgd_at+autoaugment": {"method": "pgd_at", "augment": "autoaugment"},
    "trades": {"method": "trades"},
    "rslad": {"method": "rslad"},
    "rslad+batchmean": {"method": "rslad", "reduction": "batchmean"},
    "adaad": {"method": "adaad"},
    "advfunmatch": {"method": "advfunmatch"},
    "advfunmatch+autoaugment": {"method": "advfunmatch", "augment": "autoaugment"},
}


@dataclass(frozen=True)
class Run:
    """One network to train and measure."""

    name: str
    config: TrainConfig
    attacked: int | None


def plan(data: str, images: str, out: Path, seeds: int, changes: Json) -> tuple[Run, list[Run]]:
    """The teacher and the students, in the order in which they run; `changes` go over the study's settings."""
    study = STUDIES[data]

    def run(name: str, seed: int, settings: Json) -> Run:
        augment = ",".join(filter(None, (study.augment, settings.get("augment"))))
        settings = {**study.shared, **settings, **changes, "augment": augment, "seed": seed}
        folder = out / data / f"{name}-{seed}"
        config = TrainConfig(data=images, out=str(folder), resume=True, **settings)
        return Run(name, config, changes.get("eval_limit", study.attacked))

    teacher = run("teacher", 0, study.teacher)
    known = {"teacher": str(Path(teacher.config.out) / "checkpoint.pt")}
    students = [
        run(name, seed, {**study.student, **known, **row})
        for seed in range(seeds)
        for name, row in ROWS.items()
    ]
    return teacher, students


def figures_path(run: Run) -> Path:
    """The file that says that a run is finished."""
    return Path(run.config.out) / "figures.json"


def finish(run: Run, show: bool = False) -> Json:
    """Train and measure one network, or read what an earlier call found."""
    torch.set_num_threads(1)  # two runs side by side use two cores better than one run does
    path = figures_path(run)
    wanted = run.config.resolve().to_dict()
    if path.exists():
        stored: Json = json.loads(path.read_text())
        if stored["config"] != wanted:
            raise InputError(f"out {run.config.out!r} holds a run with other settings; give another --out")
        return stored
    trained = train(run.config, label=run.name, show=show)
    test_set = load_dataset(run.config.data, split="test", limit=run.attacked)
    attacked = evaluate(
        load_model(Path(run.config.out) / "checkpoint.pt"),
        test_set,
        ["autoattack"],
        eps=run.config.eps,
        norm=run.config.norm,
    )
    found = {**trained, **attacked.accuracies}
    figures = {name: found[name] for name in FIGURES if name in found}
    write_json(path, {"config": wanted, **figures})
    return {"config": wanted, **figures}


def finish_all(runs: list[Run], jobs: int) -> Iterator[tuple[Run, Json]]:
    """Each run with its figures, as they come; `jobs` processes work at a time."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(finish, run): run for run in runs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def study(
    data: str, images: str, out: Path, *, seeds: int, jobs: int, changes: Json, finished_only: bool = False
) -> list[Record]:
    """Run what is not done yet, and return one record for each network; or only those of the runs that are done."""
    teacher, students = plan(data, images, out, seeds, changes)
    if finished_only:
        students = [run for run in students if figures_path(run).exists()]
    found = {teacher.config.out: finish(teacher, show=True)}
    say(teacher, found[teacher.config.out], f"{data}: 1 of {len(students) + 1}")
    finished = [run for run in students if figures_path(run).exists()]
    started = time.perf_counter()
    for count, (run, figures) in enumerate(finish_all(students, jobs), start=1):
        found[run.config.out] = figures
        fresh = max(count - len(finished), 1)
        left = (time.perf_counter() - started) / fresh * (len(students) - count) / 60
        say(run, figures, f"{data}: {count + 1} of {len(students) + 1}, about {left:.0f} min left")
    return [
        Record(
            name=f"{data}/{run.name}/seed {run.config.seed}",
            time=None,
            details={name: value for name, value in found[run.config.out].items() if name != "config"},
        )
        for run in (teacher, *students)
    ]


def say(run: Run, figures: Json, progress: str) -> None:
    titles = {"clean": "clean", "pgd20": f"PGD-20, {Ball(run.config.norm, run.config.eps)},"}
    accuracies = (f"{title} {figures[name]:.1f} %" for name, title in titles.items())
    print(f"{progress}   {run.name}, seed {run.config.seed}: {', '.join(accuracies)}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=STUDIES)
    parser.add_argument(
        "--images", help="where the data lies, as for advfunmatch train --data; not for digits"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each row (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"), help="folder of the results")
    parser.add_argument(
        "--finished-only", action="store_true", help="train nothing; write what there is already"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="seconds: one epoch of 100 images, to see that it runs"
    )
    args = parser.parse_args(argv)
    images = args.images or STUDIES[args.data].images
    if images is None:
        parser.error(f"{args.data} needs --images, such as folder:PATH or cifar10:PATH")
    if args.seeds < 1 or args.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    changes = {"epochs": 1, "limit": 100, "eval_limit": 20, "steps": 1} if args.smoke else {}
    try:
        records = study(
            args.data,
            images,
            args.out,
            seeds=args.seeds,
            jobs=args.jobs,
            changes=changes,
            finished_only=args.finished_only,
        )
    except InputError as error:
        print(f"benchmarks.study: {error}", file=sys.stderr)
        return 2
    chosen = STUDIES[args.data]
    settings = {"shared": chosen.shared | changes, "teacher": chosen.teacher, "student": chosen.student}
    run = results.new_run(
        {}, records, **settings, augment=chosen.augment, attacked=chosen.attacked, rows=ROWS
    )
    path = args.results / f"study-{args.data}-cpu.json"
    results.save(path, f"study-{args.data}", run)
    print(f"{path}: {len(records)} networks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
