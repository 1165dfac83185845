"""Python threads, forked children, and tensors that 32-bit offsets cannot reach the end of."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from samples import draw

from afm_kernels import backend_info, ops, softmax_kl_div, softmax_kl_div_grad, use_backend

STEM = "softmax_kl"


def test_concurrent_calls(device: torch.device) -> None:
    """Four Python threads at once, each with its own logits and its own choice of backend."""
    backend = backend_info()["selected"]

    def work(seed: int) -> list[torch.Tensor]:
        results = []
        with use_backend(backend):
            for name in ("classes_1000", "classes_10", "hard_rows", "channels_last"):
                sample = draw(name, seed=seed, device=device)
                student, teacher = (
                    sample.student.clone().requires_grad_(),
                    sample.teacher.clone().requires_grad_(),
                )
                loss = softmax_kl_div(
                    student, teacher, dim=sample.dim, reduction="none", recompute=bool(seed % 2)
                )
                results += [loss.detach(), *torch.autograd.grad(loss.sum(), (student, teacher))]
                results += softmax_kl_div_grad(student, teacher, dim=sample.dim)
        return results

    alone = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(4)))
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_child() -> None:
    """A child forked after threaded use computes, serially, and does not wait for threads that it does not have."""
    code = """
import os, signal, sys, torch
from afm_kernels import softmax_kl_div_grad, use_backend
torch.manual_seed(0)
torch.set_num_threads(2)
student, teacher = torch.randn(2, 512, 1000)
with use_backend("cpp"):
    wanted = softmax_kl_div_grad(student, teacher)
    child = os.fork()
    if child == 0:
        signal.alarm(200)  # nobody is left to end a child that hangs
        got = softmax_kl_div_grad(student, teacher)
        # Compared by numpy: torch.equal would itself wait for threads here.
        os._exit(0 if all((a.numpy() == b.numpy()).all() for a, b in zip(wanted, got)) else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    if "cpp" not in ops.TABLE["softmax_kl_grad", "cpu"]:
        pytest.skip("no compiled CPU backend here")
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0


@pytest.mark.slow
def test_more_than_2_31_elements(device: torch.device) -> None:
    """2³¹ + elements: two expanded rows stand for millions, so that only the gradients of one side need memory."""
    if backend_info()["selected"] == "reference":
        pytest.skip("PyTorch's own operators, with their own temporaries")
    classes = 4096
    rows = 2**31 // classes + 3
    pair = draw("vocabulary", device=device)
    student, teacher = pair.student[:1, :classes], pair.teacher[:1, :classes]
    wanted = softmax_kl_div(student, teacher, reduction="sum")
    wide = [x.expand(rows, classes) for x in (student, teacher)]
    values = softmax_kl_div(*wide, reduction="none")
    assert values.shape == (rows,)
    assert torch.equal(values, wanted.expand(rows))
    torch.testing.assert_close(softmax_kl_div(*wide), wanted)


@pytest.mark.slow
def test_offsets_beyond_2_31(device: torch.device) -> None:
    """Rows that lie 2³¹ elements apart, of which only a few pages are ever touched."""
    storage = torch.empty(2**31 + 5000, dtype=torch.bfloat16, device=device)
    pair = draw("classes_1000", dtype=torch.bfloat16, device=device)
    view = storage.as_strided((2, 1000), (2**31 + 1000, 1))
    view.copy_(pair.student[:2])
    got = softmax_kl_div(view, pair.teacher[:2], reduction="none")
    assert torch.equal(got, softmax_kl_div(pair.student[:2], pair.teacher[:2], reduction="none"))
