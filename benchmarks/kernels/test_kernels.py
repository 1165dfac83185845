"""The kernel cases under pytest-benchmark, for its statistics, histories and comparisons.

    pytest benchmarks/kernels                                      # all; a table a case, then ours against each peer
    pytest benchmarks/kernels -k "softmax_kl and 512x1000"         # some; "and not compile" saves the compiling
    pytest benchmarks/kernels --benchmark-autosave --benchmark-compare

Candidates run one after another here, not in turns: for ratios to quote, use ``python -m benchmarks``.
"""

from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.kernels.case import PEERS, WRONG, Built, Case, errors_of
from benchmarks.kernels.suite import kernel_cases

pytest.importorskip("pytest_benchmark")

VARIANTS = ("ours", "ours recompute", "ours in place", *(peer for peer in PEERS if peer != "liger"))
PARAMETERS = [
    pytest.param(case, variant, id=f"{case.name}-{variant}")
    for case in kernel_cases()
    if case.standard
    for variant in VARIANTS
]


@lru_cache(maxsize=1)
def built(case: Case) -> Built:
    """Made once for the variants of a case, which follow each other."""
    torch._dynamo.reset()
    return case.build("cpu")


@pytest.mark.parametrize(("case", "variant"), PARAMETERS)
def test_kernel(benchmark: Any, medians: dict[str, dict[str, float]], case: Case, variant: str) -> None:
    made = built(case)
    if variant not in made.candidates:
        pytest.skip(f"{case.name} has no {variant}")
    call = made.candidates[variant]
    errors = errors_of(call(), made)
    benchmark.group, benchmark.name = case.name, variant
    benchmark.extra_info.update(error=errors, bytes=made.bytes)
    benchmark(call)
    if benchmark.stats is not None:  # it is where --benchmark-disable asks for the answers alone
        medians.setdefault(case.name, {})[variant] = benchmark.stats.stats.median
    if variant.startswith("ours"):
        assert all(error is not None and error <= WRONG[case.dtype] for error in errors.values())
