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
from benchmarks.parts import PARTS
from benchmarks.timing import OtherLoad, settle_allocator


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--part", default="all", help=f"{', '.join(PARTS)}, or several with commas (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="name what would run, and stop")
    parser.add_argument("--full", action="store_true", help="every case, not only what fits ten minutes")
    parser.add_argument("--smoke", action="store_true", help="seconds: check the answers, at small sizes")
    parser.add_argument("--only", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="folder of PART-DEVICE.json"
    )
    parser.add_argument("--append", action="store_true", help="keep older records of other names in the file")
    parser.add_argument(
        "--seconds", type=float, help="of each interleaved measurement (default 2; smoke 0.05)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default 2)")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args(argv)
    unknown = [name for name in chosen.part.split(",") if name not in PARTS and name != "all"]
    if unknown:
        parser.error(f"--part {unknown[0]!r} is unknown; there are {', '.join(PARTS)} and all")
    return chosen


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    seconds = args.seconds if args.seconds is not None else (0.05 if args.smoke else 2.0)
    options = Options(args.device, args.full, args.smoke, args.only, seconds)
    names = list(PARTS) if args.part == "all" else args.part.split(",")
    if args.list:
        for name in names:
            print(f"{name}: {PARTS[name].about}")
            for case in PARTS[name].names(options):
                print(f"  {case}")
        return 0

    import torch

    from benchmarks import limits, results

    torch.set_num_threads(args.threads)
    wrong: list[str] = []
    for name in names:
        part = PARTS[name]
        print(f"\n== {name}: {part.about}", flush=True)
        start = time.perf_counter()
        with OtherLoad() as load:
            measured = limits.measure(args.device, budget=0.5 if args.smoke else 6.0)
        if not args.smoke:
            print(limits.table(measured) + "\n", flush=True)
        records = part.run(options, measured)
        if not records:
            print("nothing matches")
            continue
        # Of the timed stretches alone: between them torch.compile's own workers are "other programs" too.
        loads = [load.fraction or 0.0, *(record.details.get("other_load") or 0.0 for record in records)]
        worst = max(loads)
        run = results.new_run(
            measured, records, smoke=args.smoke, seconds=seconds, device=args.device, other_load=worst
        )
        path = args.out / f"{name}-{torch.device(args.device).type}.json"
        results.save(path, name, run, append=args.append)
        wrong += part.wrong(records)
        print(f"\n{path}: {len(records)} records in {time.perf_counter() - start:.0f} s")
        if worst > 0.1 and not args.smoke:
            busy = sorted({r.group for r in records if (r.details.get("other_load") or 0) > 0.1})
            print(f"other programs used up to {worst:.0%} of the processors; do not trust {', '.join(busy)}")
    for sentence in wrong:
        print(f"WRONG {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler that counts memory announces every start
    settle_allocator()
    sys.exit(main())
