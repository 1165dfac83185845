"""What got slower, less exact or hungrier between two results files: ``python -m benchmarks.compare OLD NEW``.

Times of two runs cannot be compared where the machine is shared, or is another one; speedups over a peer that was
interleaved can. A record got slower if over *every* peer the upper quartile of its new speedup lies below the lower
quartile of the old one, by more than the tolerance: one peer that became faster, or one noisy peer, is no regression.
Records without peers are judged by the share of their limit that they reach, and without limits by their times.
Errors are deterministic up to the order of sums, so a factor decides.

Exit code 0: nothing got worse; 1: something did; 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Json, Record, load, records

SLOWER = 0.05
"""Speedups whose quartiles are apart by less than this share are called equal."""
LESS_EXACT = 2.0
"""Errors that grew by less than this factor are called equal."""
ROUNDING = 1e-9
"""Errors below this are called equal in any case."""
HUNGRIER = 1.1


@dataclass(frozen=True)
class Change:
    """One record's difference in one respect; ``worse`` decides the exit code."""

    name: str
    kind: str
    text: str
    worse: bool


def compare(old: Json, new: Json, *, tolerance: float = SLOWER) -> Iterator[Change]:
    """Every difference worth a line, ours only: peers are measured against, not watched."""
    before = {record.name: record for record in records(old) if not record.peer}
    after = {record.name: record for record in records(new) if not record.peer}
    for name in before:
        if name not in after:
            yield Change(name, "missing", "is not in the new results", False)
            continue
        yield from _speed(before[name], after[name], tolerance)
        yield from _exactness(before[name], after[name])
        yield from _memory(before[name], after[name])


def _speed(old: Record, new: Record, tolerance: float) -> Iterator[Change]:
    pairs = _comparable(old, new)
    if not pairs:
        return
    text = ", ".join(f"{a['median']:.3g} -> {b['median']:.3g} {what}" for what, a, b in pairs)
    if all(b["high"] < a["low"] * (1 - tolerance) for _, a, b in pairs):
        yield Change(old.name, "slower", text, True)
    elif all(b["low"] * (1 - tolerance) > a["high"] for _, a, b in pairs):
        yield Change(old.name, "faster", text, False)


def _comparable(old: Record, new: Record) -> list[tuple[str, Json, Json]]:
    """What tells the speed of both: (unit, old, new), each the larger the faster."""
    peers = [peer for peer in old.speedup if peer in new.speedup]
    if peers:
        return [(f"x {peer}", old.speedup[peer], new.speedup[peer]) for peer in peers]
    if old.time is None or new.time is None:
        return []
    if "copy" in old.limits and "copy" in new.limits:
        a, b = _inverse(old.time, old.limits["copy"]), _inverse(new.time, new.limits["copy"])
        return [("of the copy", a, b)]
    return [("a second", _inverse(old.time, 1.0), _inverse(new.time, 1.0))]


def _inverse(time: Json, work: float) -> Json:
    return {"median": work / time["median"], "low": work / time["high"], "high": work / time["low"]}


def _exactness(old: Record, new: Record) -> Iterator[Change]:
    for output, was in old.error.items():
        if output not in new.error:
            continue
        now = new.error[output]
        if was is None:
            if now is not None:
                yield Change(old.name, "more exact", f"{output}: not finite -> {now:.1e}", False)
        elif now is None:
            yield Change(old.name, "less exact", f"{output}: {was:.1e} -> not finite", True)
        elif now > max(LESS_EXACT * was, ROUNDING):
            yield Change(old.name, "less exact", f"{output}: {was:.1e} -> {now:.1e}", True)
        elif was > max(LESS_EXACT * now, ROUNDING):
            yield Change(old.name, "more exact", f"{output}: {was:.1e} -> {now:.1e}", False)


def _memory(old: Record, new: Record) -> Iterator[Change]:
    if old.peak_bytes is None or new.peak_bytes is None:
        return
    if new.peak_bytes > HUNGRIER * old.peak_bytes + 4096:
        text = f"peak memory {old.peak_bytes} -> {new.peak_bytes} bytes"
        yield Change(old.name, "hungrier", text, True)


def warnings(old: Json, new: Json) -> Iterator[str]:
    """Why the comparison may mean little."""

    def places(content: Json) -> set[tuple[str, int]]:
        return {(run["machine"]["cpu"], run["machine"]["threads"]) for run in content["runs"]}

    if places(old) != places(new):
        yield f"measured on {sorted(places(old))} and on {sorted(places(new))}"
    for label, content in (("old", old), ("new", new)):
        busy = [run["settings"].get("other_load") or 0 for run in content["runs"]]
        if max(busy, default=0) > 0.1:
            yield f"other programs used {max(busy):.0%} of the processors during the {label} results"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__.split("\n")[0],
        epilog="Exit code 1 if something got worse.",
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=SLOWER, help=f"share, default {SLOWER}")
    args = parser.parse_args(argv)
    try:
        old, new = load(args.old), load(args.new)
    except ValueError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    if old["part"] != new["part"]:
        print(f"benchmarks.compare: {old['part']!r} and {new['part']!r} are different parts", file=sys.stderr)
        return 2
    for warning in warnings(old, new):
        print(f"note: {warning}")
    changes = sorted(compare(old, new, tolerance=args.tolerance), key=lambda c: (not c.worse, c.kind, c.name))
    for change in changes:
        print(f"{change.kind:<11} {change.name}: {change.text}")
    worse = sum(change.worse for change in changes)
    common = {r.name for r in records(old) if not r.peer} & {r.name for r in records(new) if not r.peer}
    print(f"{len(common)} compared, {worse} worse, {len(changes) - worse} other differences")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
