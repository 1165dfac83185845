"""How pytest-benchmark shows the kernel cases: few columns, a table a case, and last ours against each peer."""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks.kernels.case import PEERS
from benchmarks.timing import ALLOCATOR_SETTINGS

_MEDIANS = pytest.StashKey[dict[str, dict[str, float]]]()
_DEFAULTS = {
    "benchmark_columns": ["median", "iqr", "min", "rounds"],
    "benchmark_sort": "median",
    "benchmark_warmup": True,
    "benchmark_warmup_iterations": 3,
}
"""As pytest-benchmark holds them once its command line is parsed."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Defaults of our own for what the command line leaves open; pytest-benchmark reads them after this."""
    config.stash[_MEDIANS] = {}
    given = " ".join(config.invocation_params.args)
    for option, value in _DEFAULTS.items():
        if f"--{option.replace('_', '-')}" not in given and hasattr(config.option, option):
            setattr(config.option, option, value)


def pytest_report_header() -> str | None:
    if all(os.environ.get(name) == value for name, value in ALLOCATOR_SETTINGS.items()):
        return None
    settings = " ".join(f"{name}={value}" for name, value in ALLOCATOR_SETTINGS.items())
    return f"glibc's default allocator: large calls vary less under {settings}"


@pytest.fixture
def medians(pytestconfig: pytest.Config) -> dict[str, dict[str, float]]:
    """Seconds a call, by case and variant, for the last table."""
    return pytestconfig.stash[_MEDIANS]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash[_MEDIANS]
    lines = [line for case, times in measured.items() for line in ratios(case, times)]
    if lines:
        terminalreporter.section("ours against each peer, medians")
        for line in lines:
            terminalreporter.write_line(line)


def ratios(case: str, times: dict[str, float]) -> list[str]:
    """A line for each of our variants: "case  ours  2.5 x eager, 1.9 x compile"."""
    peers = [peer for peer in PEERS if peer in times]
    return [
        f"{case:<44} {ours:<16} " + ", ".join(f"{times[peer] / times[ours]:.2g} x {peer}" for peer in peers)
        for ours in times
        if ours not in PEERS and peers
    ]
