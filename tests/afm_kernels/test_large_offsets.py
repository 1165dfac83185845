"""Rows more than 2³¹ elements apart: a 32-bit offset anywhere would read, or write, the wrong row.

Only the rows themselves are touched; the 4 GiB between them stay an unmapped promise of the operating system.
"""

from __future__ import annotations

import pytest
import torch

import afm_kernels
from afm_kernels import ops

APART = 2**31 + 64
CLASSES = 100


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """Two rows as a view of one tensor, ``APART`` elements from each other."""
    try:
        block = torch.empty(APART + CLASSES, dtype=rows.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for 4 GiB: {error}")
    view = block.as_strided((2, CLASSES), (APART, 1))
    view.copy_(rows)
    return view


@pytest.mark.skipif("cpp" not in ops.TABLE["softmax_kl_forward", "cpu"], reason="the CPU module is not built")
def test_rows_beyond_two_billion_elements() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, CLASSES).bfloat16() for _ in range(2))
    far_student, far_out = far_apart(student), far_apart(torch.zeros_like(student))
    loss = afm_kernels.softmax_kl_div(student, teacher, reduction="none")
    assert torch.equal(afm_kernels.softmax_kl_div(far_student, teacher, reduction="none"), loss)
    (expected,) = afm_kernels.softmax_kl_div_grad(student, teacher, wrt=("student",))
    afm_kernels.softmax_kl_div_grad(far_student, teacher, wrt=("student",), out=(far_out,))
    assert torch.equal(far_out, expected)
