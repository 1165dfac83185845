"""Every example in a docstring runs and prints what it says; those of the pages compute what their text says.

That the pages' examples run at all is tested with the tables, in tests/benchmarks/test_documents.py.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import afm_kernels
from afm_kernels import softmax_kl_div

MODULES = [
    module.name
    for module in pkgutil.walk_packages(afm_kernels.__path__, "afm_kernels.")
    if not module.name.startswith("afm_kernels.triton")
    and not module.name.endswith(("__main__", "_cpu", "_cuda"))
]


@pytest.mark.parametrize("name", ["afm_kernels", *MODULES])
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_public_names_are_documented_with_an_example() -> None:
    for name in afm_kernels.__all__:
        if name == "__version__":
            continue
        public = getattr(afm_kernels, name)
        documentation = inspect.getdoc(public)
        assert documentation, name
        assert ">>>" in documentation, f"{name} has no example"


def test_types_of_a_users_program(tmp_path: Path) -> None:
    """py.typed is there and the public signatures say what they take."""
    pytest.importorskip("mypy")
    program = """
import torch
from afm_kernels import SoftmaxKLDivLoss, softmax_kl_div, softmax_kl_div_grad
loss: torch.Tensor = softmax_kl_div(torch.zeros(1, 2), torch.zeros(1, 2), temperature=2.0)
grads: tuple[torch.Tensor, ...] = softmax_kl_div_grad(torch.zeros(1, 2), torch.zeros(1, 2), wrt=("student",))
softmax_kl_div(torch.zeros(1, 2), torch.zeros(1, 2), temperature="hot")
"""
    path = tmp_path / "program.py"
    path.write_text(program)
    # By the project's settings, whose cache holds PyTorch's types once `make lint` has read them.
    out = subprocess.run(
        [sys.executable, "-m", "mypy", str(path)],
        cwd=Path(afm_kernels.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert 'incompatible type "str"; expected "float"' in out
    assert out.count("error:") == 1, out


# The pages. ----------------------------------------------------------------------------------------------------


ROOT = Path(__file__).parents[2]


def after_example(page: str, *marks: str, **scope: Any) -> dict[str, Any]:
    """The names that a page's examples leave, of those alone that hold ``marks``, run in the page's order."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"torch": torch, "softmax_kl_div": softmax_kl_div, **scope}
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    for mark in marks:
        assert sum(mark in example for example in examples) == 1, mark
    for example in examples:
        if any(mark in example for mark in marks):
            exec(compile(example, page, "exec"), names)
    return names


def kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher ‖ student) a row, in float64."""
    log_q, log_p = ((x.detach().double() / temperature).log_softmax(-1) for x in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_the_first_example_of_the_readme() -> None:
    got = after_example("README.md", "student_logits =")
    student, teacher = got["student_logits"], got["teacher_logits"]
    torch.testing.assert_close(got["loss"].double(), 16 * kl(student, teacher, 4.0).mean())
    wanted = 4 * (student.double().div(4).softmax(-1) - teacher.double().div(4).softmax(-1)) / 32
    torch.testing.assert_close(student.grad.double(), wanted, rtol=1e-5, atol=1e-8)


def test_the_loop_of_the_quickstart() -> None:
    """The loss is the divergence from raw logits that the text speaks of, and the step lowers it."""
    got = after_example("docs/quickstart.md", "import torch\nfrom afm_kernels")
    after = 16 * kl(got["student"](got["x"]), got["target"], 4.0).mean()
    assert after < got["loss"]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("shape", [(6, 11), (3, 4, 11)])
def test_the_table_of_reductions(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    log_q, p = student.log_softmax(-1), teacher.softmax(-1)
    theirs = {r: F.kl_div(log_q, p, reduction=r) for r in ("mean", "batchmean", "sum", "none")}
    ours = {r: softmax_kl_div(student, teacher, reduction=r) for r in theirs}
    torch.testing.assert_close(ours["mean"], theirs["mean"])
    torch.testing.assert_close(softmax_kl_div(student, teacher), 11 * theirs["mean"])
    torch.testing.assert_close(ours["batchmean"] * (4 if len(shape) == 3 else 1), theirs["batchmean"])
    torch.testing.assert_close(ours["sum"], theirs["sum"])
    torch.testing.assert_close(ours["none"], theirs["none"].sum(-1))


def test_the_example_with_labels() -> None:
    linear = torch.nn.Linear(20, 100), torch.nn.Linear(20, 100)
    got = after_example(
        "docs/quickstart.md",
        "import distillation_loss",
        student=linear[0],
        teacher=linear[1],
        x=torch.randn(32, 20),
    )
    student, teacher = (network(got["x"]) for network in linear)
    wanted = 0.1 * F.cross_entropy(student, got["labels"]) + 0.9 * 16 * kl(student, teacher, 4.0).mean()
    torch.testing.assert_close(got["loss"].double(), wanted.double())


def test_the_trainer_learns_what_comes_next() -> None:
    """A prompt of six tokens and an answer of four: the positions before those four tokens learn them, each once."""
    trainer_of = after_example("docs/quickstart.md", "class DistillationTrainer")["DistillationTrainer"]
    student, teacher = torch.randn(2, 2, 10, 50, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    labels = torch.arange(10).repeat(2, 1)
    labels[:, :6] = -100
    labels[1, 8:] = -100  # a shorter answer, padded

    def network(logits: torch.Tensor) -> Any:
        return lambda **inputs: SimpleNamespace(logits=logits)

    def loss_of(labels: torch.Tensor, **others: Any) -> torch.Tensor:
        inputs = {"input_ids": labels, "labels": labels}
        return trainer_of(network(teacher)).compute_loss(network(student), inputs, **others)

    loss = loss_of(labels)
    (gradient,) = torch.autograd.grad(loss, student)
    learning = gradient.abs().sum(-1) > 0
    assert learning.nonzero().tolist() == [[0, 5], [0, 6], [0, 7], [0, 8], [1, 5], [1, 6]]
    torch.testing.assert_close(loss.double(), 4 * kl(student, teacher, 2.0)[learning].mean())
    torch.testing.assert_close(
        loss_of(labels, num_items_in_batch=12), loss / 2
    )  # half of an accumulated batch
    nothing = loss_of(torch.full_like(labels, -100))
    assert nothing == 0
    assert not torch.autograd.grad(nothing, student)[0].any()


def test_the_compiled_example() -> None:
    step = after_example("docs/quickstart.md", "torch.compile")["step"]
    student, teacher = torch.randn(2, 8, 10)
    wanted = softmax_kl_div(student, teacher, divergence="js")
    torch.testing.assert_close(step(student.requires_grad_(), teacher), wanted)


def test_the_step_of_an_attack_of_ones_own() -> None:
    """One step stays in the ball and the images' range, and takes student and teacher further apart."""
    student, teacher = torch.nn.Linear(64, 10), torch.nn.Linear(64, 10)
    x = torch.rand(16, 64)
    got = after_example(
        "docs/quickstart.md", "pgd_step, softmax_kl_div_grad", student=student, teacher=teacher, x=x
    )
    x_adv = got["x_adv"]
    assert (x_adv - x).abs().max() <= 0.15 + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert kl(student(x_adv), teacher(x_adv), 1.0).mean() > kl(student(x), teacher(x), 1.0).mean()


@pytest.mark.parametrize(("page", "eps"), [("README.md", 8 / 255), ("docs/quickstart.md", 0.15)])
def test_the_attack_of_the_pages(page: str, eps: float) -> None:
    """The prepared networks are the networks, and the images found are in the ball and further apart."""
    advfunmatch = pytest.importorskip("advfunmatch")
    networks = {
        name: advfunmatch.create_model("small_cnn-8", num_classes=10, in_channels=1).eval()
        for name in ("student", "teacher")
    }
    got = after_example(page, "PGDAttack(", **networks, x=torch.rand(16, 1, 8, 8))
    student, teacher, x, x_adv = (got[name] for name in ("student", "teacher", "x", "x_adv"))
    student.eval()
    with torch.no_grad():
        torch.testing.assert_close(got["lean_teacher"](x), teacher(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["lean_student"](x), student(x), rtol=1e-4, atol=1e-5)
    assert (x_adv - x).abs().max() <= eps + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert kl(student(x_adv), teacher(x_adv), 1.0).mean() > kl(student(x), teacher(x), 1.0).mean()
