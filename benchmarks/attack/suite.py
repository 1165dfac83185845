"""The attack as a part of the suite; ``python -m benchmarks.attack`` runs the same cases with more options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.attack.__main__ import Case, cases_of, run_case, table
from benchmarks.options import Options
from benchmarks.results import Record

HEAD = ""


def cases(options: Options) -> list[Case]:
    every = cases_of(options.device, options.full)
    named = options.named(every)
    if named is not None:
        return named
    return [case for case in every if case.size == 8 or not options.smoke]


def measure(case: Case, seconds: float, options: Options, limits: Any) -> list[Record]:
    settings = argparse.Namespace(
        variants="", compile=options.compile, full=options.full, budget=seconds, min_rounds=3
    )
    return run_case(case, options.device, settings)


def lines(records: list[Record]) -> Iterator[str]:
    yield table(records)


def wrong_answers(records: list[Record]) -> Iterator[str]:
    for record in records:
        if not record.peer and not record.details["kl_share_of_loop"] > 0.9:
            yield f"{record.name}: reaches {record.details['kl_share_of_loop']:.0%} of the KL that the loop reaches"
