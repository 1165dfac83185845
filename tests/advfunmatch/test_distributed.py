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
from advfunmatch.training.distributed import World, synchronise_batch_norm
from processes import start
from saved import flags_of, same, state_of
from torch import nn

# Whatever couples the images of a batch or draws for them: batch norm, AWP, clipping, augmentation, noise, and a last
# batch of nine images. A small learning rate, because a sign that rounding flips moves a pixel by two steps.
SETTINGS: dict[str, object] = {
    "data": "digits",
    "model": "small_cnn-4",
    "method": "advfunmatch",
    "epochs": 2,
    "limit": 231,
    "validation": 30,
    "eval_limit": 60,
    "batch_size": 64,
    "steps": 2,
    "eps": 0.15,
    "augment": "crop,cutout",
    "awp_warmup": 0,
    "clip_grad": 1.0,
    "lr": 0.01,
    "ema": 0.5,
    "awp": True,
    "save_every": 1,
    "eval_every": 2,
}


COMMAND = ["train", *flags_of(TrainConfig(**SETTINGS, out="")), "--device", "cpu"]  # type: ignore[arg-type]


def two_processes(
    folder: Path, *flags: str, second_dies: tuple[str, int] | None = None
) -> tuple[list[int | None], str]:
    """Run two processes as torchrun would; their exit codes, and what both said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = [folder / f"said-{rank}" for rank in range(2)]
    both = [
        start(
            [*COMMAND, *flags],
            said[rank],
            environment={
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            dies=second_dies if rank == 1 else None,
        )
        for rank in range(2)
    ]
    for process in both:
        process.join(timeout=300)
    return [process.exitcode for process in both], "".join(file.read_text() for file in said)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> tuple[Path, str, str]:
    """The folder of a run of two processes, and what was said."""
    out = tmp_path_factory.mktemp("two") / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "advfunmatch", *COMMAND, "--teacher", teacher, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


def test_two_processes_compute_what_one_does(
    finished: tuple[Path, str, str], teacher: str, tmp_path: Path
) -> None:
    train(TrainConfig(**SETTINGS, teacher=teacher, out=str(tmp_path / "one")))  # type: ignore[arg-type]
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
    assert said.count("PGD-20") == 2, "of the last epoch, and of the best"
    assert complained.count("100%") == 1
    names = ["best.pt", "checkpoint.pt", "metrics.jsonl", "result.json", "run.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [json.loads(row)["epoch"] for row in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_killed_process_ends_both_and_they_continue_bit_for_bit(
    finished: tuple[Path, str, str], teacher: str, tmp_path: Path
) -> None:
    flags = ["--teacher", teacher, "--out", str(tmp_path / "killed")]
    codes, said = two_processes(tmp_path, *flags, second_dies=("advfunmatch.training.trainer.train_step", 6))
    assert codes == [2, -signal.SIGKILL]
    assert "Traceback" not in said, "the other process ends quietly"
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["step"] == 5

    codes, said = two_processes(tmp_path, *flags, "--resume")
    assert codes == [0, 0], said
    assert same(state_of(tmp_path / "killed"), state_of(finished[0]))


def test_what_one_process_cannot_do_ends_all_with_one_sentence(tmp_path: Path, teacher: str) -> None:
    (tmp_path / "file").write_text("kept")
    # Only the first process writes.
    codes, said = two_processes(tmp_path, "--teacher", teacher, "--out", str(tmp_path / "file" / "run"))
    assert codes == [2, 2]
    assert said.count("error: out ") == 1, said
    assert "Traceback" not in said


LEAVES = """
import pathlib, sys, torch
from advfunmatch.training.distributed import join_world, leave_world

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


def test_processes_of_one_command_end_with_one_line(tmp_path: Path) -> None:
    """An error, and Ctrl-C: one sentence, and its exit code."""
    command = [sys.executable, "-m", "advfunmatch", *COMMAND, "--processes", "2", "--out"]

    def begun(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True)

    refused = begun(str(tmp_path / "a"), "--epochs", "0")
    stopped = begun(str(tmp_path / "b"), "--epochs", "9999", "--method", "ce", "--no-awp")
    assert refused.communicate() == (None, "error: epochs is 0, but must be at least 1\n")
    assert refused.returncode == 2
    while not (tmp_path / "b" / "checkpoint.pt").exists() and stopped.poll() is None:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    try:
        said = stopped.communicate(timeout=300)[1].splitlines()
    finally:
        stopped.kill()  # one that goes on would do so for hours
    said = [line for line in said if "images/s" not in line and not line.startswith("warning: ")]
    assert len(said) == 1, said
    assert said[0].startswith("error: interrupted; what was written is whole")
    assert stopped.returncode == 130


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
        _, complained = process.communicate(timeout=300)
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
