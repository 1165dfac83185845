"""The cases under pytest-benchmark: one tiny case collects, runs and is compared with its peers."""

import os
import subprocess
import sys

import pytest

from benchmarks.results import ROOT

pytest.importorskip("pytest_benchmark")


def test_one_case(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/kernels", "-p", "no:cacheprovider"]
    command += ["-k", "softmax_kl and grad and 128x10 and float32 and not compile"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=3", f"--benchmark-storage={tmp_path}"]
    # A worker of pytest-xdist tells its children so, and pytest-benchmark would not time them.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'softmax_kl/grad/128x10/float32': 3 tests" in done.stdout
    last = done.stdout[done.stdout.index("ours against each peer") :].splitlines()[1]
    assert last.split()[:2] == ["softmax_kl/grad/128x10/float32", "ours"]
    assert last.endswith(" x formula")
    assert " x eager, " in last
