"""The benchmark suite: ``python -m benchmarks --list``, ``python -m benchmarks --part kernels``.

Exit code 1 if an answer was wrong; how long it took is never a failure.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.options import Options
from benchmarks.parts import PARTS, Part
from benchmarks.schedule import Schedule
from benchmarks.timing import QUIET, settle_allocator

MINUTES = 9.0
"""What a whole run takes at the most, so that compiling the kernels and reading the table fit ten minutes too."""
SECONDS = 2.0
"""Of interleaved rounds for a kernel."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--part", default="all", help=f"{', '.join(PARTS)}, or several with commas (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="name what would run, and stop")
    parser.add_argument("--full", action="store_true", help="every case, however long it takes")
    parser.add_argument("--smoke", action="store_true", help="seconds: check the answers, at small sizes")
    parser.add_argument(
        "--only", metavar="REGEX", help="only cases whose name matches, however long it takes"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--minutes", type=float, help=f"to keep to, in all (default {MINUTES:g})")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="folder of PART-DEVICE.json"
    )
    parser.add_argument("--append", action="store_true", help="keep older records of other names in the file")
    parser.add_argument(
        "--seconds", type=float, help=f"of interleaved rounds for a kernel (default {SECONDS:g}; smoke 0.05)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default 2)")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args(argv)
    unknown = [name for name in chosen.part.split(",") if name not in PARTS and name != "all"]
    if unknown:
        parser.error(f"--part {unknown[0]!r} is unknown; there are {', '.join(PARTS)} and all")
    if chosen.minutes is not None and not chosen.minutes > 0:
        parser.error(f"--minutes is {chosen.minutes}; it must be positive")
    if chosen.minutes is None and not (chosen.full or chosen.smoke or chosen.only):
        chosen.minutes = MINUTES
    return chosen


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    seconds = args.seconds if args.seconds is not None else (0.05 if args.smoke else SECONDS)
    options = Options(args.device, args.full, args.smoke, args.only, args.compile and not args.smoke)
    parts = [PARTS[name] for name in (PARTS if args.part == "all" else args.part.split(","))]
    if args.list:
        for part in parts:
            list_part(part, options, seconds)
        return 0

    import torch

    torch.set_num_threads(args.threads)
    end = time.perf_counter() + 60 * args.minutes if args.minutes else None
    wrong: list[str] = []
    for place, part in enumerate(parts):
        # Its share of what is left: a part that was quick leaves more to those that follow.
        share = part.share / sum(other.share for other in parts[place:])
        budget = None if end is None else share * (end - time.perf_counter())
        path = args.out / f"{part.name}-{torch.device(args.device).type}.json"
        wrong += run(part, options, seconds, budget, path, append=args.append)
    for sentence in wrong:
        print(f"WRONG {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def list_part(part: Part, options: Options, seconds: float) -> None:
    """Name the cases, with what they take together."""
    cases = part.suite.cases(options)
    expected = sum(case.cost + part.rounds * seconds for case in cases) / 60
    print(
        f"{part.name}: {part.about}; {len(cases)} cases, about {expected:.0f} minutes if nothing is trimmed"
    )
    for case in cases:
        print(f"  {case.name}")


def run(
    part: Part, options: Options, seconds: float, budget: float | None, path: Path, *, append: bool
) -> list[str]:
    """Measure the cases that fit the budget into a results file; returns what was wrong."""
    from benchmarks import limits, results

    print(f"\n== {part.name}: {part.about}", flush=True)
    start = time.perf_counter()
    cases = part.suite.cases(options)
    if not cases:
        print("nothing matches")
        return []
    hurry = {"budget": 0.5} if options.smoke else {"budget": 4.0, "attempts": 3}
    machine = limits.measure(options.device, **hurry)
    if not options.smoke:
        print(limits.table(machine) + "\n", flush=True)
    print(part.suite.HEAD, flush=True)
    left = None if budget is None else budget - (time.perf_counter() - start)
    schedule = Schedule(left, part.rounds * seconds)
    records: list[results.Record] = []
    for case, given in schedule.turns(cases):
        measured = part.suite.measure(case, given, options, machine)
        records += measured
        for line in part.suite.lines(measured):
            print(line, flush=True)
        settings = {"smoke": options.smoke, "seconds": seconds, "device": options.device}
        results.save(path, part.name, results.new_run(machine, records, **settings), append=append)
    print(f"\n{path}: {len(records)} records in {time.perf_counter() - start:.0f} s")
    if schedule.left_out:
        names = "\n  ".join(schedule.left_out)
        print(f"left out for lack of time, --full or more --minutes has them:\n  {names}")
    busy = sorted({r.group for r in records if (r.details.get("other_load") or 0) > QUIET})
    if busy and not options.smoke:
        print(f"other programs used more than {QUIET:.0%} of the processors; do not trust {', '.join(busy)}")
    return list(part.suite.wrong_answers(records))


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that counts memory announces every start
    settle_allocator()
    sys.exit(main())
