"""DTensor logits: what two processes of a shard each compute is what one computes of all rows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from afm_kernels import (
    Projection,
    distillation_loss,
    dkl_loss,
    linear_kl_div,
    pgd_step,
    scale_shift_relu,
    softmax_kl_div,
    softmax_kl_div_grad,
)

if not torch.distributed.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

REDUCTIONS = ("none", "sum", "mean", "batchmean")


def losses() -> dict[str, Callable[..., Tensor]]:
    """The losses by name, called as loss(student, teacher, labels, row_weight, reduction=...)."""
    return {
        "softmax_kl_div": lambda s, t, y, w, **o: softmax_kl_div(s, t, temperature=2.0, row_weight=w, **o),
        "js, classes first": lambda s, t, y, w, **o: softmax_kl_div(
            s.transpose(1, 2), t.transpose(1, 2), divergence="js", dim=1, row_weight=w, **o
        ),
        "distillation_loss": lambda s, t, y, w, **o: distillation_loss(
            s, t, y, alpha=0.6, temperature=3.0, row_weight=w, **o
        ),
        "dkl_loss": lambda s, t, y, w, **o: dkl_loss(s, t, beta=2.0, row_weight=w, **o),
    }


def check_process() -> None:
    """In each of two processes: every loss over every placement of rows against the whole, on this process alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, 7)  # five rows of rows: 3 and 2
    labels, weight = torch.randint(7, (5, 4)), torch.rand(5, 4)
    upstream = torch.rand(5, 4)
    for place in (Shard(0), Shard(1), Replicate()):

        def spread(tensor: Tensor, place: Any = place) -> Any:
            return distribute_tensor(tensor, mesh, [place])

        # every loss over the rows of both processes, one over rows of their rows, and the same on both
        some = list(losses().items())[: 4 if place == Shard(0) else 1]
        for name, loss in some:
            for reduction in REDUCTIONS if name == "softmax_kl_div" else ("none", "batchmean"):
                whole = [x.clone().requires_grad_() for x in (student, teacher)]
                wanted = loss(*whole, labels, weight, reduction=reduction)
                sharded = [spread(x).requires_grad_() for x in (student, teacher)]
                got = loss(*sharded, spread(labels), spread(weight), reduction=reduction)
                case = f"{name}, {reduction}, {place}"
                assert isinstance(got, DTensor), case
                assert list(got.placements) == [place if reduction == "none" else Replicate()], case
                torch.testing.assert_close(got.full_tensor(), wanted, msg=lambda m, c=case: f"{c}: {m}")
                if reduction == "none":
                    wanted, got = (wanted * upstream).sum(), (got * spread(upstream)).sum()
                wanted_grads = torch.autograd.grad(3 * wanted, whole)
                for one, other in zip(torch.autograd.grad(3 * got, sharded), wanted_grads, strict=True):
                    assert list(one.placements) == [place], case
                    torch.testing.assert_close(one.full_tensor(), other, msg=lambda m, c=case: f"{c}: {m}")
        wanted_grads = softmax_kl_div_grad(student, teacher, row_weight=weight)
        outs = spread(torch.zeros_like(student)), spread(torch.zeros_like(teacher))
        sharded = [spread(student), spread(teacher)]
        for out in (None, outs):
            grads = softmax_kl_div_grad(*sharded, row_weight=spread(weight), out=out)
            for one, other in zip(grads, wanted_grads, strict=True):
                assert list(one.placements) == [place]
                torch.testing.assert_close(one.full_tensor(), other)
    one = distribute_tensor(student[:1], mesh, [Shard(0)])  # nothing for the second process
    torch.testing.assert_close(
        softmax_kl_div(one, distribute_tensor(teacher[:1], mesh, [Shard(0)])).full_tensor(),
        softmax_kl_div(student[:1], teacher[:1]),
    )
    check_sharded_weights(mesh)


def check_sharded_weights(mesh: Any) -> None:
    """Heads as FSDP shards them, each process with rows of its own: the mean of the processes' gradients."""
    from torch.distributed.tensor import Shard, distribute_tensor

    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    weight, teacher_weight = torch.randn(2, 9, 4, dtype=torch.float64)
    bias = torch.randn(9, dtype=torch.float64)
    whole = [t.clone().requires_grad_() for t in (weight, teacher_weight, bias)]
    sharded = [distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_() for t in whole]
    losses = [
        linear_kl_div(h, whole[0], Projection(ht, whole[1]), student_bias=whole[2])
        for h, ht in zip(hidden, teacher_hidden, strict=True)
    ]
    (sum(losses) / 2).backward()
    own = linear_kl_div(
        hidden[rank], sharded[0], Projection(teacher_hidden[rank], sharded[1]), student_bias=sharded[2]
    )
    torch.testing.assert_close(own, losses[rank])
    own.backward()
    for part, all_of_it in zip(sharded, whole, strict=True):
        torch.testing.assert_close(part.grad.full_tensor(), all_of_it.grad)
        assert part.grad.placements == part.placements


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes() -> None:
    code = (
        "import torch.distributed as dist, test_sharded; dist.init_process_group('gloo'); "
        "test_sharded.check_process(); dist.destroy_process_group()"
    )
    here = os.path.dirname(__file__)
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([here, *sys.path]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(o[-3000:] for o in output)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    if torch.distributed.is_initialized():
        pytest.skip("a process group of another test is open")
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_what_is_refused_says_so(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    plain = torch.randn(4, 6)
    rows, classes = (distribute_tensor(plain, mesh, [Shard(dim)]) for dim in (0, 1))
    partial = DTensor.from_local(plain, mesh, [Partial()])
    labels = torch.zeros(4, dtype=torch.long)
    for loss in (
        softmax_kl_div,
        softmax_kl_div_grad,
        dkl_loss,
        lambda s, t: distillation_loss(s, t, labels, alpha=0.5, temperature=1.0),
    ):
        with pytest.raises(
            ValueError, match=r"sharded over its classes .* need group=, which is not built yet"
        ):
            loss(classes, classes)
        with pytest.raises(ValueError, match=r"student_logits has the placement Partial"):
            loss(partial, partial)
        with pytest.raises(TypeError, match="teacher_logits is a Tensor and student_logits a DTensor"):
            loss(rows, plain)
        with pytest.raises(TypeError, match="student_logits is a Tensor and teacher_logits a DTensor"):
            loss(plain, rows)
    with pytest.raises(TypeError, match="labels is a Tensor and the logits are DTensors"):
        distillation_loss(rows, rows, labels, alpha=0.5, temperature=1.0)
    with pytest.raises(TypeError, match="row_weight is a Tensor and the logits are DTensors"):
        softmax_kl_div(rows, rows, row_weight=torch.ones(4))
    with pytest.raises(ValueError, match="row_weight has shape"):
        softmax_kl_div(rows, rows, row_weight=rows)
    with pytest.raises(ValueError, match="reduction is 'max'; allowed"):
        softmax_kl_div(rows, rows, reduction="max")
    with pytest.raises(TypeError, match=r"x_adv is a DTensor; pass .*x_adv.to_local\(\)"):
        pgd_step(rows, rows, rows, step_size=0.1, eps=0.1)
    with pytest.raises(TypeError, match=r"scale is a DTensor; pass .*scale.to_local\(\)"):
        scale_shift_relu(plain, distribute_tensor(torch.ones(6), mesh, [Shard(0)]), torch.zeros(6))
