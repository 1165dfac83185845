"""Triton kernels under the interpreter: the shared tests of every operator, once down each path of the kernels.

The interpreter is chosen when Triton is imported, and ahead-of-time compilation fails under it, so each run is a
process of its own, a fork of one that did the imports. It takes about 10 ms a kernel program; ``RUNS`` picks, for each
path, the tests that could break there, and lowers the block sizes until a few hundred classes take the path.
Everything is run by the test that is marked slow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from forks import Host


def _unfit_interpreter() -> str | None:
    """Why kernels cannot be interpreted here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    release = tuple(int(part) for part in version("triton").split(".")[:2])
    # Its tl.minimum and tl.maximum keep a NaN, which a GPU's drop. See Note [Excluded classes] in row_math.py.
    return (
        f"Triton {version('triton')} interprets minimum otherwise than GPUs; 3.8 is needed"
        if release < (3, 8)
        else None
    )


pytestmark = pytest.mark.skipif(_unfit_interpreter() is not None, reason=str(_unfit_interpreter()))

HERE = Path(__file__).parent


class Run(NamedTuple):
    """Shared tests to run with the given ``Limits``. ``least`` of them have to exist and pass."""

    tests: tuple[str, ...]  # files
    choose: str  # a pytest -k expression
    limits: dict[str, int]
    least: int


# 8 lanes of one vector: 64 classes in half precision and 32 in single are a tile, twice that is streamed.
_SMALL = {"on_chip": 16, "on_chip_more": 16, "lanes": 8, "grad_block": 64}
# The divergences that keep all the sums (jeffreys) and pass twice (js); a pair of half, and of mixed dtypes.
_STREAMED = (
    "(test_rows_and_gradients and (sliced or (hard_values and (jeffreys or js))))"
    " or (test_dtypes and sliced and (dtype2- or dtype4-))"
)

RUNS = {
    # the row on chip: tiles of many rows, of one row, remainders, every hard row
    "on_chip": Run(
        ("test_softmax_kl.py",),
        "(test_rows_and_gradients and (classes_1- or classes_10- or classes_33 or classes_1003 or many_rows or weighted"
        " or channels_last or mixed_layouts or transposed or expanded or permuted or hard_rows or near_offset"
        " or near_1e-3_few_classes"
        " or no_rows))"
        " or test_each_hard_row or (test_grad_function and (sliced or weighted or hard_rows))"
        " or (test_dtypes and (hard_rows or channels_last)) or test_offset_of_one_side"
        " or (test_error_of_small_divergences and (100-offsets1 or 100-offsets3))",
        {},
        180,
    ),
    # one program a row
    "streamed": Run(("test_softmax_kl.py",), _STREAMED, {**_SMALL, "programs_per_multiprocessor": 1}, 7),
    # several programs a row, and the kernel that joins them
    "split": Run(
        ("test_softmax_kl.py",),
        "(test_rows_and_gradients and classes_100-) or (test_offset_of_one_side and jeffreys)",
        {**_SMALL, "programs_per_multiprocessor": 80},
        7,
    ),
    "direction": Run(
        ("test_softmax_kl_direction.py",),
        "(test_equals_exact and 25.0) or test_rows_of or test_is_the or test_equal_sides or test_logits_up or 130",
        {},
        30,
    ),
    # rows of more than one block
    "direction_blocks": Run(
        ("test_softmax_kl_direction.py",),
        "(test_is_the and (classes_10 or hard_rows)) or 130",
        {"on_chip_more": 32},
        3,
    ),
    "distillation": Run(
        ("test_distillation.py",),
        "(test_rows_and_gradients and (classes_10- or hard_rows or weighted)) or test_ends or test_table_by_hand"
        " or test_label_that or test_no_rows",
        {},
        30,
    ),
    "distillation_streamed": Run(
        ("test_distillation.py",),
        "test_rows_and_gradients and classes_100-",
        {**_SMALL, "programs_per_multiprocessor": 80},
        2,
    ),
    # its rows by the losses' kernels
    "linear_kl": Run(
        ("test_linear_kl.py",),
        "test_given_logits or (test_loss_and_gradients and ((-js- and plain) or -kl-labels))",
        {},
        4,
    ),
    # certain of a class, in its three ways
    "certain": Run(
        ("test_certain_rows.py",),
        "(test_softmax_kl and -129) or (test_distillation and 10-) or (test_dkl and 10-) or (test_js and 129-10.0)",
        {},
        9,
    ),
    "certain_streamed": Run(
        ("test_certain_rows.py",),
        "(test_softmax_kl and -129) or ((test_distillation or test_dkl) and 129-0.0) or (test_js and 129-10.0)",
        {**_SMALL, "programs_per_multiprocessor": 1},
        7,
    ),
    "certain_split": Run(
        ("test_certain_rows.py",),
        "(test_softmax_kl and (kl-129 or -js-129)) or (test_distillation and 129-0.0)",
        {**_SMALL, "programs_per_multiprocessor": 80},
        4,
    ),
    "dkl": Run(
        ("test_dkl.py",),
        "test_factors or test_class_weights or test_each_hard_row or test_hard_classes or test_row_weights"
        " or test_reductions or (test_is_the_published_form and (no_rows or channels_last))",
        {},
        50,
    ),
    # rows of more than one block
    "dkl_blocks": Run(
        ("test_dkl.py",),
        "test_factors or test_class_weights or (test_each_hard_row and 1.0-1.0) or (test_dtypes and channels_last)",
        {"on_chip_more": 16},
        30,
    ),
    # Not what takes long and holds nothing new for a kernel: large images, layers above the operators, threads, which
    # Triton has none of, and two dtypes of four: what is loaded is float32 from there on, or float64 for l2.
    "attack_and_networks": Run(
        ("test_pgd_step.py", "test_apgd_step.py", "test_scale_shift_relu.py"),
        "not test_large and not gradcheck and not transforms and not compiles and not opcheck and not memory_format"
        " and not is_batch_norm and not threads and not uniform-l2"
        " and not (test_truth and (torch.float16 or torch.float64))",
        {},
        35,
    ),
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Host]:
    # numpy says, each time, that NaN and infinity are among the numbers
    with Host(TRITON_INTERPRET="1", PYTHONWARNINGS="ignore::RuntimeWarning") as host:
        yield host


