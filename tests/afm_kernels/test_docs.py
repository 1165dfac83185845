"""Every example in a docstring of the library runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import afm_kernels

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


def test_types_of_a_users_program(tmp_path: object) -> None:
    """py.typed is there and the public signatures say what they take."""
    pytest.importorskip("mypy")
    program = """
import torch
from afm_kernels import SoftmaxKLDivLoss, softmax_kl_div, softmax_kl_div_grad
loss: torch.Tensor = softmax_kl_div(torch.zeros(1, 2), torch.zeros(1, 2), temperature=2.0)
grads: tuple[torch.Tensor, ...] = softmax_kl_div_grad(torch.zeros(1, 2), torch.zeros(1, 2), wrt=("student",))
softmax_kl_div(torch.zeros(1, 2), torch.zeros(1, 2), temperature="hot")
"""
    path = tmp_path / "program.py"  # type: ignore[operator]
    path.write_text(program)
    out = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-incremental", str(path)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert 'incompatible type "str"; expected "float"' in out
    assert out.count("error:") == 1, out
