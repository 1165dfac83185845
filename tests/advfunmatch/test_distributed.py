"""Two gloo processes give what one gives at the same global batch; one of them speaks and writes for both."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from advfunmatch import InputError, TrainConfig, train
from advfunmatch.distributed import World, synchronise_batch_norm
from saved import same, state_of
from torch import nn

# Whatever couples the images of a batch or draws for them: batch norm, AWP, clipping, augmentation, noise, and a last
# batch of nine images. A small learning rate, because a sign that rounding flips moves a pixel by two steps.
SETTINGS: dict[str, object] = {
    "data": "digits",
    "model": "small_cnn-4",
    "method": "advfunmatch",
    "epochs": 2,
    "limit": 201,
    "eval_limit": 60,
    "batch_size": 64,
    "steps": 2,
    "eps": 0.15,
    "augment": "crop,cutout",
    "awp_warmup": 0,
    "clip_grad": 1.0,
    "lr": 0.01,
    "ema": 0.5,
    "save_every": 1,
    "eval_every": 2,
}


def two_processes(out: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, value in SETTINGS.items():
        flags += (f"--{name.replace('_', '-')}", str(value))
    return subprocess.Popen(
        [*command, "-m", "advfunmatch", "train", *flags, "--awp", "--device", "cpu", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> tuple[Path, str, str]:
    """The folder of a run of two processes, and what was said."""
    out = tmp_path_factory.mktemp("two") / "run"
    process = two_processes(out, "--teacher", teacher)
    said, complained = process.communicate(timeout=300)
    assert process.returncode == 0, complained
    return out, said, complained


def test_two_processes_compute_what_one_does(
    finished: tuple[Path, str, str], teacher: str, tmp_path: Path
) -> None:
    train(TrainConfig(**SETTINGS, teacher=teacher, awp=True, out=str(tmp_path / "one")))  # type: ignore[arg-type]
    one, two = (
        torch.load(out / "checkpoint.pt", weights_only=True) for out in (tmp_path / "one", finished[0])
    )
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    for name, value in one["training"]["student"].items():
        torch.testing.assert_close(two["training"]["student"][name], value, rtol=1e-3, atol=1e-4)
    losses = [row["training"]["metrics"][-1]["loss"] for row in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_one_process_speaks_and_writes(finished: tuple[Path, str, str]) -> None:
    out, said, complained = finished
    assert said.count("PGD-20") == 1
    assert complained.count("100%") == 1
    names = ["checkpoint.pt", "metrics.jsonl", "result.json", "run.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [json.loads(row)["epoch"] for row in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_killed_process_ends_both_and_they_continue_bit_for_bit(
    finished: tuple[Path, str, str], teacher: str, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = two_processes(out, "--teacher", teacher)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    _, complained = process.communicate(timeout=120)
    assert "rank0" not in complained, "the other process ends quietly"
    assert 0 < torch.load(out / "checkpoint.pt", weights_only=True)["step"] < 8, (
        "it was to be killed on the way"
    )

    process = two_processes(out, "--teacher", teacher, "--resume")
    _, complained = process.communicate(timeout=300)
    assert process.returncode == 0, complained
    assert same(state_of(out), state_of(finished[0]))


def test_what_one_process_cannot_do_ends_all_with_one_sentence(tmp_path: Path, teacher: str) -> None:
    (tmp_path / "file").write_text("kept")
    process = two_processes(tmp_path / "file" / "run", "--teacher", teacher)  # only the first process writes
    _, complained = process.communicate(timeout=300)
    assert process.returncode != 0  # torchrun's own
    assert complained.count("error: out ") == 1, complained
    assert "exitcode  : 2" in complained, complained
    assert "rank0" not in complained
    assert "rank1" not in complained


LEAVES = """
import pathlib, sys, torch
from advfunmatch.distributed import join_world, leave_world

def communicating():
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]

world, _ = join_world(torch.device("cpu"))
world.sum_([torch.ones(3)])
import torch.distributed.nn.functional  # as dynamo does
assert communicating()
leave_world()
sys.exit(", ".join(communicating()) or 0)
"""


def test_no_thread_outlives_the_run() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES],
            env={**common, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in both:
        _, complained = process.communicate(timeout=120)
        assert process.returncode == 0, complained


def test_shares_make_up_the_batch() -> None:
    x, labels = torch.rand(7, 1, 2, 2), torch.arange(7)
    shares = [World(rank, 3).share(x, labels) for rank in range(3)]
    assert torch.equal(torch.cat([part for (part, _), _ in shares]), x)
    assert torch.equal(torch.cat([part for (_, part), _ in shares]), labels)
    assert [weight for _, weight in shares] == [3 / 7, 2 / 7, 2 / 7]
    few = [World(rank, 3).share(x[:2], labels[:2]) for rank in range(3)]
    assert [(len(part), weight) for (part, _), weight in few] == [(2, 1 / 3)] * 3


def test_a_norm_that_cannot_be_synchronised_is_named() -> None:
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(InputError, match="model is 'odd', whose Own cannot be synchronised"):
        synchronise_batch_norm(nn.Sequential(nn.BatchNorm2d(2), Own(2)), "odd")