def run_shared_tests(interpreter: Host, run: Run) -> None:
    chosen = ["-p", "triton_limits", "-k", f"triton-cpu and ({run.choose})"]
    done = interpreter.pytest(
        *chosen, *(str(HERE / test) for test in run.tests), AFM_TRITON_LIMITS=json.dumps(run.limits)
    )
    assert done.returncode == 0, done.said[-8000:]
    passed = re.search(r"(\d+) passed", done.said)
    assert passed is not None, done.said[-2000:]
    assert int(passed.group(1)) >= run.least, f"only {passed.group(1)} tests were found"


@pytest.mark.parametrize("run", RUNS)
def test_shared_tests(interpreter: Host, run: str) -> None:
    run_shared_tests(interpreter, RUNS[run])


@pytest.mark.slow
@pytest.mark.parametrize("limits", ["default", "streamed", "split"])
def test_all_shared_tests(interpreter: Host, limits: str) -> None:
    everything = (
        "test_softmax_kl.py",
        "test_softmax_kl_direction.py",
        "test_distillation.py",
        "test_dkl.py",
        "test_pgd_step.py",
        "test_apgd_step.py",
        "test_scale_shift_relu.py",
    )
    changes = {} if limits == "default" else RUNS[limits].limits
    too_long = "not determinism and not never_negative and not small_divergences"
    run_shared_tests(interpreter, Run(everything, "test" if limits == "default" else too_long, changes, 500))


def test_offsets_are_64_bits_wide(interpreter: Host, tmp_path: Path) -> None:
    """Row 3 of rows 2^31 + 8 elements apart, on one level and on two: a tensor too large for an ordinary test."""
    program = """
import torch, triton, triton.language as tl
from afm_kernels.triton.row_memory import row_start

@triton.jit
def starts(g_out, rows_inner: tl.int64, outer: tl.int64, inner: tl.int64):
    row = tl.program_id(0).to(tl.int64)
    tl.store(g_out + 2 * row, row_start(row, rows_inner, outer, inner, 8, False))
    tl.store(g_out + 2 * row + 1, row_start(row, rows_inner, outer, inner, 8, True))

out = torch.zeros(4, 2, dtype=torch.int64)
starts[(4,)](out, 2, (2**31 + 8) // 8, 5)
assert out[3].tolist() == [3 * (2**31 + 8), 2**31 + 8 + 40], out
"""
    (tmp_path / "offsets.py").write_text(program)
    done = interpreter.program(tmp_path / "offsets.py")
    assert done.returncode == 0, done.said
