"""The kernel cases under pytest-benchmark, for its statistics, histories and comparisons.

    pytest benchmarks/kernels -k "softmax_kl and both" --benchmark-group-by=param:case --benchmark-autosave

Candidates run one after another here, not in turns: for ratios to quote, use ``python -m benchmarks``.
"""

from collections.abc import Iterator

import pytest

from benchmarks.kernels.case import WRONG, Case, errors_of
from benchmarks.kernels.suite import kernel_cases

pytest.importorskip("pytest_benchmark")

VARIANTS = ("ours", "ours recompute", "ours in place", "eager", "compile", "formula")


def parameters() -> Iterator[object]:
    for case in kernel_cases():
        if case.standard:
            for variant in VARIANTS:
                yield pytest.param(case, variant, id=f"{case.name}-{variant}")


@pytest.mark.parametrize(("case", "variant"), parameters())
def test_kernel(benchmark, case: Case, variant: str) -> None:
    built = case.build("cpu")
    if variant not in built.candidates:
        pytest.skip(f"{case.name} has no {variant}")
    call = built.candidates[variant]
    benchmark.extra_info["error"] = errors = errors_of(call(), built)
    benchmark.extra_info["bytes"] = built.bytes
    benchmark(call)
    if variant.startswith("ours"):
        assert all(error is not None and error <= WRONG[case.dtype] for error in errors.values())
