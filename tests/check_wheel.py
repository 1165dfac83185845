"""Whether an installed wheel works: run by ``make wheel`` and ``make compat`` in an environment of its own.

    python tests/check_wheel.py

from any folder but the repository's. It needs torch and numpy, no test framework, and fails with an AssertionError.
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path

import torch

import afm_kernels
from afm_kernels import (
    ops,
    pgd_start,
    pgd_step,
    scale_shift_relu,
    softmax_kl_div,
    softmax_kl_div_grad,
    use_backend,
)

REPOSITORY = Path(__file__).resolve().parents[1]


def results() -> dict[str, torch.Tensor]:
    """Something of every operator family, forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    student, teacher = random(64, 100).requires_grad_(), random(64, 100).requires_grad_()
    for _ in range(2):  # the second call takes a shorter way, if the kernels are compiled
        student.grad = teacher.grad = None
        loss = softmax_kl_div(student, teacher, temperature=4.0)
        loss.backward()
    x, grad = random(4, 3, 8, 8).sigmoid(), random(4, 3, 8, 8)
    activation = random(4, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    rectified = scale_shift_relu(activation, random(3), random(3), x)
    rectified.backward(grad)
    found = {"loss": loss, "student": student.grad, "teacher": teacher.grad}
    found |= {"rectified": rectified, "activation": activation.grad}
    found["student alone"], found["teacher alone"] = softmax_kl_div_grad(student.detach(), teacher.detach())
    for norm in ("linf", "l2"):
        found[f"step {norm}"] = pgd_step(x, grad, x, step_size=0.1, eps=0.05, norm=norm)
    found["start"] = pgd_start(x, eps=0.1, generator=torch.Generator().manual_seed(0))
    return {name: tensor.detach() for name, tensor in found.items()}


def main() -> None:
    package = Path(afm_kernels.__file__).resolve().parent
    assert package != REPOSITORY / "afm_kernels", (
        f"{package} is the source tree: run this from another folder"
    )
    files = [str(file) for file in distribution("advfunmatch").files or ()]
    assert any(file.endswith("afm_kernels/py.typed") for file in files), "py.typed is missing"
    sources = (".cpp", ".cu", ".cuh", ".h", ".o")
    clutter = [file for file in files if file.endswith(sources) or file.startswith(("tests", "csrc"))]
    assert not clutter, f"the wheel carries sources: {clutter[:3]}"
    assert find_spec("advfunmatch") is not None, (
        "advfunmatch is missing"
    )  # importing it needs the extra "train"

    assert ops.STATUS["cpp"] == "loaded", f"CPU module: {ops.STATUS['cpp']}"
    with use_backend("reference"):
        expected = results()
    with use_backend("cpp"):
        found = results()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6), f"{name} differs from the reference"

    info = afm_kernels.backend_info()
    print(
        f"advfunmatch {version('advfunmatch')} from {package}: {len(found)} results right on "
        f"torch {torch.__version__}, Python {sys.version.split()[0]}, instruction set {info['cpu_capability']}; "
        f"cuda module: {ops.STATUS['cuda']}"
    )


if __name__ == "__main__":
    main()
