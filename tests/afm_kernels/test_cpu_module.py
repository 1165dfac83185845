"""The compiled CPU module as a whole: instruction sets, threads, fork. Its operators are tested with their stems."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import Host

from afm_kernels import (
    backend_info,
    distillation_loss,
    dkl_loss,
    ops,
    pgd_step,
    scale_shift_relu,
    softmax_kl_div,
    use_backend,
)

CAPABILITIES = ("portable", "avx2", "avx512")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(ops.STATUS["cpp"] != "loaded", reason=f"cpp backend: {ops.STATUS['cpp']}")


def python(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@functools.cache
def best_capability() -> str:
    """What the processor offers, whatever this run was told to use."""
    command = "import torch, afm_kernels; print(torch.ops.afm_kernels.cpu_capability())"
    return python("-c", command, AFM_CPU_CAPABILITY="").stdout.strip()


def test_capability_is_reported() -> None:
    assert backend_info()["cpu_capability"] in CAPABILITIES


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_is_right(host: Host, capability: str) -> None:
    """The values that the tests of the stems check, once more on each instruction set that this machine has."""
    best = best_capability()
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        pytest.skip(f"this machine runs no more than {best}")
    if capability == backend_info()["cpu_capability"]:
        pytest.skip("the tests of the stems in this very run are on it")
    stems = (
        "softmax_kl",
        "distillation",
        "dkl",
        "topk_kl",
        "pgd_step",
        "apgd_step",
        "scale_shift_relu",
        "conv3x3",
        "small_conv",
    )
    done = host.pytest(
        *("-k", "cpp and (truth or rows_and_gradients or published_form)"),
        *(f"tests/afm_kernels/test_{stem}.py" for stem in stems),
        AFM_CPU_CAPABILITY=capability,
    )
    assert done.returncode == 0, done.said[-3000:]
    assert " passed" in done.said


@pytest.mark.parametrize(
    ("value", "sentence"),
    [("neon", "AFM_CPU_CAPABILITY is 'neon'; allowed: portable, avx2, avx512")],
)
def test_bad_capability_is_one_sentence(value: str, sentence: str) -> None:
    command = "import torch, afm_kernels as a; x = torch.rand(2, 2); a.pgd_step(x, x, x, step_size=1, eps=1)"
    run = python("-c", command, AFM_CPU_CAPABILITY=value)
    assert run.returncode != 0
    assert sentence in run.stderr


def inputs(batch: int = 64) -> list[torch.Tensor]:
    """Enough elements for both threads, and an l2 sample large enough to be shared between them."""
    generator = torch.Generator().manual_seed(7)
    x, grad = (torch.rand(batch, 3, 32, 32, generator=generator) for _ in range(2))
    big, big_grad = (torch.rand(1, 3, 224, 224, generator=generator) for _ in range(2))
    vector = torch.rand(3, generator=generator)
    return [x, grad, x.to(memory_format=torch.channels_last), big, big_grad, vector]


def work(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    x, grad, pixels, big, big_grad, vector = tensors
    with use_backend("cpp"):
        return [
            pgd_step(x, grad, x, step_size=0.1, eps=0.05),
            pgd_step(x, grad, x, step_size=3.0, eps=2.0, norm="l2"),
            pgd_step(big, big_grad, big, step_size=30.0, eps=20.0, norm="l2"),
            scale_shift_relu(x, vector, vector, grad),
            scale_shift_relu(pixels, vector, vector),
        ]


def same(results: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_bitwise_equal_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    tensors = inputs()
    expected = work(tensors)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert same(work(tensors), expected), f"{n} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["softmax_kl", "distillation", "dkl"])
def test_losses_are_bitwise_equal_for_any_number_of_threads(name: str, recompute: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = [torch.randn(600, 1000, generator=generator).requires_grad_() for _ in range(2)]
    labels = torch.randint(1000, (600,), generator=generator)
    loss = {
        "softmax_kl": partial(softmax_kl_div, *logits),
        "distillation": partial(distillation_loss, *logits, labels, alpha=0.5, temperature=2.0),
        "dkl": partial(dkl_loss, *logits),
    }[name]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("cpp"):
                rows, mean = (loss(reduction=each, recompute=recompute) for each in ("none", "mean"))
                results.append([rows.detach(), mean.detach(), *torch.autograd.grad(mean, logits)])
    finally:
        torch.set_num_threads(threads)
    assert same(results[1], results[0])
    assert same(results[2], results[0])


def test_concurrent_calls_from_python_threads() -> None:
    tensors = inputs()
    expected = work(tensors)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: work(tensors), range(12)):
            assert same(results, expected)


# PyTorch's own threaded operators would hang in the child: it calls ours alone, and compares bytes.
FORK = """
import os, sys, torch
sys.path.insert(0, "tests/afm_kernels")
from test_cpu_module import inputs, work
torch.set_num_threads(2)
tensors = inputs()
expected = [t.numpy().tobytes() for t in work(tensors)]  # starts the pool, whose threads the child will not have
child = os.fork()
if child == 0:
    os._exit(0 if [t.numpy().tobytes() for t in work(tensors)] == expected else 1)
_, status = os.waitpid(child, 0)
assert [t.numpy().tobytes() for t in work(tensors)] == expected  # the parent goes on with its pool
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_forked_child_neither_hangs_nor_differs() -> None:
    run = python("-c", FORK, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
